"""Real pairs of checkpoints, on which the file format is measured.

Usage: python benchmarks/pairs.py FOLDER. Creates in FOLDER whatever is missing of:

base32, base16        SmolLM2-135M-Instruct in f32 and bf16
tuned32               base32 after 40 RMSprop steps on the source of Python's standard library
f32-90, f32-99        base32 with the top 10 % and 1 % of that change over all attention and MLP weights
bf16-90, bf16-99      base16 with those weights rounded to bf16
bf16-step             base16 after one small step
"""

from __future__ import annotations

import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from ml_dtypes import bfloat16

from taskvec import Checkpoint
from taskvec.demo.smollm2 import write_base
from taskvec.vectors.topk import TopK, entries_for, top_k
from taskvec_formats import ModelFolder
from taskvec_formats.container import encode_header
from taskvec_formats.dtypes import DTYPES, BitArray
from taskvec_formats.file_names import SINGLE
from taskvec_formats.system.atomic import atomic_directory

STEPS, LEARNING_RATE, BATCH, LENGTH = 40, 1e-5, 4, 96
# base, tuned
PAIRS = {
    "f32, 90 % sparse": ("base32", "f32-90"),
    "f32, 99 % sparse": ("base32", "f32-99"),
    "bf16, 90 % sparse": ("base16", "bf16-90"),
    "bf16, 99 % sparse": ("base16", "bf16-99"),
    "bf16, one step": ("base16", "bf16-step"),
}


def finetune(base: Path, out: Path) -> None:
    """Write `out`: `base` trained on the source of Python's standard library, which is available on every machine."""
    import torch  # slow to import, and not needed for PAIRS
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False).train()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(sources)
    text = "\n".join(source.read_text(encoding="utf-8", errors="ignore")[:4000] for source in sources[:150])
    ids = torch.tensor(tokenizer(text)["input_ids"])
    torch.manual_seed(0)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {STEPS}, loss {loss.item():.3f}", file=sys.stderr)
    model.save_pretrained(out)


def rewrite(source: Path, out: Path, dtype: str, bits: Callable[[str], BitArray]) -> None:
    """Write a checkpoint with the tensors and shapes of another.

    Args:
        source: The other checkpoint.
        out: The folder to write.
        dtype: The dtype of all tensors, such as "BF16".
        bits: Tensor name -> the bits of its elements.
    """
    model = ModelFolder(source)
    size = DTYPES[dtype].itemsize
    layout = {
        name: (dtype, info.shape, size * (info.stop - info.start) // info.dtype.itemsize)
        for name, info in model.tensors.items()
    }
    with atomic_directory(out) as folder:
        with open(folder / SINGLE, "wb") as file:
            file.write(encode_header(layout, {"format": "pt"}))
            file.writelines(bits(name).tobytes() for name in layout)
        for side_file in model.side_files:
            (folder / side_file.name).write_bytes(side_file.read_bytes())


def main(folder: Path) -> None:
    """Create the missing checkpoints."""
    made = {name: folder / name for name in ("base32", "base16", "tuned32", *(tuned for _, tuned in PAIRS.values()))}

    def missing(name: str) -> bool:
        if not made[name].exists():
            print(f"making {name}", file=sys.stderr)
        return not made[name].exists()

    if missing("base32"):
        write_base(made["base32"])
    base = ModelFolder(made["base32"])

    def values(checkpoint: Checkpoint, name: str) -> np.ndarray:
        return checkpoint.bits(name).view(np.float32)

    def to_bf16(numbers: np.ndarray) -> BitArray:
        return numbers.astype(bfloat16).view(np.uint16)

    if missing("base16"):
        rewrite(made["base32"], made["base16"], "BF16", lambda name: to_bf16(values(base, name)))
    if missing("tuned32"):
        finetune(made["base32"], made["tuned32"])
    tuned, base16 = ModelFolder(made["tuned32"]), ModelFolder(made["base16"])
    eligible = [name for name in base.tensors if ("mlp" in name or "attn" in name) and name.endswith("weight")]

    def change(name: str) -> np.ndarray:
        delta: np.ndarray = values(tuned, name) - values(base, name)
        return delta

    def changes() -> Iterator[tuple[str, np.ndarray]]:
        return ((name, change(name)) for name in eligible)

    for percent, sparsity in (("90", 0.9), ("99", 0.99)):
        if missing(f"f32-{percent}"):
            largest = top_k(changes, entries_for(sparsity, sum(base.tensors[name].form.size for name in eligible)))

            def kept(name: str, largest: TopK = largest) -> BitArray:
                bits = base.bits(name).copy()
                if name in eligible:
                    chosen = largest.indices(name, change(name))
                    bits[chosen] = tuned.bits(name)[chosen]
                return bits

            rewrite(made["base32"], made[f"f32-{percent}"], "F32", kept)
        sparse = ModelFolder(made[f"f32-{percent}"])

        def masked(name: str, sparse: Checkpoint = sparse) -> BitArray:
            changed = sparse.bits(name) != base.bits(name)
            return np.where(changed, to_bf16(values(sparse, name)), base16.bits(name))

        if missing(f"bf16-{percent}"):
            rewrite(made["base32"], made[f"bf16-{percent}"], "BF16", masked)

    rng = np.random.default_rng(1)

    def stepped(name: str) -> BitArray:
        # an f32 master weight is within half a unit of its bf16 value, so a small step changes few bf16 values
        start = base16.bits(name).view(bfloat16).astype(np.float32)
        unit = np.ldexp(np.float32(1), np.frexp(start)[1] - 8)
        master = start + (rng.random(start.size, np.float32) - np.float32(0.5)) * unit * np.float32(0.999)
        return to_bf16(master + np.float32(0.02) * change(name))

    if missing("bf16-step"):
        rewrite(made["base32"], made["bf16-step"], "BF16", stepped)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
