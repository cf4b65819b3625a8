"""Every attack."""

from . import Attack, files

ATTACKS: list[Attack] = [*files.ATTACKS]
