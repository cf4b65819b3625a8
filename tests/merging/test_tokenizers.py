"""Tokenizers are compared by their tokens, whatever their bytes; files that all vectors changed alike are found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.building import tensor, write_checkpoint
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from taskvec import Checkpoint, TaskVector, diff
from taskvec.errors import MergeError, TokenizerError
from taskvec.merging.tokenizers import Agreement, compare_tokenizers, vocabulary
from taskvec_formats import ModelFolder

Files = Mapping[str, bytes]
WEIGHTS = {"w": tensor("F32", [1, 2, 3])}


def encoded(document: Any, **how: Any) -> bytes:
    return json.dumps(document, **how).encode()


def fast(words: Any, merges: Any = None, added: Mapping[str, int] | None = None, **more: Any) -> bytes:
    """A tokenizer.json with what matters here."""
    tokens = [{"id": number, "content": token, "special": True} for token, number in (added or {}).items()]
    model = {"type": "BPE", "vocab": words} | ({} if merges is None else {"merges": merges})
    return encoded({"version": "1.0", "added_tokens": tokens, "model": model, **more})


WORDS = {"a": 0, "b": 1, "ab": 2, "<s>": 3}
FAST = {"tokenizer.json": fast(WORDS, ["a b"])}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", WEIGHTS, 1, {"config.json": b"{}", **FAST}).path


def vector(folder: Path, name: str, base: Path | Checkpoint, files: Files | None) -> TaskVector:
    """A fine-tune with these side files, None for one that is a lone file, as a `.lota` file."""
    before = base if isinstance(base, Checkpoint) else ModelFolder(base)
    tuned = write_checkpoint(folder / f"{name}-tuned", {"w": tensor("F32", [1, 2, 4])}, 1, files or {})
    if files is None:
        tuned = ModelFolder(tuned.shards[0].path)
    diff(before, tuned).save(folder / f"{name}.lota")
    return TaskVector.open(folder / f"{name}.lota")


def vectors(folder: Path, base: Path, *files: Files | None) -> list[TaskVector]:
    folder.mkdir(exist_ok=True)
    return [vector(folder, name, base, each) for name, each in zip("abc", files, strict=False)]


# one vocabulary


def trained(model: Any, trainer: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(["low lower newest widest ö new low"] * 3, trainer)
    tokenizer.add_tokens([AddedToken("<one>"), AddedToken("lo")])
    tokenizer.add_special_tokens(["<two>"])
    return tokenizer


REAL = {
    "bpe": (models.BPE(), trainers.BpeTrainer(vocab_size=40, show_progress=False)),
    "wordpiece": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=40, show_progress=False)),
    "unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=20, show_progress=False)),
    "wordlevel": (models.WordLevel(), trainers.WordLevelTrainer(show_progress=False)),
}


@pytest.mark.parametrize("kind", REAL)
def test_the_vocabulary_is_that_of_the_tokenizers_library(kind: str) -> None:
    tokenizer = trained(*REAL[kind])
    expected = tokenizer.get_vocab(with_added_tokens=True)
    assert len(expected) > 7
    assert vocabulary({"tokenizer.json": tokenizer.to_str().encode()}) == expected


def test_older_files_are_read_too() -> None:
    words, lines = encoded(WORDS), "a\nb\u2028\nö\n".encode()
    added = encoded({"<x>": 9, "a": 7})
    assert vocabulary({"vocab.json": words, "merges.txt": b"a b\n"}) == WORDS
    assert vocabulary({"vocab.json": words, "added_tokens.json": added}) == {**WORDS, "<x>": 9, "a": 7}
    assert vocabulary({"vocab.txt": lines}) == {"a": 0, "b\u2028": 1, "ö": 2}
    assert vocabulary({"vocab.txt": lines.replace(b"\n", b"\r\n")}) == {"a": 0, "b\u2028": 1, "ö": 2}
    assert vocabulary({"vocab.txt": b"a\n\nb", "added_tokens.json": added}) == {"a": 7, "": 1, "b": 2, "<x>": 9}
    assert vocabulary({"vocab.txt": b"b", "vocab.json": words, **FAST}) == WORDS
    for opaque in ("tokenizer.model", "spiece.model"):
        assert vocabulary({opaque: b"\x00", "config.json": b"{}"}) is None
    assert vocabulary({}) is None


BAD: dict[str, tuple[Files, str]] = {
    "half": ({"tokenizer.json": b'{"model": '}, "tokenizer.json is not valid JSON"),
    "no text": ({"tokenizer.json": b"\xff"}, "tokenizer.json is not valid JSON"),
    "deep": ({"tokenizer.json": b"[" * 100_000}, "tokenizer.json is not valid JSON"),
    "a list": ({"tokenizer.json": b"[]"}, r"tokenizer.json: expected an object with a model, found \[\]"),
    "no model": ({"tokenizer.json": b"{}"}, r"tokenizer.json: expected an object with a model, found \{\}"),
    "no vocabulary": ({"tokenizer.json": b'{"model": {}}'}, "vocabulary should be an object, found None"),
    "no number": ({"tokenizer.json": fast({"a": "0"})}, "token 'a' should have a number, found '0'"),
    "truth": ({"tokenizer.json": fast({"a": True})}, "token 'a' should have a number, found True"),
    "no pairs": ({"tokenizer.json": fast(["a"])}, r"a vocabulary should be a list of tokens and scores, found \['a'\]"),
    "no list": ({"tokenizer.json": fast({}, 5)}, "merges should be a list of pairs, found 5"),
    "no token": ({"tokenizer.json": fast({}, added_tokens=["a"])}, r"added_tokens should be a list .* found \['a'\]"),
    "vocab.json": ({"vocab.json": b"nan?"}, "vocab.json is not valid JSON"),
    "nested": ({"vocab.json": b'{"eng": {"a": 0}}'}, "vocab.json: token 'eng' should have a number"),
    "added": ({"vocab.txt": b"a", "added_tokens.json": b"[]"}, "added_tokens.json: a vocabulary should be an object"),
    "lines": ({"vocab.txt": b"\xff"}, "vocab.txt is not UTF-8"),
}


@pytest.mark.parametrize(("files", "message"), BAD.values(), ids=BAD.keys())
def test_a_file_that_is_not_what_its_name_says_is_named_with_its_owner(
    files: Files, message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError, match=f"^{message}" if message.startswith("[tva]") else message):
        vocabulary(files)
    pair = vectors(tmp_path, base, FAST, files)
    with pytest.raises(TokenizerError, match=rf"^b\.lota: .*{message}"):
        compare_tokenizers(pair, ModelFolder(base))
    # nobody looks into files that are the same
    assert compare_tokenizers(vectors(tmp_path / "same", base, files, files)).notes == []


# several


def test_vectors_with_the_tokenizer_of_the_base_agree(base: Path, tmp_path: Path) -> None:
    own = {"config.json": b"{}", **FAST}
    pair = vectors(tmp_path, base, own, None, {})
    for at_hand in (None, ModelFolder(base)):
        assert compare_tokenizers(pair, at_hand) == Agreement([], [])


def test_bytes_may_differ(base: Path, tmp_path: Path) -> None:
    """Other spaces and order, merges as pairs, padding and truncation that a training left, scores of Unigram."""
    other = {
        "tokenizer.json": encoded(
            {
                "truncation": {"max_length": 5},
                "model": {"merges": [["a", "b"]], "vocab": dict(reversed(WORDS.items()))},
                "added_tokens": [{"content": "<s>", "id": 3}],
            },
            indent=2,
        )
    }
    one, two = vectors(tmp_path, base, FAST, other)
    note = "tokenizer.json differs between a.lota and b.lota; the base's is written"
    assert compare_tokenizers([one, two], ModelFolder(base)) == Agreement([], [note])
    assert compare_tokenizers([two], ModelFolder(base)).notes == []
    older = {"vocab.json": encoded(WORDS), "merges.txt": b"#version: 0.2\na b\n"}
    assert compare_tokenizers(vectors(tmp_path / "older", base, older, other), ModelFolder(base)).notes == [
        "tokenizer.json differs between a.lota and b.lota; the base's is written"
    ]


UNLIKE: dict[str, tuple[Files, Files, str]] = {
    "numbers": (
        {"tokenizer.json": fast({"a": 0, "<x>": 5})},
        {"tokenizer.json": fast({"a": 0, "<x>": 7})},
        r"token '<x>' is 5 in a\.lota and 7 in b\.lota",
    ),
    "the first": (
        {"tokenizer.json": fast({"z": 1, "y": 2, "x": 3})},
        {"tokenizer.json": fast({"z": 1, "y": 3, "x": 2})},
        r"token 'x' is 3 in a\.lota and 2 in b\.lota",
    ),
    "more": ({"vocab.txt": b"a\nb\n"}, {"vocab.txt": b"a\n"}, r"token 'b' is in a\.lota but not in b\.lota"),
    "fewer": ({"vocab.txt": b"a\n"}, {"vocab.txt": b"a\nb\n"}, r"token 'b' is in b\.lota but not in a\.lota"),
    "added": (
        {"tokenizer.json": fast({"a": 0}, None, {"<x>": 1})},
        {"tokenizer.json": fast({"a": 0}, None, {"<y>": 1})},
        r"token '<x>' is in a\.lota but not in b\.lota",
    ),
    "another file": (
        {"tokenizer.json": fast({"a": 0})},
        {"vocab.json": b'{"a": 1}'},
        r"token 'a' is 0 in a\.lota and 1 in b\.lota",
    ),
    "merges": (
        {"tokenizer.json": fast(WORDS, ["a b", "b a"])},
        {"tokenizer.json": fast(WORDS, [["a", "b"], ["a", "a"]])},
        r"merge 1 of the tokenizer is 'b a' in a\.lota and 'a a' in b\.lota",
    ),
    "fewer merges": (
        {"vocab.json": encoded(WORDS), "merges.txt": b"#version: 0.2\na b\n"},
        {"vocab.json": encoded(WORDS), "merges.txt": b"#version: 0.2\n"},
        r"merge 0 of the tokenizer is 'a b' in a\.lota and missing in b\.lota",
    ),
    "opaque": (
        {"tokenizer.model": b"1", "added_tokens.json": b"{}"},
        {"tokenizer.model": b"2", "added_tokens.json": b"{}"},
        r"tokenizer\.model differs between a\.lota and b\.lota",
    ),
    "opaque in one": (
        {"tokenizer.model": b"1", **FAST},
        {"tokenizer.model": b"2"},
        r"tokenizer\.model differs between a\.lota and b\.lota",
    ),
    "added to the opaque": (
        {"spiece.model": b"1", "added_tokens.json": b'{"<x>": 9}'},
        {"spiece.model": b"1", "added_tokens.json": b'{"<x>": 8}'},
        r"token '<x>' is 9 in a\.lota and 8 in b\.lota",
    ),
    "a name that is half a character": (
        {"vocab.json": b'{"\\ud800": 0}'},
        {"vocab.json": b'{"\\ud800": 1}'},
        r"token '\\ud800' is 0 in a\.lota and 1 in b\.lota",
    ),
}


@pytest.mark.parametrize("at_hand", [False, True], ids=["without base", "with base"])
@pytest.mark.parametrize(("one", "other", "message"), UNLIKE.values(), ids=UNLIKE.keys())
def test_two_that_differ_are_named_with_the_first_difference(
    one: Files, other: Files, message: str, at_hand: bool, tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "base", WEIGHTS)
    pair = vectors(tmp_path, base.path, one, other)
    with pytest.raises(MergeError, match=f"^{message}$"):
        compare_tokenizers(pair, base if at_hand else None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": fast({**WORDS, "<x>": 4}, ["a b"])}, r"token '<x>' is in a\.lota but not in base"),
        ({"tokenizer.json": fast({"a": 0, "b": 1, "ab": 2}, ["a b"])}, r"token '<s>' is in base but not in a\.lota"),
        ({"tokenizer.json": fast(WORDS, [])}, r"merge 0 of the tokenizer is missing in a\.lota and 'a b' in base"),
    ],
)
def test_vectors_that_agree_differ_from_the_base_only_with_files_that_are_carried(
    files: Files, message: str, base: Path, tmp_path: Path
) -> None:
    pair = vectors(tmp_path, base, files, files)
    agreement = compare_tokenizers(pair, ModelFolder(base))
    assert [file.name for file in agreement.carried] == list(files)
    assert agreement.notes == []
    # the same tokens in other bytes: of two files none is carried, and the base's would be written
    (tmp_path / "other").mkdir()
    spaced = {name: content + b"\n" for name, content in files.items()}
    pair = vectors(tmp_path / "other", base, files, spaced)
    assert compare_tokenizers(pair).carried == []
    with pytest.raises(MergeError, match=f"^{message}$"):
        compare_tokenizers(pair, ModelFolder(base))


VOCABULARIES = st.dictionaries(st.text("abcd", min_size=1, max_size=2), st.integers(0, 9), max_size=5)


@given(one=VOCABULARIES, other=VOCABULARIES)
def test_any_two_vocabularies_agree_or_the_first_difference_is_named(
    one: dict[str, int], other: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    base = write_checkpoint(folder / "base", WEIGHTS)
    pair = vectors(folder, base.path, {"vocab.json": encoded(one)}, {"tokenizer.json": fast(other)})
    numbered = sorted({(n, t) for words in (one, other) for t, n in words.items() if one.get(t) != other.get(t)})
    if not numbered:
        assert not [note for note in compare_tokenizers(pair).notes if "compared" in note]
        return
    token = numbered[0][1]
    with pytest.raises(MergeError) as caught:
        compare_tokenizers(pair)
    if token in one and token in other:
        assert str(caught.value) == f"token {token!r} is {one[token]} in a.lota and {other[token]} in b.lota"
    else:
        names = ("a.lota", "b.lota") if token in one else ("b.lota", "a.lota")
        assert str(caught.value) == f"token {token!r} is in {names[0]} but not in {names[1]}"


def test_what_cannot_be_compared_is_said(base: Path, tmp_path: Path) -> None:
    """Without the base nobody knows what a vector has that kept the base's file."""
    other = {"tokenizer.json": fast(WORDS, ["a b"], padding=None)}
    unproven = "the tokenizers of {} and {} cannot be compared: the base's files are not available".format
    differs = "tokenizer.json differs between {} and {}; the base's is written".format
    kept, lone, changed = vectors(tmp_path, base, FAST, None, other)
    assert compare_tokenizers([kept, lone]) == Agreement([], [])
    for one in (kept, lone):
        notes = [unproven(one.name, "c.lota"), differs(one.name, "c.lota")]
        assert compare_tokenizers([one, changed]) == Agreement([], notes)
        assert compare_tokenizers([one, changed], ModelFolder(base)) == Agreement([], notes[1:])
        reverse = [unproven("c.lota", one.name), differs("c.lota", one.name)]
        assert compare_tokenizers([changed, one]).notes == reverse
        lone_base = ModelFolder(ModelFolder(base).shards[0].path)
        assert compare_tokenizers([one, changed], lone_base).notes == notes
    # one that brings no tokenizer says nothing
    (silent,) = vectors(tmp_path / "more", base, {"config.json": b"[]"})
    assert compare_tokenizers([silent, changed]).notes == [differs("a.lota", "c.lota")]


def test_opaque_files_need_no_base_to_differ(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", WEIGHTS, 1, {"tokenizer.model": b"1"})
    pair = vectors(tmp_path, base.path, {"tokenizer.model": b"1"}, {"tokenizer.model": b"2"})
    with pytest.raises(MergeError, match=r"^tokenizer\.model differs between a\.lota and b\.lota$"):
        compare_tokenizers(pair)


def test_kinds_that_have_nothing_in_common_are_said(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", WEIGHTS)
    pair = vectors(tmp_path, base.path, FAST, {"tokenizer.model": b"1"})
    said = "the tokenizers of a.lota and b.lota cannot be compared: they are of different kinds"
    assert said in compare_tokenizers(pair, base).notes
    both = vectors(tmp_path / "both", base.path, {**FAST, "tokenizer.model": b"1"}, {"tokenizer.model": b"1"})
    assert said not in compare_tokenizers(both, base).notes


# files to carry


def test_what_all_changed_alike_is_carried_and_the_rest_is_said(base: Path, tmp_path: Path) -> None:
    template, config = b"{{ messages }}", b'{"new": 1}'
    common = {"config.json": b"{}", **FAST, "chat_template.jinja": template, "generation_config.json": config}
    one = {**common, "tokenizer_config.json": b"1", "special_tokens_map.json": b"{}", "notes.txt": b"1"}
    two = {**common, "tokenizer_config.json": b"2", "notes.txt": b"2"}
    pair = vectors(tmp_path, base, one, two)
    for at_hand in (None, ModelFolder(base)):
        found = compare_tokenizers(pair, at_hand)
        assert [(file.name, file.content) for file in found.carried] == [
            ("chat_template.jinja", template),
            ("generation_config.json", config),
        ]
        assert set(found.carried) < set(pair[0].source.files() or ())
        assert found.notes == [
            "special_tokens_map.json differs between a.lota and b.lota; the base's is written",
            "tokenizer_config.json differs between a.lota and b.lota; the base's is written",
        ]


def test_what_only_some_changed_is_not_carried(base: Path, tmp_path: Path) -> None:
    changed = {**FAST, "config.json": b"[]", "chat_template.jinja": b"new"}
    found = compare_tokenizers(vectors(tmp_path, base, changed, FAST, changed), ModelFolder(base))
    assert found == Agreement([], ["chat_template.jinja differs between a.lota and b.lota; the base's is written"])
    found = compare_tokenizers(vectors(tmp_path / "lone", base, None, changed), ModelFolder(base))
    assert found == Agreement([], ["chat_template.jinja differs between a.lota and b.lota; the base's is written"])


def test_an_index_of_shards_is_not_carried(base: Path, tmp_path: Path) -> None:
    split = write_checkpoint(
        tmp_path / "split", {"w": tensor("F32", [1, 2, 4]), "v": tensor("F32", [1])}, 2, {"config.json": b"{}", **FAST}
    )
    vector = diff(ModelFolder(base), split)
    assert any(file.name == "model.safetensors.index.json" for file in vector.source.files() or ())
    assert compare_tokenizers([vector, vector], ModelFolder(base)) == Agreement([], [])


def test_one_vector_carries_all_that_it_changed(base: Path, tmp_path: Path) -> None:
    (vector,) = vectors(tmp_path, base, {**FAST, "config.json": b"[]", "chat_template.jinja": b"new"})
    found = compare_tokenizers([vector], ModelFolder(base))
    assert [file.name for file in found.carried] == ["chat_template.jinja", "config.json"]
    assert found.notes == []


def test_a_file_that_another_revision_of_the_base_has_already_is_not_carried(base: Path, tmp_path: Path) -> None:
    pair = vectors(tmp_path, base, *2 * [{**FAST, "chat_template.jinja": b"new", "config.json": b"{}"}])
    (base / "chat_template.jinja").write_bytes(b"new")
    assert compare_tokenizers(pair, ModelFolder(base)) == Agreement([], [])
