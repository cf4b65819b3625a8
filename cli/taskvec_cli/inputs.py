"""Arguments and options that name inputs: models, `.lota` files and data."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer


def file_path(text: str) -> Path:
    """Parse the path of an input.

    The Path of an empty text is the current folder, so the check is made on the text.

    Raises:
        typer.BadParameter: If the text is empty.
    """
    if not text:
        raise typer.BadParameter(f"expected a path, found {text!r}")
    return Path(text)


def data_path(text: str) -> Path:
    """Parse the path or Hub id of data.

    Raises:
        typer.BadParameter: If the text is empty.
        UsageError: If the text is a local path that does not exist.
    """
    from taskvec.data.sources import data_path as path_of

    if not text:
        raise typer.BadParameter(f"expected a path or a Hub id, found {text!r}")
    return path_of(text)


def named_data(text: str) -> tuple[str, Path]:
    """Parse NAME=DATA, or DATA, whose name is its text.

    Raises:
        typer.BadParameter: If the data is empty.
        UsageError: If the data is a local path that does not exist.
    """
    name, equals, rest = text.partition("=")
    if equals and _NAME.fullmatch(name) and not Path(text).exists():
        return name, data_path(rest)
    return text, data_path(text)


def model_name(text: str) -> str:
    """Parse the path or Hub id of a model.

    Raises:
        typer.BadParameter: If the text is empty.
    """
    if not text:
        raise typer.BadParameter(f"expected a path or a Hub id, found {text!r}")
    return text


_NAME = re.compile(r"[\w.-]+")
# keyword arguments of typer.Argument and typer.Option for inputs
PATH: dict[str, Any] = {"parser": file_path, "show_default": False}
NAMED_DATA: dict[str, Any] = {"parser": named_data, "metavar": "DATA", "show_default": False}
DATA_PATH: dict[str, Any] = {"parser": data_path, "show_default": False}
MODEL: dict[str, Any] = {"parser": model_name, "show_default": False}
# help texts
ANY_MODEL = "a model folder, a .safetensors file or a Hub id."
DATA = "A file of JSON lines, JSON, CSV or Parquet, a folder of such files, or a Hub id such as org/name:split."
DEVICE = "auto (an accelerator if available), or a name such as cpu, cuda, cuda:1, mps or xpu."
LotaInput = Annotated[
    Path, typer.Argument(metavar="VECTOR", help="The .lota file, or user/repo/file.lota on the Hub.", **PATH)
]
LotaInputs = Annotated[
    list[Path],
    typer.Argument(metavar="VECTORS", help="One or more .lota files, or user/repo/file.lota on the Hub.", **PATH),
]
