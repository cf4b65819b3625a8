"""Evaluation of causal and encoder-decoder models: the loss on held-out completions, and scores of greedy answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from taskvec_formats import Checkpoint
from taskvec_formats.system.atomic import atomic_file

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
from ..devices import device_of
from ..errors import DataError, TrainingError, UsageError
from ..models.kinds import check_reading, is_encoder_decoder, is_masked
from ..models.loading import load_model
from ..reporting.progress import Progress, silent
from ..vectors.vector import TaskVector
from .estimate import Estimate, Scores
from .scoring import check_request, exact_match, needs_answers, rouge1

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARE_TOKENS = 8  # by how many tokens an answer may exceed the longest completion

# called with the number of examples done since the last call
_Advance = Callable[[int], None]


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: Name -> Estimate, in the order of the request: loss, in nats per completion token; exact_match, the
            share of correct answers; rouge1, the mean F1, in [0, 1].
        examples: The number of examples.
        answers: One answer per example, in order. Empty if only the loss was requested.
        rows: Counts of the examples as rows of tokens. None if the loss was not requested.
        cut_prompts: The number of prompts that were truncated at their beginning to leave room for an answer. None if
            there are no answers.
        notes: Sentences about the merge of several vectors.
        scores: Name of a metric -> its values for each example.
    """

    metrics: dict[str, Estimate]
    examples: int
    answers: list[str]
    rows: RowCounts | None = None
    cut_prompts: int | None = None
    notes: tuple[str, ...] = ()
    scores: Mapping[str, Scores] = field(default_factory=dict, repr=False, compare=False)


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
    """Score a model on held-out examples. The model is left in eval mode.

    Only what the metrics need is computed.

    Args:
        model: A causal model or an encoder-decoder.
        tokenizer: Its tokenizer.
        examples: The held-out examples.
        metrics: Names in `scoring.METRICS`.
        batch_size: Examples per batch.
        max_length: The largest number of tokens of a prompt with its completion, or with its answer. The number of
            positions of the model is a further limit. A prompt that is too long is truncated at its beginning. For an
            encoder-decoder the limit applies to the prompt and to the completion separately.
        max_new_tokens: The number of tokens after which an answer is cut off. None means 8 more than the longest
            completion has, at most half of max_length. It is the same for all examples, so no answer depends on its
            batch.
        stage: The stage that is passed to `progress`.
        progress: Called after each batch.

    Returns:
        The metrics and, if they were generated, the answers.

    Raises:
        UsageError: The request is invalid.
        DataError: An example leaves no token to predict, or its answer is not plain text.
        TrainingError: The loss is not finite.
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
    scores: dict[str, Scores] = {}
    answers: list[str] = []
    counts: RowCounts | None = None
    cut: int | None = None
    with torch.no_grad():  # tensors that a model caches in inference_mode could not be used in training later
        if "loss" in metrics:
            rows, counts = rows_of(model, examples, tokenizer, max_length, "last")
            scores["loss"] = _loss(model, tokenizer, examples, rows, batch_size, advance)
        if needs_answers(metrics):
            answers, cut = _answers(model, tokenizer, examples, batch_size, max_length, max_new_tokens, advance)
    completions = [example.completion for example in examples]
    ones = (1,) * len(examples)
    if "exact_match" in metrics:
        matches = (float(exact_match(*pair)) for pair in zip(completions, answers, strict=True))
        scores["exact_match"] = Scores(tuple(matches), ones)
    if "rouge1" in metrics:
        scores["rouge1"] = Scores(tuple(rouge1(completions, answers)), ones)
    found = {name: scores[name].estimate for name in metrics}
    return Evaluation(found, len(examples), answers, counts, cut, scores=scores)


def evaluate_variants(
    base: Checkpoint,
    vectors: Sequence[TaskVector | None],
    data: Mapping[str, Sequence[Example]],
    metrics: Sequence[str],
    *,
    device: str = "auto",
    batch_size: int = 32,
    max_length: int = 1024,
    max_new_tokens: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> list[dict[str, Evaluation]]:
    """Load a model folder in f32, and evaluate it with each of several vectors, on each of several data sets.

    The model is loaded once and switched between the vectors.

    Args:
        base: The model folder.
        vectors: The vectors or patches to apply, one after the other; None for the base itself.
        data: Name -> held-out examples.
        metrics: As in `evaluate`.
        device: "auto", which takes an accelerator if there is one, or a name such as "cpu" or "cuda:1".
        batch_size: As in `evaluate`.
        max_length: As in `evaluate`.
        max_new_tokens: As in `evaluate`.
        trust_remote_code: Whether Python code from the model folder may run.
        progress: Called while the model is loaded and evaluated.

    Returns:
        For each vector, name of the data -> result.

    Raises:
        TrainingError: The model is a masked language model. The errors of `load_model`, `attach` and `evaluate` are
            raised too.
    """
    model, tokenizer = load_for_evaluation(base, device, trust_remote_code=trust_remote_code, progress=progress)
    from ..models.attach import attach  # needs the packages of load_model, so imported after it
    from ..models.live_state import state_of

    found = []
    state = state_of(model)
    state.limit = 0  # no vector is attached twice
    state.is_private = True  # nobody else has this model
    with attach(model, None, base=base) as handle:
        for vector in vectors:
            handle.swap(vector, progress=progress)
            row = {}
            for name, examples in data.items():
                variant = "" if vector is None or len(vectors) == 1 else f" {vector.name}"
                row[name] = evaluate(
                    model,
                    tokenizer,
                    examples,
                    metrics,
                    batch_size=batch_size,
                    max_length=max_length,
                    max_new_tokens=max_new_tokens,
                    stage=f"evaluating{variant}" + (f" on {name}" if len(data) > 1 else ""),
                    progress=progress,
                )
            found.append(row)
    return found


def load_for_evaluation(
    base: Checkpoint, device: str, *, trust_remote_code: bool = False, progress: Progress = silent
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer in f32 onto a device.

    Raises:
        TrainingError: The model is a masked language model. The errors of `load_model` are raised too.
    """
    computer = device_of(device)
    progress("loading", 0, 1, base.name)
    model, tokenizer = load_model(base.path, trust_remote_code=trust_remote_code)
    model.to(computer)  # type: ignore[arg-type]  # transformers' wrapper of it is typed without self
    progress("loading", 1, 1, "")
    if is_masked(model):
        raise TrainingError(f"{base.name} is a masked language model: it cannot continue a text or generate an answer")
    return model, tokenizer


def write_answers(path: Path, examples: Sequence[Example], answers: Sequence[str], *, force: bool = False) -> None:
    """Write answers as JSON lines with the keys "prompt", "completion" and "answer".

    The messages of a prompt are joined by line breaks.

    Args:
        path: The file to write.
        examples: The examples.
        answers: One answer per example.
        force: Whether to replace an existing file.

    Raises:
        OutputExistsError: The file exists and `force` is False. The other errors of `check_file` are raised too.
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
) -> Scores:
    """The loss in nats per completion token, from the rows of the examples."""
    pairs = is_encoder_decoder(model)
    check_reading(model, rows[0])
    accepts, collated = accepted_arguments(model), collator_of(model, pad_id(tokenizer))
    sums, counts = [0.0] * len(rows), [0] * len(rows)
    lengths = [row["input_ids"] + row["labels"] if pairs else row["input_ids"] for row in rows]
    for batch in _batches(lengths, batch_size):
        inputs = _to_device(model, collated([rows[i] for i in batch]))
        # an encoder-decoder derives the decoder's input from the labels, so its logits are aligned with them
        labels = inputs["labels"] if pairs else inputs.pop("labels")[:, 1:]
        if "use_cache" in accepts:
            inputs["use_cache"] = False
        logits = model(**inputs).logits
        logits = logits if pairs else logits[:, :-1]
        # per row, because log-probabilities of the whole batch would double the memory of its logits
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
    return Scores(tuple(sums), tuple(counts))


def _check_answers(examples: Sequence[Example]) -> None:
    """Raise DataError for an example whose answer is not plain text."""
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
    """Greedy answers in the order of the examples, without special tokens and outer white space.

    Also returns how many prompts were truncated at their beginning.
    """
    pairs = is_encoder_decoder(model)
    target = encode_target if pairs else encode_completion
    longest = max(len(target(example, tokenizer)) for example in examples)
    new_tokens = max_new_tokens or min(longest + _SPARE_TOKENS, max_length // 2)
    if not 0 < new_tokens < max_length:
        raise UsageError(f"{new_tokens} new tokens leave no room for a prompt: an example may have {max_length} tokens")
    pad = pad_id(tokenizer)
    # plain text has no prompt, so it is generated from a first token
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad
    if pairs:
        fitted = [fit_source(example, tokenizer, max_length) for example in examples]
        prompts, cut = [ids for ids, _ in fitted], sum(length > max_length for _, length in fitted)
    else:
        whole, most = [encode_prompt(example, tokenizer) for example in examples], max_length - new_tokens
        prompts, cut = [ids[-most:] or [begin] for ids in whole], sum(len(ids) > most for ids in whole)
    answers = [""] * len(prompts)
    # the model's own settings are replaced, because they may sample, penalise repetition or forbid tokens
    own = model.generation_config
    ends = _end_tokens(own.eos_token_id, tokenizer)
    from transformers import GenerationConfig

    greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=ends or None)
    if pairs:
        # the first tokens of a decoder are part of the model, not of the answer
        greedy.decoder_start_token_id = _decoder_start(model)
        greedy.forced_bos_token_id = own.forced_bos_token_id
        if pad not in ends:
            greedy.suppress_tokens = [pad]  # no label contains it, so training does not teach the model to avoid it
    model.generation_config = greedy
    try:
        for batch in _batches(prompts, batch_size):
            rows = [{"input_ids": prompts[i], "labels": prompts[i]} for i in batch]
            inputs = _to_device(model, collate_pairs(rows, pad) if pairs else collate(rows, pad, frozenset()))
            del inputs["labels"]
            generated = model.generate(  # type: ignore[operator]  # transformers types it as Tensor | Module
                **inputs, generation_config=greedy
            )
            skipped = 1 if pairs else inputs["input_ids"].shape[1]  # a decoder's output begins with its start token
            for i, row in zip(batch, generated[:, skipped:].tolist(), strict=True):
                length = next((index for index, token in enumerate(row) if token in ends), len(row))
                answers[i] = tokenizer.decode(row[:length], skip_special_tokens=True).strip()
            advance(len(batch))
    finally:
        model.generation_config = own
    return answers, cut


def _decoder_start(model: PreTrainedModel) -> int:
    """The token with which a decoder begins, determined as `generate` does. Raises TrainingError if there is none."""
    config: Any = model.config
    for name in ("decoder_start_token_id", "bos_token_id"):
        for settings in (model.generation_config, config, config.get_text_config(decoder=True)):
            if (token := getattr(settings, name, None)) is not None:
                return int(token)
    raise TrainingError(f"{type(model).__name__} has no decoder_start_token_id, so it cannot generate answers")


def _end_tokens(own: int | list[int] | None, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those of the model, and that of the tokenizer, which training uses."""
    of_model = own if isinstance(own, list) else [own]
    return sorted({token for token in (*of_model, tokenizer.eos_token_id) if token is not None})


def _batches(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of rows in batches of `size`, longest first: little padding, and lack of memory shows early."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return (order[start : start + size] for start in range(0, len(order), size))


def _to_device(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
