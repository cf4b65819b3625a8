"""Two fine-tunes of a tiny model of each of several architectures, as model folders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from families import FAMILIES, make_tokenizer, model_of
from transformers import PreTrainedModel

ARCHITECTURES = """Qwen3MoeForCausalLM MixtralForCausalLM GptOssForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM
    Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM MambaForCausalLM Mamba2ForCausalLM
    JambaForCausalLM Qwen3NextForCausalLM Qwen3_5MoeForCausalLM Qwen3_5ForConditionalGeneration
    Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration Qwen3VLForConditionalGeneration
    LlavaForConditionalGeneration Llama4ForConditionalGeneration""".split()
NAMES = ("base", "one", "two")
_SIZES = ("24KB", "16KB", "10MB")  # of the shards of each


def narrowed(model: PreTrainedModel) -> PreTrainedModel:
    """Store matrices in bf16, and vectors in f32 and f16."""
    for number, parameter in enumerate(model.parameters()):
        narrow = torch.bfloat16 if parameter.dim() > 1 else (torch.float32, torch.float16)[number % 3 == 0]
        parameter.data = parameter.data.to(narrow)
    return model


def tuned(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return a copy whose parameters are changed everywhere, at a tenth of the positions, or nowhere, in turn."""
    model, dice = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    for number, parameter in enumerate(model.parameters()):
        change = torch.randn(parameter.shape, generator=dice) * 1e-2
        at = torch.rand(parameter.shape, generator=dice) < (1.0, 0.1, 0.0)[(number + seed) % 3]
        # the other positions keep their bits, also those of zeros
        parameter.data = torch.where(at, (parameter.data.float() + change).to(parameter.dtype), parameter.data)
    return model


def write_pair(
    name: str, folder: Path, stored: Callable[[PreTrainedModel], PreTrainedModel] = narrowed
) -> tuple[PreTrainedModel, ...]:
    """Write a base and two fine-tunes, as base/, one/ and two/, in different numbers of shards.

    Args:
        name: One of ARCHITECTURES.
        folder: The folder for them.
        stored: Converts the weights of the base to the dtypes in which they are stored.

    Returns:
        The three models.
    """
    (family,) = (family for family in FAMILIES if family.name == name)
    base = stored(model_of(family))
    models = (base, tuned(base, 1), tuned(base, 2))
    for each, model, size in zip(NAMES, models, _SIZES, strict=True):
        model.save_pretrained(folder / each, max_shard_size=size)
        make_tokenizer().save_pretrained(folder / each)
    return models
