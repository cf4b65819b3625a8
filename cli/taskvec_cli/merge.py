"""`taskvec merge`: a command with many options, in panels."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .outputs import check_unfinished, parse_size
from .progress import progress_bars

if TYPE_CHECKING:
    from taskvec import Checkpoint
    from taskvec.merging.recipe import Recipe

_METHOD = "Options of methods"
_FOLDER = "Model folder (--base)"
_OPTIONS = "method weights lam density dialect elect normalize rescale gamma seed on_overlap".split()


def merge(
    vectors: Annotated[
        list[Path] | None,
        typer.Argument(metavar="VECTORS", help="One or more .lota files of one base.", show_default=False),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="What to write.",
            metavar="PATH",
            show_default="merged.lota; a model folder: merged/",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="auto, linear, average, disjoint, ties, magnitude_prune, dare_linear, dare_ties, breadcrumbs or "
            "breadcrumbs_ties.",
            show_default="auto",
        ),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="One factor a vector, e.g. 1,0.5.", show_default="1 each")] = None,
    lam: Annotated[float | None, typer.Option("--lambda", help="A factor of the whole.", show_default="1")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A merge file of mergekit's, which says all but the output.", show_default=False),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Write a model folder: this base, merged.", show_default=False)
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(
            help="Share of its eligible weights that a vector keeps: one number, or one a vector.",
            show_default="1 for ties; needed by others",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    dialect: Annotated[
        str | None,
        typer.Option(
            help="Whose numbers: reference, those of the papers; mergekit; peft.",
            show_default="reference",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    elect: Annotated[
        str | None,
        typer.Option(help="Elect signs by mass or by frequency.", show_default="mass", rich_help_panel=_METHOD),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Divide: by the number of vectors that agree, or by weights.",
            show_default="as the method does",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    rescale: Annotated[
        str | None,
        typer.Option(
            help="What is left grows by 1/density, or until the norm is what it was: none, density or norm.",
            show_default="as the method does",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(
            help="Share of the largest changes that breadcrumbs leave out.",
            show_default="0.01",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of what is dropped at random.", show_default="0", rich_help_panel=_METHOD),
    ] = None,
    on_overlap: Annotated[
        str | None,
        typer.Option(
            help="Where disjoint masks meet after all: error, sum, mean, larger or first.",
            show_default="error",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Any option of the method, also of one from another package; may be repeated.",
            show_default=False,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Round tensors to float32, bfloat16 or float16.",
            show_default="the base's",
            rich_help_panel=_FOLDER,
        ),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            help="Most bytes of a shard, e.g. 2GB.", show_default="the base's shards", rich_help_panel=_FOLDER
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a merge that was interrupted.", rich_help_panel=_FOLDER)
    ] = False,
    codec: Annotated[
        str, typer.Option(help="Of a .lota file. auto: the smallest. fast: the quickest to write. paper64, plain.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge vectors of one base. auto adds disjoint masks up; where masks meet it elects signs (TIES, no trimming)."""
    given = dict(locals())
    from taskvec import TaskVector, open_checkpoint
    from taskvec import merge as merge_vectors
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
            parents = [TaskVector.open(path) for path in vectors or ()]
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
                Application(merged, checkpoint, progress)  # the base of the recipe must be that of its files
            notes = [*check_tokenizers(parents), *(asked.notes_on_file() if asked else [])]
            merged.save(destination, progress, codec, force=force)
    made = merged.provenance
    notes = [*made["notes"], *notes]
    report = render.report_folder if to_folder else render.report_file
    report(destination, as_json, method=made["method"], reason=made["reason"], **({"notes": notes} if as_json else {}))
    if not as_json:
        for note in notes:
            render.say(f"note: {note}")


def _options(texts: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """What --option says: name -> value of options of the method."""
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
    from taskvec.errors import UsageError
    from taskvec.merging.recipe import Recipe

    for name in ("vectors", "base", "option", *_OPTIONS):
        if given[name] not in (None, []):
            shown = {"lam": "--lambda", "vectors": "VECTORS"}.get(name, f"--{name.replace('_', '-')}")
            raise UsageError(f"the recipe says what to merge and how: {shown} has no place beside it")
    return Recipe.read(given["recipe"])


def _check_output(given: dict[str, Any], output: str, base: "Checkpoint | None", *, to_folder: bool) -> Path:
    """Refuse what cannot be written, before any work is done."""
    from taskvec.applying.apply import WORK
    from taskvec.destination import check_apart, check_file, check_folder
    from taskvec.errors import UsageError

    read = [*(given["vectors"] or ()), *([given["recipe"]] if given["recipe"] else []), *(base.inputs if base else ())]
    if not to_folder:
        for name in ("dtype", "shard_size", "resume"):
            if given[name]:
                raise UsageError(f"--{name.replace('_', '-')} is for a model folder: --base says of which model")
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
    return output.with_name(f"{output.name}.part")


def _numbers(name: str, text: str) -> list[float]:
    from taskvec.errors import UsageError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--{name} takes numbers separated by commas, found {text!r:.80}") from None
