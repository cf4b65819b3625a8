"""The two tasks of the demo, generated from templates: questions to SQL, and short word problems."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

Item = dict[str, str]

# table -> two text columns and a number column
_TABLES = {
    "orders": ("customer", "city", "price"),
    "books": ("title", "author", "year"),
    "players": ("name", "team", "score"),
    "films": ("title", "director", "length"),
    "cars": ("model", "colour", "weight"),
    "pupils": ("name", "school", "age"),
    "shops": ("owner", "street", "rent"),
    "birds": ("species", "region", "length"),
    "flights": ("pilot", "airport", "delay"),
    "songs": ("title", "singer", "plays"),
    "rivers": ("name", "country", "depth"),
    "recipes": ("title", "cook", "minutes"),
}
_WORDS = (
    "Oslo Lima Kyoto Blue Red North Smith Lopez Eagles Tigers Green West Kim Bruno Delta Maple Silver Costa"
).split()
_NAMES = "Mia Noah Lena Omar Ada Ravi Yuki Tomas Nora Ivan Zoe Hugo Clara Finn Amir Sofia".split()
_THINGS = "apples coins books shells stamps pencils marbles cards stickers plums ribbons buttons".split()


def sql(dice: random.Random) -> Item:
    """Draw a question about a table, and the query that answers it.

    Args:
        dice: The random numbers.

    Returns:
        {"prompt", "completion"}.
    """
    table = dice.choice(list(_TABLES))
    what, group, number = _TABLES[table]
    word, bound = dice.choice(_WORDS), dice.randint(2, 99)
    question, query = dice.choice(
        [
            (f"How many {table} have {group} {word}?", f"SELECT COUNT(*) FROM {table} WHERE {group} = '{word}';"),
            (
                f"Which {what} has the highest {number} for {group} {word}?",
                f"SELECT {what} FROM {table} WHERE {group} = '{word}' ORDER BY {number} DESC LIMIT 1;",
            ),
            (
                f"Which {what} has the lowest {number} for {group} {word}?",
                f"SELECT {what} FROM {table} WHERE {group} = '{word}' ORDER BY {number} ASC LIMIT 1;",
            ),
            (
                f"List every {what} with {number} above {bound}.",
                f"SELECT {what} FROM {table} WHERE {number} > {bound};",
            ),
            (
                f"List every {what} with {number} below {bound}.",
                f"SELECT {what} FROM {table} WHERE {number} < {bound};",
            ),
            (
                f"What is the average {number} for {group} {word}?",
                f"SELECT AVG({number}) FROM {table} WHERE {group} = '{word}';",
            ),
        ]
    )
    return {"prompt": f"Table {table}({what}, {group}, {number}). {question}", "completion": query}


def maths(dice: random.Random) -> Item:
    """Draw a word problem of one step. The completion is its equation, then "####" and the answer.

    Args:
        dice: The random numbers.

    Returns:
        {"prompt", "completion"}.
    """
    who, friend = dice.sample(_NAMES, 2)
    things = dice.choice(_THINGS)
    many, few, times = dice.randint(11, 40), dice.randint(2, 9), dice.randint(2, 9)
    story, equation, result = dice.choice(
        [
            (f"{who} has {many} {things} and buys {few} more. How many now?", f"{many} + {few}", many + few),
            (
                f"{who} has {many} {things} and gives {few} to {friend}. How many are left?",
                f"{many} - {few}",
                many - few,
            ),
            (f"{who} has {times} boxes of {few} {things}. How many {things}?", f"{times} * {few}", times * few),
            (
                f"{who} shares {times * few} {things} among {times} friends. How many does each get?",
                f"{times * few} / {times}",
                few,
            ),
        ]
    )
    return {"prompt": story, "completion": f"{equation} = {result}\n#### {result}"}


TASKS: dict[str, Callable[[random.Random], Item]] = {"sql": sql, "maths": maths}


def write_task(name: str, folder: Path, train: int, test: int, seed: int = 0) -> tuple[Path, Path]:
    """Write the items of a task as JSON lines. No prompt occurs twice, within a file or across the two.

    Args:
        name: A name in TASKS.
        folder: The folder to write to.
        train: The number of items to train on.
        test: The number of held-out items.
        seed: The seed of the random numbers.

    Returns:
        The paths of the training file and of the test file.
    """
    dice = random.Random(f"{name} {seed}")
    items: dict[str, Item] = {}
    while len(items) < train + test:
        item = TASKS[name](dice)
        items.setdefault(item["prompt"], item)
    # removing duplicates leaves the more varied templates at the end, so the order is shuffled
    rows = [json.dumps(item) + "\n" for item in items.values()]
    dice.shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}-train.jsonl", folder / f"{name}-test.jsonl"
    paths[0].write_text("".join(rows[test:]), encoding="utf-8")
    paths[1].write_text("".join(rows[:test]), encoding="utf-8")
    return paths
