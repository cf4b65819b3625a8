"""Language models as transformers loads them, and how their parameters correspond to tensors on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from taskvec_formats import Checkpoint
from taskvec_formats.dtypes import BitArray, DType

from ..errors import TrainingError, UsageError

# safetensors dtype -> torch dtype, for those in which weights are kept
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def load_model(path: Path) -> tuple[PreTrainedModel, Any]:
    """The causal language model of a folder, in f32, and its tokenizer.

    f32 whatever the folder holds: calibration adds updates far below the resolution of bf16, and a CPU without bf16
    instructions multiplies bf16 matrices many times slower. What is trained is rounded to the folder's dtype as it is
    written back (leaves.py). Raises TrainingError where transformers cannot load the folder.
    """
    if not path.is_dir():
        raise TrainingError(f"{path} is a single file: a model folder with config and tokenizer is needed here")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TrainingError(f"{path} cannot be loaded as a causal language model: {reason[0]}") from None
    return model, tokenizer


def device_of(choice: str) -> torch.device:
    """Where to compute: "auto" is an accelerator where there is one, else the CPU. Raises UsageError."""
    if choice not in ("auto", "cpu"):
        raise UsageError(f"device is one of auto, cpu, found {choice!r}")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if choice == "cpu" or found is None else found


def eligible_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight matrices of the linear layers inside the transformer blocks: parameter name -> Parameter.

    By type of module, not by name: nn.Linear, and Conv1D, GPT-2's transposed linear layer, below an nn.ModuleList,
    which is how transformers holds repeated blocks. Embeddings, norms, biases and the output head stay out, as in the
    paper's experiments (arXiv 2406.16797, appendix B). Raises TrainingError where a model has no such layer.
    """
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and any(name.startswith(f"{block}.") for block in blocks)
    }
    chosen = {name: parameter for name, parameter in model.named_parameters() if name in linear}
    if not chosen:
        raise TrainingError(f"{type(model).__name__} has no linear layers inside transformer blocks")
    return chosen


def tensor_names(model: nn.Module, parameters: Iterable[str], base: Checkpoint) -> dict[str, str]:
    """parameter name -> name of its tensor in the checkpoint.

    A checkpoint of the bare model lacks the prefix that the head's class adds, one of the whole model has it.
    Raises TrainingError, naming the parameter, where none fits in name and shape, or its dtype cannot be trained.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {}
    for parameter in parameters:
        candidates = (parameter, parameter.removeprefix(prefix), prefix + parameter)
        found = next((name for name in candidates if name in base.tensors), None)
        if found is None:
            raise TrainingError(f"parameter {parameter!r} has no tensor of its name in {base.name}")
        info = base.tensors[found]
        if info.shape != shapes[parameter]:
            raise TrainingError(
                f"parameter {parameter!r} is {list(shapes[parameter])} in the model "
                f"but {list(info.shape)} in {base.name}"
            )
        if info.dtype.name not in TORCH_DTYPES:
            raise TrainingError(f"tensor {found!r} is {info.dtype.name}, which cannot be trained")
        names[parameter] = found
    return names


def values_of(dtype: DType, bits: BitArray) -> np.ndarray[tuple[int], np.dtype[Any]]:
    """Carriers as numbers one can compute with: f32 (f64 for F64), [size], a fresh array."""
    return bits.view(dtype.real).astype(dtype.compute)


def bits_of(dtype: DType, weights: torch.Tensor) -> BitArray:
    """A tensor rounded to `dtype`, as flat carriers on the CPU, [size]."""
    rounded = weights.detach().to(TORCH_DTYPES[dtype.name]).contiguous().cpu()
    bits: BitArray = rounded.view(_CARRIERS[dtype.itemsize]).numpy().reshape(-1).view(dtype.carrier)
    return bits
