"""Opening a checkpoint by the reference that a user gives: a path or a Hub id."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.building import tensor, write_checkpoint

from taskvec.errors import UsageError
from taskvec.hub import open_checkpoint

TENSORS = {"w": tensor("F32", [1])}


def test_a_folder_is_opened_under_its_own_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TENSORS)
    assert open_checkpoint(str(tmp_path / "model")).name == "model"


@pytest.mark.parametrize("reference", ["missing", "./org/model", "../missing", "a/b/c", "/no/such/path"])
def test_what_is_neither_a_path_nor_a_hub_id_is_named(reference: str) -> None:
    with pytest.raises(UsageError, match=f"{reference}: no such file or folder$"):
        open_checkpoint(reference)
