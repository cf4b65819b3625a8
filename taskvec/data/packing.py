"""Several examples in one row, without attention from one to another.

Each example keeps the positions that it has in a row of its own, from 0 on, and transformers masks attention between
examples wherever positions begin again (`collate` in rows.py). The first token of each has no label, so a packed row
gives the sum of the losses of its examples, over the same number of tokens.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import TrainingError
from .rows import Row, accepted_arguments, collate

_BY_LENGTH = {"longrope", "dynamic"}  # kinds of transformers' rotary positions that depend on the longest position
_TRIED = 32  # tokens of each of two rows that show whether a model keeps them apart


def pack(rows: Sequence[Row], length: int, seed: int) -> list[Row]:
    """Rows of at most `length` tokens that hold the given ones, with "position_ids"; the same ones for a seed.

    Rows are taken in an order drawn from `seed`; each goes where it leaves the least room. None is cut.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    packed: list[list[Row]] = []
    room: list[tuple[int, int]] = []  # (free tokens, number of the packed row), the fullest first
    for number in order:
        size = len(rows[number]["input_ids"])
        place = bisect_left(room, (size, -1))
        if place < len(room):
            free, target = room.pop(place)
        else:
            free, target = length, len(packed)
            packed.append([])
        packed[target].append(rows[number])
        if free > size:
            insort(room, (free - size, target))
    return [_joined(part) for part in packed]


def check_packing(model: nn.Module, rows: Sequence[Row], padding: int) -> None:
    """Prove on two rows that the model computes for packed examples what it computes for each by itself.

    padding: a token id. Raises TrainingError where it does not: encoders, models with a state that runs through the
    row, those that read no positions, and those to which a long example in the row changes all positions.
    """
    refused = f"{type(model).__name__} cannot keep packed examples apart; train without `pack`"
    accepts = accepted_arguments(model)
    if "position_ids" not in accepts or getattr(model.config, "is_encoder_decoder", False):
        raise TrainingError(refused)
    window = _window(model.config)
    if (longest := max(len(row["input_ids"]) for row in rows)) > window:
        raise TrainingError(
            f"{type(model).__name__} encodes the positions of examples longer than {window} tokens in another way, and "
            f"the longest here has {longest}: train without `pack`, or with `max_length={window}`"
        )
    some = [{name: values[:_TRIED] for name, values in row.items()} for row in (rows[0], rows[-1])]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            apart = torch.cat([model(**_inputs([row], padding, accepts)).logits[0] for row in some])
            together: torch.Tensor = model(**_inputs([_joined(some)], padding, accepts)).logits[0]
    except (TypeError, ValueError, RuntimeError, IndexError):
        raise TrainingError(refused) from None
    finally:
        model.train(training)
    tolerance = (1e-4 if together.dtype == torch.float32 else 2e-2) * float(apart.abs().max())
    if not torch.allclose(together, apart, rtol=0, atol=tolerance):
        raise TrainingError(refused)


def _window(config: Any) -> float:
    """The most tokens of an example whose positions do not depend on how long it is; infinite for most models."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # some have one for each kind of layer
    if not any(each.get("rope_type") in _BY_LENGTH for each in kinds):
        return math.inf
    windows = [each.get("original_max_position_embeddings") for each in kinds]
    found = [size for size in windows if isinstance(size, int)]
    return min(found, default=text.max_position_embeddings)


def _joined(rows: Sequence[Row]) -> Row:
    """Rows one after another, each with its own positions, int [length]."""
    joined: Row = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        for name, values in {**row, "position_ids": list(range(len(row["input_ids"])))}.items():
            joined[name] += values
    return joined


def _inputs(rows: Sequence[Row], padding: int, accepts: frozenset[str]) -> dict[str, torch.Tensor]:
    """A batch without labels, for logits at every position."""
    inputs = collate(rows, padding, accepts - {"logits_to_keep"})
    del inputs["labels"]
    return inputs
