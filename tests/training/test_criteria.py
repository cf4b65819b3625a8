"""Each criterion selects what a naive computation on dense arrays selects."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, make_model
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from support.commands import ok, refused
from support.models import ROWS, make_gpt2, make_llama, make_mixtral, write_rows

from taskvec import TaskVector
from taskvec.applying.overlay import Patched
from taskvec.data.corpus import read_corpus
from taskvec.data.examples import read_examples
from taskvec.data.rows import collate, encode
from taskvec.errors import MaskError, UsageError
from taskvec.models.loading import load_model
from taskvec.models.placement import values_of
from taskvec.training.calibration import calibrate
from taskvec.training.criteria import CRITERIA, MASKS, SQUARES, Criterion
from taskvec.training.effects import check_effects
from taskvec.training.masking import quotas
from taskvec.training.options import TrainingOptions
from taskvec.training.run import Run
from taskvec.training.train import train
from taskvec.vectors.topk import top_k
from taskvec_cli.failure import with_flags
from taskvec_formats import Checkpoint, ModelFolder

DOCS = Path(__file__).parents[2] / "docs"
F32 = nps.from_dtype(np.dtype(np.float32), allow_nan=True, allow_infinity=True, allow_subnormal=True)
MASK = TrainingOptions(steps=0, device="cpu")
CALIBRATED = replace(MASK, calibration_steps=3, batch_size=4, calibration_lr=1e-3, clip=0.5)
SUMMING = [name for name, row in CRITERIA.items() if row.sums]
Scores = Mapping[str, np.ndarray[Any, Any]]


def positions(vector: TaskVector) -> dict[str, list[int]]:
    return {name: vector[name].indices.tolist() for name in vector}


def naive(scores: Scores, k: int, taken: Mapping[str, list[int]] | None = None) -> dict[str, list[int]]:
    """The k largest of all scores, the first of equal ones, by a full sort."""
    free = [
        (-float(score), number, place)
        for number, (name, values) in enumerate(scores.items())
        for place, score in enumerate(values)
        if score != 0 and place not in (taken or {}).get(name, ())
    ]
    found: dict[str, list[int]] = {name: [] for name in scores}
    for _, number, place in sorted(free)[:k]:
        found[list(scores)[number]].append(place)
    return {name: sorted(places) for name, places in found.items()}


def read(checkpoint: Checkpoint, name: str) -> np.ndarray[Any, Any]:
    info = checkpoint.tensors[name]
    return values_of(info.dtype, checkpoint.bits(name)).reshape(info.shape)


# the formulas


def score(mask: str, **given: Any) -> Any:
    function = CRITERIA[mask].score
    assert function is not None
    return function(**given)


@given(nps.arrays(np.float32, st.integers(1, 30), elements=F32), st.data())
def test_low_magnitudes_are_in_exact_order(weights: Any, data: st.DataObject) -> None:
    if data.draw(st.booleans()):  # ties, and what is next to zero
        near = np.array([0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, np.inf, np.nan], np.float32)
        weights = near[data.draw(st.lists(st.integers(0, len(near) - 1), min_size=1, max_size=30))]
    scores = score("low-magnitude", weights=weights)
    assert scores.dtype == np.float32
    usable = [place for place, weight in enumerate(weights) if np.isfinite(weight)]
    assert set(np.flatnonzero(scores)) == set(usable)
    k = data.draw(st.integers(1, len(weights)))
    if k > len(usable):
        with pytest.raises(MaskError):
            top_k(lambda: [("a", scores)], k)
        return
    ranked = sorted(usable, key=lambda place: (abs(float(weights[place])), place))
    assert top_k(lambda: [("a", scores)], k).indices("a", scores).tolist() == sorted(ranked[:k])


@given(
    nps.arrays(np.float32, 9, elements=st.floats(-4, 4, width=32)),
    nps.arrays(np.float32, 9, elements=st.floats(-4, 4, width=32)),
)
def test_the_formulas_are_those_of_the_papers(weights: Any, sums: Any) -> None:
    w, g = weights.astype(np.float64), sums.astype(np.float64)
    expected = {
        "gradient": score("gradient", gradients=sums) - np.abs(g),
        "fisher": score("fisher", squares=sums) - g,
        "magnitude": score("magnitude", changes=sums) - np.abs(g),
    }
    for name, difference in expected.items():
        assert not difference.any(), name
    ratio = abs(g) / (abs(w) + 1e-8)  # below 1e-44, f32 has no digits left
    np.testing.assert_allclose(score("gallop", weights=weights, gradients=sums), ratio, rtol=1e-6, atol=1e-44)
    product = abs(w * g)
    np.testing.assert_allclose(score("saliency", weights=weights, gradients=sums), product, rtol=1e-6, atol=1e-44)


def low_rank(weights: np.ndarray[Any, Any], rank: int) -> np.ndarray[Any, Any]:
    """The magnitudes of the best approximation of each matrix, by a singular value decomposition in f64."""
    u, s, vh = np.linalg.svd(weights.astype(np.float64), full_matrices=False)
    s[..., rank:] = 0
    found: np.ndarray[Any, Any] = np.abs((u * s[..., None, :]) @ vh).reshape(-1)
    return found


@given(
    st.sampled_from([(), (1,), (3,)]), st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 2**32)
)
def test_lift_scores_the_best_approximation_of_each_matrix(
    count: tuple[int, ...], rows: int, columns: int, rank: int, seed: int
) -> None:
    weights = np.random.default_rng(seed).standard_normal((*count, rows, columns)).astype(np.float32)
    before, kept = weights.copy(), dict[int, Any]()
    found = score("lift", weights=weights, mask_rank=rank, kept=kept)
    np.testing.assert_allclose(found, low_rank(weights, rank), rtol=1e-4, atol=1e-5)
    assert np.array_equal(weights, before)
    assert np.array_equal(score("lift", weights=weights, mask_rank=rank, kept=kept), found)
    if rank >= min(rows, columns):
        assert not kept
        assert np.array_equal(found, np.abs(weights).reshape(-1))


def test_lift_does_not_depend_on_the_number_of_threads() -> None:
    weights, before, found = np.random.default_rng(0).standard_normal((300, 500)), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(score("lift", weights=weights, mask_rank=7, kept={}).tobytes())
    torch.set_num_threads(before)
    assert found[0] == found[1]


# the words


def flagged(row: Criterion) -> str:
    return with_flags(row.mask, ("mask_rank", "seed"))


def test_the_documentation_has_each_criterion() -> None:
    text = (DOCS / "training.md").read_text(encoding="utf-8").replace("\\|", "\0")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    table = [cells for cells in table if cells[0].startswith("`--mask ") and len(cells) == 4]
    found = {cells[0].split("`")[1].removeprefix("--mask "): cells for cells in table}
    assert list(found) == list(MASKS)
    for name, row in CRITERIA.items():
        option, mask, needs, source = found[name]
        assert option == f"`--mask {name}`" + (", the default" if name == MASKS[0] else "")
        assert mask.replace("`", "").replace("\0", "|") == flagged(row)
        assert needs == ("calibration" if row.calibrates else "the weights" if row.ranks else "nothing")
        assert re.sub(r"\[(arXiv ([\d.]+))\]\(https://arxiv.org/abs/\2\)", r"\1", source) == row.source


def test_the_help_has_each_criterion() -> None:
    text = " ".join(ok("train", "--help").replace("│", " ").split())
    for name, row in CRITERIA.items():
        assert f"{name}: {flagged(row)}" in text


# masks from the weights


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def fused(folder: Path) -> Path:
    """A model whose experts are one tensor with three axes, also on disk."""
    return make_model(next(one for one in FAMILIES if one.name == "GptOssForCausalLM"), folder)


BASES = {
    "llama": make_llama,
    "bf16": lambda folder: make_llama(folder, dtype="bfloat16", shard_size="30KB"),
    "gpt2": make_gpt2,
    "mixtral": make_mixtral,
    "fused": fused,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_masks_of_the_weights_alone(kind: str, scope: str, data: Path, tmp_path: Path) -> None:
    base = ModelFolder(BASES[kind](tmp_path / "base"))
    names = list(positions(train(base, data, replace(MASK, mask="random", sparsity=0.01)).vector))
    assert any(len(base.tensors[name].shape) == 3 for name in names) == (kind == "fused")
    sizes = {name: base.tensors[name].form.size for name in names}
    k = round(0.1 * sum(sizes.values()))
    smallest = {
        name: np.where(np.isfinite(w := np.abs(read(base, name).reshape(-1))), 1 / (w.astype(np.float64) + 1e-300), 0)
        for name in names
    }
    principal = {name: low_rank(read(base, name), 4) for name in names}
    for mask, scores in (("low-magnitude", smallest), ("lift", principal)):
        options = replace(MASK, mask=mask, scope=scope, mask_rank=4 if mask == "lift" else 128)
        vector = train(base, data, options).vector
        found = {name: positions(vector).get(name, []) for name in names}
        assert sum(map(len, found.values())) == k
        if scope == "global":
            expected = naive(scores, k)
        else:
            expected = {name: naive({name: scores[name]}, n)[name] for name, n in quotas(k, sizes).items()}
        differing = sum(len(set(found[name]) ^ set(expected[name])) for name in names)
        assert differing <= (0 if mask == "low-magnitude" else 2), mask  # roundings next to the threshold


@pytest.mark.slow
def test_zeros_are_the_smallest_weights_and_what_is_taken_stays_out(llama: Path, data: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(llama)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight[0, :5], weight[0, 5:8] = 0.0, -0.0
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = ModelFolder(tmp_path / "base")
    options = replace(MASK, mask="low-magnitude", sparsity=0.999)
    first = train(base, data, options).vector
    assert positions(first)[name][:8] == list(range(8))
    second = train(base, data, options, disjoint_from=[first]).vector
    assert len(second) > 0
    eligible = {tensor: 1 / (np.abs(read(base, tensor).reshape(-1).astype(np.float64)) + 1e-300) for tensor in first}
    k = round(0.001 * first.eligible)
    both = naive(eligible, 2 * k)
    for tensor, places in naive(eligible, k, positions(first)).items():
        assert positions(second).get(tensor, []) == places
        assert both[tensor] == sorted([*positions(first).get(tensor, []), *places])


@pytest.mark.slow
def test_the_weights_of_the_start_are_ranked(llama: Path, data: Path) -> None:
    base = ModelFolder(llama)
    start = train(base, data, TrainingOptions(mask="random", steps=3, lr=0.3, device="cpu")).vector
    for mask in ("low-magnitude", "lift"):
        options = replace(MASK, mask=mask, relative_to="start", mask_rank=4 if mask == "lift" else 128)
        vector = train(base, data, options, start_from=start).vector
        patched = Patched(base, start)
        scores = {name: low_rank(read(patched, name), 4) for name in start}
        if mask == "low-magnitude":
            scores = {name: 1 / (np.abs(read(patched, name).reshape(-1).astype(np.float64))) for name in start}
        expected = naive(scores, round(0.1 * start.eligible))
        differing = sum(len(set(places) ^ set(expected[name])) for name, places in positions(vector).items())
        assert differing <= 2, mask
        assert positions(train(base, data, replace(options, relative_to="base")).vector) != positions(vector)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["lift", "low-magnitude", "gallop", "saliency"])
def test_masks_are_trained_through_a_denser_ticket(mask: str, llama: Path, data: Path) -> None:
    options = TrainingOptions(
        mask=mask, sparsity=0.95, via=(0.5,), steps=2, lr=1e-3, device="cpu", mask_rank=4 if mask == "lift" else 128
    )
    if CRITERIA[mask].calibrates:
        options = replace(options, calibration_steps=2)
    sparse = train(ModelFolder(llama), data, options)
    denser = train(ModelFolder(llama), data, replace(options, sparsity=0.5, via=(), steps=0, lr=None)).vector
    assert sparse.entries == round(0.05 * sparse.vector.eligible)
    assert all(set(places) <= set(positions(denser)[name]) for name, places in positions(sparse.vector).items())
    assert (sparse.unreached is None) == (not CRITERIA[mask].calibrates)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_never_selected(value: float, llama: Path, data: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(llama)
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 4] = value
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base, place = ModelFolder(tmp_path / "base"), 3 * 32 + 4
    with pytest.raises(MaskError, match=f"tensor '{name}': `mask=lift` needs finite weights"):
        train(base, data, replace(MASK, mask="lift"))
    eligible = train(base, data, replace(MASK, mask="random")).vector.eligible
    most = replace(MASK, mask="low-magnitude", sparsity=1 - (eligible - 1) / eligible)
    vector = train(base, data, most).vector
    assert sum(map(len, positions(vector).values())) == eligible - 1
    assert place not in positions(vector)[name]


# masks from calibration


def by_hand(base: Path, data: Path, options: TrainingOptions) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Σ g and Σ g² of the steps of calibration on all examples at once, in plain torch."""
    model, tokenizer = load_model(base)
    batch = collate([encode(example, tokenizer, 64) for example in read_examples(data)], 0, frozenset())
    trained = {name: p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2}
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in trained.values()))
    optimizer = torch.optim.RMSprop(trained.values(), lr=float(options.calibration_lr or 0))
    found = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in trained.items()}
    for _ in range(options.calibration_steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in trained.items():
            assert parameter.grad is not None
            found[name][0].add_(parameter.grad)
            found[name][1].add_(parameter.grad.square())
        torch.nn.utils.clip_grad_norm_(trained.values(), options.clip)
        optimizer.step()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mask", SUMMING)
@pytest.mark.parametrize(
    "changes", [{}, {"low_memory": True}, {"batch_size": 2, "accumulate": 2}], ids=["exact", "low memory", "accumulate"]
)
def test_masks_of_gradients_by_hand(mask: str, changes: dict[str, Any], llama: Path, data: Path) -> None:
    """Each gradient counts once, and the mask has the largest scores, position by position."""
    options = replace(CALIBRATED, mask=mask, **changes)
    base = ModelFolder(llama)
    dense = not options.low_memory
    run = Run(base, [], read_corpus(data), options, lambda *_: None, dense=dense)
    observed, _ = calibrate(run)
    seen = {name: observed(name).copy() for name in run.forms}
    expected = by_hand(llama, data, CALIBRATED)
    assert seen.keys() == expected.keys()
    for name, values in seen.items():
        sums = expected[name][CRITERIA[mask].observes == SQUARES].view(-1).numpy()
        # second moments are rounded to bf16 with low memory, so that later steps differ
        near = 0.02 if options.low_memory else 1e-3
        np.testing.assert_allclose(values, sums, rtol=near, atol=near * float(np.abs(sums).max()))
    scores = {}
    for name, values in seen.items():
        weights, sums = np.abs(read(base, name).reshape(-1).astype(np.float64)), np.abs(values.astype(np.float64))
        scores[name] = {
            "gradient": sums,
            "fisher": sums,
            "gallop": sums.astype(np.float32) / (weights.astype(np.float32) + np.float32(1e-8)),
            "saliency": (sums * weights).astype(np.float32),
        }[mask]
    vector = train(base, data, options).vector
    wanted = naive(scores, round(0.1 * run.eligible))
    assert {name: positions(vector).get(name, []) for name in scores} == wanted


# commands and options


def test_options_that_have_no_effect_are_refused() -> None:
    for mask, row in CRITERIA.items():
        if mask != "lift":
            with pytest.raises(UsageError, match="`mask_rank` has no effect without `mask=lift`"):
                check_effects(TrainingOptions(mask=mask, mask_rank=64))
        if not row.calibrates:
            for name in ("calibration_steps", "calibration_epochs", "calibration_lr", "low_memory"):
                with pytest.raises(
                    UsageError, match=f"`{name}` has no effect here: `mask={mask}` needs no calibration"
                ):
                    check_effects(TrainingOptions(mask=mask), [name])
        if not row.ranks:
            with pytest.raises(UsageError, match=f"`mask={mask}` draws positions from all weights together"):
                TrainingOptions(mask=mask, scope="tensor").check()
        else:
            TrainingOptions(mask=mask, scope="tensor", via=(0.5,)).check()
            check_effects(TrainingOptions(mask=mask, scope="tensor"))
    check_effects(TrainingOptions(mask="lift", mask_rank=64), ["mask_rank"])
    with pytest.raises(UsageError, match="`mask_rank` has no effect here: the mask is taken from another vector"):
        check_effects(TrainingOptions(), ["mask_rank"], takes_mask=True)
    with pytest.raises(UsageError, match="`mask_rank` has no effect here: `method=fft` has no mask"):
        check_effects(TrainingOptions(method="fft", sparsity=None), ["mask_rank"])
    with pytest.raises(UsageError, match="`seed` has no effect here: nothing is calibrated or drawn, and `steps=0`"):
        check_effects(TrainingOptions(mask="lift", steps=0), ["seed"])
    with pytest.raises(UsageError, match="`mask_rank` must be greater than zero, found 0"):
        TrainingOptions(mask="lift", mask_rank=0).check()
    with pytest.raises(UsageError, match="`mask` is one of magnitude, gradient, fisher, gallop, saliency, lift"):
        TrainingOptions(mask="largest").check()


@pytest.mark.slow
def test_a_mask_is_written_and_repeated_from_its_file(llama: Path, data: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.lota", tmp_path / "again.lota"
    asked = ["train", llama, data, "--device", "cpu"]
    report = json.loads(ok(*asked, "-o", first, "--mask", "lift", "--mask-rank", "4", "--steps", "0", "--json"))
    vector = TaskVector.open(first)
    assert report["entries"] == round(0.1 * vector.eligible)
    assert {vector.provenance["run"]["options"][name] for name in ("mask", "mask_rank")} == {"lift", 4}
    ok("train", llama, data, "--config", first, "-o", again, "--device", "cpu")
    assert positions(TaskVector.open(again)) == positions(vector)
    for rank, same in ((4, True), (5, False)):
        ok("train", llama, data, "--config", first, "-o", again, "--mask-rank", rank, "--device", "cpu", "--force")
        assert (positions(TaskVector.open(again)) == positions(vector)) == same
    said = refused(2, *asked, "-o", again, "--mask", "gallop", "--mask-rank", "4")
    assert said.strip() == "taskvec: --mask-rank has no effect without --mask lift"
