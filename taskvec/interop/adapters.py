"""Adapters of peft as vectors of the weights that peft's own merge gives.

peft merges the adapter into the model in memory, so that every kind of adapter and every option of it has the meaning
that peft gives it. What is added here are the checks: that peft has read every tensor of the adapter, and that the base
has a tensor for every weight that the adapter changes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from taskvec_formats import Checkpoint, Kind, LotaReader
from taskvec_formats.dtypes import BitArray, DType

from ..arguments import said
from ..errors import AdapterError, UsageError
from ..models.loading import load_weights
from ..models.memory import MemoryCheckpoint
from ..models.placement import TORCH_DTYPES, parameter_at, part_of, places, raw_bits, same_bits
from ..quantised import hint
from ..reporting.progress import Progress, silent
from ..vectors.diff import diff
from ..vectors.source import Stored
from ..vectors.vector import TaskVector
from .names import CONFIG, PREFIX, WEIGHTS, check_peft, files_of, name_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def from_adapter(
    adapter: Path,
    base: Checkpoint,
    sparsity: float | None = None,
    kind: Kind = "vector",
    progress: Progress = silent,
    *,
    trust_remote_code: bool = False,
) -> TaskVector:
    """Return the vector from a base to the base with an adapter merged into it.

    The result of the vector has the weights that `merge_and_unload` of peft gives in the dtypes of the base, to the
    last bit.

    Args:
        adapter: The folder of the adapter.
        base: The model folder that the adapter was trained on.
        sparsity: As in `diff`.
        kind: As in `diff`.
        progress: Called while the model is loaded and hashed.
        trust_remote_code: As in `load_model`.

    Raises:
        AdapterError: The adapter cannot be read, does not fit the base, or changes what the base has no tensor for.
        UsageError: peft is missing, or as in `diff`.
        TrainingError, DiffError, FormatError: As in `load_model` and `diff`.
    """
    check_peft()
    settings = read_config(adapter)
    _check_effect(adapter, settings)
    stored = stored_tensors(adapter)
    check_base(base)
    progress("merging the adapter", 0, 1, "")
    model = load_weights(base.path, {"dtype": _dtype(base), "trust_remote_code": trust_remote_code})
    shared = {id(parameter): name for name, parameter in model.named_parameters()}
    known = {name: shared[id(each)] for name, each in model.named_parameters(remove_duplicate=False)}
    merged = _merged(model, adapter, stored)
    tuned = _Merged(adapter, base, merged, known)
    progress("merging the adapter", 1, 1, "")
    vector = diff(base, tuned, sparsity, progress, kind)
    kept = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora")
    vector.header.provenance["made_by"] = "convert"
    vector.header.provenance["adapter"] = {key: settings[key] for key in kept if settings.get(key) is not None}
    return vector


def read_adapter(adapter: Path, base: Checkpoint, progress: Progress = silent) -> TaskVector:
    """Return the vector of an adapter from a temporary file, so that the merged model does not stay in memory.

    Args:
        adapter: As in `from_adapter`.
        base: As in `from_adapter`.
        progress: As in `from_adapter`.

    Raises:
        AdapterError, UsageError, TrainingError, DiffError, FormatError: As in `from_adapter`.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.lota"
        from_adapter(adapter, base, progress=progress).save(path, codec="fast")
        reader = LotaReader(path)  # an open file can be read after its name is gone
    reader.inputs = (*base.inputs, *files_of(adapter))
    return TaskVector(reader.header, reader.header.tensors, Stored(reader), f"{name_of(adapter)}.lota")


def read_config(adapter: Path) -> dict[str, Any]:
    """Return the configuration of an adapter.

    Args:
        adapter: The folder of the adapter.

    Raises:
        AdapterError: It has none, it is not one of peft, or it makes peft import a module that it names.
    """
    path = adapter / CONFIG
    try:
        settings = json.loads(path.read_bytes(), parse_constant=_not_json)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise AdapterError(f"{path} is not JSON") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise AdapterError(f"{path} is not the configuration of an adapter of peft: it has no peft_type")
    if settings.get("megatron_config"):
        raise AdapterError(f"{path} has megatron_config, with which peft imports a module that the file names")
    return settings


def _not_json(constant: str) -> None:
    raise ValueError(constant)  # NaN and the infinities


def _check_effect(adapter: Path, settings: Mapping[str, Any]) -> None:
    """Check that the configuration determines the merged weights, and that the base has tensors for all of them.

    Args:
        adapter: The folder of the adapter.
        settings: Its configuration.

    Raises:
        AdapterError: The adapter repeats layers, whose copies share their weights; or peft draws random numbers when it
            loads it.
    """
    if settings.get("layer_replication"):
        raise AdapterError(f"{adapter} has layer_replication, and the base has no tensors for the layers that it adds")
    initial = settings.get("init_lora_weights")
    if isinstance(initial, str) and initial.startswith("pissa_niter_"):
        raise AdapterError(
            f"{adapter} has init_lora_weights {said(initial)}, whose decomposition of the base is random and differs "
            "each time peft loads the adapter: save it as a LoRA, with path_initial_model_for_weight_conversion of peft"
        )


def stored_tensors(adapter: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter.

    Args:
        adapter: The folder of the adapter.

    Raises:
        AdapterError: It has none, its file is damaged or a pickle, or it has a value that is not a finite number.
    """
    path = adapter / WEIGHTS
    if not path.is_file():
        other = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (adapter / name).exists()), None)
        why = "" if other is None else f"; {other} is a pickle, which can run code: save the adapter as safetensors"
        raise AdapterError(f"{adapter} has no {WEIGHTS}{why}")
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a safetensors file ({error})") from None
    for name, tensor in tensors.items():
        known = tensor.float() if tensor.itemsize == 1 else tensor  # torch has no isfinite of fp8
        if not known.isfinite().all():
            raise AdapterError(f"{path}: tensor {name!r} has a value that is not a finite number")
    return tensors


def check_base(base: Checkpoint) -> None:
    """Check that adapters can be merged into a base.

    Args:
        base: The base.

    Raises:
        UsageError: It is not a model folder with a config.
        AdapterError: It is quantised.
    """
    if not base.is_folder or not (base.path / "config.json").is_file():
        raise UsageError(f"{base.name}: a model folder with its config is needed to merge an adapter")
    if quantised := hint(base):
        raise AdapterError(f"an adapter cannot be merged into quantised weights exactly{quantised}")


def _dtype(base: Checkpoint) -> torch.dtype:
    """The dtype to merge in: that of the weights; if they have several, f32, which contains them."""
    found = {info.dtype.name for info in base.tensors.values()} & TORCH_DTYPES.keys()
    if len(found) == 1:
        return TORCH_DTYPES[next(iter(found))]
    return torch.float64 if "F64" in found else torch.float32


def _merged(model: PreTrainedModel, adapter: Path, stored: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Merge an adapter into a model."""
    from peft import PeftModel

    with refusals_of_peft(f"peft cannot merge {adapter} into this base"):
        wrapped = PeftModel.from_pretrained(model, str(adapter))
    check_read(wrapped, adapter, stored)
    if not hasattr(wrapped, "merge_and_unload"):  # prompts and prefixes
        kind = read_config(adapter)["peft_type"]
        raise AdapterError(
            f"{adapter} is of the kind {kind}, which does not change weights and cannot be merged into them"
        )
    with refusals_of_peft(f"peft cannot merge {adapter} into this base"):
        merged: torch.nn.Module = wrapped.merge_and_unload()
    return merged


@contextmanager
def refusals_of_peft(what: str) -> Iterator[None]:
    """Turn what peft raises into AdapterError, and silence its warnings, whose causes are checked here.

    Args:
        what: What peft could not do, the beginning of the message.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        # peft has no errors of its own, and raises any for a setting that is not valid
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            found = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
            raise AdapterError(f"{what}: {found}") from None


def check_read(
    wrapped: Any, adapter: Path, stored: dict[str, torch.Tensor], name: str = "default", *, values: bool = True
) -> None:
    """Check that a model with an adapter has every tensor of its file, and no other.

    Args:
        wrapped: The model of peft.
        adapter: The folder of the adapter.
        stored: The tensors of the adapter.
        name: The name of the adapter in the model.
        values: Whether to compare values, not only names and shapes.

    Raises:
        AdapterError: A tensor is missing, belongs to no layer, or was not read.
    """
    from peft import get_peft_model_state_dict

    used = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    weights = wrapped.get_base_model().state_dict()
    for tensor in sorted(stored.keys() | used.keys()):
        if tensor not in stored:
            raise AdapterError(f"{adapter} lacks tensor {tensor!r}, which its configuration requires")
        found = used.get(tensor, weights.get(tensor.removeprefix(PREFIX)))
        if found is None:
            raise AdapterError(f"{adapter}: tensor {tensor!r} belongs to no layer of this base")
        same = found.shape == stored[tensor].shape
        if not same or (values and not torch.equal(found.cpu(), stored[tensor].to(found.dtype))):
            raise AdapterError(f"{adapter}: peft did not read tensor {tensor!r}")


def check_finite(name: str, dtype: DType, before: BitArray, after: BitArray) -> None:
    """Check that no weight becomes infinite or NaN.

    Args:
        name: The name of the tensor.
        dtype: Its dtype, a floating-point one.
        before: Carriers [n] of the base.
        after: Carriers [n] with the adapter.

    Raises:
        AdapterError: A weight is finite in the base only.
    """
    lost = np.isfinite(before.view(dtype.real)) & ~np.isfinite(after.view(dtype.real))
    if lost.any():
        raise AdapterError(
            f"with the adapter, {np.count_nonzero(lost):,} weights of tensor {name!r} are beyond the range of "
            f"{dtype.name}"
        )


class _Merged(MemoryCheckpoint):
    """A base with the weights of a model in memory, in the dtypes of the base.

    Args:
        adapter: The folder of the adapter, for messages.
        base: The base.
        model: The model, which was loaded from the base and changed.
        known: The names of its parameters before, those of tied ones too -> the first name of the parameter.

    Raises:
        AdapterError: The model has weights that the base has no tensor for.
    """

    def __init__(self, adapter: Path, base: Checkpoint, model: torch.nn.Module, known: Mapping[str, str]) -> None:
        super().__init__(name_of(adapter), base.tensors)
        self._adapter = adapter
        self._base = base
        self._model = model
        self._placed = places(model, {name: info.form for name, info in base.tensors.items()})
        held = {place.parameter for place in self._placed.values()}
        for parameter, _ in model.named_parameters():
            if known.get(parameter) != parameter and parameter not in held and not self._is_same(parameter, known):
                raise AdapterError(
                    f"with the adapter, {parameter} differs from the layer that it shares its weights with, but "
                    f"{base.name} has no tensor of its own for it: save the base with separate weights first"
                )

    def _is_same(self, parameter: str, known: Mapping[str, str]) -> bool:
        """Whether a parameter that was tied to another one still has its values."""
        other = known.get(parameter)
        if other is None:
            return False
        one, two = (parameter_at(self._model, name).detach() for name in (parameter, other))
        return one.shape == two.shape and same_bits(one, two)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files of the base and of the adapter."""
        return (*self._base.inputs, *files_of(self._adapter))

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> BitArray:
        """Compute the elements [start, stop) of a tensor.

        Raises:
            AdapterError: As in `check_finite`.
        """
        own = self._base.bits(name, start, stop)
        place, dtype = self._placed.get(name), self.tensors[name].dtype
        if place is None or dtype.name not in TORCH_DTYPES:
            return own
        size = self.tensors[name].form.size
        values = part_of(self._model, place, size)[start:stop]
        loaded = torch.from_numpy(own.copy().view(f"i{dtype.itemsize}")).view(TORCH_DTYPES[dtype.name]).to(values.dtype)
        # weights that peft did not change keep their bits, also those of NaN, which a conversion may change
        same = raw_bits(loaded) == raw_bits(values)
        found = np.where(same, own, raw_bits(values.to(TORCH_DTYPES[dtype.name])))
        check_finite(name, dtype, own, found)
        found.flags.writeable = False
        return found
