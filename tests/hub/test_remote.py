"""Reading of remote files by ranges: how much is sent, and what is found to be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.building import vector_of
from support.hub import Files, Hub, python, run_all

from taskvec_formats import LotaReader, SparseTensor

# prints the SHA-256 of a tensor's values, or the error
READ = """
import hashlib, pickle, sys
import taskvec

try:
    vector = taskvec.TaskVector.open(sys.argv[1], download=False)
    for name in sys.argv[2:]:
        print(name, hashlib.sha256(vector[name].values.tobytes()).hexdigest())
    again = pickle.loads(pickle.dumps(vector))
    print(again == vector, again.name, again.inputs, again.file_size)
except Exception as error:
    print(type(error).__name__, error)
"""
ELEMENTS = 3_200_000  # of each of four tensors, every one with an entry of 64 bits


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 102 MB."""
    random = np.random.default_rng(0)
    positions = np.arange(ELEMENTS)
    deltas = {
        name: SparseTensor((ELEMENTS,), positions, random.random(ELEMENTS, np.float32)) for name in ("a", "b", "c", "d")
    }
    path = tmp_path_factory.mktemp("large") / "large.lota"
    vector_of(deltas).save(path, codec="plain")
    assert path.stat().st_size > 100_000_000
    return path


def test_inspecting_a_large_file_sends_less_than_a_percent_of_it(hub: Hub, home: Path, large: Path) -> None:
    hub.add("user/large", {"large.lota": large.read_bytes()})
    environment = hub.environment(home)
    remote, local = run_all(
        environment, ["inspect", "user/large", "--json"], ["inspect", large, "--json"], cwd=home.parent
    )
    assert remote.returncode == 0, remote.stderr
    assert hub.sent < 0.001 * large.stat().st_size
    assert not list(home.rglob("*.lota"))
    facts, expected = json.loads(remote.stdout)["files"][0], json.loads(local.stdout)["files"][0]
    assert facts.pop("path") == "user/large"
    assert expected.pop("path") == str(large)
    assert facts == expected
    assert hub.authorized == {"hub"}  # the token is not sent to the storage

    # one tensor is one block here
    before = hub.sent
    read = python(environment, READ, "user/large", "c", cwd=home.parent)
    assert read.stdout.splitlines()[1] == f"True user/large/large.lota () {large.stat().st_size}", read.stderr
    block = LotaReader(large).specs["c"].length
    assert block <= hub.sent - before < 1.01 * block


def test_the_cache_is_used_if_it_has_the_file(hub: Hub, home: Path, made: Files) -> None:
    hub.add("user/one", {"one.lota": made.vectors[0].read_bytes()})
    environment = hub.environment(home)
    (done,) = run_all(environment, ["verify", "user/one"], cwd=home.parent)
    assert done.returncode == 0, done.stderr
    before = hub.sent
    read, there = run_all(environment, ["inspect", "user/one/one.lota"], ["inspect", "user/one"], cwd=home.parent)
    assert (read.returncode, there.returncode, hub.sent) == (0, 0, before)
    # a new commit is not in the cache
    hub.add("user/one", {"one.lota": made.vectors[1].read_bytes()})
    (done,) = run_all(environment, ["inspect", "user/one/one.lota", "--json"], cwd=home.parent)
    assert hub.sent > before
    tuned = json.loads(done.stdout)["files"][0]["tuned"]
    assert tuned["fingerprint"] == LotaReader(made.vectors[1]).header.tuned.fingerprint  # type: ignore[union-attr]


def test_overlap_of_remote_files_is_that_of_local_ones(hub: Hub, home: Path, made: Files) -> None:
    for path in made.vectors:
        hub.add(f"user/{path.stem}", {path.name: path.read_bytes()})
    remote, local = run_all(
        hub.environment(home),
        ["inspect", "user/one", "hf://user/two/two.lota@main", "--json"],
        ["inspect", *made.vectors, "--json"],
        cwd=home.parent,
    )
    found, expected = (json.loads(done.stdout)["overlap"][0] for done in (remote, local))
    assert (found.pop("a"), found.pop("b")) == ("user/one", "hf://user/two/two.lota@main")
    assert found == {key: value for key, value in expected.items() if key not in ("a", "b")}
    assert not list(home.rglob("*.lota"))


def flipped(position: int) -> Callable[[str, str, bytes], bytes]:
    def answer(method: str, path: str, data: bytes) -> bytes:
        wrong = bytearray(data)
        wrong[position] ^= 1
        return bytes(wrong)

    return answer


def longer(after: int) -> Callable[[str, str, bytes], bytes]:
    """Answers whose file has one byte more from a number of requests for ranges on."""
    count = 0

    def answer(method: str, path: str, data: bytes) -> bytes:
        nonlocal count
        count += method == "GET"
        return data if count <= after else data + b"x"

    return answer


NAME = "model.layers.0.w"


def test_what_is_wrong_with_a_remote_file_is_found(hub: Hub, home: Path, made: Files) -> None:
    path = made.vectors[0]
    commit = hub.add("user/one", {"one.lota": path.read_bytes()})
    size, environment = path.stat().st_size, hub.environment(home)
    named = f"user/one/one.lota@{commit}"

    def read(*names: str) -> str:
        return python(environment, READ, "user/one/one.lota", *names, cwd=home.parent).stdout

    assert NAME in read(NAME)
    hub.answer = flipped(size - 100_000)
    assert read("model.layers.1.w").startswith(
        f"ChecksumError {named}: tensor 'model.layers.1.w', block at element 0, byte "
    )
    assert NAME in read(NAME)  # other blocks are intact
    hub.answer = flipped(int.from_bytes(path.read_bytes()[:8], "little") + 20)  # in the index
    assert read().startswith(f"ChecksumError {named}: ")
    hub.answer = flipped(0)
    assert read().startswith(f"NotSafetensorsError {named} is not a safetensors file")
    hub.answer = longer(1)
    assert read(NAME) == f"HubError {named} was changed while it was read: it had {size} bytes, now it has {size + 1}\n"
    hub.answer = lambda method, path, data: data
    hub.ignores_ranges = True
    assert read() == (
        f"HubError {named}: the server sends the whole file instead of a part of it (status 200): download it with "
        "taskvec pull\n"
    )
    assert hub.sent < 20 * size


def test_an_answer_that_is_cut_off_is_asked_for_again(hub: Hub, home: Path, made: Files) -> None:
    commit = hub.add("user/one", {"one.lota": made.vectors[0].read_bytes()})
    environment = hub.environment(home)
    hub.cuts = 2
    done = python(environment, READ, "user/one/one.lota", NAME, cwd=home.parent)
    assert NAME in done.stdout
    hub.cuts = 1000
    soon = "import taskvec.hub.ranges\ntaskvec.hub.ranges._WAITS = (0.0, None)\n"
    done = python(environment, soon + READ, "user/one/one.lota", cwd=home.parent)
    assert done.stdout.startswith(
        f"HubError user/one/one.lota@{commit}: bytes 0 to 65536 cannot be read from the Hugging Face Hub ("
    )
    assert done.stderr == ""


def test_a_small_file_is_read_from_a_server_without_ranges(hub: Hub, home: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.lota"
    vector_of({"w": SparseTensor((3,), np.array([1]), np.array([2.0], np.float32))}).save(small)
    hub.add("user/small", {"small.lota": small.read_bytes()})
    hub.ignores_ranges = True
    done = python(hub.environment(home), READ, "user/small", "w", cwd=tmp_path)
    assert done.stdout.startswith("w "), done.stdout
