"""Options of a training run do what their words say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from models import WORDS, write_rows
from transformers import LlamaForCausalLM

from taskvec import Checkpoint
from taskvec.training.options import Options
from taskvec.training.train import train

QUICK = Options(calibration_steps=2, steps=3, batch_size=2, lr=1e-3, device="cpu")
TEN = [{"prompt": f"{one} plus {other} is", "completion": "six"} for one in WORDS[7:9] for other in WORDS[7:12]]


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Ten examples, no two of which are alike."""
    return write_rows(tmp_path / "ten.jsonl", TEN)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The batches that a Llama computes, as it computes them: of each row its tokens without padding."""
    seen = []
    forward = LlamaForCausalLM.forward

    @wraps(forward)
    def watched(model: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        seen.append([tuple(token for token in row if token) for row in kwargs["input_ids"].tolist()])
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    return seen


@pytest.mark.parametrize(
    ("phase", "epochs", "batch_size", "accumulate", "steps", "seen"),
    [
        ("training", 3, 8, 1, 6, [3] * 10),
        ("training", 2, 3, 3, 4, [2] * 10),
        ("training", 1.5, 8, 1, 3, [1] * 2 + [2] * 8),
        ("training", 0.01, 2, 1, 1, [1] * 2),
        ("calibration", 2, 4, 2, 4, [2] * 10),
    ],
)
def test_passes_over_the_data_see_every_example(
    phase: str,
    epochs: float,
    batch_size: int,
    accumulate: int,
    steps: int,
    seen: list[int],
    llama: Path,
    ten: Path,
    batches: list[list[tuple[int, ...]]],
) -> None:
    options = replace(QUICK, batch_size=batch_size, accumulate=accumulate)
    if phase == "training":
        options = replace(options, steps=None, epochs=epochs, mask="random", calibration_steps=20)
    else:
        options = replace(options, steps=0, calibration_epochs=epochs, calibration_steps=20)
    training = train(Checkpoint(llama), ten, options)
    assert len(training.calibration_losses or training.curve.losses) == steps
    assert sorted(Counter(row for batch in batches for row in batch).values()) == seen


def test_a_share_of_a_pass_is_counted_as_it_is_written() -> None:
    assert Options(batch_size=1).steps_of(0.7, 10) == 7
    assert Options(batch_size=1).steps_of(0.71, 10) == 8
    assert Options(batch_size=8).steps_of(3, 10) == 6
