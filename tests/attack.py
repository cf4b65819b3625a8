"""Try every attack of tests/attacks/: `make attack`, or `python tests/attack.py [WORD ...]` for those named so.

Each runs in a process of its own. Printed are exit code, seconds, megabytes of the largest process, and the sentence;
the exit code is 1 where one did not end as it must (tests/attacks/__init__.py).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from attacks import Attack, costs, problems, run
from attacks.collected import ATTACKS
from inputs import snapshot


def tried(attack: Attack) -> list[str]:
    """Make and run one; print how it ended, and return what is wrong with that."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = attack.make(folder)
        before = snapshot(folder)
        outcome = run(arguments, folder, attack.stdin)
        found = [*problems(attack, outcome, before, folder), *costs(outcome)]
    sentence = (outcome.stderr or outcome.stdout).partition("\n")[0]
    print(f"{outcome.code}  {outcome.seconds:5.2f} s  {outcome.megabytes:4.0f} MB  {attack.name}", flush=True)
    print(f"   {sentence[:160]}")
    for problem in found:
        print(f"   WRONG: {problem}")
    return found


def main() -> None:
    words = sys.argv[1:]
    chosen = [attack for attack in ATTACKS if all(word in attack.name for word in words)]
    wrong = [attack.name for attack in chosen if tried(attack)]
    print(f"{len(chosen)} attacks, {len(wrong)} that did not end as they must{': ' if wrong else ''}{'; '.join(wrong)}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
