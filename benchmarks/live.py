"""Vectors on a running model: exactness, time of a swap beside peft, a search beside mergekit, and a server under load.

Usage: python benchmarks/live.py DEMO FOLDER [PART ...]. DEMO is the folder of `make demo`. FOLDER keeps what is made.
Parts: exact, swap, search, server; all of them by default. `mergekit-yaml` is needed for its part of the search, and
is left out if it is not installed.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from peft import LoraConfig, get_peft_model
from processes import measure
from support.live import loaded, random_steps, task  # type: ignore[import-not-found,unused-ignore]
from support.models import make_llama  # type: ignore[import-not-found,unused-ignore]
from transformers import AutoModelForCausalLM, AutoTokenizer

import taskvec
from taskvec import TaskVector, attach
from taskvec_formats import ModelFolder

TASKS = ("sql", "maths")
RUNS = 15
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SERVER = Path(__file__).parents[1] / "docs" / "examples" / "server.py"


def exact(demo: Path, folder: Path) -> None:
    """1,000 random steps over five vectors, each compared with a fresh application."""
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as name:
            base = make_llama(Path(name) / "base", dtype=dtype)
            slices = [slice(0, None, 3), slice(1, None, 3), slice(2, None, 3), slice(None), slice(None)]
            files = [task(base, Path(name) / f"{n}.lota", slices[n], seed=n) for n in range(5)]
            refused, _ = random_steps(loaded(base), ModelFolder(base), files, 1000)
        print(f"{dtype}: 1,000 random steps over five vectors equal fresh applications to the bit; {refused} refused")


def timed(call: Callable[[], object]) -> float:
    """Return the time of one call in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def swap(demo: Path, folder: Path) -> None:
    """Swaps between two decoded vectors: in a row, and in turns with merging and unmerging a LoRA of their size."""
    print(
        "\n| sparsity | entries | weights of the LoRA | swaps in a row | in turns: swap | merge + unmerge (peft) "
        "| ratio | bytes per entry |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for sparsity, rank in ((0.99, 4), (0.9, 35)):
        files = [folder / f"{name}-{sparsity}.lota" for name in TASKS]
        for name, file in zip(TASKS, files, strict=True):
            if not file.exists():
                vector = TaskVector.open(demo / f"{name}.lota")
                (vector.shrink(sparsity) if sparsity > 0.9 else vector).save(file)
        print(f"| {sparsity:.0%} | {compared(demo / 'base', files, rank)} |")


def compared(base: Path, files: list[Path], rank: int) -> str:
    """Time one pair of vectors and one LoRA, and return the cells of the table."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    config = LoraConfig(r=rank, target_modules=LINEAR, init_lora_weights=False)
    adapted: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False), config
    )
    vectors = [TaskVector.open(file) for file in files]
    handle = attach(model, vectors[0])
    handle.swap(vectors[1])
    size = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    row = 1000 * statistics.median(timed(partial(handle.swap, vectors[run % 2])) for run in range(RUNS + 1))
    ours, theirs = [], []
    for run in range(RUNS):
        ours.append(timed(partial(handle.swap, vectors[run % 2])))
        theirs.append(timed(adapted.merge_adapter) + timed(adapted.unmerge_adapter))
    fast, slow = 1000 * statistics.median(ours), 1000 * statistics.median(theirs)
    kept = f"{handle.bytes_kept / handle.entries:.1f}"
    times = f"{row:.1f} ms | {fast:.1f} ms | {slow:.1f} ms | {fast / slow:.2f}"
    return f"{handle.entries:,} | {size:,} | {times} | {kept}"


def search(demo: Path, folder: Path) -> None:
    """A search of 50 merges of the demo's vectors, and three of them through mergekit."""
    files = [demo / f"{name}.lota" for name in TASKS]
    data = {name: demo / "data" / f"{name}-test.jsonl" for name in TASKS}
    report, recipe = folder / "search.json", folder / "best.yaml"
    if not report.exists():
        command = [taskvec_command(), "search", *files, "--base", demo / "base"]
        command += [f"--data={name}={path}" for name, path in data.items()]
        command += ["--trials", 50, "--recipe", recipe, "--plot", folder / "trials.png", "--force", "--json"]
        output, took, peak = measured(command)
        found = {**json.loads(output), "took": took, "peak": peak}
        named = [f"--data={name}={path}" for name, path in data.items()]
        _, _, found["peak_of_eval"] = measured([taskvec_command(), "eval", demo / "base", *named, "--json"])
        merged = [*map(TaskVector.open, files), taskvec.merge(files, "ties")]
        found["vectors"] = 12 * sum(len(vector[name]) for vector in merged for name in vector) / 1e9
        report.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(report.read_text(encoding="utf-8"))
    seconds = [trial["seconds"] for trial in found["trials"]]
    pruned = sum(trial["values"] is None for trial in found["trials"])
    best = found["best"][0]
    print(f"\nsearch: {len(seconds)} merges in {found['took']:.0f} s, {pruned} pruned")
    needed = found["peak_of_eval"] + found["vectors"]
    print(
        f"peak memory {found['peak']:.2f} GB: {found['peak'] / needed - 1:.0%} more than evaluating the base, "
        f"{found['peak_of_eval']:.2f} GB, and the vectors and their merge in memory, {found['vectors']:.2f} GB"
    )
    print(f"merge and swap: median {statistics.median(seconds):.2f} s, largest {max(seconds):.2f} s")
    print(f"best: {best['merge']}")
    gain = best["gain"]
    word = "better" if best["is_better"] else "no better"
    print(f"held out: gain {gain['value']:.4f} ± {gain['standard_error']:.4f} over plain TIES: {word}")
    mergekit(demo, folder, files)


def measured(command: Sequence[object]) -> tuple[str, float, float]:
    """Return the output of a command, its time in seconds and its peak memory in GB."""
    with tempfile.NamedTemporaryFile() as output:
        took, peak = measure(["sh", "-c", 'out=$0; exec "$@" > "$out"', output.name, *map(str, command)])
        return Path(output.name).read_text(encoding="utf-8"), took, peak / 1000


def mergekit(demo: Path, folder: Path, files: list[Path]) -> None:
    """Merge three candidates to disk with mergekit, load and evaluate them."""
    program = shutil.which("mergekit-yaml") or shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent))
    if program is None:
        print("mergekit is not installed: its part is left out")
        return
    models = []
    for name, file in zip(TASKS, files, strict=True):
        models.append(folder / name)
        if not models[-1].exists():
            taskvec.apply(file, demo / "base", models[-1])
    times = []
    for weight in (0.5, 0.75, 1.0):
        document = {
            "merge_method": "ties",
            "base_model": str(demo / "base"),
            "dtype": "float32",
            "parameters": {"normalize": True},
            "models": [{"model": str(each), "parameters": {"weight": weight, "density": 0.1}} for each in models],
        }
        (folder / "mergekit.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        out = folder / "mergekit-out"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        subprocess.run([program, str(folder / "mergekit.yaml"), str(out)], capture_output=True, check=True)
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=False)
        times.append(time.perf_counter() - start)
    print(f"mergekit: merge to disk and load, median of three {statistics.median(times):.1f} s")


def server(demo: Path, folder: Path) -> None:
    """200 requests for three tasks, 8 in flight, compared with the answers of written models."""
    merged = folder / "both.lota"
    if not merged.exists():
        taskvec.merge([demo / f"{name}.lota" for name in TASKS]).save(merged)
    tasks = {**{name: demo / f"{name}.lota" for name in TASKS}, "both": merged}
    rows = [
        json.loads(line)
        for name in TASKS
        for line in (demo / "data" / f"{name}-test.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    ]
    prompts = [row["prompt"] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(demo / "base", trust_remote_code=False)
    expected = {}
    for name, file in tasks.items():
        out = folder / f"written-{name}"
        if not out.exists():
            taskvec.apply(file, demo / "base", out)
        model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=False)
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            mask = torch.ones_like(ids)
            with torch.inference_mode():
                output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
            expected[name, prompt] = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    port = 8000 + random.Random(0).randrange(1000)
    command = [sys.executable, SERVER, demo / "base", *(f"{name}={file}" for name, file in tasks.items())]
    address = f"http://127.0.0.1:{port}"
    order = [(list(tasks)[n % 3], prompts[n % len(prompts)]) for n in range(200)]
    with subprocess.Popen(list(map(str, [*command, "--port", port]))) as process, httpx.Client(timeout=600) as client:
        try:
            while True:
                try:
                    client.get(f"{address}/tasks")
                    break
                except httpx.ConnectError:
                    time.sleep(0.2)

            def ask(request: tuple[str, str]) -> bool:
                name, prompt = request
                body = {"task": name, "prompt": prompt, "max_new_tokens": 16}
                answer = client.post(f"{address}/generate", json=body).json()
                return bool(answer["answer"] == expected[name, prompt])

            start = time.perf_counter()
            with ThreadPoolExecutor(8) as threads:
                right = list(threads.map(ask, order))
            took = time.perf_counter() - start
            swaps = sorted(client.get(f"{address}/tasks").json()["swaps"])
        finally:
            process.terminate()
    p95 = swaps[min(len(swaps) - 1, int(0.95 * len(swaps)))]
    print(f"\nserver: {sum(right)} of {len(right)} answers equal those of the written models, in {took:.0f} s")
    print(f"{len(swaps)} swaps: median {1000 * statistics.median(swaps):.0f} ms, 95th percentile {1000 * p95:.0f} ms")


def taskvec_command() -> str:
    """Return the path of the command."""
    return str(Path(sys.executable).with_name("taskvec"))


def main() -> None:
    """Run the parts that were asked for."""
    demo, folder, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    folder.mkdir(parents=True, exist_ok=True)
    for part in (exact, swap, search, server):
        if not names or part.__name__ in names:
            part(demo, folder)


if __name__ == "__main__":
    main()
