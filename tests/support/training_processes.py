"""Training runs in several processes. Usage: torchrun ... -m support.training_processes FOLDER OUTPUT RUN...

FOLDER contains what `prepare` writes. RUN names runs of `RUNS`. The vectors are OUTPUT/RUN.lota, and the results
OUTPUT/RUN.json. `alone` does the same in this process. The variable TRAINING_DEVICE names the device, which is the CPU
unless it is set.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import FAMILIES, make_model
from torch.distributed.tensor import DTensor

from support.models import ROWS, make_bert, make_gpt2, make_llama, make_mixtral, write_rows
from taskvec import TaskVector, train
from taskvec.errors import TrainingError
from taskvec.models.divided import load_divided
from taskvec.models.loading import load_model
from taskvec.training.options import TrainingOptions
from taskvec.training.processes import join, joined
from taskvec.training.result import TrainingResult
from taskvec_formats import ModelFolder

_SHORT: dict[str, Any] = {
    "calibration_steps": 3,
    "steps": 6,
    "lr": 1e-3,
    "batch_size": 5,
    "device": os.environ.get("TRAINING_DEVICE", "cpu"),
    "save_steps": 4,
}
_LEARNING = {"calibration_steps", "lr", "batch_size", "save_steps"}  # without effect where nothing trains

# name -> base, and arguments of `train`
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("llama", {"optimizer": "adamw", "accumulate": 2, "eval_split": 0.3, "eval_steps": 2}),
    "rmsprop-bf16": ("bf16", {"dtype": "bfloat16", "clip": 0.1}),
    "adamw-bf16": ("bf16", {"dtype": "bfloat16", "optimizer": "adamw"}),
    "low-memory": ("llama", {"low_memory": True}),
    "low-memory-bf16": ("bf16", {"low_memory": True, "dtype": "bfloat16"}),
    "fisher": ("llama", {"mask": "fisher", "scope": "tensor", "optimizer": "adam", "accumulate": 2}),
    "gradient": ("mixtral", {"mask": "gradient", "optimizer": "sgd", "lr": 0.1}),
    "gallop": ("llama", {"mask": "gallop", "low_memory": True, "steps": 2}),
    "saliency": ("mixtral", {"mask": "saliency", "optimizer": "sgd", "lr": 0.1, "accumulate": 2, "steps": 2}),
    "lift": ("mixtral", {"mask": "lift", "mask_rank": 4, "steps": 0}),
    "principal": ("gpt2", {"mask": "lift", "mask_rank": 4, "steps": 0, "scope": "tensor", "sparsity": 0.5}),
    "low-magnitude": ("bf16", {"mask": "low-magnitude", "steps": 0}),
    "random": ("llama", {"mask": "random", "l1": 0.1, "weight_decay": 0.1}),
    "lotto": ("llama", {"disjoint_from": ["first.lota"], "start_from": "first.lota", "optimizer": "adam"}),
    "via": ("llama", {"via": (0.5,), "optimizer": "adam"}),
    "fft": ("llama", {"method": "fft", "sparsity": None, "weight_decay": 0.1, "optimizer": "adam"}),
    "replicas": ("llama", {"optimizer": "adam", "shards": 1}),
    "regrowing": ("llama", {"optimizer": "adam", "shards": 1, "regrow_steps": 2, "regrow_share": 0.5}),
    "divided-replicas": ("mixtral", {"optimizer": "adamw", "lr": 0.01, "shards": 2, "low_memory": False}),
    "fft-bf16": ("bf16", {"method": "fft", "sparsity": None, "dtype": "bfloat16", "optimizer": "adam", "clip": 0.1}),
    "recomputed": (
        "mixtral",
        {"gradient_checkpointing": True, "optimizer": "sgd", "lr": 0.1, "pack": True, "max_length": 40},
    ),
    "best": (
        "llama",
        {
            "eval_split": 0.3,
            "eval_steps": 1,
            "patience": 1,
            "save_steps": 100,
            "eval_metric": ("exact_match",),
            "lr": 0.03,
        },
    ),
    "taken": ("llama", {"mask_from": "first.lota", "sparsity": None}),
    "mask": ("llama", {"mask_from": "first.lota", "sparsity": 0.95, "steps": 0}),
    "found": ("llama", {"lr": "auto", "steps": 3}),
    "gpt2": ("gpt2", {"optimizer": "sgd", "lr": 0.1}),
    "bert": ("bert", {"optimizer": "sgd", "lr": 0.1}),
    "uneven": ("llama", {"optimizer": "sgd", "lr": 0.1, "eval_split": 0.6, "eval_steps": 2}),
    "switch": ("switch", {"method": "fft", "sparsity": None, "optimizer": "sgd", "lr": 0.1, "batch_size": 2}),
    "t5": ("t5", {"optimizer": "sgd", "lr": 0.1, "accumulate": 2}),
}


def prepare(folder: Path) -> None:
    """Write bases, data and an earlier vector."""
    make_llama(folder / "llama")
    make_llama(folder / "other", seed=1)
    make_llama(folder / "bf16", dtype="bfloat16", shard_size="20KB")
    make_mixtral(folder / "mixtral")
    make_gpt2(folder / "gpt2")
    make_bert(folder / "bert")
    for kind, name in (("t5", "T5ForConditionalGeneration"), ("switch", "SwitchTransformersForConditionalGeneration")):
        make_model(next(one for one in FAMILIES if one.name == name), folder / kind)
    for kind in ("gpt2", "bert", "t5", "switch"):  # processes draw other random numbers
        path = folder / kind / "config.json"
        config = json.loads(path.read_text())
        config |= {key: 0.0 for key in config if "drop" in key or "jitter" in key}
        path.write_text(json.dumps(config))
    write_rows(folder / "rows.jsonl", (ROWS * 4)[:13])
    write_rows(folder / "pairs.jsonl", (ROWS[:3] * 5)[:13])
    options = {"mask": "random", "steps": 2, "device": "cpu"}
    train(folder / "llama", folder / "rows.jsonl", **options).vector.save(folder / "first.lota")


def run(name: str, folder: Path, output: Path) -> TrainingResult:
    """Do a run. If there are several processes, all of them."""
    base, given = RUNS[name]
    options = {**_SHORT, **given}
    if "WORLD_SIZE" not in os.environ:
        options.pop("shards", None)
    if name in ("random", "taken", "mask", "fft", "fft-bf16", "switch"):
        del options["calibration_steps"]
    if options["steps"] == 0:
        options = {key: options[key] for key in options if key not in _LEARNING}
    for key in ("mask_from", "start_from"):
        if key in options:
            options[key] = folder / options[key]
    if "disjoint_from" in options:
        options["disjoint_from"] = [folder / file for file in options["disjoint_from"]]
    return train(
        folder / base,
        folder / ("pairs.jsonl" if name in ("t5", "switch") else "rows.jsonl"),
        folder=output / f"{name}.run",
        **options,
    )


def alone(name: str, folder: Path, output: Path) -> None:
    """Do a run in one process, or in all processes."""
    output.mkdir(exist_ok=True)
    result = run(name, folder, output)
    processes = joined()
    if processes is None or processes.is_first:
        result.vector.save(output / f"{name}.lota")
        curve = asdict(result.curve)
        figures = {key: getattr(result, key) for key in ("entries", "survived", "free_share", "unreached", "free")}
        (output / f"{name}.json").write_text(json.dumps({**figures, **curve, "calibration": result.calibration_losses}))


def figures(folder: Path, name: str) -> dict[str, Any]:
    """The results of a run."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def close(one: Path, several: Path, name: str, *, rounded: bool | None = None) -> None:
    """Compare two runs.

    Args:
        one: The folder of the results of one.
        several: That of the other.
        name: The name of the runs.
        rounded: Whether changes differ by roundings, and some positions by ties. None: if they are in bf16.
    """
    rounded = RUNS[name][1].get("dtype") == "bfloat16" if rounded is None else rounded
    first, second = (TaskVector.open(folder / f"{name}.lota") for folder in (one, several))
    shared = 0
    for tensor in first:
        a, b = first[tensor], second[tensor]
        common, here, there = np.intersect1d(a.indices, b.indices, return_indices=True)
        shared += len(common)
        difference = np.abs(a.values[here] - b.values[there])
        scale = float(np.abs(a.values).max(initial=0))
        # deltas have the resolution of their weights
        most = 0.05 * scale if rounded else 1e-5 * scale + 1e-8
        assert np.count_nonzero(difference > most) <= 0.1 * len(difference), tensor
        assert rounded or difference.max(initial=0) <= 1e-4 * scale + 1e-7, tensor
    expected, found = figures(one, name), figures(several, name)
    exact = not rounded or RUNS[name][1].get("method") != "fft"  # else all that change in bf16 are entries
    assert abs(found["entries"] - expected["entries"]) <= (0 if exact else 0.01 * expected["entries"])
    assert shared >= (0.98 if rounded else 1) * expected["entries"]
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=2e-3 if rounded else 1e-6)
    np.testing.assert_allclose(found["calibration"], expected["calibration"], rtol=2e-3 if rounded else 1e-6)
    np.testing.assert_allclose(found["eval_losses"], expected["eval_losses"], rtol=2e-3 if rounded else 1e-6)
    for same in ("eval_metrics", "kept", "lr", "unreached", "free_share", *([] if rounded else ["survived", "free"])):
        assert found[same] == expected[same], same


def check_loading(folder: Path) -> None:
    """Check that a model of which each process reads its rows is the one that transformers loads."""
    mesh = join(TrainingOptions(device=_SHORT["device"])).mesh
    assert mesh is not None
    for name in ("llama", "bf16", "mixtral", "gpt2", "bert", "t5"):
        for dtype in (torch.float32, torch.bfloat16):
            whole, _ = load_model(folder / name, dtype)
            model, _ = load_divided(ModelFolder(folder / name), folder / name, dtype, mesh)
            expected = dict(whole.named_parameters()) | dict(whole.named_buffers())
            found = dict(model.named_parameters()) | dict(model.named_buffers())
            assert found.keys() == expected.keys()
            for key, values in expected.items():
                value = found[key].full_tensor() if isinstance(found[key], DTensor) else found[key]
                assert value.dtype == values.dtype, key
                assert torch.equal(value.cpu(), values), key


def check_inputs(folder: Path) -> None:
    """Check that all processes refuse a base that differs between them."""
    base = folder / ("llama" if os.environ["RANK"] == "0" else "other")
    options: dict[str, Any] = {"method": "fft", "sparsity": None, "steps": 1, "device": "cpu"}
    try:
        train(base, folder / "rows.jsonl", folder=folder / "differing.run", **options)
    except TrainingError as error:
        assert str(error).startswith("process 1 of 2 has other input than process 0: base is '"), error  # noqa: PT017
    else:
        raise AssertionError("not refused")


def main() -> None:
    """Do runs in all processes, or the checks of these names."""
    faulthandler.dump_traceback_later(120, exit=True)
    folder, output, *names = sys.argv[1:]
    for name in names:
        if name in CHECKS:
            CHECKS[name](Path(folder))
        else:
            alone(name, Path(folder), Path(output))
    print("done", flush=True)
    os._exit(0)  # a process group of gloo sometimes aborts when it is destroyed


CHECKS = {"loading": check_loading, "inputs": check_inputs}

if __name__ == "__main__":
    main()
