"""The attacks of tests/support/attacks/, except heavy ones, in this process. `make attack` runs and measures all."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.attacks import Attack, Outcome, problems
from support.attacks.collected import ATTACKS
from support.commands import inside
from support.inputs import snapshot

pytestmark = pytest.mark.slow

QUICK = [attack for attack in ATTACKS if not attack.is_heavy]


def test_no_two_attacks_have_one_name() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("attack", QUICK, ids=[attack.name for attack in QUICK])
def test_an_attack_ends_as_it_must(attack: Attack, tmp_path: Path) -> None:
    arguments = attack.make(tmp_path)
    before = snapshot(tmp_path)
    done = inside(*arguments, cwd=tmp_path)
    outcome = Outcome(done.returncode, done.stdout, done.stderr, 0, 0)
    assert problems(attack, outcome, before, tmp_path) == []
