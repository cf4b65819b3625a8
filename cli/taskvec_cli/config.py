"""`--config`: options of a command from a file, below those on the command line."""

from __future__ import annotations

from inspect import signature, unwrap
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

if TYPE_CHECKING:
    from taskvec.training.config import Config
    from taskvec_formats import Checkpoint

# what a command is told each time; trust_remote_code lets code run, which no file of a stranger may ask for
_APART = {"config", "resume", "force", "json", "as_json", "dry_run", "trust_remote_code"}


class Rate:
    """What the type hints of commands call a learning rate: a number, or "auto"."""


RATE = "FLOAT|auto"  # in the help


def rate_of(text: str) -> Any:
    """The learning rate that a text says. Raises typer.BadParameter."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number or auto, found {text!r}") from None


def _kind(hint: Any) -> str:
    """What a file may say of a parameter, by its type: text where that is a path."""
    kinds = [hint] if get_origin(hint) is list else [each for each in get_args(hint) or (hint,) if each is not NoneType]
    if get_origin(kinds[0]) is list:
        return "list"
    return {bool: "bool", int: "int", float: "float", Rate: "rate"}.get(kinds[0], "str")


def _read(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None and not context.resilient_parsing:
        from taskvec.training.config import Config

        assert context.command.callback is not None
        hints = get_type_hints(unwrap(context.command.callback))
        kinds = {name: _kind(hint) for name, hint in hints.items() if name not in {"context", "return", *_APART}}
        context.obj = Config.read(path, kinds, _APART)
        context.default_map = dict(context.obj.settings)
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Options from a YAML file, or those of the run that wrote a .lota file; options given here win.",
        show_default=False,
        callback=_read,
        is_eager=True,
    ),
]


def settle(context: typer.Context, given: dict[str, Any]) -> set[str]:
    """Set what the file says back to its default where the command line gives an option that replaces it.

    Returns the names of what was set: on the command line, if only to the default, or by the file to something else.
    """
    from taskvec.training.config import RIVALS

    def source(name: str) -> str:
        found = context.get_parameter_source(name)
        return "" if found is None else found.name

    assert context.command.callback is not None
    parameters = signature(unwrap(context.command.callback)).parameters
    for pair in RIVALS:
        for one, other in (pair, pair[::-1]):
            if source(one) == "COMMANDLINE" and source(other) == "DEFAULT_MAP":
                given[other] = parameters[other].default
    by_file = {name for name in context.params if source(name) == "DEFAULT_MAP"}
    changed = {name for name in by_file if given[name] != parameters[name].default}
    return changed | {name for name in context.params if source(name) not in {"", "DEFAULT", "DEFAULT_MAP"}}


def compare(context: typer.Context, base: Checkpoint, data: Path, request: dict[str, Any]) -> None:
    """Warn where a run is not the one whose record --config names.

    request: the arguments of `taskvec.training.train.train` by which it reads files.
    Raises UsageError where the recorded run read a file that this one does not.
    """
    config: Config | None = context.obj
    if config is None:
        return
    from . import render
    from .failure import with_flags

    config.check_given(**request)
    for difference in config.differences(base, data, **request):
        render.say(
            f"taskvec: warning: not the run of {config.path}: {with_flags(difference, context.params)}", err=True
        )
