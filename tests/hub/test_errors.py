"""What fails on the Hub is one sentence, without a token."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.hub import TOKEN, Files, Hub, run_all

NO_TOKEN = "no token is set (HF_TOKEN, or `hf auth login`)"
ABSENT = "no such file or folder, and the Hugging Face Hub has no model repository"


def sentence(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """Return the only line of an error."""
    assert (done.returncode, done.stdout) == (code, ""), (done.args, done)
    assert done.stderr.startswith("taskvec: "), done
    assert done.stderr.count("\n") == 1, done
    assert "hf_" not in done.stderr.replace("hf_…", "")
    assert "secret" not in done.stderr
    return done.stderr.removeprefix("taskvec: ").rstrip()


@pytest.fixture
def filled(hub: Hub, made: Files) -> Hub:
    one, two = (path.read_bytes() for path in made.vectors)
    hub.add("user/one", {"one.lota": one, "README.md": b"one"})
    hub.add("user/both", {"one.lota": one, "in/two.lota": two})
    hub.add("user/none", {"README.md": b"none"})
    hub.add("user/hidden", {"one.lota": one}, private=True)
    hub.add("user/gated", {"one.lota": one}, gated=True)
    hub.renamed["user/old"] = "user/one"
    return hub


def check(
    environment: dict[str, str], cwd: Path, expected: dict[tuple[str, ...], str], codes: dict[str, int] | None = None
) -> None:
    """Run commands, and compare their errors."""
    found = run_all(environment, *expected, cwd=cwd)
    for (words, message), done in zip(expected.items(), found, strict=True):
        assert sentence(done, (codes or {}).get(words[-1], 1)) == message, words


def test_what_the_hub_does_not_have(filled: Hub, home: Path, made: Files) -> None:
    given = "or it is private and the token gives no access to it"
    expected = {
        ("verify", "user/gone"): f"user/gone: {ABSENT} user/gone, {given}",
        ("inspect", "user/gone/x.lota"): f"user/gone/x.lota: {ABSENT} user/gone, {given}",
        (
            "verify",
            "hf://user/gone",
        ): f"hf://user/gone: the Hugging Face Hub has no model repository user/gone, {given}",
        ("verify", "one.lota", "--base", "org/gone"): f"org/gone: {ABSENT} org/gone, {given}",
        ("arith", "user/gone/x.lota * 2", "-o", "n.lota"): f"user/gone/x.lota: {ABSENT} user/gone, {given}",
        ("verify", "user/one/x.lota"): "user/one has no file 'x.lota' at the revision 'main'",
        ("inspect", "user/one/x.lota"): "user/one has no file 'x.lota' at the revision 'main'",
        ("verify", "user/one@v9"): "user/one has no revision 'v9' on the Hugging Face Hub",
        ("inspect", "user/one/one.lota@v9"): "user/one has no revision 'v9' on the Hugging Face Hub",
        ("verify", "one.lota", "--base", "org/base@v9"): "org/base has no revision 'v9' on the Hugging Face Hub",
        ("verify", "user/none"): "user/none contains no .lota file",
        ("verify", "user/both"): "user/both contains 2 .lota files: name one of them, as in user/both/in/two.lota "
        "(in/two.lota, one.lota)",
        ("verify", "one.lota", "--base", "user/one"): "user/one holds no .safetensors file",
        ("unpack", "user/one", "-o", "n"): "user/one/one.lota does not record a base on the Hugging Face Hub: give the "
        "base (--base)",
    }
    usage = {"user/one": 2, "n": 2}
    codes = {words[-1]: usage[words[-1]] for words in expected if words[-1] in usage}
    check(filled.environment(home), made.folder, expected, codes)


def test_a_renamed_repository_is_found(filled: Hub, home: Path, made: Files) -> None:
    done = run_all(filled.environment(home), ["inspect", "user/old"], ["verify", "user/old/one.lota"], cwd=made.folder)
    assert [each.returncode for each in done] == [0, 0], done


def test_private_and_gated_repositories(filled: Hub, home: Path, made: Files) -> None:
    private = (
        "no such file or folder, and the Hugging Face Hub has no model repository user/hidden, or it is private and"
    )
    gated = f"its conditions are accepted on {filled.url}/user/gated"
    check(
        filled.environment(home, None),
        made.folder,
        {
            ("verify", "user/hidden"): f"user/hidden: {private} {NO_TOKEN}",
            ("inspect", "user/hidden/one.lota"): f"user/hidden/one.lota: {private} {NO_TOKEN}",
            ("verify", "user/gated/one.lota"): f"user/gated is gated, and {NO_TOKEN}: {gated}",
            ("push", "one.lota", "user/new"): "pushing to user/new needs a token: set HF_TOKEN, or run `hf auth login`",
        },
    )
    wrong = "the Hugging Face Hub does not accept the token (Invalid credentials in Authorization header)"
    check(
        filled.environment(home, "hf_secretOfAnother"),
        made.folder,
        {
            ("verify", "user/hidden"): f"user/hidden: {wrong}",
            ("inspect", "user/one/one.lota"): f"user/one/one.lota: {wrong}",
            ("push", "one.lota", "user/new"): f"pushing to user/new: {wrong}",
        },
    )
    check(
        filled.environment(home),
        made.folder,
        {
            ("verify", "user/gated"): f"user/gated is gated, and the token gives no access to it: {gated}",
            ("push", "one.lota", "org/new"): "pushing to org/new: the Hugging Face Hub does not permit this with the "
            "token that is set (You don't have the rights to create a model under this namespace)",
        },
    )
    (done,) = run_all(filled.environment(home), ["verify", "user/hidden"], cwd=made.folder)
    assert done.returncode == 0, done.stderr


def test_offline(filled: Hub, home: Path, made: Files) -> None:
    """What is in the cache is used, everything else is named."""
    environment = filled.environment(home)
    cached = [["verify", "user/one/one.lota"], ["verify", "one.lota", "--base", "org/base"]]
    assert [done.returncode for done in run_all(environment, *cached, cwd=made.folder)] == [0, 0]
    requests = len(filled.requests)
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    again = run_all(offline, *cached, ["verify", "user/one"], ["inspect", "user/one"], cwd=made.folder)
    assert [done.returncode for done in again] == [0, 0, 0, 0], again
    forbidden = "HF_HUB_OFFLINE forbids requests to the Hugging Face Hub"
    local = f"no such file or folder, and it is not in the cache, and {forbidden}"
    check(
        offline,
        made.folder,
        {
            ("verify", "user/both"): f"user/both: {local}",
            ("inspect", "user/both/one.lota"): f"user/both/one.lota: {local}",
            ("verify", "hf://user/both"): f"hf://user/both: it is not in the cache, and {forbidden}",
            ("verify", "one.lota", "--base", "org/other"): f"org/other: {local}",
            ("push", "one.lota", "user/new"): f"pushing to user/new: {forbidden}",
        },
    )
    assert len(filled.requests) == requests


def test_no_network(filled: Hub, home: Path, made: Files) -> None:
    away = {**filled.environment(home), "HF_ENDPOINT": "http://me:hf_secretOfTheUrl@127.0.0.1:9"}
    reason = "the Hugging Face Hub, http://127.0.0.1:9, cannot be reached ([Errno 111] Connection refused)"
    local = f"no such file or folder, and {reason}"
    check(
        away,
        made.folder,
        {
            ("verify", "user/one"): f"user/one: {local}",
            ("verify", "user/one/one.lota"): f"user/one/one.lota: {local}",
            ("inspect", "hf://user/one/one.lota"): f"hf://user/one/one.lota: {reason}",
            ("verify", "one.lota", "--base", "org/base"): f"org/base: {local}",
            ("push", "one.lota", "user/new"): f"pushing to user/new: {reason}",
        },
    )


def test_a_server_that_fails(filled: Hub, home: Path, made: Files) -> None:
    filled.status = 500
    check(
        filled.environment(home),
        made.folder,
        {("inspect", "user/one"): "user/one/one.lota: the Hugging Face Hub answers 500 (Internal Server Error)"},
    )


def test_a_cache_that_cannot_be_written(filled: Hub, home: Path, made: Files, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    check(
        {**filled.environment(home), "HF_HUB_CACHE": str(cache)},
        made.folder,
        {
            (
                "verify",
                "user/one/one.lota",
            ): f"user/one/one.lota: the cache {cache} cannot be written (Not a directory)",
            ("pull", "user/one", "-o", "n.lota"): f"user/one/one.lota: the cache {cache} cannot be written (Not a "
            "directory)",
            ("verify", "one.lota", "--base", "org/base"): f"org/base: the cache {cache} cannot be written (Not a "
            "directory)",
        },
    )
    assert not (made.folder / "n.lota").exists()


def test_requests_that_make_no_sense(filled: Hub, home: Path, made: Files) -> None:
    expected = {
        ("push", "base", "user/x"): "base is a folder, and push uploads .lota files: use hf upload user/x base",
        ("push", "gone.lota", "user/x"): "gone.lota: no such file",
        ("push", "user/one/one.lota", "user/x"): "user/one/one.lota: no such file; push uploads files of this machine",
        ("push", "one.lota", "x"): "x is not a repository of the Hugging Face Hub: expected user/repo",
        ("push", "one.lota", "user/x", "--path-in-repo", "x.bin"): "'x.bin' cannot be the name of a .lota file in a "
        "repository",
        ("push", "one.lota", "user/x", "--path-in-repo", "../x.lota"): "'../x.lota' cannot be the name of a .lota file "
        "in a repository",
        (
            "push",
            "one.lota",
            "user/x/a.lota",
            "--path-in-repo",
            "b.lota",
        ): "--path-in-repo is b.lota, but user/x/a.lota names a.lota",
        ("push", "one.lota", "user/one", "--private"): "user/one exists and is public: --private is for a repository "
        "that is created",
        ("pull", "one.lota"): "one.lota is not a file of the Hugging Face Hub: expected user/repo/file.lota",
        ("pull", "user/one", "-o", "two.lota"): "two.lota exists already; --force replaces it",
    }
    commits = len(filled.repos["user/one"].commits)
    check(filled.environment(home), made.folder, expected, {words[-1]: 2 for words in expected})
    assert len(filled.repos["user/one"].commits) == commits
    assert "user/x" not in filled.repos


def test_the_token_is_written_nowhere(filled: Hub, home: Path, made: Files, tmp_path: Path) -> None:
    done = run_all(
        filled.environment(home),
        ["push", made.vectors[0], "user/new", "--json"],
        ["pull", "user/new", "-o", "new.lota"],
        ["inspect", "user/hidden", "--json"],
        cwd=tmp_path,
    )
    assert [each.returncode for each in done] == [0, 0, 0], done
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    page = filled.repos["user/new"].files("main")[1]["README.md"]  # type: ignore[index]
    texts = [*(path.read_bytes() for path in files), page, *(f"{each.stdout}{each.stderr}".encode() for each in done)]
    assert not any(TOKEN.encode() in text or b"secretOfTheUrl" in text for text in texts)


def test_names_and_answers_that_the_client_does_not_read(filled: Hub, home: Path, made: Files, tmp_path: Path) -> None:
    one = made.vectors[0].read_bytes()
    filled.add("user/outside", {"../../one.lota": one})
    filled.add("user/gguf", {"model.gguf": b"GGUF"})
    check(
        filled.environment(home),
        made.folder,
        {
            ("unpack", "one.lota", "--base", "user/gguf", "-o", "n"): "user/gguf holds no .safetensors file",
            ("convert", "user/gguf", "--base", "base", "-o", "n"): "user/gguf holds no .safetensors file",
            ("inspect", "user/x.git"): "user/x.git is not the name of a repository of the Hugging Face Hub",
        },
        {"n": 2},
    )
    commands = [["pull", "user/outside", "-o", "n"], ["inspect", "user/outside"]]
    for done in run_all(filled.environment(home), *commands, cwd=made.folder):
        assert "lota: the client of the Hugging Face Hub cannot read this (" in sentence(done), done.args
    check(
        filled.environment(home, "tökenOfNobody"),
        made.folder,
        {
            ("inspect", "user/one"): "user/one: the token that is set has characters that are not ASCII, unlike those "
            "of the Hugging Face Hub"
        },
    )
    filled.answer = lambda method, path, data: data[:-9] if path.startswith("/storage/") else data
    (done,) = run_all(filled.environment(tmp_path / "other home"), ["pull", "user/one", "-o", "n"], cwd=made.folder)
    assert sentence(done).startswith("user/one/one.lota: the Hugging Face Hub does not send the whole file (")
    assert not (made.folder / "n").exists()


def test_an_expression_names_no_token(made: Files) -> None:
    (done,) = run_all({}, ["arith", "one.lota+user/hf_aSecretOfSomebody/x.lota", "-o", "n"], cwd=made.folder)
    assert "there is no file 'one.lota+user/hf_…/x.lota'" in sentence(done, 2)
