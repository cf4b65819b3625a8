"""The public functions of `taskvec`.

A checkpoint is given as the path of a model folder, a task vector as the path of a `.lota` file, or each as a reference
to the Hugging Face Hub: `user/repo`, `user/repo@revision`, for a vector also `user/repo/file.lota`.
`progress=True` shows progress bars. The functions delegate to the subpackages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from taskvec_formats import Checkpoint, Kind

from .algebra import compose as _compose
from .analysis import overlap as _overlap
from .applying import apply as _apply
from .applying.layout import check_stored_layout
from .applying.output import Output
from .arguments import instance, path_of, shown, truth, whole
from .destination import check_file, part_of
from .errors import UsageError
from .hub import open_checkpoint, open_model
from .hub.base import open_base
from .interop.names import adapter_at, check_peft, files_of
from .merging import combine as _merging
from .merging.model_folder import write_model as _write_model
from .merging.registry import AUTO
from .merging.settings import Setting
from .packages import require
from .reporting import bars
from .reporting.progress import Progress
from .vectors import diff as _diff
from .vectors.pack import pack as pack_file
from .vectors.source import Stored, inputs_of
from .vectors.vector import TaskVector, check_codec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .evaluation.evaluate import Evaluation
    from .evaluation.grid import EvaluationGrid
    from .models.attach import Attachment
    from .models.sparse_model import SparseModel
    from .search.search import SearchResult
    from .training.options import TrainingOptions
    from .training.result import TrainingResult

StrPath = str | os.PathLike[str]
ModelLike = Checkpoint | StrPath
VectorLike = TaskVector | StrPath
LiveLike: TypeAlias = "torch.nn.Module | Mapping[str, torch.Tensor]"


@dataclass(frozen=True)
class MergedModel:
    """A model folder that `write_model` wrote.

    Attributes:
        path: The folder.
        vector: The merged vector.
        notes: One sentence for each difference between the parents, each option without effect, and each part of the
            base's folder that is missing from the result.
    """

    path: Path
    vector: TaskVector
    notes: tuple[str, ...]


def diff(
    base: ModelLike | LiveLike,
    tuned: ModelLike | LiveLike,
    sparsity: float | None = None,
    *,
    kind: Kind = "vector",
    progress: bool | Progress = False,
) -> TaskVector:
    """Return the task vector tuned − base, computed when it is read or saved.

    Args:
        base: The model before fine-tuning: a model folder, a `.safetensors` file, a Hub id, an open checkpoint, a torch
            module, or a state dict. The tensors of a module have the names that `save_pretrained` gives them. The
            weights of a module or a state dict may change afterwards: those that differ are copied.
        tuned: The model after fine-tuning.
        sparsity: None keeps every change, so that applying the vector gives `tuned` back byte for byte. A number s in
            (0, 1) keeps the k = round((1 − s)·N) changes of largest magnitude, where N is the number of weights in the
            tensors that fine-tuning changed. Ties go to the first position.
        kind: "vector" for deltas, which can be merged; "patch" for the new bits relative to the base, which are
            smaller.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.

    Returns:
        The vector or patch.

    Raises:
        UsageError: A path does not exist, the sparsity is outside (0, 1), a sparsity is given for a patch, or a state
            dict is not one of the other module.
        DiffError: The checkpoints have no tensor in common, or cannot be two states of one model.
        TrainingError: A module is quantised, sharded or on the meta device.
        FormatError: A checkpoint cannot be read.
    """
    with bars.shown(progress) as report:
        return _diff.diff(*_checkpoints(base, tuned, report), sparsity, report, kind)


def pack(
    base: ModelLike | LiveLike,
    tuned: ModelLike | LiveLike,
    path: str | os.PathLike[str],
    sparsity: float | None = None,
    *,
    kind: Kind = "vector",
    codec: str = "auto",
    force: bool = False,
    progress: bool | Progress = False,
) -> TaskVector:
    """Write the task vector tuned − base to a `.lota` file.

    The file is that of `diff(base, tuned, sparsity, kind=kind).save(path, codec=codec)`. Without a sparsity, both
    models are read once instead of twice.

    Args:
        base: As in `diff`.
        tuned: As in `diff`, or the folder of an adapter of peft, which is merged into the base
            (`taskvec.interop.from_peft`).
        path: The file to write. Missing folders are created.
        sparsity: As in `diff`.
        kind: As in `diff`.
        codec: "auto" for the smallest file, "fast" for fast writing, "paper64" or "plain" (docs/format.md).
        force: Whether to replace an existing file of that name.
        progress: As in `diff`.

    Returns:
        The vector of the file.

    Raises:
        OutputExistsError: `path` exists and `force` is False.
        UsageError: As in `diff`; the codec is unknown; `path` is a file that is read, even with `force`, or cannot be
            written.
        DiffError, TrainingError, FormatError: As in `diff`.
        AdapterError: As in `taskvec.interop.from_peft`.
        MaskError: The sparsity keeps no entry.
    """
    check_codec(codec)
    _diff.check_kind(kind, sparsity)
    with bars.shown(progress) as report:
        if isinstance(tuned, (str, os.PathLike)) and (adapter := adapter_at(tuned)) is not None:
            check_peft()
            checkpoint = _checkpoint("base", base)
            file = check_file(path, force=truth("force", force), inputs=(*checkpoint.inputs, *files_of(adapter)))
            from .interop.adapters import from_adapter

            from_adapter(adapter, checkpoint, sparsity, kind, report).save(file, report, codec, force=force)
            return TaskVector.open(file)
        before, after = _checkpoints(base, tuned, report)
        file = check_file(path, force=truth("force", force), inputs=inputs_of(before, after))
        if sparsity is None:
            pack_file(before, after, file, kind, codec, report, force=force)
        else:
            _diff.diff(before, after, sparsity, report, kind).save(file, report, codec, force=force)
    return TaskVector.open(file)


def _checkpoints(
    base: ModelLike | LiveLike, tuned: ModelLike | LiveLike, progress: Progress
) -> tuple[Checkpoint, Checkpoint]:
    """Open a pair of models, of which any may be in memory."""
    models = (base, tuned)
    on_disk = all(isinstance(model, (Checkpoint, str, os.PathLike)) for model in models)
    # before torch is loaded, there are no modules
    if on_disk or (sys.modules.get("torch") is None and not any(isinstance(model, Mapping) for model in models)):
        return _checkpoint("base", base), _checkpoint("tuned", tuned)
    require("a model in memory", "train")
    from .models.states import snapshots

    return snapshots(base, tuned, _checkpoint, progress)


def apply(
    vector: VectorLike,
    base: ModelLike | None,
    out: StrPath,
    *,
    dtype: str | None = None,
    shard_size: int | None = None,
    force: bool = False,
    max_bytes: int | None = None,
    progress: bool | Progress = False,
) -> _apply.Applied:
    """Write the model folder base + vector.

    The finished folder is read again before it appears under its name. A vector that `diff` made without a sparsity
    gives the tuned model back byte for byte, including its tokenizer and other files.

    Args:
        vector: A task vector or a patch, or the path of a `.lota` file.
        base: The model that the vector was taken from. For a file that was saved with its base at hand, as after `diff`
            and `train`, also a model with the same values wherever the vector changes it. None downloads the base that
            the vector records, if it was taken from a model on the Hugging Face Hub.
        out: The folder to write.
        dtype: "float32", "bfloat16" or "float16" rounds every floating-point tensor to that dtype. None keeps the
            dtypes.
        shard_size: The largest size of a shard in bytes. None keeps the shards.
        force: Whether to replace an existing model folder of that name.
        max_bytes: The largest result to write, in bytes. None allows four times the base and 2^28 bytes.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.

    Returns:
        Whether the result is exactly the tuned model, and the reasons if it is not.

    Raises:
        OutputExistsError: `out` exists and `force` is False.
        AlreadyAppliedError: The base already has the tuned values.
        BaseMismatchError: The vector was taken from another base.
        SizeError: The result is too large, or does not fit on the disk.
        DTypeError: A value does not fit `dtype`.
        ResultError: The finished folder is not what was planned.
        UsageError: An argument is invalid, no base is given or recorded, or `out` cannot be written.
        HubError: The base cannot be downloaded.
        FormatError: A file cannot be read.
    """
    with bars.shown(progress) as report:
        opened = _vector("vector", vector)
        checkpoint = open_base(opened) if base is None else _checkpoint("base", base)
        path, output = path_of("out", out), Output(shard_size, dtype)
        most = None if max_bytes is None else whole("max_bytes", max_bytes)
        return _apply.apply(opened, checkpoint, path, report, output, force=truth("force", force), max_bytes=most)


def merge(
    vectors: Sequence[VectorLike],
    method: str = AUTO,
    weights: Sequence[Setting] | None = None,
    *,
    density: float | Sequence[Setting] | None = None,
    lam: Setting = 1.0,
    base: ModelLike | None = None,
    device: str | None = None,
    progress: bool | Progress = False,
    **options: Any,
) -> TaskVector:
    """Merge task vectors of one base into one vector, computed when it is read or saved.

    Args:
        vectors: Vectors or paths of `.lota` files, in the order in which they are added.
        method: A name in `taskvec.merging.METHODS`, or "auto": "disjoint" if no two masks share a position, else
            "ties".
        weights: One factor per vector: a number, a list of numbers over the layers, or rules by tensor name. None gives
            every vector the weight 1.
        density: The share of its eligible weights that a vector keeps, for methods that trim or drop: one number, or
            one setting per vector.
        lam: λ, a factor of the result.
        base: The base model. It is needed for vectors of wider dtypes, and gives the number of layers for lists over
            the layers.
        device: A device of torch, such as "cuda", on which the vectors are combined. None combines them with numpy. On
            the CPU, the results are the same to the bit.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.
        **options: Options of the method (docs/merging.md).

    Returns:
        The merged vector.

    Raises:
        UsageError: The method or device does not exist, or the method does not take an option that was given.
        BaseMismatchError: The vectors have different bases.
        KindError: One of the vectors is a patch.
        MergeError: The changes of the vectors cannot be added.
        FormatError: A file cannot be read.
    """
    with bars.shown(progress) as report:
        opened = _vectors(vectors)
        checkpoint = None if base is None else _checkpoint("base", base)
        return _merging.merge(
            opened, method, weights, report, density=density, lam=lam, base=checkpoint, device=device, **options
        )


def write_model(
    vectors: Sequence[VectorLike],
    base: ModelLike,
    out: StrPath,
    method: str = AUTO,
    weights: Sequence[Setting] | None = None,
    *,
    density: float | Sequence[Setting] | None = None,
    lam: Setting = 1.0,
    dtype: str | None = None,
    shard_size: int | None = None,
    force: bool = False,
    resume: bool = True,
    progress: bool | Progress = False,
    **options: Any,
) -> MergedModel:
    """Merge task vectors and write the merged model as a folder, with a model card.

    The tokenizers of the vectors are compared first. If all vectors changed a file in the same way, the changed file is
    written instead of the base's. If the process is killed, `out`.part keeps the finished shards, and the same call
    continues with the missing ones.

    Args:
        vectors: Vectors or paths of `.lota` files, in the order in which they are added.
        base: The model that the vectors were taken from.
        out: The folder to write.
        method: As in `merge`.
        weights: As in `merge`.
        density: As in `merge`.
        lam: As in `merge`.
        dtype: As in `apply`.
        shard_size: As in `apply`.
        force: Whether to replace an existing model folder of that name.
        resume: Whether to continue from `out`.part. False removes it and starts again.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.
        **options: Options of the method.

    Returns:
        The folder, the merged vector and notes on the merge.

    Raises:
        MergeError: The tokenizers of the vectors differ, or their changes cannot be added.
        ResumeError: `out`.part is in use, or belongs to another merge.
        UsageError, BaseMismatchError, KindError, SizeError, DTypeError, ResultError, FormatError: As in `merge` and
            `apply`.
    """
    with bars.shown(progress) as report:
        opened, checkpoint, path = _vectors(vectors), _checkpoint("base", base), path_of("out", out)
        merged = _merging.merge(opened, method, weights, report, density=density, lam=lam, base=checkpoint, **options)
        notes = _write_model(
            merged,
            opened,
            checkpoint,
            path,
            report,
            output=Output(shard_size, dtype),
            force=truth("force", force),
            work=part_of(path),
            resume=truth("resume", resume),
        )
        return MergedModel(path, merged, (*merged.provenance["notes"], *notes))


def compose(
    first: VectorLike, second: VectorLike, base: ModelLike | None = None, *, progress: bool | Progress = False
) -> TaskVector:
    """Return one vector that has the effect of applying `first` and then `second`.

    Args:
        first: The vector from checkpoint A to checkpoint B.
        second: The vector from checkpoint B to checkpoint C.
        base: Checkpoint A. If given, the result is exact to the bit. If not, both arguments must be vectors, not
            patches, and their deltas are added.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.

    Returns:
        The vector from A to C.

    Raises:
        BaseMismatchError: `second` does not start from the checkpoint that `first` leads to.
        KindError, MergeError, UsageError, FormatError: As in `merge`.
    """
    with bars.shown(progress) as report:
        checkpoint = None if base is None else _checkpoint("base", base)
        return _compose.compose(_vector("first", first), _vector("second", second), checkpoint, report)


def overlap(vectors: Sequence[VectorLike], *, progress: bool | Progress = False) -> list[_overlap.Overlap]:
    """Compare the masks of every pair of vectors: shared positions, sign conflicts, cosine similarity.

    Args:
        vectors: Vectors, paths of `.lota` files or references. Of files on the Hugging Face Hub, only the blocks that
            are compared are fetched.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.

    Returns:
        One comparison per pair, in the order (0, 1), (0, 2), …, (1, 2), ….

    Raises:
        KindError: One of the vectors is a patch, which has no mask.
        BaseMismatchError: A tensor has different shapes in two vectors.
        UsageError, FormatError: A file cannot be read.
    """
    with bars.shown(progress) as report:
        return _overlap.overlap(_vectors(vectors, download=False), report)


def verify(vector: VectorLike, base: ModelLike | None = None, *, progress: bool | Progress = False) -> None:
    """Check every checksum of a `.lota` file and decode every entry.

    Args:
        vector: The path of a `.lota` file, or a vector that was opened from one.
        base: If given, also apply the vector to this model in memory and compare the result with the stored digests.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.

    Raises:
        FormatError: The file is damaged; the message names the part.
        BaseMismatchError: The vector was taken from another base.
        AlreadyAppliedError: The base already has the tuned values.
        UsageError: The vector does not come from a file.
    """
    with bars.shown(progress) as report:
        opened = _vector("vector", vector)
        if not isinstance(opened.source, Stored):
            raise UsageError(f"{opened.name} does not come from a file: there is nothing to verify")
        opened.source.reader.verify(lambda done, total: report("decoding", done, total, ""))
        check_stored_layout(opened)
        if base is not None:
            _apply.check_result(opened, _checkpoint("base", base), report)


def train(
    base: ModelLike,
    data: StrPath,
    options: TrainingOptions | None = None,
    *,
    mask_from: VectorLike | None = None,
    disjoint_from: Sequence[VectorLike] = (),
    start_from: VectorLike | None = None,
    mix: Sequence[tuple[StrPath, float]] = (),
    eval_data: StrPath | None = None,
    folder: StrPath | None = None,
    resume: bool = True,
    progress: bool | Progress = False,
    **settings: Any,
) -> TrainingResult:
    """Train a sparse task vector (LoTA, arXiv 2406.16797, Algorithm 1), or a vector by full fine-tuning or LoRA.

    Args:
        base: The model folder or Hub id to start from.
        data: A file, a folder of files, or a Hub id of training data (docs/training.md).
        options: The training options. None uses the defaults.
        mask_from: A vector whose mask is used, instead of calibrating a new one.
        disjoint_from: Vectors whose positions are excluded from the mask (LoTTO).
        start_from: A vector; training begins at base + this vector.
        mix: Further data, each with the share of the examples to draw from it.
        eval_data: Data to evaluate the loss on during training.
        folder: A folder for checkpoints. After an interruption, the same call continues from it.
        resume: False removes the content of `folder` and starts again.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.
        **settings: Fields of `TrainingOptions`; they override those in `options`.

    Returns:
        The vector, not saved yet, and the losses.

    Raises:
        UsageError: Options contradict each other or have no effect, or a package is missing.
        DataError: A row of the data cannot be understood.
        MaskError: Fewer weights are free than the mask needs.
        TrainingError: The model cannot be trained, or training diverged.
        StoppedError: The process received SIGINT or SIGTERM; the current step was completed.
        ResumeError: `folder` belongs to another run, or is in use.
        BaseMismatchError: A vector does not fit the base.
        FormatError: A file cannot be read.
    """
    from .training.options import TrainingOptions, check_packages
    from .training.train import train as train_vector

    if unknown := settings.keys() - TrainingOptions.__dataclass_fields__.keys():
        raise UsageError(f"TrainingOptions has no field {min(unknown)!r}")
    if options is None:
        options = _own_defaults(TrainingOptions, settings, mask_from)
    instance("options", options, TrainingOptions)
    chosen = replace(options, **settings)
    check_packages(chosen)  # opening the base may download it
    with bars.shown(progress) as report:
        return train_vector(
            open_model(_checkpoint("base", base)),
            path_of("data", data),
            chosen,
            report,
            mask_from=None if mask_from is None else _vector("mask_from", mask_from),
            disjoint_from=_vectors(disjoint_from, "disjoint_from"),
            start_from=None if start_from is None else _vector("start_from", start_from),
            mix=_mix(mix),
            eval_data=None if eval_data is None else path_of("eval_data", eval_data),
            folder=None if folder is None else path_of("folder", folder),
            resume=truth("resume", resume),
        )


def _mix(values: object) -> list[tuple[Path, float]]:
    what = "mix must be a list of pairs of a path and a share"
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise UsageError(f"{what}, found {shown(values)}")
    for value in values:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise UsageError(f"{what}, found {shown(value)} in it")
    return [(path_of("a path of `mix`", path), share) for path, share in values]


def evaluate(
    model: ModelLike,
    data: StrPath,
    vectors: Sequence[VectorLike] = (),
    *,
    metrics: Sequence[str] = ("loss",),
    batch_size: int = 32,
    max_length: int = 1024,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: bool | Progress = False,
) -> Evaluation:
    """Evaluate a model on held-out data: loss in nats per token, exact match, ROUGE-1, with standard errors.

    Args:
        model: A model folder or a Hub id.
        data: As in `train`.
        vectors: Vectors to apply in memory. Several vectors are merged with the method "auto".
        metrics: Any of "loss", "exact_match" and "rouge1".
        batch_size: Examples per batch.
        max_length: The largest number of tokens of an example. Longer prompts are cut at the beginning.
        max_new_tokens: The largest number of tokens of a generated answer. None uses the length of the longest
            completion plus 8, at most half of `max_length`.
        limit: The number of examples to use, from the first. None uses all.
        device: "auto", which uses an accelerator if there is one, or a name such as "cpu" or "cuda:1".
        trust_remote_code: Whether Python code from the model folder may run.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.

    Returns:
        The metrics with their standard errors.

    Raises:
        MergeError: The tokenizers of several vectors differ, or their changes cannot be added.
        UsageError, DataError, TrainingError, BaseMismatchError, FormatError: As in `train`.
    """
    from .data.examples import read_examples
    from .devices import check_device
    from .evaluation.scoring import check_request

    check_device(device)
    check_request(metrics, batch_size=batch_size, max_length=max_length, max_new_tokens=max_new_tokens, limit=limit)
    opened = _vectors(vectors)
    with_code = truth("trust_remote_code", trust_remote_code)
    checkpoint = open_model(model if isinstance(model, Checkpoint) else path_of("model", model), with_code=with_code)
    examples = read_examples(path_of("data", data))[:limit]
    from .evaluation.evaluate import evaluate_variants
    from .evaluation.variants import merged_on

    with bars.shown(progress) as report:
        whole = merged_on(opened, checkpoint, report)
        (row,) = evaluate_variants(
            checkpoint,
            [whole.vector],
            {"": examples},
            metrics,
            device=device,
            batch_size=batch_size,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
        return replace(row[""], notes=whole.notes)


def evaluate_grid(
    model: ModelLike,
    data: Mapping[str, StrPath],
    vectors: Sequence[VectorLike],
    *,
    each: bool = False,
    metrics: Sequence[str] = ("loss",),
    batch_size: int = 32,
    max_length: int = 1024,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: bool | Progress = False,
) -> EvaluationGrid:
    """Evaluate a model, each of several vectors, and their merge, on several data sets.

    The model is loaded once and switched between the vectors.

    Args:
        model: A model folder or a Hub id.
        data: Name of a data set -> file, as in `train`.
        vectors: Vectors to apply in memory.
        each: Whether only the vectors are evaluated, without the base and the merge.
        metrics: As in `evaluate`.
        batch_size: As in `evaluate`.
        max_length: As in `evaluate`.
        max_new_tokens: As in `evaluate`.
        limit: The number of examples of each data set to use, from the first. None uses all.
        device: As in `evaluate`.
        trust_remote_code: As in `evaluate`.
        progress: As in `evaluate`.

    Returns:
        One row for each variant: the base, each vector, and their merge with the method "auto". `print` shows a table.

    Raises:
        MergeError, UsageError, DataError, TrainingError, BaseMismatchError, FormatError: As in `evaluate`.
    """
    from .data.examples import read_examples
    from .devices import check_device
    from .evaluation.scoring import check_request

    check_device(device)
    check_request(metrics, batch_size=batch_size, max_length=max_length, max_new_tokens=max_new_tokens, limit=limit)
    instance("data", data, Mapping)
    opened = _vectors(vectors)
    with_code, alone = truth("trust_remote_code", trust_remote_code), truth("each", each)
    if not data or (alone and not opened):
        raise UsageError("there is nothing to evaluate: give at least one data set, and a vector with `each`")
    checkpoint = open_model(model if isinstance(model, Checkpoint) else path_of("model", model), with_code=with_code)
    examples = {str(name): read_examples(path_of(f"data {name!r}", path))[:limit] for name, path in data.items()}
    from .evaluation.evaluate import evaluate_variants
    from .evaluation.grid import grid_of
    from .evaluation.variants import variants_of

    with bars.shown(progress) as report:
        variants = variants_of(opened, checkpoint, each=alone, grid=True, progress=report)
        found = evaluate_variants(
            checkpoint,
            [variant.vector for variant in variants],
            examples,
            metrics,
            device=device,
            batch_size=batch_size,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    return grid_of(variants, found)


def search_merge(
    vectors: Sequence[VectorLike],
    base: ModelLike,
    data: Mapping[str, StrPath],
    *,
    metric: str = "loss",
    methods: Sequence[str] | None = None,
    by: str | None = None,
    trials: int = 50,
    timeout: float | None = None,
    pareto: bool = False,
    holdout: float = 0.5,
    limit: int | None = None,
    seed: int = 0,
    study: StrPath | None = None,
    device: str = "auto",
    batch_size: int = 32,
    max_length: int = 1024,
    max_new_tokens: int | None = None,
    trust_remote_code: bool = False,
    progress: bool | Progress = False,
) -> SearchResult:
    """Search for the best merge of vectors on held-out data, with Optuna.

    One model is loaded, and each merge is switched on it. Merges that are bad on a part of the data are pruned. The
    best merge is compared with plain TIES on examples that the search did not use.

    Args:
        vectors: The vectors to merge, at least two.
        base: The model folder or Hub id that they start from.
        data: Task -> held-out examples, as in `train`.
        metric: "loss", "exact_match" or "rouge1". The objective is its mean over the tasks.
        methods: The merge methods to try. None tries linear, ties, dare_ties and breadcrumbs.
        by: None searches one weight per vector, "layer-thirds" one for each third of the layers, "module" one for each
            kind of module.
        trials: The number of merges to try, with those in `study`.
        timeout: The number of seconds after which no trial is begun.
        pareto: Whether each task is an objective of its own; the result is then a Pareto front.
        holdout: The share of the examples of each task that only the result is evaluated on.
        limit: The number of examples of each task to use, from the first. None uses all.
        seed: The seed of the search and of the division of the data.
        study: A file for the trials, an Optuna study in SQLite. If it exists, the search continues. Several processes
            may work on one.
        device: As in `evaluate`.
        batch_size: As in `evaluate`.
        max_length: As in `evaluate`.
        max_new_tokens: As in `evaluate`.
        trust_remote_code: As in `evaluate`.
        progress: As in `evaluate`.

    Returns:
        The trials, the best merge as a vector, and its comparison with plain TIES.

    Raises:
        UsageError: An argument is invalid, a task has too few examples, `study` is that of another search, or a package
            is missing.
        MergeError, KindError, BaseMismatchError, DataError, TrainingError, FormatError: As in `merge` and `evaluate`.
    """
    from .search.request import check_search

    require("a search", "search")  # opening the base may download it
    opened, pareto = _vectors(vectors), truth("pareto", pareto)
    instance("data", data, Mapping)
    with_code = truth("trust_remote_code", trust_remote_code)
    checkpoint = open_model(base if isinstance(base, Checkpoint) else path_of("base", base), with_code=with_code)
    request = check_search(
        opened,
        checkpoint,
        [(str(task), path_of(f"data {task!r}", path)) for task, path in data.items()],
        metric=metric,
        methods=methods,
        by=by,
        trials=trials,
        timeout=timeout,
        pareto=pareto,
        holdout=holdout,
        limit=limit,
        seed=seed,
        study=None if study is None else path_of("study", study),
        device=device,
        batch_size=batch_size,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        trust_remote_code=with_code,
    )
    with bars.shown(progress) as report:
        running = request.begin(report)
        running.run(trials, timeout)
        return running.result()


def attach(
    model: torch.nn.Module,
    vector: VectorLike | Sequence[VectorLike] | None,
    scale: float = 1.0,
    *,
    base: ModelLike | None = None,
    cache_bytes: int | None = None,
    progress: bool | Progress = False,
    **merge: Any,
) -> Attachment:
    """Attach a vector to a model in memory, and get a handle to detach it, swap it or switch it off.

    The weights that the vector changes are kept, so that `detach` restores the model bit by bit. Whether the vector
    fits is checked against the weights of the model. Several vectors may be attached if they change different weights.
    The handle can be used in a `with` statement, which detaches the vector at the end.

    Args:
        model: A torch module that was loaded from the vector's base. Wrappers by DistributedDataParallel, torch.compile
            and peft are looked through.
        vector: A task vector or a patch, or the path of a `.lota` file; a list of them, which are merged first; None
            attaches nothing yet.
        scale: A factor of the deltas.
        base: The base on disk. It is needed if the model has a narrower dtype than its checkpoint, such as bf16 weights
            of an f32 checkpoint.
        cache_bytes: The largest size of the decoded vectors that the model keeps for later, in bytes. Attached vectors
            are kept beyond it. None keeps what is set for the model, 1 GiB at first.
        progress: True shows progress bars. A callable receives (stage, done, total, note) at every step.
        **merge: How a list is merged: the arguments of `merge`, such as `method` and `weights`.

    Returns:
        The handle.

    Raises:
        BaseMismatchError: The weights of the model are not those of the vector's base.
        AlreadyAppliedError: They have the tuned values already.
        TrainingError: The model is quantised or sharded other than by rows, lacks a parameter, or the vector adds,
            removes or resizes tensors; or another process that shares the model cannot attach the vector.
        UsageError: The vector changes weights that another attached vector changes, a vector is attached to a module
            around the model or within it, an argument is invalid, or torch or transformers is missing.
        MergeError, KindError, FormatError: As in `merge`.
    """
    require("`attach`", "train")
    from .models.attach import attach as attach_live

    checkpoint = None if base is None else _checkpoint("base", base)
    return attach_live(model, vector, scale, base=checkpoint, cache_bytes=cache_bytes, progress=progress, **merge)


def load(
    base: ModelLike | None,
    vectors: VectorLike | Sequence[VectorLike] | None = None,
    *,
    progress: bool | Progress = False,
    **options: Any,
) -> PreTrainedModel:
    """Load a model with transformers and attach vectors to it.

    Args:
        base: A model folder or a Hub id. None downloads the base that the first vector records, as in `apply`.
        vectors: As in `attach`.
        progress: As in `attach`.
        **options: The arguments of `from_pretrained`, such as `dtype` and `device_map`, and those of `attach`: `scale`,
            `method`, `weights`, `density`, `lam`.

    Returns:
        The model, in evaluation mode. `attached(model)` returns the handle of the vectors.

    Raises:
        UsageError: The base cannot be found, or is not given and not recorded; or a package is missing.
        HubError: It cannot be downloaded.
        TrainingError: The folder contains no model that transformers can load. The errors of `attach` are raised too.
    """
    require("`load`", "train")
    from .models.attach import load as load_live

    if base is None:
        listed = [] if vectors is None else vectors if isinstance(vectors, (list, tuple)) else [vectors]
        opened = _vectors(listed)
        if not opened:
            raise UsageError("there is nothing to load: give the base, or a vector that records one")
        vectors = opened if len(opened) > 1 else opened[0]
        return load_live(open_base(opened[0]), vectors, options, progress)
    return load_live(_checkpoint("base", base), vectors, options, progress)


def attached(model: torch.nn.Module) -> list[Attachment]:
    """Return the handles of the vectors that are attached to a model, in the order in which they were attached."""
    require("`attached`", "train")
    from .models.attach import attached as handles

    return handles(model)


@contextmanager
def sparse_finetune(
    model: torch.nn.Module, mask: Mapping[str, Any] | VectorLike, base: ModelLike | None = None
) -> Iterator[SparseModel]:
    """Train only the masked weights of `model` within a `with` block, in any PyTorch training loop.

    Args:
        model: A torch module. It keeps its trained weights after the block.
        mask: Parameter name -> flat positions, int64 [n], increasing; or a vector or the path of a `.lota` file, whose
            positions are the mask.
        base: The checkpoint that the model was loaded from. It is required for `tickets.vector()`.

    Yields:
        A module that computes what `model` computes and whose parameters are the deltas, f32 [n]. An optimizer over
        `tickets.parameters()` trains the model in place. Gradients are in these parameters too: clip them with
        `clip_grad_norm_(tickets.parameters(), 1.0)`.

    Raises:
        MaskError: A mask does not fit the model.
        BaseMismatchError: The model does not have the base's values at masked positions.
        TrainingError: A parameter is sharded or cannot be trained; or nothing was trained when the block ends.
        UsageError: The model is already in such a block, or a package is missing; or, inside the block, an optimizer
            would train the model's own parameters.
    """
    require("`sparse_finetune`", "train")
    from .models.sparse_finetune import sparse_finetune as finetune

    chosen = mask if isinstance(mask, Mapping) else _vector("mask", mask)
    with finetune(model, chosen, None if base is None else _checkpoint("base", base)) as tickets:
        yield tickets


def _own_defaults(kind: type[TrainingOptions], settings: Mapping[str, Any], mask_from: object) -> TrainingOptions:
    """Return default options, without a sparsity if no mask is chosen."""
    masked = settings.get("method", "lota") == "lota" and mask_from is None
    return kind() if masked else kind(sparsity=None)


def _checkpoint(what: str, value: object) -> Checkpoint:
    if isinstance(value, Checkpoint):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{what} must be a Checkpoint or a path, found {shown(value)}")
    path_of(what, value)  # names the argument if it cannot be a path
    return open_checkpoint(value)


def _vector(what: str, value: object, *, download: bool = True) -> TaskVector:
    if isinstance(value, TaskVector):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{what} must be a TaskVector or the path of a .lota file, found {shown(value)}")
    path_of(what, value)  # names the argument if it cannot be a path
    return TaskVector.open(value, download=download)


def _vectors(values: object, what: str = "vectors", *, download: bool = True) -> list[TaskVector]:
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise UsageError(f"{what} must be a list of TaskVectors or paths, found {shown(values)}")
    return [_vector(f"{what}, number {number},", value, download=download) for number, value in enumerate(values, 1)]
