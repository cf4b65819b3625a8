"""What works without the extras: everything but training, evaluation, running models, adapters and pictures."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from support.models import perturb
from support.paths import ROOT

from taskvec.errors import UsageError
from taskvec.packages import EXTRAS, require

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# runs in a process of its own: the packages of the first argument cannot be imported; the second has the commands
PROGRAM = """
import contextlib, io, json, sys
blocked, commands = json.loads(sys.argv[1]), json.loads(sys.argv[2])
sys.modules.update(dict.fromkeys(blocked))
from taskvec_cli.main import main
done = []
for command in commands:
    sys.argv, out, err, code = ["taskvec", *command], io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


def names_of(requirements: list[str]) -> set[str]:
    """Return the distributions that requirements install, with all that those need."""
    found, open_ = set[str](), [Requirement(text) for text in requirements]
    while open_:
        one = open_.pop()
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        if name in found:
            continue
        found.add(name)
        for text in distribution(name).requires or ():
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": e}) for e in ("", *one.extras)):
                open_.append(further)
    return found


@pytest.fixture(scope="module")
def absent() -> list[str]:
    """The importable names of all packages here that an install without extras does not have."""
    present = names_of(PROJECT["dependencies"])
    tops = packages_distributions()
    names = {
        top
        for top, owners in tops.items()
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & {*present, "taskvec", "pip", "setuptools"}
    }
    assert {"torch", "transformers", "accelerate", "matplotlib", "tokenizers"} <= names
    assert not {"numpy", "safetensors", "pcodec", "taskvec", "huggingface_hub", "yaml"} & names
    return sorted(names)


@pytest.fixture(scope="module")
def models(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two fine-tunes, recipes of mergekit, an adapter and data."""
    folder = tmp_path_factory.mktemp("light")
    shutil.copytree(llama, folder / "base")
    perturb(llama, folder / "one", dtype="float32")
    perturb(llama, folder / "two", dtype="float32", seed=2, shard_size="30KB")
    both = [{"model": name, "parameters": {"weight": 0.5, "density": 0.4}} for name in ("one", "two.lota")]
    recipes = {
        "linear": {"models": [{"model": name, "parameters": {"weight": 0.3}} for name in ("one", "two")]},
        "ties": {"base_model": "base", "models": both},
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"merge_method": name, "dtype": "bfloat16", **recipe}))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "data.jsonl").write_text('{"prompt": "one", "completion": "two"}\n')
    return folder


def run(folder: Path, what: list[Any], absent: list[str], program: str = PROGRAM) -> list[Any]:
    """Run commands without some packages; return their exit codes, outputs and errors."""
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(absent), json.dumps(what)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


METHODS = {
    "auto": "",
    "linear": "",
    "average": "",
    "disjoint": "--on-overlap sum",
    "ties": "--density 0.3 --elect frequency",
    "magnitude_prune": "--density 0.5",
    "dare_linear": "--density 0.5",
    "dare_ties": "--density 0.5",
    "breadcrumbs": "--density 0.5",
    "breadcrumbs_ties": "--density 0.5 --dialect mergekit",
}
EVERYDAY = [
    "pack base one -o one.lota --json",
    "pack base two -o two.lota",
    "pack base two -o patch.lota --kind patch",
    "pack base two -o few.lota --sparsity 0.9 --codec plain",
    "unpack one.lota --base base -o restored --json",
    *(
        f"merge one.lota two.lota --method {method} {options} {output}"
        for method, options in METHODS.items()
        for output in (f"-o {method}.lota --json", f"--base base -o {method}")
    ),
    "merge one few.lota --base base -o mixed --dtype bfloat16 --shard-size 30KB",
    "merge --recipe linear.yaml -o by-linear",
    "merge --recipe ties.yaml -o by-ties",
    "merge --recipe ties.yaml -o by-ties.lota",
    "arith 'one.lota - 0.5 * two.lota' -o sum.lota",
    "shrink one.lota -o small.lota --sparsity 0.99",
    "inspect one.lota few.lota",
    "inspect one.lota few.lota --json",
    "verify one.lota patch.lota few.lota --base base",
    "--version",
    "--help",
    "train --help",
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everyday_commands_write_the_same_bytes(models: Path, absent: list[str], tmp_path: Path) -> None:
    commands, found = [shlex.split(line) for line in EVERYDAY], []
    for kind, without in (("light", absent), ("whole", [])):
        folder = shutil.copytree(models, tmp_path / kind)
        done = run(folder, commands, without)
        for line, (code, _, err) in zip(EVERYDAY, done, strict=True):
            assert (code, err) == (0, ""), line
        found.append((done, contents(folder)))
    assert found[0] == found[1]
    assert {f"{method}.lota" for method in METHODS} <= found[0][1].keys()
    assert contents(tmp_path / "light/restored") == contents(models / "one")


TRAINING = "training needs the packages torch, transformers and accelerate: pip install 'taskvec[train]'"
ADAPTER = "an adapter of peft needs the packages torch, transformers, accelerate and peft: pip install 'taskvec[lora]'"
REFUSED = {
    "train base data.jsonl -o x.lota": TRAINING,
    "train no/base data.jsonl -o x.lota --dry-run": TRAINING,
    "train base data.jsonl -o x.lota --show-example": TRAINING,
    "train base data.jsonl -o x.lota --method lora": "LoRA needs the packages torch, transformers, accelerate and peft"
    ": pip install 'taskvec[lora]'",
    "eval no/base --data data.jsonl": "an evaluation needs the packages torch, transformers and accelerate: pip "
    "install 'taskvec[train]'",
    "eval base --data data.jsonl --metric rouge1": "the metric rouge1 needs the packages torch, transformers, "
    "accelerate and rouge-score: pip install 'taskvec[eval]'",
    "search a.lota b.lota --base no/base --data x=data.jsonl": "a search needs the packages torch, transformers, "
    "accelerate and optuna: pip install 'taskvec[search]'",
    "demo out": "the demo needs the packages torch, transformers, accelerate, gguf and matplotlib: pip install "
    "'taskvec[demo]'",
    "convert adapter --base no/base -o x.lota": ADAPTER,
    "pack no/base adapter -o x.lota": ADAPTER,
    "merge one adapter --base base -o x": ADAPTER,
    "convert a.lota --base no/base -o x --to shira": "a SHiRA adapter needs the packages torch, transformers and "
    "accelerate: pip install 'taskvec[train]'",
    "inspect a.lota --plot x.png": "a picture needs the package matplotlib: pip install 'taskvec[plot]'",
}


def test_a_command_that_needs_more_says_how_to_install_it(models: Path, absent: list[str], vector: Path) -> None:
    for name in ("a.lota", "b.lota"):
        (models / name).symlink_to(vector)
    before = sorted(models.iterdir())
    done = run(models, [line.split() for line in REFUSED], absent)
    for (line, expected), (code, out, err) in zip(REFUSED.items(), done, strict=True):
        assert (code, out, err) == (2, "", f"taskvec: {expected}\n"), line
    assert sorted(models.iterdir()) == before


# expression -> what needs packages
CALLS = {
    "taskvec.train('no/base', 'data.jsonl')": "training",
    "taskvec.evaluate('no/base', 'data.jsonl')": "an evaluation",
    "taskvec.evaluate_grid('no/base', {'x': 'data.jsonl'}, [])": "an evaluation",
    "taskvec.search_merge([], 'no/base', {})": "a search",
    "taskvec.attach(None, 'v.lota')": "`attach`",
    "taskvec.attached(None)": "`attached`",
    "taskvec.load('no/base')": "`load`",
    "taskvec.sparse_finetune(None, {}).__enter__()": "`sparse_finetune`",
    "taskvec.TaskSwitcher": "`taskvec.TaskSwitcher`",
    "taskvec.Evaluation": "`taskvec.Evaluation`",
    "taskvec.diff('base', {})": "a model in memory",
    "taskvec.pack({}, 'base', 'x.lota')": "a model in memory",
    "taskvec.pack('no/base', 'adapter', 'x.lota')": "an adapter of peft",
    "taskvec.merge(['v.lota', 'v.lota'], device='cuda')": "`device=cuda`",
    "taskvec.TaskVector.open('v.lota').to_torch('model.norm.weight')": "a torch tensor",
    "interop.from_peft('adapter', 'no/base')": "an adapter of peft",
    "interop.to_shira('v.lota', 'no/base', 'x')": "a SHiRA adapter",
}
ASK = """
import json, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
import taskvec
from taskvec import interop
said = []
for call in json.loads(sys.argv[2]):
    try:
        eval(call)
    except taskvec.errors.UsageError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_a_function_that_needs_more_says_how_to_install_it(models: Path, absent: list[str], vector: Path) -> None:
    (models / "v.lota").symlink_to(vector)
    said = run(models, list(CALLS), absent, ASK)
    for (call, what), message in zip(CALLS.items(), said, strict=True):
        expected = rf"{re.escape(what)} needs the packages? torch.*: pip install 'taskvec\[\w+\]'"
        assert re.fullmatch(expected, message), call
    # without torch there are no modules, so this is none
    assert run(models, ["taskvec.diff('base', 3)"], absent, ASK) == ["tuned must be a Checkpoint or a path, found 3"]


def test_the_extras_are_those_of_the_project() -> None:
    listed = {
        name: {Requirement(text).name for text in texts} for name, texts in PROJECT["optional-dependencies"].items()
    }
    for extra, packages in EXTRAS.items():
        whole = listed[extra] | (listed["train"] if "taskvec" in listed[extra] else set())
        assert whole - {"taskvec"} == {package.replace("_", "-") for package in packages}, extra
    (everything,) = (Requirement(text) for text in PROJECT["optional-dependencies"]["all"])
    assert everything.extras >= EXTRAS.keys()


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "optuna_of_mine").mkdir()
    with pytest.raises(UsageError, match=r"^it needs the package optuna-of-mine: pip install 'taskvec\[search\]'$"):
        require("it", "search", "optuna_of_mine")
    require("it", "search", "optuna")
