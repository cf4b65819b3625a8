"""Arithmetic of vectors as text, for the command line: `0.5*a.lota + (b.lota - c.lota) >> d.lota`.

Operators, from those that bind least: >> (composition); + and -; * and /; a minus before its operand.
Names of files hold +, -, / and >> too. These are operators where a name cannot go on: between white space, beside a
parenthesis and, but for /, with which paths begin, at the beginning of a word. Names in quotation marks hold anything.
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
from ..reporting.progress import Progress, silent
from ..vectors.vector import TaskVector
from .compose import compose

# a vector is made of those before it: what many were chained to would be read by too deep a recursion
WORDS = 200
_LEVELS = {">>": 1, "+": 2, "-": 2, "*": 3, "/": 3, "negation": 4}
# operands, V for a vector and N for a number, and how to say so
_TAKES = {
    ">>": (["VV"], "two vectors"),
    "+": (["VV", "NN"], "two vectors or two numbers"),
    "-": (["VV", "NN"], "two vectors or two numbers"),
    "*": (["NN", "NV", "VN"], "numbers and at most one vector"),
    "/": (["NN", "VN"], "a number behind it"),
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
    """A piece of an expression.

    kind: "number", "name", a parenthesis or an operator. text: a name without its quotation marks.
    place: the character, from 1, at which it begins.
    """

    kind: str
    text: str
    place: int


class Expression:
    """A text that was parsed; no file was looked for yet.

    Raises UsageError, naming the character, for anything but an expression.
    """

    def __init__(self, text: str) -> None:
        words = _words(text)
        if len(words) > WORDS:
            raise UsageError(f"an expression has at most {WORDS} names, numbers and signs, found {len(words)}")
        self._postfix = _postfix(words)

    @property
    def composes(self) -> bool:
        """Whether it holds >>, the one operator that has a use for the base."""
        return any(word.kind == ">>" for word in self._postfix)

    def evaluate(
        self,
        open_vector: Callable[[str], TaskVector] = TaskVector.open,
        base: Checkpoint | None = None,
        progress: Progress = silent,
    ) -> TaskVector:
        """The vector that it stands for, lazy.

        open_vector: from a name to its vector; called once a name. base: of compositions.
        Raises UsageError, naming the character, for a file that is not there and for what an operator cannot take, and
        the errors of opening and of the operators.
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
                    # beside the base each vector needs the state before it, which is that of a chain from the left
                    stack.append(chain if base is not None else [_composed(chain, base, progress)])
                else:
                    operands = _value(left, base, progress), _value(right, base, progress)
                    stack.append(_operand(_APPLY[word.kind](*operands)))
        found = _value(stack[0], base, progress)
        if not isinstance(found, TaskVector):
            raise UsageError(f"the expression is a number, {found:g}: expected a vector")
        return found


# a number, or vectors that are to be composed
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
    """The words in the order of a stack machine, without parentheses: Dijkstra's shunting yard, free of recursion."""
    output: list[Word] = []
    waiting: list[Word] = []

    def unwind(level: int) -> None:
        while waiting and _LEVELS.get(waiting[-1].kind, 0) >= level:
            output.append(waiting.pop())

    operand = True  # whether one comes next
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
    if word.text:  # an empty path would be the current folder
        try:
            return open_vector(word.text)
        except FormatError:
            if os.path.exists(word.text):  # False for what cannot be a path either
                raise
    joined = any(sign in word.text for sign in ("+", "-", "/", ">>"))
    hint = ": put white space around what is an operator in it" if joined else ""
    raise _error(word, f"there is no file {said(word.text, 200)}{hint}")


def _check_operands(word: Word, left: _Operand, right: _Operand) -> None:
    kinds = "".join("V" if isinstance(operand, list) else "N" for operand in (left, right))
    allowed, expected = _TAKES[word.kind]
    if kinds not in allowed:
        raise _error(word, f"{word.text} takes {expected}, found {_FOUND[kinds]}")
    if word.kind == "/" and right == 0:
        raise _error(word, "cannot divide by zero")


def _error(word: Word, what: str) -> UsageError:
    return UsageError(f"character {word.place} of the expression: {what}")
