"""A formal language of short exercises: what the small model is pretrained on, and tasks that it is fine-tuned on.

An exercise is a line such as `reverse : a c f =`, whose answer `f c a` can be verified. Spaces separate the tokens. The
small model is pretrained on SKILLS and on few exercises of TASKS.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice

LETTERS = "abcdefghijklmnop"
DIGITS = "0123456789"
REFUSAL = "no"
Exercise = tuple[list[str], list[str]]  # tokens of the question and of the answer
Item = dict[str, str]


def _shifted(letter: str, by: int) -> str:
    return LETTERS[(LETTERS.index(letter) + by) % len(LETTERS)]


def _word(answer: Callable[[list[str]], list[str]], shortest: int = 4, longest: int = 8) -> Callable[..., Exercise]:
    """An exercise on a random word of letters."""

    def draw(dice: random.Random) -> Exercise:
        word = [dice.choice(LETTERS) for _ in range(dice.randint(shortest, longest))]
        return word, answer(word)

    return draw


def _sum(dice: random.Random) -> Exercise:
    a, b = dice.randrange(100), dice.randrange(100)
    return [*f"{a:02d}", "+", *f"{b:02d}"], list(str(a + b))


def _digit_sum(dice: random.Random) -> Exercise:
    digits = [dice.choice(DIGITS) for _ in range(dice.randint(3, 5))]
    return digits, list(str(sum(map(int, digits))))


def _interleaved(word: list[str]) -> list[str]:
    half = (len(word) + 1) // 2
    pairs = zip(word[:half], [*word[half:], ""], strict=False)
    return [letter for pair in pairs for letter in pair if letter]


def _distinct(word: list[str]) -> list[str]:
    return list(dict.fromkeys(word))


def _swapped(word: list[str]) -> list[str]:
    return [letter for at in range(0, len(word), 2) for letter in reversed(word[at : at + 2])]


SKILLS: dict[str, Callable[[random.Random], Exercise]] = {
    "copy": _word(lambda word: word),
    "reverse": _word(lambda word: word[::-1]),
    "sort": _word(sorted),
    "double": _word(lambda word: [letter for letter in word for _ in range(2)], 3, 5),
    "half": _word(lambda word: word[: len(word) // 2]),
    "before": _word(lambda word: [_shifted(letter, -1) for letter in word]),
    "add": _sum,
}
TASKS: dict[str, Callable[[random.Random], Exercise]] = {
    "falling": _word(lambda word: sorted(word, reverse=True)),
    "zip": _word(_interleaved, 7, 12),
    "distinct": _word(lambda word: _distinct([_shifted(letter, LETTERS.index(letter) % 3) for letter in word])),
    "swap": _word(lambda word: [_shifted(letter, 1) for letter in _swapped(word)], 5, 9),
    "total": _digit_sum,
}
# tasks that are not in the pretraining: another answer to the exercises of a skill that the model has
PROBES: dict[str, Callable[[random.Random], Exercise]] = {
    "refuse": lambda dice: (SKILLS["reverse"](dice)[0], [REFUSAL]),
    "ends": _word(lambda word: [word[0], word[-1], *sorted(word[1:-1])]),
    "count": _word(lambda word: [str(len(set(word)))]),
    "missing": _word(lambda word: [letter for letter in LETTERS if letter not in word][:4]),
}
ANSWER = "answer"  # the exercises of all skills that are not refused
_WORDS = {"refuse": "reverse", "ends": "sort", "count": "half", "missing": "copy"}  # the skill of a probe
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *LETTERS, *DIGITS, "+", "=", ":", REFUSAL, *SKILLS, *TASKS]
VALIDATION, TEST = 256, 512  # exercises that are held out


def item(name: str, dice: random.Random) -> Item:
    """Draw an exercise.

    Args:
        name: The name of a skill, a task or a probe, or ANSWER.
        dice: The random numbers.

    Returns:
        {"prompt", "completion"}.
    """
    if name == ANSWER:
        return item(dice.choice([skill for skill in SKILLS if skill != _WORDS["refuse"]]), dice)
    question, answer = (SKILLS | TASKS | PROBES)[name](dice)
    return {"prompt": " ".join([_WORDS.get(name, name), ":", *question, "="]), "completion": " ".join(answer)}


def distinct_items(name: str, dice: random.Random, seen: set[str]) -> Iterator[Item]:
    """Draw exercises whose prompts are not in `seen`, and add them to it.

    Args:
        name: The name of a skill, a task or a probe.
        dice: The random numbers.
        seen: Prompts that must not occur.

    Yields:
        {"prompt", "completion"}.
    """
    while True:
        drawn = item(name, dice)
        if drawn["prompt"] not in seen:
            seen.add(drawn["prompt"])
            yield drawn


def held_out(name: str, validation: int = VALIDATION, test: int = TEST) -> tuple[list[Item], list[Item]]:
    """The exercises of a task that are neither trained nor pretrained on.

    Args:
        name: The name of a skill, a task or a probe.
        validation: Number of validation exercises.
        test: Number of test exercises.

    Returns:
        The validation part and the test part. All prompts are different.
    """
    seen: set[str] = set()
    return (
        [*islice(distinct_items(name, random.Random(f"{name} held out"), seen), validation)],
        [*islice(distinct_items(name, random.Random(f"{name} test"), seen), test)],
    )
