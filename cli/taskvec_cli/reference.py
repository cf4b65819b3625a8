"""docs/cli.md: the reference of all commands, made from the commands themselves.

Usage: python -m taskvec_cli.reference > docs/cli.md
"""

from __future__ import annotations

import sys

import typer
from typer.cli import get_docs_for_click

_HEAD = """# The command line

Made from the commands by `make docs`. `taskvec COMMAND --help` prints the same.

The exit code is 0 for success, 1 for failures, 2 for invalid requests, 130 after Ctrl-C and 143 after SIGTERM.

"""


def reference() -> str:
    """All commands with their arguments and options, as Markdown."""
    from .main import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="taskvec"), name="taskvec")
    _, _, body = text.partition("\n")  # without its title
    return _HEAD + "\n".join(line.rstrip() for line in body.strip().splitlines()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
