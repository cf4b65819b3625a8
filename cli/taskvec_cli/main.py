"""The command `taskvec`. Library modules are imported inside the commands, so that `--help` is fast."""

# no `from __future__ import annotations`: typer would evaluate each annotation twice, which takes time at start-up
import gc
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from . import jobs, streams
from .convert import convert
from .help import Command, Commands
from .hub import pull, push
from .inputs import ANY_MODEL, DATA, DEVICE, MODEL, NAMED_DATA, PATH, LotaInput, LotaInputs
from .interrupts import Interrupted, interruptible
from .merge import merge
from .outputs import FILE, LotaFile, MaxMemory, ModelFolder, folder_name, parse_size
from .progress import progress_bars
from .search import search
from .train import train

if TYPE_CHECKING:
    from taskvec_formats import Kind


app = typer.Typer(
    name="taskvec",
    cls=Commands,
    help="Train, store, merge and apply sparse task vectors of language models.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Base = Annotated[str, typer.Argument(metavar="BASE", help=f"The base model: {ANY_MODEL}", **MODEL)]
Tuned = Annotated[
    str,
    typer.Argument(metavar="TUNED", help="The tuned model, likewise, or the folder of an adapter of peft.", **MODEL),
]
Force = Annotated[bool, typer.Option("--force", metavar="", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print the report as JSON.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        import taskvec

        typer.echo(f"taskvec {taskvec.__version__}")
        raise typer.Exit
    from taskvec_formats.system.memory import keep_freed_memory

    keep_freed_memory()
    gc.set_threshold(200_000, 50, 1000)  # each run visits every object of a long list of tensors
    # tracebacks of worker processes are lost
    if not _debugs() and os.environ.get("TASKVEC_PROCESSES") != "0":
        from taskvec_formats.system.workers import allow

        allow()  # this process runs one command, and all its threads are known


def _debugs() -> bool:
    """Return whether exceptions are raised instead of explained."""
    return bool(os.environ.get("TASKVEC_DEBUG"))


app.command(cls=Command, short_help="Train a sparse task vector.")(train)


@app.command(cls=Command, short_help="Store a fine-tune as a task vector.")
def pack(
    base: Base,
    tuned: Tuned,
    output: LotaFile,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Share of the eligible weights without an entry, e.g. 0.9; only the largest changes are kept.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            help="vector: deltas, which can be merged. patch: new bits, smaller, but not mergeable and "
            "readable only with BASE."
        ),
    ] = "vector",
    codec: Annotated[
        str,
        typer.Option(
            help="Compression: auto (smallest file), fast (fastest to write), paper64 (64 bits per entry) or "
            "plain (none)."
        ),
    ] = "auto",
    max_memory: MaxMemory = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Store the difference between a tuned model and its base as a task vector.

    All changes are stored, exact to the last bit.
    With --sparsity, only the largest changes are kept.

    Example: taskvec pack base/ tuned/ -o tuned.lota
    """
    from taskvec import pack as write

    from . import render

    with progress_bars() as progress:
        write(base, tuned, output, sparsity, kind=cast("Kind", kind), codec=codec, force=force, progress=progress)
    render.report_file(output, as_json)


@app.command(cls=Command, short_help="Apply a task vector and write the model folder.")
def unpack(
    vector: LotaInput,
    output: ModelFolder,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help=f"The base of the vector: {ANY_MODEL}",
            **{**MODEL, "show_default": "the one on the Hub that the vector records"},
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(help="Maximum size of the model, e.g. 20GB.", show_default="4 × the size of the base + 268 MB"),
    ] = None,
    max_memory: MaxMemory = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Apply a task vector to its base and write the complete model folder.

    The folder is read back and checked before it is moved into place.
    Without --base, the base that the vector records is downloaded from the Hub.

    Example: taskvec unpack tuned.lota --base base/ -o model/
    """
    from taskvec import TaskVector, apply, open_checkpoint
    from taskvec.hub.base import open_base

    from . import render

    most = None if max_size is None else parse_size("--max-size", max_size)
    opened = TaskVector.open(vector)
    checkpoint = open_base(opened) if base is None else open_checkpoint(base)
    with progress_bars() as progress:
        applied = apply(opened, checkpoint, output, force=force, max_bytes=most, progress=progress)
    if as_json:
        facts = {"exact": applied.exact, "differences": applied.differences, "not_carried": applied.left_out}
        base_facts = render.base_summary(checkpoint)
        render.report_folder(output, as_json, base=base_facts, **facts)
        return
    render.report_folder(output, as_json)
    if base is None:
        render.say(f"base: {render.base_text(checkpoint)}, which {opened.name} records")
    if applied.left_out:
        render.say(render.not_carried(applied.left_out))
    if applied.exact is not None:
        render.say(render.exactness(applied))


app.command(cls=Command, short_help="Convert task vectors from and to other formats.")(convert)
app.command(cls=Command, short_help="Merge task vectors of one base.")(merge)
app.command(cls=Command, short_help="Search for the best merge on held-out data.")(search)


@app.command(cls=Command, short_help="Add, scale, negate and compose task vectors.")
def arith(
    expression: Annotated[
        str,
        typer.Argument(
            metavar="EXPRESSION",
            help="Names of .lota files and numbers, combined with + - * / >> and parentheses.",
            show_default=False,
        ),
    ],
    output: LotaFile,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base of the first vector of a >> b; the result is then exact.", **MODEL),
    ] = None,
    max_memory: MaxMemory = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add, scale, negate and compose task vectors.

    The composition a >> b applies a, then b to the result.
    Put white space around + - / and >>, which are also allowed in file names.
    Quote names that contain white space, parentheses or *.
    Put an expression that begins with a minus in parentheses or after --.

    Example: taskvec arith "0.5*a.lota + (b.lota - c.lota)" -o d.lota
    """
    from taskvec import open_checkpoint
    from taskvec.algebra.expression import Expression
    from taskvec.destination import check_file
    from taskvec.errors import UsageError

    from . import render

    parsed = Expression(expression)
    if base is not None and not parsed.composes:
        raise UsageError("--base is for >>, which the expression does not contain")
    checkpoint = open_checkpoint(base) if base is not None else None
    check_file(output, force=force, inputs=checkpoint.inputs if checkpoint else ())
    with progress_bars() as progress:
        parsed.evaluate(base=checkpoint, progress=progress).save(output, progress, force=force)
    render.report_file(output, as_json)


@app.command(cls=Command, short_help="Keep the largest entries of a task vector.")
def shrink(
    vector: LotaInput,
    output: LotaFile,
    sparsity: Annotated[
        float, typer.Option(help="Share of the eligible weights without an entry, e.g. 0.99.", show_default=False)
    ],
    max_memory: MaxMemory = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Keep the entries of largest magnitude of a task vector.

    Example: taskvec shrink sql.lota -o small.lota --sparsity 0.99
    """
    from taskvec import TaskVector
    from taskvec.destination import check_file

    from . import render

    opened = TaskVector.open(vector)
    check_file(output, force=force, inputs=opened.inputs)
    with progress_bars() as progress:
        opened.shrink(sparsity).save(output, progress, force=force)
    render.report_file(output, as_json)


@app.command(cls=Command, short_help="Describe .lota files and compare their masks.")
def inspect(
    vectors: LotaInputs,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw a heat map (blocks × modules) to this file: .png, .svg or .pdf.", show_default=False, **FILE
        ),
    ] = None,
    max_memory: MaxMemory = None,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace an existing picture.")] = False,
    as_json: Json = False,
) -> None:
    """Describe .lota files and, if there are several, the overlap of their masks.

    Of a file on the Hub, only what is described or compared is fetched.

    Example: taskvec inspect sql.lota maths.lota --plot overlap.png
    """
    from taskvec import TaskVector, overlap
    from taskvec.errors import UsageError
    from taskvec.hub.reference import written
    from taskvec.vectors.source import inputs_of

    from . import render

    if force and plot is None:
        raise UsageError("--force needs --plot: inspect writes no other file")
    opened = [TaskVector.open(path, download=False) for path in vectors]
    labels = [written(path) for path in vectors]
    files = [render.file_summary(label, vector) for label, vector in zip(labels, opened, strict=True)]
    if plot is not None:
        from taskvec.analysis.plots import check_picture, plot_density, plot_overlap

        check_picture(plot, force=force, inputs=inputs_of(*opened))
    with progress_bars() as progress:
        pairs = overlap(opened, progress=progress) if len(opened) > 1 else []
    rows = [render.overlap_summary(labels, pair) for pair in pairs]
    if plot is not None:
        if pairs:
            plot_overlap([path.stem for path in vectors], pairs, plot, force=force)
        else:
            plot_density(vectors[0].stem, opened[0], plot, force=force)
    if as_json:
        render.print_json({"files": files, "overlap": rows, "picture": None if plot is None else str(plot)})
        return
    for summary in files:
        render.print_file(summary)
    if rows:
        render.print_overlap(rows)
    if plot is not None:
        render.say(f"picture: {plot}")


@app.command(cls=Command, short_help="Check the integrity of .lota files.")
def verify(
    vectors: LotaInputs,
    base: Annotated[
        str | None, typer.Option("--base", help=f"Also apply each of them to this base: {ANY_MODEL}", **MODEL)
    ] = None,
    max_memory: MaxMemory = None,
    as_json: Json = False,
) -> None:
    """Check every checksum of .lota files and decode every entry.

    With --base, each vector is also applied in memory and the result is checked.
    The first file that is damaged ends the command.

    Example: taskvec verify tuned.lota --base base/
    """
    from taskvec import TaskVector, open_checkpoint
    from taskvec import verify as verify_vector
    from taskvec.hub.reference import written

    from . import render

    checkpoint = None if base is None else open_checkpoint(base)
    opened = [TaskVector.open(path) for path in vectors]
    with progress_bars() as progress:
        for vector in opened:
            verify_vector(vector, checkpoint, progress=progress)
    reports = [
        {"path": written(path), "ok": True, "tensors": len(vector), "base_checked": base is not None}
        for path, vector in zip(vectors, opened, strict=True)
    ]
    if as_json:
        render.print_json(reports[0] if len(reports) == 1 else reports)
        return
    against = f", and applies to {base} as expected" if base is not None else ""
    for path, vector in zip(vectors, opened, strict=True):
        render.say(f"{written(path)}: {len(vector)} tensors, all intact{against}")


app.command(cls=Command, short_help="Upload a task vector to the Hugging Face Hub.")(push)
app.command(cls=Command, short_help="Download a task vector from the Hugging Face Hub.")(pull)


@app.command("eval", cls=Command, short_help="Evaluate a model on held-out data.")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a Hub id.", **MODEL)],
    data: Annotated[
        list[Any], typer.Option(help=f"{DATA} May be repeated; NAME=DATA gives it a name in the table.", **NAMED_DATA)
    ],
    vectors: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            help="A .lota file to apply to MODEL; may be repeated, several vectors are merged.",
            **PATH,
        ),
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", metavar="", help="Evaluate each --with alone instead of their merge.")
    ] = False,
    grid: Annotated[
        bool, typer.Option("--grid", metavar="", help="Evaluate MODEL, each --with alone, and their merge, as a table.")
    ] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="loss, exact_match or rouge1; may be repeated.", show_default="loss"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per batch.")] = 32,
    max_length: Annotated[
        int, typer.Option(help="Maximum number of tokens per example; a longer prompt loses its beginning.")
    ] = 1024,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens per answer.",
            show_default="the longest completion + 8, at most half of --max-length",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use only the first examples of each DATA, this many.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Write prompts, completions and answers to this file, as JSON lines.", show_default=False, **FILE
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            metavar="",
            help="Allow Python code from the model folder to run, for models that have such code.",
        ),
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model on held-out data: loss, exact match and ROUGE-1.

    Vectors given by --with are applied in memory.
    Several vectors are merged first, unless --each or --grid is given.

    Example: taskvec eval base/ --with sql.lota --with maths.lota --grid --data sql=dev1.jsonl --data maths=dev2.jsonl
    """
    from taskvec import TaskVector
    from taskvec.data.examples import check_examples, read_examples
    from taskvec.destination import check_file
    from taskvec.devices import check_device
    from taskvec.errors import UsageError
    from taskvec.evaluation.scoring import check_request, needs_answers
    from taskvec.hub import open_model
    from taskvec.hub.reference import written
    from taskvec.vectors.source import inputs_of

    from . import render

    metrics = list(dict.fromkeys(metric or ["loss"]))
    check_request(metrics, batch_size=batch_size, max_length=max_length, max_new_tokens=max_new_tokens, limit=limit)
    check_device(device)
    if answers is not None and not needs_answers(metrics):
        raise UsageError("--answers needs --metric exact_match or rouge1: the loss has no answers")
    if force and answers is None:
        raise UsageError("--force needs --answers: eval writes no other file")
    if each and (grid or not vectors):
        raise UsageError("--grid includes --each: give one of them" if grid else "--each needs --with")
    if answers is not None and (each or grid or len(data) > 1):
        raise UsageError("--answers takes one DATA, and neither --each nor --grid")
    names = [name for name, _ in data]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two --data have the name {twice[0]!r}: NAME=DATA gives each a name")
    named = dict(data)
    files = [file for path in named.values() for file in check_examples(path)]
    examples = {name: read_examples(path)[:limit] for name, path in named.items()}
    opened = [TaskVector.open(path) for path in vectors or ()]
    checkpoint = open_model(model, with_code=trust_remote_code)
    if answers is not None:
        check_file(answers, force=force, inputs=[*files, *inputs_of(checkpoint, *opened)])
    with progress_bars() as progress:
        # importing torch takes seconds, so every check that does not need it comes first
        from taskvec.evaluation.evaluate import evaluate_variants, write_answers
        from taskvec.evaluation.variants import variants_of

        variants = variants_of(opened, checkpoint, each=each, grid=grid, progress=progress)
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
            progress=progress,
        )
    labels = dict(zip(map(id, opened), map(written, vectors or ()), strict=True))
    rows = [
        render.evaluation_row(variant, [labels[id(parent)] for parent in variant.parents], results)
        for variant, results in zip(variants, found, strict=True)
    ]
    if answers is not None:
        ((name, result),) = found[0].items()
        write_answers(answers, examples[name], result.answers, force=force)
    report = render.evaluation_summary(model, named, rows, answers, is_table=each or grid or len(named) > 1)
    if as_json:
        render.print_json(report)
    else:
        render.print_evaluation(report)
    for vector in opened:
        if warning := render.evaluation_warning(vector):
            render.say(f"taskvec: warning: {warning}", err=True)
    for warning in render.truncation_warnings(rows[0]):
        render.say(f"taskvec: warning: {warning}", err=True)


@app.command(cls=Command, short_help="Run the whole workflow on a real model.")
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for all files.", parser=folder_name)] = Path(
        "taskvec-demo"
    ),
    as_json: Json = False,
) -> None:
    """Run the whole workflow on a real model.

    Two tickets are trained, merged and compared.
    The merged model then answers questions of both tasks.

    Example: taskvec demo taskvec-demo/
    """
    from taskvec.demo.run import run

    from . import render

    with progress_bars() as progress:
        result = run(folder, progress)
    if as_json:
        render.print_json(render.demo_summary(result))
    else:
        render.print_demo(result)


@cache
def option_names() -> frozenset[str]:
    """Return the names of the options of all commands, with underscores and without leading hyphens."""
    commands = typer.main.get_group(app).commands.values()
    flags = (flag for command in commands for each in command.params for flag in each.opts)
    return frozenset(flag.lstrip("-").replace("-", "_") for flag in flags)


def main() -> None:
    """Run the command line.

    An error is printed to standard error as one sentence. The exit code is 2 for usage errors, 1 for failures, 130
    after SIGINT (Ctrl-C) and 143 after SIGTERM. With TASKVEC_DEBUG=1 the exception is raised instead.
    """
    streams.repair()
    try:
        with jobs.reporting(), interruptible():
            app()
    except (Exception, Interrupted) as error:
        if _debugs():
            raise
        from .failure import explain

        error = jobs.cause(error)
        sentence, code = explain(error, option_names())
        streams.settle()
        if jobs.says(error):
            typer.echo(f"taskvec: {sentence}", err=True)
        jobs.leave(code)
        sys.exit(code)
    except SystemExit as end:
        jobs.leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
