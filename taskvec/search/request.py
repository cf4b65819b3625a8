"""The checks of a search before the model is loaded, and the recipe of its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from taskvec_formats import Checkpoint
from taskvec_formats.system.atomic import atomic_file

from ..applying.verified import check_forms
from ..arguments import real, whole
from ..destination import appearing, check_file
from ..devices import check_device
from ..errors import BaseMismatchError, UsageError
from ..evaluation.scoring import check_request, needs_answers
from ..merging.bases import check_bases
from ..merging.combine import merge
from ..reporting.progress import Progress
from ..vectors.vector import TaskVector
from .data import TaskData, split
from .space import METHODS, Candidate, Space

if TYPE_CHECKING:
    from .search import Search


@dataclass(frozen=True)
class SearchRequest:
    """A search that was checked."""

    vectors: Sequence[TaskVector]
    base: Checkpoint
    data: Sequence[TaskData]
    space: Space
    settings: dict[str, object]
    study: Path | None

    def begin(self, progress: Progress) -> Search:
        """Load the model, and open the study. The errors of `Search` are raised."""
        from .search import Search, Settings

        settings = Settings(**self.settings)  # type: ignore[arg-type]
        return Search(self.vectors, self.base, self.data, self.space, settings, self.study, progress)


def check_search(
    vectors: Sequence[TaskVector],
    base: Checkpoint,
    data: Sequence[tuple[str, Path]],
    *,
    metric: str = "loss",
    methods: Sequence[str] | None = None,
    by: str | None = None,
    trials: int = 50,
    timeout: float | None = None,
    pareto: bool = False,
    holdout: float = 0.5,
    limit: int | None = None,
    seed: int = 0,
    study: Path | None = None,
    device: str = "auto",
    batch_size: int = 32,
    max_length: int = 1024,
    max_new_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> SearchRequest:
    """Check the request of a search, without loading torch.

    Args:
        vectors: The vectors to merge, at least two.
        base: The model folder that they start from.
        data: (name, path) of each task.
        metric: "loss", "exact_match" or "rouge1".
        methods: The methods to try. None tries those of `space.METHODS`.
        by: As in `Space`.
        trials: The number of trials.
        timeout: The number of seconds after which no trial is begun.
        pareto: Whether each task is an objective of its own.
        holdout: The share of the examples to report on.
        limit: The number of examples of each task to use, from the first.
        seed: The seed of the search and of the division of the data.
        study: The file of the study.
        device: As in `evaluate_variants`.
        batch_size: As in `evaluate`.
        max_length: As in `evaluate`.
        max_new_tokens: As in `evaluate`.
        trust_remote_code: As in `evaluate_variants`.

    Raises:
        UsageError: An argument is invalid, a task has no name or too few examples, or rouge-score is missing.
        BaseMismatchError: The vectors have different bases, or do not fit this one.
        DataError: A row cannot be understood, or has no answer that the metric can compare.
        MergeError, KindError: The vectors cannot be merged.
    """
    counts = {"batch_size": batch_size, "max_length": max_length, "trials": trials, "limit": limit}
    check_request([metric], max_new_tokens=max_new_tokens, **counts)
    check_device(device)
    if not 0 <= whole("`seed`", seed) < 1 << 32:
        raise UsageError(f"`seed` must be at least 0 and below {1 << 32}, found {seed}")
    if timeout is not None and not real("`timeout`", timeout) > 0:
        raise UsageError(f"`timeout` must be greater than zero, found {timeout}")
    names = [name for name, _ in data]
    if not data:
        raise UsageError("a search needs the `data` of at least one task")
    for name, path in data:
        if name in ("", str(path)):
            raise UsageError(
                f"`data` needs a name of letters, digits, '.', '-' and '_' for each task, such as sql=dev.jsonl; found "
                f"{str(path)!r}"
            )
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two `data` have the name {twice[0]!r}")
    if pareto and len(data) < 2:
        raise UsageError("`pareto` needs the data of at least two tasks")
    space = Space(vectors, METHODS if methods is None else methods, by)
    check_bases(vectors)
    for vector in vectors:
        if vector.base.fingerprint != vectors[0].base.fingerprint:
            raise BaseMismatchError(f"{vectors[0].name} and {vector.name} have different bases")
        check_forms(vector, base)
    merge(vectors, "ties")  # reads no entry, but refuses patches and tensors that cannot be added
    parts = split(dict(data), holdout, limit=limit, seed=seed)
    if needs_answers([metric]):
        _check_answers(parts, metric)
    settings: dict[str, object] = {
        "metric": metric,
        "pareto": pareto,
        "seed": seed,
        "device": device,
        "batch_size": batch_size,
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "trust_remote_code": trust_remote_code,
    }
    return SearchRequest(vectors, base, parts, space, settings, study)


def _check_answers(parts: Sequence[TaskData], metric: str) -> None:
    """Raise UsageError for an example whose answer the metric cannot compare."""
    for task in parts:
        for example in (*task.chosen_on, *task.reported_on):
            if example.answer is not None:
                raise UsageError(
                    f"{example.where}: the last turn calls tools or has thoughts: `metric={metric}` cannot compare it"
                )


def write_recipe(path: Path, candidate: Candidate, vectors: Sequence[str], base: str, *, force: bool = False) -> None:
    """Write a merge as a recipe.

    Args:
        path: The YAML file to write.
        candidate: The merge.
        vectors: The paths of the vectors.
        base: The path of the base.
        force: Whether to replace an existing file.

    Raises:
        OutputExistsError: The file exists and `force` is False. The other errors of `check_file` are raised too.
    """
    check_file(path, force=force)
    text = yaml.safe_dump(candidate.recipe(vectors, base), sort_keys=False, allow_unicode=True)
    with appearing(path), atomic_file(path, replace=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
