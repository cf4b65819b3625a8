"""Adapters of peft with random weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def make_adapter(
    base: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    kind: Any = AutoModelForCausalLM,
    config: Any = None,
    **options: Any,
) -> Path:
    """Write an adapter, a LoRA unless a configuration is given.

    Args:
        base: The model folder.
        folder: The folder to write.
        dtype: The dtype of the model that it is made for.
        kind: The loader of the model.
        config: The configuration of the adapter.
        **options: Arguments of LoraConfig.
    """
    arguments = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    chosen = config or LoraConfig(init_lora_weights=False, **arguments)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about models that peft does not know
        model = get_peft_model(kind.from_pretrained(base, dtype=dtype), chosen)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder
