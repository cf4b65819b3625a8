"""Held-out metrics of a causal model or an encoder-decoder: the loss on the completions, and greedy answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from taskvec_formats import Checkpoint
from taskvec_formats.atomic import atomic_file

from ..data.examples import Example
from ..data.pairs import collate_pairs, collator_of, encode_target, fit_source, rows_of
from ..data.rows import (
    IGNORED,
    Row,
    RowCounts,
    accepted_arguments,
    collate,
    encode_completion,
    encode_prompt,
    first_position,
    length_limit,
    pad_id,
)
from ..destination import appearing, check_file
from ..errors import DataError, TrainingError, UsageError
from ..models.devices import device_of
from ..models.kinds import check_reading, is_encoder_decoder, is_masked
from ..models.loading import load_model
from ..reporting.progress import Progress, silent
from ..vectors.vector import TaskVector
from .estimate import Estimate, estimate
from .scoring import check_request, exact_match, needs_answers, rouge1

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARE_TOKENS = 8  # an answer may be that much longer than the longest completion

# told how many examples more are done
_Advance = Callable[[int], None]


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    metrics: name -> Estimate, in the order asked for: loss, nats a completion token; exact_match, the share of right
        answers; rouge1, the mean F1, in [0, 1].
    examples: how many. answers: one an example, in their order; none where only the loss was asked for.
    rows: what became of the examples as rows of tokens; None where the loss was not asked for.
    cut_prompts: how many prompts lost their beginning so that an answer has room; None where there are no answers.
    """

    metrics: dict[str, Estimate]
    examples: int
    answers: list[str]
    rows: RowCounts | None = None
    cut_prompts: int | None = None


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    metrics: Sequence[str] = ("loss",),
    *,
    batch_size: int = 32,
    max_length: int = 1024,
    max_new_tokens: int | None = None,
    stage: str = "evaluating",
    progress: Progress = silent,
) -> Evaluation:
    """Score a model on held-out examples; only what the metrics need is computed. The model is left in eval mode.

    max_length: tokens of prompt and completion, or prompt and answer, and never more than the model has positions for;
        a prompt that is too long loses its beginning. An encoder-decoder may have as many of each.
    max_new_tokens: where an answer is cut off; None for 8 more than the longest completion has, at most half of
        max_length. It is one for all examples: no answer depends on the batch that it is generated in.
    Raises UsageError, DataError where a line leaves nothing to predict, TrainingError where the loss is not a number.
    """
    check_request(metrics, batch_size=batch_size, max_length=max_length, max_new_tokens=max_new_tokens)
    if not examples:
        raise UsageError("there is no example to evaluate on")
    if needs_answers(metrics):
        _check_answers(examples)
    max_length = length_limit(model.config, max_length, first_position(model))
    total = len(examples) * (("loss" in metrics) + needs_answers(metrics))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total, "")

    model.eval()
    advance(0)
    found: dict[str, Estimate] = {}
    answers: list[str] = []
    counts: RowCounts | None = None
    cut: int | None = None
    with torch.no_grad():  # what a model keeps from inference_mode could not be trained with afterwards
        if "loss" in metrics:
            rows, counts = rows_of(model, examples, tokenizer, max_length, "last")
            found["loss"] = _loss(model, tokenizer, examples, rows, batch_size, advance)
        if needs_answers(metrics):
            answers, cut = _answers(model, tokenizer, examples, batch_size, max_length, max_new_tokens, advance)
    completions = [example.completion for example in examples]
    if "exact_match" in metrics:
        found["exact_match"] = estimate([float(exact_match(*pair)) for pair in zip(completions, answers, strict=True)])
    if "rouge1" in metrics:
        found["rouge1"] = estimate(rouge1(completions, answers))
    return Evaluation({name: found[name] for name in metrics}, len(examples), answers, counts, cut)


def evaluate_checkpoint(
    base: Checkpoint,
    vector: TaskVector | None,
    examples: Sequence[Example],
    metrics: Sequence[str],
    *,
    device: str = "auto",
    batch_size: int = 32,
    max_length: int = 1024,
    max_new_tokens: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """The same of a model folder in f32, with a vector or patch on it where there is one.

    device: "auto" (an accelerator where there is one) or a name such as "cpu" or "cuda:1".
    trust_remote_code: whether Python code from the model folder may run.
    Raises the errors of `load_model`, `applied` and `evaluate`.
    """
    computer = device_of(device)
    progress("loading", 0, 1, base.name)
    model, tokenizer = load_model(base.path, trust_remote_code=trust_remote_code)
    model.to(computer)  # type: ignore[arg-type]  # transformers' wrapper of it is typed without self
    progress("loading", 1, 1, "")
    if is_masked(model):
        raise TrainingError(f"{base.name} is a masked language model: it neither goes on with a text nor answers")
    from ..models.live import applied  # takes what loading a model takes, so not before that went well

    with applied(model, vector, base) if vector is not None else nullcontext():
        return evaluate(
            model,
            tokenizer,
            examples,
            metrics,
            batch_size=batch_size,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )


def write_answers(path: Path, examples: Sequence[Example], answers: Sequence[str], *, force: bool = False) -> None:
    """Write {"prompt", "completion", "answer"} a line; the messages of a prompt stand one below another.

    force: whether a file of that name is replaced. Raises OutputExistsError and the other errors of `check_file`.
    """
    check_file(path, force=force)
    rows = [
        {
            "prompt": "\n".join(message["content"] for message in example.messages),
            "completion": example.completion,
            "answer": answer,
        }
        for example, answer in zip(examples, answers, strict=True)
    ]
    with appearing(path), atomic_file(path, replace=force) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _loss(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    rows: Sequence[Row],
    batch_size: int,
    advance: _Advance,
) -> Estimate:
    """Nats a token, over the completions' tokens. rows: those of the examples."""
    pairs = is_encoder_decoder(model)
    check_reading(model, rows[0])
    accepts, collated = accepted_arguments(model), collator_of(model, pad_id(tokenizer))
    sums, counts = [0.0] * len(rows), [0] * len(rows)
    lengths = [row["input_ids"] + row["labels"] if pairs else row["input_ids"] for row in rows]
    for batch in _batches(lengths, batch_size):
        inputs = _on(model, collated([rows[i] for i in batch]))
        # an encoder-decoder makes the decoder's input of the labels, and its logits stand where they do
        labels = inputs["labels"] if pairs else inputs.pop("labels")[:, 1:]
        if "use_cache" in accepts:
            inputs["use_cache"] = False
        logits = model(**inputs).logits
        logits = logits if pairs else logits[:, :-1]
        # row by row: log-probabilities of a whole batch would take as much memory again as its logits
        losses = torch.stack(
            [
                cross_entropy(row.float(), label, ignore_index=IGNORED, reduction="sum")
                for row, label in zip(logits, labels, strict=True)
            ]
        )
        for i, loss, count in zip(batch, losses.tolist(), (labels != IGNORED).sum(1).tolist(), strict=True):
            if not math.isfinite(loss):
                raise TrainingError(f"{examples[i].where}: the loss is {loss}")
            sums[i], counts[i] = loss, count
        advance(len(batch))
    return estimate(sums, counts)


def _check_answers(examples: Sequence[Example]) -> None:
    """Raise DataError for an answer that is no text to compare with."""
    for example in examples:
        if example.answer is not None:
            raise DataError(
                f"{example.where}: the last turn calls tools or has thoughts: only its loss can be computed"
            )


def _answers(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    batch_size: int,
    max_length: int,
    max_new_tokens: int | None,
    advance: _Advance,
) -> tuple[list[str], int]:
    """Greedy answers in the order of the examples, stripped of special tokens and outer white space.

    And how many prompts lost their beginning.
    """
    pairs = is_encoder_decoder(model)
    target = encode_target if pairs else encode_completion
    longest = max(len(target(example, tokenizer)) for example in examples)
    new_tokens = max_new_tokens or min(longest + _SPARE_TOKENS, max_length // 2)
    if not 0 < new_tokens < max_length:
        raise UsageError(f"{new_tokens} new tokens leave no room for a prompt: an example may have {max_length} tokens")
    pad = pad_id(tokenizer)
    # plain text has no prompt: it is asked for from the beginning
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad
    if pairs:
        fitted = [fit_source(example, tokenizer, max_length) for example in examples]
        prompts, cut = [ids for ids, _ in fitted], sum(length > max_length for _, length in fitted)
    else:
        whole, most = [encode_prompt(example, tokenizer) for example in examples], max_length - new_tokens
        prompts, cut = [ids[-most:] or [begin] for ids in whole], sum(len(ids) > most for ids in whole)
    answers = [""] * len(prompts)
    # the model's own settings are set aside: they may sample, penalise repetition or forbid tokens
    own = model.generation_config
    ends = _ends(own.eos_token_id, tokenizer)
    from transformers import GenerationConfig

    greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=ends or None)
    if pairs:
        # how a decoder begins is no choice among answers
        greedy.decoder_start_token_id = _start(model)
        greedy.forced_bos_token_id = own.forced_bos_token_id
        if pad not in ends:
            greedy.suppress_tokens = [pad]  # it is in no label, so a model need not have learnt to leave it out
    model.generation_config = greedy
    try:
        for batch in _batches(prompts, batch_size):
            rows = [{"input_ids": prompts[i], "labels": prompts[i]} for i in batch]
            inputs = _on(model, collate_pairs(rows, pad) if pairs else collate(rows, pad, frozenset()))
            del inputs["labels"]
            generated = model.generate(  # type: ignore[operator]  # transformers types it as Tensor | Module
                **inputs, generation_config=greedy
            )
            before = 1 if pairs else inputs["input_ids"].shape[1]  # a decoder's output begins with its start token
            for i, row in zip(batch, generated[:, before:].tolist(), strict=True):
                length = next((place for place, token in enumerate(row) if token in ends), len(row))
                answers[i] = tokenizer.decode(row[:length], skip_special_tokens=True).strip()
            advance(len(batch))
    finally:
        model.generation_config = own
    return answers, cut


def _start(model: PreTrainedModel) -> int:
    """The token with which the decoder of an encoder-decoder begins, as `generate` finds it. Raises TrainingError."""
    config: Any = model.config
    for name in ("decoder_start_token_id", "bos_token_id"):
        for settings in (model.generation_config, config, config.get_text_config(decoder=True)):
            if (token := getattr(settings, name, None)) is not None:
                return int(token)
    raise TrainingError(f"{type(model).__name__} has no decoder_start_token_id: no answer can begin")


def _ends(own: int | list[int] | None, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's, and the tokenizer's, which training teaches."""
    of_model = own if isinstance(own, list) else [own]
    return sorted({token for token in (*of_model, tokenizer.eos_token_id) if token is not None})


def _batches(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Numbers of rows, `size` at a time, by length, so that little is padded; the longest first, to fail early."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return (order[start : start + size] for start in range(0, len(order), size))


def _on(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
