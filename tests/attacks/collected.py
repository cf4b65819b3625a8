"""Every attack."""

from . import Attack, files, recipes, slips

ATTACKS: list[Attack] = [*files.ATTACKS, *recipes.ATTACKS, *slips.ATTACKS]
