"""The speed that progress reports show."""

from __future__ import annotations

from pathlib import Path

from support.building import tensor, write_checkpoint

from taskvec.reporting.throughput import Throughput, bytes_of, hashed


def test_the_speed_is_the_mean_since_the_start() -> None:
    times = iter([5.0, 5.0, 7.0, 9.0])
    rate = Throughput(lambda: next(times))
    assert rate.after(0) == ""
    assert rate.after(3_000_000_000) == "1,500 MB/s"
    assert rate.after(1_000_000_000) == "1,000 MB/s"


def test_hashing_reports_every_tensor(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {"a": tensor("F32", [1, 2, 3]), "b": tensor("BF16", [1])})
    assert (bytes_of(model, "a"), bytes_of(model, "b"), bytes_of(model, "c")) == (12, 2, 0)
    seen: list[tuple[str, int, int]] = []
    notes: list[str] = []

    def progress(stage: str, done: int, total: int, note: str) -> None:
        seen.append((stage, done, total))
        notes.append(note)

    assert hashed(model, "base", progress) == model.digests()
    assert seen == [("hashing base", 1, 2), ("hashing base", 2, 2)]
    assert all(note.endswith(" MB/s") for note in notes)
