"""Metrics: which there are, and how an answer is compared with the completion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from ..arguments import whole
from ..errors import UsageError

METRICS = ("loss", "exact_match", "rouge1")
MARK = "####"  # what the result of a GSM8K solution stands behind
_DROPPED = str.maketrans("", "", ",$%")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)", re.ASCII)


def check_request(metrics: Sequence[str], **counts: int | None) -> None:
    """Raise UsageError for an unknown metric, none at all, one whose package is missing, or a count that is not > 0."""
    for metric in metrics or [""]:
        if metric not in METRICS:
            raise UsageError(f"metric is one of {', '.join(METRICS)}, found {metric!r}")
    for name, count in counts.items():
        if count is not None and whole(name.replace("_", "-"), count) <= 0:
            raise UsageError(f"`{name}` must be greater than zero, found {count}")
    if "rouge1" in metrics:
        check_rouge()


def needs_answers(metrics: Sequence[str]) -> bool:
    """Whether one of the metrics compares answers, so that they are generated."""
    return any(metric != "loss" for metric in metrics)


def exact_match(completion: str, answer: str) -> bool:
    """Whether the answer is the completion, white space around both aside.

    Where the completion has a MARK, only what follows the last one in each is compared: as a number, if that is all
    that follows in the completion, with the first word in the answer, else as text. Commas, $, % and a full stop at the
    end are no part of a number, and 18 is 18.0. An answer without a MARK is then wrong.
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


def check_rouge() -> None:
    """Raise UsageError where the package rouge-score is missing."""
    try:
        import rouge_score.rouge_scorer  # noqa: F401
    except ImportError:
        raise UsageError("the metric rouge1 needs rouge-score: pip install 'taskvec[eval]'") from None


def rouge1(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """ROUGE-1 F1 of each answer, in [0, 1], by rouge-score without stemming. Raises UsageError where it is missing."""
    check_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"], use_stemmer=False)
    pairs = zip(completions, answers, strict=True)
    return [float(scorer.score(completion, answer)["rouge1"].fmeasure) for completion, answer in pairs]
