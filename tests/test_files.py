"""What a user types is opened or named; an output never replaces what it should not."""

from __future__ import annotations

from pathlib import Path

import pytest
from building import tensor, write_checkpoint

from taskvec.errors import OutputExistsError, UsageError
from taskvec.files import check_output, check_output_folder, open_checkpoint

TENSORS = {"w": tensor("F32", [1])}


def test_a_folder_is_opened_under_its_own_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TENSORS)
    assert open_checkpoint(str(tmp_path / "model")).name == "model"


@pytest.mark.parametrize("reference", ["missing", "./org/model", "../missing", "a/b/c", "/no/such/path"])
def test_what_is_neither_a_path_nor_a_hub_id_is_named(reference: str) -> None:
    with pytest.raises(UsageError, match=f"{reference}: no such file or folder$"):
        open_checkpoint(reference)


def test_a_new_output_file_is_allowed_and_an_old_one_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "a.lota"
    check_output(path, force=False)
    path.touch()
    check_output(path, force=True)
    with pytest.raises(OutputExistsError, match="--force"):
        check_output(path, force=False)


@pytest.mark.parametrize("force", [True, False])
def test_a_folder_is_no_output_file(force: bool, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path, force=force)


def test_a_model_folder_is_replaced_only_by_force(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", TENSORS)
    write_checkpoint(tmp_path / "out", TENSORS)
    check_output_folder(tmp_path / "out", base, force=True)
    with pytest.raises(OutputExistsError, match="--force"):
        check_output_folder(tmp_path / "out", base, force=False)


def test_new_and_empty_folders_are_allowed(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", TENSORS)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        check_output_folder(tmp_path / name, base, force=False)


def test_force_never_replaces_the_base_a_file_or_other_folders(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", TENSORS)
    (tmp_path / "link").symlink_to(tmp_path / "base")
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    for name, message in {
        "base": "holds the base",
        "link": "holds the base",
        ".": "holds the base",
        "file": "is a file",
        "photos": "holds no model",
    }.items():
        with pytest.raises(UsageError, match=message):
            check_output_folder(tmp_path / name, base, force=True)
