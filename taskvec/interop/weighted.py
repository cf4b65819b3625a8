"""Several LoRA adapters as one vector: Σ wᵢ · ΔWᵢ, as `add_weighted_adapter` of peft combines them by "cat".

peft places the adapters in a model without weights. The products of their factors are computed here, range by range,
in f64. The sum is rounded to f32, added to the base, and rounded once to its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from taskvec_formats import Checkpoint, Kind
from taskvec_formats.dtypes import BitArray

from ..arguments import said
from ..errors import AdapterError, UsageError
from ..models.loading import empty_model
from ..models.memory import MemoryCheckpoint
from ..models.placement import TORCH_DTYPES, tensor_of
from ..reporting.progress import Progress, silent
from ..vectors.delta import add
from ..vectors.diff import diff
from ..vectors.vector import TaskVector
from .adapters import check_base, check_finite, check_read, read_config, refusals_of_peft, stored_tensors
from .modules import tensors_in
from .names import PREFIX, files_of, name_of

# options of an adapter that make it more than a product of factors that is added to a weight
_MORE = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
)
_ALONE = "convert it by itself, and add the vectors with taskvec merge or taskvec arith"
# other initialisations also change the base
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Term:
    """A weight times the product of two factors.

    Attributes:
        weight: The weight.
        left: f32 [rows, r].
        right: f32 [r, columns].
    """

    weight: float
    left: npt.NDArray[np.float32]
    right: npt.NDArray[np.float32]


def from_adapters(
    adapters: Sequence[Path],
    weights: Sequence[float],
    base: Checkpoint,
    sparsity: float | None = None,
    kind: Kind = "vector",
    progress: Progress = silent,
    *,
    trust_remote_code: bool = False,
) -> TaskVector:
    """Return the vector from a base to the base plus the weighted sum of LoRA adapters.

    Args:
        adapters: The folders of the adapters.
        weights: One factor per adapter.
        base: The model folder that they were trained on.
        sparsity: As in `diff`.
        kind: As in `diff`.
        progress: Called while the base is hashed.
        trust_remote_code: As in `load_model`.

    Raises:
        AdapterError: An adapter is not a LoRA, has options whose effect is not a product of factors, cannot be read, or
            changes what the base has no tensor for.
        UsageError: The weights are not one finite number per adapter, or as in `diff`.
        TrainingError, DiffError, FormatError: As in `load_model` and `diff`.
    """
    if len(weights) != len(adapters):
        raise UsageError(f"{len(weights)} weights are given for {len(adapters)} adapters")
    for weight in weights:
        if not math.isfinite(weight):
            raise UsageError(f"a weight must be a finite number, found {said(weight)}")
    check_base(base)
    settings = [_checked(adapter) for adapter in adapters]
    tuned = _Summed(base, adapters, _terms(adapters, weights, base, trust_remote_code))
    vector = diff(base, tuned, sparsity, progress, kind)
    vector.header.provenance["made_by"] = "convert"
    vector.header.provenance["adapters"] = [
        {"name": name_of(adapter), "weight": weight, "r": each.get("r"), "lora_alpha": each.get("lora_alpha")}
        for adapter, weight, each in zip(adapters, weights, settings, strict=True)
    ]
    return vector


def _checked(adapter: Path) -> dict[str, Any]:
    """Return the configuration of an adapter whose effect is a product of factors."""
    settings = read_config(adapter)
    if settings["peft_type"] != "LORA":
        raise AdapterError(f"{adapter} is of the kind {settings['peft_type']}, and weights are for LoRA only: {_ALONE}")
    for option in _MORE:
        if settings.get(option):
            raise AdapterError(f"{adapter} has {option}, so it has no weighted sum with other adapters: {_ALONE}")
    if settings.get("bias", "none") != "none":
        raise AdapterError(f"{adapter} has trained biases, so it has no weighted sum with other adapters: {_ALONE}")
    if settings.get("init_lora_weights") not in _INITIALISATIONS:
        found = said(settings["init_lora_weights"])
        raise AdapterError(f"{adapter} has init_lora_weights {found}, which also changes the base: {_ALONE}")
    return settings


def _terms(
    adapters: Sequence[Path], weights: Sequence[float], base: Checkpoint, trust_remote_code: bool
) -> dict[str, list[_Term]]:
    """Return tensor name -> the terms that are added to it."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model, _ = empty_model(base.path, torch.float32, trust_remote_code=trust_remote_code)
    tensors = tensors_in(model, base)
    wrapped: Any = model
    contents = [stored_tensors(adapter) for adapter in adapters]
    for number, (adapter, stored) in enumerate(zip(adapters, contents, strict=True)):
        for name in [name for name in stored if "lora_" not in name]:  # peft stores embeddings that are adapted
            parameter = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            tensor = tensors.get(parameter)
            if tensor is None or not _is_same(stored.pop(name), base, tensor):
                raise AdapterError(f"{adapter} has other values for {parameter!r} than {base.name}: {_ALONE}")
        with refusals_of_peft(f"peft cannot read {adapter} onto this base"):
            if number == 0:
                wrapped = PeftModel.from_pretrained(model, str(adapter), _key(number), low_cpu_mem_usage=True)
            else:
                wrapped.load_adapter(str(adapter), _key(number), low_cpu_mem_usage=True)
        check_read(wrapped, adapter, stored, _key(number), values=False)  # peft may round embeddings
    inner = wrapped.get_base_model()
    found: dict[str, list[_Term]] = {}
    for module, layer in inner.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        tensor = tensors.get(f"{module}.weight")
        if tensor is None or len(base.tensors[tensor].shape) != 2:
            raise AdapterError(f"an adapter changes {module}, for whose weight {base.name} has no matrix")
        for number, (weight, stored) in enumerate(zip(weights, contents, strict=True)):
            if (key := _key(number)) in layer.scaling:
                factors = _factors(layer, key, stored, f"{PREFIX}{module}.")
                found.setdefault(tensor, []).append(_Term(weight * layer.scaling[key], *factors))
    return found


def _key(number: int) -> str:
    """Return the name of an adapter in the model. peft must not mistake it for a part of the name of a tensor."""
    return f"adapter_{number}_of_sum"


def _is_same(stored: torch.Tensor, base: Checkpoint, name: str) -> bool:
    """Return whether a tensor of an adapter has the values of a tensor of the base."""
    info = base.tensors[name]
    if tuple(stored.shape) != info.shape or info.dtype.name not in TORCH_DTYPES:
        return False
    return torch.equal(stored.flatten().double(), tensor_of(info.dtype, base.bits(name)).double())


def _factors(
    layer: Any, key: str, stored: Mapping[str, torch.Tensor], start: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the factors of an adapter of a layer, whose product has the shape of the weight.

    Args:
        layer: The layer of peft.
        key: The name of the adapter.
        stored: The tensors of the adapter.
        start: The beginning of their names.
    """
    if key in layer.lora_variant:
        found = type(layer.lora_variant[key]).__name__
        raise AdapterError(f"an adapter is a {found}, so it has no weighted sum with others: {_ALONE}")
    is_embedding = key in layer.lora_embedding_A
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    right, left = (stored[start + name].float().numpy() for name in names)
    return (right.T, left.T) if is_embedding or layer.fan_in_fan_out else (left, right)


class _Summed(MemoryCheckpoint):
    """A base with terms added to some of its tensors."""

    def __init__(self, base: Checkpoint, adapters: Sequence[Path], terms: Mapping[str, list[_Term]]) -> None:
        super().__init__(" + ".join(name_of(adapter) for adapter in adapters), base.tensors)
        self._base = base
        self._adapters = adapters
        self._terms = terms

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files of the base and of the adapters."""
        return (*self._base.inputs, *(file for adapter in self._adapters for file in files_of(adapter)))

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """Compute the elements [start, stop) of a tensor.

        Raises:
            AdapterError: As in `check_finite`.
        """
        own, terms = self._base.bits(name, start, stop), self._terms.get(name)
        if not terms or not len(own):
            return own
        info = self.tensors[name]
        columns, stop = info.shape[1], start + len(own)
        first, last = start // columns, -(-stop // columns)
        total = np.zeros((last - first, columns))
        for term in terms:
            total += term.weight * (term.left[first:last].astype(np.float64) @ term.right.astype(np.float64))
        delta = total.reshape(-1)[start - first * columns : stop - first * columns].astype(np.float32)
        found: BitArray = np.where(delta == 0, own, add(info.dtype, own, delta))  # 0 would change the sign of -0
        check_finite(name, info.dtype, own, found)
        found.flags.writeable = False
        return found
