"""Temporary files of workers keep every byte, and leave nothing behind."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from taskvec_formats.system.parallel import ordered_map, shares, threads
from taskvec_formats.system.spool import Piece, Spools
from taskvec_formats.system.workers import forked_map

DATA = [bytes([number % 251]) * (number * 37 % 3000) for number in range(100)]


def content(piece: Piece) -> bytes:
    return b"".join(piece.chunks())


def append(spools: Spools, owners: list[int]) -> Callable[[int], Piece]:
    return lambda item: spools.append(owners[item], DATA[item])


@pytest.mark.parametrize(
    "forked",
    [False, pytest.param(True, marks=pytest.mark.skipif(sys.platform != "linux", reason="forked on Linux only"))],
)
def test_pieces_of_workers_are_read_by_their_parent(
    forked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKVEC_THREADS", "3")
    owners, items = shares([len(data) for data in DATA]), range(len(DATA))
    with Spools(tmp_path, threads()) as spools:
        work = append(spools, owners)
        results = forked_map(work, items, 3, map, owners) if forked else ordered_map(work, items, workers=owners)
        assert [content(piece) for piece in results] == DATA
        assert list(tmp_path.iterdir()) == []


def test_threads_share_a_file(tmp_path: Path) -> None:
    pieces: dict[int, Piece] = {}
    with Spools(tmp_path) as spools:

        def work(first: int) -> None:
            for item in range(first, len(DATA), 4):
                pieces[item] = spools.append(0, DATA[item])

        workers = [threading.Thread(target=work, args=[number]) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [content(pieces[item]) for item in range(len(DATA))] == DATA


def test_a_long_piece_is_read_in_parts(tmp_path: Path) -> None:
    with Spools(tmp_path) as spools:
        spools.append(0, b"before")
        data = os.urandom((1 << 20) + 17)
        piece = spools.append(0, data)
        assert [len(part) for part in piece.chunks()] == [1 << 20, 17]
        assert content(piece) == data
        with pytest.raises(OSError, match="ends early"):
            content(Piece(piece.file, piece.start, piece.length + 1))


def test_files_are_closed(tmp_path: Path) -> None:
    with Spools(tmp_path, 2) as spools:
        piece = spools.append(1, b"data")
    with pytest.raises(OSError, match="Bad file descriptor"):
        content(piece)


def test_work_is_shared_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKVEC_THREADS", "2")
    assert shares([10, 1, 2, 3, 4, 5]) == [0, 0, 0, 1, 1, 1]
    assert shares([]) == []
