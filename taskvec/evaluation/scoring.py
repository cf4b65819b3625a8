"""Metrics of generated answers, and checks of the request for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from ..arguments import instances, whole
from ..errors import UsageError
from ..packages import require

METRICS = ("loss", "exact_match", "rouge1")
MARK = "####"  # precedes the result of a GSM8K solution
_DROPPED = str.maketrans("", "", ",$%")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)", re.ASCII)


def check_request(metrics: Sequence[str], **counts: int | None) -> None:
    """Check the metrics and options of an evaluation.

    Args:
        metrics: Names of metrics.
        **counts: Option -> a number that must be positive, or None.

    Raises:
        UsageError: The metrics are not a list, there is none, one is unknown, a package is missing, a count is not a
            positive whole number, or the length of answers is given although no metric needs answers.
    """
    instances("`metrics`", metrics, str)
    if not metrics:
        raise UsageError(f"`metrics` must be a list with at least one of {', '.join(METRICS)}, found {metrics!r}")
    for metric in metrics:
        if metric not in METRICS:
            raise UsageError(f"`metric` is one of {', '.join(METRICS)}, found {metric!r}")
    for name, count in counts.items():
        if count is not None and whole(f"`{name}`", count) <= 0:
            raise UsageError(f"`{name}` must be greater than zero, found {count}")
    if counts.get("max_new_tokens") is not None and not needs_answers(metrics):
        raise UsageError(
            "`max_new_tokens` needs `metric=exact_match` or `metric=rouge1`: the loss does not depend on answers"
        )
    if "rouge1" in metrics:
        require("the metric rouge1", "eval")
    else:
        require("an evaluation", "train")


def needs_answers(metrics: Sequence[str]) -> bool:
    """Whether one of the metrics compares answers, so that they must be generated."""
    return any(metric != "loss" for metric in metrics)


def exact_match(completion: str, answer: str) -> bool:
    """Whether an answer equals the completion, apart from leading and trailing white space.

    If the completion contains MARK, only the text after the last MARK of each is compared, and an answer without MARK
    is wrong. If that text of the completion is a number, it is compared as a number with the first word after the MARK
    of the answer. Commas, $, % and a trailing full stop are not part of a number, and 18 equals 18.0. If it is not a
    number, the texts are compared.

    Args:
        completion: The expected text.
        answer: The generated text.
    """
    if MARK not in completion:
        return answer.strip() == completion.strip()
    if MARK not in answer:
        return False
    wanted, given = (text.rpartition(MARK)[2].strip() for text in (completion, answer))
    number = _number(wanted)
    if number is None:
        return given == wanted
    words = given.removeprefix("$").split()
    return bool(words) and _number(words[0]) == number


def _number(text: str) -> Decimal | None:
    text = text.translate(_DROPPED).strip().rstrip(".")
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def rouge1(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """ROUGE-1 F1 of each answer, computed by rouge-score without stemming.

    Args:
        completions: The expected texts.
        answers: The generated texts, one per completion.

    Returns:
        One number in [0, 1] per answer.

    Raises:
        UsageError: rouge-score is not installed.
    """
    require("the metric rouge1", "eval", "rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"], use_stemmer=False)
    pairs = zip(completions, answers, strict=True)
    return [float(scorer.score(completion, answer)["rouge1"].fmeasure) for completion, answer in pairs]
