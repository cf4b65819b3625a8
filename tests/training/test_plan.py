"""What --dry-run says of a run: as much as the run then does, and nothing is left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.commands import ok, refused
from support.models import ROWS, make_architecture, write_rows

from taskvec import TaskVector
from taskvec.errors import MaskError, UsageError
from taskvec.names import layer_and_module
from taskvec.training.footprint import activations
from taskvec.training.loop import fit
from taskvec.training.options import TrainingOptions
from taskvec.training.plan import Plan, plan
from taskvec.training.run import Run
from taskvec.training.train import train
from taskvec_formats import ModelFolder

pytestmark = pytest.mark.slow

QUICK = TrainingOptions(calibration_steps=2, steps=3, batch_size=2, lr=1e-3, device="cpu")
UNCALIBRATED = replace(QUICK, calibration_steps=TrainingOptions.calibration_steps)  # where a setting of it is refused
FFT = replace(UNCALIBRATED, method="fft", sparsity=None)
LORA = replace(UNCALIBRATED, method="lora", sparsity=None, rank=2)


def by_layer(vector: TaskVector) -> dict[int | None, int]:
    found: dict[int | None, int] = {}
    for name in vector:
        layer, _ = layer_and_module(name)
        found[layer] = found.get(layer, 0) + len(vector[name])
    return found


@pytest.mark.parametrize(
    "options",
    [
        QUICK,
        replace(UNCALIBRATED, scope="tensor", calibration_epochs=2.5, steps=None, epochs=1.5),
        replace(UNCALIBRATED, mask="random", sparsity=0.97),
        replace(QUICK, via=(0.5,), accumulate=2),
        replace(QUICK, via=(0.3, 0.6)),
        replace(QUICK, low_memory=True, dtype="bfloat16"),
        replace(QUICK, steps=0, lr=None),
        replace(UNCALIBRATED, mask="low-magnitude"),
        replace(UNCALIBRATED, mask="lift", mask_rank=4, via=(0.5,)),
        replace(UNCALIBRATED, mask="lift", scope="tensor"),
        replace(FFT, eval_split=0.3),
        LORA,
    ],
    ids=[
        "global",
        "tensor",
        "random",
        "via",
        "via two",
        "low memory",
        "mask",
        "weights",
        "lift",
        "principal",
        "fft",
        "lora",
    ],
)
def test_a_plan_is_what_the_run_does(
    options: TrainingOptions, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = ModelFolder(llama), write_rows(tmp_path / "rows.jsonl", [*ROWS, *ROWS[:3]])
    planned = plan(base, data, options)
    seen: list[tuple[int, int]] = []

    def counting(*arguments: object, **more: object) -> object:
        curve = fit(*arguments, **more)  # type: ignore[arg-type]
        seen.append((int(more["steps"]), len(curve.losses)))  # type: ignore[call-overload]
        return curve

    monkeypatch.setattr("taskvec.training.run.fit", counting)
    trained = train(base, data, options)
    assert [(phase.steps, phase.steps) for phase in planned.phases if phase.steps] == seen
    assert sum(not phase.steps for phase in planned.phases) == (options.mask == "lift")
    assert planned.examples == 7 - planned.held_out
    assert planned.held_out == (2 if options.eval_split else 0)
    assert planned.entries == (trained.entries if options.method == "lota" else None)
    assert planned.device == "cpu"
    assert planned.eligible == sum(layer.eligible for layer in planned.layers)
    if options.method == "lota":
        assert planned.eligible == trained.vector.eligible
        known = options.mask in ("random", "low-magnitude") or options.scope == "tensor"
        expected = by_layer(trained.vector) if known else dict.fromkeys((0, 1))
        assert {layer.layer: layer.entries for layer in planned.layers} == expected
    assert all(phase.memory > 0 for phase in planned.phases)


def test_a_mask_of_another_vector_is_counted_by_layer(llama: Path, data: Path) -> None:
    base = ModelFolder(llama)
    mask = train(base, data, QUICK).vector
    for sparsity in (None, 0.95):
        options = replace(UNCALIBRATED, sparsity=sparsity)
        planned = plan(base, data, options, mask_from=mask)
        trained = train(base, data, options, mask_from=mask).vector
        assert {layer.layer: layer.entries for layer in planned.layers} == by_layer(trained)
        assert planned.entries == sum(by_layer(trained).values())
        assert [phase.name for phase in planned.phases] == ["training"]


def test_tokens_are_counted_without_padding(llama: Path, tmp_path: Path) -> None:
    base, data = ModelFolder(llama), write_rows(tmp_path / "rows.jsonl", ROWS[:3])
    options = replace(UNCALIBRATED, mask="random", steps=None, epochs=2)
    planned = plan(base, data, options)
    run = Run(base, [], _corpus(data), options, lambda *_: None, dense=False)
    lengths = [len(row["input_ids"]) for row in run.rows]
    assert planned.longest == max(lengths)
    assert planned.tokens_per_example == sum(lengths) / 3
    # three examples two at a time are two steps a pass
    (phase,) = planned.phases
    assert (phase.steps, phase.tokens) == (4, 2 * sum(lengths))


def _corpus(data: Path):  # type: ignore[no-untyped-def]
    from taskvec.data.corpus import read_corpus

    return read_corpus(data)


def memory(planned: Plan) -> dict[str, int]:
    return {phase.name: phase.memory for phase in planned.phases}


def test_memory_grows_with_what_is_kept(llama: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tensors alone; by the numbers that the documentation names."""
    monkeypatch.setattr("taskvec.training.plan.resident", lambda: None)
    base = ModelFolder(llama)

    def planned(**changes: object) -> dict[str, int]:
        return memory(plan(base, data, replace(QUICK, **changes)))  # type: ignore[arg-type]

    n, k = plan(base, data, QUICK).eligible, round(0.1 * plan(base, data, QUICK).eligible)
    usual = planned()
    assert planned(optimizer="adam")["calibrating"] - usual["calibrating"] == 4 * n
    assert planned(optimizer="adam")["training"] - usual["training"] == 4 * k
    assert planned(optimizer="sgd", calibration_lr=0.1)["calibrating"] - usual["calibrating"] == -4 * n
    for mask in ("fisher", "gallop", "saliency"):
        assert planned(mask=mask)["calibrating"] - usual["calibrating"] == 4 * n
    assert "calibrating" not in planned(mask="low-magnitude", calibration_steps=20)
    lift = {
        rank: planned(mask="lift", mask_rank=rank, calibration_steps=20)["choosing the mask"] for rank in (4, 5, 99)
    }
    sides = [sum(info.shape) for name, info in base.tensors.items() if ".layers." in name and len(info.shape) == 2]
    assert lift[5] - lift[4] == 4 * sum(sides) + 16 * 48
    assert lift[99] < lift[4]  # no approximation
    assert planned(regrow_steps=1)["training"] - usual["training"] == 16 * k
    fixed = {"mask": "low-magnitude", "calibration_steps": 20}
    changing = planned(**fixed, regrow_steps=1, regrow_rule="criterion")["training"]
    assert changing - planned(**fixed)["training"] == 3 * 4 * 32 * 48  # the largest matrix, three times
    assert planned(batch_size=4)["training"] > usual["training"]
    assert planned(gradient_checkpointing=True, batch_size=4)["training"] < planned(batch_size=4)["training"]
    assert planned(dtype="bfloat16")["training"] < usual["training"]
    assert planned(accumulate=2)["calibrating"] > usual["calibrating"]


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "bert"])
def test_activations_of_a_batch_are_estimated_from_one_example(architecture: str, data: Path, tmp_path: Path) -> None:
    """What a forward pass of a whole batch keeps, counted on it."""
    from torch.autograd.graph import saved_tensors_hooks

    from taskvec.data.rows import accepted_arguments, collate

    base = ModelFolder(make_architecture(architecture, tmp_path / "base", dtype="float32"))
    run = Run(base, [], _corpus(data), QUICK, lambda *_: None, dense=True)
    row = max(run.rows, key=lambda row: len(row["input_ids"]))
    inputs = collate([row] * 4, 0, accepted_arguments(run.model))
    before = [parameter.requires_grad for parameter in run.model.parameters()]
    estimated = activations(run, dense=True)
    assert [parameter.requires_grad for parameter in run.model.parameters()] == before
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*run.model.parameters(), *run.model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        run.model(**inputs)
    counted = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in owned)
    tokens, logits = inputs["input_ids"].numel(), 4 * inputs.get("logits_to_keep", inputs["input_ids"].shape[1])
    vocabulary = run.model.config.vocab_size
    assert estimated.of(tokens, logits) - 4 * logits * vocabulary == pytest.approx(counted, rel=0.25)


def test_what_a_run_would_refuse_is_refused(llama: Path, data: Path, tmp_path: Path) -> None:
    base = ModelFolder(llama)
    wide = train(base, data, replace(QUICK, sparsity=0.3, steps=0, lr=None)).vector
    with pytest.raises(MaskError, match="earlier masks leave"):
        plan(base, data, replace(QUICK, sparsity=0.3), disjoint_from=[wide])
    with pytest.raises(MaskError, match="earlier masks leave"):
        plan(base, data, replace(QUICK, via=(0.3,)), disjoint_from=[wide])
    with pytest.raises(UsageError, match="`patience` has no effect here: it needs examples"):
        plan(base, data, replace(QUICK, patience=2))


def test_dry_run_prints_a_plan_and_writes_nothing(llama: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["train", llama, data, "-o", tmp_path / "x.lota", "--steps", "3", "--device", "cpu", "--dry-run"]
    said = ok(*arguments, "--plot", tmp_path / "x.png")
    for line in (
        "examples: 4\n",
        "\ncalibrating: 20 steps at a learning rate of ",
        "\ntraining: 3 steps at a learning rate of ",
        "\nentries: 1,536\n",
        "\nentries per layer: known once the mask is chosen\n",
        f"\noutput files: {tmp_path / 'x.lota'}, {tmp_path / 'x.png'}\n",
        f"\nworking folders: {tmp_path / 'x.lota.run'}\n",
    ):
        assert line in said
    report = json.loads(ok(*arguments, "--scope", "tensor", "--json"))
    assert report["entries"] == sum(layer["entries"] for layer in report["layers"]) == 1536
    assert report["files"] == [str(tmp_path / "x.lota")]
    assert not list(tmp_path.iterdir())
    assert report["changes"] == 0
    assert "\nchanges of the mask during training: 2\n" in ok(*arguments, "--regrow-steps", "1")
    dense = ok(*arguments, "--method", "fft")
    assert "entries" not in dense
    (tmp_path / "x.lota").write_bytes(b"")
    assert "--force replaces it" in refused(2, *arguments)
