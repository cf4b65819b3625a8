"""Whole runs: methods, sequences, masks that are reused, interruptions, evaluation while training."""

from __future__ import annotations

import inspect
import json
import os
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import ROWS, make_architecture, write_rows

from taskvec import Checkpoint, TaskVector, apply, diff, merge
from taskvec.analysis.plots import plot_losses
from taskvec.applying.overlay import Patched
from taskvec.data.corpus import read_corpus
from taskvec.data.examples import read_examples
from taskvec.errors import BaseMismatchError, MaskError, ResumeError, TrainingError, UsageError
from taskvec.evaluation.evaluate import evaluate
from taskvec.models.attach import attach
from taskvec.models.loading import load_model
from taskvec.models.placement import places
from taskvec.training.lean import LeanRMSprop
from taskvec.training.options import TrainingOptions
from taskvec.training.rates import with_defaults
from taskvec.training.result import TrainingResult
from taskvec.training.train import train
from taskvec.vectors.source import Memory
from taskvec_cli.train import train as train_command
from taskvec_formats import Header, Identity, ModelFolder, TensorSpec
from taskvec_formats.dtypes import DTYPES

pytestmark = pytest.mark.slow

QUICK = TrainingOptions(calibration_steps=2, steps=6, batch_size=2, lr=1e-3, device="cpu", save_steps=2)
UNCALIBRATED = replace(QUICK, calibration_steps=TrainingOptions.calibration_steps)  # where a setting of it is refused
FFT = replace(UNCALIBRATED, method="fft", sparsity=None)
REGROWING = replace(QUICK, regrow_steps=2, regrow_share=0.5)
CHOSEN_AGAIN = replace(UNCALIBRATED, mask="lift", mask_rank=3, regrow_steps=2, regrow_rule="criterion")
MEASURED = replace(QUICK, eval_split=0.3, eval_steps=1, eval_metric=("exact_match", "rouge1"))
LORA = replace(UNCALIBRATED, method="lora", sparsity=None, rank=2)


def saved(training: TrainingResult, path: Path) -> TaskVector:
    training.vector.save(path)
    return TaskVector.open(path)


def positions(vector: TaskVector) -> set[tuple[str, int]]:
    return {(name, int(place)) for name in vector for place in vector[name].indices}


def tensors(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: checkpoint.bits(name).tobytes() for name in checkpoint.tensors}


def test_the_command_s_defaults_are_the_library_s() -> None:
    parameters = inspect.signature(train_command).parameters
    for field in fields(TrainingOptions):
        # 0.9 where no other mask is given; options that may be given several times
        expected = None if field.name in {"sparsity", "via", "include", "exclude", "eval_metric"} else field.default
        assert parameters[field.name].default == expected, field.name


class Stop(Exception):  # noqa: N818 - not an error
    """A process that dies."""


def interrupting(stage: str, step: int, how: Callable[[], None]) -> Callable[[str, int, int, str], None]:
    def progress(at: str, done: int, total: int, note: str = "") -> None:
        if (at, done) == (stage, step) and note:
            how()

    return progress


def die() -> None:
    raise Stop


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("options", "stage", "step", "how", "left"),
    [
        (QUICK, "training", 3, die, "mask.lota checkpoints checkpoints/checkpoint-2"),
        (QUICK, "training", 3, ask_to_stop, "mask.lota checkpoints checkpoints/checkpoint-4"),
        (replace(QUICK, optimizer="adamw", schedule="cosine"), "training", 5, die, "checkpoints/checkpoint-4"),
        (QUICK, "calibrating", 2, die, ""),
        (replace(QUICK, calibration_steps=4), "calibrating", 2, ask_to_stop, ""),
        (replace(QUICK, via=(0.5,)), "50%: training", 4, ask_to_stop, "via/mask.lota via/checkpoints/checkpoint-5"),
        (replace(QUICK, via=(0.5,)), "training", 4, die, "via.lota mask.lota checkpoints/checkpoint-2"),
        (
            replace(QUICK, eval_split=0.3, eval_steps=1, patience=9, save_steps=100),
            "training",
            4,
            die,
            "checkpoints/checkpoint-3",
        ),
        (REGROWING, "training", 3, die, "checkpoints/checkpoint-2/mask.safetensors"),
        (
            replace(REGROWING, optimizer="adamw", regrow_steps=3, accumulate=2, schedule="linear", via=(0.5,)),
            "training",
            4,
            ask_to_stop,
            "via.lota checkpoints/checkpoint-5",
        ),
        (CHOSEN_AGAIN, "training", 4, die, "checkpoints/checkpoint-2/mask.safetensors"),
        (MEASURED, "training", 4, die, "checkpoints/checkpoint-2"),
        (MEASURED, "training", 4, ask_to_stop, "checkpoints/checkpoint-5"),
        (FFT, "training", 3, die, "checkpoints/checkpoint-2"),
        (LORA, "training", 3, die, "checkpoints/checkpoint-2"),
        (replace(QUICK, pack=True, max_length=24), "training", 3, die, "checkpoints/checkpoint-2"),
    ],
)
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(
    options: TrainingOptions, stage: str, step: int, how: Callable[[], None], left: str, llama: Path, tmp_path: Path
) -> None:
    base, data = ModelFolder(llama), write_rows(tmp_path / "rows.jsonl", ROWS * 3)
    whole = train(base, data, options)
    whole.vector.save(tmp_path / "whole.lota")
    folder = tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    expected: tuple[type[Exception], str] = (Stop, "^$")
    if how is ask_to_stop:
        kept = "; `resume` continues" if "train" in stage else ""
        expected = (TrainingError, rf"stopped after step {step + 1} of \d of {stage.rsplit(maxsplit=1)[-1]}{kept}")
    with pytest.raises(expected[0], match=expected[1]):
        train(base, data, options, interrupting(stage, step, how), folder=folder)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    for name in left.split():
        assert (folder / name).exists(), f"{name} is not among {sorted(folder.rglob('*'))}"
    assert folder.exists() == bool(left)

    again = train(base, data, options, folder=folder)
    again.vector.save(tmp_path / "again.lota")
    assert (tmp_path / "again.lota").read_bytes() == (tmp_path / "whole.lota").read_bytes()
    assert again.curve.losses == whole.curve.losses
    assert again.calibration_losses == whole.calibration_losses
    assert again.curve.eval_losses == whole.curve.eval_losses
    assert again.curve.eval_metrics == whole.curve.eval_metrics
    assert whole.curve.eval_metrics.keys() == set(options.eval_metric)
    assert all(len(points) == options.steps for points in whole.curve.eval_metrics.values())


def test_a_run_on_a_folder_of_files_goes_on_to_the_same_bits(llama: Path, tmp_path: Path) -> None:
    base, data = ModelFolder(llama), tmp_path / "rows"
    data.mkdir()
    (data / "b.json").write_text(json.dumps(ROWS[:2]), encoding="utf-8")
    (data / "a.csv").write_text("prompt,completion\none plus two is,three\ntwo is,two\n", encoding="utf-8")
    options = replace(QUICK, pack=True, max_length=32)
    train(base, data, options).vector.save(tmp_path / "whole.lota")
    with pytest.raises(Stop):
        train(base, data, options, interrupting("training", 3, die), folder=tmp_path / "run")
    added = write_rows(data / "c.jsonl", ROWS[:1])
    with pytest.raises(ResumeError, match="belongs to another run: data"):
        train(base, data, options, folder=tmp_path / "run")
    added.unlink()
    train(base, data, options, folder=tmp_path / "run").vector.save(tmp_path / "again.lota")
    assert (tmp_path / "again.lota").read_bytes() == (tmp_path / "whole.lota").read_bytes()


def test_the_folder_of_another_run_is_refused(llama: Path, gpt2: Path, data: Path, tmp_path: Path) -> None:
    base, folder = ModelFolder(llama), tmp_path / "run"
    with pytest.raises(Stop):
        train(base, data, QUICK, interrupting("training", 3, die), folder=folder)
    other = write_rows(tmp_path / "train.jsonl", ROWS[:2])
    vector = train(base, data, QUICK).vector
    with pytest.raises(ResumeError, match=r"run belongs to another run: options\.lr is 0\.001 there, but 0\.01 here"):
        train(base, data, replace(QUICK, lr=0.01), folder=folder)
    with pytest.raises(ResumeError, match="belongs to another run: base is"):
        train(ModelFolder(gpt2), data, QUICK, folder=folder)
    with pytest.raises(ResumeError, match="belongs to another run: data is"):
        train(base, other, QUICK, folder=folder)
    with pytest.raises(ResumeError, match="belongs to another run: disjoint_from is"):
        train(base, data, QUICK, disjoint_from=[vector], folder=folder)
    (folder / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(ResumeError, match="is not the record of a run"):
        train(base, data, QUICK, folder=folder)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(llama: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    wild = replace(QUICK, lr=1e25, calibration_lr=1e-3, save_steps=1)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 2 of training; .*the last checkpoint is .*-1$"):
        train(ModelFolder(llama), data, wild, folder=folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-1"]


def test_a_mask_without_values_is_used_again(llama: Path, data: Path, tmp_path: Path) -> None:
    base = ModelFolder(llama)
    mask = saved(train(base, data, replace(QUICK, steps=0, lr=None, save_steps=100)), tmp_path / "mask.lota")
    assert len(positions(mask)) == round(0.1 * mask.eligible)
    assert not any(mask[name].values.any() for name in mask)
    whole = train(base, data, QUICK)
    again = train(base, data, replace(UNCALIBRATED, sparsity=None), mask_from=mask)
    for name in whole.vector:
        assert np.array_equal(again.vector[name].values, whole.vector[name].values)
    with pytest.raises(MaskError, match=r"mask\.lota: \d+ entries are wanted but only 0"):
        train(base, data, replace(UNCALIBRATED, sparsity=0.99), mask_from=mask)


def test_a_ticket_may_go_via_a_denser_one(llama: Path, data: Path, tmp_path: Path) -> None:
    """The paper's 99 %*: in one command what --mask-from does in two."""
    base = ModelFolder(llama)
    dense = saved(train(base, data, replace(QUICK, lr=1e-4)), tmp_path / "dense.lota")
    two = train(base, data, replace(UNCALIBRATED, sparsity=0.99), mask_from=dense)
    one = train(base, data, replace(QUICK, sparsity=0.99, via=(0.9,)))
    assert positions(one.vector) == positions(two.vector)
    for name in one.vector:
        assert np.array_equal(one.vector[name].values, two.vector[name].values)
    direct = train(base, data, replace(QUICK, sparsity=0.99))
    assert positions(direct.vector) != positions(one.vector)


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd"])
def test_a_ticket_may_go_via_several(optimizer: str, llama: Path, data: Path, tmp_path: Path) -> None:
    """Each takes its mask from the one before, and has the learning rate of its density."""
    base, stages = ModelFolder(llama), []
    quick, taken = (replace(each, optimizer=optimizer) for each in (QUICK, UNCALIBRATED))
    ratios = (1, 2, 8) if optimizer == "rmsprop" else (1, 1, 1)
    rates = [ratio * 1e-4 for ratio in ratios]
    first = saved(train(base, data, replace(quick, sparsity=0.6, lr=rates[0])), tmp_path / "first.lota")
    second = train(base, data, replace(taken, sparsity=0.8, lr=rates[1]), mask_from=first)
    third = train(
        base, data, replace(taken, sparsity=0.95, lr=rates[2]), mask_from=saved(second, tmp_path / "second.lota")
    )
    options = replace(quick, sparsity=0.95, via=(0.6, 0.8), lr=rates[2])
    one = train(base, data, options, lambda stage, *_: stages.append(stage))
    for name in one.vector:
        assert np.array_equal(one.vector[name].indices, third.vector[name].indices)
        assert np.array_equal(one.vector[name].values, third.vector[name].values)
    assert one.via_lr == pytest.approx(rates[:2])
    assert one.vector.provenance["via_lr"] == list(one.via_lr)
    assert one.warnings == [] == list(one.via_warnings)
    assert [stage for stage in dict.fromkeys(stages) if "training" in stage] == [
        "60%: training",
        "80%: training",
        "training",
    ]
    with pytest.raises(UsageError, match=r"several must increase; found via 0\.8, 0\.6, sparsity 0\.95"):
        train(base, data, replace(options, via=(0.8, 0.6)))


def test_the_warnings_of_all_tickets_are_said(llama_bf16: Path, data: Path, tmp_path: Path) -> None:
    """Once each, also those of tickets that were finished before the run was resumed."""
    options = replace(QUICK, sparsity=0.95, via=(0.5, 0.8), lr=1e-8)
    folder = tmp_path / "x.lota.run"
    found = train(ModelFolder(llama_bf16), data, options, folder=folder).warnings
    assert len(found) == 3
    assert [warning.partition(" changes ")[2] for warning in found] == [found[2].partition(" changes ")[2]] * 3
    assert found[0].startswith("50%: ")
    assert found[1].startswith("80%: ")
    assert "rounded away" in found[2]
    assert train(ModelFolder(llama_bf16), data, options, folder=folder).warnings == found


@pytest.mark.parametrize("fixture", ["llama", "llama_bf16", "gpt2"])
@pytest.mark.parametrize("options", [FFT, LORA], ids=["fft", "lora"])
def test_dense_methods_give_vectors_too(
    options: TrainingOptions, fixture: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = ModelFolder(request.getfixturevalue(fixture))
    training = train(base, data, replace(options, lr=2e-3))
    assert training.curve.losses[-1] < training.curve.losses[0]
    assert training.free == {}
    vector = saved(training, tmp_path / "x.lota")
    assert vector.provenance["method"] == options.method
    apply(vector, base, tmp_path / "out")
    tuned = ModelFolder(tmp_path / "out")
    changed = {name for name in base.tensors if tuned.bits(name).tobytes() != base.bits(name).tobytes()}
    assert (
        training.entries
        == training.survived
        == sum(int(np.count_nonzero(tuned.bits(name) != base.bits(name))) for name in changed)
    )
    outside = {name for name in changed if "embed" in name or "wte" in name or "norm" in name or "ln_" in name}
    assert bool(outside) == (options.method == "fft")
    assert training.entries > 0.5 * vector.eligible


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_is_what_peft_trains(dtype: str, llama: Path, data: Path) -> None:
    """The merged vector has the rank of the adapters, on every linear layer of the blocks, whatever the arithmetic."""
    vector = train(ModelFolder(llama), data, replace(LORA, dtype=dtype)).vector
    for name, spec in vector.specs.items():
        delta = np.zeros(spec.size, np.float32)
        delta[vector[name].indices] = vector[name].values
        sizes = np.linalg.svd(delta.reshape(spec.shape), compute_uv=False)
        assert sizes[1] > 0 == (sizes[2:] > 1e-3 * sizes[0]).sum(), name
    model, _ = load_model(llama)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=16, target_modules="all-linear"))
    assert {
        name.split(".lora_A")[0].removeprefix("base_model.model.") + ".weight"
        for name, _ in adapted.named_parameters()
        if "lora_A" in name
    } == set(vector)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_starts_from_another_vector(dtype: str, llama: Path, data: Path, tmp_path: Path) -> None:
    """Relative to where it started or to the base: both give the same model, and both say where they come from."""
    base = ModelFolder(llama)
    first = saved(train(base, data, QUICK), tmp_path / "first.lota")
    found = {}
    for relative_to in ("start", "base"):
        options = replace(QUICK, relative_to=relative_to, seed=5, dtype=dtype)
        second = saved(
            train(base, data, options, start_from=first, disjoint_from=[first]), tmp_path / f"{relative_to}.lota"
        )
        assert second.provenance["start_from"] == "first.lota"
        assert second.provenance["run"]["start_from"]["name"] == "first.lota"
        assert second.provenance["run"]["options"]["relative_to"] == relative_to
        found[relative_to] = second
    assert not positions(found["start"]) & positions(first)
    assert len(positions(found["start"])) == round(0.1 * first.eligible)
    apply(first, base, tmp_path / "one")
    apply(found["start"], ModelFolder(tmp_path / "one"), tmp_path / "two")
    apply(found["base"], base, tmp_path / "both")
    assert tensors(ModelFolder(tmp_path / "two")) == tensors(ModelFolder(tmp_path / "both"))
    assert found["start"].base.fingerprint == ModelFolder(tmp_path / "one").fingerprint
    assert found["base"].base.fingerprint == base.fingerprint
    assert positions(found["base"]) <= positions(first) | positions(found["start"])
    assert apply(found["base"], base, tmp_path / "again").exact
    with pytest.raises(BaseMismatchError):
        train(ModelFolder(tmp_path / "one"), data, QUICK, start_from=first)


def test_training_does_not_start_from_a_vector_that_changes_forms(llama: Path, data: Path) -> None:
    """The model in the base's folder has no room for what it gives."""
    base, name = ModelFolder(llama), "model.norm.weight"
    header = Header("vector", Identity(base.name, base.fingerprint), None, tensors=())
    resized = TensorSpec(name, DTYPES["F32"], (3,), base.tensors[name].form)
    for start in (
        TaskVector(replace(header, removed=(name,)), [], Memory({}, {}), "x.lota"),
        TaskVector(header, [resized], Memory({}, {name: resized}), "x.lota"),
    ):
        with pytest.raises(
            BaseMismatchError, match=f"^x.lota changes the form of tensor '{name}': apply it and train from the result"
        ):
            train(base, data, QUICK, start_from=start)


def test_a_dense_vector_may_be_where_training_starts(llama: Path, data: Path, tmp_path: Path) -> None:
    """It changes embeddings and norms, which a ticket leaves as it finds them."""
    base = ModelFolder(llama)
    first = saved(train(base, data, replace(FFT, lr=1e-2)), tmp_path / "fft.lota")
    second = saved(train(base, data, QUICK, start_from=first), tmp_path / "second.lota")
    apply(second, base, tmp_path / "both")
    both, start = ModelFolder(tmp_path / "both"), Patched(base, first)
    assert set(second) == set(first)
    assert both.bits("model.embed_tokens.weight").tobytes() == start.bits("model.embed_tokens.weight").tobytes()
    changed = sum(int(np.count_nonzero(both.bits(name) != start.bits(name))) for name in base.tensors)
    eligible = sum(start.tensors[name].form.size for name in start.tensors if "_proj" in name)
    assert 0 < changed <= round(0.1 * eligible)
    apply(first, base, tmp_path / "one")
    assert tensors(start) == tensors(ModelFolder(tmp_path / "one"))


def test_a_tensor_that_nothing_changes_may_be_left_out(llama: Path, data: Path, tmp_path: Path) -> None:
    """So few entries that most tensors have none; what is free is counted all the same."""
    base, few = ModelFolder(llama), replace(QUICK, sparsity=0.9998)
    first = saved(train(base, data, few), tmp_path / "first.lota")
    second = train(base, data, few, start_from=first)
    assert len(second.vector) < len(first)
    assert second.free.keys() == set(first)
    assert second.free_share == pytest.approx(1 - 3 / first.eligible)


def test_data_is_mixed_in_by_share_and_held_out_by_share(data: Path, tmp_path: Path) -> None:
    numbers = [{"prompt": f"task {i}", "completion": str(i)} for i in range(80)]
    task, other = write_rows(tmp_path / "task.jsonl", numbers[:40]), write_rows(tmp_path / "other.jsonl", numbers[40:])
    corpus = read_corpus(task, mix=[(other, 0.2)], seed=3)
    assert [int(example.completion) for example in corpus.train[:40]] == list(range(40))
    drawn = [int(example.completion) for example in corpus.train[40:]]
    assert len(drawn) == len(set(drawn)) == 10
    assert all(number >= 40 for number in drawn)
    assert read_corpus(task, mix=[(other, 0.2)], seed=3) == corpus != read_corpus(task, mix=[(other, 0.2)], seed=4)
    assert [file["examples"] for file in corpus.files] == [40, 10]
    split = read_corpus(task, eval_split=0.25, seed=1)
    assert len(split.held_out) == 10
    assert {e.completion for e in split.held_out} | {e.completion for e in split.train} == {str(i) for i in range(40)}
    assert len(read_corpus(task, eval_data=other).held_out) == 40
    with pytest.raises(UsageError, match=r"a share of 0.6 takes 60 examples, the file has 40"):
        read_corpus(task, mix=[(other, 0.6)])
    with pytest.raises(UsageError, match="add up to less than 1"):
        read_corpus(task, mix=[(other, 0.6), (other, 0.4)])
    with pytest.raises(UsageError, match="none is left to train on"):
        read_corpus(write_rows(tmp_path / "one.jsonl", numbers[:1]), eval_split=0.5)


def test_patience_ends_training_and_takes_the_best_weights(llama: Path, data: Path, tmp_path: Path) -> None:
    base = ModelFolder(llama)
    options = replace(QUICK, steps=40, eval_steps=1, patience=2, lr=0.5, calibration_lr=1e-3, save_steps=100)
    training = train(base, data, options, eval_data=data)
    losses = [loss for _, loss in training.curve.eval_losses]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 40, "it did not stop two evaluations after the best"
    shorter = train(base, data, replace(options, steps=best + 1, patience=None), eval_data=data)
    for name in training.vector:
        assert np.array_equal(training.vector[name].values, shorter.vector[name].values)
    kept = {"steps": best + 3, "kept_step": best + 1, "eval_loss": losses[best]}
    assert training.vector.provenance.items() >= kept.items()
    assert training.vector.provenance["final_loss"] == shorter.curve.losses[-1] == training.curve.losses[best]


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam", "adamw", "sgd"])
@pytest.mark.parametrize("fixture", ["llama", "llama_bf16"])
def test_a_mask_that_changes_keeps_k_and_avoids_earlier_masks(
    fixture: str, optimizer: str, data: Path, request: pytest.FixtureRequest
) -> None:
    """`train` itself checks that the weights outside the mask have the bits of the base."""
    base = ModelFolder(request.getfixturevalue(fixture))
    earlier = train(base, data, replace(QUICK, sparsity=0.6, steps=0, lr=None, save_steps=100)).vector
    options = replace(REGROWING, optimizer=optimizer, lr=1e-2, l1=0.1, weight_decay=0.1, sparsity=0.8)
    fixed = replace(options, regrow_steps=None, regrow_share=0.2)
    before, after = (train(base, data, each, disjoint_from=[earlier]) for each in (fixed, options))
    assert before.replaced is before.vector.provenance["replaced"] is before.summary()["replaced"] is None
    assert after.replaced == after.vector.provenance["replaced"] == after.summary()["replaced"]
    assert before.entries == after.entries == len(positions(after.vector)) == round(0.2 * after.vector.eligible)
    for name in before.vector:
        assert len(before.vector[name]) == len(after.vector[name])
    new = positions(after.vector) - positions(before.vector)
    assert 0 < len(new) <= (after.replaced or 0)
    assert not positions(after.vector) & positions(earlier)
    assert not after.warnings


@pytest.mark.parametrize("mask", ["lift", "low-magnitude"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_mask_is_chosen_again_from_the_weights_at_that_time(
    mask: str, architecture: str, data: Path, tmp_path: Path
) -> None:
    """Beside a run with a fixed mask that ends when the mask changes: its weights, scored tensor by tensor."""
    base = ModelFolder(make_architecture(architecture, tmp_path / "base", dtype="float32"))
    earlier = train(base, data, TrainingOptions(mask="random", steps=0, device="cpu")).vector
    options = replace(CHOSEN_AGAIN, mask=mask, mask_rank=3 if mask == "lift" else 128, lr=0.03, steps=5, regrow_steps=4)
    fixed = replace(options, steps=4, regrow_steps=None, regrow_rule="gradients")
    before, after = (train(base, data, each, disjoint_from=[earlier]).vector for each in (fixed, options))
    apply(before, base, tmp_path / "before")
    weights = ModelFolder(tmp_path / "before")
    model, _ = load_model(base.path)
    placed = places(model, {name: before.specs[name].form for name in before})
    scores: dict[str, list[np.ndarray]] = {}
    wanted: dict[str, list[np.ndarray]] = {}
    for name in sorted(before, key=lambda name: placed[name].start):  # the parts of a parameter in their order
        shape = before.specs[name].shape
        matrix = weights.bits(name).view(np.float32).reshape(shape)
        if mask == "lift":
            left, values, right = np.linalg.svd(matrix.astype(np.float64))
            score = np.abs(left[:, :3] * values[:3] @ right[:3]).reshape(-1)
        else:
            score = 1 / (1e-30 + np.abs(matrix.reshape(-1).astype(np.float64)))
        score[earlier[name].indices] = 0
        scores.setdefault(placed[name].parameter, []).append(score)
        found = np.zeros(len(score), bool)
        found[after[name].indices] = True
        wanted.setdefault(placed[name].parameter, []).append(found)
    for parameter, parts in scores.items():
        score, found = np.concatenate(parts), np.concatenate(wanted[parameter])
        best = np.argsort(-score, kind="stable")[: found.sum()]
        assert np.array_equal(np.sort(best), np.flatnonzero(found)), parameter
    assert positions(after) != positions(before)
    assert len(positions(after)) == len(positions(before))


def test_patience_restores_the_mask_of_the_best_weights(llama: Path, data: Path, tmp_path: Path) -> None:
    options = replace(REGROWING, steps=40, eval_steps=1, patience=5, lr=0.3, calibration_lr=1e-3, save_steps=100)
    options = replace(options, batch_size=len(ROWS))  # so that the loss of an evaluation is that of a single batch
    training = train(ModelFolder(llama), data, options, eval_data=data)
    best = min(loss for _, loss in training.curve.eval_losses)
    assert 2 < training.curve.kept < len(training.curve.losses) < 40
    base = ModelFolder(llama)
    apply(training.vector, base, tmp_path / "out")
    scored = evaluate(*load_model(tmp_path / "out"), read_examples(data))  # type: ignore[arg-type]
    assert scored.metrics["loss"].value == pytest.approx(best, rel=1e-5)


def test_a_mask_of_which_nothing_can_be_replaced_is_reported(llama: Path, data: Path) -> None:
    training = train(ModelFolder(llama), data, replace(REGROWING, regrow_share=1e-4))
    assert training.replaced == 0
    assert "no entry of the mask was replaced" in " ".join(training.warnings)


@pytest.mark.parametrize("fixture", ["llama", "gpt2"])
def test_metrics_are_those_of_the_model_at_each_evaluation(
    fixture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """And they change nothing: GPT-2 has dropout, so random numbers that are drawn in between would show."""
    folder = request.getfixturevalue(fixture)
    base, data = ModelFolder(folder), write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    options = replace(
        QUICK, lr=3e-2, calibration_lr=1e-3, steps=30, eval_steps=15, eval_metric=("rouge1", "exact_match")
    )
    measured = train(base, data, options, eval_data=data)
    plain = train(base, data, replace(options, eval_metric=()), eval_data=data)
    assert plain.curve.eval_metrics == {}
    assert measured.curve.losses == plain.curve.losses
    assert measured.curve.eval_losses == plain.curve.eval_losses
    for name in plain.vector:
        assert np.array_equal(measured.vector[name].values, plain.vector[name].values)
    for number, steps in enumerate((15, 30)):
        model, tokenizer = load_model(folder)
        shorter = train(base, data, replace(options, steps=steps, eval_metric=()), eval_data=data).vector
        with attach(model, shorter, base=base):
            found = evaluate(model, tokenizer, read_examples(data), options.eval_metric, batch_size=2).metrics
        for name, points in measured.curve.eval_metrics.items():
            assert points[number] == (steps, found[name].value)
    assert measured.curve.eval_metrics["rouge1"][-1][1] > 0
    provenance = measured.vector.provenance
    assert provenance["eval_rouge1"] == measured.curve.eval_metrics["rouge1"][-1][1]
    assert TrainingOptions(**{**provenance["run"]["options"], "device": "cpu"}) == options


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [QUICK, FFT, LORA], ids=["lota", "fft", "lora"])
def test_metrics_are_measured_in_any_arithmetic(options: TrainingOptions, dtype: str, llama: Path, data: Path) -> None:
    options = replace(options, dtype=dtype, eval_metric=("exact_match",), steps=4, gradient_checkpointing=True)
    training = train(ModelFolder(llama), data, options, eval_data=data)
    assert [step for step, _ in training.curve.eval_metrics["exact_match"]] == [1, 2, 3, 4]
    plain = train(ModelFolder(llama), data, replace(options, eval_metric=()), eval_data=data)
    assert training.curve.losses == plain.curve.losses


def test_metrics_that_cannot_be_measured_are_refused(data: Path, llama: Path, tmp_path: Path) -> None:
    base = ModelFolder(llama)
    with pytest.raises(UsageError, match=r"^`eval_metric` is one of exact_match, rouge1, found 'loss'$"):
        train(base, data, replace(QUICK, eval_metric=("loss",)), eval_data=data)
    with pytest.raises(UsageError, match="`eval_metric` has no effect here: it needs examples to evaluate on"):
        train(base, data, replace(QUICK, eval_metric=("rouge1",)))
    with pytest.raises(UsageError, match=r"eval_metric` must be a list of strings, found 'rouge1'"):
        TrainingOptions(eval_metric="rouge1")  # type: ignore[arg-type]
    bert = make_architecture("bert", tmp_path / "bert", dtype="float32")
    with pytest.raises(UsageError, match="bert is a masked language model and gives no answers"):
        train(ModelFolder(bert), data, replace(QUICK, eval_metric=("rouge1",)), eval_data=data)


@pytest.mark.parametrize("fixture", ["llama", "llama_bf16"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_arithmetic_may_be_bf16(
    fixture: str, low_memory: bool, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = ModelFolder(request.getfixturevalue(fixture))
    options = replace(QUICK, dtype="bfloat16", low_memory=low_memory, calibration_steps=8)
    narrow, wide = train(base, data, options), train(base, data, replace(options, dtype="float32"))
    assert narrow.entries == wide.entries == round(0.1 * wide.vector.eligible)
    assert narrow.curve.losses == pytest.approx(wide.curve.losses, rel=0.05)
    shared = len(positions(narrow.vector) & positions(wide.vector))
    assert shared > 0.5 * narrow.entries
    apply(saved(narrow, tmp_path / "x.lota"), base, tmp_path / "out")


@pytest.mark.parametrize("options", [FFT, LORA], ids=["fft", "lora"])
def test_dense_methods_too(options: TrainingOptions, llama_bf16: Path, data: Path) -> None:
    narrow, wide = (
        train(ModelFolder(llama_bf16), data, replace(options, dtype=dtype)) for dtype in ("bfloat16", "float32")
    )
    assert narrow.curve.losses == pytest.approx(wide.curve.losses, rel=0.05)
    assert narrow.curve.losses[-1] < narrow.curve.losses[0]


def test_calibration_in_little_memory_finds_much_the_same_mask(llama: Path, tmp_path: Path) -> None:
    base, data = ModelFolder(llama), write_rows(tmp_path / "rows.jsonl", ROWS * 4)
    options = replace(QUICK, calibration_steps=10, calibration_lr=1e-3, steps=0, lr=None, save_steps=100)
    exact, low = (positions(train(base, data, replace(options, low_memory=low)).vector) for low in (False, True))
    assert len(low) == len(exact)
    assert len(low & exact) > 0.95 * len(exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_the_lean_optimizer_is_rmsprop_with_clipped_gradients(dtype: torch.dtype, clip: float) -> None:
    torch.manual_seed(0)
    starts = [torch.randn(5, 7).to(dtype), torch.randn(2, 3, 4).to(dtype)]
    lean = [torch.nn.Parameter(start.clone()) for start in starts]
    exact = [torch.nn.Parameter(start.float().clone()) for start in starts]
    optimizer, reference = LeanRMSprop(lean, lr=1e-4, clip=clip), torch.optim.RMSprop(exact, lr=1e-4)
    for step in range(20):
        grads = [(torch.randn(start.shape) * (1 + step % 3)).to(dtype) for start in starts]
        before = [weight.detach().clone() for weight in lean]
        with optimizer.updating(), optimizer.measuring():
            sum((weight * grad).sum() for weight, grad in zip(lean, grads, strict=True)).backward()  # type: ignore[union-attr]
        assert all(torch.equal(weight, old) for weight, old in zip(lean, before, strict=True))
        with optimizer.updating():
            sum((weight * grad).sum() for weight, grad in zip(lean, grads, strict=True)).backward()  # type: ignore[union-attr]
        assert all(weight.grad is None for weight in lean)
        sum((weight * grad.float()).sum() for weight, grad in zip(exact, grads, strict=True)).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(exact, clip)
        reference.step()
        reference.zero_grad()
    for weight, wide, start in zip(lean, exact, starts, strict=True):
        total = weight.detach().float()
        if dtype != torch.float32:
            lost = optimizer.lost(weight)
            assert lost is not None
            total += lost.float()
        torch.testing.assert_close(total - start.float(), wide.detach() - start.float(), rtol=2e-2, atol=2e-5)
    lean[0].float().square().sum().backward()
    assert lean[0].grad is not None


def test_other_criteria_rank_by_the_gradients_of_calibration(llama: Path, data: Path) -> None:
    """One step over all the data: |g| ranks as g² does, and both as a backward pass by hand."""
    from taskvec.data.examples import read_examples
    from taskvec.data.rows import collate, encode

    base = ModelFolder(llama)
    options = replace(QUICK, calibration_steps=1, steps=0, lr=None, batch_size=4, save_steps=100)
    model, tokenizer = load_model(llama)
    rows = [encode(example, tokenizer, 64) for example in read_examples(data)]
    model(**collate(rows, 0, frozenset())).loss.backward()
    gradients = {name: p.grad.abs().view(-1).numpy() for name, p in model.named_parameters() if p.grad is not None}
    found = {}
    for criterion in ("gradient", "fisher"):
        vector = train(base, data, replace(options, mask=criterion)).vector
        found[criterion] = positions(vector)
        eligible = {name: gradients[name] for name in vector}
        ranked = sorted(
            ((float(v), n, i) for n, values in eligible.items() for i, v in enumerate(values)), reverse=True
        )
        expected = {(name, place) for _, name, place in ranked[: len(found[criterion])]}
        assert len(expected & found[criterion]) > 0.99 * len(expected)
    for low_memory in (False, True):
        longer = replace(options, calibration_steps=5, batch_size=2, mask="fisher", low_memory=low_memory)
        assert positions(train(base, data, longer).vector) != found["fisher"]


def test_the_pull_towards_the_base_shrinks_the_changes(llama: Path, data: Path) -> None:
    sizes = {}
    for l1 in (0.0, 50.0):
        options = replace(QUICK, l1=l1, optimizer="sgd", lr=0.1, calibration_lr=0.1)
        vector = train(ModelFolder(llama), data, options).vector
        sizes[l1] = sum(float(np.abs(vector[name].values).sum()) for name in vector)
    assert sizes[50.0] < 0.9 * sizes[0.0]
    # one step: delta = −lr·(g + λ/N·sign(0)) is what it would be without the pull, the second step is not
    first = [
        train(ModelFolder(llama), data, replace(UNCALIBRATED, l1=l1, optimizer="sgd", steps=1, mask="random")).vector
        for l1 in (0.0, 50.0)
    ]
    for name in first[0]:
        assert np.array_equal(first[0][name].values, first[1][name].values)


def test_calibration_may_be_counted_in_epochs(llama: Path, data: Path) -> None:
    counts = {
        epochs: len(
            train(ModelFolder(llama), data, replace(UNCALIBRATED, calibration_epochs=epochs)).calibration_losses
        )
        for epochs in (0.5, 2)
    }
    assert counts == {0.5: 1, 2: 4}


def test_the_record_of_a_run_is_in_the_file(llama: Path, data: Path, tmp_path: Path) -> None:
    import taskvec

    vector = saved(train(ModelFolder(llama), data, replace(QUICK, eval_split=0.25)), tmp_path / "x.lota")
    record = vector.provenance["run"]
    asked = with_defaults(replace(QUICK, eval_split=0.25), calibrates=True)
    assert TrainingOptions(**{**record["options"], "device": "cpu"}) == asked
    assert record["versions"]["taskvec"] == taskvec.__version__
    assert record["data"][0]["name"] == data.name
    assert record["base"] == ModelFolder(llama).fingerprint
    assert vector.provenance["eval_loss"] > 0


def test_losses_are_drawn(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plot_losses("x", [3.0, 2.5], [2.4, 2.0, 1.8], [(2, 2.1)], tmp_path / f"{name}.png")
    plot_losses("x", [], [2.0], [], tmp_path / "c.svg")
    metrics = {"exact_match": [(2, 0.25), (3, 0.5)], "rouge1": [(2, 0.5), (3, 0.75)]}
    plot_losses("x", [3.0], [2.4, 2.0, 1.8], [(2, 2.1), (3, 2.0)], tmp_path / "d.svg", metrics=metrics)
    assert all(label in (tmp_path / "d.svg").read_text(encoding="utf-8") for label in ("exact match", "rouge1"))
    plot_losses("x", [], [2.0], [], tmp_path / "e.svg", metrics={"rouge1": []})
    assert (tmp_path / "e.svg").read_bytes() == (tmp_path / "c.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "held out" not in (tmp_path / "c.svg").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="a picture must be one of"):
        plot_losses("x", [], [2.0], [], tmp_path / "c.bmp")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "bert"])
def test_every_architecture_trains_packs_merges_and_unpacks(architecture: str, tmp_path: Path, gpt2: Path) -> None:
    folder = gpt2 if architecture == "gpt2" else make_architecture(architecture, tmp_path / "base", dtype="float32")
    base, data = ModelFolder(folder), write_rows(tmp_path / "rows.jsonl")
    vectors = []
    for seed in (0, 1):
        training = train(base, data, replace(QUICK, seed=seed, batch_size=4), disjoint_from=vectors)
        assert training.curve.losses[-1] < training.curve.losses[0]
        vectors.append(saved(training, tmp_path / f"{seed}.lota"))
    merged = merge(vectors)
    apply(merged, base, tmp_path / "merged")
    tuned = ModelFolder(tmp_path / "merged")
    again = diff(base, tuned)
    apply(again, base, tmp_path / "again")
    assert tensors(ModelFolder(tmp_path / "again")) == tensors(tuned) != tensors(base)
