"""docs/cli.md describes the commands as they are."""

from __future__ import annotations

from support.paths import ROOT

from taskvec_cli.reference import reference


def test_the_reference_is_that_of_the_commands() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference(), "make docs writes it anew"
