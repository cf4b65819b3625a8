"""Merging: `merge`, and the methods it knows."""

from .merge import AUTO, merge
from .registry import METHODS, Method

__all__ = ["AUTO", "METHODS", "Method", "merge"]
