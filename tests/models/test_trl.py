"""TRL trains leaves, and sends a generation server the dense model: its own code, with a client that writes down."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taskvec import TaskVector, apply, sparse_finetune
from taskvec.models.loading import load_model
from taskvec.models.placement import eligible_parameters
from taskvec_formats import ModelFolder

if sys.version_info < (3, 11):
    pytest.skip("TRL 1.16 needs Python 3.11", allow_module_level=True)

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration


class Client:
    """Takes weights as a vLLM server's client does."""

    def __init__(self) -> None:
        self.received: dict[str, torch.Tensor] = {}

    def update_named_params(self, metadata: list[Any], parameters: Iterator[tuple[str, torch.Tensor]]) -> None:
        for (announced, dtype, shape), (name, values) in zip(metadata, parameters, strict=True):
            assert (announced, dtype, shape) == (name, str(values.dtype).removeprefix("torch."), list(values.shape))
            self.received[name] = values.clone()

    def reset_prefix_cache(self) -> None:
        pass


class Generation(VLLMGeneration):  # type: ignore[misc]
    """TRL's, without a server."""

    def _init_vllm(self) -> None:
        self.vllm_client = Client()


def test_grpo_trains_deltas_and_synchronises_the_dense_model(llama: Path, tmp_path: Path) -> None:
    base = ModelFolder(llama)
    model: Any
    model, tokenizer = load_model(llama)
    masks = {name: np.arange(0, p.numel(), 7) for name, p in eligible_parameters(model).items()}
    with sparse_finetune(model, masks, base) as tickets:
        trainer = GRPOTrainer(
            model=tickets,
            reward_funcs=lambda completions, **_: [float(number % 2) for number, _ in enumerate(completions)],
            args=GRPOConfig(
                output_dir=str(tmp_path / "run"),
                max_steps=1,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=4,
                learning_rate=1e-2,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=False,
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": "the"}] * 4),
            processing_class=tokenizer,
        )
        trainer.vllm_generation = Generation(trainer.model, trainer.accelerator, tokenizer, mode="server")
        trainer.vllm_generation.model = tickets.model
        trainer.train()
        trainer.vllm_generation.sync_weights()
        trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert trained == {id(delta) for delta in tickets.parameters()}
        tickets.vector().save(tmp_path / "x.lota")
    received = trainer.vllm_generation.vllm_client.received
    apply(TaskVector.open(tmp_path / "x.lota"), base, tmp_path / "out")
    expected = dict(type(model).from_pretrained(tmp_path / "out").named_parameters())
    assert received.keys() == expected.keys()
    assert all(torch.equal(received[name], expected[name]) for name in expected)
    start = dict(load_model(llama)[0].named_parameters())
    assert {name for name in start if not torch.equal(start[name], received[name])} == masks.keys()
