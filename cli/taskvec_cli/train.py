"""The command `taskvec train`. Its options are grouped in panels."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from taskvec.training.criteria import CRITERIA, MASKS

from . import jobs
from .config import RATE, ConfigFile, Rate, compare, rate_of, settle
from .failure import with_flags
from .flags import takes
from .inputs import DATA, DATA_PATH, DEVICE, MODEL, PATH, data_path
from .interrupts import resumable
from .outputs import FILE, LotaFile, check_unfinished
from .progress import progress_bars

if TYPE_CHECKING:
    from taskvec.training.options import TrainingOptions
    from taskvec.training.result import TrainingResult
    from taskvec_formats import Checkpoint

_MASK = "Mask (--method lota)"
_NAMED = ("mask_rank", "seed")  # options that criteria of the mask mention
_TENSORS = "Tensors"
_LENGTH = "Optimization"
_EARLIER = "Sequences of tasks"
_WATCH = "Evaluation, checkpoints and reports"
_MEMORY = "Memory, dtype and device"


class _Flags:
    """The options that describe a run: the fields of TrainingOptions, and further files to read."""

    method: Annotated[
        str,
        typer.Option(
            help="lota: a sparse ticket. fft: all parameters. lora: adapters, merged into the weights at the end."
        ),
    ] = "lota"
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Share of the eligible weights that keep the value of the base.",
            show_default="0.9; with --mask-from its whole mask",
            rich_help_panel=_MASK,
        ),
    ] = None
    mask: Annotated[
        str,
        typer.Option(
            help="Which k weights to train; w are the weights, g the gradients of calibration. "
            f"{'; '.join(f'{row.name}: {with_flags(row.mask, _NAMED)}' for row in CRITERIA.values())}. "
            f"Without calibration: {', '.join(row.name for row in CRITERIA.values() if not row.calibrates)}.",
            rich_help_panel=_MASK,
        ),
    ] = MASKS[0]
    mask_rank: Annotated[
        int,
        typer.Option(
            help="Rank r of the approximations of the weight matrices, with "
            f"{' or '.join(f'--mask {row.name}' for row in CRITERIA.values() if 'mask_rank' in row.options)}.",
            rich_help_panel=_MASK,
        ),
    ] = 128
    scope: Annotated[
        str,
        typer.Option(
            help="global: rank the weights of all tensors together. tensor: rank those of each tensor separately.",
            rich_help_panel=_MASK,
        ),
    ] = "global"
    calibration_steps: Annotated[
        int, typer.Option(help="Steps of the full fine-tuning that chooses the mask.", rich_help_panel=_MASK)
    ] = 20
    calibration_epochs: Annotated[
        float | None,
        typer.Option(
            help="Passes of calibration over the data, instead of --calibration-steps; 0.1 is a tenth of the data.",
            show_default=False,
            rich_help_panel=_MASK,
        ),
    ] = None
    calibration_lr: Annotated[
        Rate | None,
        typer.Option(
            metavar=RATE,
            parser=rate_of,
            help="Learning rate of calibration; auto searches for one on the data.",
            show_default="that of --method fft",
            rich_help_panel=_MASK,
        ),
    ] = None
    via: Annotated[
        list[float] | None,
        typer.Option(
            help="Train a ticket of this lower sparsity first, and use its largest entries as the mask; may be "
            "repeated, with increasing sparsities.",
            show_default=False,
            rich_help_panel=_MASK,
        ),
    ] = None
    mask_from: Annotated[
        Path | None,
        typer.Option(
            help="Use the mask of this .lota file; with --sparsity, only its largest entries.",
            rich_help_panel=_MASK,
            **PATH,
        ),
    ] = None
    regrow_steps: Annotated[
        int | None,
        typer.Option(
            help="Change the mask during training, after every N steps.",
            metavar="N",
            show_default="the mask is fixed",
            rich_help_panel=_MASK,
        ),
    ] = None
    regrow_rule: Annotated[
        str,
        typer.Option(
            help="How --regrow-steps changes the mask. gradients: drop the entries with the smallest changes, and grow "
            "as many where the summed gradients are largest. criterion: choose the whole mask again by --mask "
            f"{' or '.join(row.name for row in CRITERIA.values() if row.weighs)}, from the current weights.",
            rich_help_panel=_MASK,
        ),
    ] = "gradients"
    regrow_share: Annotated[
        float,
        typer.Option(
            help="With --regrow-rule gradients, the share of the entries to replace; it falls linearly to zero.",
            rich_help_panel=_MASK,
        ),
    ] = 0.2
    regrow_window: Annotated[
        int | None,
        typer.Option(
            help="With --regrow-rule gradients, the number of steps before each change over which they are summed.",
            show_default="5",
            rich_help_panel=_MASK,
        ),
    ] = None
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Train only tensors whose names match, such as '*.mlp.*'; may be repeated.",
            show_default=False,
            rich_help_panel=_TENSORS,
        ),
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Do not train tensors whose names match; may be repeated.",
            show_default=False,
            rich_help_panel=_TENSORS,
        ),
    ] = None
    l1: Annotated[
        float,
        typer.Option("--l1", help="Factor λ of the L1 penalty on changes of the weights.", rich_help_panel=_MASK),
    ] = 0.0
    steps: Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps, instead of --epochs; 0 writes only the mask, without values.",
            show_default=False,
            rich_help_panel=_LENGTH,
        ),
    ] = None
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=_LENGTH)] = 3
    lr: Annotated[
        Rate | None,
        typer.Option(
            "--lr",
            metavar=RATE,
            parser=rate_of,
            help="Learning rate of training, with --via of the last ticket; auto searches for one on the data.",
            show_default="depends on method, optimizer and density",
            rich_help_panel=_LENGTH,
        ),
    ] = None
    optimizer: Annotated[str, typer.Option(help="rmsprop, adam, adamw or sgd.", rich_help_panel=_LENGTH)] = "rmsprop"
    weight_decay: Annotated[
        float,
        typer.Option(
            help="Decoupled weight decay, as in AdamW. The weights of a ticket decay to the base.",
            rich_help_panel=_LENGTH,
        ),
    ] = 0.0
    batch_size: Annotated[
        int, typer.Option(help="Examples per backward pass; with --pack, rows.", rich_help_panel=_LENGTH)
    ] = 8
    accumulate: Annotated[int, typer.Option(help="Backward passes per step.", rich_help_panel=_LENGTH)] = 1
    schedule: Annotated[
        str,
        typer.Option(
            help="Learning rate schedule: constant, constant_with_warmup, linear or cosine.", rich_help_panel=_LENGTH
        ),
    ] = "constant"
    warmup_steps: Annotated[
        int,
        typer.Option(
            help="Steps over which the learning rate rises from zero; not with --schedule constant.",
            rich_help_panel=_LENGTH,
        ),
    ] = 0
    clip: Annotated[float, typer.Option(help="Maximum norm of the gradient.", rich_help_panel=_LENGTH)] = 1.0
    max_length: Annotated[
        int,
        typer.Option(
            help="Maximum number of tokens per example; a longer prompt loses its beginning.", rich_help_panel=_LENGTH
        ),
    ] = 1024
    turns: Annotated[
        str,
        typer.Option(
            help="Which turns of the assistant in a conversation are trained on: all or last.", rich_help_panel=_LENGTH
        ),
    ] = "all"
    pack: Annotated[
        bool,
        typer.Option(
            "--pack",
            metavar="",
            help="Put several examples into one row of --max-length tokens, without attention between them.",
            rich_help_panel=_LENGTH,
        ),
    ] = False
    seed: Annotated[
        int, typer.Option(help="Seed of the order of the data and of random masks.", rich_help_panel=_LENGTH)
    ] = 0
    rank: Annotated[int, typer.Option(help="Rank of the LoRA adapters.", rich_help_panel=_LENGTH)] = 64
    alpha: Annotated[int, typer.Option(help="Scale of the LoRA adapters.", rich_help_panel=_LENGTH)] = 16
    disjoint_from: Annotated[
        list[Path] | None,
        typer.Option(
            help="Exclude the positions of this .lota file from the mask; may be repeated.",
            rich_help_panel=_EARLIER,
            **PATH,
        ),
    ] = None
    start_from: Annotated[
        Path | None,
        typer.Option(help="Start training from BASE with this .lota file applied.", rich_help_panel=_EARLIER, **PATH),
    ] = None
    relative_to: Annotated[
        str,
        typer.Option(
            help="With --start-from, what the new vector applies to: BASE (base), or BASE with that file applied "
            "(start).",
            rich_help_panel=_EARLIER,
        ),
    ] = "base"
    mix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA:SHARE",
            help="Draw this share of the examples from other data, e.g. other.jsonl:0.1; may be repeated.",
            show_default=False,
            rich_help_panel=_EARLIER,
        ),
    ] = None
    eval_data: Annotated[
        Path | None,
        typer.Option(
            help="Examples to evaluate on during training, in one of the formats of DATA.",
            rich_help_panel=_WATCH,
            **DATA_PATH,
        ),
    ] = None
    eval_split: Annotated[
        float,
        typer.Option(help="Share of DATA to hold out for evaluation, instead of --eval-data.", rich_help_panel=_WATCH),
    ] = 0.0
    eval_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps between evaluations; the last step is always followed by one.",
            show_default="ten evaluations in total",
            rich_help_panel=_WATCH,
        ),
    ] = None
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after this many evaluations without a lower loss, and keep the best weights.",
            show_default=False,
            rich_help_panel=_WATCH,
        ),
    ] = None
    eval_metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Metric to evaluate in addition to the loss: exact_match or rouge1; may be repeated.",
            show_default=False,
            rich_help_panel=_WATCH,
        ),
    ] = None
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=_WATCH)] = 100
    report_to: Annotated[
        str,
        typer.Option(
            help="Where to log metrics: none, tensorboard (in runs/), wandb or another integration of transformers' "
            "Trainer.",
            rich_help_panel=_WATCH,
        ),
    ] = "none"
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            metavar="",
            help="Calibrate in half the memory and twice the time; needs --optimizer rmsprop.",
            rich_help_panel=_MEMORY,
        ),
    ] = False
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            metavar="",
            help="Recompute activations in the backward pass instead of storing them.",
            rich_help_panel=_MEMORY,
        ),
    ] = False
    dtype: Annotated[
        str, typer.Option(help="Dtype of the computation: float32 or bfloat16.", rich_help_panel=_MEMORY)
    ] = "float32"
    device: Annotated[str, typer.Option(help=DEVICE, rich_help_panel=_MEMORY)] = "auto"
    shards: Annotated[
        int | None,
        typer.Option(
            help="With several processes (torchrun): the number among which the weights are divided. 1 gives each "
            "process all of them.",
            show_default="all",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            metavar="",
            help="Allow Python code from the model folder to run, for models that have such code.",
        ),
    ] = False


@takes(_Flags)
def train(
    context: typer.Context,
    base: Annotated[
        str,
        typer.Argument(metavar="BASE", help="The base model: a model folder or a Hub id.", **MODEL),
    ],
    data: Annotated[Path, typer.Argument(metavar="DATA", help=DATA, **DATA_PATH)],
    output: LotaFile,
    config: ConfigFile = None,
    *,
    resume: Annotated[
        bool, typer.Option("--resume", metavar="", help="Continue an interrupted run.", rich_help_panel=_WATCH)
    ] = False,
    show_example: Annotated[
        bool,
        typer.Option(
            "--show-example",
            metavar="",
            help="Print the first example as the model sees it, and which parts of it are trained on.",
            rich_help_panel=_WATCH,
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the losses to this file: .png, .svg or .pdf.",
            show_default=False,
            rich_help_panel=_WATCH,
            **FILE,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", metavar="", help="Print the steps, entries and estimated memory of the run, and stop."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print the report as JSON.")] = False,
    **flags: Any,
) -> None:
    """Train a sparse task vector on DATA, by Lottery Ticket Adaptation (LoTA).

    Calibration fine-tunes all eligible weights for a few steps.
    The weights that change most form the mask; all weights are reset.
    Then only the weights in the mask are trained.
    OUTPUT.run contains the state of the run until it ends; --resume needs it.

    Example: taskvec train base/ train.jsonl -o task.lota --sparsity 0.9
    """
    options = _options(flags, settle(context, flags))
    from taskvec import TaskVector
    from taskvec.analysis.plots import check_picture
    from taskvec.data.examples import check_examples
    from taskvec.destination import check_distinct, check_file
    from taskvec.hub import open_model
    from taskvec.packages import require
    from taskvec.resume import remove_work
    from taskvec.training.folder import KIND
    from taskvec.vectors.source import inputs_of

    if plot is not None:
        require("a picture", "plot")  # opening the base may download it
    folder = output.with_name(f"{output.name}.run")
    with jobs.agreeing(options) as reports:
        request: dict[str, Any] = {
            "mask_from": None if flags["mask_from"] is None else TaskVector.open(flags["mask_from"]),
            "disjoint_from": [TaskVector.open(path) for path in flags["disjoint_from"] or ()],
            "start_from": None if flags["start_from"] is None else TaskVector.open(flags["start_from"]),
            "mix": [_mixed(text) for text in flags["mix"] or ()],
            "eval_data": flags["eval_data"],
        }
        vectors = [request["mask_from"], request["start_from"], *request["disjoint_from"]]
        sources = [data, request["eval_data"], *(path for path, _ in request["mix"])]
        files = [file for source in sources if source is not None for file in check_examples(source)]
        checkpoint = open_model(base)
        read = [*files, *inputs_of(checkpoint, *filter(None, vectors)), *([] if config is None else [config])]
        if reports:  # the process that writes the outputs
            check_distinct(output, plot)
            check_file(output, force=force, inputs=read)
            if plot is not None:
                check_picture(plot, force=force, inputs=read)
            check_unfinished(folder, KIND, resume=resume, force=force)
            if show_example:
                _preview(checkpoint, data, options)
        jobs.check_dry_run(dry_run=dry_run)
    if options.report_to == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"runs/{output.stem}")
    if dry_run:
        compare(context, checkpoint, data, request)
        _plan(checkpoint, data, options, request, output=output, plot=plot, as_json=as_json)
        return
    with resumable(folder), progress_bars(shown=reports) as progress:
        compare(context, checkpoint, data, request)
        from taskvec.training.train import train as train_vector

        trained = train_vector(
            checkpoint, data, options, progress, **request, folder=folder, resume=resume or not force
        )
        jobs.in_one(lambda: trained.vector.save(output, progress, force=force))
    if not reports:
        return
    remove_work(folder)
    if plot is not None:
        _draw(trained, output.stem, plot, force=force)
    _report(trained, output, plot, context.params, as_json=as_json, in_a_row=bool(request["disjoint_from"]))


def _options(flags: dict[str, Any], was_set: set[str]) -> "TrainingOptions":
    """Return the checked training options for the options of the command; `was_set` names those that were set."""
    from dataclasses import fields

    from taskvec.training.effects import check_effects
    from taskvec.training.options import TrainingOptions, check_packages

    takes_mask = flags["mask_from"] is not None
    values = {field.name: flags[field.name] for field in fields(TrainingOptions)}
    if values["sparsity"] is None and not takes_mask and values["method"] == "lota":
        values["sparsity"] = 0.9
    values |= {name: values[name] or () for name in ("via", "include", "exclude", "eval_metric")}
    options = TrainingOptions(**values)
    options.check(takes_mask=takes_mask)
    check_packages(options)
    evaluates = flags["eval_data"] is not None or bool(options.eval_split)
    check_effects(
        options, was_set, takes_mask=takes_mask, evaluates=evaluates, starts_from=flags["start_from"] is not None
    )
    return options


def _preview(checkpoint: "Checkpoint", data: Path, options: "TrainingOptions") -> None:
    """Print the first example to standard error."""
    from taskvec.training.preview import preview_first

    from . import render

    # standard output is reserved for the report
    for line in render.preview_lines(preview_first(checkpoint.path, data, options)):
        render.say(line, err=True)


def _plan(
    checkpoint: "Checkpoint",
    data: Path,
    options: "TrainingOptions",
    request: dict[str, Any],
    *,
    output: Path,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print the plan of a run (`--dry-run`)."""
    from . import render

    with progress_bars() as progress:
        from taskvec.training.plan import plan

        found = plan(checkpoint, data, options, progress, **request)
    files = [str(output), *([] if plot is None else [str(plot)])]
    folders = [f"{output}.run", *(["runs"] if options.report_to == "tensorboard" else [])]
    if as_json:
        render.print_json(render.plan_summary(found, files, folders))
    else:
        render.print_plan(found, files, folders)


def _report(
    trained: "TrainingResult",
    output: Path,
    plot: Path | None,
    names: Collection[str],
    *,
    as_json: bool,
    in_a_row: bool,
) -> None:
    """Print the report of a run to standard output, and its warnings to standard error.

    Args:
        trained: The result.
        output: The file that was written.
        plot: The picture that was drawn, if any.
        names: The names of the options, which warnings name.
        as_json: Whether to print JSON.
        in_a_row: Whether the masks of earlier tasks were excluded.
    """
    from . import render
    from .failure import with_flags

    summary = trained.summary()
    report = summary if as_json else render.training_lines(summary, in_a_row=in_a_row)
    picture = {} if plot is None and not as_json else {"picture": None if plot is None else str(plot)}
    render.report_file(output, as_json, **report, **picture)
    for warning in trained.warnings:
        render.say(f"taskvec: warning: {with_flags(warning, names)}", err=True)


def _draw(trained: "TrainingResult", label: str, plot: Path, *, force: bool) -> None:
    """Draw the losses of a run (`--plot`)."""
    from taskvec.analysis.plots import plot_losses

    curve = trained.curve
    plot_losses(
        label,
        trained.calibration_losses,
        curve.losses,
        curve.eval_losses,
        plot,
        metrics=curve.eval_metrics,
        force=force,
    )


def _mixed(text: str) -> tuple[Path, float]:
    """Parse DATA:SHARE, the value of `--mix`."""
    from taskvec.errors import UsageError

    path, _, share = text.rpartition(":")
    try:
        number = float(share)
    except ValueError:
        number = None
    if not path or number is None:
        raise UsageError(f"--mix takes DATA:SHARE, such as other.jsonl:0.1; found {text!r}")
    return data_path(path), number
