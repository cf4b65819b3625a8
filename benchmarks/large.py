"""Time and memory of the commands on models of the size that users have, beside reading and copying their files.

Usage: python benchmarks/large.py SHAPE FOLDER. SHAPE is `mistral-7b`, or `llama-70b` (two of its layers). FOLDER needs
room for four such models in bf16 (60 GB for mistral-7b), and is emptied at the end. mergekit is run if it is installed.

The models have random weights. The first tuned model differs from the base in 1 % of the weights of its matrices, the
second one in 10 %. Each figure is of a whole process, run once. The files are not in the page cache when it starts.
The figures are also written to `results/large.json`, from which `on_paper.py` estimates larger models.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
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


RESULTS = Path(__file__).with_name("results") / "large.json"
_rows: dict[str, list[float]] = {}  # command -> seconds and MB


def run(folder: Path, what: str, *command: object, drop: Path | None = None) -> float:
    """Measure a command and print a row.

    Args:
        folder: The folder whose files are dropped from the page cache before.
        what: The name of the row.
        *command: The words of the command.
        drop: The output to remove afterwards.

    Returns:
        Wall time in seconds.
    """
    evict(folder)
    seconds, peak = measure(list(map(str, command)))
    print(f"| {what} | {seconds:.0f} s | {peak:.0f} MB |", flush=True)
    _rows[what] = [round(seconds, 1), round(peak)]
    if drop is not None:
        shutil.rmtree(drop) if drop.is_dir() else drop.unlink()
    return seconds


def with_models(folder: Path, program: Path) -> None:
    """Run the commands that read the tuned models, and leave the vectors `1.lota` and `10.lota`."""
    base, tuned, other, some, out = (folder / name for name in ("base", "tuned-1", "tuned-10", "some.lota", "out"))
    pair = [*base.glob("*.safetensors"), *other.glob("*.safetensors")]
    run(folder, "read and hash a pair (blake3)", sys.executable, "-c", READ, *pair)
    run(folder, "pack, 1 %", program, "pack", base, tuned, "-o", folder / "1.lota")
    run(folder, "pack, 10 %", program, "pack", base, other, "-o", folder / "10.lota")
    run(folder, "pack --sparsity 0.95", program, "pack", base, other, "--sparsity", 0.95, "-o", some, drop=some)
    run(folder, "pack --kind patch", program, "pack", base, other, "--kind", "patch", "-o", some, drop=some)
    peer = program.with_name("mergekit-yaml")
    if peer.exists():
        recipe = folder / "ties.yml"
        models = [{"model": str(path), "parameters": {"weight": 1, "density": 1}} for path in (tuned, other)]
        request = {"merge_method": "ties", "base_model": str(base), "models": models, "dtype": "bfloat16"}
        recipe.write_text(json.dumps(request), encoding="utf-8")
        run(folder, "mergekit, ties of both tuned models", peer, recipe, out, "--quiet", drop=out)


def with_vectors(folder: Path, program: Path) -> None:
    """Run the commands that read the vectors."""
    base, one, two, merged, out = (folder / name for name in ("base", "1.lota", "10.lota", "merged.lota", "out"))
    run(folder, "cp -r", "cp", "-r", base, out, drop=out)
    run(folder, "unpack, 1 %", program, "unpack", one, "--base", base, "-o", out, drop=out)
    run(folder, "unpack, 10 %", program, "unpack", two, "--base", base, "-o", out, drop=out)
    run(folder, "verify, 10 %", program, "verify", two)
    run(folder, "inspect both", program, "inspect", one, two)
    ties = [program, "merge", one, two, "--method", "ties"]
    run(folder, "merge by ties to .lota", *ties, "-o", merged, drop=merged)
    run(folder, "merge by ties, density 0.05", *ties, "--density", 0.05, "-o", merged, drop=merged)
    run(folder, "arith a + 0.5*b", program, "arith", f"{one} + 0.5*{two}", "-o", merged, drop=merged)
    to_folder, again = [*ties, "--base", base, "-o"], folder / "again"
    seconds = run(folder, "merge by ties to a folder", *to_folder, out)
    evict(folder)
    killed = subprocess.Popen(list(map(str, [*to_folder, again])), stderr=subprocess.DEVNULL)
    time.sleep(seconds / 2)
    assert killed.poll() is None
    killed.kill()
    killed.wait()
    run(folder, "the rest of that merge, killed half-way, with --resume", *to_folder, again, "--resume")
    shards = [path.name for path in out.glob("*.safetensors")]
    assert filecmp.cmpfiles(out, again, shards, shallow=False)[0] == shards


def main() -> None:
    """Make the models, run the commands, and print a table."""
    shape, folder = SHAPES[sys.argv[1]], Path(sys.argv[2]).resolve()  # mergekit takes some relative paths for Hub ids
    for name, density, seed in (("base", 0.0, 0), ("tuned-1", 0.01, 1), ("tuned-10", 0.1, 2)):
        if not (folder / name).exists():
            write_model(folder / name, shape, density, seed)
    weights = sum(int(np.prod(form)) for _, form in shape.tensors())
    print(f"{sys.argv[1]}: {weights / 1e9:.2f} billion weights, {2 * weights / 1e9:.1f} GB a model\n")
    print("| command | time | peak memory |")
    print("|---|---|---|")
    program = Path(sys.executable).with_name("taskvec")
    with_models(folder, program)
    for name in ("tuned-1", "tuned-10"):
        shutil.rmtree(folder / name)
    sizes = [(folder / name).stat().st_size for name in ("1.lota", "10.lota")]
    with_vectors(folder, program)
    print(f"\nvectors: {sizes[0] / 1e6:.0f} MB (1 %) and {sizes[1] / 1e6:.0f} MB (10 %)")
    shutil.rmtree(folder)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[sys.argv[1]] = {"weights": weights, "vectors": sizes, "commands": _rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
