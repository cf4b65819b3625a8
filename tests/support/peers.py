"""Conformance of merge methods: random vectors, merged by the functions of mergekit and peft and by taskvec.

Usage: python -m support.peers CASES SEED           compare with the installed versions, and print how many cases agree
       python -m support.peers CASES SEED --freeze  also write the results of the peers to tests/golden/merging.json

torch adds up to four numbers in order, and more numbers in an order that depends on the shape of the tensor, which
gives other sums in f32. taskvec always adds in order, and computes norms in f64. Each case is therefore computed twice
by the peer: unchanged, with differences counted in units in the last place (ULP) of the terms, and with the sums of
taskvec. Every program draws the entries that DARE drops in its own way, so the peers are given the draw of taskvec.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from support import merge_oracle as naive
from support.building import vector_of
from support.paths import GOLDEN
from taskvec import merge
from taskvec_formats import SparseTensor

FROZEN = GOLDEN / "merging.json"
# method -> option -> possible values; density and weights are drawn for all methods that have them
MERGEKIT: dict[str, dict[str, list[Any]]] = {
    "linear": {},
    "average": {},
    "ties": {"normalize": [True, False]},
    "dare_linear": {"rescale": ["norm", "none"], "seed": [0, 1]},
    "dare_ties": {"rescale": ["norm", "none"], "seed": [0, 1], "normalize": [True, False]},
    "breadcrumbs": {"gamma": [0.0, 0.01, 0.1]},
    "breadcrumbs_ties": {"gamma": [0.0, 0.01, 0.1], "normalize": [True, False]},
}
PEFT: dict[str, dict[str, list[Any]]] = {
    "linear": {},
    "magnitude_prune": {},
    "ties": {"elect": ["mass", "frequency"]},
    "dare_linear": {"seed": [0, 1]},
    "dare_ties": {"seed": [0, 1], "elect": ["mass", "frequency"]},
}
IN_ORDER = 4
PRUNED = {"ties", "magnitude_prune", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"}


@dataclass(frozen=True)
class Case:
    """A merge of one tensor.

    Attributes:
        peer: "mergekit" or "peft".
        method: The merge method.
        options: Its options.
        weights: One weight per vector.
        densities: One density per vector, or None if the method has none.
        vectors: Dense f32 values, as hexadecimal text.
        result: The result of the peer with sums in order, as hexadecimal text.
    """

    peer: str
    method: str
    options: dict[str, Any]
    weights: list[float]
    densities: list[float] | None
    vectors: list[str]
    result: str = ""

    def dense(self) -> list[np.ndarray]:
        return [from_hex(each) for each in self.vectors]

    def ours(self) -> np.ndarray:
        """Return the result of taskvec, dense, f32 [size]."""
        options = dict(self.options)
        if self.method in PRUNED - {"magnitude_prune"}:
            options["dialect"] = self.peer
        vectors = [vector_of({"w": sparse_of(dense)}) for dense in self.dense()]
        merged = merge(vectors, self.method, self.weights, density=self.densities, **options)["w"]
        dense = np.zeros(merged.size, np.float32)
        dense[merged.indices] = merged.values
        return dense


def from_hex(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), "<f4")


def sparse_of(dense: np.ndarray) -> SparseTensor:
    """Return the nonzero entries of a dense tensor."""
    indices = np.flatnonzero(dense)
    return SparseTensor(dense.shape, indices, dense[indices])


def ulps(case: Case, theirs: np.ndarray) -> float:
    """Return the largest difference between the results, in units in the last place of the sum of magnitudes."""
    magnitudes = [np.abs(dense).tobytes().hex() for dense in case.dense()]
    largest = np.abs(answer(replace(case, vectors=magnitudes, weights=[abs(weight) for weight in case.weights])))
    unit = np.spacing(np.maximum(largest, np.abs(theirs)))
    return float((np.abs(theirs.astype(np.float64) - case.ours()) / unit).max(initial=0))


def draw(dice: np.random.Generator, peer: str) -> Case:
    """Draw a random case: overlapping, disjoint, dense or empty masks, and weights of either sign."""
    methods = MERGEKIT if peer == "mergekit" else PEFT
    method = str(dice.choice(list(methods)))
    size, count = int(dice.integers(1, 33)), int(dice.integers(2, 9))
    values = dice.normal(size=(count, size)).astype("<f4")
    support = dice.choice(["meeting", "disjoint", "dense", "empty"], p=[0.5, 0.2, 0.2, 0.1])
    if support == "meeting":
        values[dice.random(values.shape) < dice.random()] = 0
    elif support == "disjoint":
        values[np.arange(count)[:, None] != dice.integers(0, count, size)] = 0
    elif support == "empty":
        values[0] = 0
    if dice.random() < 0.3:  # values that cancel
        values[1] = -values[0]
    weights = dice.choice([1.0, 0.5, 0.3, 2.0, -1.0, -0.7, 0.0], size=count).tolist()
    if method == "average" or count > IN_ORDER:
        weights = [abs(weight) + 0.1 for weight in weights]
    densities = dice.choice([0.1, 0.2, 0.5, 0.77, 1.0], size=count).tolist() if method in PRUNED else None
    if densities and peer == "peft":
        densities = [densities[0]] * count
    options = {name: choices[int(dice.integers(len(choices)))] for name, choices in methods[method].items()}
    return Case(peer, method, options, weights, densities, [row.tobytes().hex() for row in values])


@contextmanager
def drawn(case: Case) -> Iterator[None]:
    """Within the block, torch.bernoulli returns the draw of taskvec, vector by vector."""
    seed, densities = case.options.get("seed", 0), case.densities or []
    masks = iter(
        [
            torch.tensor([float(naive.stays(seed, number, "w", i, density)) for i in range(len(from_hex(vector)))])
            for number, (vector, density) in enumerate(zip(case.vectors, densities, strict=True))
            if density < 1
        ]
    )
    original = torch.bernoulli
    torch.bernoulli = lambda probabilities: next(masks).to(probabilities.dtype)
    try:
        yield
    finally:
        torch.bernoulli = original


def by_mergekit(case: Case) -> np.ndarray:
    from mergekit.merge_methods.api import merge_tensors

    names = {"linear": "task_arithmetic", "average": "task_arithmetic"}
    vectors = [torch.from_numpy(dense.copy()) for dense in case.dense()]
    options = {name: value for name, value in case.options.items() if name in {"normalize", "gamma"}}
    if case.method == "average":
        options["normalize"] = True
    if "rescale" in case.options:
        options["rescale"] = case.options["rescale"] == "norm"
    parameters = {"weight": case.weights, **options}
    if case.densities:
        parameters["density"] = case.densities
    if "gamma" in options:
        parameters["gamma"] = [options["gamma"]] * len(vectors)
    keyed = {
        name: dict(enumerate(value, 1)) if isinstance(value, list) else value for name, value in parameters.items()
    }
    merged = merge_tensors(
        [torch.zeros_like(vectors[0]), *vectors], names.get(case.method, case.method), parameters=keyed, base_index=0
    )
    return merged.numpy()


def by_peft(case: Case) -> np.ndarray:
    from peft.utils import merge_utils

    vectors, weights = [torch.from_numpy(dense.copy()) for dense in case.dense()], torch.tensor(case.weights)
    name = {"linear": "task_arithmetic"}.get(case.method, case.method)
    more: dict[str, Any] = {} if case.densities is None else {"density": case.densities[0]}
    if "elect" in case.options:
        more["majority_sign_method"] = {"mass": "total", "frequency": "frequency"}[case.options["elect"]]
    merged: torch.Tensor = getattr(merge_utils, name)(vectors, weights, **more)
    return merged.numpy()


def answer(case: Case) -> np.ndarray:
    """Return the result of the peer."""
    with drawn(case) if case.method.startswith("dare") else nothing():
        return by_mergekit(case) if case.peer == "mergekit" else by_peft(case)


def in_order(tensor: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Sum over the first axis in order, or over all elements in f64."""
    if tensor.dtype == torch.bool:
        return TORCH_SUM(tensor, dim)
    if dim is None:
        return TORCH_SUM(tensor.double()).to(tensor.dtype)
    total = torch.zeros_like(tensor[0])
    for row in tensor:
        total = total + row
    return total


TORCH_SUM = torch.Tensor.sum


def answer_in_order(case: Case) -> np.ndarray:
    """Return the result of the peer with sums computed in order."""
    torch.Tensor.sum = in_order  # type: ignore[assignment,method-assign]
    try:
        return answer(case)
    finally:
        torch.Tensor.sum = TORCH_SUM  # type: ignore[method-assign]


@contextmanager
def nothing() -> Iterator[None]:
    yield


def main(count: int, seed: int, *, freeze: bool) -> None:
    """Draw cases, run both programs, and print how many cases agree."""
    dice = np.random.default_rng(seed)
    torch.use_deterministic_algorithms(True)
    rows: dict[tuple[str, str, str], list[tuple[float, bool]]] = {}
    frozen = []
    for number in range(count):
        case = draw(dice, ("mergekit", "peft")[number % 2])
        theirs, ours = answer(case), case.ours()
        distance = 0.0 if np.array_equal(theirs, ours) else ulps(case, theirs)
        few = "2 to 4" if len(case.vectors) <= IN_ORDER else "5 to 8"
        ordered = answer_in_order(case)
        alike = np.array_equal(ordered, ours)
        rows.setdefault((case.peer, case.method, few), []).append((distance, alike))
        frozen.append(asdict(case) | {"result": ordered.astype("<f4").tobytes().hex()})
    versions = {peer: version(peer) for peer in ("mergekit", "peft")}
    print(f"seed {seed}, {', '.join(f'{peer} {number}' for peer, number in versions.items())}\n")
    print(
        "| peer | method | vectors | cases | equal to the bit | most ULP | equal with sums in the same order |\n"
        + "|---" * 7
        + "|"
    )
    for row, found in sorted(rows.items()):
        equal = sum(distance == 0 for distance, _ in found)
        most, alike = max(distance for distance, _ in found), sum(same for _, same in found)
        print(f"| {' | '.join(row)} | {len(found):,} | {equal:,} | {most:.1f} | {alike:,} |")
    if freeze:
        lines = ",\n".join(json.dumps(row) for row in frozen)
        FROZEN.write_text(f'{{"versions": {json.dumps(versions)}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["--freeze"]):
        sys.exit(__doc__)
    main(int(sys.argv[1]), int(sys.argv[2]), freeze=len(sys.argv) == 4)
