"""Checkpoints: one file or a folder of shards, the same tensors and the same fingerprint either way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import save_file
from support.building import Tensor, contents, tensor, write_checkpoint, write_shard

from taskvec_formats import ModelFolder
from taskvec_formats.checkpoint import begin_digest, fingerprint, short, tensor_digest
from taskvec_formats.errors import CheckpointError, HeaderError, NotSafetensorsError
from taskvec_formats.file_names import INDEX

TENSORS = {
    "c": tensor("F32", [[1.5, -0.0], [np.inf, np.nan]]),
    "a": tensor("BF16", [1, 2, 3]),
    "d": tensor("F8_E4M3", 0.5),
    "b": tensor("I64", np.zeros((0, 3))),
    "e": tensor("BOOL", [True, False]),
}
EXPECTED = {name: (t.dtype.name, t.shape, t.bits.tobytes().hex()) for name, t in TENSORS.items()}


def test_a_single_file_is_a_checkpoint(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "some.safetensors", TENSORS)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = ModelFolder(path)
    assert contents(checkpoint) == EXPECTED
    assert (checkpoint.name, checkpoint.side_files) == ("some.safetensors", [])


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_folder_is_read_over_all_its_shards(shards: int, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", TENSORS, shards)
    assert contents(checkpoint) == EXPECTED
    assert list(checkpoint.tensors) == sorted(TENSORS)
    assert (checkpoint.name, len(checkpoint.shards)) == ("model", shards)


def test_shards_without_an_index_are_read_all(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TENSORS, 3)
    (tmp_path / "model" / INDEX).unlink()
    assert contents(ModelFolder(tmp_path / "model")) == EXPECTED


def test_files_that_the_index_does_not_name_are_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TENSORS, 2)
    write_shard(tmp_path / "model" / "adapter.safetensors", {"a": tensor("F32", [0])})
    assert contents(ModelFolder(tmp_path / "model")) == EXPECTED


def test_a_name_can_be_given(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TENSORS)
    assert ModelFolder(tmp_path / "model", name="org/model").name == "org/model"


def test_side_files_are_all_but_weights_and_folders(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TENSORS, 2)
    for name in ("config.json", "tokenizer.model", "merges.txt", "pytorch_model.bin", "vector.lota", "model.gguf"):
        (tmp_path / "model" / name).touch()
    (tmp_path / "model" / "onnx").mkdir()
    side_files = [path.name for path in ModelFolder(tmp_path / "model").side_files]
    assert side_files == ["config.json", "merges.txt", INDEX, "tokenizer.model"]


def test_the_fingerprint_does_not_depend_on_shards_order_or_metadata(tmp_path: Path) -> None:
    one, three = (write_checkpoint(tmp_path / f"{shards}", TENSORS, shards) for shards in (1, 3))
    turned = write_shard(tmp_path / "turned.safetensors", dict(reversed(TENSORS.items())), {"format": "np"})
    assert one.fingerprint == three.fingerprint == ModelFolder(turned).fingerprint


def test_digest_and_fingerprint_are_those_of_the_documentation(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", TENSORS)
    lines = {
        name: blake3(f"{name} {t.dtype.name} {list(t.shape)}\n".encode() + t.bits.tobytes()).hexdigest()
        for name, t in TENSORS.items()
    }
    assert checkpoint.digests() == lines
    assert checkpoint.digest("c") == lines["c"]
    data = checkpoint.bits("c").tobytes()
    assert tensor_digest("c", checkpoint.tensors["c"].form, data) == lines["c"]
    digest = begin_digest("c", checkpoint.tensors["c"].form)
    for place in range(len(data)):  # in pieces
        digest.update(data[place : place + 1])
    assert digest.hexdigest() == lines["c"]
    assert short(lines["c"]) == lines["c"][:16]
    text = "".join(f"{lines[name]}\n" for name in sorted(lines))
    assert checkpoint.fingerprint == fingerprint(lines) == blake3(text.encode()).hexdigest()


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {("z" if name == "c" else name): t for name, t in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        renamed,
        lambda tensors: tensors | {"c": tensors["c"]._replace(shape=(4,))},
        lambda tensors: tensors | {"a": tensor("F16", [1, 2, 3])},
        lambda tensors: tensors | {"d": tensor("F8_E4M3", 0.25)},
        lambda tensors: tensors | {"c": tensor("F32", [[1.5, 0.0], [np.inf, np.nan]])},
        lambda tensors: tensors | {"f": tensor("F32", [])},
        lambda tensors: {name: t for name, t in tensors.items() if name != "b"},
    ],
    ids=["name", "shape", "dtype", "value", "sign of zero", "one more", "one less"],
)
def test_the_fingerprint_depends_on_everything_else(change: Any, tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "first", TENSORS)
    assert write_checkpoint(tmp_path / "second", change(TENSORS)).fingerprint != first.fingerprint


def test_progress_counts_the_tensors(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_checkpoint(tmp_path / "model", TENSORS).digests(lambda done, total: seen.append((done, total)))
    assert seen == [(done + 1, len(TENSORS)) for done in range(len(TENSORS))]


@pytest.mark.parametrize("threads", ["1", "4"])
def test_digests_do_not_depend_on_the_number_of_threads(
    threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKVEC_THREADS", threads)
    checkpoint = write_checkpoint(tmp_path / "model", TENSORS, 2)
    seen = list(checkpoint.digests())
    assert seen == sorted(TENSORS)
    assert checkpoint.digests() == {name: checkpoint.digest(name) for name in seen}


def test_checkpoints_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    save_file({"w": np.arange(3.0)}, tmp_path / "model.safetensors")
    assert ModelFolder(tmp_path).bits("w").view(np.float64).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["missing", "missing/model.safetensors"])
def test_a_missing_path_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path / name}: no such file or folder"):
        ModelFolder(tmp_path / name)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        ModelFolder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", {"w": tensor("F32", [1]), "x": tensor("F32", [1])})
    write_shard(tmp_path / "b.safetensors", {"w": tensor("F32", [1])})
    with pytest.raises(CheckpointError, match=r"'w' is in both a\.safetensors and b\.safetensors"):
        ModelFolder(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": []}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": 1, "b": "x"}}',
        '{"weight_map": {}, "weight_map": {}}',
    ],
)
def test_what_is_no_index_is_refused(index: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TENSORS)
    (tmp_path / "model" / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=f"{INDEX} is not a shard index"):
        ModelFolder(tmp_path / "model")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "{tmp}/outside.safetensors", "..", "", "missing", "a\0b"])
def test_an_index_cannot_name_what_is_not_in_its_folder(shard: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "outside.safetensors", TENSORS)
    write_checkpoint(tmp_path / "model", TENSORS)
    target = shard.replace("{tmp}", str(tmp_path))
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": target}}))
    with pytest.raises(CheckpointError, match="which is not in the folder"):
        ModelFolder(tmp_path / "model")


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TENSORS, 2)
    index = tmp_path / "model" / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"lost": weight_map["a"]}}))
    with pytest.raises(CheckpointError, match="'lost'"):
        ModelFolder(tmp_path / "model")


def test_a_bad_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TENSORS, 2)
    bad = tmp_path / "model" / "model-00002-of-00002.safetensors"
    good = bad.read_bytes()
    bad.write_bytes(good[:-1])
    with pytest.raises(NotSafetensorsError, match=bad.name):
        ModelFolder(tmp_path / "model")
    header = b'{"w":1,"w":1}'.replace(b"1", b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}')
    bad.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(HeaderError, match=bad.name):
        ModelFolder(tmp_path / "model")


def test_symbolic_links_are_followed_as_in_the_hub_cache(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "blobs", TENSORS, 2)
    shutil.copytree(tmp_path / "blobs", tmp_path / "snapshot", copy_function=lambda old, new: Path(new).symlink_to(old))
    assert contents(ModelFolder(tmp_path / "snapshot")) == EXPECTED
