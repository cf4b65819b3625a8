"""Invalid arguments of the public functions, of any type: the error is one sentence that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.building import sparse, tensor, vector_of, write_checkpoint

from taskvec import (
    Checkpoint,
    FormatError,
    SparseTensor,
    TaskvecError,
    TaskVector,
    apply,
    attach,
    compose,
    diff,
    evaluate,
    merge,
    open_checkpoint,
    overlap,
    sparse_finetune,
    train,
    verify,
    write_model,
)
from taskvec.applying.output import Output
from taskvec.arguments import real, said, whole
from taskvec.errors import MaskError, UsageError
from taskvec.training.options import TrainingOptions
from taskvec_formats import ModelFolder


class Case(NamedTuple):
    """Valid arguments for the calls."""

    base: Checkpoint
    tuned: Checkpoint
    vector: TaskVector
    patch: TaskVector
    folder: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    base = write_checkpoint(folder / "base", {"w": tensor("F32", [1, 2, 3, 4])})
    tuned = write_checkpoint(folder / "tuned", {"w": tensor("F32", [1.5, 2, 3.5, 4])})
    return Case(base, tuned, diff(base, tuned), diff(base, tuned, kind="patch"), folder)


STRANGE: list[Any] = [
    *(None, "x", "", "\0", "\ud800", b"x", 0, -1, 1.5, float("nan"), float("inf"), 10**400, True, 1j, object(), print),
    *([], [None], {}, (), Path("nope"), np.float32(0.5), np.int64(-1), np.array([1, 2]), np.array(1.0)),
    *(Decimal("sNaN"), Decimal("0.5"), Fraction(1, 3), torch.tensor([1.0]), SparseTensor.empty((2,))),
]


def could_be_written(value: Any) -> bool:
    """Whether a value is a valid path in the working directory, where tests must not write."""
    return (isinstance(value, str) and value == "x") or isinstance(value, Path)


CALLS: dict[str, Callable[[Case, Any], object]] = {
    "diff, base": lambda case, value: diff(value, case.tuned),
    "diff, tuned": lambda case, value: diff(case.base, value),
    "diff, sparsity": lambda case, value: diff(case.base, case.tuned, value),
    "diff, kind": lambda case, value: diff(case.base, case.tuned, kind=value),
    "merge": lambda case, value: merge(value),
    "merge, a vector": lambda case, value: merge([case.vector, value]),
    "compose, first": lambda case, value: compose(value, case.vector),
    "compose, second": lambda case, value: compose(case.vector, value),
    "compose, base": lambda case, value: compose(case.vector, case.vector, 0 if value is None else value),
    "apply, vector": lambda case, value: apply(value, case.base, case.folder / "out"),
    "apply, base": lambda case, value: apply(case.vector, value, case.folder / "out"),
    "apply, out": lambda case, value: apply(case.vector, case.base, None if could_be_written(value) else value),
    "apply, dtype": lambda case, value: apply(case.vector, case.base, case.folder / "out", dtype=value, force=True),
    "apply, shard_size": lambda case, value: apply(
        case.vector, case.base, case.folder / "out", shard_size=value, force=True
    ),
    "apply, progress": lambda case, value: apply(
        case.vector, case.base, case.folder / "out", progress=False if value is print else value, force=True
    ),
    "write_model": lambda case, value: write_model(value, case.base, case.folder / "merged"),
    "write_model, base": lambda case, value: write_model([case.vector], value, case.folder / "merged"),
    "verify, vector": lambda case, value: verify(value),
    "write_model, out": lambda case, value: write_model(
        [case.vector], case.base, None if could_be_written(value) else value
    ),
    "apply, force": lambda case, value: apply(case.vector, case.base, case.folder / "out", force=value),
    "apply, max_bytes": lambda case, value: apply(
        case.vector, case.base, case.folder / "out", max_bytes=value, force=True
    ),
    "save": lambda case, value: case.vector.save(None if could_be_written(value) else value),
    "save, progress": lambda case, value: case.vector.save(
        case.folder / "x.lota", progress=False if value is print else value, force=True
    ),
    "train, options": lambda case, value: train(case.base, "x", 0 if value is None else value),
    "train, mix": lambda case, value: train(case.base, "x", mix=value),
    "evaluate, device": lambda case, value: evaluate(case.base, case.folder / "rows.jsonl", device=value),
    "attach, model": lambda case, value: attach(value, case.vector, base=case.base),
    "attach, vector": lambda case, value: attach(torch.nn.Linear(2, 2), value),
    "attach, scale": lambda case, value: attach(torch.nn.Linear(2, 2), case.vector, value),
    "shrink": lambda case, value: case.vector.shrink(value),
    "overlap": lambda case, value: overlap(value),
    "overlap, a vector": lambda case, value: overlap([case.vector, value]),
    "change": lambda case, value: case.vector.change(value),
    "change, start": lambda case, value: case.vector.change("w", value),
    "change, stop": lambda case, value: case.vector.change("w", 0, value),
    "save, codec": lambda case, value: case.vector.save(case.folder / "x.lota", codec=value),
    "open_checkpoint": lambda case, value: open_checkpoint(value),
    "Checkpoint": lambda case, value: ModelFolder(value),
    "merge, method": lambda case, value: merge([case.vector], value),
    "TaskVector.open": lambda case, value: TaskVector.open(value),
    "times": lambda case, value: case.vector * value,
    "by": lambda case, value: case.vector / value,
    "plus": lambda case, value: case.vector + value,
    "SparseTensor, shape": lambda case, value: SparseTensor(value, np.array([0]), np.ones(1)),
    "SparseTensor, indices": lambda case, value: SparseTensor((4,), value, np.ones(1)),
    "SparseTensor, values": lambda case, value: SparseTensor((4,), np.array([0]), value),
    "Output, shard_size": lambda case, value: Output(shard_size=value),
    "Output, dtype": lambda case, value: Output(dtype=value),
    "Output, card": lambda case, value: Output(card=value),
    **{
        f"TrainingOptions, {name}": lambda case, value, name=name: TrainingOptions(**{name: value}).check()
        for name in TrainingOptions.__dataclass_fields__
    },
}


@pytest.mark.parametrize("call", CALLS)
def test_no_argument_ends_in_an_error_from_the_depths(call: str, case: Case) -> None:
    for value in STRANGE:
        message = outcome(call, case, value)
        assert len(message) < 400
        assert "\n" not in message


def outcome(call: str, case: Case, value: Any) -> str:
    """Return the error message of a call, or an empty text if it succeeds."""
    try:
        CALLS[call](case, value)
    except (TaskvecError, FormatError, TypeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("call", "value", "message"),
    [
        ("diff, base", "base", "base: no such file or folder"),
        ("diff, sparsity", "0.9", "`sparsity` must be a number, found '0.9'"),
        (
            "diff, sparsity",
            10**400,
            "`sparsity` must be between 0 and 1, both excluded; found a number of about 400",
        ),
        ("diff, base", "", "base must be a path, found ''"),
        ("diff, tuned", "", "tuned must be a path, found ''"),
        ("merge, a vector", "", "vectors, number 2, must be a path, found ''"),
        ("verify, vector", "", "vector must be a path, found ''"),
        ("TaskVector.open", "", "path must be a path, found ''"),
        ("open_checkpoint", "", "the model must be a path, found ''"),
        ("save", "", "the output path is empty: expected the name of a file or folder"),
        ("diff, kind", ["vector"], "`kind` is one of vector, patch, found ['vector']"),
        ("merge", "ab", "vectors must be a list of TaskVectors or paths, found 'ab'"),
        ("diff, base", 3, "base must be a Checkpoint or a path, found 3"),
        ("merge, a vector", 3, "vectors, number 2, must be a TaskVector or the path of a .lota file, found 3"),
        ("overlap", None, "vectors must be a list of TaskVectors or paths, found None"),
        ("apply, out", 3, "out must be a path, found 3"),
        ("apply, force", "false", "force must be True or False, found 'false'"),
        ("apply, max_bytes", "10", "max_bytes must be a whole number, found '10'"),
        ("save", None, "the output must be a path, found None"),
        ("TaskVector.open", b"x", "path must be a path, found b'x'"),
        ("open_checkpoint", None, "the model must be a path, found None"),
        ("write_model, out", "/", "/ cannot be replaced: name a folder in it"),
        ("train, options", {"steps": 3}, "options must be a TrainingOptions, found {'steps': 3}"),
        ("train, mix", "x", "mix must be a list of pairs of a path and a share, found 'x'"),
        ("train, mix", ["x"], "mix must be a list of pairs of a path and a share, found 'x' in it"),
        ("evaluate, device", None, "`device` must be a str, found None"),
        ("attach, model", "x", "model must be a Module, found 'x'"),
        ("attach, vector", 3, "vector must be a TaskVector, the path of a .lota file or a list of them, found 3"),
        ("attach, scale", "x", "scale must be a number, found 'x'"),
        ("apply, progress", "yes", "progress must be True, False or a callable, found 'yes'"),
        ("change", "x", "tuned has no tensor 'x'"),
        ("change, start", 5, "tensor 'w' has 4 elements: 5 to 4 is not a range of them"),
        ("change, start", -1, "tensor 'w' has 4 elements: -1 to 4 is not a range of them"),
        (
            "change, stop",
            10**400,
            "tensor 'w' has 4 elements: 0 to a number of about 400 digits is not a range of them",
        ),
        ("Output, shard_size", "2GB", "shard_size must be a whole number, found '2GB'"),
        ("Output, card", b"# x", "card must be a str, found b'# x'"),
        ("TrainingOptions, lr", "1e-4", "`lr` must be a number, found '1e-4'"),
        ("TrainingOptions, batch_size", 1.5, "`batch_size` must be a whole number, found 1.5"),
        ("TrainingOptions, seed", -1, "`seed` must be at least 0 and below 4294967295, found -1"),
        ("TrainingOptions, low_memory", "no", "`low_memory` must be True or False, found 'no'"),
        ("TrainingOptions, method", None, "`method` must be a str, found None"),
    ],
)
def test_what_is_wrong_is_said(call: str, value: Any, message: str, case: Case) -> None:
    with pytest.raises(UsageError) as refused:
        CALLS[call](case, value)
    assert str(refused.value).startswith(message)


def test_one_vector_is_no_list_of_vectors(case: Case) -> None:
    for call in (merge, overlap):
        with pytest.raises(UsageError, match="must be a list of TaskVectors"):
            call(case.vector)  # type: ignore[arg-type]


NUMBERS = [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2), Decimal("0.5"), 0.5]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_numbers_of_any_kind_are_numbers(number: Any, case: Case, tmp_path: Path) -> None:
    sparse_vector = diff(case.base, case.tuned, number)
    assert sparse_vector.provenance["sparsity"] == 0.5
    assert type(sparse_vector.provenance["sparsity"]) is float
    sparse_vector.save(tmp_path / "x.lota")
    options = TrainingOptions(sparsity=number, lr=number, via=[number], epochs=number)  # type: ignore[arg-type]
    assert [type(each) for each in (options.sparsity, options.lr, options.epochs, *options.via)] == [float] * 4
    assert options == replace(options, via=number)
    assert real("x", number) == 0.5


def test_whole_numbers_of_any_kind_are_ints() -> None:
    options = TrainingOptions(
        steps=np.int64(3), batch_size=torch.tensor(2), seed=np.uint8(7), epochs=2, low_memory=np.True_
    )
    found = options.steps, options.batch_size, options.seed, options.epochs, options.low_memory
    assert found == (3, 2, 7, 2, True)
    assert [type(each) for each in found] == [int, int, int, int, bool]
    assert Output(shard_size=np.int32(5)) == Output(shard_size=5)
    assert type(Output(shard_size=np.int32(5)).shard_size) is int
    with pytest.raises(UsageError, match=r"^x must be a whole number, found 3\.0$"):
        whole("x", 3.0)


@pytest.mark.parametrize("factor", [Fraction(1, 2), Decimal("0.5"), np.float32(0.5)])
def test_fractions_and_decimals_are_factors(factor: Any) -> None:
    vector = vector_of({"w": sparse((4,), {1: 3.0})})
    for half in (vector * factor, factor * vector, vector / (1 / factor)):
        assert half["w"].values.tolist() == [1.5]
        assert half.provenance["parents"][0]["weight"] == 0.5


@pytest.mark.parametrize(
    "factor", [10**400, -(10**400), Fraction(10**400), Decimal("1e400"), Decimal("NaN"), Decimal("sNaN")]
)
def test_factors_beyond_f64_are_refused(factor: Any) -> None:
    vector = vector_of({"w": sparse((4,), {1: 3.0})}, name="v")
    with pytest.raises(UsageError, match=r"^the factor of v must be a finite number, found (-?inf|nan)$"):
        vector * factor
    with pytest.raises(UsageError, match=r"^v can only be divided by a finite non-zero number, found .{1,60}$"):
        vector / factor


def test_a_value_in_an_error_is_never_long() -> None:
    assert said("x" * 100) == f"'{'x' * 56}..."
    assert said(10**5000) == "a number of about 5000 digits"
    assert said(12) == "12"


def test_deltas_of_another_kind_are_refused() -> None:
    for delta, message in (
        (SparseTensor((4,), np.array([1]), np.ones(1)), r"must be F32 \[4\], found float64 \[4\]"),
        (sparse((5,), {1: 1}), r"must be F32 \[4\], found float32 \[5\]"),
    ):
        vector = vector_of({"w": sparse((4,), {1: 1})})
        with pytest.raises(UsageError, match=message):
            type(vector.source)({"w": delta}, vector.specs)
    with pytest.raises(UsageError, match="deltas are given for 'x', which is not one of the tensors"):
        type(vector.source)({"x": delta}, vector.specs)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.array([1.5]), r"must be int64 \[n\], found float64 \[1\]"),
        (np.array([True, False]), r"must be int64 \[n\], found bool \[2\]"),
        (np.array([[1]]), r"must be int64 \[n\], found int64 \[1, 1\]"),
        (np.array([1 << 63], np.uint64), r"must be int64 \[n\], found uint64 \[1\]"),
        ([[1], [1, 2]], r"must be int64 \[n\] \("),
        ("x", r"must be int64 \[n\], found <U1 \[\]"),
        (np.array([2, 1]), "its mask must contain increasing positions below 6"),
        ([-1], "its mask must contain increasing positions below 6"),
    ],
)
def test_masks_that_are_none_are_refused(mask: Any, message: str) -> None:
    with (
        pytest.raises(MaskError, match=f"^parameter 'weight': .*{message}"),
        sparse_finetune(torch.nn.Linear(2, 3), {"weight": mask}),
    ):
        pass


@pytest.mark.parametrize("mask", [[0, 4], (0, 4), np.array([0, 4], np.uint8), torch.tensor([0, 4])])
def test_masks_of_any_whole_numbers_are_taken(mask: Any) -> None:
    with sparse_finetune(torch.nn.Linear(2, 3), {"weight": mask}) as model:
        assert model.leaves["weight"].indices.tolist() == [0, 4]
        model.load_state_dict(model.state_dict())


def test_what_is_finetuned_is_a_model() -> None:
    for arguments, message in (
        ((3, {}), "^model must be a Module, found 3$"),
        ((torch.nn.Linear(1, 1), [1]), r"^mask must be a TaskVector or the path of a .lota file, found \[1\]$"),
        ((torch.nn.Linear(1, 1), {}, 3), "^base must be a Checkpoint or a path, found 3$"),
    ):
        with pytest.raises(UsageError, match=message), sparse_finetune(*arguments):  # type: ignore[arg-type]
            pass


def test_paths_may_be_strings(case: Case, tmp_path: Path) -> None:
    case.vector.save(str(tmp_path / "x.lota"))
    opened = TaskVector.open(str(tmp_path / "x.lota"))
    assert apply(opened, ModelFolder(str(case.base.path)), str(tmp_path / "out")).exact  # type: ignore[arg-type]
