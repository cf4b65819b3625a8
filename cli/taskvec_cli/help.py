"""How the commands parse numbers, and how their help is printed."""

import re

# rich is imported inside the functions: it takes longer to import than a command that prints no help needs to start
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

_LIST = re.compile(r"<(?:list\[)?(\w+)\]?>")
# type of the error of pydantic, which typer parses numbers with -> what was expected
_EXPECTED = {"int_parsing": "a whole number", "float_parsing": "a number"}


class Command(TyperCommand):
    """A command whose help shows every type and default in the same form, and `--help` as a switch like the others."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for each in self.params:
            if isinstance(each, TyperOption) and isinstance(each.show_default, str):
                # typer puts parentheses around a default that is described in words
                setattr(each, "_get_default_string", lambda *, words=each.show_default, **_: words)  # noqa: B010
            if (display := getattr(each, "display_type", None)) is not None:
                setattr(each, "display_type", lambda ctx, display=display: _of_one(display(ctx)))  # noqa: B010

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters of the command, including `--help`."""
        parameters = super().get_params(ctx)
        for each in parameters:
            if each is self.get_help_option(ctx):
                each.metavar = ""
        return parameters

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words of the usage line. Arguments that are required are not in braces."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line. An error about a number contains the text that was found."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            errors = getattr(error.__cause__, "errors", None)
            if errors is not None and (expected := _EXPECTED.get(errors()[0]["type"])):
                error.message = f"expected {expected}, found {errors()[0]['input']!r:.80}"
            raise


def _of_one(kind: str) -> str:
    """Return the type of one value: <path> for <list[Path]>, since each use of an option takes one value."""
    return _LIST.sub(lambda found: f"<{found[1].lower()}>", kind)


class Commands(TyperGroup):
    """The group of all commands. It renders its help with rich, since typer would load a slow Markdown parser."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help of `taskvec`: its options and a table of the commands."""
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table

        # the names of --help are a set
        options = [(", ".join(sorted(option.opts)), getattr(option, "help", "")) for option in self.get_params(ctx)]
        commands = [(name, command.short_help) for name, command in self.commands.items()]
        console = Console(highlight=False)
        console.print(f"\n Usage: {ctx.command_path} [OPTIONS] COMMAND [ARGS]...\n\n {self.help}\n", markup=False)
        for title, rows in (("Options", options), ("Commands", commands)):
            table = Table.grid(padding=(0, 2))
            for name, text in rows:
                table.add_row(f"[bold cyan]{name}[/]", text)
            console.print(Panel(table, title=title, title_align="left", border_style="dim"))
