"""Bridges to the formats of other programs: adapters of peft, coordinates, dense deltas, patches of weightscope.

The functions take paths, Hub ids and open objects, as those of `taskvec` do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from taskvec_formats import Checkpoint, Kind

from ..arguments import path_of, real, said, truth, whole
from ..destination import check_file, check_folder
from ..errors import UsageError
from ..hub import open_checkpoint, open_model
from ..packages import require
from ..reporting import bars
from ..reporting.progress import Progress
from ..vectors.vector import TaskVector
from .names import check_peft

if TYPE_CHECKING:
    from .coo import Coordinates
    from .dense import DenseDelta
    from .lora import Lora
    from .shira import Shira

StrPath = str | os.PathLike[str]

__all__ = ["from_coo", "from_delta", "from_peft", "from_wsp", "to_coo", "to_delta", "to_lora", "to_shira"]


def from_peft(
    adapter: StrPath | Sequence[StrPath],
    base: Checkpoint | StrPath,
    sparsity: float | None = None,
    *,
    weights: Sequence[float] | None = None,
    kind: Kind = "vector",
    trust_remote_code: bool = False,
    progress: bool | Progress = False,
) -> TaskVector:
    """Return the vector from a base to the base with adapters of peft merged into it.

    The result of the vector of one adapter has the weights that `merge_and_unload` of peft gives in the dtypes of the
    base, to the last bit. Every kind of adapter that peft can merge is supported. The model is loaded into memory.

    Several LoRA adapters are added with weights: the result is base + Σ wᵢ · ΔWᵢ, where ΔWᵢ = scaling · B · A. The sum
    is computed exactly, rounded to f32, added to the base and rounded once to its dtype. This is what
    `add_weighted_adapter` of peft gives with `combination_type="cat"`. Its "linear" combines the factors instead of
    their products.

    Args:
        adapter: The folder of the adapter, with `adapter_config.json` and `adapter_model.safetensors`, or a list of
            such folders.
        base: The model that the adapters were trained on: a model folder, a Hub id or an open checkpoint.
        sparsity: None keeps every change. A number s in (0, 1) keeps the k = round((1 − s)·N) changes of largest
            magnitude, where N is the number of weights in the tensors that the adapters change.
        weights: One factor per adapter; a single LoRA adapter may have one too. None gives each of several the weight
            1.
        kind: "vector" for deltas, "patch" for the new bits relative to the base.
        trust_remote_code: Whether Python code in the model folder may run.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.

    Returns:
        The vector, computed when it is read or saved. The merged model, or the adapters if they have weights, stay in
        memory until then.

    Raises:
        AdapterError: An adapter cannot be read, does not fit the base, or changes what the base has no tensor for; or
            one of several is not a plain LoRA.
        UsageError: A package is missing, the base is a single file, the weights are not one finite number per adapter,
            or as in `diff`.
        TrainingError, DiffError, FormatError: The model cannot be loaded, or as in `diff`.
    """
    truth("trust_remote_code", trust_remote_code)
    check_peft()
    listed = [adapter] if isinstance(adapter, (str, os.PathLike)) else adapter
    adapters = [path_of("adapter", each) for each in listed]
    if not adapters:
        raise UsageError("at least one adapter is needed")
    with bars.shown(progress) as report:
        checkpoint = open_model(base, with_code=trust_remote_code)
        if weights is None and len(adapters) == 1:
            from .adapters import from_adapter

            return from_adapter(adapters[0], checkpoint, sparsity, kind, report, trust_remote_code=trust_remote_code)
        from .weighted import from_adapters

        factors = [1.0] * len(adapters) if weights is None else [real("a weight", each) for each in weights]
        return from_adapters(adapters, factors, checkpoint, sparsity, kind, report, trust_remote_code=trust_remote_code)


def to_shira(
    vector: TaskVector | StrPath,
    base: Checkpoint | StrPath,
    folder: StrPath,
    *,
    force: bool = False,
    progress: bool | Progress = False,
) -> Shira:
    """Write a vector as a SHiRA adapter (arXiv 2406.13175), which peft loads onto the base.

    Args:
        vector: The vector, or the path of a `.lota` file. It may change the weights of linear layers only.
        base: The model that it was taken from: a model folder, a Hub id or an open checkpoint.
        folder: The folder to write.
        force: Whether to replace an existing adapter.
        progress: As in `from_peft`.

    Returns:
        What was written: the r of the adapter, and the numbers of its entries, of the zeros that were added so that
        every layer has as many as r requires, and of the replacements that an adapter cannot hold.

    Raises:
        AdapterError: The vector changes a tensor that is not the weight of a linear layer, or no r fits.
        BaseMismatchError: The vector has another base.
        KindError: It is a patch.
        OutputExistsError: The folder exists and `force` is False.
        UsageError: A package is missing, or the folder cannot be written.
        TrainingError, FormatError: The model is not supported, or a file is damaged.
    """
    require("a SHiRA adapter", "train")
    from .shira import to_shira as write

    opened = _opened(vector)
    checkpoint = open_model(base)
    path = check_folder(folder, force=truth("force", force), inputs=(*opened.inputs, *checkpoint.inputs))
    with bars.shown(progress) as report:
        return write(opened, checkpoint, path, report, force=force)


def to_lora(
    vector: TaskVector | StrPath,
    base: Checkpoint | StrPath,
    folder: StrPath,
    rank: int = 64,
    *,
    force: bool = False,
    progress: bool | Progress = False,
) -> Lora:
    """Write a vector as a LoRA adapter (arXiv 2106.09685), which peft loads onto the base.

    The deltas of linear layers and embeddings are approximated by factors of low rank, the best ones in the Frobenius
    norm. Biases and other small parameters, such as those of norms, and embeddings that share their weights with the
    output layer are stored with their tuned values. The scale of the adapter is 1, and its factors are f32.

    Args:
        vector: The vector, or the path of a `.lota` file.
        base: The model that it was taken from: a model folder, a Hub id or an open checkpoint.
        folder: The folder to write.
        rank: The largest rank of the factors. A layer whose deltas have a lower rank has a lower one.
        force: Whether to replace an existing adapter.
        progress: As in `from_peft`.

    Returns:
        What was written: rank and relative error of each layer and of all layers together, the tensors that are stored
        with their tuned values, and the number of changes that are no deltas.

    Raises:
        AdapterError: The vector changes a tensor that a LoRA adapter cannot hold, or no matrix.
        BaseMismatchError: The vector has another base.
        KindError: It is a patch.
        OutputExistsError: The folder exists and `force` is False.
        UsageError: peft is missing, the rank is not a positive whole number, or the folder cannot be written.
        TrainingError, FormatError: The model is not supported, or a file is damaged.
    """
    rank = whole("rank", rank)
    if rank < 1:
        raise UsageError(f"`rank` must be at least 1, found {said(rank)}")
    check_peft()
    opened, checkpoint = _opened(vector), open_model(base)
    path = check_folder(folder, force=truth("force", force), inputs=(*opened.inputs, *checkpoint.inputs))
    from .lora import to_lora as write

    with bars.shown(progress) as report:
        return write(opened, checkpoint, rank, path, report, force=force)


def to_coo(
    vector: TaskVector | StrPath, path: StrPath, *, force: bool = False, progress: bool | Progress = False
) -> Coordinates:
    """Write the deltas of a vector as coordinates in a safetensors file (docs/conversions.md).

    Args:
        vector: The vector, or the path of a `.lota` file.
        path: The `.safetensors` file to write.
        force: Whether to replace an existing file.
        progress: As in `from_peft`.

    Returns:
        What was written: the numbers of tensors, of entries, and of the replacements that coordinates cannot hold.

    Raises:
        ConversionError: The vector adds, removes or resizes a tensor.
        KindError: It is a patch.
        OutputExistsError: The file exists and `force` is False.
        UsageError: The name does not end in .safetensors, or the file cannot be written.
        FormatError: The vector is damaged.
    """
    from .coo import to_coo as write

    opened = _opened(vector)
    if path_of("path", path).suffix != ".safetensors":
        raise UsageError(f"{path}: coordinates are written to a file whose name ends in .safetensors")
    file = check_file(path, force=truth("force", force), inputs=opened.inputs)
    with bars.shown(progress) as report:
        return write(opened, file, report, force=force)


def from_coo(
    path: StrPath,
    base: Checkpoint | StrPath,
    sparsity: float | None = None,
    *,
    are_deltas: bool = False,
    progress: bool | Progress = False,
) -> TaskVector:
    """Return the vector of a safetensors file of coordinates (docs/conversions.md).

    Args:
        path: The file.
        base: The model that it was taken from.
        sparsity: None keeps every entry. A number s in (0, 1) keeps the k = round((1 − s)·N) entries of largest
            magnitude, where N is the number of weights in the tensors of the file.
        are_deltas: Whether the values are deltas although the metadata of the file does not say so.
        progress: As in `from_peft`.

    Returns:
        The vector. The entries are read when it is read or saved.

    Raises:
        ConversionError: The file has other tensors than coordinates, does not say what its values are, or does not fit
            the base. Reading or saving the vector raises it if positions or values are not valid.
        BaseMismatchError: The file names another base.
        UsageError: The sparsity is outside (0, 1).
        FormatError: The file is not a safetensors file.
    """
    from .coo import from_coo as read

    file = path_of("path", path)
    with bars.shown(progress) as report:
        return read(file, open_checkpoint(base), sparsity, report, are_deltas=truth("are_deltas", are_deltas))


def to_delta(
    vector: TaskVector | StrPath,
    base: Checkpoint | StrPath,
    path: StrPath,
    *,
    shard_size: int | None = None,
    force: bool = False,
    progress: bool | Progress = False,
) -> DenseDelta:
    """Write tuned − base as a dense checkpoint: every tensor of the base, floating-point ones in f32.

    Args:
        vector: The vector, or the path of a `.lota` file.
        base: The model that it was taken from.
        path: The folder to write, with the shards and other files of the base; if the name ends in .safetensors, a
            single file.
        shard_size: The largest size of a shard of a folder in bytes. None keeps the shards.
        force: Whether to replace an existing output.
        progress: As in `from_peft`.

    Returns:
        What was written: the numbers of entries and of the replacements that deltas cannot hold.

    Raises:
        ConversionError: The vector adds, removes or resizes a tensor.
        BaseMismatchError: The vector has another base.
        KindError: It is a patch.
        OutputExistsError: The output exists and `force` is False.
        UsageError: The output cannot be written, or a shard size is given for a single file.
        SizeError: The disk has not enough space.
        FormatError: A file is damaged.
    """
    from .dense import to_delta as write

    opened, checkpoint, out = _opened(vector), open_checkpoint(base), path_of("path", path)
    inputs = (*opened.inputs, *checkpoint.inputs)
    if out.suffix == ".safetensors":
        if shard_size is not None:
            raise UsageError("`shard_size` is for a folder, and the output is a single file")
        check_file(path, force=truth("force", force), inputs=inputs)
    else:
        check_folder(path, force=truth("force", force), inputs=inputs)
    with bars.shown(progress) as report:
        return write(opened, checkpoint, out, report, shard_size=shard_size, force=force)


def from_delta(
    path: StrPath,
    base: Checkpoint | StrPath,
    sparsity: float | None = None,
    *,
    progress: bool | Progress = False,
) -> TaskVector:
    """Return the vector of a dense checkpoint of tuned − base.

    The result of the vector is base + delta, computed in f32 and rounded once to the dtype of the base.

    Args:
        path: The model folder or the `.safetensors` file with the deltas, in any floating-point dtypes.
        base: The model that they are added to.
        sparsity: None keeps every delta that is not zero. A number s in (0, 1) keeps the k = round((1 − s)·N) of
            largest magnitude, where N is the number of weights in the tensors that change.
        progress: As in `from_peft`.

    Returns:
        The vector. The entries are read when it is read or saved.

    Raises:
        ConversionError: A tensor is not in the base or has another shape; an integer tensor is not zero; or all deltas
            are zero. Reading or saving the vector raises it if a delta is not a finite number.
        UsageError: The sparsity is outside (0, 1), or a path does not exist.
        FormatError: A checkpoint cannot be read.
    """
    from .dense import from_delta as read

    with bars.shown(progress) as report:
        return read(open_checkpoint(path), open_checkpoint(base), sparsity, report)


def from_wsp(
    path: StrPath,
    base: Checkpoint | StrPath,
    sparsity: float | None = None,
    *,
    kind: Kind = "vector",
    progress: bool | Progress = False,
) -> TaskVector:
    """Return the vector from a base to the base with a patch of weightscope (`.wsp`) applied.

    The file holds new weights, so the result is exact to the bit. Changes up to the threshold that the patch was made
    with are not in it; the provenance has the threshold.

    Args:
        path: The file.
        base: The model that it was made from.
        sparsity: As in `from_peft`.
        kind: As in `from_peft`.
        progress: As in `from_peft`.

    Returns:
        The vector, computed when it is read or saved.

    Raises:
        ConversionError: The file is not a valid `.wsp` file, or has weights that the dtype of the base cannot hold.
        BaseMismatchError: The patch was made from another base.
        UsageError, DiffError, MaskError, FormatError: As in `diff`.
    """
    from .weightscope import from_wsp as read

    file = path_of("path", path)
    with bars.shown(progress) as report:
        return read(file, open_checkpoint(base), sparsity, kind, report)


def _opened(vector: TaskVector | StrPath) -> TaskVector:
    return vector if isinstance(vector, TaskVector) else TaskVector.open(vector)
