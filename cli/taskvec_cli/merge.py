"""The command `taskvec merge`. Its options are grouped in panels."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .outputs import check_unfinished, parse_size
from .progress import progress_bars

if TYPE_CHECKING:
    from taskvec import Checkpoint, TaskVector
    from taskvec.merging.recipe import Recipe
    from taskvec.reporting.progress import Progress

_METHOD = "Method options"
_FOLDER = "Model folder (--base)"
_OPTIONS = "method weights lam density dialect elect normalize rescale gamma seed on_overlap".split()


def merge(
    vectors: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="VECTORS",
            help="One or more .lota files with the same base; with --base also fine-tuned model folders or Hub ids.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="The .lota file to write; with --base, the model folder.",
            metavar="PATH",
            show_default="merged.lota; for a model folder merged/",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Merge method: auto, linear, average, disjoint, ties, magnitude_prune, dare_linear, dare_ties, "
            "breadcrumbs or breadcrumbs_ties.",
            show_default="auto",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One factor per vector, separated by commas, e.g. 1,0.5.", show_default="1 each")
    ] = None,
    lam: Annotated[
        float | None, typer.Option("--lambda", help="Factor that scales the merged vector.", show_default="1")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A configuration file of mergekit, which names the models, the method and its options.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="Write a model folder: the merged vector applied to this base, a model folder, .safetensors file or "
            "Hub id.",
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(
            help="Share of its eligible weights that each vector keeps: one number, or one per vector, separated by "
            "commas.",
            show_default="1 for ties; required by other methods that prune",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    dialect: Annotated[
        str | None,
        typer.Option(
            help="Which implementation to match: reference (the papers), mergekit or peft.",
            show_default="reference",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    elect: Annotated[
        str | None,
        typer.Option(
            help="How to elect signs: by total magnitude (mass) or by number of vectors (frequency).",
            show_default="mass",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            metavar="",
            help="Whether to divide each sum: by the number of vectors that agree (ties methods) or by the sum of the "
            "weights (other methods).",
            show_default="depends on the method",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    rescale: Annotated[
        str | None,
        typer.Option(
            help="How to scale the entries that remain: none, density (divide by the density) or norm (restore the "
            "L1 norm of the tensor).",
            show_default="depends on method and dialect",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(
            help="Share of the largest changes that the breadcrumbs methods leave out.",
            show_default="0.01",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the random choice of entries in the dare methods.", show_default="0", rich_help_panel=_METHOD
        ),
    ] = None,
    on_overlap: Annotated[
        str | None,
        typer.Option(
            help="What the method disjoint does if masks share a position: error, sum, mean, larger (the larger "
            "magnitude) or first (the first vector).",
            show_default="error",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Any option of the method, including methods of other packages; may be repeated.",
            show_default=False,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the tensors: float32, bfloat16 or float16.",
            show_default="the dtypes of the base",
            rich_help_panel=_FOLDER,
        ),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            help="Maximum size of a shard, e.g. 2GB.", show_default="the shards of the base", rich_help_panel=_FOLDER
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", metavar="", help="Continue an interrupted merge.", rich_help_panel=_FOLDER)
    ] = False,
    codec: Annotated[
        str,
        typer.Option(
            help="Compression of a .lota file: auto (smallest file), fast (fastest to write), paper64 (64 bits per "
            "entry) or plain (none)."
        ),
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print the report as JSON.")] = False,
) -> None:
    """Merge task vectors of one base into a .lota file or a model folder.

    The method auto adds vectors whose masks are disjoint.
    If masks overlap, it elects signs (TIES without trimming).

    Example: taskvec merge sql.lota maths.lota -o both.lota --weights 1,0.5
    """
    given = dict(locals())
    from taskvec import merge as merge_vectors
    from taskvec import open_checkpoint
    from taskvec.applying.output import Output
    from taskvec.applying.verified import Application
    from taskvec.errors import UsageError
    from taskvec.merging.tokenizers import check_tokenizers
    from taskvec.vectors.vector import check_codec

    from . import render

    check_codec(codec)
    options = {name: given[name] for name in _OPTIONS if given[name] is not None}
    for name in {"weights", "density"} & options.keys():
        options[name] = _numbers(name, options[name])
    if len(options.get("density", ())) == 1:
        options["density"] = options["density"][0]
    options |= _options(option or (), given)
    asked = None if recipe is None else _recipe(given)
    if asked is None and not vectors:
        raise UsageError("nothing to merge: give .lota files, or --recipe")
    checkpoint = asked.open_base() if asked else None if base is None else open_checkpoint(base)
    to_folder = checkpoint is not None if asked is None else output is None or not output.endswith(".lota")
    target = ("merged" if to_folder else "merged.lota") if output is None else output
    size = None if shard_size is None else parse_size("--shard-size", shard_size)
    form = Output(size, dtype or (asked.dtype if asked and to_folder else None))
    destination = _check_output(given, target, checkpoint, to_folder=to_folder)
    with progress_bars() as progress:
        if asked:
            parents = asked.vectors(checkpoint, progress)
            merged = asked.merge(parents, progress, checkpoint, form.dtype)
        else:
            parents = [_opened(path, checkpoint, progress) for path in vectors or ()]
            merged = merge_vectors(parents, progress=progress, base=checkpoint, **options)
        if to_folder:
            from taskvec.merging.model_folder import write_model

            assert checkpoint is not None
            notes = write_model(
                merged,
                parents,
                checkpoint,
                destination,
                progress,
                output=form,
                force=force,
                work=_part_of(destination),
                resume=resume or not force,
            )
        else:
            if checkpoint is not None:
                Application(merged, checkpoint, progress)  # checks that the vectors fit the base of the recipe
            notes = [*check_tokenizers(parents), *(asked.notes_on_file() if asked else [])]
            merged.save(destination, progress, codec, force=force)
    made = merged.provenance
    notes = [*made["notes"], *notes]
    report = render.report_folder if to_folder else render.report_file
    report(destination, as_json, method=made["method"], reason=made["reason"], **({"notes": notes} if as_json else {}))
    if not as_json:
        for note in notes:
            render.say(f"note: {note}")


def _opened(path: Path, base: "Checkpoint | None", progress: "Progress") -> "TaskVector":
    """A vector from a .lota file; with a base also what a fine-tune of it, a model folder or Hub id, changed."""
    from taskvec import TaskVector, open_checkpoint
    from taskvec.vectors.diff import diff
    from taskvec.vectors.promotion import wider

    if base is None or path.suffix == ".lota" or (path.is_file() and path.suffix != ".safetensors"):
        return TaskVector.open(path)
    return diff(base, wider(base, open_checkpoint(path)), progress=progress)


def _options(texts: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """Parse the values of `--option`: option name -> value, checked against the options of the method."""
    from taskvec.errors import UsageError
    from taskvec.merging.registry import AUTO, method_of

    if not texts:
        return {}
    method = given["method"] or AUTO
    if method == AUTO:
        raise UsageError("--option needs --method: auto chooses the method, which then has no options")
    known, found = method_of(method).options, {}
    for text in texts:
        key, equals, value = text.partition("=")
        name = key.replace("-", "_")
        if not equals:
            raise UsageError(f"--option takes KEY=VALUE, found {text!r:.80}")
        if name not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise UsageError(f"{method} has no option {key!r:.80}; {has}")
        if name in found or given.get(name) is not None:
            raise UsageError(f"option {key!r:.80} is given twice")
        found[name] = known[name].parse(value)
    return found


def _recipe(given: dict[str, Any]) -> "Recipe":
    """Read the recipe; refuse arguments that it replaces."""
    from taskvec.errors import UsageError
    from taskvec.merging.recipe import Recipe

    for name in ("vectors", "base", "option", *_OPTIONS):
        if given[name] not in (None, []):
            shown = {"lam": "--lambda", "vectors": "VECTORS"}.get(name, f"--{name.replace('_', '-')}")
            raise UsageError(f"{shown} cannot be used with --recipe: the recipe names the models and all options")
    return Recipe.read(given["recipe"])


def _check_output(given: dict[str, Any], output: str, base: "Checkpoint | None", *, to_folder: bool) -> Path:
    """Check the output before any work is done, and return its path."""
    from taskvec import open_checkpoint
    from taskvec.applying.apply import WORK
    from taskvec.destination import check_apart, check_file, check_folder
    from taskvec.errors import UsageError
    from taskvec.vectors.source import inputs_of

    vectors = given["vectors"] or ()
    models = [open_checkpoint(path) for path in vectors if base is not None and path.is_dir()]
    read = [*vectors, *([given["recipe"]] if given["recipe"] else []), *inputs_of(*models, *([base] if base else []))]
    if not to_folder:
        for name in ("dtype", "shard_size", "resume"):
            if given[name]:
                raise UsageError(f"--{name.replace('_', '-')} is for a model folder, not for a .lota file")
        return check_file(output, force=given["force"], inputs=read)
    if given["codec"] != "auto":
        raise UsageError("--codec is for a .lota file, not for a model folder")
    if base is None:
        raise UsageError(f"{given['recipe']} names no base_model, so only a .lota file can be written: -o merged.lota")
    path = check_folder(output, force=given["force"], inputs=read)
    check_apart(_part_of(path), read)
    check_unfinished(_part_of(path), WORK, resume=given["resume"], force=given["force"])
    return path


def _part_of(output: Path) -> Path:
    """Return the folder for unfinished work on a model folder."""
    return output.with_name(f"{output.name}.part")


def _numbers(name: str, text: str) -> list[float]:
    """Parse numbers separated by commas, the value of an option."""
    from taskvec.errors import UsageError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--{name} takes numbers separated by commas, found {text!r:.80}") from None
