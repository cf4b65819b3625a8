"""The part of a provenance that names the parents and ancestors of a vector.

A vector that is made of others records

    parents             a list of {name, digest}, with the weight if there is one
    ancestors           digest -> the facts of that vector: its provenance without its own ancestors
    ancestors_left_out  the number of facts that did not fit; absent if there are none
    hub_base            where the base can be downloaded, if a parent records it (`taskvec.hub.base`)

Each ancestor is listed once, regardless of how many paths lead to it, the nearest first, within the limits ANCESTORS
and BYTES. A record therefore does not grow with the number of generations.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from taskvec_formats import Identity

from ..arguments import said
from ..errors import UsageError
from ..hub.base import inherited

ANCESTORS = 64
BYTES = 1 << 16  # the largest size of the JSON of all ancestors
NAME = 160
# the limits of a stored provenance: a reader refuses a description of 2^22 bytes
_STORED_BYTES = (1 << 22) - (1 << 14)
_STORED_DEPTH = 400
_LINK = ("name", "digest", "weight")

Facts = dict[str, Any]


class Parent(Protocol):
    """A vector that another vector is made of."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def base(self) -> Identity: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...


def lineage(parents: Sequence[Parent], weights: Sequence[float] | None = None) -> Facts:
    """Return the part of a provenance that describes what a vector is made of.

    The same parents in the same order give the same record.

    Args:
        parents: The vectors that it is made of.
        weights: One weight per parent, or None.

    Raises:
        UsageError: The provenance of a parent cannot be represented as JSON.
    """
    links = [{"name": shortened(parent.name), "digest": parent.digest} for parent in parents]
    record: Facts = {
        "parents": links
        if weights is None
        else [{**link, "weight": weight} for link, weight in zip(links, weights, strict=True)]
    }
    found = _ancestors(parents)
    kept: Facts = {}
    room = BYTES
    for digest, facts in found[:ANCESTORS]:
        size = len(_json("an ancestor", {digest: facts}))
        if size <= room:
            kept[digest] = facts
            room -= size
    # parents may have left out the same ancestors, so only the largest of their counts is added
    before = (parent.provenance.get("ancestors_left_out") for parent in parents)
    left_out = len(found) - len(kept) + max((count for count in before if type(count) is int and count > 0), default=0)
    record |= inherited(parents)
    return record | ({"ancestors": kept} if kept else {}) | ({"ancestors_left_out": left_out} if left_out else {})


def _ancestors(parents: Sequence[Parent]) -> list[tuple[str, Facts]]:
    """Return the facts of all vectors that the parents know of, including themselves, nearest first, each with its key.

    The key is the digest. Vectors with the same content but different provenance share a digest: the second and later
    ones have their number after a colon.
    """
    known: dict[str, list[Facts]] = {}
    distinct = {(parent.digest, id(parent.provenance)): parent for parent in parents}.values()
    for parent in distinct:
        _learn(known, parent.digest, parent.provenance)
    for parent in distinct:
        table = parent.provenance.get("ancestors")
        for key, facts in (table if isinstance(table, dict) else {}).items():
            if isinstance(facts, dict):
                _learn(known, key.partition(":")[0], facts)
    found: list[tuple[str, Facts]] = []
    waiting = deque(parent.digest for parent in distinct)
    while waiting:
        digest = waiting.popleft()
        for number, facts in enumerate(known.pop(digest, ()), 1):
            found.append((digest if number == 1 else f"{digest}:{number}", facts))
            waiting.extend(link["digest"] for link in _links(facts))
    return found


def _learn(known: dict[str, list[Facts]], digest: str, provenance: Mapping[str, Any]) -> None:
    """Add the facts of one vector, and those of its parents if they are nested in it, as in older files."""
    waiting = [(digest, provenance)]
    while waiting:
        digest, provenance = waiting.pop()
        facts = {key: value for key, value in provenance.items() if key not in ("ancestors", "ancestors_left_out")}
        nested = [(link["digest"], inside) for link in _links(facts) if (inside := _split(link)[1])]
        if nested:
            facts["parents"] = [_split(parent)[0] if _is_link(parent) else parent for parent in facts["parents"]]
            waiting += nested
        same = known.setdefault(digest, [])
        if facts and facts not in same[:ANCESTORS]:  # later ones are not kept, so duplicates do not matter
            same.append(facts)


def _split(link: Facts) -> tuple[Facts, Facts]:
    """Split a link into the identification of a parent and the facts nested in it."""
    own = {key: link[key] for key in _LINK if key in link}
    return own, {key: value for key, value in link.items() if key not in _LINK}


def _links(facts: Facts) -> Iterator[Facts]:
    parents = facts.get("parents")
    return filter(_is_link, parents if isinstance(parents, list) else ())


def _is_link(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("digest"), str)


def shortened(name: str) -> str:
    """Return a name as valid Unicode of at most NAME characters."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= NAME else f"{text[: NAME - 3]}..."


def joined(names: Iterable[str], sign: str) -> str:
    """Join names into one, cut as in `shortened`.

    Args:
        names: The names. Only as many are consumed as fit.
        sign: The separator.
    """
    parts: list[str] = []
    length = 0
    for name in names:
        parts.append(name)
        length += len(name) + len(sign)
        if length > NAME + len(sign):
            break
    return shortened(sign.join(parts))


def stored_text(what: str, provenance: Mapping[str, Any]) -> str:
    """Return a provenance as the JSON text that a file stores.

    Args:
        what: The name of the vector, for the error message.
        provenance: The provenance.

    Raises:
        UsageError: The provenance cannot be stored.
    """
    what = shortened(what)
    _check(what, provenance)
    text = _json(what, provenance)
    if len(text) > _STORED_BYTES:
        raise UsageError(f"the provenance of {what} takes {len(text):,} bytes, at most {_STORED_BYTES:,} can be stored")
    return text


def _json(what: str, document: Any) -> str:
    try:
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the provenance of {what} is not JSON: {error}") from None


def _check(what: str, provenance: object) -> None:
    """Raise UsageError for a value that JSON cannot represent, or would change."""
    open_values: list[Iterator[object]] = [iter((provenance,))]
    count = 0
    while open_values:
        for value in open_values[-1]:
            count += 1
            if 2 * count > _STORED_BYTES:  # a value and a comma; a shared part is written once per occurrence
                raise UsageError(f"the provenance of {what} is too large to be stored")
            inner = _inside(what, value)
            if inner is not None:
                open_values.append(inner)
                if len(open_values) > _STORED_DEPTH:
                    raise UsageError(
                        f"the provenance of {what} is nested more than {_STORED_DEPTH} levels deep, or contains itself"
                    )
                break
        else:
            open_values.pop()


def _inside(what: str, value: object) -> Iterator[object] | None:
    """Return the values in a JSON container, or None for a scalar."""
    if isinstance(value, dict):
        return iter([part for pair in value.items() for part in (_key(what, pair[0]), pair[1])])
    if isinstance(value, (list, tuple)):
        return iter(value)
    if isinstance(value, str):
        _text(what, value)
    elif isinstance(value, float):
        if value - value != 0:
            raise UsageError(f"the provenance of {what} contains {value}, which JSON cannot represent")
    elif isinstance(value, int):
        if value.bit_length() > 1024:
            raise UsageError(f"the provenance of {what} contains {said(value)}, which is too large for JSON")
    elif value is not None:
        raise UsageError(f"the provenance of {what} contains {said(value)}: expected a JSON value")
    return None


def _key(what: str, key: object) -> str:
    if not isinstance(key, str):
        raise UsageError(f"the provenance of {what} has the key {said(key)}: expected a string")
    return key


def _text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the provenance of {what} contains {said(text)}, which is not valid Unicode text") from None
