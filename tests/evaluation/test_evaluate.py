"""Evaluation: metrics against naive ones, greedy answers against a naive loop, whatever the batch."""

from __future__ import annotations

import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import ROWS, WORDS, write_rows
from transformers import PreTrainedModel

from taskvec.data.examples import Example, read_examples
from taskvec.data.rows import IGNORED, encode, encode_prompt
from taskvec.devices import device_of
from taskvec.errors import DataError, TrainingError, UsageError
from taskvec.evaluation.estimate import Estimate, estimate
from taskvec.evaluation.evaluate import Evaluation, evaluate, write_answers
from taskvec.evaluation.scoring import exact_match, rouge1
from taskvec.models.loading import load_model

ANSWERED = ("exact_match", "rouge1")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """A dozen examples of many lengths, of all forms."""
    words, dice = WORDS[4:], np.random.default_rng(0)
    rows: list[dict[str, object]] = [
        {"prompt": " ".join(dice.choice(words, 1 + 2 * i)), "completion": " ".join(dice.choice(words, 1 + i % 4))}
        for i in map(int, dice.permutation(8))
    ]
    return read_examples(write_rows(tmp_path_factory.mktemp("examples") / "test.jsonl", rows + ROWS))


@pytest.fixture(params=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, object]:
    """A tokenizer and a model of each kind."""
    return load_with_opinions(request.getfixturevalue(request.param))


def load_with_opinions(folder: Path) -> tuple[PreTrainedModel, object]:
    """A fresh model says the same to everything; large weights make one that does not."""
    model, tokenizer = load_model(folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval(), tokenizer


def naive_losses(model: PreTrainedModel, tokenizer: object, examples: list[Example]) -> tuple[list[float], list[int]]:
    """Each row by itself, unpadded, through transformers' own loss: sums in nats, and tokens."""
    sums, counts = [], []
    for example in examples:
        row = encode(example, tokenizer, 64)
        counts.append(sum(label != IGNORED for label in row["labels"]))
        with torch.no_grad():
            mean = model(**{name: torch.tensor([ids]) for name, ids in row.items()}).loss
        sums.append(float(mean) * counts[-1])
    return sums, counts


def naive_answer(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    """The likeliest token, again and again, without a cache."""
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == 2:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 32])
def test_the_loss_is_transformers_own(
    batch_size: int, loaded: tuple[PreTrainedModel, object], examples: list[Example]
) -> None:
    sums, counts = naive_losses(*loaded, examples)
    found = evaluate(*loaded, examples, batch_size=batch_size).metrics["loss"]
    expected = sum(sums) / sum(counts)
    assert found.value == pytest.approx(expected, abs=1e-5)
    n = len(sums)
    spread = sum((loss - expected * count) ** 2 for loss, count in zip(sums, counts, strict=True))
    assert found.standard_error == pytest.approx(math.sqrt(n / (n - 1) * spread) / sum(counts), abs=1e-5)


def test_a_batch_answers_as_its_rows_do(loaded: tuple[PreTrainedModel, object], examples: list[Example]) -> None:
    """In the order of the examples, up to the end token or the cap, as a loop without batch, padding or cache does."""
    model, tokenizer = loaded

    def decoded(rows: list[list[int]]) -> list[str]:
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    prompts = [encode_prompt(example, tokenizer) or [tokenizer.bos_token_id] for example in examples]
    tokens = [naive_answer(model, prompt, 14) for prompt in prompts]
    expected = decoded(tokens)
    assert len(set(expected)) > 6
    assert len({len(row) for row in tokens}) > 1, "some should end before the cap"
    for batch_size in (1, 3, 32):
        scored = evaluate(model, tokenizer, examples, ANSWERED, batch_size=batch_size)
        assert scored.answers == expected
    completions = [example.completion for example in examples]
    right = [float(a == c) for a, c in zip(expected, completions, strict=True)]
    assert scored.metrics["exact_match"] == estimate(right)
    assert scored.metrics["rouge1"] == estimate(rouge1(completions, expected))
    assert 0 < scored.metrics["rouge1"].value < 1
    cut = evaluate(model, tokenizer, examples, ["rouge1"], max_new_tokens=2)
    assert cut.answers == decoded([row[:2] for row in tokens])


def test_what_is_right_counts(loaded: tuple[PreTrainedModel, object], examples: list[Example]) -> None:
    """Completions made from the model's own answers: three right, the others not."""
    model, tokenizer = loaded
    answers = evaluate(model, tokenizer, examples, ["exact_match"]).answers
    said = [(example, answer) for example, answer in zip(examples, answers, strict=True) if answer]
    known = [
        replace(example, completion=f" {answer}\n" if i < 3 else f"{answer} is")
        for i, (example, answer) in enumerate(said)
    ]
    scored = evaluate(model, tokenizer, known, ["exact_match"], max_new_tokens=14)
    n = len(known)
    assert n > 6
    share = 3 / n
    error = math.sqrt(share * (1 - share) / (n - 1))
    assert scored.metrics["exact_match"].value == pytest.approx(share)
    assert scored.metrics["exact_match"].standard_error == pytest.approx(error)


def test_only_what_the_metrics_need_is_computed(llama: Path, examples: list[Example]) -> None:
    model, tokenizer = load_model(llama)
    widths = []
    handle = model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    only_loss = evaluate(model, tokenizer, examples, ["loss"], batch_size=5)
    assert widths.pop(0) <= 16, "whether the model sees what it predicts is tried on a few tokens"
    assert len(widths) == 3
    assert widths == sorted(widths, reverse=True), "the longest come first"
    assert only_loss.answers == []
    widths.clear()
    evaluate(model, tokenizer, examples, ["exact_match"], batch_size=32, max_new_tokens=5)
    handle.remove()
    assert len(widths) <= 5
    assert widths[1:] == [1] * (len(widths) - 1), "after the prompts, one token at a time"
    asked = ["rouge1", "loss", "exact_match"]
    assert list(evaluate(model, tokenizer, examples, asked).metrics) == asked


def test_the_model_s_own_settings_stay_out_of_the_answers(llama: Path, examples: list[Example]) -> None:
    model, tokenizer = load_with_opinions(llama)
    expected = evaluate(model, tokenizer, examples, ["rouge1"]).answers
    config = model.generation_config
    config.do_sample, config.temperature, config.top_p, config.top_k = True, 9.0, 0.5, 3
    config.repetition_penalty, config.num_beams, config.min_new_tokens, config.max_length = 9.0, 3, 12, 7
    before, records = config.to_dict(), []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        assert evaluate(model, tokenizer, examples, ["rouge1"]).answers == expected
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert [record.getMessage() for record in records] == []
    assert model.generation_config is config
    assert config.to_dict() == before


def test_an_answer_ends_where_the_model_or_the_tokenizer_says(llama: Path, examples: list[Example]) -> None:
    model, tokenizer = load_model(llama)
    (answer,) = evaluate(model, tokenizer, examples[:1], ["rouge1"]).answers
    first = answer.split()[0]
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(first), 2]
    assert evaluate(model, tokenizer, examples[:1], ["rouge1"]).answers == [""]
    model.generation_config.eos_token_id = None
    assert evaluate(model, tokenizer, examples[:1], ["rouge1"]).answers == [answer]
    tokenizer.eos_token = first
    assert evaluate(model, tokenizer, examples[:1], ["rouge1"]).answers == [""]


def test_a_prompt_is_cut_to_what_the_model_has_positions_for(gpt2: Path) -> None:
    """64 of them. Half at most are for the answer, or as many as are asked for."""
    model, tokenizer = load_with_opinions(gpt2)
    words = np.random.default_rng(1).choice(WORDS[4:], 200)

    def example(prompt: int, completion: int) -> Example:
        messages = ({"role": "user", "content": " ".join(words[-prompt:])},) if prompt else ()
        return Example(messages, " ".join(words[:completion]), "here:1")

    def answer(given: Example, **options: int) -> str:
        return evaluate(model, tokenizer, [given], ["exact_match"], **options).answers[0]

    assert answer(example(200, 3)) == answer(example(64 - 12, 3))
    assert answer(example(200, 3)) != answer(example(64 - 13, 3)), "more was cut than needed"
    assert answer(example(200, 100)) == answer(example(32, 100))
    assert len(answer(example(200, 100)).split()) <= 32
    assert answer(example(200, 3), max_new_tokens=50) == answer(example(14, 3), max_new_tokens=50)
    assert answer(example(200, 3), max_length=20) == answer(example(10, 3), max_length=20)
    with pytest.raises(UsageError, match="64 new tokens leave no room for a prompt: an example may have 64 tokens"):
        answer(example(3, 3), max_new_tokens=64)
    with pytest.raises(UsageError, match="0 new tokens leave no room"):
        answer(example(3, 3), max_length=1)

    losses = [evaluate(model, tokenizer, [example(prompt, 5)]).metrics["loss"].value for prompt in (200, 64 - 6)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("counted", [False, True])
def test_standard_errors(counted: bool) -> None:
    dice = np.random.default_rng(4)
    for n in (2, 3, 50):
        counts = dice.integers(1, 9, n)
        sums = dice.exponential(size=n) * counts
        if not counted:
            found = estimate(sums.tolist())
            assert found.value == pytest.approx(sums.mean())
            assert found.standard_error == pytest.approx(sums.std(ddof=1) / math.sqrt(n))
            continue
        found = estimate(sums.tolist(), counts.tolist())
        ratio = sums.sum() / counts.sum()
        residuals = [loss - ratio * count for loss, count in zip(sums, counts, strict=True)]
        assert found.value == pytest.approx(ratio)
        spread = math.sqrt(n / (n - 1) * sum(r * r for r in residuals))
        assert found.standard_error == pytest.approx(spread / counts.sum())
        assert estimate((sums * 2).tolist(), (counts * 2).tolist()).standard_error == pytest.approx(
            found.standard_error
        )
    assert estimate([3.0], [2]) == Estimate(1.5, None)


def test_the_standard_error_of_a_loss_is_how_far_another_draw_moves_it() -> None:
    """Many draws of forty examples, whose losses depend on their lengths: the formula says how far apart they lie."""
    dice = np.random.default_rng(5)
    draws = []
    for _ in range(2000):
        counts = dice.integers(1, 30, 40)
        sums = counts * (1 + counts / 30) * dice.gamma(4, 0.25, 40)
        draws.append(estimate(sums.tolist(), counts.tolist()))
    apart = np.std([draw.value for draw in draws])
    assert np.mean([draw.standard_error for draw in draws]) == pytest.approx(apart, rel=0.06)


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("two", " two\n", True),
        ("two\n", "two", True),
        ("two", "Two", False),
        ("two", "two .", False),
        ("18", "18.0", False),  # without the mark it is text
        ("9 + 9 = 18\n#### 18", "#### 18", True),
        ("#### 18", "whatever it takes\n#### 18.0", True),
        ("#### 18", "####18", True),
        ("#### 18", "#### 18.", True),
        ("#### 18.", "#### 18", True),
        ("#### 18", "#### $18.00", True),
        ("#### 18", "#### $ 18", True),
        ("#### $1,234.50", "#### 1234.5", True),
        ("#### 25%", "#### 25", True),
        ("#### -5", "#### -$5.0", True),
        ("#### +5", "#### 5", True),
        ("#### .5", "#### 0.50", True),
        ("#### 0", "#### -0", True),
        ("#### 18", "#### 18 apples", True),
        ("#### 18", "#### 18\nNext question", True),
        ("#### 18", "#### 20 #### 18", True),
        ("#### 18", "#### 18 #### 20", False),
        ("#### 18", "18", False),
        ("#### 18", "", False),
        ("#### 18", "####", False),
        ("#### 18", "#### eighteen", False),
        ("#### 18", "#### 180", False),
        ("#### 18", "#### -18", False),
        ("#### 18", "#### 1.8", False),
        ("#### 0.1", "#### 0.10000000000000000001", False),
        ("#### 9007199254740993", "#### 9007199254740992", False),
        ("#### 1", "#### 1e0", False),
        ("#### 1/2", "#### 1/2", True),
        ("#### 1/2", "#### 1/3", False),
        ("#### 1/2", "#### 0.5", False),
        ("#### 1, 2", "#### 1, 2", True),
        ("#### 1, 2", "#### 1, 3", False),
        ("#### nan", "#### nan", True),
        ("#### nan", "#### inf", False),
        ("#### north", "x #### north\n", True),
        ("#### north", "north", False),
        ("#### north", "#### south", False),
    ],
)
def test_what_is_an_exact_match(completion: str, answer: str, right: bool) -> None:
    assert exact_match(completion, answer) is right


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("the cat sat", "the cat sat", 1),
        ("the cat sat", "sat, CAT: the!", 1),  # order, case and punctuation do not count
        ("the cat sat", "the the cat", 2 / 3),  # a word counts as often as it occurs in both
        ("a b c d", "a b", 2 / 3),  # precision 1, recall 1/2
        ("a b", "c d e a", 1 / 3),  # precision 1/4, recall 1/2
        ("running cats", "run cat", 0),  # no stemming
        ("SELECT name FROM t;", "select NAME from t", 1),
        ("the cat", "", 0),
        ("the cat", "dog", 0),
    ],
)
def test_rouge_counts_common_words(completion: str, answer: str, score: float) -> None:
    assert rouge1([completion, "x"], [answer, "x"]) == [pytest.approx(score), 1]


def test_requests_that_cannot_be_meant(llama: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(llama)
    for metrics, message in (
        (["loss", "bleu"], "^`metric` is one of loss, exact_match, rouge1, found 'bleu'"),
        ([], r"^`metrics` must be a list with at least one of loss, exact_match, rouge1, found \[\]"),
        ("loss", "^`metrics` must be a list of strings, found 'loss'"),
        (None, "^`metrics` must be a list of strings, found None"),
        (["loss", 3], "^`metrics`, number 2, must be a str, found 3"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(*loaded, examples, metrics)  # type: ignore[arg-type]
    for name in ("batch_size", "max_length", "max_new_tokens"):
        with pytest.raises(UsageError, match=f"^`{name}` must be a whole number, found 1.5"):
            evaluate(*loaded, examples, ["loss"], **{name: 1.5})
        for value in (0, -1):
            with pytest.raises(UsageError, match=f"`{name}` must be greater than zero, found {value}"):
                evaluate(*loaded, examples, ["loss"], **{name: value})
    with pytest.raises(UsageError, match="no example"):
        evaluate(*loaded, [])
    with pytest.raises(UsageError, match=r"`device` is one of auto, cpu, cuda, .*, found 'toaster'"):
        device_of("toaster")
    with pytest.raises(DataError, match=r"test\.jsonl:1: no token of the completion"):
        evaluate(*loaded, examples, max_length=1)
    for module in ("rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"needs the package rouge-score: pip install 'taskvec\[eval\]'"):
        evaluate(*loaded, examples, ["rouge1"])


def test_one_example_has_no_standard_error(llama: Path, examples: list[Example]) -> None:
    scored = evaluate(*load_model(llama), examples[:1], ["loss", "exact_match", "rouge1"])
    assert [found.standard_error for found in scored.metrics.values()] == [None] * 3
    assert isinstance(scored, Evaluation)
    assert scored.examples == len(scored.answers) == 1


def test_a_loss_that_is_not_a_number_names_its_line(llama: Path, examples: list[Example]) -> None:
    model, tokenizer = load_model(llama)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"test\.jsonl:\d+: the loss is nan"):
        evaluate(model, tokenizer, examples)


def test_answers_are_written_beside_their_prompts(examples: list[Example], tmp_path: Path) -> None:
    chat = ({"role": "system", "content": "be \u2028 brief"}, {"role": "user", "content": "one"})
    write_answers(tmp_path / "a.jsonl", [Example(chat, "tw\u00f6", "here:1"), examples[-1]], ["2", ""])
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"prompt": "be \u2028 brief\none", "completion": "tw\u00f6", "answer": "2"},
        {"prompt": "", "completion": examples[-1].completion, "answer": ""},
    ]
    assert lines[-1] == ""
