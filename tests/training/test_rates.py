"""Learning rates: the defaults of each method and optimizer, and those that are found on the data."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.commands import inside, ok, refused
from support.models import ROWS, write_rows
from support.paths import ROOT

from taskvec import TaskVector
from taskvec.errors import TrainingError, UsageError
from taskvec.training.chain import chain
from taskvec.training.options import METHODS, TrainingOptions
from taskvec.training.plan import plan
from taskvec.training.range_test import STEPS
from taskvec.training.rates import default_of, default_rate, with_defaults
from taskvec.training.result import TrainingResult
from taskvec.training.train import train
from taskvec_formats import ModelFolder

pytestmark = pytest.mark.slow

QUICK = TrainingOptions(calibration_steps=2, steps=3, batch_size=2, device="cpu")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS * 12)


def test_the_defaults_are_the_best_rates_of_the_sweep() -> None:
    """Those of the cells that benchmarks/rates.py keeps, for every method and optimizer."""
    best: dict[tuple[str, str, str], tuple[float, float]] = {}
    for file in (ROOT / "benchmarks" / "results" / "rates").glob("*.json"):
        cell = json.loads(file.read_text(encoding="utf-8"))
        method = next((name for name in ("full", "LoRA", "LoTA") if cell["method"].startswith(name)), None)
        if method is not None and cell["loss"] is not None:
            recipe, _, _ = file.name.partition("-")
            key = (recipe, {"full": "fft", "LoRA": "lora", "LoTA": "lota"}[method], cell["optimizer"])
            best[key] = min(best.get(key, (math.inf, 0.0)), (cell["loss"]["value"], cell["rate"]))
    assert len(best) == 2 * 3 + 3 * 2  # two tasks with RMSprop, one with two other optimizers
    for (_, method, optimizer), (_, rate) in best.items():
        assert default_rate(method, optimizer, 0.1) == rate
    for method in METHODS:
        assert default_rate(method, "adamw") == default_rate(method, "adam")


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam", "adamw"])
def test_the_rate_of_a_mask_is_inversely_proportional_to_its_density(optimizer: str) -> None:
    dense = default_rate("fft", optimizer)
    for sparsity, ratio in ((0.5, 2), (0.75, 4), (0.9, 10), (0.95, 20), (0.99, 100), (0.995, 200), (0.999, 200)):
        assert default_rate("lota", optimizer, 1 - sparsity) == float(f"{ratio * dense:g}")
        filled = with_defaults(TrainingOptions(optimizer=optimizer, sparsity=sparsity), calibrates=True)
        assert filled.lr == float(f"{ratio * dense:g}")
        assert filled.calibration_lr == dense
    assert default_rate("lota", "sgd", 0.01) == default_rate("fft", "sgd")


@pytest.mark.parametrize("mask", ["gradient", "fisher", "gallop", "saliency"])
def test_masks_of_large_gradients_have_lower_rates(mask: str) -> None:
    options = TrainingOptions(mask=mask, sparsity=0.99)
    assert default_of(options, 0.01) == float(f"{100 ** (2 / 3) * default_rate('fft', 'rmsprop'):.3g}")
    assert with_defaults(options, calibrates=True).lr == default_of(options, 0.01)
    # the criterion chooses the mask of the first ticket only
    via = replace(options, via=(0.9, 0.98), sparsity=0.99)
    filled = with_defaults(via, calibrates=True)
    assert filled.lr == default_rate("lota", "rmsprop", 0.01)
    assert [each.lr for each in chain(filled)] == [
        pytest.approx(default_rate("lota", "rmsprop", 0.1, 2 / 3), rel=1e-2),
        default_rate("lota", "rmsprop", 0.02),
        filled.lr,
    ]


def test_a_mask_that_is_given_has_the_rate_of_its_density(llama: Path, rows: Path, tmp_path: Path) -> None:
    """Of the weights that are eligible in the run, not in the one that made the mask."""
    base = ModelFolder(llama)
    include, attention = ("*self_attn*",), ("*layers.0.self_attn.q_proj*",)
    mask = train(base, rows, replace(QUICK, sparsity=0.75, steps=0, include=attention)).vector
    options = TrainingOptions(sparsity=None, steps=3, batch_size=2, device="cpu")
    for wanted in (options, replace(options, include=include)):
        trained, planned = (
            train(base, rows, wanted, mask_from=mask),
            plan(base, rows, wanted, mask_from=mask),
        )
        expected = float(f"{3e-5 * trained.vector.eligible / trained.entries:.3g}")
        assert trained.curve.lr == planned.phases[-1].lr == trained.vector.provenance["lr"] == expected
        assert trained.vector.provenance["run"]["options"]["lr"] is None


def test_each_phase_has_the_default_of_what_it_trains() -> None:
    filled = with_defaults(TrainingOptions(optimizer="adamw"), calibrates=True)
    assert filled.lr == default_rate("lota", "adamw", 0.1)
    assert filled.calibration_lr == default_rate("fft", "adamw")
    assert with_defaults(TrainingOptions(mask="random"), calibrates=False).calibration_lr is None
    assert with_defaults(TrainingOptions(steps=0), calibrates=True).lr is None
    given = TrainingOptions(lr=0.5, calibration_lr="auto")
    assert with_defaults(given, calibrates=True) == given


@pytest.mark.parametrize("lr", ["fast", "1e-3", [1], 0.0, -1.0, float("nan")])
def test_a_rate_is_a_number_above_zero_or_auto(lr: Any) -> None:
    with pytest.raises(UsageError, match="`lr` must be"):
        TrainingOptions(lr=lr).check()


def same(one: TrainingResult, other: TrainingResult, folder: Path) -> bool:
    """Whether two runs made the same vector, byte for byte, apart from what they were asked."""
    files = []
    for number, training in enumerate((one, other)):
        training.vector.header.provenance.pop("run")
        training.vector.save(folder / f"{number}.lota")
        files.append((folder / f"{number}.lota").read_bytes())
    return files[0] == files[1]


@pytest.mark.parametrize(
    "options",
    [
        replace(QUICK, lr="auto", calibration_lr="auto"),
        replace(QUICK, calibration_lr="auto", low_memory=True, dtype="bfloat16"),
        replace(QUICK, calibration_lr="auto", mask="fisher", steps=0),
        replace(QUICK, lr="auto", mask="random", calibration_steps=20, weight_decay=0.1, dtype="bfloat16"),
        replace(QUICK, lr="auto", method="fft", sparsity=None, calibration_steps=20, accumulate=2),
        replace(QUICK, lr="auto", method="lora", sparsity=None, calibration_steps=20, dtype="bfloat16"),
        replace(
            QUICK,
            lr="auto",
            calibration_lr="auto",
            optimizer="sgd",
            schedule="linear",
            warmup_steps=1,
            calibration_steps=4,
        ),
    ],
    ids=lambda options: f"{options.method}-{options.mask}-{options.lr}-{options.calibration_lr}-{options.dtype}",
)
def test_a_run_that_finds_its_rate_is_the_run_that_is_given_it(
    options: TrainingOptions, llama: Path, rows: Path, tmp_path: Path
) -> None:
    """The search leaves nothing behind."""
    found = train(ModelFolder(llama), rows, options)
    rates = {"lr": found.curve.lr, "calibration_lr": found.calibration_lr}
    asked = {name: rates[name] for name in rates if getattr(options, name) == "auto"}
    assert all(isinstance(rate, float) and rate > 0 for rate in asked.values())
    assert same(found, train(ModelFolder(llama), rows, replace(options, **asked)), tmp_path)  # type: ignore[arg-type]


def test_the_found_rates_are_in_the_file_and_the_report(llama: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.lota"
    common = ["train", llama, rows, "-o", output, "--steps", "3", "--calibration-steps", "2", "--device", "cpu"]
    said = ok(*common, "--lr", "auto", "--calibration-lr", "auto")
    provenance = TaskVector.open(output).provenance
    assert f"\nlearning rate: {provenance['lr']:g}\n" in said
    assert f"\ncalibration learning rate: {provenance['calibration_lr']:g}\n" in said
    assert provenance["run"]["options"]["lr"] == "auto"
    planned = json.loads(ok(*common, "--lr", "auto", "--dry-run", "--force", "--json"))["phases"]
    assert [(phase["name"], phase["steps"], phase["lr"]) for phase in planned] == [
        ("calibrating", 2, default_rate("fft", "rmsprop")),
        ("finding a learning rate", STEPS, None),
        ("training", 3, None),
    ]
    again = tmp_path / "again.lota"
    ok("train", llama, rows, "-o", again, "--config", output, "--device", "cpu")
    assert again.read_bytes() == output.read_bytes()
    settings = tmp_path / "run.yaml"
    settings.write_text("lr: auto\ncalibration_lr: 1e-3\n", encoding="utf-8")
    report = json.loads(ok(*common, "--config", settings, "--force", "--json"))
    assert report["lr"] > 0
    assert report["calibration_lr"] == 1e-3
    mistyped = inside(*common, "--lr", "fast")
    assert mistyped.returncode == 2
    assert "'--lr': expected a number or auto, found 'fast'" in mistyped.stderr
    settings.write_text("lr: fast\n", encoding="utf-8")
    assert "lr must be a number or auto, found 'fast'" in refused(2, *common, "--config", settings)


def test_a_run_goes_on_with_the_rate_that_it_found(llama: Path, rows: Path, tmp_path: Path) -> None:
    """Interrupted when the rate was found, it does not search again."""
    options = replace(QUICK, lr="auto", mask="random", calibration_steps=20)
    stages: list[str] = []

    def watch(stage: str, done: int, total: int, note: str) -> None:
        stages.append(stage)
        if stage == "training" and done == 2 and not (tmp_path / "second").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(ModelFolder(llama), rows, options, watch, folder=tmp_path / "run")
    assert "finding a learning rate" in stages
    stages.clear()
    (tmp_path / "second").touch()
    resumed = train(ModelFolder(llama), rows, options, watch, folder=tmp_path / "run")
    assert "finding a learning rate" not in stages
    assert same(resumed, train(ModelFolder(llama), rows, options), tmp_path)


def test_no_rate_in_the_range_is_an_error(llama: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskvec.training import rates

    monkeypatch.setitem(rates._DEFAULTS["sgd"], "fft", 1e30)
    options = replace(QUICK, lr="auto", optimizer="sgd", mask="random", calibration_steps=20)
    with pytest.raises(TrainingError, match=r"the loss rises at all learning rates from 1e\+28 to .*: give `lr`"):
        train(ModelFolder(llama), rows, options)
