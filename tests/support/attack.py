"""Runs all attacks of attacks/: `make attack`, or `python -m support.attack [WORD ...]` for those with matching names.

Each attack runs in its own process. For each one, the exit code, seconds, megabytes of the largest process and the
message are printed. The program exits with 1 if an attack does not end as required
(tests/support/attacks/__init__.py).
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.attacks import Attack, costs, problems, run
from support.attacks.collected import ATTACKS
from support.inputs import snapshot


def tried(attack: Attack) -> tuple[str, bool]:
    """Prepare and run an attack; return the lines to print, and whether it ended wrongly."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = attack.make(folder)
        before = snapshot(folder)
        outcome = run(arguments, folder, attack.stdin)
        found = [*problems(attack, outcome, before, folder), *costs(outcome)]
    sentence = (outcome.stderr or outcome.stdout).partition("\n")[0]
    lines = [
        f"{outcome.code}  {outcome.seconds:5.2f} s  {outcome.megabytes:4.0f} MB  {attack.name}",
        f"   {sentence[:160]}",
        *(f"   WRONG: {problem}" for problem in found),
    ]
    return "\n".join(lines), bool(found)


def main() -> None:
    words = sys.argv[1:]
    chosen = [attack for attack in ATTACKS if all(word in attack.name for word in words)]
    wrong = []
    with ThreadPoolExecutor(2) as pool:
        for attack, (lines, is_wrong) in zip(chosen, pool.map(tried, chosen), strict=True):
            print(lines, flush=True)
            wrong += [attack.name] * is_wrong
    print(f"{len(chosen)} attacks, {len(wrong)} failed{': ' if wrong else ''}{'; '.join(wrong)}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
