"""The option `--config`: options of a command from a file. Options on the command line take precedence."""

from __future__ import annotations

from inspect import signature, unwrap
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from .inputs import file_path

if TYPE_CHECKING:
    from taskvec.training.config import Config
    from taskvec_formats import Checkpoint

# only accepted on the command line; an untrusted file must not be able to set trust_remote_code, which runs code
_COMMAND_LINE_ONLY = {"config", "resume", "force", "json", "as_json", "dry_run", "trust_remote_code"}


class Rate:
    """The type of a learning rate in the type hints of commands: a number or "auto"."""


RATE = "FLOAT|auto"  # how the help shows that type


def rate_of(text: str) -> Any:
    """Parse a learning rate.

    Args:
        text: A number or "auto".

    Returns:
        The number as a float, or "auto".

    Raises:
        typer.BadParameter: If the text is neither.
    """
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number or auto, found {text!r}") from None


def _kind(hint: Any) -> str:
    """Return the kind of value that a file may give for a parameter with this type hint; paths are given as text."""
    kinds = [hint] if get_origin(hint) is list else [each for each in get_args(hint) or (hint,) if each is not NoneType]
    if get_origin(kinds[0]) is list:
        return "numbers" if get_args(kinds[0]) == (float,) else "list"
    return {bool: "bool", int: "int", float: "float", Rate: "rate"}.get(kinds[0], "str")


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Read the file of `--config` and make its options the defaults of the command."""
    if path is not None and not context.resilient_parsing:
        from taskvec.training.config import Config

        assert context.command.callback is not None
        hints = get_type_hints(unwrap(context.command.callback))
        kinds = {
            name: _kind(hint) for name, hint in hints.items() if name not in {"context", "return", *_COMMAND_LINE_ONLY}
        }
        context.obj = Config.read(path, kinds, _COMMAND_LINE_ONLY)
        context.default_map = dict(context.obj.settings)
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        parser=file_path,
        help="Read options from a YAML file, or from a .lota file written by taskvec train. "
        "Options on the command line take precedence.",
        show_default=False,
        callback=_read,
        is_eager=True,
    ),
]


def settle(context: typer.Context, flags: dict[str, Any]) -> set[str]:
    """Reset options of the file that are replaced by another option on the command line, such as `steps` by `epochs`.

    Args:
        context: The context of the command.
        flags: Option name -> value; changed in place.

    Returns:
        The names of the parameters that were set on the command line or by a YAML file, to any value, even the default;
        or by a `.lota` file, whose record lists every option, to a value other than the default.
    """
    from taskvec.training.config import RIVALS

    def source(name: str) -> str:
        found = context.get_parameter_source(name)
        return "" if found is None else found.name

    assert context.command.callback is not None
    parameters = signature(unwrap(context.command.callback)).parameters
    by_file = {name for name in context.params if source(name) == "DEFAULT_MAP"}
    for pair in RIVALS:
        for one, other in (pair, pair[::-1]):
            if source(one) == "COMMANDLINE" and other in by_file:
                flags[other] = parameters[other].default
                by_file.remove(other)
    values = {**context.params, **flags}
    config: Config | None = context.obj
    if config is not None and config.record is not None:
        by_file = {name for name in by_file if values[name] != parameters[name].default}
    # false in a file is what leaving a flag out is on the command line
    by_file = {name for name in by_file if values[name] is not False}
    return by_file | {name for name in context.params if source(name) not in {"", "DEFAULT", "DEFAULT_MAP"}}


def compare(context: typer.Context, base: Checkpoint, data: Path, request: dict[str, Any]) -> None:
    """Print a warning for each difference between a run and the recorded run that `--config` names.

    Args:
        context: The context of the command.
        base: The base of the run.
        data: Its training data.
        request: The arguments of `taskvec.training.train.train` that name further files to read.

    Raises:
        UsageError: If the recorded run read a file that this run does not read.
    """
    config: Config | None = context.obj
    if config is None:
        return
    from . import render
    from .failure import with_flags

    config.check_given(**request)
    for difference in config.differences(base, data, **request):
        sentence = with_flags(difference, context.params)
        render.say(f"taskvec: warning: this run differs from that of {config.path}: {sentence}", err=True)
