"""The independent reader of docs/minimal_reader.py agrees with every golden file and refuses every bad one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import GOLDEN, ROOT

SOURCE = ROOT / "docs" / "minimal_reader.py"


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_reader", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    spec.loader.exec_module(module)
    assert not {name for name in set(sys.modules) - before if name.startswith("taskvec")}
    return module


def test_it_is_small_and_shares_nothing_with_taskvec() -> None:
    lines = [line for line in SOURCE.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= 200
    assert not [line for line in lines if line.startswith(("import taskvec", "from taskvec"))]


@pytest.mark.parametrize("path", sorted((GOLDEN / "valid").glob("*.lota")), ids=lambda path: path.stem)
def test_it_reads_every_valid_file(reader: ModuleType, path: Path) -> None:
    base = path.with_suffix(".base.safetensors")
    found = reader.read(path, base if base.exists() else None)
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert found["kind"] == expected["kind"]
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, parts in found["tensors"].items():
        for part, entries in parts.items():
            wanted = expected["tensors"][name][part]
            assert [position for position, _ in entries] == wanted["positions"]
            assert [value for _, value in entries] == wanted["values"]


@pytest.mark.parametrize("path", sorted((GOLDEN / "invalid").glob("*.lota")), ids=lambda path: path.stem)
def test_it_refuses_every_invalid_file(reader: ModuleType, path: Path) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - "whatever is wrong with a file ends in an exception"
        reader.read(path)
