"""Imports go in one direction, and commands that do not train or evaluate start without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "taskvec_formats": ROOT / "formats/taskvec_formats",
    "taskvec": ROOT / "taskvec",
    "taskvec_cli": ROOT / "cli/taskvec_cli",
}
LOWER = {"taskvec_formats": set(), "taskvec": {"taskvec_formats"}, "taskvec_cli": {"taskvec_formats", "taskvec"}}
HEAVY = {"torch", "transformers", "accelerate", "matplotlib", "huggingface_hub"}


def modules(package: str) -> dict[str, Path]:
    """Return the modules of a package: dotted name -> file."""
    folder = PACKAGES[package]
    return {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in folder.rglob("*.py")
    }


def imports(name: str, path: Path, *, known: set[str]) -> set[str]:
    """Return the dotted names of all modules that a file imports, at any level of the code.

    Args:
        name: The dotted name of the file's module.
        path: The file.
        known: The modules of its package, to tell modules from other names in `from package import name`.
    """
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            # `from package import module` imports the module, not a name that the package defines
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_below_it(package: str) -> None:
    known = set(modules(package))
    assert known, f"no modules found for {package}"
    for name, path in modules(package).items():
        tops = {imported.partition(".")[0] for imported in imports(name, path, known=known)}
        assert tops & PACKAGES.keys() <= LOWER[package] | {package}, f"{name} imports upwards"
        if package == "taskvec_formats":
            assert not tops & HEAVY, f"{name} imports {tops & HEAVY}"


@pytest.mark.parametrize("package", PACKAGES)
def test_there_is_no_circle_inside_a_package(package: str) -> None:
    known = modules(package)
    graph = {name: imports(name, path, known=set(known)) & known.keys() for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


# the folders of the library, lowest first; folders in the same row do not import each other
FLOORS = (
    {""},
    {"reporting"},
    {"hub"},
    {"vectors"},
    {"applying", "analysis", "merging.methods"},
    {"algebra", "merging"},
    {"models"},
    {"interop"},
    {"recipes.methods"},
    {"recipes"},
    {"data"},
    {"evaluation"},
    {"search"},
    {"training"},
    {"demo"},
)


def test_folders_import_only_those_below_them() -> None:
    known = modules("taskvec")
    floors = {name: floor for floor, names in enumerate(FLOORS) for name in names}

    def folder(module: str) -> str:
        package = module if known[module].name == "__init__.py" else module.rpartition(".")[0]
        return package.removeprefix("taskvec").removeprefix(".")

    assert {folder(name) for name in known} == floors.keys()
    for name, path in known.items():
        if name in {"taskvec", "taskvec.api"}:
            continue  # the public interface imports from all folders
        for other in imports(name, path, known=set(known)) & known.keys():
            here, there = folder(name), folder(other)
            assert here == there or floors[there] < floors[here], f"{name} imports {other}"


def test_every_module_says_what_it_is() -> None:
    for package in PACKAGES:
        for name, path in modules(package).items():
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["pack", "{f32}", "{tuned}", "-o", "{tmp}/x.lota"],
        ["pack", "{f32}", "{tuned}", "-o", "{tmp}/x.lota", "--kind", "patch"],
        ["unpack", "{vector}", "--base", "{f32}", "-o", "{tmp}/out"],
        ["merge", "{vector}", "{vector}", "-o", "{tmp}/merged.lota"],
        ["arith", "{vector} - 0.5*{vector}", "-o", "{tmp}/x.lota"],
        ["inspect", "{vector}", "{vector}"],
        ["verify", "{vector}", "--base", "{f32}"],
        ["convert", "{vector}", "--to", "coo", "-o", "{tmp}/x.safetensors"],
        ["convert", "{vector}", "--base", "{f32}", "--to", "delta", "-o", "{tmp}/x"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_everyday_commands_load_no_framework(
    arguments: list[str], llama: Path, tuned: Path, vector: Path, tmp_path: Path
) -> None:
    assert all(find_spec(name) for name in HEAVY), "this test needs the frameworks to be installed"
    filled = [a.format(f32=llama, tuned=tuned, vector=vector, tmp=tmp_path) for a in arguments]
    program = (
        "import sys; from taskvec_cli.main import main\n"
        f"sys.argv = ['taskvec', *{filled!r}]\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"print('loaded:', sorted({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
