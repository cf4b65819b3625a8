"""The command `taskvec merge`. Its options are grouped in panels."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .flags import takes
from .inputs import ANY_MODEL, MODEL, PATH
from .interrupts import resumable
from .outputs import MaxMemory, check_unfinished, numbers, parse_size
from .progress import progress_bars

if TYPE_CHECKING:
    from taskvec import Checkpoint, TaskVector
    from taskvec.applying.output import Output
    from taskvec.reporting.progress import Progress

_METHOD = "Method options"
_FOLDER = "Model folder (--base, or a recipe with a base model)"


class _Flags:
    """The merge method and its options."""

    method: Annotated[
        str | None,
        typer.Option(
            help="Merge method: auto, linear, average, disjoint, ties, magnitude_prune, dare_linear, dare_ties, "
            "breadcrumbs, breadcrumbs_ties, della, della_linear, sce, ram, ramplus_tl, model_stock, nuslerp, "
            "multislerp or nearswap.",
            show_default="auto",
        ),
    ] = None
    weights: Annotated[
        str | None, typer.Option(help="One factor per vector, separated by commas, e.g. 1,0.5.", show_default="1 each")
    ] = None
    lam: Annotated[
        float | None, typer.Option("--lambda", help="Factor that scales the merged vector.", show_default="1")
    ] = None
    density: Annotated[
        str | None,
        typer.Option(
            help="Share of its eligible weights that each vector keeps: one number, or one per vector, separated by "
            "commas.",
            show_default="1 for ties; required by other methods that prune",
            rich_help_panel=_METHOD,
        ),
    ] = None
    dialect: Annotated[
        str | None,
        typer.Option(
            help="Which implementation to match: reference (the papers), mergekit or peft.",
            show_default="reference",
            rich_help_panel=_METHOD,
        ),
    ] = None
    elect: Annotated[
        str | None,
        typer.Option(
            help="How to elect signs: by total magnitude (mass) or by number of vectors (frequency).",
            show_default="mass",
            rich_help_panel=_METHOD,
        ),
    ] = None
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
    ] = None
    rescale: Annotated[
        str | None,
        typer.Option(
            help="How to scale the entries that remain: none, density (divide by the density) or norm (restore the "
            "L1 norm of the tensor).",
            show_default="depends on method and dialect",
            rich_help_panel=_METHOD,
        ),
    ] = None
    gamma: Annotated[
        float | None,
        typer.Option(
            help="Share of the largest changes that the breadcrumbs methods leave out.",
            show_default="0.01",
            rich_help_panel=_METHOD,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the random choice of entries in the dare and della methods.",
            show_default="0",
            rich_help_panel=_METHOD,
        ),
    ] = None
    on_overlap: Annotated[
        str | None,
        typer.Option(
            help="What the method disjoint does if masks share a position: error, sum, mean, larger (the larger "
            "magnitude) or first (the first vector).",
            show_default="error",
            rich_help_panel=_METHOD,
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Any option of the method, including methods of other packages; may be repeated.",
            show_default=False,
            rich_help_panel=_METHOD,
        ),
    ] = None


@takes(_Flags)
def merge(
    vectors: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="VECTORS",
            help="One or more .lota files with the same base; with --base also fine-tuned model folders, "
            "Hub ids and adapters of peft.",
            **PATH,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="The .lota file to write; with --base, the model folder. With --recipe, a name that ends in .lota is "
            "a file, any other name a model folder.",
            metavar="PATH",
            show_default="merged.lota; for a model folder merged/",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help=f"Write a model folder: the merged vector applied to this base, {ANY_MODEL}",
            **MODEL,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A configuration file of mergekit, which names the models, the method and its options. If it names a "
            "base model, a model folder is written, unless OUTPUT ends in .lota.",
            **PATH,
        ),
    ] = None,
    *,
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
    max_memory: MaxMemory = None,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print the report as JSON.")] = False,
    **flags: Any,
) -> None:
    """Merge task vectors of one base into a .lota file or a model folder.

    The method auto adds vectors whose masks are disjoint.
    If masks overlap, it elects signs (TIES without trimming).

    Example: taskvec merge sql.lota maths.lota -o both.lota --weights 1,0.5
    """
    from taskvec.applying.output import Output
    from taskvec.destination import part_of
    from taskvec.errors import UsageError
    from taskvec.vectors.vector import check_codec

    check_codec(codec)
    if recipe is not None:
        for name, value in {"vectors": vectors, "base": base, **flags}.items():
            _refuse(name, value, "cannot be used with --recipe: the recipe names the models and all options")
    asked = _Listed(vectors or [], base, flags) if recipe is None else _Read(recipe)
    checkpoint = asked.open_base()
    to_folder = checkpoint is not None if recipe is None else output is None or not output.endswith(".lota")
    if to_folder and checkpoint is None:
        raise UsageError(f"{recipe} names no base_model, so only a .lota file can be written: -o merged.lota")
    read = [*_inputs(vectors or (), checkpoint), *([] if recipe is None else [recipe])]
    if to_folder:
        _refuse("codec", codec if codec != "auto" else None, "is for a .lota file, not for a model folder")
    else:
        for name, value in (("dtype", dtype), ("shard_size", shard_size), ("resume", resume or None)):
            _refuse(name, value, "is for a model folder, not for a .lota file")
    destination = _checked(output, read, to_folder=to_folder, resume=resume, force=force)
    size = None if shard_size is None else parse_size("--shard-size", shard_size)
    form = Output(size, dtype)
    with progress_bars() as progress:
        if to_folder:
            work = part_of(destination)
            with resumable(work):
                made, notes = asked.write_folder(
                    checkpoint, destination, form, progress, force=force, work=work, resume=resume or not force
                )
        else:
            made, notes = asked.write_file(checkpoint, destination, codec, progress, force=force)
    _report(made, destination, notes, to_folder=to_folder, as_json=as_json)


class _Read:
    """A merge that a file describes. It has the interface of `_Listed`.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        from taskvec.recipes import Recipe

        self._recipe = Recipe.read(path)

    def open_base(self) -> "Checkpoint | None":
        return self._recipe.open_start()

    def write_folder(
        self, start: "Checkpoint | None", out: Path, output: "Output", progress: "Progress", **how: Any
    ) -> tuple[dict[str, Any], Sequence[str]]:
        from taskvec.recipes import RecipeMerge

        written = RecipeMerge(self._recipe, start, progress).write_folder(out, output, **how)
        return written.provenance, written.notes

    def write_file(
        self, start: "Checkpoint | None", path: Path, codec: str, progress: "Progress", *, force: bool
    ) -> tuple[dict[str, Any], Sequence[str]]:
        from taskvec.recipes import RecipeMerge

        written = RecipeMerge(self._recipe, start, progress).write_file(path, codec, force=force)
        return written.provenance, written.notes


class _Listed:
    """A merge of vectors that the command line names.

    Args:
        paths: The vectors.
        base: The base model, or None.
        flags: The method and its options.

    Raises:
        UsageError: There are no vectors, an option has no valid value, or a package is missing.
    """

    def __init__(self, paths: Sequence[Path], base: str | None, flags: dict[str, Any]) -> None:
        from taskvec.errors import UsageError
        from taskvec.interop.names import adapter_at, check_peft

        self._options = _method_options(flags)
        if not paths:
            raise UsageError("nothing to merge: give .lota files, or --recipe")
        if base is not None and any(adapter_at(path) is not None for path in paths):
            check_peft()
        self._paths = paths
        self._base = base

    def open_base(self) -> "Checkpoint | None":
        from taskvec import open_checkpoint

        return None if self._base is None else open_checkpoint(self._base)

    def _merged(self, base: "Checkpoint | None", progress: "Progress") -> "tuple[list[TaskVector], TaskVector]":
        from taskvec import merge as merge_vectors

        parents = [_opened(path, base, progress) for path in self._paths]
        return parents, merge_vectors(parents, progress=progress, base=base, **self._options)

    def write_folder(
        self, base: "Checkpoint | None", out: Path, output: "Output", progress: "Progress", **how: Any
    ) -> tuple[dict[str, Any], Sequence[str]]:
        from taskvec.merging.model_folder import write_model

        assert base is not None
        parents, merged = self._merged(base, progress)
        return merged.provenance, write_model(merged, parents, base, out, progress, output=output, **how)

    def write_file(
        self, base: "Checkpoint | None", path: Path, codec: str, progress: "Progress", *, force: bool
    ) -> tuple[dict[str, Any], Sequence[str]]:
        from taskvec.merging.tokenizers import check_tokenizers

        parents, merged = self._merged(base, progress)
        notes = check_tokenizers(parents)
        merged.save(path, progress, codec, force=force)
        return merged.provenance, notes


def _report(made: dict[str, Any], output: Path, notes: Sequence[str], *, to_folder: bool, as_json: bool) -> None:
    """Print the report of a merge."""
    from . import render

    notes = [*made["notes"], *notes]
    report = render.report_folder if to_folder else render.report_file
    report(output, as_json, method=made["method"], reason=made["reason"], **({"notes": notes} if as_json else {}))
    if not as_json:
        for note in notes:
            render.say(f"note: {note}")


def _opened(path: Path, base: "Checkpoint | None", progress: "Progress") -> "TaskVector":
    """A vector from a .lota file; with a base also what a fine-tune of it or an adapter of peft for it changes."""
    from taskvec import TaskVector, open_checkpoint
    from taskvec.errors import UsageError
    from taskvec.interop.names import adapter_at
    from taskvec.vectors.diff import diff
    from taskvec.vectors.found import is_vector
    from taskvec.vectors.promotion import wider

    if (adapter := adapter_at(path)) is not None:
        if base is None:
            raise UsageError(f"{path} is an adapter of peft: --base must name its base")
        from taskvec.interop.adapters import read_adapter

        return read_adapter(adapter, base, progress)
    if base is None or is_vector(path) or (path.is_file() and path.suffix != ".safetensors"):
        return TaskVector.open(path)
    return diff(base, wider(base, open_checkpoint(path)), progress=progress)


def _method_options(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, as `taskvec.merge` takes them."""
    options = {name: value for name, value in flags.items() if value is not None and name != "option"}
    for name in {"weights", "density"} & options.keys():
        options[name] = numbers(f"--{name}", options[name])
    if len(options.get("density", ())) == 1:
        options["density"] = options["density"][0]
    return options | _further_options(flags["option"] or (), options)


# settings of every merge, which are options of the command
_OWN = {"density": "density", "weights": "weights", "lambda": "factor of the result"}


def _further_options(texts: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """Parse the values of `--option`: option name -> value, checked against the options of the method."""
    from taskvec.errors import UsageError
    from taskvec.merging.registry import AUTO, method_of

    if not texts:
        return {}
    method = given.get("method", AUTO)
    if method == AUTO:
        raise UsageError("--option needs --method: auto chooses the method, which then has no options")
    known, found = method_of(method).options, dict[str, Any]()
    for text in texts:
        key, equals, value = text.partition("=")
        name = key.replace("-", "_")
        if not equals:
            raise UsageError(f"--option takes KEY=VALUE, found {text!r:.80}")
        if name in _OWN:
            raise UsageError(f"--option is for the options of methods: use --{name} for the {_OWN[name]}")
        if name not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise UsageError(f"{method} has no option {key!r:.80}; {has}")
        if name in found or name in given:
            raise UsageError(f"option {key!r:.80} is given twice")
        found[name] = known[name].parse(value)
    return found


def _refuse(name: str, value: object, why: str) -> None:
    """Refuse a parameter of the command that was given. Its value may be False or zero."""
    from taskvec.errors import UsageError

    if value not in (None, []):
        shown = {"lam": "--lambda", "vectors": "VECTORS"}.get(name, f"--{name.replace('_', '-')}")
        raise UsageError(f"{shown} {why}")


def _inputs(vectors: Sequence[Path], base: "Checkpoint | None") -> list[Path]:
    """Return the files and folders that are read."""
    from taskvec import open_checkpoint
    from taskvec.vectors.source import inputs_of

    if base is None:
        return list(vectors)
    return [*vectors, *inputs_of(base, *(open_checkpoint(path) for path in vectors if path.is_dir()))]


def _checked(output: str | None, read: Sequence[Path], *, to_folder: bool, resume: bool, force: bool) -> Path:
    """Check the output before any work is done, and return its path."""
    from taskvec.applying.apply import WORK
    from taskvec.destination import check_apart, check_file, check_folder, part_of

    if not to_folder:
        return check_file("merged.lota" if output is None else output, force=force, inputs=read)
    path = check_folder("merged" if output is None else output, force=force, inputs=read)
    check_apart(part_of(path), read)
    check_unfinished(part_of(path), WORK, resume=resume, force=force)
    return path
