"""The `taskvec` command. Library modules are imported inside the commands: `--help` stays quick."""

# annotations are evaluated where they stand: as strings each would be evaluated twice while commands are set up
import gc
import os
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import streams
from .merge import merge
from .outputs import DATA, FILE, LotaFile, ModelFolder, parse_size
from .progress import progress_bars
from .train import train


class _Commands(TyperGroup):
    """Draws its help with rich alone: typer's own loads a Markdown parser, which takes longer than all the rest."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table

        options = [(", ".join(option.opts), getattr(option, "help", "")) for option in self.get_params(ctx)]
        commands = [(name, command.short_help) for name, command in self.commands.items()]
        console = Console(highlight=False)
        console.print(f"\n Usage: {ctx.command_path} [OPTIONS] COMMAND [ARGS]...\n\n {self.help}\n", markup=False)
        for title, rows in (("Options", options), ("Commands", commands)):
            table = Table.grid(padding=(0, 2))
            for name, said in rows:
                table.add_row(f"[bold cyan]{name}[/]", said)
            console.print(Panel(table, title=title, title_align="left", border_style="dim"))


app = typer.Typer(
    name="taskvec",
    cls=_Commands,
    help="Train, store, merge and apply sparse task vectors of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL = "Model folder, .safetensors file or Hub id."
Base = Annotated[str, typer.Argument(metavar="BASE", help=_MODEL, show_default=False)]
Tuned = Annotated[str, typer.Argument(metavar="TUNED", help=_MODEL, show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        import taskvec

        typer.echo(f"taskvec {taskvec.__version__}")
        raise typer.Exit
    _keep_memory()


def _keep_memory() -> None:
    """Let the C library keep freed memory: blocks come and go, and each time new pages would have to be zeroed.

    Cycles of Python objects are looked for seldom, too: each time all objects of a long list of tensors are visited.
    """
    gc.set_threshold(200_000, 50, 1000)
    if sys.platform == "linux":
        import ctypes

        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # glibc
            for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                library.mallopt(parameter, 1 << 30)


app.command(short_help="Train a sparse task vector.")(train)


@app.command(short_help="Store what fine-tuning changed, exactly.")
def pack(
    base: Base,
    tuned: Tuned,
    output: LotaFile,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Keep only the top 1 − S of all weights that could change, by magnitude.", show_default=False
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="vector: deltas, standalone, to be merged. patch: new bits relative to BASE, smaller.")
    ] = "vector",
    codec: Annotated[
        str,
        typer.Option(
            help="auto: the smallest. fast: the quickest to write. paper64: 64 bits an entry. plain: uncompressed."
        ),
    ] = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Store what fine-tuning changed: all of it, exact to the last bit, or with --sparsity its largest part."""
    from taskvec import diff, open_checkpoint
    from taskvec.destination import check_file
    from taskvec.vectors.diff import check_kind
    from taskvec.vectors.source import inputs_of
    from taskvec.vectors.vector import check_codec

    from . import render

    check_kind(kind, sparsity)
    check_codec(codec)
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    check_file(output, force=force, inputs=inputs_of(before, after))
    with progress_bars() as progress:
        vector = diff(before, after, sparsity, kind=kind, progress=progress)
        vector.save(output, progress, codec, force=force)
    render.report_file(output, as_json)


@app.command(short_help="Write the complete model folder.")
def unpack(
    vector: Annotated[Path, typer.Argument(metavar="VECTOR", help="The .lota file.", show_default=False)],
    base: Annotated[str, typer.Option("--base", help="The base it was taken from.", show_default=False)],
    output: ModelFolder,
    max_size: Annotated[
        str | None,
        typer.Option(help="Largest model to write, e.g. 20GB.", show_default="four times BASE and 268 MB"),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the complete model folder: the base with the vector applied, checked to the last bit."""
    from taskvec import TaskVector, apply, open_checkpoint

    from . import render

    most = None if max_size is None else parse_size("--max-size", max_size)
    opened, checkpoint = TaskVector.open(vector), open_checkpoint(base)
    with progress_bars() as progress:
        applied = apply(opened, checkpoint, output, force=force, max_bytes=most, progress=progress)
    if as_json:
        said = {"exact": applied.exact, "differences": applied.differences, "not_carried": applied.left_out}
        render.report_folder(output, as_json, **said)
        return
    render.report_folder(output, as_json)
    if applied.left_out:
        render.say(render.not_carried(applied.left_out))
    if applied.exact is not None:
        render.say(render.exactness(applied))


app.command(short_help="Merge vectors of one base.")(merge)


@app.command(short_help="Add, scale, negate and chain vectors.")
def arith(
    expression: Annotated[
        str,
        typer.Argument(
            metavar="EXPRESSION",
            help='Names of .lota files, numbers, + - * / >> and parentheses: "0.5*a.lota + (b.lota - c.lota)".',
            show_default=False,
        ),
    ],
    output: LotaFile,
    base: Annotated[
        str | None,
        typer.Option("--base", help="For >>: what its first vector starts from; then it is exact.", show_default=False),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add, scale, negate and chain vectors; a >> b is what a does and then what b does to the result.

    File names hold + - / >> too: such an operator needs white space on both sides.
    A name that holds white space, parentheses or * stands in quotation marks.
    An expression that begins with a minus stands in parentheses, "(-a.lota)", or behind --.
    """
    from taskvec import open_checkpoint
    from taskvec.algebra.expression import Expression
    from taskvec.destination import check_file
    from taskvec.errors import UsageError

    from . import render

    parsed = Expression(expression)
    if base is not None and not parsed.composes:
        raise UsageError("--base is for >>, which the expression does not hold")
    checkpoint = open_checkpoint(base) if base is not None else None
    check_file(output, force=force, inputs=checkpoint.inputs if checkpoint else ())
    with progress_bars() as progress:
        parsed.evaluate(base=checkpoint, progress=progress).save(output, progress, force=force)
    render.report_file(output, as_json)


@app.command(short_help="Keep the largest entries of a vector.")
def shrink(
    vector: Annotated[Path, typer.Argument(metavar="VECTOR", help="The .lota file.", show_default=False)],
    output: LotaFile,
    sparsity: Annotated[
        float, typer.Option(help="Share of eligible weights without an entry, e.g. 0.99.", show_default=False)
    ],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a smaller vector: the entries of largest magnitude, as many as --sparsity leaves."""
    from taskvec import TaskVector
    from taskvec.destination import check_file

    from . import render

    opened = TaskVector.open(vector)
    check_file(output, force=force, inputs=opened.inputs)
    with progress_bars() as progress:
        opened.shrink(sparsity).save(output, progress, force=force)
    render.report_file(output, as_json)


@app.command(short_help="Show what is in a file, and how masks overlap.")
def inspect(
    vectors: Annotated[
        list[Path], typer.Argument(metavar="VECTORS", help="One or more .lota files.", show_default=False)
    ],
    as_json: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw a blocks × modules heat map: .png, .svg or .pdf.", show_default=False, **FILE),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a picture that exists.")] = False,
) -> None:
    """Show what is in a file; of several files also how their masks overlap."""
    from taskvec import TaskVector, overlap
    from taskvec.vectors.source import inputs_of

    from . import render

    opened = [TaskVector.open(path) for path in vectors]
    labels = [str(path) for path in vectors]
    files = [
        render.file_summary(label, vector, path.stat().st_size)
        for label, vector, path in zip(labels, opened, vectors, strict=True)
    ]
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
        render.print_json({"files": files, "overlap": rows})
        return
    for summary in files:
        render.print_file(summary)
    if rows:
        render.print_overlap(rows)
    if plot is not None:
        render.say(f"picture: {plot}")


@app.command(short_help="Check every checksum and decode every entry.")
def verify(
    vector: Annotated[Path, typer.Argument(metavar="VECTOR", help="The .lota file.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="Also apply it to this base, in memory.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every checksum and decode every entry; with --base also that the result is the one promised."""
    from taskvec import TaskVector
    from taskvec import verify as verify_vector

    from . import render

    with progress_bars() as progress:
        opened = TaskVector.open(vector)
        verify_vector(opened, base, progress=progress)
    if as_json:
        render.print_json({"path": str(vector), "ok": True, "base_checked": base is not None})
    else:
        against = f", and applies to {base} as promised" if base is not None else ""
        render.say(f"{vector}: {len(opened)} tensors, all intact{against}")


@app.command("eval", short_help="Score a model on held-out data.")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or Hub id.", show_default=False)],
    data: Annotated[Path, typer.Option(help=DATA, show_default=False)],
    vectors: Annotated[
        list[Path] | None,
        typer.Option("--with", help="A .lota file to apply; several, once a file, are merged.", show_default=False),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="loss, exact_match or rouge1; once a metric.", show_default="loss"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples at a time.")] = 32,
    max_length: Annotated[int, typer.Option(help="Tokens an example; a longer prompt loses its beginning.")] = 1024,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Where an answer is cut off.", show_default="the longest completion + 8, at most half of --max-length"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Take only the first examples.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="auto (an accelerator where there is one), cpu, cuda:1, …")] = "auto",
    answers: Annotated[
        Path | None,
        typer.Option(help="Write prompt, completion and answer as JSON lines.", show_default=False, **FILE),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run Python code from the model folder, where the model has code of its own."
        ),
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score MODEL, with the vectors of --with on it, on held-out data: loss, exact match, ROUGE-1."""
    from taskvec import TaskVector, open_checkpoint
    from taskvec import merge as merge_vectors
    from taskvec.data.examples import check_examples, read_examples
    from taskvec.destination import check_file
    from taskvec.errors import UsageError
    from taskvec.evaluation.scoring import check_request, needs_answers
    from taskvec.models.devices import check_device
    from taskvec.vectors.source import inputs_of

    from . import render

    metrics = list(dict.fromkeys(metric or ["loss"]))
    check_request(metrics, batch_size=batch_size, max_length=max_length, max_new_tokens=max_new_tokens, limit=limit)
    check_device(device)
    if answers is not None and not needs_answers(metrics):
        raise UsageError("--answers needs --metric exact_match or rouge1: the loss has no answers")
    files = check_examples(data)
    examples = read_examples(data)[:limit]
    opened = [TaskVector.open(path) for path in vectors or ()]
    checkpoint = open_checkpoint(model, with_code=trust_remote_code)
    if answers is not None:
        check_file(answers, force=force, inputs=[*files, *inputs_of(checkpoint, *opened)])
    with progress_bars() as progress:
        # torch takes seconds and memory: only once all that can be refused without it has been
        from taskvec.evaluation.evaluate import evaluate_checkpoint, write_answers

        worn = merge_vectors(opened, progress=progress) if len(opened) > 1 else next(iter(opened), None)
        evaluation = evaluate_checkpoint(
            checkpoint,
            worn,
            examples,
            metrics,
            device=device,
            batch_size=batch_size,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if answers is not None:
        write_answers(answers, examples, evaluation.answers, force=force)
    merged = worn.provenance if worn is not None and len(opened) > 1 else None
    summary = render.evaluation_summary(model, vectors or (), merged, data, evaluation)
    if as_json:
        render.print_json(summary)
    else:
        render.print_evaluation(summary)
    if worn is not None and (warning := render.evaluation_warning(worn)):
        render.say(f"taskvec: warning: {warning}", err=True)
    if warning := render.truncation_warning(summary):
        render.say(f"taskvec: warning: {warning}", err=True)


@app.command(short_help="Do all of it on a real model.")
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to keep everything.")] = Path("taskvec-demo"),
    as_json: Json = False,
) -> None:
    """Do all of it on a real model: train two tickets, merge them, compare, and ask the merged model."""
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
    """The names of all options that a command has, with underscores."""
    commands = typer.main.get_group(app).commands.values()
    spelt = (flag for command in commands for each in command.params for flag in each.opts)
    return frozenset(flag.lstrip("-").replace("-", "_") for flag in spelt)


def main() -> None:
    """Run the command; errors become one sentence on standard error and an exit code: 2 for usage, 1 for failures."""
    streams.repair()
    debugs = bool(os.environ.get("TASKVEC_DEBUG"))
    # this process runs one command, and every thread in it is known; a traceback does not leave its process
    os.environ.setdefault("TASKVEC_PROCESSES", "0" if debugs else "1")
    try:
        app()
    except Exception as error:
        if debugs:
            raise
        from .failure import explain

        sentence, code = explain(error, option_names())
        streams.settle()
        typer.echo(f"taskvec: {sentence}", err=True)
        sys.exit(code)
