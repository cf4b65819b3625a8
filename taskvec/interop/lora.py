"""Export of a vector as a LoRA adapter of peft (arXiv 2106.09685), whose factors approximate the deltas.

The deltas of linear layers and embeddings are approximated by factors of low rank. What has no such factors is stored
with its tuned values: biases of these layers (`bias="lora_only"`), and other modules as a whole (`modules_to_save`).
So are embeddings that share their weights with the output layer, because an adapter of the one has no effect on the
other until it is merged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from taskvec_formats import Checkpoint, Form
from taskvec_formats.container import encode_header
from taskvec_formats.dtypes import DTYPES
from taskvec_formats.system.atomic import atomic_directory

from ..applying.overlay import Patched
from ..destination import appearing
from ..errors import AdapterError
from ..models.low_rank import Factors, low_rank
from ..reporting.progress import Progress, silent
from ..vectors.delta import as_bytes
from ..vectors.vector import TaskVector
from .modules import Modules, Owner, modules_of
from .names import CONFIG, PREFIX, WEIGHTS, name_of_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_F32 = DTYPES["F32"]


@dataclass(frozen=True)
class LoraLayer:
    """A layer of a LoRA adapter that was written.

    Attributes:
        tensor: The tensor of the vector.
        shape: Its shape.
        rank: The rank of its factors.
        error: The Frobenius norm of the delta minus the product of the factors, divided by that of the delta.
    """

    tensor: str
    shape: tuple[int, ...]
    rank: int
    error: float


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter that was written.

    Attributes:
        path: The folder.
        rank: The r of its configuration.
        layers: The layers with factors, in the order of their tensors.
        error: The Frobenius norm of the difference over all layers, divided by that of their deltas.
        saved: Names of the tensors that are stored with their tuned values.
        dropped: The number of weights in the layers with factors whose change is no delta: replacements by NaN or an
            infinite number, and changed signs of zero.
    """

    path: Path
    rank: int
    layers: tuple[LoraLayer, ...]
    error: float
    saved: tuple[str, ...]
    dropped: int


@dataclass(frozen=True)
class _Part:
    """A tensor of the adapter: its factors, or the name of a tensor of the tuned model."""

    form: Form
    content: np.ndarray[Any, Any] | str


def to_lora(
    vector: TaskVector, base: Checkpoint, rank: int, folder: Path, progress: Progress = silent, *, force: bool = False
) -> Lora:
    """Write a vector as a LoRA adapter, which peft loads onto the base.

    Args:
        vector: The vector.
        base: The model folder that it was taken from.
        rank: The largest rank of the factors.
        folder: The folder to write.
        progress: Called for every tensor.
        force: Whether to replace an existing adapter.

    Returns:
        What was written, with the error of each layer.

    Raises:
        AdapterError: The vector changes a tensor that a LoRA adapter cannot hold, or has no entries.
        BaseMismatchError: The vector has another base.
        KindError: It is a patch.
        TrainingError: transformers does not know the model.
    """
    modules = modules_of(vector, base)
    layers: dict[str, tuple[Owner, Factors]] = {}
    biases: list[str] = []
    saved: list[str] = []
    dropped = 0
    for done, (name, spec) in enumerate(vector.specs.items()):
        progress("factorising", done, len(vector.specs), name)
        change = vector.change(name)
        if not len(change.touched()):
            continue
        owners = modules.owners.get(name)
        if owners is None or len(spec.shape) > 2:
            raise AdapterError(
                f"tensor {name!r} is neither the weight of a linear layer or an embedding nor a small parameter of a "
                "module of its own, such as a norm, so a LoRA adapter cannot hold it"
            )
        owner = owners[0]
        if len(owners) > 1 or not _is_matrix(owner):
            (biases if len(owners) == 1 and _is_bias(owner) else saved).append(name)
            continue
        dropped += len(np.setdiff1d(change.replacements.indices, change.delta.indices, assume_unique=True))
        dense = np.zeros(spec.size, np.float32)
        dense[change.delta.indices] = change.delta.values
        found = low_rank(_as_product(owner, dense.reshape(spec.shape)), rank)
        if found.rank:
            layers[name] = owner, found
    progress("factorising", len(vector.specs), len(vector.specs), "")
    adapted = {owner.name for owner, _ in layers.values()}
    # a bias can be stored by itself only beside factors
    alone = [name for name in biases if modules.owners[name][0].name not in adapted]
    saved += alone
    if not layers:
        raise AdapterError(f"{vector.name} changes no linear layer or embedding, which LoRA adapts")
    settings = _settings(layers, modules, base, saved, with_biases=len(alone) < len(biases))
    parts = _parts(modules, layers, settings, base)
    with appearing(folder), atomic_directory(folder, replace=force) as temporary:
        _write(temporary / WEIGHTS, parts, Patched(base, vector))
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    written = [
        LoraLayer(name, vector.specs[name].shape, each.rank, each.residual / each.norm)
        for name, (_, each) in layers.items()
    ]
    norm = math.hypot(*(each.norm for _, each in layers.values()))
    residual = math.hypot(*(each.residual for _, each in layers.values()))
    return Lora(folder, settings["r"], tuple(written), residual / norm, tuple(sorted({*saved, *biases})), dropped)


def _is_matrix(owner: Owner) -> bool:
    return owner.parameter == "weight" and isinstance(owner.module, (nn.Linear, Conv1D, nn.Embedding))


def _is_bias(owner: Owner) -> bool:
    return owner.parameter == "bias" and isinstance(owner.module, (nn.Linear, Conv1D))


def _as_product(owner: Owner, delta: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the matrix that lora_B · lora_A gives. Conv1D and embeddings store its transpose."""
    return delta if isinstance(owner.module, nn.Linear) else delta.T


def _settings(
    layers: Mapping[str, tuple[Owner, Factors]],
    modules: Modules,
    base: Checkpoint,
    saved: list[str],
    *,
    with_biases: bool,
) -> dict[str, Any]:
    ranks = {owner.name: factors.rank for owner, factors in layers.values()}
    most = max(ranks.values())
    lower = {name: rank for name, rank in ranks.items() if rank != most}
    # peft ties modules by itself only if they have certain names
    whole = [owner.name for tensor in saved for owner in modules.owners[tensor]]
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,  # the scale is lora_alpha / r
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "target_modules": list(ranks),
        "modules_to_save": list(dict.fromkeys(whole)) or None,
        "ensure_weight_tying": any(len(modules.owners[tensor]) > 1 for tensor in saved),
        "fan_in_fan_out": any(isinstance(owner.module, Conv1D) for owner, _ in layers.values()),
        "bias": "lora_only" if with_biases else "none",
        "base_model_name_or_path": name_of_base(base),
        "inference_mode": True,
    }
    if type(modules.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        settings["task_type"] = "CAUSAL_LM"
    return settings


def _parts(
    modules: Modules, layers: Mapping[str, tuple[Owner, Factors]], settings: Mapping[str, Any], base: Checkpoint
) -> dict[str, _Part]:
    """Return the tensors of the adapter by name, which are those that peft expects for its configuration."""
    factors: dict[str, np.ndarray[Any, Any]] = {}
    for owner, each in layers.values():
        start = f"{PREFIX}{owner.name}.lora_"
        names = ("embedding_A", "embedding_B") if isinstance(owner.module, nn.Embedding) else ("A.weight", "B.weight")
        factors |= dict(zip((start + name for name in names), (each.right, each.left), strict=True))
    parts = {}
    for name, shape in _expected(modules.model, settings).items():
        held = factors.pop(name, None)
        if held is not None:
            parts[name] = _Part(Form(_F32, held.shape), held)
        else:
            tensor = modules.tensors.get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
            if tensor is None:
                raise AdapterError(f"peft stores {name!r} in such an adapter, for which {base.name} has no tensor")
            parts[name] = _Part(base.tensors[tensor].form, tensor)
        if parts[name].form.shape != shape:
            raise AdapterError(f"peft expects {name!r} as {list(shape)}, but it is {list(parts[name].form.shape)}")
    if factors:
        raise AdapterError(f"peft has no place for {min(factors)!r} in a LoRA adapter of this model")
    return dict(sorted(parts.items()))


def _expected(model: PreTrainedModel, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that peft stores in an adapter with this configuration."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    from .adapters import refusals_of_peft

    own = {key: value for key, value in settings.items() if key not in ("peft_type", "base_model_name_or_path")}
    with refusals_of_peft("peft cannot make such an adapter"):
        wrapped = get_peft_model(model, LoraConfig(**own), low_cpu_mem_usage=True)
        held = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: tuple(value.shape) for name, value in held.items()}


def _write(path: Path, parts: Mapping[str, _Part], tuned: Checkpoint) -> None:
    """Write the tensors of an adapter, those of the tuned model block by block."""
    sizes = {
        name: (part.form.dtype.name, part.form.shape, part.form.size * part.form.dtype.itemsize)
        for name, part in sorted(parts.items(), key=lambda item: -item[1].form.dtype.itemsize)
    }
    with open(path, "wb") as file:
        file.write(encode_header(sizes, {"format": "pt"}))
        for name in sizes:
            file.writelines(_blocks(parts[name], tuned))


def _blocks(part: _Part, tuned: Checkpoint) -> Iterator[memoryview]:
    if isinstance(part.content, str):
        for start, stop in part.form.blocks():
            yield as_bytes(tuned.bits(part.content, start, stop))
    else:
        yield as_bytes(np.ascontiguousarray(part.content))
