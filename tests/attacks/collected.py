"""Every attack."""

from . import Attack, bombs, files

ATTACKS: list[Attack] = [*files.ATTACKS, *bombs.ATTACKS]
