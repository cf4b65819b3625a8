"""The list of all attacks."""

from . import Attack, bombs, files, recipes, slips

ATTACKS: list[Attack] = [*files.ATTACKS, *bombs.ATTACKS, *recipes.ATTACKS, *slips.ATTACKS]
