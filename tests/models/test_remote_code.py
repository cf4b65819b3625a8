"""A model folder may hold Python code of its own. It runs only where that was asked for, and nobody is prompted."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import inside, ok, refused
from support.paths import ROOT

from taskvec.errors import TrainingError, UsageError
from taskvec.models.loading import load_model

pytestmark = pytest.mark.slow

MARK = "import pathlib\npathlib.Path({marker!r}).touch()\n"
CODE = {
    "configuration_own.py": """from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
    "tokenization_own.py": """from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
""",
    "custom_generate/generate.py": """def generate(model, *args, **kwargs):
    return model.generate(*args, **kwargs)
""",
}
MODEL = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def own(llama: Path, tmp_path: Path) -> Path:
    """A copy of a model with code beside it that touches `marker` when it runs; nothing asks for it yet."""
    folder = shutil.copytree(llama, tmp_path / "own")
    for name, code in CODE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(MARK.format(marker=str(tmp_path / "marker")) + code)
    return folder


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **values}))


def ask_for_model(folder: Path) -> None:
    change(folder / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=MODEL)


def ask_for_tokenizer(folder: Path) -> None:
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    )


def ask_elsewhere(folder: Path) -> None:
    change(
        folder / "config.json", model_type="own", auto_map={"AutoConfig": "them/theirs--configuration_own.OwnConfig"}
    )


ASKING = {
    "model": (ask_for_model, "configuration_own.py of the folder (auto_map in config.json)"),
    "tokenizer": (ask_for_tokenizer, "tokenization_own.py of the folder (auto_map in tokenizer_config.json)"),
    "elsewhere": (ask_elsewhere, "configuration_own.py of them/theirs (auto_map in config.json)"),
}


@pytest.mark.parametrize("what", ASKING)
@pytest.mark.parametrize("command", ["eval", "train"])
def test_code_is_not_run_and_nobody_is_asked(
    command: str, what: str, own: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, said = ASKING[what]
    ask(own)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    arguments = (["eval", own, "--data", data], ["train", own, data, "-o", tmp_path / "x.lota"])[command == "train"]
    assert refused(2, *arguments) == (
        f"taskvec: {own} needs Python code from the model, {said}: it is run only with trust_remote_code "
        "(--trust-remote-code), and can then do whatever you can\n"
    )
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "x.lota").exists()
    assert sys.stdin.read() == "y\n" * 9


def run(arguments: list[object], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, with yes to every question, and a cache of code of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from taskvec_cli.main import main; main()", *map(str, arguments)],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )


def test_as_a_user_runs_it(own: Path, data: Path, tmp_path: Path) -> None:
    ask_for_model(own)
    ask_for_tokenizer(own)
    done = run(["eval", own, "--data", data], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--trust-remote-code" in done.stderr
    assert not (tmp_path / "marker").exists()
    done = run(["eval", own, "--data", data, "--trust-remote-code"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "marker").exists()


def test_training_runs_it_where_it_is_asked_to(own: Path, data: Path, tmp_path: Path) -> None:
    ask_for_model(own)
    command = ["train", own, data, "-o", tmp_path / "x.lota", "--steps", 1, "--calibration-steps", 1]
    done = run([*command, "--trust-remote-code"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "marker").exists()


def test_a_model_that_transformers_knows_is_loaded_without_its_code(own: Path, data: Path, tmp_path: Path) -> None:
    change(own / "config.json", auto_map=MODEL)
    ok("eval", own, "--data", data, "--metric", "exact_match")
    assert not (tmp_path / "marker").exists()


def test_code_that_fails_is_said_in_a_sentence(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ask_for_model(own)
    (own / "configuration_own.py").write_text("raise RuntimeError('not\\nhere')\n")
    with pytest.raises(TrainingError, match=r"own cannot be loaded as a language model: not$"):
        load_model(own, trust_remote_code=True)
    shutil.rmtree(own / "custom_generate")
    (own / "configuration_own.py").unlink()
    with pytest.raises(TrainingError, match=r"own cannot be loaded as a language model: .*configuration_own"):
        load_model(own, trust_remote_code=True)


@pytest.mark.parametrize(
    "auto_map", [3, "x", [], {}, {"AutoConfig": 3}, {"AutoConfig": [None]}, {"AutoConfig": "a\x1bb"}]
)
def test_an_auto_map_that_is_none_ends_in_a_sentence(auto_map: object, own: Path, tmp_path: Path) -> None:
    change(own / "config.json", model_type="own", auto_map=auto_map)
    with pytest.raises((TrainingError, UsageError), match=r"^\S+/own (cannot be loaded|needs Python code)[ -~]*$"):
        load_model(own)
    assert not (tmp_path / "marker").exists()


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "{% set x = messages.append(1) %}",
    "{{ raise_exception('no\nhow') }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_chat_templates_are_sandboxed(template: str, own: Path, data: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for file in own.glob("*.jinja"):
        file.unlink()
    change(own / "tokenizer_config.json", chat_template=template.replace("MARKER", str(marker)))
    done = inside("eval", own, "--data", data)
    assert done.returncode == 1
    assert "the chat template refuses these messages" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not marker.exists()


def test_every_model_is_loaded_with_a_word_on_code() -> None:
    """In the library, the demo and the benchmarks; only loading.py passes on what it was asked for."""
    calls = []
    for path in (*ROOT.glob("taskvec/**/*.py"), *ROOT.glob("cli/**/*.py"), *ROOT.glob("benchmarks/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            loads = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config")
            # adapters of peft have no code
            if loads and ast.unparse(node.func) != "PeftModel.from_pretrained":
                word = {each.arg: ast.unparse(each.value) for each in node.keywords}.get("trust_remote_code")
                assert word == "False" or (word == "trust_remote_code" and path.name == "loading.py"), ast.unparse(node)
                calls.append(path.name)
    assert len(calls) >= 9
