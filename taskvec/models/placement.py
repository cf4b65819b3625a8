"""Places of a checkpoint's tensors in the model that transformers loads, and which of them are trainable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from taskvec_formats import Form
from taskvec_formats.dtypes import BitArray, DType

from ..errors import TrainingError

# safetensors dtype -> torch dtype, for the dtypes of weights
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def eligible_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weight matrices of the linear layers inside the transformer blocks: parameter name -> Parameter.

    They are found by type of module, not by name, below an nn.ModuleList, which is how transformers stores repeated
    blocks: nn.Linear; Conv1D, GPT-2's transposed linear layer; and parameters with three axes, in which transformers
    stores the experts of a mixture, one matrix each. As in the paper's experiments (arXiv 2406.16797, appendix B),
    embeddings, norms, biases, routers and the output head are excluded. For models that also take images or sound, only
    layers of the text model are included.

    Args:
        model: The model.

    Raises:
        TrainingError: The model has no such layer.
    """
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    routers, texts, towers = _routers(model), _text_models(model), _towers(model)
    linear = set()
    for name, module in model.named_modules():
        inside = f"{name}."
        if inside.startswith(tuple(blocks)) and inside.startswith(texts) and not inside.startswith((*routers, *towers)):
            linear |= {
                inside + own
                for own, values in module.named_parameters(recurse=False)
                if _is_linear(module, own, values)
            }
    chosen = {name: parameter for name, parameter in model.named_parameters() if name in linear}
    if not chosen:
        raise TrainingError(f"{type(model).__name__} has no linear layers inside transformer blocks")
    return chosen


def _is_linear(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if isinstance(module, (nn.Linear, Conv1D)):
        return name == "weight"
    return _is_fused(module, parameter)


def _is_fused(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter contains several matrices. Torch's own modules with three axes are convolutions."""
    return parameter.dim() == 3 and min(parameter.shape[1:]) > 1 and not type(module).__module__.startswith("torch.")


def _routers(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the modules that weight experts against one another, or against an expert that all tokens share.

    They are siblings of the experts, and their last linear layer has one output per expert, or a single output. If the
    number of outputs differs, as with experts that do nothing, the class in transformers has "Router" in its name.
    """
    return tuple(f"{name}." for _, routers, _ in _mixtures(model) for name in routers)


def experts_in_lists(model: nn.Module) -> list[nn.Module]:
    """The lists of experts that are separate modules. An expert that no token is routed to does not compute."""
    separate = (nn.ModuleList, nn.ModuleDict)
    return [
        each for _, routers, experts in _mixtures(model) if routers for each in experts if isinstance(each, separate)
    ]


def _mixtures(model: nn.Module) -> Iterator[tuple[str, list[str], list[nn.Module]]]:
    """Yield the name of each module, the names of the routers among its children, and the children with experts."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        children = dict(module.named_children())
        counts = {own: count for own, child in children.items() if (count := _experts(child))}
        routers = []
        for own, child in children.items():
            outputs = [layer.out_features for layer in child.modules() if isinstance(layer, nn.Linear)][-1:]
            sibling = own not in counts and bool(counts) and outputs and outputs[0] in {1, *counts.values()}
            if sibling or "Router" in type(child).__name__:
                routers.append(f"{prefix}{own}")
        yield name, routers, [children[own] for own in counts]


def _experts(module: nn.Module) -> int:
    """Number of experts in a module, as slices of its parameters or as its members; 0 if there are none."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return len(module)
    fused = [parameter for parameter in module.parameters(recurse=False) if _is_fused(module, parameter)]
    return fused[0].shape[0] if fused else 0


def _text_models(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the modules that process text: all, unless the config has a separate config of a text model."""
    if not isinstance(model, PreTrainedModel):
        return ("",)
    config: Any = model.config
    if config.is_encoder_decoder or config.get_text_config() is config:
        return ("",)
    return _names(model, [model.get_decoder()])


def _towers(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the encoders of images and sound."""
    if not isinstance(model, PreTrainedModel):
        return ()
    # get_encoder returns the model or a text encoder if there is no such encoder
    text = {id(model), id(model.base_model), id(model.get_encoder())}
    found = [model.get_encoder(modality=modality) for modality in ("image", "audio")]
    return _names(model, [tower for tower in found if id(tower) not in text])


def _names(model: nn.Module, wanted: list[nn.Module]) -> tuple[str, ...]:
    ids = {id(module) for module in wanted}
    return tuple(f"{name}." if name else "" for name, module in model.named_modules() if id(module) in ids)


@dataclass(frozen=True)
class Place:
    """Place of a tensor in a model: consecutive elements of a flattened parameter.

    Attributes:
        parameter: Name of the parameter.
        start: Index of the first element.
    """

    parameter: str
    start: int = 0


def places(model: nn.Module, forms: Mapping[str, Form]) -> dict[str, Place]:
    """Find the places of a checkpoint's tensors in a model.

    A checkpoint of the bare model lacks the prefix that the class with the head adds; a checkpoint of the whole model
    has it. If transformers fuses several tensors into one parameter, as it does for experts, each tensor is a part of
    it.

    Args:
        model: The model.
        forms: Tensor name -> Form, of the checkpoint.

    Returns:
        Tensor name -> Place. Tensors for which the model has no parameter are left out.

    Raises:
        TrainingError: A parameter has another shape than its tensor. The message names the tensor.
    """
    shared = {id(parameter): name for name, parameter in model.named_parameters()}  # one name each, if tied
    owners = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    # peft puts a layer that it adapts into a layer of its own
    owners |= {name.replace(".base_layer.", "."): tensor for name, tensor in owners.items() if ".base_layer." in name}
    found: dict[str, Place] = {}
    for name, form in forms.items():
        own = next((candidate for candidate in _spellings(model, name) if candidate in owners), None)
        if own is None:
            continue
        if tuple(owners[own].shape) != form.shape:
            raise TrainingError(
                f"tensor {name!r} is {list(form.shape)} on disk, {list(owners[own].shape)} in the model"
            )
        found[name] = Place(shared.get(id(owners[own]), own))
    if len(found) < len(forms):
        whole = {place.parameter for place in found.values()}
        for parameter, values in model.named_parameters():
            if parameter not in whole:
                for part, place in _parts(model, parameter, values):
                    for name in _spellings(model, part):
                        if name in forms and name not in found:
                            found[name] = place
    return found


def _spellings(model: nn.Module, name: str) -> tuple[str, ...]:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, prefix + name, name.removeprefix(prefix)


def _parts(model: nn.Module, parameter: str, values: nn.Parameter) -> Iterator[tuple[str, Place]]:
    """Names and places of the tensors that a parameter is saved as, found by converting a tensor of element numbers."""
    if not isinstance(model, PreTrainedModel):
        return
    narrow = torch.int32 if values.numel() < 2**31 else torch.int64
    numbers = torch.arange(values.numel(), dtype=narrow).view(values.shape)
    for name, part in revert_weight_conversion(model, {parameter: numbers}).items():
        flat = part.reshape(-1)
        # skip tensors that are not contiguous in the parameter, such as transposed ones
        if name != parameter and flat.numel() and bool((flat[1:] - flat[:-1] == 1).all()):
            yield name, Place(parameter, int(flat[0]))


def part_of(model: nn.Module, place: Place, size: int) -> torch.Tensor:
    """The tensor at a place: a flat view, [size], whose changes affect the model.

    Args:
        model: The model.
        place: The place of the tensor.
        size: Number of elements.

    Raises:
        TrainingError: As in `parameter_at`.
    """
    return parameter_at(model, place.parameter).detach().view(-1)[place.start : place.start + size]


def parameter_at(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer of a model by name.

    Raises:
        TrainingError: As in `check_readable`.
    """
    module, _, own = name.rpartition(".")
    owner: torch.Tensor = getattr(model.get_submodule(module), own)
    check_readable(name, owner)
    return owner


def check_readable(name: str, parameter: torch.Tensor) -> None:
    """Check that a parameter has values that can be read as a flat view.

    Args:
        name: The name of the parameter, for errors.
        parameter: The parameter.

    Raises:
        TrainingError: It is on the meta device or is not contiguous.
    """
    if parameter.is_meta or not parameter.is_contiguous():
        what = "has no values: it is on the meta device" if parameter.is_meta else "is not contiguous in memory"
        raise TrainingError(f"parameter {name!r} {what}")


def values_of(dtype: DType, bits: BitArray) -> np.ndarray[tuple[int], np.dtype[Any]]:
    """Convert carriers to numbers: f32 (f64 for F64), [size], as a new array."""
    return bits.view(dtype.real).astype(dtype.compute)


def tensor_of(dtype: DType, bits: BitArray) -> torch.Tensor:
    """Convert carriers to a torch tensor of the dtype that they encode, [size], as a copy."""
    return torch.from_numpy(bits.view(f"i{dtype.itemsize}").copy()).view(TORCH_DTYPES[dtype.name])


def carriers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of a tensor as integers of the size of its elements."""
    return tensor.view(_CARRIERS[tensor.itemsize])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape have the same bits: a NaN equals itself, −0.0 does not equal 0.0."""
    return torch.equal(carriers(one), carriers(other))


def bits_of(dtype: DType, weights: torch.Tensor) -> BitArray:
    """Round a tensor to `dtype` and return flat carriers on the CPU, [size]."""
    return raw_bits(weights.to(TORCH_DTYPES[dtype.name]))


def raw_bits(tensor: torch.Tensor) -> BitArray:
    """Return the bits of a tensor as flat carriers on the CPU, [size]."""
    held = tensor.detach().contiguous().cpu().view(-1)
    bits: BitArray = carriers(held).numpy().view(f"<u{held.itemsize}")
    return bits
