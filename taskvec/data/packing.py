"""Packing of several examples into one row, without attention between them.

Each example keeps the positions of a row of its own, from 0, and transformers masks attention between examples where
positions start again (`rows.collate`). The first token of each example has no label, so the loss of a packed row is the
sum of the losses of its examples, over the same number of tokens.
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

_BY_LENGTH = {"longrope", "dynamic"}  # rotary position types of transformers that depend on the longest position
_TRIED = 32  # tokens of each of the two rows that a model is tested with


def pack(rows: Sequence[Row], length: int, seed: int) -> list[Row]:
    """Pack rows into rows of at most `length` tokens with "position_ids".

    Rows are taken in an order drawn from `seed`. Each goes into the packed row where it leaves the least room, and none
    is cut.

    Args:
        rows: The rows.
        length: Maximum number of tokens of a packed row.
        seed: Seed of the order. The same seed gives the same packed rows.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    packed: list[list[Row]] = []
    room: list[tuple[int, int]] = []  # (free tokens, index of the packed row), the fullest first
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
    """Check on two rows that the model computes the same for packed examples as for separate ones.

    Encoders, models with a state that runs through the row, models that read no positions, and models in which a long
    example changes all positions of the row fail the check.

    Args:
        model: The model.
        rows: The rows to pack.
        padding: Token id of padding.

    Raises:
        TrainingError: The model computes something else.
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
        with torch.no_grad():
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
    """Maximum length of an example whose positions do not depend on its length; infinite for most models."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # some models have one per layer type
    if not any(each.get("rope_type") in _BY_LENGTH for each in kinds):
        return math.inf
    windows = [each.get("original_max_position_embeddings") for each in kinds]
    found = [size for size in windows if isinstance(size, int)]
    return min(found, default=text.max_position_embeddings)


def _joined(rows: Sequence[Row]) -> Row:
    """Concatenate rows, each with its own positions."""
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
