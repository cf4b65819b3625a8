"""mergekit's and peft's own answers, frozen by `make conformance 160 1 --freeze`, and ours, to the last bit."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
from support.peers import FROZEN, MERGEKIT, PEFT, Case, from_hex


def test_merges_equal_the_peers_frozen_answers_to_the_bit() -> None:
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    seen: Counter[tuple[str, str]] = Counter()
    for row in frozen["cases"]:
        case = Case(**row)
        expected = from_hex(case.result)
        assert np.array_equal(case.ours(), expected), (case.peer, case.method, case.options)
        assert np.isfinite(expected).all()
        seen[case.peer, case.method] += 1
    assert seen.keys() == {("mergekit", name) for name in MERGEKIT} | {("peft", name) for name in PEFT}
    assert min(seen.values()) >= 5
