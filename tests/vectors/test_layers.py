"""Gradients are read over the layers of the base, at hand or not: as mergekit reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.building import Tensor, sparse, tensor, vector_of, write_checkpoint

from taskvec import TaskVector, apply, compose, diff, merge
from taskvec.errors import BaseMismatchError
from taskvec.merging import Rule
from taskvec.merging.settings import Depth
from taskvec.vectors.layers import counted, record, recorded
from taskvec_formats import Checkpoint, ModelFolder

OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def state(layers: int, moved: Callable[[str], bool]) -> dict[str, Tensor]:
    """A model of a stack of layers and another of three, of which some tensors moved by 1."""
    names = [f"model.layers.{i}.mlp.up.weight" for i in range(layers)]
    names += [f"vision.blocks.{i}.attn.weight" for i in range(3)]
    return {name: tensor("F32", np.full(4, 10.0 + moved(name))) for name in [*names, *OUTSIDE]}


def first(count: int) -> Callable[[str], bool]:
    """Which tensors lie in the first layers of the first stack."""
    return lambda name: any(f"layers.{i}." in name for i in range(count))


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return write_checkpoint(tmp_path / "base", state(5, lambda name: False))


def tuned(base: Checkpoint, name: str, moved: Callable[[str], bool]) -> TaskVector:
    """A fine-tune, packed and opened again."""
    folder = base.path.parent
    diff(base, write_checkpoint(folder / name, state(5, moved))).save(folder / f"{name}.lota")
    return TaskVector.open(folder / f"{name}.lota")


def moves(vector: TaskVector) -> dict[str, float]:
    return {name: vector[name].values[0].item() if len(vector[name]) else 0.0 for name in vector}


def at_layer(values: dict[str, float]) -> list[float]:
    return [value for name, value in values.items() if "layers" in name]


def again(vector: TaskVector, base: Checkpoint) -> TaskVector:
    path = base.path.parent / "again.lota"
    vector.save(path, force=True)
    return TaskVector.open(path)


def test_stacks_are_counted_apart() -> None:
    names = ["model.layers.11.a.weight", "model.layers.2.b", "encoder.block.3.layer.0.k", "shared.weight", "0.x", "w.7"]
    assert counted(names) == {"model.layers": 12, "encoder.block": 4}
    assert counted(["x." + "9" * 5000 + ".w"]) == {}


def test_a_vector_records_the_layers_that_it_does_not_reach() -> None:
    counts = {"model.layers": 5, "encoder.block": 4, "other": 9}
    assert record(["model.layers.2.w", "encoder.block.3.w", "lm_head.weight"], counts) == {
        "layers": {"model.layers": 5}
    }
    assert record(["model.layers.4.w"], counts) == {}
    assert record(["lm_head.weight"], counts) == {}
    for odd in (None, 3, [], {"a": "5"}, {"a": True}, {"a": -1}, {"a": 1.5}):
        assert recorded({"layers": odd}) == {}


def test_each_stack_has_its_own_depth() -> None:
    depth = Depth([f"encoder.block.{i}.layer.{j}.w" for i in range(3) for j in range(2)] + ["decoder.block.0.w"])
    assert [depth(f"encoder.block.{i}.layer.1.w") for i in range(3)] == [0, 0.5, 1]
    assert depth("decoder.block.0.w") == 1
    assert [depth(name) for name in ("shared.weight", *OUTSIDE)] == [0, 0, 0, 0]


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("from_file", [True, False])
def test_a_gradient_spans_the_layers_of_the_base(base: Checkpoint, with_base: bool, from_file: bool) -> None:
    vector = tuned(base, "a", first(3))
    if not from_file:
        vector = diff(base, ModelFolder(base.path.parent / "a"))
    merged = merge([vector], "linear", [[0, 1.0]], base=base if with_base else None)
    assert at_layer(moves(merged)) == [0, 0.25, 0.5]
    assert merged.provenance["notes"] == []


def test_tensors_outside_of_layers_lie_at_the_start_of_a_gradient(base: Checkpoint) -> None:
    merged = merge([tuned(base, "a", lambda name: True)], "linear", [[1.0, 3.0]], base=base)
    assert {name: moves(merged)[name] for name in OUTSIDE} == dict.fromkeys(OUTSIDE, 1.0)
    assert [moves(merged)[f"vision.blocks.{i}.attn.weight"] for i in range(3)] == [1, 2, 3]
    assert at_layer(moves(merged)) == [1, 1.5, 2, 2.5, 3]


def test_the_count_outlives_merges_sums_chains_and_sparsification(base: Checkpoint, tmp_path: Path) -> None:
    one, other = tuned(base, "a", first(2)), tuned(base, "b", first(1))
    middle = write_checkpoint(tmp_path / "middle", state(5, first(2)))
    further = state(5, first(2))
    chained = diff(
        middle, write_checkpoint(tmp_path / "end", further | {"model.norm.weight": tensor("F32", np.ones(4))})
    )
    descendants = {
        "merge": merge([one, other], "linear"),
        "sum": one + 2 * other,
        "chain": compose(one, chained),
        "chain on the base": compose(one, chained, base),
        "sparse": diff(base, ModelFolder(tmp_path / "a"), 0.5),
    }
    for how, vector in descendants.items():
        stored = again(vector, base)
        assert recorded(stored.provenance)["model.layers"] == 5, how
    merged = merge([again(descendants["merge"], base)], "linear", [[0, 1.0]])
    assert at_layer(moves(merged)) == [0, 0.25 * 1]


def test_a_vector_that_reaches_the_last_layer_records_nothing(base: Checkpoint) -> None:
    vector = tuned(base, "a", lambda name: True)
    assert recorded(vector.provenance) == {}
    # the count of one vector serves the others
    merged = merge([vector, tuned(base, "b", first(2))], "linear", [[0, 1.0], [0, 1.0]])
    assert at_layer(moves(merged)) == [0, 0.5, 0.5, 0.75, 1]


def test_layers_that_only_the_vectors_tell_are_said() -> None:
    vector = vector_of({f"model.layers.{i}.w": sparse((2,), {0: 1}) for i in range(3)})
    said = merge([vector], "linear", [[0, 1.0]]).provenance["notes"]
    assert said == ["gradients are read over the layers that the vectors hold (model.layers 3)"]
    for weights in ([1.0], [[2.0, 2.0]], [[Rule(0.5, "a"), Rule(1.0)]]):
        settings: Any = weights
        assert merge([vector], "linear", settings).provenance["notes"] == []


def test_a_base_that_is_not_that_of_the_vectors_is_refused_by_tensor(base: Checkpoint, tmp_path: Path) -> None:
    vector = tuned(base, "a", first(3))
    other = write_checkpoint(tmp_path / "other", {"model.layers.0.mlp.up.weight": tensor("F32", np.ones(5))})
    with pytest.raises(
        BaseMismatchError, match=r"tensor 'model.layers.0.mlp.up.weight' should be F32 \[4\], found F32 \[5\]"
    ):
        merge([vector], "linear", base=other)
    less = write_checkpoint(tmp_path / "less", {"x": tensor("F32", np.ones(5))})
    with pytest.raises(BaseMismatchError, match=r"it has no tensor 'model.layers.0.mlp.up.weight'"):
        merge([vector], "linear", base=less)


def test_a_folder_gets_what_the_gradient_says(base: Checkpoint, tmp_path: Path) -> None:
    merged = merge([tuned(base, "a", first(3))], "ties", [[0, 1.0]], density=1.0, base=base)
    apply(merged, base, tmp_path / "out")
    written = ModelFolder(tmp_path / "out")
    values = [written.bits(f"model.layers.{i}.mlp.up.weight").view(np.float32)[0] for i in range(5)]
    assert values == [10, 10.25, 10.5, 10, 10]
