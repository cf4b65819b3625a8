"""Time and memory of one training step: sparse training compared with full fine-tuning and adapters.

Usage: python benchmarks/training.py BASE [STEPS [DTYPE [BATCH [LENGTH]]]]. A step takes BATCH rows of LENGTH tokens, 2
and 64 unless they are given. Each method is a process of its own, with RMSprop, on the same batches. The methods take
turns, ROUNDS times, because the speed of a machine varies. Columns: median seconds per step without the first two, of
the fastest round; the ratio to full fine-tuning; peak resident memory of the whole process; and the increase after the
model was loaded, the largest of all rounds. On an accelerator both are those of its allocator, and some methods run
once more with the model divided by FSDP2, in a process group of this process alone. DTYPE is bfloat16 if the machine
multiplies bf16 matrices as fast as f32 ones, else float32.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROUNDS = 3
METHODS = ("full fine-tuning", "LoTA, 90 %", "LoTA, 99 %", "LoRA, r=64", "LoRA, r=256", "SHiRA, 90 %", "SHiRA, 99 %")
DIVIDED = ("full fine-tuning, FSDP2", "LoTA, 90 %, FSDP2", "LoTA, 99 %, FSDP2")
COLUMNS = ("method", "seconds per step", "÷ full", "peak MB", "of that after loading", "trained weights")


def bf16_is_quick(device: Any) -> bool:
    """Whether a matrix product and its gradients take at most 10 % longer in bf16 than in f32."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        x, w = (torch.randn(512, 512, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            (x @ w).float().sum().item()
            (x @ w).sum().backward()
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) <= 1.1 * seconds(torch.float32)


class Memory:
    """The memory of the process, or of the accelerator's allocator, in bytes. A context manager that records the peak.

    Attributes:
        device: The device.
        peak: The peak within the block.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self.peak = 0
        self._stop = threading.Event()

    def now(self) -> int:
        """The memory in use now, in bytes."""
        import torch

        if self.device.type != "cpu":
            return int(torch.accelerator.memory_allocated())
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()

    def __enter__(self) -> Memory:
        # ru_maxrss cannot be reset, so a peak while loading would hide that of training
        def watch() -> None:
            while not self._stop.wait(0.005):
                self.peak = max(self.peak, self.now())

        self._thread = threading.Thread(target=watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        self._stop.set()
        self._thread.join()
        if self.device.type != "cpu":
            self.peak = int(torch.accelerator.max_memory_allocated())


def leaves(density: float) -> Callable[[Any, ExitStack], tuple[Any, Iterable[Any]]]:
    """LoTA with a random mask. The positions of entries do not affect the cost."""

    def prepare(model: Any, stack: ExitStack) -> tuple[Any, Iterable[Any]]:
        import numpy as np

        from taskvec import sparse_finetune
        from taskvec.models.placement import eligible_parameters

        rng = np.random.default_rng(0)
        masks = {
            name: np.flatnonzero(rng.random(parameter.numel(), np.float32) < density)
            for name, parameter in eligible_parameters(model).items()
        }
        tickets = stack.enter_context(sparse_finetune(model, masks))
        return tickets, tickets.parameters()

    return prepare


def adapters(
    make: Callable[[list[str], list[tuple[int, ...]]], Any],
) -> Callable[[Any, ExitStack], tuple[Any, Iterable[Any]]]:
    """A method of peft on the linear layers of the transformer blocks."""

    def prepare(model: Any, stack: ExitStack) -> tuple[Any, Iterable[Any]]:
        from peft import get_peft_model

        from taskvec.models.placement import eligible_parameters

        eligible = eligible_parameters(model)
        modules = [name.removesuffix(".weight") for name in eligible]
        adapted = get_peft_model(model, make(modules, [tuple(weight.shape) for weight in eligible.values()]))
        return adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad]

    return prepare


def full(model: Any, stack: ExitStack) -> tuple[Any, Iterable[Any]]:
    """Full fine-tuning: all parameters are trained."""
    return model, list(model.parameters())


def lora(rank: int) -> Any:
    """A LoRA of a rank."""
    from peft import LoraConfig

    return lambda modules, shapes: LoraConfig(r=rank, lora_alpha=16, target_modules=modules)


def shira(density: float) -> Any:
    """SHiRA of a density, which determines r: a matrix has r·(rows + columns) entries, like a LoRA of rank r."""
    from peft import ShiraConfig

    def make(modules: list[str], shapes: list[tuple[int, ...]]) -> Any:
        rank = density * sum(map(math.prod, shapes)) / sum(map(sum, shapes))
        return ShiraConfig(r=max(1, round(rank)), target_modules=modules, random_seed=0)

    return make


def divide(model: Any, device: Any) -> None:
    """Divide a model by FSDP2 among one process."""
    from tempfile import mkdtemp

    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    from taskvec.models.divided import divide

    distributed.init_process_group(init_method=f"file://{mkdtemp()}/meet", rank=0, world_size=1)
    divide(model, init_device_mesh(device.type, (1,)))


def prepare(method: str) -> Callable[[Any, ExitStack], tuple[Any, Iterable[Any]]]:
    """The function that makes a model trainable by a method."""
    name, _, setting = method.partition(", ")
    if name == "full fine-tuning":
        return full
    if name == "LoRA":
        return adapters(lora(int(setting.removeprefix("r="))))
    density = 1 - int(setting.split()[0]) / 100
    return leaves(density) if name == "LoTA" else adapters(shira(density))


def train(base: Path, steps: int, dtype_name: str, size: tuple[int, int], method: str) -> dict[str, float | str]:
    """Train for some steps in this process.

    Args:
        base: The model folder.
        steps: The number of steps.
        dtype_name: The dtype, or "" to choose it.
        size: Rows of a step, and tokens of a row.
        method: A name in METHODS or DIVIDED.

    Returns:
        Seconds per step, peak MB, MB after loading, the number of trained weights, the dtype and the device.
    """
    import torch
    from transformers import AutoModelForCausalLM

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = found or torch.device("cpu")
    dtype: torch.dtype = getattr(torch, dtype_name or ("bfloat16" if bf16_is_quick(device) else "float32"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False)
    model.to(device).train()  # type: ignore[arg-type]  # transformers' wrapper of it is typed without self
    model.config.use_cache = False
    torch.manual_seed(0)
    batches = torch.randint(0, model.config.vocab_size, (steps, *size), device=device)
    if method in DIVIDED:
        divide(model, device)
    model(input_ids=batches[0])  # one-time allocations of a first pass are not the method's
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    memory = Memory(device)
    loaded, seconds = memory.now(), []
    with ExitStack() as stack, memory:
        module, parameters = prepare(method.removesuffix(", FSDP2"))(model, stack)
        parameters = list(parameters)
        optimizer = torch.optim.RMSprop(parameters, lr=1e-6)
        for batch in batches:
            start = time.perf_counter()
            module(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[2:]),
        "peak": memory.peak / 1e6,
        "growth": (memory.peak - loaded) / 1e6,
        "trained": sum(parameter.numel() for parameter in parameters),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
    }


def main(base: Path, steps: int, dtype_name: str, size: tuple[int, int]) -> None:
    """Run every method in a process of its own and print the table."""
    import torch

    methods = METHODS + DIVIDED if torch.accelerator.is_available() else METHODS
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    rows: dict[str, dict[str, Any]] = {}
    for method in methods * ROUNDS:
        command = [sys.executable, __file__, str(base), str(steps), dtype_name, *map(str, size), method]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=quiet)
        if done.returncode:
            sys.exit(f"{method}: exit status {done.returncode}")
        found = json.loads(done.stdout.splitlines()[-1])
        best = rows.setdefault(method, found)
        best["seconds"] = min(best["seconds"], found["seconds"])
        for memory in ("peak", "growth"):
            best[memory] = max(best[memory], found[memory])
    first = rows[METHODS[0]]
    where = f"{first['device']}, {first['dtype']}"
    print(f"{where}, {size[0]} × {size[1]} tokens a step, RMSprop, {ROUNDS} rounds of {steps} steps\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for method, row in rows.items():
        ratio = row["seconds"] / first["seconds"]
        print(
            f"| {method} | {row['seconds']:.3f} | {ratio:.2f} | {row['peak']:.0f} | {row['growth']:.0f} | "
            f"{row['trained']:,} |"
        )


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 7:
        sys.exit(__doc__)
    given = sys.argv[1:]
    folder, count, name, rows, length, *child = given + ["", "8", "", "2", "64"][len(given) :]
    request = Path(folder), int(count), name, (int(rows), int(length))
    if child:
        print(json.dumps(train(*request, child[0])))
    else:
        main(*request)
