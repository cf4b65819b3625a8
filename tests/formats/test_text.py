"""Text from files, made safe for terminals, Markdown and JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.errors import TaskvecError
from taskvec_formats.errors import FormatError
from taskvec_formats.text import LINE, json_text, markdown, printable

ANY = st.text(st.characters(), max_size=60)  # lone surrogates included


@given(ANY, st.integers(20, 80))
def test_a_printable_line_is_printable_short_and_a_fixed_point(text: str, most: int) -> None:
    line = printable(text, most)
    assert line.isprintable()
    assert len(line) <= most
    assert printable(line, most) == line
    if text.isprintable() and len(text) <= most:
        assert line == text


def test_the_end_of_a_long_sentence_survives() -> None:
    line = printable(f"tensor {'x' * 10_000!r} should be F32 [2], found none")
    assert len(line) <= LINE
    assert line.startswith("tensor 'xxx")
    assert line.endswith("xxx' should be F32 [2], found none")


@pytest.mark.parametrize("kind", [FormatError, TaskvecError])
def test_errors_are_one_printable_line(kind: type[Exception]) -> None:
    assert str(kind("a\x1b[2J\r\nb\u202e")) == r"a\x1b[2J\r\nb\u202e"
    assert len(str(kind("x" * 100_000))) <= LINE


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("my_model-v1.0.lota", "my_model-v1.0.lota"),
        ("<b>", "&lt;b&gt;"),
        ("&amp;", "&amp;amp;"),
        ("[a](javascript:b)", r"\[a\](javascript:b)"),
        ("a|b", r"a\|b"),
        ("`x` *y* ~~z~~", r"\`x\` \*y\* \~\~z\~\~"),
        ("_x_", r"\_x\_"),
        ("https://x.y www.z.w", r"https\://x.y www\.z.w"),
        ("a\n# b", r"a\\n\# b"),
    ],
)
def test_markdown_shows_a_text_as_it_is(text: str, shown: str) -> None:
    assert markdown(text) == shown


@given(ANY)
def test_markdown_holds_no_html(text: str) -> None:
    escaped = markdown(text)
    assert not set(escaped) & set("<>\n\r")


def test_json_has_no_nan() -> None:
    document = {"loss": math.nan, "more": [math.inf, (1.5, -math.inf)], "n": 1, "t": "x"}
    assert json.loads(json_text(document), parse_constant=pytest.fail) == {
        "loss": None,
        "more": [None, [1.5, None]],
        "n": 1,
        "t": "x",
    }
