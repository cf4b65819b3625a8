"""A shortened run of the fuzzer; `make fuzz` is the long one."""

from pathlib import Path

from support import fuzz


def test_damaged_files_end_in_a_typed_error_or_the_right_answer(tmp_path: Path) -> None:
    outcomes = fuzz.run(2000, 0, tmp_path)
    assert outcomes.total() == 2000
    # all depths were reached: the container, the digests, the description, the codecs, and files that are still good
    assert outcomes.keys() >= {"NotSafetensorsError", "ChecksumError", "HeaderError", "StreamError", "read"}
