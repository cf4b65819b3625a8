"""Merge methods for task vectors, and the decorator that registers new ones."""

from ..vectors.align import Aligned, Part
from .methods.options import Bounds
from .registry import AUTO, METHODS, Method, merge_method
from .settings import Rule

__all__ = ["AUTO", "METHODS", "Aligned", "Bounds", "Method", "Part", "Rule", "merge_method"]
