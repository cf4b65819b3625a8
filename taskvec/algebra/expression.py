"""Arithmetic expressions of vectors as text, for the command line: `0.5*a.lota + (b.lota - c.lota) >> d.lota`.

Operators, from the lowest precedence: >> (composition); + and -; * and /; unary minus.
File names may contain +, -, / and >> too. These are operators only where a name cannot continue: between white space,
next to a parenthesis and, except for /, with which paths begin, at the beginning of a word. Names in quotation marks
may contain anything.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeAlias

from taskvec_formats import Checkpoint, FormatError

from ..arguments import said
from ..errors import UsageError
from ..hub.reference import written
from ..reporting.progress import Progress, silent
from ..vectors.vector import TaskVector
from .compose import compose

# each operation adds a lazy vector to a chain, and a long chain would be read by too deep a recursion
WORDS = 200
_LEVELS = {">>": 1, "+": 2, "-": 2, "*": 3, "/": 3, "negation": 4}
# operator -> allowed operands, V for a vector and N for a number, and their description in messages
_TAKES = {
    ">>": (["VV"], "two vectors"),
    "+": (["VV", "NN"], "two vectors or two numbers"),
    "-": (["VV", "NN"], "two vectors or two numbers"),
    "*": (["NN", "NV", "VN"], "numbers and at most one vector"),
    "/": (["NN", "VN"], "a number after it"),
}
_FOUND = {"VV": "two vectors", "VN": "a vector and a number", "NV": "a number and a vector", "NN": "two numbers"}
_APPLY: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_END = r"(?=[\s()*]|(?:>>|[-+/])\(|$)"
_WORD = re.compile(
    r"""(?P<sign>[()*+-]|>>|/(?=[\s()*]|$)|(?<=[)"'])/)"""
    r"""|"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<open>["'])"""
    rf"|(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?){_END}"
    rf"|(?P<name>\S.*?){_END}"
)


@dataclass(frozen=True)
class Word:
    """A token of an expression.

    Attributes:
        kind: "number", "name", a parenthesis or an operator.
        text: The text; of a name, without its quotation marks.
        place: The position of its first character, from 1.
    """

    kind: str
    text: str
    place: int


class Expression:
    """A parsed expression. Parsing does not access files.

    Args:
        text: The expression.

    Raises:
        UsageError: The text is not an expression. The message names the character.
    """

    def __init__(self, text: str) -> None:
        words = _words(text)
        if len(words) > WORDS:
            raise UsageError(f"an expression has at most {WORDS} names, numbers and signs, found {len(words)}")
        self._postfix = _postfix(words)

    @property
    def composes(self) -> bool:
        """Whether it contains >>, the only operator that uses the base."""
        return any(word.kind == ">>" for word in self._postfix)

    def evaluate(
        self,
        open_vector: Callable[[str], TaskVector] = TaskVector.open,
        base: Checkpoint | None = None,
        progress: Progress = silent,
    ) -> TaskVector:
        """Evaluate the expression to a lazy vector.

        Args:
            open_vector: Opens the vector of a name; called once per name.
            base: The base, for compositions.
            progress: Called for every tensor of a composition.

        Returns:
            The vector.

        Raises:
            UsageError: A file does not exist, an operator does not accept its operands, or the result is a number.
            FormatError, BaseMismatchError, KindError, MergeError: As in opening and in the operators.
        """
        vectors: dict[str, TaskVector] = {}
        for word in self._postfix:
            if word.kind == "name" and word.text not in vectors:
                vectors[word.text] = _opened(word, open_vector)
        stack: list[_Operand] = []
        for word in self._postfix:
            if word.kind == "number":
                stack.append(float(word.text))
            elif word.kind == "name":
                stack.append([vectors[word.text]])
            elif word.kind == "negation":
                stack.append(_operand(-_value(stack.pop(), base, progress)))
            else:
                right, left = stack.pop(), stack.pop()
                _check_operands(word, left, right)
                if isinstance(left, list) and isinstance(right, list) and word.kind == ">>":
                    chain = [*left, *right]
                    # with the base, each vector needs the state before it, so a chain is composed from the left
                    stack.append(chain if base is not None else [_composed(chain, base, progress)])
                else:
                    operands = _value(left, base, progress), _value(right, base, progress)
                    stack.append(_operand(_APPLY[word.kind](*operands)))
        found = _value(stack[0], base, progress)
        if not isinstance(found, TaskVector):
            raise UsageError(f"the expression is a number, {found:g}: expected a vector")
        return found


# a number, or a chain of vectors to compose
_Operand: TypeAlias = float | list[TaskVector]


def _operand(value: Any) -> _Operand:
    return [value] if isinstance(value, TaskVector) else float(value)


def _value(operand: _Operand, base: Checkpoint | None, progress: Progress) -> Any:
    return _composed(operand, base, progress) if isinstance(operand, list) else operand


def _composed(chain: list[TaskVector], base: Checkpoint | None, progress: Progress) -> TaskVector:
    return reduce(lambda first, second: compose(first, second, base, progress), chain)


def _words(text: str) -> list[Word]:
    words = []
    for found in _WORD.finditer(text):
        group = found.lastgroup or ""
        word = Word(
            {"sign": found[0], "single": "name", "double": "name"}.get(group, group), found[group], found.start() + 1
        )
        if group == "open":
            raise _error(word, "this quotation mark is never closed")
        words.append(word)
    return words


def _postfix(words: Sequence[Word]) -> list[Word]:
    """Return the tokens in postfix order, without parentheses (Dijkstra's shunting yard algorithm, not recursive)."""
    output: list[Word] = []
    waiting: list[Word] = []

    def unwind(level: int) -> None:
        while waiting and _LEVELS.get(waiting[-1].kind, 0) >= level:
            output.append(waiting.pop())

    operand = True  # whether an operand is expected next
    for word in words:
        if operand and word.kind in ("number", "name"):
            output.append(word)
            operand = False
        elif operand and word.kind in ("(", "-"):
            waiting.append(replace(word, kind="negation") if word.kind == "-" else word)
        elif operand:
            raise _error(word, f"expected a vector or a number, found {said(word.text)}")
        elif word.kind == ")":
            unwind(1)
            if not waiting:
                raise _error(word, "this parenthesis was never opened")
            waiting.pop()
        elif word.kind in _LEVELS:
            unwind(_LEVELS[word.kind])
            waiting.append(word)
            operand = True
        else:
            raise _error(word, f"expected an operator, found {said(word.text)}")
    if operand:
        found = f"ends with {said(words[-1].text)}" if words else "is empty"
        raise UsageError(f"the expression {found}: expected a vector or a number")
    unwind(1)
    if waiting:
        raise _error(waiting[-1], "this parenthesis is never closed")
    return output


def _opened(word: Word, open_vector: Callable[[str], TaskVector]) -> TaskVector:
    if word.text:  # an empty path would name the current folder
        try:
            return open_vector(word.text)
        except (FormatError, UsageError):
            if os.path.exists(word.text):  # also False for an invalid path
                raise
    joined = any(sign in word.text for sign in ("+", "-", "/", ">>"))
    hint = ": put white space around operators" if joined else ""
    raise _error(word, f"there is no file {said(written(word.text), 200)}{hint}")


def _check_operands(word: Word, left: _Operand, right: _Operand) -> None:
    kinds = "".join("V" if isinstance(operand, list) else "N" for operand in (left, right))
    allowed, expected = _TAKES[word.kind]
    if kinds not in allowed:
        raise _error(word, f"{word.text} takes {expected}, found {_FOUND[kinds]}")
    if word.kind == "/" and right == 0:
        raise _error(word, "cannot divide by zero")


def _error(word: Word, what: str) -> UsageError:
    return UsageError(f"character {word.place} of the expression: {what}")
