"""Weights and densities by layer and by name, as mergekit reads them."""

from __future__ import annotations

from typing import Any

import pytest
from building import sparse, vector_of
from hypothesis import given
from hypothesis import strategies as st

from taskvec import merge
from taskvec.errors import UsageError
from taskvec.merging import Rule
from taskvec.merging.settings import Depth, numbers_of, resolve

NAMES = [f"model.layers.{i}.mlp.up.weight" for i in range(5)]


def test_layers_lie_at_equal_steps_and_all_other_tensors_at_the_start() -> None:
    depth = Depth([*NAMES, "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
    assert [depth(name) for name in NAMES] == [0, 0.25, 0.5, 0.75, 1]
    assert depth("model.embed_tokens.weight") == 0
    assert depth("transformer.wpe.weight") == 0
    assert depth("lm_head.weight") == depth("model.norm.weight") == 0
    assert Depth(NAMES[:1])(NAMES[0]) == 1


def test_a_gradient_is_interpolated_over_the_layers() -> None:
    depth = Depth(NAMES)
    assert [resolve([0, 1], name, depth(name)) for name in NAMES] == [0, 0.25, 0.5, 0.75, 1]
    assert [resolve([0, 1, 0], name, depth(name)) for name in NAMES] == [0, 0.5, 1, 0.5, 0]
    assert [resolve([0.3], name, depth(name)) for name in NAMES] == [0.3] * 5


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=5), st.floats(0, 1))
def test_a_gradient_stays_between_its_neighbours_and_meets_its_ends(values: list[float], depth: float) -> None:
    found = resolve(values, "x", depth)
    assert found is not None
    place = depth * (len(values) - 1)
    near = values[int(place) : int(place) + 2]
    assert min(near) - 1e-12 <= found <= max(near) + 1e-12
    assert resolve(values, "x", 0) == values[0]
    assert resolve(values, "x", 1) == values[-1]


def test_the_first_rule_that_fits_counts() -> None:
    rules = [Rule(0.5, "mlp"), Rule([0, 1], "attn"), Rule(2.0)]
    assert resolve(rules, "layers.0.mlp", 0) == 0.5
    assert resolve(rules, "layers.0.attn", 0.5) == 0.5
    assert resolve(rules, "norm", 0) == 2
    assert resolve([Rule(1, "*")], "x", 0) == 1
    assert resolve(rules[:2], "norm", 0) is None


@pytest.mark.parametrize("setting", [[], "1", True, None, float("nan"), float("inf"), [1, [2]], [Rule(1), 2], [True]])
def test_a_setting_that_is_no_number_is_refused(setting: Any) -> None:
    with pytest.raises(UsageError, match="number"):
        numbers_of(setting)


def layered(value: float, name: str) -> Any:
    return vector_of({each: sparse((2,), {0: value}) for each in NAMES}, name=name)


def test_merge_weighs_layers_and_names() -> None:
    merged = merge(
        [layered(1, "a"), layered(10, "b")],
        "linear",
        [[0, 1], [Rule(0.5, ".2."), Rule(0.0)]],
    )
    values = [merged[name].values.tolist() for name in NAMES]
    assert values == [[], [0.25], [5.5], [0.75], [1.0]]
    assert merged.provenance["weights"] == [[0, 1], [{"filter": ".2.", "value": 0.5}, {"filter": None, "value": 0.0}]]


def test_merge_takes_a_density_a_vector_and_a_layer() -> None:
    vectors = [vector_of({name: sparse((4,), {0: 4, 1: -3, 2: 2, 3: 1}) for name in NAMES}, name=n) for n in "ab"]
    merged = merge(vectors, "ties", density=[0.25, [0, 1]], dialect="peft")
    assert [merged[name].indices.tolist() for name in NAMES] == [[0], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_lambda_may_differ_from_layer_to_layer() -> None:
    merged = merge([layered(2, "a")], "linear", lam=[1, 3])
    assert [merged[name].values.tolist() for name in NAMES] == [[2], [3], [4], [5], [6]]


def test_rules_that_leave_a_tensor_out_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"no rule gives tensor 'model\.layers\.0\.mlp\.up\.weight' a weight"):
        merge([layered(1, "a")], "linear", [[Rule(1, "attn")]])


def test_the_whole_vector_has_one_density() -> None:
    with pytest.raises(UsageError, match="one number for all tensors"):
        merge([layered(1, "a")], "ties", density=[[0.1, 0.2]])
