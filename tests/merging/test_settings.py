"""Weights and densities by layer and by name, as mergekit reads them."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.building import sparse, vector_of

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


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (10**400, "weight of a: expected a finite number, found a number of about 400 digits"),
        ([1, 10**400], "weight of a: expected a finite number, found a number of about"),
        (np.float32("nan"), "weight of a: expected a finite number, found np.float32\\(nan\\)"),
        (np.bool_(True), "weight of a: expected a finite number, found np.True_"),
        (Decimal("sNaN"), "weight of a: expected a finite number, found Decimal"),
        (1j, "weight of a: expected a finite number, found 1j"),
        ("x" * 1000, "weight of a: expected a finite number, found 'xxx.*\\.\\.\\.$"),
        (np.zeros((30, 30)), "weight of a: expected a finite number, found array"),
        (Rule(0.5), "weight of a: the rules of a vector must be a list, found Rule"),
        ([Rule(0.5, 3)], "weight of a: the filter of a rule must be text, found 3"),  # type: ignore[arg-type]
        ([Rule("x")], "weight of a: expected a finite number, found 'x'"),  # type: ignore[arg-type]
    ],
)
def test_a_weight_that_cannot_be_meant_is_refused_in_one_line(setting: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}") as caught:
        merge([layered(1, "a")], "linear", [setting])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


def test_an_integer_that_python_does_not_print_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^weight of a: expected a finite number, found a number of about 5000 digits"
    ):
        merge([layered(1, "a")], "linear", [-(10**5000)])
    with pytest.raises(UsageError, match=r"or a list of rules, found a list$"):
        merge([layered(1, "a")], "linear", [[[10**5000]]])  # type: ignore[list-item]


@pytest.mark.parametrize("number", [np.float32(2), np.float64(2), np.int8(2), Fraction(2), Decimal(2), 2])
def test_numbers_of_any_library_are_numbers(number: Any) -> None:
    merged = merge([layered(3, "a")], "linear", [number], lam=number)
    assert merged[NAMES[0]].values.tolist() == [12]
    assert merged.provenance["weights"] == [2]
    assert type(merged.provenance["weights"][0]) in (int, float)
    shares = merge([layered(3, "a")], "ties", density=np.float32(0.5), dialect="peft").provenance["options"]
    assert type(shares["density"]) is float
    assert merge([layered(3, "a")], "linear", np.array([2.0]))[NAMES[0]].values.tolist() == [6]  # type: ignore[arg-type]


def test_a_list_of_rules_is_one_density_for_all_vectors() -> None:
    rules = [Rule(0.5, ".0."), Rule(1.0)]
    for vectors in ([layered(1, "a")], [layered(1, "a"), layered(2, "b")], [layered(i + 1, str(i)) for i in range(3)]):
        found = merge(vectors, "ties", density=rules, dialect="peft")
        wanted = merge(vectors, "ties", density=[rules] * len(vectors), dialect="peft")
        assert [found[name].values.tolist() for name in found] == [wanted[name].values.tolist() for name in wanted]
    with pytest.raises(UsageError, match=r"^2 densities for 1 vectors"):
        merge([layered(1, "a")], "ties", density=[rules, rules])
    with pytest.raises(UsageError, match=r"^density of b: expected a share of the weights between 0 and 1, found 2"):
        merge([layered(1, "a"), layered(1, "b")], "ties", density=[0.5, [Rule(2.0)]])


def test_a_seed_is_a_whole_number_of_64_bits() -> None:
    def kept(seed: Any) -> Any:
        merged = merge([layered(1, "a")], "dare_linear", density=0.5, seed=seed)
        return [merged[name].indices.tolist() for name in merged], merged.provenance["options"]["seed"]

    assert kept(np.int64(7)) == kept(7)
    assert type(kept(np.uint8(7))[1]) is int
    assert kept(-1)[1] == -1
    assert kept(2**64 - 1)[1] == 2**64 - 1
    for seed in (True, np.True_, 1.0, "1", None):
        with pytest.raises(UsageError, match=r"^`seed` must be a (whole )?number, found"):
            kept(seed)
    for seed in (2**64, 10**5000, -(2**63) - 1):
        with pytest.raises(UsageError, match=r"^`seed` must be at least -\d{19} and at most \d{20}, found"):
            kept(seed)


@pytest.mark.parametrize("value", [np.ones(3), [True], 1, "true", {}])
def test_a_choice_that_cannot_be_compared_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^`normalize` must be True or False, found"):
        merge([layered(1, "a")], "ties", normalize=value)


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
    with pytest.raises(UsageError, match=r"^weight of a: no rule matches tensor 'model\.layers\.0\.mlp\.up\.weight'"):
        merge([layered(1, "a")], "linear", [[Rule(1, "attn")]])


def test_the_whole_vector_has_one_density() -> None:
    with pytest.raises(UsageError) as refused:
        merge([layered(1, "a")], "ties", density=[[0.1, 0.2]])
    assert str(refused.value) == (
        "`density` of a must be one number for all tensors, because the dialect reference trims a vector as a whole, "
        "found 0.1 to 0.2; give one number, or choose `dialect=mergekit` or `dialect=peft`, which trim each tensor"
    )
    for dialect in ("mergekit", "peft"):
        assert merge([layered(1, "a")], "ties", density=[[0.1, 0.2]], dialect=dialect)
    for method in ("magnitude_prune", "dare_ties", "breadcrumbs", "breadcrumbs_ties"):
        assert merge([layered(1, "a")], method, density=[[0.1, 0.2]])


@pytest.mark.parametrize("given", [{0.5}, {"a": 0.5}, (0.5 for _ in range(1)), "5", b"5"])
def test_weights_and_densities_that_are_no_list_are_refused(given: Any) -> None:
    found = re.escape(repr(given))
    with pytest.raises(UsageError, match=f"^`weights` must be a list with one setting per vector, found {found}"):
        merge([layered(1, "a")], "linear", given)
    with pytest.raises(UsageError, match=f"^`density` must be a number, or a list .* vector, found {found}"):
        merge([layered(1, "a")], "ties", density=given)


@pytest.mark.parametrize("given", [0.5, 1, np.float32(2), np.array(2.0), np.ones((1, 1)), torch.tensor(2.0), Rule(1.0)])
def test_one_number_is_no_list_of_weights(given: Any) -> None:
    with pytest.raises(UsageError, match=r"^`weights` must be a list with one setting per vector, found "):
        merge([layered(1, "a")], "linear", given)


@pytest.mark.parametrize(
    "convert", [list, tuple, np.array, torch.tensor, lambda numbers: torch.tensor(numbers, dtype=torch.bfloat16)]
)
def test_weights_and_densities_are_lists_tuples_or_arrays(convert: Any) -> None:
    vectors = [vector_of({"w": sparse((4,), {0: 4, 1: -3, 2: 2, 3: 1})}, name=name) for name in "ab"]
    merged = merge(vectors, "ties", convert([2.0, 0.5]), density=convert([0.25, 0.5]))
    assert merged["w"].indices.tolist() == [0, 1]
    assert merged["w"].values.tolist() == [5, -1.5]
    assert merged.provenance["weights"] == [2, 0.5]
    assert merged.provenance["options"]["density"] == [0.25, 0.5]
    json.dumps(merged.provenance)


def test_rules_for_lambda_are_a_list() -> None:
    with pytest.raises(
        UsageError, match=r"^`lam`: the rules of λ must be a list, found Rule\(value=1.0, filter=None\)"
    ):
        merge([layered(1, "a")], "linear", lam=Rule(1.0))  # type: ignore[arg-type]
    assert merge([layered(1, "a")], "linear", lam=[Rule(2.0)])[NAMES[0]].values.tolist() == [2]
