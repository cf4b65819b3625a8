"""Comparison of the tokenizers of vectors before a merge: every token must have the same number in all of them.

If a token has different numbers, one row of the embeddings represents two tokens, and the sum of two such rows
represents neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, zip_longest
from typing import Any, Protocol

from taskvec_formats import Checkpoint, SideFile
from taskvec_formats.file_names import INDEX

from ..errors import MergeError, TokenizerError

FAST, WORDS, LINES, ADDED, MERGES = "tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json", "merges.txt"
# models of SentencePiece, which are compared by their bytes only
OPAQUE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# (names of a tokenizer's main file, names of the files that complete it), in order of preference
_KINDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    ((FAST,), ()),
    ((WORDS,), (MERGES, ADDED)),
    ((LINES,), (ADDED,)),
    (OPAQUE, (ADDED,)),
)
# files for which a difference between vectors gives a note
_NOTED = (FAST, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
_IN_BASE = "in base"
# every file that belongs to a tokenizer
TOKENIZER_FILES: tuple[str, ...] = (
    *(name for kind, more in _KINDS for name in (*kind, *more)),
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class Files(Protocol):
    """The side files of a model."""

    def files(self) -> Sequence[SideFile] | None:
        """The files. None if they are those of the base."""


class Parent(Protocol):
    """A model of a merge: a vector, or anything else with a name and side files."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> Files: ...


@dataclass(frozen=True)
class Agreement:
    """What the vectors of a merge have in common besides their weights.

    Attributes:
        carried: The files that all vectors changed in the same way, sorted by name. The index of the shards is never
            included.
        notes: One sentence for each tokenizer, template or generation config in which vectors differ, and for each pair
            of tokenizers that could not be compared.
    """

    carried: list[SideFile]
    notes: list[str]


def vocabulary(files: Mapping[str, bytes]) -> Mapping[str, int] | None:
    """The vocabulary of a tokenizer.

    It is read from tokenizer.json, or from vocab.json or vocab.txt if that is missing, with added_tokens.json.

    Args:
        files: File name -> content.

    Returns:
        Token -> number, or None if the files do not contain a vocabulary that can be read.

    Raises:
        TokenizerError: A file does not have the expected content.
    """
    return _parse(files)[0]


def compare_tokenizers(
    vectors: Sequence[Parent], base: Checkpoint | None = None, outcome: str = "the base's is written"
) -> Agreement:
    """Compare the tokenizers of vectors with one another, and with that of the base if it will be written.

    Files may differ in their bytes as long as the tokens, their numbers and the merges are the same. A vector that
    lists no files of its own has the base's. A checkpoint without a tokenizer agrees with any.

    Args:
        vectors: The vectors to merge.
        base: Their base, or None if it is not available.
        outcome: What becomes of a file that differs, for the notes.

    Returns:
        The common files, and notes on differences.

    Raises:
        MergeError: Two tokenizers differ. The error names their owners and the first difference.
        TokenizerError: A file does not have the expected content. The error names its owner.
    """
    listed = [vector.source.files() for vector in vectors]
    in_base = None if base is None or not base.is_folder else _read(base, listed)
    owners = [_Owner(vector.name, _filled(files, in_base)) for vector, files in zip(vectors, listed, strict=True)]
    names = {name for owner in owners for name in owner.tokenizer}
    alike = all(len({_state(files, name, in_base) for files in listed}) == 1 for name in names)
    if base is not None and in_base is not None and not alike:
        # the base's tokenizer is written unless all vectors have the same files
        owners.append(_Owner(base.name, in_base))
    notes = [note for pair in combinations(owners, 2) if (note := _compare(*pair))]
    carried = []
    for name in sorted({file.name for files in listed for file in files or ()} - {INDEX}):
        states = [_state(files, name, in_base) for files in listed]
        first = next((i for i, state in enumerate(states) if state not in (None, _IN_BASE)), None)
        if first is None:
            continue
        other = next((i for i, state in enumerate(states) if state != states[first]), None)
        if other is None:
            carried += [file for file in listed[first] or () if file.name == name]
        elif name in _NOTED:
            one, two = (vectors[i].name for i in sorted((first, other)))
            notes.append(f"{name} differs between {one} and {two}; {outcome}")
    return Agreement(carried, notes)


def check_tokenizers(parents: Sequence[Parent]) -> list[str]:
    """Compare the tokenizers of vectors for a merge that is stored as a `.lota` file, which has no side files.

    Args:
        parents: The vectors to merge.

    Returns:
        The notes of `compare_tokenizers`, and a note on files that are left out.

    Raises:
        MergeError, TokenizerError: As in `compare_tokenizers`.
    """
    agreement = compare_tokenizers(parents, outcome="the merged vector contains neither")
    names = ", ".join(file.name for file in agreement.carried)
    shared = [f"the vectors share {names}, which only a merge to a model folder writes"] if names else []
    return [*agreement.notes, *shared]


# vocabulary, or None if it cannot be read; pairs to merge, in order, or None if there are none; added tokens
_Parsed = tuple[Mapping[str, int] | None, list[tuple[str, ...]] | None, Mapping[str, int]]


@dataclass(frozen=True)
class _Owner:
    """The vector or base that has certain files.

    Attributes:
        name: Its name, for errors.
        files: File name -> file. None if they are those of a base that is not available.
    """

    name: str
    files: Mapping[str, SideFile] | None

    @cached_property
    def tokenizer(self) -> dict[str, SideFile]:
        """The files that define the tokens."""
        held = self.files or {}
        for kind, more in _KINDS:
            if any(name in held for name in kind):
                return {name: held[name] for name in (*kind, *more) if name in held}
        return {}

    @property
    def is_opaque(self) -> bool:
        """Whether the files have a format whose tokens cannot be read."""
        return not self.tokenizer.keys().isdisjoint(OPAQUE)

    @property
    def contents(self) -> dict[str, bytes] | None:
        """The contents of the tokenizer files. None if one is the base's, which is not available."""
        known = {name: file.content for name, file in self.tokenizer.items() if file.content is not None}
        return known if known.keys() == self.tokenizer.keys() else None

    @cached_property
    def parsed(self) -> _Parsed:
        """The parsed tokenizer. A TokenizerError names the owner."""
        try:
            return _parse(self.contents or {})
        except TokenizerError as error:
            raise TokenizerError(f"{self.name}: {error}") from None

    def is_of_base(self) -> bool:
        """Whether the tokenizer is that of a base that is not available."""
        return self.files is None or all(file.content is None for file in self.tokenizer.values())


def _read(base: Checkpoint, listed: Sequence[Sequence[SideFile] | None]) -> dict[str, SideFile]:
    """Read the base's tokenizer files, and those of its files that vectors list."""
    wanted = {name for kind, more in _KINDS for name in (*kind, *more)} | set(_NOTED)
    wanted |= {file.name for files in listed for file in files or ()}
    found = {}
    for path in base.side_files:
        if path.name in wanted:
            content = path.read_bytes()
            found[path.name] = SideFile(path.name, hashlib.sha256(content).hexdigest(), content)
    return found


def _filled(files: Sequence[SideFile] | None, in_base: Mapping[str, SideFile] | None) -> Mapping[str, SideFile] | None:
    """The files of a vector by name. Files that it did not change are taken from the base, if available."""
    if files is None:
        return in_base
    held = in_base or {}
    return {file.name: held.get(file.name, file) if file.content is None else file for file in files}


def _state(files: Sequence[SideFile] | None, name: str, in_base: Mapping[str, SideFile] | None) -> str | None:
    """The state of a vector's file: its SHA-256 if it was changed, _IN_BASE if it was not, None if it is missing."""
    if files is None:
        return _IN_BASE
    for file in files:
        if file.name == name:
            unchanged = file.content is None or (in_base and name in in_base and in_base[name].sha256 == file.sha256)
            return _IN_BASE if unchanged else file.sha256
    return None


def _compare(one: _Owner, other: _Owner) -> str | None:
    """Raise MergeError if two tokenizers differ. Return a note if they cannot be compared."""
    if one.files is None or other.files is None:
        return (
            None
            if one.is_of_base() and other.is_of_base()
            else _unproven(one, other, "the base's files are not available")
        )
    if not one.tokenizer or not other.tokenizer or _digests(one) == _digests(other):
        return None
    shared = [name for name in OPAQUE if name in one.files and name in other.files]
    for name in shared:
        if (one.is_opaque or other.is_opaque) and one.files[name].sha256 != other.files[name].sha256:
            raise MergeError(f"{name} differs between {one.name} and {other.name}")
    if one.contents is None or other.contents is None:
        return _unproven(one, other, "the base's files are not available")
    (words, merges, added), (other_words, other_merges, other_added) = one.parsed, other.parsed
    if words is not None and other_words is not None:
        _check_tokens(one, other, words, other_words)
        _check_merges(one, other, merges, other_merges)
        return None
    if words is None and other_words is None:
        _check_tokens(one, other, added, other_added)
    return None if shared else _unproven(one, other, "they are of different kinds")


def _unproven(one: _Owner, other: _Owner, why: str) -> str:
    return f"the tokenizers of {one.name} and {other.name} cannot be compared: {why}"


def _digests(owner: _Owner) -> dict[str, str]:
    return {name: file.sha256 for name, file in owner.tokenizer.items()}


def _check_tokens(one: _Owner, other: _Owner, left: Mapping[str, int], right: Mapping[str, int]) -> None:
    """Raise MergeError at the token of lowest number that differs."""
    if left == right:
        return
    token, _ = min(left.items() ^ right.items(), key=lambda item: (item[1], item[0]))
    if token in left and token in right:
        raise MergeError(f"token {token!r} is {left[token]} in {one.name} and {right[token]} in {other.name}")
    owner, lacking = (one, other) if token in left else (other, one)
    raise MergeError(f"token {token!r} is in {owner.name} but not in {lacking.name}")


def _check_merges(
    one: _Owner, other: _Owner, left: list[tuple[str, ...]] | None, right: list[tuple[str, ...]] | None
) -> None:
    """Raise MergeError at the first merge that differs."""
    if left is None or right is None or left == right:
        return
    number, (mine, theirs) = next((i, pair) for i, pair in enumerate(zip_longest(left, right)) if pair[0] != pair[1])
    shown = [f"{' '.join(pair)!r}" if pair else "missing" for pair in (mine, theirs)]
    raise MergeError(f"merge {number} of the tokenizer is {shown[0]} in {one.name} and {shown[1]} in {other.name}")


def _parse(files: Mapping[str, bytes]) -> _Parsed:
    if FAST in files:
        return _parse_fast(_json(files, FAST))
    added = _numbers(_json(files, ADDED), ADDED) if ADDED in files else {}
    if WORDS in files:
        return {**_numbers(_json(files, WORDS), WORDS), **added}, _merged_lines(files), added
    if LINES in files:
        return {**{token: number for number, token in enumerate(_lines(files, LINES))}, **added}, None, added
    return None, None, added


def _parse_fast(document: Any) -> _Parsed:
    """Parse a tokenizer.json: https://huggingface.co/docs/tokenizers/api/models."""
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict):
        raise TokenizerError(f"{FAST}: expected an object with a model, found {document!r:.80}")
    words = model.get("vocab")
    if isinstance(words, list):  # Unigram: [token, score] pairs
        if not all(isinstance(pair, list) and pair and isinstance(pair[0], str) for pair in words):
            raise TokenizerError(f"{FAST}: a vocabulary should be a list of tokens and scores, found {words!r:.80}")
        words = {pair[0]: number for number, pair in enumerate(words)}
    tokens, merges = document.get("added_tokens") or [], model.get("merges")
    if not isinstance(tokens, list) or not all(isinstance(each, dict) and "content" in each for each in tokens):
        raise TokenizerError(f"{FAST}: added_tokens should be a list of tokens, found {tokens!r:.80}")
    if not isinstance(merges, list | None) or not all(isinstance(pair, str | list) for pair in merges or ()):
        raise TokenizerError(f"{FAST}: merges should be a list of pairs, found {merges!r:.80}")
    added = _numbers({str(each["content"]): each.get("id") for each in tokens}, FAST)
    pairs = merges and [_pair(pair) if isinstance(pair, str) else tuple(map(str, pair)) for pair in merges]
    return {**_numbers(words, FAST), **added}, pairs, added


def _merged_lines(files: Mapping[str, bytes]) -> list[tuple[str, ...]] | None:
    return (
        [_pair(line) for line in _lines(files, MERGES) if not line.startswith("#version")] if MERGES in files else None
    )


def _pair(text: str) -> tuple[str, ...]:
    return tuple(text.split(" "))


def _json(files: Mapping[str, bytes], name: str) -> Any:
    try:
        return json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name} is not valid JSON: {error}") from None


def _numbers(words: Any, name: str) -> dict[str, int]:
    if not isinstance(words, dict):
        raise TokenizerError(f"{name}: a vocabulary should be an object, found {words!r:.80}")
    for token, number in words.items():
        if type(number) is not int or number < 0:
            raise TokenizerError(f"{name}: token {token!r:.80} should have a number, found {number!r:.80}")
    return words


def _lines(files: Mapping[str, bytes], name: str) -> list[str]:
    try:
        return files[name].decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{name} is not UTF-8: {error}") from None
