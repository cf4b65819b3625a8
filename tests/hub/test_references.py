"""References to the Hub, and what is taken for a local path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.building import tensor, write_checkpoint

from taskvec import TaskVector
from taskvec.errors import UsageError
from taskvec.hub import open_checkpoint
from taskvec.hub.push import destination
from taskvec.hub.reference import Reference, parse, reference_to, without_secrets, written

TENSORS = {"w": tensor("F32", [1])}


def test_a_folder_is_opened_under_its_own_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TENSORS)
    assert open_checkpoint(str(tmp_path / "model")).name == "model"


@pytest.mark.parametrize("reference", ["missing", "./org/model", "../missing", "a/b/c", "/no/such/path", "~/a/b"])
def test_what_is_neither_a_path_nor_a_reference_is_named(reference: str) -> None:
    with pytest.raises(UsageError, match=f"{reference}: no such file or folder$"):
        open_checkpoint(reference)


@pytest.mark.parametrize("reference", ["missing.lota", "runs/missing.lota", "../a/b.lota", "/no/such/path.lota"])
def test_a_missing_vector_of_a_local_path_is_named(reference: str) -> None:
    with pytest.raises(UsageError, match=f"{reference}: no such file$"):
        TaskVector.open(reference)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user/repo", Reference("user/repo")),
        ("user/repo@v1.0", Reference("user/repo", revision="v1.0")),
        ("user/repo@refs/pr/3", Reference("user/repo", revision="refs/pr/3")),
        ("user/repo@feature/x", Reference("user/repo", revision="feature/x")),
        ("user/repo/a.lota", Reference("user/repo", "a.lota")),
        ("user/repo/in/a.lota@main", Reference("user/repo", "in/a.lota", "main")),
        ("user/repo@main/in/a.lota", Reference("user/repo", "in/a.lota", "main")),
        ("user/repo@refs/pr/3/a.lota", Reference("user/repo", "a.lota", "refs/pr/3")),
        ("hf://user/repo@main", Reference("user/repo", revision="main", explicit=True)),
        ("hf:/user/repo", Reference("user/repo", explicit=True)),  # what Path makes of it
        ("hf://user/x.lota", Reference("user/x.lota", explicit=True)),
        ("user", None),
        ("user/x.lota", None),
        ("user/model.safetensors", None),
        ("user/repo/../a.lota", None),
        ("user/repo//a.lota", None),
        ("user/repo/model.safetensors", None),
        ("user/repo@", None),
        ("user/re po", None),
        (".user/repo", None),
        ("user/repo@a\nb", None),
        ("user/repo@../../x", None),
        ("user/repo/file.lota@a..b", None),
        ("", None),
    ],
)
def test_parsing(text: str, expected: Reference | None) -> None:
    assert parse(text) == expected
    if expected is not None:
        assert parse(str(expected)) == expected


def test_a_local_path_comes_first_unless_there_is_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert reference_to("user/repo", file=True) == Reference("user/repo")
    os.makedirs("user/repo")
    assert reference_to("user/repo", file=True) is None
    assert reference_to("hf://user/repo", file=True) == Reference("user/repo", explicit=True)
    assert reference_to(Path("hf://user/repo"), file=True) == Reference("user/repo", explicit=True)


@pytest.mark.parametrize("text", ["hf://user", "hf://", "hf://user/repo/weights.bin", "hf://user/repo/a.lota/b"])
def test_a_prefix_before_something_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a reference to the Hub: expected hf:// and user/repo"):
        TaskVector.open(text)
    with pytest.raises(UsageError, match=r"expected hf:// and user/repo or user/repo@revision$"):
        open_checkpoint("hf://user/repo/a.lota")


@pytest.mark.parametrize("open_it", [TaskVector.open, open_checkpoint])
def test_other_urls_are_refused_without_their_password(open_it: object) -> None:
    for place in (
        "https://me:hf_secretsecret@huggingface.co/a/b",
        Path("https://me:hf_secretsecret@huggingface.co/a/b"),
    ):
        with pytest.raises(UsageError, match=r"^https://huggingface.co/a/b: no such file or folder; a model or vector"):
            open_it(place)  # type: ignore[operator]


def test_secrets_are_removed_from_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "oldStyleToken")
    text = "GET https://a:b@host/p?X-Amz-Signature=abc with hf_abcdefgh and oldStyleToken to hf://user/repo@main"
    assert without_secrets(text) == "GET https://host/p with hf_… and … to hf://user/repo@main"
    assert without_secrets("sent 3 bytes ((…)0a1b?Signature=abc).") == "sent 3 bytes ((…)0a1b)."
    assert written(Path("hf://user/repo@main/x.lota")) == "hf://user/repo@main/x.lota"
    assert written("plain/path@x") == "plain/path@x"


def test_from_pretrained_checks_its_arguments() -> None:
    with pytest.raises(UsageError, match="repo must be a string, found 3"):
        TaskVector.from_pretrained(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="revision must be a string, found 1"):
        TaskVector.from_pretrained("user/repo", revision=1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is not a reference to the Hub"):
        TaskVector.from_pretrained("repo")
    with pytest.raises(UsageError, match="download must be True or False, found 'no'"):
        TaskVector.from_pretrained("user/repo", download="no")  # type: ignore[arg-type]


def test_destinations() -> None:
    assert destination("user/repo/a.lota@dev", name="b.lota") == Reference("user/repo", "a.lota", "dev", explicit=True)
    assert destination("user/repo", name="b.lota") == Reference("user/repo", "b.lota", explicit=True)
    for file, revision, message in (
        ("", None, "'' cannot be the name of a .lota file"),
        ("../b.lota", None, r"'\.\./b\.lota' cannot be the name of a .lota file"),
        (None, "", "'' cannot be the name of a branch"),
        (None, "0" * 40, "is a commit: `revision` is the branch to commit to"),
        (None, "a..b", r"'a\.\.b' cannot be the name of a branch"),
    ):
        with pytest.raises(UsageError, match=message):
            destination("user/repo", file, revision, name="b.lota")
