"""Write the golden patch of weightscope anew. It needs weightscope 0.4.3; read ../README.md first.

python tests/golden/weightscope/make.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from weightscope import apply_patch, export_patch

FOLDER = Path(__file__).parent
METADATA = {"format": "pt"}


def main() -> None:
    """Make a pair of checkpoints, the patch between them, and what weightscope restores from it."""
    dice = torch.Generator().manual_seed(0)
    base = {
        "bf16": torch.randn(6, 10, generator=dice).bfloat16(),
        "f16": torch.randn(40, generator=dice).half(),
        "f32": torch.randn(8, 9, generator=dice),
        "gone": torch.ones(3),
        "i64": torch.arange(5),
        "same": torch.randn(4, generator=dice),
        "scalar": torch.tensor(1.5),
    }
    tuned = {name: values.clone() for name, values in base.items() if name != "gone"}
    for name in ("bf16", "f16", "f32"):
        tuned[name].view(-1)[::7] += 0.25
    tuned["f32"][0, 1] += 1e-7  # below the threshold
    tuned["i64"][2] = 9
    tuned["new"] = torch.randn(2, 3, generator=dice)
    tuned["scalar"] += 1
    with tempfile.TemporaryDirectory() as folder:
        for name, tensors in (("base", base), ("tuned", tuned)):
            (Path(folder) / name).mkdir()
            save_file(tensors, Path(folder) / name / "model.safetensors", METADATA)
        patch = Path(folder) / "golden.wsp"
        export_patch(f"{folder}/base", f"{folder}/tuned", patch)
        apply_patch(patch, f"{folder}/base", Path(folder) / "restored.safetensors")
        restored = load_file(Path(folder) / "restored.safetensors")
        # the patch contains the names of the folders, which must not depend on where they are
        (FOLDER / "golden.wsp").write_bytes(_renamed(patch.read_bytes(), folder))
        save_file(base, FOLDER / "base.safetensors", METADATA)
        save_file(restored, FOLDER / "restored.safetensors", METADATA)


def _renamed(patch: bytes, folder: str) -> bytes:
    length = int.from_bytes(patch[4:8], "little")
    header = patch[8 : 8 + length].replace(f"{folder}/".encode(), b"")
    return patch[:4] + len(header).to_bytes(4, "little") + header + patch[8 + length :]


if __name__ == "__main__":
    main()
