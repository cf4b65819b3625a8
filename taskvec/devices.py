"""Selection of the device by name. Importing this module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .arguments import instance, said
from .errors import UsageError
from .packages import require

if TYPE_CHECKING:
    import torch

# types of torch.device that transformers' Trainer supports
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "npu", "hpu", "mlu", "musa")


def check_device(choice: str) -> None:
    """Check the name of a device, without checking that the device exists.

    Args:
        choice: One of DEVICES. All but "auto" may have a number, such as "cuda:1".

    Raises:
        UsageError: It is something else.
    """
    instance("`device`", choice, str)
    kind, colon, number = choice.partition(":")
    numbered = kind != "auto" and number.isascii() and number.isdecimal() and len(number) <= 3
    if kind not in DEVICES or (colon and not numbered):
        raise UsageError(
            f"`device` is one of {', '.join(DEVICES)}, or has a number such as cuda:1, found {said(choice)}"
        )


def device_of(choice: str) -> torch.device:
    """Return the device of a name; "auto" is an accelerator if one is available, else the CPU.

    Args:
        choice: As in `check_device`.

    Raises:
        UsageError: The name is invalid, torch is not installed, or there is no such device.
    """
    check_device(choice)
    require(f"`device={choice}`", "train", "torch")
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = {"cpu": 1}
    if found is not None:
        there[found.type] = torch.accelerator.device_count()
    if choice == "auto":
        return found or torch.device("cpu")
    kind, _, number = choice.partition(":")
    if int(number or 0) >= there.get(kind, 0):
        names = [f"{one}:{place}" for one, count in there.items() for place in range(count) if one != "cpu"]
        raise UsageError(f"there is no device {choice} here: torch finds {', '.join(['cpu', *names])}")
    return torch.device("cpu" if kind == "cpu" else choice)
