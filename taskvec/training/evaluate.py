"""Held-out loss and exact match of a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..progress import Progress, silent
from .data import Example, collate, encode, encode_completion, encode_prompt, pad_id
from .loop import accepted_arguments


@dataclass(frozen=True)
class Score:
    """loss: mean negative log-likelihood a completion token, nats. exact_match: share answered to the letter."""

    loss: float
    exact_match: float
    answers: list[str]


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    max_length: int = 1024,
    stage: str = "evaluating",
    progress: Progress = silent,
) -> Score:
    """Score a model on held-out examples: loss on the completions, and greedy answers compared with them, stripped.

    An answer may be 8 tokens longer than the longest completion of its batch before it is cut off.
    """
    model.eval()
    pad = pad_id(tokenizer)
    accepts = accepted_arguments(model)
    losses, tokens, answers = 0.0, 0, []
    with torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            progress(stage, start, len(examples), "")
            batch = examples[start : start + batch_size]
            inputs = collate([encode(example, tokenizer, max_length) for example in batch], pad, accepts)
            count = int((inputs["labels"][:, 1:] != -100).sum())
            losses += float(model(**_on(model, inputs)).loss) * count
            tokens += count
            answers += answer(model, tokenizer, batch, max_length=max_length)
    progress(stage, len(examples), len(examples), "")
    right = sum(given == example.completion.strip() for given, example in zip(answers, examples, strict=True))
    return Score(losses / max(tokens, 1), right / len(examples), answers)


def answer(model: PreTrainedModel, tokenizer: Any, examples: Sequence[Example], *, max_length: int = 1024) -> list[str]:
    """The model's greedy answers to the prompts of one batch, stripped of special tokens and outer white space."""
    pad = pad_id(tokenizer)
    # plain text has no prompt: it is asked for from the beginning
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad
    encoded = [encode_prompt(example, tokenizer)[-max_length:] or [begin] for example in examples]
    prompts = [{"input_ids": ids, "labels": ids} for ids in encoded]
    inputs = collate(prompts, pad, frozenset())
    longest = max(len(encode_completion(example, tokenizer)) for example in examples)
    generated = model.generate(  # type: ignore[operator]  # transformers types it as Tensor | Module
        **_on(model, {name: inputs[name] for name in ("input_ids", "attention_mask")}),
        max_new_tokens=longest + 8,
        do_sample=False,
        pad_token_id=pad,
    )
    start = inputs["input_ids"].shape[1]
    return [text.strip() for text in tokenizer.batch_decode(generated[:, start:], skip_special_tokens=True)]


def _on(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
