"""Writes the tables of the committed results into docs/paper.md, and draws its plots.

Usage: python -m paper.document

A block of the page between <!-- WORLD/TABLE --> and <!-- end --> is what `paper.report` prints for that table;
<!-- WORLD/claims --> is the table of verdicts.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import tables
from .report import rendered, verdicts
from .scores import Results
from .store import Store
from .worlds import WORLDS

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"(<!-- ([\w-]+)/(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text: str) -> str:
    """Replace the blocks of a page by the tables of the committed results.

    Args:
        text: The page.

    Returns:
        The page with the tables of the results.
    """
    results = {name: Results(world, Store(RESULTS / f"{name}.jsonl")) for name, world in WORLDS.items()}

    def block(match: re.Match[str]) -> str:
        begin, name, what, end = match.groups()
        world = WORLDS[name]
        if what == "claims":
            content = verdicts(world, results[name])
        else:
            content = rendered(tables.read(what, world), results[name])
        return f"{begin}\n{content}\n\n{end}"

    return _BLOCK.sub(block, text)


def main() -> None:
    """Write the page and the plots."""
    from .plots import draw_all

    page = DOCS / "paper.md"
    page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw_all(RESULTS / "small.jsonl", DOCS / "paper")


if __name__ == "__main__":
    main()
