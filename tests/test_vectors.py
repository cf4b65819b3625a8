"""The golden files: read as ever, written as ever, refused as ever (vectors/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lota_files import read, write

from taskvec_formats import LotaReader, errors

VALID = Path(__file__).parent / "vectors" / "valid"
INVALID = Path(__file__).parent / "vectors" / "invalid"
# the names stand here, so that a file that is lost is a test that fails
VALID_NAMES = "bf16-merged every-dtype f32-exact gap-widths no-tensors shapes-and-names".split()
INVALID_NAMES = """
    ChecksumError-altered-description
    ChecksumError-flipped-bit
    HeaderError-duplicate-key
    HeaderError-extra-stream
    HeaderError-missing-stream
    HeaderError-more-entries-than-elements
    HeaderError-not-json
    HeaderError-tensor-twice
    HeaderError-unknown-codec
    HeaderError-unknown-dtype
    HeaderError-unknown-field
    NotLotaError-plain-safetensors
    NotSafetensorsError-bytes-after-the-end
    NotSafetensorsError-empty
    NotSafetensorsError-truncated
    StreamError-gap-width-3
    StreamError-huge-frame
    StreamError-other-count
    StreamError-position-beyond-the-end
    StreamError-trailing-byte
    VersionError-9.9
""".split()


def test_every_file_is_tested() -> None:
    assert sorted(path.name for path in VALID.glob("*.lota")) == [f"{name}.lota" for name in VALID_NAMES]
    assert sorted(path.name for path in VALID.glob("*.json")) == [f"{name}.json" for name in VALID_NAMES]
    assert sorted(path.name for path in INVALID.iterdir()) == [f"{name}.lota" for name in INVALID_NAMES]


@pytest.mark.parametrize("name", VALID_NAMES)
def test_a_valid_file_is_read_as_described(name: str) -> None:
    assert read(VALID / f"{name}.lota") == json.loads((VALID / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", VALID_NAMES)
def test_a_valid_file_is_written_byte_for_byte(name: str, tmp_path: Path) -> None:
    write(tmp_path / "a.lota", json.loads((VALID / f"{name}.json").read_text(encoding="utf-8")))
    assert (tmp_path / "a.lota").read_bytes() == (VALID / f"{name}.lota").read_bytes()


@pytest.mark.parametrize("name", INVALID_NAMES)
def test_an_invalid_file_is_refused_with_its_error(name: str) -> None:
    path = INVALID / f"{name}.lota"
    with pytest.raises(getattr(errors, name.split("-", maxsplit=1)[0]), match=str(path)) as caught:
        LotaReader(path).verify()
    assert caught.type.__name__ == name.split("-", maxsplit=1)[0]
