"""Results come out in order, errors where they happened, whatever the number of threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from taskvec_formats.system.parallel import ordered_map, threads


@pytest.fixture(params=["1", "2", "7"])
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("TASKVEC_THREADS", request.param)
    return int(request.param)


@pytest.mark.parametrize("items", [0, 1, 2, 100])
def test_results_are_in_the_order_of_the_items(items: int, count: int) -> None:
    assert list(ordered_map(lambda n: n * n, range(items))) == [n * n for n in range(items)]


def test_a_slow_item_does_not_let_later_ones_pass(count: int) -> None:
    later = threading.Event()

    def work(item: int) -> int:
        # with one thread nothing can be later
        if item == 0 and count > 1:
            assert later.wait(30)
        if item == 1:
            later.set()
        return item

    assert list(ordered_map(work, range(10))) == list(range(10))


def test_at_most_two_results_a_thread_wait(count: int) -> None:
    taken = 0

    def source() -> Iterator[int]:
        nonlocal taken
        for item in range(100):
            taken += 1
            yield item

    for done, _ in enumerate(ordered_map(lambda n: n, source()), 1):
        assert taken - done <= 2 * count
    assert taken == 100


def test_an_error_comes_at_its_place(count: int) -> None:
    seen = []

    def work(item: int) -> int:
        return 12 // (item - 5)

    with pytest.raises(ZeroDivisionError):
        seen.extend(ordered_map(work, range(10)))
    results = ordered_map(work, range(10))
    assert [next(results) for _ in range(5)] == [12 // (item - 5) for item in range(5)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_an_error_in_the_items_ends_the_work(count: int) -> None:
    def source() -> Iterator[int]:
        yield 1
        raise KeyError("item")

    with pytest.raises(KeyError, match="item"):
        list(ordered_map(lambda n: n, source()))


def test_whoever_stops_early_leaves_no_threads(count: int) -> None:
    before = threading.active_count()
    results = ordered_map(lambda n: n, range(1000))
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("value", ["", "0", "-1", "two", "1.5", " 3"])
def test_another_setting_means_the_cores_at_hand(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKVEC_THREADS", value)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads() == cores
    monkeypatch.delenv("TASKVEC_THREADS")
    assert threads() == cores


def test_the_setting_counts() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKVEC_THREADS", "3")
        assert threads() == 3
