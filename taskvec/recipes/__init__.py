"""Merge files of mergekit: read, checked, and computed tensor by tensor."""

from .recipe import Recipe
from .writing import RecipeMerge, Written

__all__ = ["Recipe", "RecipeMerge", "Written"]
