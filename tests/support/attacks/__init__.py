"""Attacks: crafted files, mistyped commands and untrusted recipes, each with the required outcome of a command.

An attack prepares an empty folder and names the command to run in it. The command must end within SECONDS and
MEGABYTES and with the given exit code. If it fails, it must print one printable sentence. The files in the folder must
be unchanged, and no other files may be left.
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
LONGEST = 1100  # maximum number of characters in an error message


@dataclass(frozen=True)
class Attack:
    """A command on prepared files, and how it must end.

    Attributes:
        name: A short description.
        make: Fills an empty folder, the working directory of the command; returns the arguments of `taskvec`.
        says: A regular expression that the error message must match, or for exit code 0 the report.
        code: The exit code. With 0 the command may write the outputs that its arguments name.
        stdin: The standard input.
        is_heavy: Whether it takes long, and is left out of `make test`.
    """

    name: str
    make: Callable[[Path], Sequence[object]]
    says: str
    code: int = 1
    stdin: str = ""
    is_heavy: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: The exit code.
        stdout: The standard output.
        stderr: The standard error.
        seconds: The CPU time, which depends little on other programs.
        megabytes: The peak memory (10^6 bytes).
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    megabytes: float


def run(arguments: Sequence[object], folder: Path, stdin: str = "") -> Outcome:
    """Run `taskvec` in a folder, in a new process, for at most a minute."""
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
    """Polls the system for the CPU time and the peak memory of a process until it ends.

    wait4 is not used, since its figure includes the memory of the process that started it.
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
            if found is None:  # it has ended, but has not been waited for
                return
            self.megabytes = max(self.megabytes, int(found[1]) * 1024 / 1e6)
            time.sleep(0.004)


def problems(attack: Attack, outcome: Outcome, before: dict[str, bytes | str], folder: Path) -> list[str]:
    """Return a description of each way in which an outcome is not as required.

    Args:
        attack: The attack.
        outcome: How its command ended.
        before: The snapshot of the folder before the command.
        folder: The folder.
    """
    found = []
    sentence, _, more = outcome.stderr.partition("\n")
    if outcome.code != attack.code:
        found.append(f"exit code {outcome.code}, not {attack.code}: {outcome.stderr[-300:]}")
    if attack.code:
        if not sentence.startswith("taskvec: ") or more:
            found.append(f"not one sentence: {outcome.stderr[:300]!r}")
        if "unexpected" in sentence or "Traceback" in outcome.stderr:
            found.append("an unexpected error")
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
    """Return a description of each limit that an outcome exceeds."""
    found = []
    if outcome.seconds > SECONDS:
        found.append(f"{outcome.seconds:.1f} s, at most {SECONDS:.0f} are allowed")
    if outcome.megabytes > MEGABYTES:
        found.append(f"{outcome.megabytes:.0f} MB, at most {MEGABYTES:.0f} are allowed")
    return found
