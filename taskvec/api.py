"""The functions that `taskvec` exports.

They take the path of a model folder or its Hub id wherever they need a checkpoint, the path of a `.lota` file wherever
they need a task vector, and `progress=True` to draw progress bars. The work is done by the packages below.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec_formats import Checkpoint

from .algebra import compose as _compose
from .analysis import overlap as _overlap
from .applying import apply as _apply
from .applying.layout import check_stored_layout
from .applying.output import Output
from .arguments import shown
from .errors import UsageError
from .hub import open_checkpoint
from .merging import combine as _merging
from .merging.model_folder import write_model as _write_model
from .merging.registry import AUTO
from .merging.settings import Setting
from .reporting import bars
from .reporting.progress import Progress
from .vectors import diff as _diff
from .vectors.source import Stored
from .vectors.vector import TaskVector

if TYPE_CHECKING:
    import torch

    from .evaluation.evaluate import Evaluation
    from .models.leaves import SparseModel
    from .training.options import TrainingOptions
    from .training.train import TrainingResult

StrPath = str | os.PathLike[str]
ModelLike = Checkpoint | StrPath
VectorLike = TaskVector | StrPath


@dataclass(frozen=True)
class MergedModel:
    """A model folder that `write_model` wrote.

    Attributes:
        path: The folder.
        vector: The merged vector.
        notes: What the parents differ in, what has no effect, and what of the base's folder is not in the result, one
            sentence each.
    """

    path: Path
    vector: TaskVector
    notes: tuple[str, ...]


def diff(
    base: ModelLike,
    tuned: ModelLike,
    sparsity: float | None = None,
    *,
    kind: str = "vector",
    progress: bool | Progress = False,
) -> TaskVector:
    """The task vector tuned − base, computed when it is read or saved.

    Args:
        base: The model before fine-tuning: a model folder, a `.safetensors` file, a Hub id, or an open checkpoint.
        tuned: The model after it.
        sparsity: None keeps every change, so that applying the vector gives `tuned` back byte for byte. A number s in
            (0, 1) keeps the k = round((1 − s)·N) changes of largest magnitude, N being the number of weights in the
            tensors that fine-tuning changed; ties go to the first.
        kind: "vector", deltas that can be merged; or "patch", the new bits relative to the base, which are smaller.
        progress: True draws progress bars; a callable is told of every step.

    Raises:
        UsageError: A path does not exist, the sparsity is outside (0, 1), or a patch is to be sparse.
        DiffError: The checkpoints have no tensor in common, or cannot be two states of one model.
        FormatError: A checkpoint cannot be read.
    """
    with bars.shown(progress) as told:
        return _diff.diff(_checkpoint("base", base), _checkpoint("tuned", tuned), sparsity, told, kind)


def apply(
    vector: VectorLike,
    base: ModelLike,
    out: StrPath,
    *,
    dtype: str | None = None,
    shard_size: int | None = None,
    force: bool = False,
    max_bytes: int | None = None,
    progress: bool | Progress = False,
) -> _apply.Applied:
    """Write the model folder base + vector.

    The folder appears under its name when it is complete, and is read again before. A vector that `diff` made without a
    sparsity gives the tuned model back byte for byte, its tokenizer and other files included.

    Args:
        vector: A task vector or a patch, or the path of a `.lota` file.
        base: The model that it was taken from, or one with the same values wherever the vector changes it.
        out: The folder to write.
        dtype: "float32", "bfloat16" or "float16" rounds every floating-point tensor to it. None keeps their dtypes.
        shard_size: The largest size of a shard in bytes. None keeps the shards.
        force: Whether a model folder of that name is replaced.
        max_bytes: The largest result that is written. None allows four times the base and 2^28 bytes.
        progress: True draws progress bars; a callable is told of every step.

    Raises:
        OutputExistsError: `out` exists and `force` is False.
        AlreadyAppliedError: The base has the tuned values already.
        BaseMismatchError: The vector was taken from another base.
        SizeError: The result is too large, or does not fit on the disk.
        DTypeError: A value does not fit `dtype`.
        UsageError, FormatError, ResultError: As their names say.
    """
    with bars.shown(progress) as told:
        opened, checkpoint, path = _vector("vector", vector), _checkpoint("base", base), _path("out", out)
        output = Output(shard_size, dtype)
        return _apply.apply(opened, checkpoint, path, told, output, force=force, max_bytes=max_bytes)


def merge(
    vectors: Sequence[VectorLike],
    method: str = AUTO,
    weights: Sequence[Setting] | None = None,
    *,
    density: float | Sequence[Setting] | None = None,
    lam: Setting = 1.0,
    base: ModelLike | None = None,
    progress: bool | Progress = False,
    **options: Any,
) -> TaskVector:
    """Merge task vectors of one base into one, computed when it is read or saved.

    Args:
        vectors: Vectors or paths of `.lota` files, in the order in which they are added.
        method: A name in `taskvec.merging.METHODS`, or "auto": "disjoint" if no two masks share a position, else
            "ties".
        weights: One factor per vector: a number, a list of numbers over the layers, or rules by tensor name. 1 each if
            left out.
        density: The share of its eligible weights that a vector keeps, for methods that trim or drop: one number, or
            one setting per vector.
        lam: λ, a factor of the result.
        base: The base, which lists over the layers are then read against, and which vectors of wider dtypes need.
        progress: True draws progress bars; a callable is told of every step.
        **options: Options of the method (docs/merging.md).

    Raises:
        UsageError: There is no such method, or it does not take such an option.
        BaseMismatchError: The vectors have different bases.
        KindError: One of them is a patch.
        MergeError: Their changes cannot be added.
        FormatError: A file cannot be read.
    """
    with bars.shown(progress) as told:
        opened = _vectors(vectors)
        checkpoint = None if base is None else _checkpoint("base", base)
        return _merging.merge(opened, method, weights, told, density=density, lam=lam, base=checkpoint, **options)


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
    progress: bool | Progress = False,
    **options: Any,
) -> MergedModel:
    """Merge task vectors and write the merged model as a folder, with a model card.

    The tokenizers of the vectors are compared first. A file that all of them changed alike is written in place of the
    base's. `out`.part keeps finished shards if the process is killed, and the same call goes on with them.

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
        force: Whether a model folder of that name is replaced.
        progress: True draws progress bars; a callable is told of every step.
        **options: Options of the method.

    Raises:
        MergeError: The tokenizers of the vectors differ, or their changes cannot be added.
        ResumeError: `out`.part is in use, or that of another merge.
        UsageError, BaseMismatchError, KindError, SizeError, DTypeError, ResultError, FormatError: As in `merge` and
            `apply`.
    """
    with bars.shown(progress) as told:
        opened, checkpoint, path = _vectors(vectors), _checkpoint("base", base), _path("out", out)
        merged = _merging.merge(opened, method, weights, told, density=density, lam=lam, base=checkpoint, **options)
        notes = _write_model(
            merged,
            opened,
            checkpoint,
            path,
            told,
            output=Output(shard_size, dtype),
            force=force,
            work=path.with_name(f"{path.name}.part"),
        )
        return MergedModel(path, merged, (*merged.provenance["notes"], *notes))


def compose(
    first: VectorLike, second: VectorLike, base: ModelLike | None = None, *, progress: bool | Progress = False
) -> TaskVector:
    """One vector that does what `first` does and then what `second` does to the result.

    Args:
        first: From A to B.
        second: From B to C.
        base: A. With it the result is exact to the bit; without it each of the two must be a vector, and their deltas
            are added.
        progress: True draws progress bars; a callable is told of every step.

    Raises:
        BaseMismatchError: The second does not start where the first leads.
        KindError, MergeError, UsageError, FormatError: As in `merge`.
    """
    with bars.shown(progress) as told:
        checkpoint = None if base is None else _checkpoint("base", base)
        return _compose.compose(_vector("first", first), _vector("second", second), checkpoint, told)


def overlap(vectors: Sequence[VectorLike], *, progress: bool | Progress = False) -> list[_overlap.Overlap]:
    """Compare the masks of every pair of vectors: shared positions, sign conflicts, cosine similarity.

    Args:
        vectors: Vectors or paths of `.lota` files.
        progress: True draws progress bars; a callable is told of every step.

    Raises:
        KindError: One of them is a patch, which has no mask.
        BaseMismatchError: A tensor has another shape in another vector.
        UsageError, FormatError: A file cannot be read.
    """
    with bars.shown(progress) as told:
        return _overlap.overlap(_vectors(vectors), told)


def verify(vector: VectorLike, base: ModelLike | None = None, *, progress: bool | Progress = False) -> None:
    """Check every checksum of a `.lota` file and decode every entry.

    Args:
        vector: The path of a `.lota` file, or a vector that was opened from one.
        base: Also apply the vector to this model, in memory, and compare the result with its digests.
        progress: True draws progress bars; a callable is told of every step.

    Raises:
        FormatError: The file is damaged; the message names the part.
        BaseMismatchError: The base is another model.
        AlreadyAppliedError: It has the tuned values already.
        UsageError: The vector does not come from a file.
    """
    with bars.shown(progress) as told:
        opened = _vector("vector", vector)
        if not isinstance(opened.source, Stored):
            raise UsageError(f"{opened.name} does not come from a file: there is nothing to verify")
        opened.source.reader.verify(lambda done, total: told("decoding", done, total, ""))
        check_stored_layout(opened)
        if base is not None:
            _apply.check_result(opened, _checkpoint("base", base), told)


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
    """Train a sparse task vector (LoTA, arXiv 2406.16797, Algorithm 1), or one by full fine-tuning or LoRA.

    Args:
        base: The model folder or Hub id to start from.
        data: A file, a folder of files, or a Hub id of training data (docs/training.md).
        options: How to train.
        mask_from: Take the mask from this vector instead of calibrating.
        disjoint_from: Vectors whose positions stay out of the mask (LoTTO).
        start_from: Begin at base + this vector.
        mix: Further data and the share of the examples to draw from each.
        eval_data: Data to evaluate the loss on during training.
        folder: Keeps what is needed to go on after an interruption; the same call goes on.
        resume: False removes what is in `folder` and starts anew.
        progress: True draws progress bars; a callable is told of every step.
        **settings: Fields of `TrainingOptions`, in place of those in `options`.

    Returns:
        The vector, to be saved, and the losses.

    Raises:
        UsageError: Options contradict each other, or have no effect.
        DataError: A row of the data cannot be understood.
        MaskError: Fewer weights are free than the mask needs.
        TrainingError: The model cannot be trained, or training diverged.
        ResumeError: `folder` holds another run, or is in use.
        BaseMismatchError, FormatError: A vector does not fit the base; a file cannot be read.
    """
    from .training.options import TrainingOptions
    from .training.train import train as train_vector

    if unknown := settings.keys() - TrainingOptions.__dataclass_fields__.keys():
        raise UsageError(f"TrainingOptions has no field {min(unknown)!r}")
    chosen = replace(options or _own_defaults(TrainingOptions, settings, mask_from), **settings)
    with bars.shown(progress) as told:
        return train_vector(
            _checkpoint("base", base),
            _path("data", data),
            chosen,
            told,
            mask_from=None if mask_from is None else _vector("mask_from", mask_from),
            disjoint_from=_vectors(disjoint_from, "disjoint_from"),
            start_from=None if start_from is None else _vector("start_from", start_from),
            mix=[(_path("mix", path), share) for path, share in mix],
            eval_data=None if eval_data is None else _path("eval_data", eval_data),
            folder=None if folder is None else _path("folder", folder),
            resume=resume,
        )


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
        vectors: Vectors to apply in memory; several are merged with the method "auto".
        metrics: Any of "loss", "exact_match" and "rouge1".
        batch_size: Examples at a time.
        max_length: Tokens of an example; a longer prompt loses its beginning.
        max_new_tokens: Tokens of a generated answer. None takes those of the longest completion and 8 more, at most
            half of `max_length`.
        limit: Take only the first examples.
        device: "auto", which takes an accelerator if there is one, or a name such as "cpu" or "cuda:1".
        trust_remote_code: Whether Python code from the model folder may run.
        progress: True draws progress bars; a callable is told of every step.

    Raises:
        UsageError, DataError, TrainingError, BaseMismatchError, FormatError: As in `train`.
    """
    from .data.examples import read_examples
    from .evaluation.scoring import check_request

    check_request(metrics, batch_size=batch_size, max_length=max_length, max_new_tokens=max_new_tokens, limit=limit)
    opened = _vectors(vectors)
    if isinstance(model, Checkpoint):
        checkpoint = model
    else:
        checkpoint = open_checkpoint(_path("model", model), with_code=trust_remote_code)
    examples = read_examples(_path("data", data))[:limit]
    from .evaluation.evaluate import evaluate_checkpoint

    with bars.shown(progress) as told:
        one = _merging.merge(opened, progress=told) if len(opened) > 1 else next(iter(opened), None)
        return evaluate_checkpoint(
            checkpoint,
            one,
            examples,
            metrics,
            device=device,
            batch_size=batch_size,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            trust_remote_code=trust_remote_code,
            progress=told,
        )


@contextmanager
def applied(model: torch.nn.Module, vector: VectorLike, base: ModelLike) -> Iterator[None]:
    """Within the `with` block a model in memory has the vector's weights; afterwards its own bits again.

    Only the elements that the vector changes are copied. Blocks may be nested if the vectors change other elements.

    Args:
        model: A torch module that was loaded from `base`.
        vector: A task vector or a patch, or the path of a `.lota` file.
        base: The model folder, which the vector is checked against.

    Raises:
        BaseMismatchError: The vector was taken from another base, or an element that it changes does not have the
            base's value in the model.
        TrainingError: The model lacks a parameter, or the vector adds, removes or resizes tensors.
        UsageError, FormatError: A file cannot be read.
    """
    from .models.live import applied as applied_live

    with applied_live(model, _vector("vector", vector), _checkpoint("base", base)):
        yield


@contextmanager
def sparse_finetune(
    model: torch.nn.Module, mask: Mapping[str, Any] | VectorLike, base: ModelLike | None = None
) -> Iterator[SparseModel]:
    """Within the `with` block only the masked weights of `model` train, in any PyTorch training loop.

    Args:
        model: A torch module. It keeps its trained weights after the block.
        mask: Parameter name -> flat positions, int64 [n], increasing; or a vector or the path of a `.lota` file, whose
            positions are the mask.
        base: The checkpoint that the model was loaded from. `tickets.vector()` needs it.

    Yields:
        A module that computes what `model` does and whose parameters are the deltas, f32 [n]. An optimizer over
        `tickets.parameters()` trains the model in place.

    Raises:
        MaskError: A mask does not fit the model.
        BaseMismatchError: The model does not have the base's values at masked positions.
        TrainingError: A parameter is sharded or cannot be trained; on leaving the block, nothing was trained.
        UsageError: The model is in such a block already; inside the block, an optimizer would train the model's own
            parameters.
    """
    from .models.leaves import sparse_finetune as finetune

    chosen = mask if isinstance(mask, Mapping) else _vector("mask", mask)
    with finetune(model, chosen, None if base is None else _checkpoint("base", base)) as tickets:
        yield tickets


def _own_defaults(kind: type[TrainingOptions], settings: Mapping[str, Any], mask_from: object) -> TrainingOptions:
    """Default options, without a sparsity if nothing is left to choose."""
    masked = settings.get("method", "lota") == "lota" and mask_from is None
    return kind() if masked else kind(sparsity=None)


def _path(what: str, value: object) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{what} must be a path, found {shown(value)}")
    try:
        if b"\0" in os.fsencode(value):
            raise ValueError("it holds a zero byte")
    except ValueError as error:  # which UnicodeEncodeError is
        raise UsageError(f"{what} cannot be a path ({error}), found {shown(value)}") from None
    return Path(os.fsdecode(value))


def _checkpoint(what: str, value: object) -> Checkpoint:
    if isinstance(value, Checkpoint):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{what} must be a Checkpoint or a path, found {shown(value)}")
    return open_checkpoint(value)


def _vector(what: str, value: object) -> TaskVector:
    if isinstance(value, TaskVector):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{what} must be a TaskVector or the path of a .lota file, found {shown(value)}")
    return TaskVector.open(Path(value))


def _vectors(values: object, what: str = "vectors") -> list[TaskVector]:
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise UsageError(f"{what} must be a list of TaskVectors or paths, found {shown(values)}")
    return [_vector(f"{what}, number {number},", value) for number, value in enumerate(values, 1)]
