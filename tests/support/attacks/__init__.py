"""Crafted files, slips of the hand and foreign recipes, each with the way in which a command must end.

An attack makes what it needs in an empty folder and says which command is to be run there. It must end within SECONDS
and MEGABYTES, with the exit code given, in one printable sentence where it fails; whatever lay in the folder must be
untouched, and nothing may be left behind.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

from support.inputs import snapshot

SECONDS, MEGABYTES = 5.0, 512.0
LONGEST = 1100  # characters of the sentence


@dataclass(frozen=True)
class Attack:
    """What is tried, and how it must end.

    Attributes:
        name: A few words.
        make: Fills an empty folder, which is the working directory; returns the arguments of `taskvec`.
        says: What must be found in the sentence, or for exit code 0 in the report; a regular expression.
        code: The exit code. With 0 the command may write what its arguments name.
        stdin: What is typed.
        is_heavy: Whether it takes more than a moment, and so is left out of `make test`.
    """

    name: str
    make: Callable[[Path], Sequence[object]]
    says: str
    code: int = 1
    stdin: str = ""
    is_heavy: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a command ended. seconds: of processors, on which other programs have little effect. megabytes: at most."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    megabytes: float


def run(arguments: Sequence[object], folder: Path, stdin: str = "") -> Outcome:
    """Run `taskvec` in a folder, in a process of its own, for at most a minute."""
    command = [sys.executable, "-m", "taskvec_cli", *map(str, arguments)]
    with subprocess.Popen(command, cwd=folder, text=True, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        peak = _Peak(process.pid)
        try:
            stdout, stderr = process.communicate(stdin, timeout=60)
        finally:
            process.kill()
            peak.join()
    return Outcome(process.returncode, stdout, stderr, peak.seconds, peak.megabytes)


class _Peak(threading.Thread):
    """Asks the system for the time and the most memory of a process until it ends.

    What wait4 would tell counts the memory of the process that started it.
    """

    def __init__(self, process: int) -> None:
        super().__init__()
        self._folder = Path(f"/proc/{process}")
        self.seconds = self.megabytes = 0.0
        self.start()

    def run(self) -> None:
        while True:
            try:
                found = re.search(r"VmHWM:\s*(\d+) kB", (self._folder / "status").read_text())
                user, system = (self._folder / "stat").read_text().rpartition(")")[2].split()[11:13]
            except OSError:
                return
            self.seconds = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
            if found is None:  # it has ended and was not waited for
                return
            self.megabytes = max(self.megabytes, int(found[1]) * 1024 / 1e6)
            time.sleep(0.004)


def problems(attack: Attack, outcome: Outcome, before: dict[str, bytes | str], folder: Path) -> list[str]:
    """What is not as it must be."""
    found = []
    sentence, _, more = outcome.stderr.partition("\n")
    if outcome.code != attack.code:
        found.append(f"exit code {outcome.code}, not {attack.code}: {outcome.stderr[-300:]}")
    if attack.code:
        if not sentence.startswith("taskvec: ") or more:
            found.append(f"not one sentence: {outcome.stderr[:300]!r}")
        if "unexpected" in sentence or "Traceback" in outcome.stderr:
            found.append("an error that nobody foresaw")
        if len(sentence) > LONGEST:
            found.append(f"a sentence of {len(sentence)} characters")
        if outcome.stdout:
            found.append(f"a report: {outcome.stdout[:100]!r}")
    if not all(line.isprintable() for line in (outcome.stdout + outcome.stderr).splitlines()):
        found.append("control characters reach the terminal")
    if not re.search(attack.says, outcome.stdout if not attack.code else sentence):
        found.append(f"does not say {attack.says!r}: {sentence[:300] or outcome.stdout[:300]}")
    after = snapshot(folder)
    changed = [name for name, content in before.items() if after.get(name) != content]
    if changed:
        found.append(f"changed or lost: {', '.join(changed)}")
    if attack.code and (left := sorted(after.keys() - before.keys())):
        found.append(f"left behind: {', '.join(left)}")
    return found


def costs(outcome: Outcome) -> list[str]:
    """Where it takes too much."""
    found = []
    if outcome.seconds > SECONDS:
        found.append(f"{outcome.seconds:.1f} s, at most {SECONDS:.0f} are allowed")
    if outcome.megabytes > MEGABYTES:
        found.append(f"{outcome.megabytes:.0f} MB, at most {MEGABYTES:.0f} are allowed")
    return found
