"""Options of a training run do what their words say."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.building import vector_of
from support.models import WORDS, make_mixtral, write_rows
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from taskvec import TaskVector, apply, merge
from taskvec.data.rows import RowCounts
from taskvec.devices import check_device, device_of
from taskvec.errors import BaseMismatchError, UsageError
from taskvec.training.effects import check_effects
from taskvec.training.loop import Curve
from taskvec.training.options import TrainingOptions
from taskvec.training.result import TrainingResult
from taskvec.training.targets import chosen
from taskvec.training.train import train
from taskvec_cli.main import app
from taskvec_formats import ModelFolder

pytestmark = pytest.mark.slow

QUICK = TrainingOptions(calibration_steps=2, steps=3, batch_size=2, lr=1e-3, device="cpu")
RANDOM = TrainingOptions(mask="random", steps=3, batch_size=2, lr=1e-3, device="cpu")
FFT = replace(RANDOM, method="fft", sparsity=None, mask="magnitude")
TEN = [{"prompt": f"{one} plus {other} is", "completion": "six"} for one in WORDS[7:9] for other in WORDS[7:12]]


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Ten examples, no two of which are alike."""
    return write_rows(tmp_path / "ten.jsonl", TEN)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The batches that a Llama computes, as it computes them: of each row its tokens without padding."""
    seen = []
    forward = LlamaForCausalLM.forward

    @wraps(forward)
    def watched(model: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        if model.training:  # not what is tried before
            seen.append([tuple(token for token in row if token) for row in kwargs["input_ids"].tolist()])
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    return seen


@pytest.mark.parametrize(
    ("phase", "epochs", "batch_size", "accumulate", "steps", "seen"),
    [
        ("training", 3, 8, 1, 6, [3] * 10),
        ("training", 2, 3, 3, 4, [2] * 10),
        ("training", 1.5, 8, 1, 3, [1] * 2 + [2] * 8),
        ("training", 0.01, 2, 1, 1, [1] * 2),
        ("calibration", 2, 4, 2, 4, [2] * 10),
    ],
)
def test_passes_over_the_data_see_every_example(
    phase: str,
    epochs: float,
    batch_size: int,
    accumulate: int,
    steps: int,
    seen: list[int],
    llama: Path,
    ten: Path,
    batches: list[list[tuple[int, ...]]],
) -> None:
    options = replace(QUICK, batch_size=batch_size, accumulate=accumulate)
    if phase == "training":
        options = replace(options, steps=None, epochs=epochs, mask="random", calibration_steps=20)
    else:
        options = replace(options, steps=0, lr=None, calibration_epochs=epochs, calibration_steps=20)
    training = train(ModelFolder(llama), ten, options)
    assert len(training.calibration_losses or training.curve.losses) == steps
    assert sorted(Counter(row for batch in batches for row in batch).values()) == seen


def test_a_share_of_a_pass_is_counted_as_it_is_written() -> None:
    assert 0.07 * 100 > 7
    assert TrainingOptions(batch_size=1).steps_of(0.07, 100) == 7
    assert TrainingOptions(batch_size=1).steps_of(0.071, 100) == 8
    assert TrainingOptions(batch_size=8).steps_of(3, 10) == 6


NAMES = [f"model.layers.{i}.{module}.weight" for i in (0, 1) for module in ("self_attn.q_proj", "mlp.up_proj")]


def saved(training: TrainingResult, path: Path) -> TaskVector:
    training.vector.save(path)
    return TaskVector.open(path)


def positions(vector: TaskVector) -> set[tuple[str, int]]:
    return {(name, int(place)) for name in vector for place in vector[name].indices}


@pytest.mark.parametrize(
    ("setting", "more", "why"),
    [
        ({"rank": 8}, {}, "`rank` has no effect without `method=lora`"),
        ({"alpha": 8}, {"method": "fft"}, "`alpha` has no effect without `method=lora`"),
        ({"calibration_lr": 1e-3}, {"method": "fft"}, "`calibration_lr` has no effect here: `method=fft` has no mask"),
        ({"calibration_lr": 1e-3}, {"mask": "random"}, "here: `mask=random` needs no calibration"),
        ({"low_memory": True}, {"mask": "random"}, "here: `mask=random` needs no calibration"),
        ({"calibration_steps": 5}, {"calibration_epochs": 1}, "together with `calibration_epochs`"),
        ({"epochs": 5}, {"steps": 5}, "together with `steps`"),
        ({"eval_split": 0.1}, {"steps": 0}, "here: `steps=0` does not train"),
        ({"save_steps": 5}, {"steps": 0}, "here: `steps=0` does not train"),
        ({"report_to": "tensorboard"}, {"steps": 0}, "here: `steps=0` does not train"),
        ({"lr": 1e-3}, {"steps": 0}, "here: `steps=0` does not train; `calibration_lr` is the learning rate of"),
        ({"lr": "auto"}, {"steps": 0, "mask": "random"}, "`lr` has no effect here: `steps=0` does not train"),
        ({"calibration_lr": "auto"}, {"mask": "random"}, "here: `mask=random` needs no calibration"),
        ({"l1": 1.0}, {"steps": 0, "mask": "random"}, "here: nothing is calibrated, and `steps=0` does not train"),
        (
            {"turns": "last"},
            {"steps": 0, "mask": "random"},
            "here: nothing is calibrated, and `steps=0` does not train",
        ),
        ({"pack": True}, {"steps": 0, "mask": "random"}, "here: nothing is calibrated, and `steps=0` does not train"),
        ({"relative_to": "start"}, {}, "`relative_to` has no effect without `start_from`"),
        ({"regrow_share": 0.5}, {}, "`regrow_share` has no effect without `regrow_steps`"),
        ({"regrow_window": 2}, {}, "`regrow_window` has no effect without `regrow_steps`"),
        ({"regrow_rule": "criterion"}, {"mask": "lift"}, "`regrow_rule` has no effect without `regrow_steps`"),
        (
            {"regrow_share": 0.5},
            {"mask": "lift", "regrow_steps": 5, "regrow_rule": "criterion"},
            "`regrow_share` has no effect together with `regrow_rule=criterion`",
        ),
        ({"regrow_steps": 5}, {"method": "fft"}, "`regrow_steps` has no effect here: `method=fft` has no mask"),
        ({"regrow_steps": 5}, {"steps": 0}, "`regrow_steps` has no effect here: `steps=0` does not train"),
        ({"eval_steps": 5}, {}, "it needs examples to evaluate on"),
        ({"patience": 5}, {}, "it needs examples to evaluate on"),
        ({"save_steps": 5}, {"patience": 5, "eval_split": 0.1}, "together with `patience`"),
    ],
)
def test_a_setting_without_effect_is_refused(setting: dict[str, Any], more: dict[str, Any], why: str) -> None:
    (name,) = setting
    evaluates = "eval_split" in more
    check_effects(TrainingOptions(**more), evaluates=evaluates)
    with pytest.raises(UsageError, match=why):
        check_effects(TrainingOptions(**more, **setting), evaluates=evaluates)
    # the default, where the user gave it
    with pytest.raises(UsageError, match=why):
        check_effects(TrainingOptions(**more), [name], evaluates=evaluates)


@pytest.mark.parametrize("name", ["calibration_steps", "calibration_epochs", "low_memory", "mask", "scope"])
def test_a_mask_of_another_vector_needs_no_calibration(name: str) -> None:
    check_effects(TrainingOptions(), [name])
    with pytest.raises(UsageError, match="has no effect here: the mask is taken from another vector"):
        check_effects(TrainingOptions(), [name], takes_mask=True)


@pytest.mark.parametrize(
    ("settings", "mixed", "name"),
    [
        ({"pack": True}, False, "pack"),
        ({"turns": "last"}, False, "turns"),
        ({"seed": 1}, False, "seed"),
        ({}, True, "mix"),
    ],
)
def test_a_mask_that_is_only_copied_needs_no_data(
    settings: dict[str, Any], mixed: bool, name: str, llama: Path, ten: Path
) -> None:
    base, options = ModelFolder(llama), TrainingOptions(steps=0, sparsity=None, device="cpu")
    mask = train(base, ten, TrainingOptions(steps=0, mask="random", seed=1, device="cpu")).vector
    assert positions(train(base, ten, options, mask_from=mask).vector) == positions(mask)
    with pytest.raises(UsageError, match=f"`{name}` has no effect here: .* and `steps=0` does not train"):
        train(base, ten, replace(options, **settings), mask_from=mask, mix=[(ten, 0.1)] if mixed else ())


def test_why_a_mask_cannot_be_taken_is_said(vector: Path, llama: Path, ten: Path, tmp_path: Path) -> None:
    asked = ["train", str(llama), str(ten), "-o", str(tmp_path / "x.lota"), "--mask-from", str(vector)]
    for more, name in ((["--via", "0.5"], "via"), (["--mask", "random"], "mask"), (["--scope", "tensor"], "scope")):
        result = CliRunner().invoke(app, [*asked, *more])
        assert isinstance(result.exception, UsageError)
        assert str(result.exception).endswith(f"it cannot be combined with `{name}`")


def test_the_command_knows_what_was_given(llama: Path, ten: Path, tmp_path: Path) -> None:
    asked = ["train", str(llama), str(ten), "-o", str(tmp_path / "x.lota")]
    for more, why in (
        (["--rank", "64"], "`rank` has no effect without `method=lora`"),
        (["--steps", "5", "--epochs", "3"], "`epochs` has no effect together with `steps`"),
        (["--steps", "0", "--mask", "random", "--plot", str(tmp_path / "x.png")], "`plot` has no effect here"),
        (["--steps", "0", "--eval-data", str(ten)], "`eval_data` has no effect here"),
        (["--warmup-steps", "5"], "`warmup_steps` needs `schedule=constant_with_warmup`"),
        (
            ["--steps", "3", "--schedule", "linear", "--warmup-steps", "5"],
            "training takes 3 steps: `warmup_steps` must",
        ),
        (
            ["--steps", "9", "--schedule", "linear", "--warmup-steps", "9"],
            "training takes 9 steps: `warmup_steps` must",
        ),
        (
            ["--calibration-steps", "2", "--schedule", "linear", "--warmup-steps", "2"],
            "calibration takes 2 steps: `warmup_steps` must be fewer, found 2",
        ),
        (["--regrow-steps", "6"], "training takes 6 steps: `regrow_steps` must be fewer, found 6"),
        (["--regrow-share", "0.2"], "`regrow_share` has no effect without `regrow_steps`"),
        (["--include", "*.q_porj.*"], "matches no tensor that would be trained; near are '*q_proj*'"),
        (["--include", "zzz*"], "matches no tensor that would be trained; near are 'model.layers.0."),
        (["--exclude", "*"], "`exclude` leaves no tensor to train"),
        (["--relative-to", "base"], "`relative_to` has no effect without `start_from`"),
        (["--steps", "0", "--mask", "random", "--turns", "all"], "`turns` has no effect here: nothing is calibrated"),
        (["--steps", "0", "--mask", "random", "--max-length", "9"], "`max_length` has no effect here: nothing is"),
        (
            ["--steps", "0", "--mask", "random", "--mix", f"{ten}:0.1"],
            "`mix` has no effect here: nothing is calibrated",
        ),
        (["--via", "1.5"], "`via` must be between 0 and 1, both excluded; found 1.5"),
        (["--device", "gpu"], "`device` is one of auto, cpu, cuda"),
        (["--device", "cuda:99"], "there is no device cuda:99 here: torch finds cpu"),
    ):
        result = CliRunner().invoke(app, [*asked, *more])
        assert isinstance(result.exception, UsageError), more
        assert why in str(result.exception)


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"schedule": "constant_with_warmup"}, "`schedule=constant_with_warmup` needs `warmup_steps`"),
        ({"warmup_steps": 3}, "`warmup_steps` needs `schedule=constant_with_warmup`, linear or cosine"),
        ({"via": (0.5,), "sparsity": None}, "`via` needs `sparsity`"),
        ({"via": (0.5,), "steps": 0}, "cannot be used with `steps=0`"),
        ({"low_memory": True, "accumulate": 2}, "`accumulate` must be 1, found 2"),
        ({"low_memory": True, "optimizer": "adam"}, "`low_memory` needs `optimizer=rmsprop`, found adam"),
        ({"low_memory": True, "weight_decay": 0.1}, "`low_memory` does not support `l1` or `weight_decay`"),
        ({"regrow_rule": "best"}, "`regrow_rule` is one of gradients, criterion, found 'best'"),
        (
            {"regrow_steps": 3, "regrow_rule": "criterion"},
            "needs a `mask` that is chosen from the weights alone, lift or low-magnitude; found magnitude",
        ),
        (
            {"regrow_steps": 3, "regrow_rule": "criterion", "mask": "lift", "via": (0.5,)},
            "`regrow_rule=criterion` cannot be combined with `via`",
        ),
        ({"regrow_steps": 0}, "`regrow_steps` must be greater than zero, found 0"),
        ({"regrow_steps": 3, "regrow_share": 1.5}, "`regrow_share` must be above 0 and at most 1, found 1.5"),
        ({"regrow_steps": 3, "regrow_window": 4}, "`regrow_window` must be at most `regrow_steps`, found window 4"),
        ({"weight_decay": -1}, "`weight_decay` must not be negative"),
        ({"include": "*"}, "`include` must be a list of strings, found"),
        ({"exclude": (1,)}, "`exclude`, number 1, must be a str, found 1"),
    ],
)
def test_combinations_that_cannot_be_meant(setting: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        TrainingOptions(**setting).check()


@pytest.mark.parametrize("mask", ["gradient", "fisher"])
def test_accumulated_gradients_rank_as_those_of_one_batch(mask: str, llama: Path, ten: Path) -> None:
    options = replace(QUICK, mask=mask, steps=0, lr=None, calibration_steps=3)
    whole, parts = (
        positions(train(ModelFolder(llama), ten, replace(options, batch_size=6 // parts, accumulate=parts)).vector)
        for parts in (1, 3)
    )
    assert len(whole & parts) > 0.99 * len(whole)


def test_the_weights_that_are_kept_were_evaluated(llama: Path, ten: Path) -> None:
    training = train(ModelFolder(llama), ten, replace(RANDOM, eval_steps=2), eval_data=ten)
    assert [step for step, _ in training.curve.eval_losses] == [2, 3]
    assert training.vector.provenance["eval_loss"] == training.curve.eval_losses[-1][1]
    assert training.vector.provenance["kept_step"] == 3


def test_decay_takes_a_ticket_towards_its_base(llama: Path, ten: Path) -> None:
    """With lr · decay = 1 all change before a step is lost: what is left is that of the last, clipped gradient."""
    options = replace(RANDOM, optimizer="sgd", lr=0.1, steps=20)
    sizes = []
    for decay in (0.0, 10.0):
        training = train(ModelFolder(llama), ten, replace(options, weight_decay=decay))
        values = np.concatenate([training.vector[name].values for name in training.vector])
        sizes.append(float(np.linalg.norm(values)))
    assert sizes[1] <= 0.1 * 1.0001 < sizes[0]


def test_decay_takes_calibration_towards_its_base(llama: Path, ten: Path) -> None:
    """Its first step has nothing to lose; were the weights themselves to decay, the largest would be the mask."""
    found = {
        (steps, decay): positions(
            train(
                ModelFolder(llama),
                ten,
                TrainingOptions(
                    optimizer="sgd",
                    calibration_lr=0.1,
                    calibration_steps=steps,
                    steps=0,
                    weight_decay=decay,
                    batch_size=2,
                    device="cpu",
                ),
            ).vector
        )
        for steps, decay in ((1, 0.0), (1, 10.0), (4, 0.0), (4, 10.0))
    }
    assert found[1, 0.0] == found[1, 10.0]
    assert found[4, 0.0] != found[4, 10.0]


def test_decay_takes_dense_matrices_towards_zero(llama: Path, ten: Path, tmp_path: Path) -> None:
    """But not norms, as in Trainer."""
    base = ModelFolder(llama)
    training = train(base, ten, replace(FFT, optimizer="sgd", lr=0.1, weight_decay=10.0, steps=1))
    apply(training.vector, base, tmp_path / "out")
    tuned = ModelFolder(tmp_path / "out")
    for name in tuned.tensors:
        values = tuned.bits(name).view("<f4")
        if "norm" in name:
            assert values.min() > 0.8
        else:
            assert np.linalg.norm(values) <= 0.1 * 1.001


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), NAMES),
        (("*q_proj*",), (), [NAMES[0], NAMES[2]]),
        (("*.0.*", "*mlp*"), ("*.1.*",), NAMES[:2]),
        ((), (NAMES[1],), [NAMES[0], *NAMES[2:]]),
    ],
)
def test_patterns_choose_tensors(include: tuple[str, ...], exclude: tuple[str, ...], expected: list[str]) -> None:
    assert chosen(NAMES, include, exclude) == expected


def test_patterns_that_match_nothing_are_named() -> None:
    with pytest.raises(UsageError, match=r"`include` 'q_proj' matches no tensor .* try '\*q_proj\*'"):
        chosen(NAMES, ("q_proj",), ())
    with pytest.raises(UsageError, match=r"`exclude` .* near are '\*q_proj\*'"):
        chosen(NAMES, (), ("*q_porj*",))
    with pytest.raises(UsageError, match=r"`exclude` '\*q_proj\*' matches no tensor that would be trained"):
        chosen(NAMES, ["*mlp*"], ["*q_proj*"])
    with pytest.raises(UsageError, match=r"^`include` and `exclude` leave no tensor to train"):
        chosen(NAMES, ("*mlp*",), ("*up_proj*",))
    with pytest.raises(UsageError, match=r"^`exclude` leaves no tensor to train"):
        chosen(NAMES, (), ("*",))


def test_patterns_that_are_suggested_match_tensors_that_would_be_trained(llama: Path, ten: Path) -> None:
    """Also before the model is loaded, when only the names of all tensors are known."""
    base = ModelFolder(llama)
    for pattern in ("zzz*", "*q_porj*", "embed_tokens", "*.nrom.*"):
        with pytest.raises(
            UsageError, match=r"`include` .* matches no tensor that would be trained; near are "
        ) as caught:
            train(base, ten, replace(QUICK, include=(pattern,)))
        for suggested in re.findall("'([^']+)'", str(caught.value).partition("near are")[2]):
            train(base, ten, replace(QUICK, include=(suggested,), steps=0, lr=None, calibration_steps=1))
    # with full fine-tuning every tensor may be trained
    with pytest.raises(UsageError, match=r"`include` '\*nrom\*' .* near are '\*norm\*'"):
        train(base, ten, replace(FFT, include=("*nrom*",)))


def test_only_chosen_tensors_train(llama: Path, ten: Path, tmp_path: Path) -> None:
    base = ModelFolder(llama)
    first = saved(train(base, ten, replace(QUICK, include=("*.mlp.*",), exclude=("*.1.*",))), tmp_path / "first.lota")
    assert {name for name in base.tensors if ".0.mlp." in name} == set(first)
    assert len(positions(first)) == round(0.1 * first.eligible) == round(0.1 * 3 * 32 * 48)
    assert first.provenance["run"]["options"]["include"] == ["*.mlp.*"]
    everywhere = train(base, ten, RANDOM)
    earlier = [saved(everywhere, tmp_path / "all.lota")]
    second = train(base, ten, replace(QUICK, include=("*.mlp.*",)), disjoint_from=earlier)
    assert not positions(second.vector) & positions(earlier[0])
    assert second.free_share == pytest.approx(0.8, abs=0.02)
    dense = train(base, ten, replace(FFT, include=("*norm*",))).vector
    assert set(dense) == {name for name in base.tensors if "norm" in name}
    assert sum(map(len, dense.values())) > 0
    lora = train(base, ten, replace(FFT, method="lora", rank=2, include=("*q_proj*",))).vector
    assert {name for name in lora if len(lora[name])} == {name for name in base.tensors if "q_proj" in name}
    with pytest.raises(UsageError, match=r"`include` .*embed.* matches no tensor that would be trained"):
        train(base, ten, replace(QUICK, include=("*embed*",)))


def test_a_parameter_trains_whole_or_not_at_all(ten: Path, tmp_path: Path) -> None:
    """transformers holds the experts of a layer as one."""
    base = ModelFolder(make_mixtral(tmp_path / "mixtral"))
    with pytest.raises(UsageError, match="are one parameter of the model"):
        train(base, ten, replace(QUICK, exclude=("*.experts.3.*",)))
    vector = train(base, ten, replace(QUICK, exclude=("*.experts.*",))).vector
    assert set(vector) == {name for name in base.tensors if "self_attn" in name}


@pytest.mark.parametrize("choice", ["auto", "cpu", "cpu:0", "cuda", "cuda:1", "mps", "xpu:0"])
def test_devices_have_names(choice: str) -> None:
    check_device(choice)


@pytest.mark.parametrize("choice", ["gpu", "auto:0", "cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "", "cuda:10000", "CPU"])
def test_other_names_are_no_devices(choice: str) -> None:
    with pytest.raises(UsageError, match="`device` is one of auto, cpu, cuda"):
        check_device(choice)


def test_a_device_has_to_be_there() -> None:
    assert device_of("cpu") == device_of("cpu:0") == torch.device("cpu")
    for absent in ("cpu:1", "cuda:99", "musa"):
        with pytest.raises(UsageError, match=f"there is no device {absent} here: torch finds cpu"):
            device_of(absent)


def test_a_vector_that_follows_another_is_composed_and_not_merged(llama: Path, ten: Path, tmp_path: Path) -> None:
    base = ModelFolder(llama)
    first = saved(train(base, ten, RANDOM), tmp_path / "first.lota")
    made = {}
    for relative_to in ("start", "base"):
        options = replace(RANDOM, relative_to=relative_to)
        training = train(base, ten, options, start_from=first, disjoint_from=[first])
        made[relative_to] = saved(training, tmp_path / f"{relative_to}.lota")
    for pair in ([first, made["start"]], [made["start"], first]):
        with pytest.raises(BaseMismatchError, match=r'taskvec arith "first\.lota >> start\.lota" --base BASE'):
            merge(pair)
    files = " >> ".join(f'"{tmp_path / name}.lota"' for name in ("first", "start"))
    asked = ["arith", files, "--base", str(llama), "-o", str(tmp_path / "both.lota")]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    apply(TaskVector.open(tmp_path / "both.lota"), base, tmp_path / "composed")
    apply(made["base"], base, tmp_path / "direct")
    composed, direct = ModelFolder(tmp_path / "composed"), ModelFolder(tmp_path / "direct")
    for name in base.tensors:
        assert composed.bits(name).tobytes() == direct.bits(name).tobytes()
    stranger = saved(train(base, ten, replace(RANDOM, seed=5)), tmp_path / "stranger.lota")
    with pytest.raises(BaseMismatchError, match="the vectors have different bases: llama"):
        merge([stranger, made["start"]])


@pytest.mark.parametrize(
    ("losses", "kept", "rises"),
    [
        ([2.0] * 10 + [1.0] * 10, 20, False),
        ([1.0] * 10 + [2.0] * 10, 20, True),
        ([1.0] * 10 + [2.0] * 10, 10, False),
        ([1.0, 2.0], 2, False),
        ([], 0, False),
    ],
)
def test_a_loss_that_rises_is_said(losses: list[float], kept: int, *, rises: bool) -> None:
    curve = Curve(losses, [], 0.0, kept)
    assert curve.rises == rises
    rows = RowCounts(0, 0, 0, 0, 0, 0)
    result = TrainingResult(vector_of({}), [], None, curve, {}, None, 100, 100, rows, rows, None)
    assert [warning.startswith("the training loss is higher in the last tenth") for warning in result.warnings] == [
        True
    ] * rises
    assert len(replace(result, survived=10).warnings) == rises + bool(losses)


def test_the_command_warns_of_training_for_nothing(llama: Path, llama_bf16: Path, ten: Path, tmp_path: Path) -> None:
    common = [str(ten), "-o", str(tmp_path / "x.lota"), "--steps", "12", "--batch-size", "4", "--device", "cpu"]
    # which of the rates makes the loss rise depends on the roundings of the processor
    wild = [
        CliRunner().invoke(app, ["train", str(llama), *common, "--method", "fft", "--lr", rate, "--force"]).stderr
        for rate in ("0.3", "30", "100")
    ]
    warning = "warning: the training loss is higher in the last tenth of the steps than in the first"
    assert any(warning in stderr for stderr in wild)
    lost = CliRunner().invoke(
        app, ["train", str(llama_bf16), *common, "--mask", "random", "--lr", "1e-8", "--force", "--json"]
    )
    assert "changes are too small for the dtype of the base and were rounded away" in lost.stderr
    assert "last tenth" not in lost.stderr
    assert json.loads(lost.stdout)["loss_rises"] is False


def test_the_command_reports_the_weights_that_are_kept(llama: Path, ten: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.lota"
    asked = ["train", str(llama), str(ten), "-o", str(output), "--mask", "random", "--steps", "40", "--lr", "0.5"]
    asked += ["--eval-data", str(ten), "--eval-steps", "1", "--patience", "1", "--force", "--device", "cpu"]
    report = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    kept, losses = report["kept_step"], {entry["step"]: entry["loss"] for entry in report["eval_losses"]}
    assert kept + 1 == report["steps"] < 40
    assert report["eval_loss"] == losses[kept] == min(losses.values())
    assert (report["final_loss"], report["eval_loss"]) == (
        report["provenance"]["final_loss"],
        report["provenance"]["eval_loss"],
    )
    said = CliRunner().invoke(app, asked).stdout
    assert f"weights kept: those after step {kept} of {kept + 1}\n" in said
    assert f"evaluated loss: {losses[kept]:.3f}\n" in said
