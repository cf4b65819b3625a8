"""Time and memory of the commands on models of the size that users have, beside reading and copying their files.

Usage: python benchmarks/large.py SHAPE FOLDER. SHAPE is `mistral-7b`, or `llama-70b` (two of its layers). FOLDER needs
room for four such models in bf16 (60 GB for mistral-7b), and is emptied at the end.

The models have random weights. The first tuned model differs from the base in 1 % of the weights of its matrices, the
second one in 10 %. Each figure is of a whole process, run once. The files are not in the page cache when it starts.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from processes import measure

SHARD = 5_000_000_000  # bytes
POOL = 1 << 24
READ = "import sys, blake3; [blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(p) for p in sys.argv[1:]]"


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama or Mistral model."""

    hidden: int
    inner: int
    keys: int
    layers: int
    vocabulary: int = 32000

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of its tensors."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            start = f"model.layers.{layer}."
            for name, rows in (("q", self.hidden), ("k", self.keys), ("v", self.keys), ("o", self.hidden)):
                yield f"{start}self_attn.{name}_proj.weight", (rows, self.hidden)
            yield f"{start}mlp.gate_proj.weight", (self.inner, self.hidden)
            yield f"{start}mlp.up_proj.weight", (self.inner, self.hidden)
            yield f"{start}mlp.down_proj.weight", (self.hidden, self.inner)
            yield f"{start}input_layernorm.weight", (self.hidden,)
            yield f"{start}post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)


SHAPES = {"mistral-7b": Shape(4096, 14336, 1024, 32), "llama-70b": Shape(8192, 28672, 1024, 2)}


def write_model(folder: Path, shape: Shape, density: float, seed: int) -> None:
    """Write a model in shards of bf16.

    Args:
        folder: The folder to write.
        shape: Its sizes.
        density: The share of the weights of matrices that differ from the base. 0 writes the base.
        seed: The seed of these changes.
    """
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 128,
        "num_key_value_heads": shape.keys // 128,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, form in shape.tensors():
        size += 2 * int(np.prod(form))
        if size > SHARD and shards[-1]:
            shards.append([])
            size = 2 * int(np.prod(form))
        shards[-1].append((name, form))
    pool = (np.random.default_rng(0).normal(0, 0.02, POOL).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    changes = np.random.default_rng(seed)
    where: dict[str, str] = {}
    start = 0
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        header, offset = {}, 0
        for name, form in shard:
            stop = offset + 2 * int(np.prod(form))
            header[name] = {"dtype": "BF16", "shape": form, "data_offsets": [offset, stop]}
            offset, where[name] = stop, file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, form in shard:
                left = int(np.prod(form))
                while left:
                    part = np.roll(pool, -start)[:left]
                    start = (start + 7919 * 1013) % POOL
                    if density and len(form) == 2:
                        chosen = np.flatnonzero(changes.random(len(part), np.float32) < density)
                        part[chosen] += changes.integers(1, 16, len(chosen), np.uint16)
                    out.write(part.tobytes())
                    left -= len(part)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def evict(folder: Path) -> None:
    """Write the files of a folder to the disk, and drop them from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Make the models, run the commands, and print a table."""
    shape, folder = SHAPES[sys.argv[1]], Path(sys.argv[2])
    base, tuned, other = folder / "base", folder / "tuned-1", folder / "tuned-10"
    for path, density, seed in ((base, 0.0, 0), (tuned, 0.01, 1), (other, 0.1, 2)):
        if not path.exists():
            write_model(path, shape, density, seed)
    weights = sum(int(np.prod(form)) for _, form in shape.tensors())
    print(f"{sys.argv[1]}: {weights / 1e9:.2f} billion weights, {2 * weights / 1e9:.1f} GB a model\n")
    print("| command | time | peak memory |")
    print("|---|---|---|")

    def run(what: str, *command: object, drop: Path | None = None) -> None:
        evict(folder)
        seconds, peak = measure(list(map(str, command)))
        print(f"| {what} | {seconds:.0f} s | {peak:.0f} MB |", flush=True)
        if drop is not None:
            shutil.rmtree(drop) if drop.is_dir() else drop.unlink()

    program = Path(sys.executable).with_name("taskvec")
    one, two, merged, out = folder / "1.lota", folder / "10.lota", folder / "merged.lota", folder / "out"
    pair = [*base.glob("*.safetensors"), *other.glob("*.safetensors")]
    run("read and hash a pair (blake3)", sys.executable, "-c", READ, *pair)
    run("pack, 1 %", program, "pack", base, tuned, "-o", one)
    run("pack, 10 %", program, "pack", base, other, "-o", two)
    run("pack --sparsity 0.95", program, "pack", base, other, "--sparsity", 0.95, "-o", merged, drop=merged)
    run("pack --kind patch", program, "pack", base, other, "--kind", "patch", "-o", merged, drop=merged)
    sizes = [path.stat().st_size for path in (one, two)]
    shutil.rmtree(tuned)
    shutil.rmtree(other)
    run("cp -r", "cp", "-r", base, out, drop=out)
    run("unpack, 1 %", program, "unpack", one, "--base", base, "-o", out, drop=out)
    run("unpack, 10 %", program, "unpack", two, "--base", base, "-o", out, drop=out)
    run("verify, 10 %", program, "verify", two)
    run("inspect both", program, "inspect", one, two)
    ties = ["merge", one, two, "--method", "ties"]
    run("merge by ties to .lota", program, *ties, "-o", merged, drop=merged)
    run("merge by ties, density 0.05", program, *ties, "--density", 0.05, "-o", merged, drop=merged)
    run("merge by ties to a folder", program, *ties, "--base", base, "-o", out, drop=out)
    run("arith a + 0.5*b", program, "arith", f"{one} + 0.5*{two}", "-o", merged, drop=merged)
    print(f"\nvectors: {sizes[0] / 1e6:.0f} MB (1 %) and {sizes[1] / 1e6:.0f} MB (10 %)")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
