"""What an experiment computes: a vector, described by how it is trained or merged, without learning rate and seed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

Options = tuple[tuple[str, Any], ...]  # sorted by name


@dataclass(frozen=True)
class Run:
    """A vector that is trained.

    Attributes:
        task: The task to train on.
        options: Options of `taskvec.train`, except the learning rates and the seed.
        start: The vector that training starts from, with the same seed; None starts from the base.
        mask: The vector that the mask is taken from, with the same seed.
        disjoint: The vector whose positions the mask excludes (LoTTO), with the same seed.
        mix: Another task and the share of the examples to draw from it.
        rate: The learning rate, or the run whose learning rate is used; None tunes this run.
        rate_times: What the learning rate of the other run is multiplied by.
    """

    task: str
    options: Options = ()
    start: Spec | None = None
    mask: Spec | None = None
    disjoint: Spec | None = None
    mix: tuple[str, float] | None = None
    rate: Run | float | None = None
    rate_times: float = 1.0

    def option(self, name: str, default: Any = None) -> Any:
        """The value of an option."""
        return dict(self.options).get(name, default)

    @property
    def method(self) -> str:
        """The training method."""
        return str(self.option("method", "lota"))


@dataclass(frozen=True)
class Merge:
    """A vector that is merged from others.

    Attributes:
        parts: The vectors, all with the same seed.
        method: The merge method.
        search: Settings of `taskvec.merge` to choose from, each as options.
    """

    parts: tuple[Spec, ...]
    method: str
    search: tuple[Options, ...] = ((),)


Spec = Run | Merge


def described(spec: Spec) -> dict[str, Any]:
    """A spec as JSON, without the attributes that have their default."""
    if isinstance(spec, Merge):
        return {
            "merge": [described(part) for part in spec.parts],
            "method": spec.method,
            "search": [dict(options) for options in spec.search],
        }
    found: dict[str, Any] = {"task": spec.task, **dict(spec.options)}
    for name, value in (
        ("start", spec.start),
        ("mask_from", spec.mask),
        ("disjoint_from", spec.disjoint),
        ("rate", spec.rate),
    ):
        if value is not None:
            found[name] = value if isinstance(value, float) else described(value)
    if spec.rate_times != 1.0:
        found["rate_times"] = spec.rate_times
    if spec.mix:
        found["mix"] = list(spec.mix)
    return found


def key_of(spec: Spec) -> str:
    """A short digest of a spec, which names its results."""
    return hashlib.sha256(json.dumps(described(spec), sort_keys=True).encode()).hexdigest()[:12]
