"""How the help of the commands is printed."""

# rich is imported inside the functions: it takes longer to import than a command that prints no help needs to start
from typing import Any

from typer.core import TyperCommand, TyperGroup, TyperOption


class Command(TyperCommand):
    """A command whose help shows every default in the same form, and `--help` as a switch like the others."""

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters of the command, including `--help`."""
        parameters = super().get_params(ctx)
        for each in parameters:
            if isinstance(each, TyperOption) and isinstance(each.show_default, str):
                # typer puts parentheses around a default that is described in words
                setattr(each, "_get_default_string", lambda *, words=each.show_default, **_: words)  # noqa: B010
            if each is self.get_help_option(ctx):
                each.metavar = ""
        return parameters


class Commands(TyperGroup):
    """The group of all commands. It renders its help with rich, since typer would load a slow Markdown parser."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help of `taskvec`: its options and a table of the commands."""
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table

        options = [(", ".join(option.opts), getattr(option, "help", "")) for option in self.get_params(ctx)]
        commands = [(name, command.short_help) for name, command in self.commands.items()]
        console = Console(highlight=False)
        console.print(f"\n Usage: {ctx.command_path} [OPTIONS] COMMAND [ARGS]...\n\n {self.help}\n", markup=False)
        for title, rows in (("Options", options), ("Commands", commands)):
            table = Table.grid(padding=(0, 2))
            for name, text in rows:
                table.add_row(f"[bold cyan]{name}[/]", text)
            console.print(Panel(table, title=title, title_align="left", border_style="dim"))
