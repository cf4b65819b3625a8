"""`taskvec search`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .inputs import DEVICE, MODEL, PATH, named_data
from .interrupts import Interrupted
from .outputs import FILE
from .progress import progress_bars

if TYPE_CHECKING:
    from taskvec.search.search import SearchResult

_SPACE, _SCORE, _WRITE = "Search space", "Comparison of merges", "Output"


def search(
    vectors: Annotated[list[Path], typer.Argument(metavar="VECTORS", help="Two or more .lota files.", **PATH)],
    base: Annotated[str, typer.Option("--base", help="The base of the vectors: a model folder or a Hub id.", **MODEL)],
    data: Annotated[
        list[Any],
        typer.Option(
            help="TASK=DATA: the held-out examples of a task, e.g. sql=dev.jsonl; may be repeated.",
            parser=named_data,
            metavar="TASK=DATA",
            show_default=False,
        ),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A merge method to try; may be repeated.",
            show_default="linear, ties, dare_ties, breadcrumbs",
            rich_help_panel=_SPACE,
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="Search a weight for each group of tensors: layer-thirds or module.",
            show_default="one weight per vector",
            rich_help_panel=_SPACE,
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Number of merges to try.", rich_help_panel=_SPACE)] = 50,
    timeout: Annotated[
        float | None,
        typer.Option(help="Begin no trial after this many seconds.", show_default=False, rich_help_panel=_SPACE),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the search and of the division of the data.", rich_help_panel=_SPACE)
    ] = 0,
    study: Annotated[
        Path | None,
        typer.Option(
            help="Keep the trials in this file, an Optuna study in SQLite. If it exists, the search continues. Several "
            "processes may work on one.",
            show_default=False,
            rich_help_panel=_SPACE,
            **FILE,
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="loss, exact_match or rouge1; the mean over the tasks.", rich_help_panel=_SCORE)
    ] = "loss",
    pareto: Annotated[
        bool,
        typer.Option(
            "--pareto",
            metavar="",
            help="Search the merges of which no task can be improved without another one becoming worse.",
            rich_help_panel=_SCORE,
        ),
    ] = False,
    holdout: Annotated[
        float,
        typer.Option(help="Share of the examples that only the result is evaluated on.", rich_help_panel=_SCORE),
    ] = 0.5,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Use only the first examples of each task, this many.", show_default=False, rich_help_panel=_SCORE
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per batch.", rich_help_panel=_SCORE)] = 32,
    max_length: Annotated[
        int,
        typer.Option(
            help="Maximum number of tokens per example; a longer prompt loses its beginning.", rich_help_panel=_SCORE
        ),
    ] = 1024,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens per answer.",
            show_default="the longest completion + 8, at most half of --max-length",
            rich_help_panel=_SCORE,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE, rich_help_panel=_SCORE)] = "auto",
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            metavar="",
            help="Allow Python code from the model folder to run, for models that have such code.",
            rich_help_panel=_SCORE,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Write the best merge to this .lota file.",
            show_default=False,
            rich_help_panel=_WRITE,
            **FILE,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Write the best merge to this YAML file, for taskvec merge --recipe.",
            show_default=False,
            rich_help_panel=_WRITE,
            **FILE,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the trials into this .png, .svg or .pdf file.",
            show_default=False,
            rich_help_panel=_WRITE,
            **FILE,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", metavar="", help="Replace existing outputs.", rich_help_panel=_WRITE)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print the report as JSON.", rich_help_panel=_WRITE)
    ] = False,
) -> None:
    """Search for the best merge of task vectors on held-out data.

    One model is loaded, and each merge is switched on it; no model is written.
    A part of the data (--holdout) is used for the final comparison with plain TIES only.

    Example: taskvec search a.lota b.lota --base base/ --data sql=dev1.jsonl --data maths=dev2.jsonl --recipe best.yaml
    """
    from taskvec import TaskVector
    from taskvec.analysis.plots import check_picture
    from taskvec.data.examples import check_examples
    from taskvec.destination import check_distinct, check_file
    from taskvec.errors import TrainingError
    from taskvec.hub import open_model
    from taskvec.packages import require
    from taskvec.search.request import check_search
    from taskvec.vectors.source import inputs_of

    from . import render

    # opening the base may download it
    require("a search", "search")
    if plot is not None:
        require("a picture", "plot")
    names = [name for name, _ in data]
    opened = [TaskVector.open(path) for path in vectors]
    checkpoint = open_model(base, with_code=trust_remote_code)
    read = [*inputs_of(checkpoint, *opened), *(file for _, path in data for file in check_examples(path))]
    outputs = [path for path in (output, recipe, plot) if path is not None]
    check_distinct(*outputs, *([] if study is None else [study]))
    for path in outputs:
        (check_picture if path == plot else check_file)(path, force=force, inputs=read)
    request = check_search(
        opened,
        checkpoint,
        data,
        metric=metric,
        methods=method,
        by=by,
        trials=trials,
        timeout=timeout,
        pareto=pareto,
        holdout=holdout,
        limit=limit,
        seed=seed,
        study=study,
        device=device,
        batch_size=batch_size,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        trust_remote_code=trust_remote_code,
    )
    stopped: Interrupted | None = None
    with progress_bars() as progress:
        running = request.begin(progress)
        try:
            running.run(trials, timeout)
        except Interrupted as stop:  # what was found is reported and written
            stopped = stop
        result = running.result()
    if result.vector is not None:
        _write(result, [str(path) for path in vectors], base, output=output, recipe=recipe, force=force)
    written = outputs if result.best else [path for path in outputs if path == plot and result.trials]
    if plot in written:
        from taskvec.analysis.plots import plot_trials

        points = [(row.number, row.values, row.state) for row in result.trials]
        plot_trials(metric, names if pareto else ["mean over tasks"], points, plot, force=force)
    summary = render.search_summary(result, metric, names, written)
    if as_json:
        render.print_json(summary)
    else:
        render.print_search(summary)
    if stopped is not None:
        stopped.hint = "the result of the trials until now was kept" if result.best else ""
        raise stopped
    if not result.best:
        raise TrainingError("no trial was completed, so there is no best merge, and none is written")


def _write(
    result: "SearchResult", vectors: list[str], base: str, *, output: Path | None, recipe: Path | None, force: bool
) -> None:
    """Write the best merge."""
    from taskvec.search.request import write_recipe

    assert result.vector is not None
    if output is not None:
        with progress_bars() as progress:
            result.vector.save(output, progress, force=force)
    if recipe is not None:
        write_recipe(recipe, result.candidate(result.best[0].trial), vectors, base, force=force)
