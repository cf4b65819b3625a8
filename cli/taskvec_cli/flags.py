"""Groups of options of a command, each declared as a class.

A command with dozens of options takes them as keyword arguments, `**flags`. The class that describes them has one
attribute per option, with the annotation and the default that typer reads.
"""

import inspect
from collections.abc import Callable
from typing import TypeVar, get_type_hints

Command = TypeVar("Command", bound=Callable[..., None])


def takes(group: type) -> Callable[[Command], Command]:
    """Declare the options of a group as parameters of a command.

    In the signature that typer reads, they stand before the command's keyword-only parameters.

    Args:
        group: The class that describes the options.

    Returns:
        A decorator for a command that takes the options as `**flags`.
    """

    def declare(command: Command) -> Command:
        own = inspect.signature(command)
        parameters = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
        before = sum(each.kind is not each.KEYWORD_ONLY for each in parameters)
        parameters[before:before] = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(group, name), annotation=hint)
            for name, hint in get_type_hints(group, include_extras=True).items()
        ]
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return declare
