"""Time and peak memory of merging sparse vectors, compared with mergekit, and how they grow with the vectors.

Usage: python benchmarks/merging.py BASE FOLDER [RUNS]. BASE is a model folder. FOLDER keeps the vectors, 90 % sparse
with random masks (the positions of entries do not affect the cost), and the checkpoints that mergekit reads. Recipes
are merged from dense checkpoints in bf16. Figures are medians over RUNS runs of whole processes, in turns.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from processes import measure
from safetensors.torch import load_file, save_file

from taskvec import TaskVector, apply, open_checkpoint
from taskvec.training.masking import random_mask
from taskvec.vectors.vector import vector_of
from taskvec_formats import Checkpoint, Form, SparseTensor

MOST = 16
RECIPE = """\
merge_method: {method}
base_model: {base}
dtype: float32
parameters:
  normalize: {normalize}
models:
- model: {folder}/0
  parameters: {{weight: 1.0{density}}}
- model: {folder}/1
  parameters: {{weight: 0.5{density}}}
"""
# name -> recipe of dense checkpoints, by both programs
DENSE = {
    "linear": "merge_method: linear\nparameters: {{weight: 0.5}}\nmodels: [{{model: {one}}}, {{model: {two}}}]\n",
    "slerp": "merge_method: slerp\nbase_model: {one}\nmodels: [{{model: {one}}}, {{model: {two}}}]\n"
    "parameters: {{t: 0.3}}\n",
    "ties": "merge_method: ties\nbase_model: {base}\nparameters: {{density: 0.4, weight: 0.5}}\n"
    "models: [{{model: {one}}}, {{model: {two}}}]\n",
}


def eligible(base: Checkpoint) -> dict[str, Form]:
    """The matrices of the transformer blocks."""
    return {name: info.form for name, info in base.tensors.items() if len(info.shape) == 2 and ".layers." in name}


def write_vector(base: Checkpoint, file: Path, seed: int, density: float) -> None:
    """Write a vector with a random mask and deltas of the size of a fine-tune's, unless the file exists."""
    if file.exists():
        return
    forms = eligible(base)
    entries = round(density * sum(form.size for form in forms.values()))
    rng, deltas = np.random.default_rng(seed), {}
    for name, indices in random_mask(entries, forms, {}, seed).items():
        before = base.bits(name)[indices].view(np.float32)
        after = before + rng.normal(scale=1e-4, size=len(indices)).astype(np.float32)
        deltas[name] = SparseTensor(forms[name].shape, indices, after - before)
    vector_of(base, forms, deltas, {}).save(file)


def prepare(base: Checkpoint, folder: Path) -> None:
    """Write all vectors, checkpoints and recipes that do not exist yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(MOST):
        write_vector(base, folder / f"{number}.lota", number, 0.1)
    for percent in (1, 2, 5, 20):
        for number in (0, 1):
            write_vector(base, folder / f"{percent}-{number}.lota", number, percent / 100)
    for number in (0, 1):
        if not (folder / str(number)).exists():
            apply(TaskVector.open(folder / f"{number}.lota"), base, folder / str(number))
    for number, name in enumerate(("dense-base", "dense-0", "dense-1")):
        write_dense(base, folder / name, number)
    paths = {"base": folder / "dense-base", "one": folder / "dense-0", "two": folder / "dense-1"}
    for name, text in DENSE.items():
        (folder / f"dense-{name}.yml").write_text(text.format(**paths), encoding="utf-8")
    for method, normalize, density in (("ties", "true", ", density: 1.0"), ("task_arithmetic", "false", "")):
        text = RECIPE.format(method=method, base=base.path, normalize=normalize, folder=folder, density=density)
        (folder / f"{method}.yml").write_text(text, encoding="utf-8")


def write_dense(base: Checkpoint, folder: Path, seed: int) -> None:
    """Write a model in bf16, with every weight changed unless the seed is 0."""
    if folder.exists():
        return
    folder.mkdir()
    dice = torch.Generator().manual_seed(seed)
    for shard in base.shards:
        state = load_file(base.path / shard.path.name)
        moved = {n: w + torch.randn(w.shape, generator=dice) * 2e-3 * (seed > 0) for n, w in state.items()}
        save_file({n: w.bfloat16() for n, w in moved.items()}, folder / shard.path.name, {"format": "pt"})
    for file in base.side_files:
        shutil.copyfile(file, folder / file.name)


def timed(commands: dict[str, list[str]], runs: int, work: Path) -> dict[str, tuple[float, float]]:
    """Run commands in turns.

    Args:
        commands: Name -> command.
        runs: The number of runs of each.
        work: The folder that the commands write to. It is emptied before each run.

    Returns:
        Name -> (median seconds, median peak MB).
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            found[name].append(measure(command))
    return {
        name: (statistics.median(wall for wall, _ in row), statistics.median(peak for _, peak in row))
        for name, row in found.items()
    }


def main(base: Path, folder: Path, runs: int) -> None:
    """Run all merges and print the tables."""
    prepare(open_checkpoint(base), folder)
    programs = Path(sys.executable).parent
    taskvec, mergekit = str(programs / "taskvec"), programs / "mergekit-yaml"
    work = Path(tempfile.mkdtemp(prefix="work-", dir=folder))
    two = [str(folder / "0.lota"), str(folder / "1.lota")]
    to_file, to_folder = ["-o", str(work / "m.lota")], ["--base", str(base), "-o", str(work / "m")]
    commands = {}
    for name, method in (("ties", "ties"), ("task arithmetic", "linear")):
        call = [taskvec, "merge", *two, "--method", method, "--weights", "1,0.5"]
        commands[f"{name}, to .lota"] = [*call, *to_file]
        commands[f"{name}, to .lota, --codec fast"] = [*call, *to_file, "--codec", "fast"]
        commands[f"{name}, to a model folder"] = [*call, *to_folder]
    commands["ties, to .lota, --codec fast, in threads"] = [
        "env",
        "TASKVEC_PROCESSES=0",
        *commands["ties, to .lota, --codec fast"],
    ]
    commands["ties, density 0.05, to .lota"] = [*commands["ties, to .lota"], "--density", "0.05"]
    if mergekit.exists():
        for name in ("ties", "task_arithmetic"):
            out = str(work / "peer")
            commands[f"mergekit {name}"] = [
                str(mergekit),
                str(folder / f"{name}.yml"),
                out,
                "--copy-tokenizer",
                "--quiet",
            ]
    for name in DENSE:
        recipe = str(folder / f"dense-{name}.yml")
        commands[f"recipe of dense models, {name}"] = [taskvec, "merge", "--recipe", recipe, "-o", str(work / "m")]
        if mergekit.exists():
            peer = [str(mergekit), recipe, str(work / "peer"), "--copy-tokenizer", "--quiet"]
            commands[f"mergekit, the same {name}"] = peer
    try:
        print(f"{runs} runs, medians\n\n| merge | seconds | peak MB |\n|---|---|---|")
        for name, (seconds, peak) in timed(commands, runs, work).items():
            print(f"| {name} | {seconds:.2f} | {peak:.0f} |", flush=True)
        print("\n| vectors | density of each | entries | seconds | peak MB | µs per entry |\n" + "|---" * 6 + "|")
        for density, files in growth(folder):
            entries = sum(spec.entries for file in files for spec in TaskVector.open(file).specs.values())
            command = [taskvec, "merge", *map(str, files), "--method", "ties", *to_file, "--codec", "fast"]
            ((seconds, peak),) = timed({"": command}, runs, work).values()
            each = 1e6 * seconds / entries
            print(
                f"| {len(files)} | {density:.0%} | {entries:,} | {seconds:.2f} | {peak:.0f} | {each:.3f} |", flush=True
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)


def growth(folder: Path) -> list[tuple[float, list[Path]]]:
    """The merges of the second table: two vectors of increasing density, then increasing numbers of vectors."""
    pairs = [(percent / 100, [folder / f"{percent}-{number}.lota" for number in (0, 1)]) for percent in (1, 2, 5, 20)]
    more = [(0.1, [folder / f"{number}.lota" for number in range(count)]) for count in (2, 4, 8, MOST)]
    return pairs + more


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    # mergekit mistakes a relative path of two parts for a Hub id
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), int(sys.argv[3]) if len(sys.argv) == 4 else 3)
