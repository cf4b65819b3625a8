"""The commands and programs in the documentation run as they are printed; its links lead somewhere."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.adapters import make_adapter
from support.building import package
from support.commands import inside
from support.hub import Hub, python, run_all
from support.models import ROWS, WORDS, perturb, write_rows
from support.paths import ROOT

import taskvec
from taskvec.merging import METHODS

pytestmark = pytest.mark.slow

PAGES = ("README.md", "docs/training.md", "docs/merging.md", "docs/live.md", "docs/conversions.md", "docs/format.md")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
VECTORS = ("sql", "maths")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands_of(block: str) -> list[list[str]]:
    """The words of each command of a shell block; installing and building are left out."""
    commands = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    commands = [words for words in commands if words and words[0] not in {"make", "pip"}]
    assert all(words[0] == "taskvec" for words in commands), commands
    return commands


@pytest.fixture(scope="module")
def prepared(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the pages describe."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(llama, folder / "base")
    perturb(llama, folder / "tuned", dtype="float32")
    for name in ("train", "second", "third", "more", "test"):
        write_rows(folder / f"{name}.jsonl", ROWS * 4)
    for name, other in (("sql", "one"), ("maths", "two")):
        rows = [{"prompt": f"{number} plus {other} is", "completion": number} for number in WORDS[7:15]]
        write_rows(folder / f"{name}-dev.jsonl", rows)
    make_adapter(folder / "base", folder / "adapter")
    make_adapter(folder / "base", folder / "second-adapter", use_rslora=True, r=2)
    for seed, name in enumerate(VECTORS):
        options = taskvec.TrainingOptions(calibration_steps=3, steps=3, seed=seed)
        taskvec.train(folder / "base", folder / "train.jsonl", options).vector.save(folder / f"{name}.lota")
    return folder


@pytest.fixture
def own_methods() -> Iterator[None]:
    """Merge methods that a page registers are forgotten afterwards."""
    known = set(METHODS)
    yield
    for name in METHODS.keys() - known:
        del METHODS[name]


# of torch's DataLoader, which asks for pinned memory where there is no accelerator
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
@pytest.mark.usefixtures("own_methods")
@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BLOCK.findall(text_of(page))
    commands = [words for kind, block in blocks if kind == "bash" for words in commands_of(block)]
    if not commands:
        pytest.skip("no commands")
    written = {words[words.index("-o") + 1] for words in commands if "-o" in words}
    # a vector that the page makes itself is not there before
    folder = shutil.copytree(prepared, tmp_path / "folder", ignore=shutil.ignore_patterns(*written))
    monkeypatch.chdir(folder)
    names = {"__name__": "__main__"}
    for kind, block in blocks:
        if kind == "yaml" and (name := re.match(r"# (\S+\.yaml)\n", block)):
            Path(name[1]).write_text(block, encoding="utf-8")
        elif kind == "bash":
            for words in commands_of(block):
                done = inside(*words[1:])
                assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
        elif kind == "python":
            exec(compile(block, page, "exec"), names)


def test_the_page_on_the_hub_runs(prepared: Path, tmp_path: Path) -> None:
    """With a stand-in for the Hub. The blocks run in new processes, because its client reads the environment once."""
    folder = shutil.copytree(prepared, tmp_path / "folder", ignore=shutil.ignore_patterns("tuned.lota"))
    with Hub() as hub:
        hub.add_folder("org/base", prepared / "base")
        environment = hub.environment(tmp_path / "home")
        for kind, block in BLOCK.findall(text_of("docs/hub.md")):
            if kind == "bash":
                for done in run_all(environment, *(words[1:] for words in commands_of(block)), cwd=folder):
                    assert done.returncode == 0, f"{done.args}: {done.stderr}"
            elif kind == "python":
                done = python(environment, block, cwd=folder)
                assert done.returncode == 0, done.stderr
        assert set(hub.repos) == {"org/base", "user/tuned", "user/tasks", "user/half"}
    for name in ("restored", "again"):
        assert package(folder / name) == package(folder / "tuned")


def test_the_digest_of_the_worked_example_is_that_of_the_page(tmp_path: Path) -> None:
    page = text_of("docs/format.md")
    dump = next(block for kind, block in BLOCK.findall(page) if kind == "hex")
    path = tmp_path / "example.lota"
    path.write_bytes(bytes.fromhex("".join(line[6:53] for line in dump.splitlines())))
    (text,) = (
        block.strip() for kind, block in BLOCK.findall(page) if kind == "text" and block.startswith("[Identity(")
    )
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert taskvec.TaskVector.open(path).digest == digest
    assert f"`{digest}`" in page


def anchors_of(path: Path) -> set[str]:
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for name, anchor in LINK.findall(BLOCK.sub("", path.read_text(encoding="utf-8"))):
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), name
        assert not anchor or anchor in anchors_of(target), f"{name}#{anchor}"
