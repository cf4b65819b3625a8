"""Selection of tensors by patterns of their names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ..arguments import said
from ..errors import UsageError


def chosen(
    names: Collection[str], include: Sequence[str], exclude: Sequence[str], likely: Collection[str] | None = None
) -> list[str]:
    """Select the names that match one of `include`, or all if it is empty, and none of `exclude`.

    Patterns are those of fnmatch: `*` matches any characters, dots included. A pattern must match the whole name.

    Args:
        names: Tensor names.
        include: Patterns of names to select.
        exclude: Patterns of names to leave out.
        likely: The names that a message may suggest. None suggests any of `names`.

    Returns:
        The selected names, in their order.

    Raises:
        UsageError: A pattern matches nothing, or no name is left.
    """
    likely = names if likely is None else likely
    included = _matching("include", names, include, likely) if include else list(names)
    excluded = set(_matching("exclude", included, exclude, likely))
    left = [name for name in included if name not in excluded]
    if not left:
        given = "`include` and `exclude` leave" if include else "`exclude` leaves"
        raise UsageError(f"{given} no tensor to train")
    return left


def _matching(option: str, names: Collection[str], patterns: Sequence[str], likely: Collection[str]) -> list[str]:
    """The names that match a pattern, in their order."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            suggested = [name for name in names if name in likely] or names
            raise UsageError(
                f"`{option}` {said(pattern)} matches no tensor that would be trained{_near(pattern, suggested)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _near(pattern: str, names: Collection[str]) -> str:
    """The end of a message: patterns to suggest instead of one that matches nothing."""
    text = pattern.strip("*")
    inside = [name for name in names if text and text in name]
    if inside:
        return f": a pattern matches a whole name, such as {inside[0]!r}; try {said(f'*{text}*')}"
    whole, parts = set(names), {part for name in names for part in name.split(".")}
    near = get_close_matches(text.strip("."), sorted(whole | parts), n=3, cutoff=0.5) or list(names)[:3]
    return f"; near are {', '.join(said(each if each in whole else f'*{each}*') for each in near)}"
