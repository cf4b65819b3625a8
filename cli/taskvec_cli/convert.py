"""The command `taskvec convert`: task vectors from and to the formats of other programs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from . import streams
from .inputs import ANY_MODEL, MODEL, PATH
from .outputs import folder_name, numbers, parse_size
from .progress import progress_bars

if TYPE_CHECKING:
    from taskvec import Checkpoint, TaskVector
    from taskvec.interop.lora import Lora
    from taskvec.reporting.progress import Progress
    from taskvec_formats import Kind

TARGETS = ("shira", "lora", "coo", "delta")
SOURCES = ("coo", "delta")  # formats that are not always recognised by their content


def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE",
            help="A .lota file; or the folder of an adapter of peft, several of them, a .wsp file of weightscope, a "
            "safetensors file of coordinates, or a checkpoint of deltas.",
            **PATH,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="The .lota file to write; with --to, the folder or the .safetensors file.",
            metavar="PATH",
            parser=folder_name,
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option("--base", help=f"The base, required except with --to coo: {ANY_MODEL}", **MODEL),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="Convert a .lota file to: lora or shira, adapters of peft; coo, coordinates in a safetensors file; or "
            "delta, a dense checkpoint of tuned − base.",
            show_default=False,
        ),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Format of a safetensors file or folder that does not name it: coo, coordinates whose values are "
            "deltas, or delta, a checkpoint of deltas.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="One factor per adapter, separated by commas, e.g. 0.7,0.3.", show_default="1 each"),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Share of the weights of the changed tensors without an entry, e.g. 0.9; only the largest changes are "
            "kept.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="vector: deltas, which can be merged. patch: new bits, readable only with the base.",
            show_default="vector",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="With --to lora: the largest rank of the factors.", show_default="64")
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            help="With --to delta and a folder: maximum size of a shard, e.g. 2GB.",
            show_default="the shards of the base",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", metavar="", help="Run Python code that the base contains.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print the report as JSON.")] = False,
) -> None:
    """Convert adapters and other formats of changes to task vectors, and task vectors to such formats.

    The vector of an adapter gives the weights of peft's merge_and_unload, to the last bit.
    Several LoRA adapters are multiplied by their weights and added.

    Example: taskvec convert adapter/ --base base/ -o adapter.lota
    """
    from taskvec.errors import UsageError

    if to is None:
        _refuse({"--rank": rank, "--shard-size": shard_size}, "needs --to")
        vector_options = {
            "sparsity": sparsity,
            "kind": kind,
            "weights": None if weights is None else numbers("--weights", weights),
        }
        _to_lota(sources, base, output, from_, vector_options, trust=trust_remote_code, force=force, as_json=as_json)
        return
    if to not in TARGETS:
        raise UsageError(f"--to must be {', '.join(TARGETS[:-1])} or {TARGETS[-1]}, found {to!r}")
    unused = {"--from": from_, "--weights": weights, "--sparsity": sparsity, "--kind": kind}
    _refuse({**unused, "--trust-remote-code": trust_remote_code or None}, "has no effect with --to")
    of_others = {"lora": ("--rank", rank), "delta": ("--shard-size", shard_size)}
    _refuse(dict(option for own, option in of_others.items() if own != to), f"has no effect with --to {to}")
    _refuse({"--base": base if to == "coo" else None}, "has no effect with --to coo")
    if len(sources) > 1:
        raise UsageError(f"--to converts one .lota file, found {len(sources)} sources: merge them first")
    size = None if shard_size is None else parse_size("--shard-size", shard_size)
    facts, lines = _from_lota(sources[0], base, output, to, rank, size, force=force)
    from . import render

    if as_json:
        render.print_json({"path": str(output), "format": to, **facts})
        return
    streams.need_no_reader()
    for line in lines:
        render.say(line)
    if to == "lora":
        render.print_lora(facts["layers"])


def _refuse(options: dict[str, Any], why: str) -> None:
    """Refuse options that were given although they have no effect."""
    from taskvec.errors import UsageError

    for option in (name for name, value in options.items() if value is not None):
        raise UsageError(f"{option} {why}")


def _needed(base: str | None, what: str) -> str:
    from taskvec.errors import UsageError

    if base is None:
        raise UsageError(f"{what} needs --base")
    return base


def _to_lota(
    sources: list[Path],
    base: str | None,
    output: Path,
    from_: str | None,
    options: dict[str, Any],
    *,
    trust: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a .lota file."""
    from taskvec.destination import check_file
    from taskvec.hub import open_checkpoint
    from taskvec.hub.models import local_folder
    from taskvec.interop.names import check_peft, files_of

    from . import render

    sources = [local_folder(source) for source in sources]
    source = sources[0]
    found = _format_of(source, from_)
    if found == "peft":
        check_peft()
    else:
        _refuse({"--weights": options["weights"]}, "is for adapters of peft")
        _refuse({"--trust-remote-code": trust or None}, "is for adapters of peft")
    if found in ("coo", "delta"):
        _refuse({"--kind": options["kind"]}, "has no effect: such a source gives a vector")
    checkpoint = open_checkpoint(_needed(base, "a task vector"), with_code=trust)
    read = [file for each in sources for file in (files_of(each) if each.is_dir() else [each])]
    check_file(output, force=force, inputs=(*checkpoint.inputs, *read))
    with progress_bars() as progress:
        vector = _read(found, sources, checkpoint, options, progress, trust=trust, is_told=from_ is not None)
        vector.save(output, progress, force=force)
    threshold = vector.provenance.get("threshold")
    render.report_file(output, as_json, **({"threshold": threshold} if as_json and threshold is not None else {}))
    if threshold and not as_json:
        render.say(f"changes up to {threshold:g} are not in {source}")


def _read(
    found: str,
    sources: list[Path],
    base: "Checkpoint",
    options: dict[str, Any],
    progress: "Progress",
    *,
    trust: bool,
    is_told: bool,
) -> "TaskVector":
    """Open sources of a format as a vector."""
    from taskvec import interop
    from taskvec.errors import UsageError

    kind: Kind = cast("Kind", options["kind"] or "vector")
    sparsity = options["sparsity"]
    if found == "peft":
        weights = options["weights"]
        return interop.from_peft(
            sources, base, sparsity, weights=weights, kind=kind, trust_remote_code=trust, progress=progress
        )
    if len(sources) > 1:
        raise UsageError("several sources must all be adapters of peft: convert the others one by one and merge them")
    if found == "wsp":
        return interop.from_wsp(sources[0], base, sparsity, kind=kind, progress=progress)
    if found == "coo":
        return interop.from_coo(sources[0], base, sparsity, are_deltas=is_told, progress=progress)
    return interop.from_delta(sources[0], base, sparsity, progress=progress)


def _format_of(source: Path, told: str | None) -> str:
    """Return the format of a source: peft, wsp, coo or delta."""
    from taskvec.errors import UsageError
    from taskvec.interop.coo import is_coo
    from taskvec.interop.names import WEIGHTS

    if told is not None:
        if told not in SOURCES:
            raise UsageError(f"--from must be {' or '.join(SOURCES)}, found {told!r}; other formats are recognised")
        return told
    if source.suffix == ".lota":
        raise UsageError(f"{source} is a .lota file: --to names what to convert it to ({', '.join(TARGETS)})")
    if not source.exists():
        raise UsageError(f"{source}: no such file or folder")
    if source.suffix == ".wsp":
        return "wsp"
    if source.is_dir():
        if all(file.name == WEIGHTS for file in source.glob("*.safetensors")):
            return "peft"
        raise UsageError(
            f"{source} is a model folder: --from delta converts deltas, and taskvec pack stores a fine-tune"
        )
    if source.suffix == ".safetensors" and source.is_file():
        if is_coo(source):
            return "coo"
        raise UsageError(f"{source} does not say what it contains: --from must be coo or delta, if it contains deltas")
    raise UsageError(f"{source} is no adapter of peft, .wsp file or .safetensors file")


def _from_lota(
    source: Path, base: str | None, output: Path, to: str, rank: int | None, size: int | None, *, force: bool
) -> tuple[dict[str, Any], list[str]]:
    """Convert a .lota file, and return the report as facts and as lines."""
    from dataclasses import asdict

    from taskvec import interop

    with progress_bars() as progress:
        if to == "coo":
            coo = interop.to_coo(source, output, force=force, progress=progress)
            facts, lines = asdict(coo), [f"coordinates of {coo.entries:,} entries in {coo.tensors:,} tensors"]
        elif to == "delta":
            model = _needed(base, "--to delta")
            delta = interop.to_delta(source, model, output, shard_size=size, force=force, progress=progress)
            facts, lines = asdict(delta), [f"a checkpoint of deltas; {delta.entries:,} are entries, the others are 0"]
        elif to == "lora":
            model, most = _needed(base, "--to lora"), {} if rank is None else {"rank": rank}
            lora = interop.to_lora(source, model, output, **most, force=force, progress=progress)
            facts, lines = asdict(lora), _lora_lines(lora)
        else:
            shira = interop.to_shira(source, _needed(base, "--to shira"), output, force=force, progress=progress)
            facts, lines = asdict(shira), [f"a SHiRA adapter, r = {shira.r}, of {shira.entries:,} entries"]
            if shira.padding:
                more = "further entries are zero: every layer has r · (inputs + outputs) of them"
                lines.append(f"{shira.padding:,} {more}")
    del facts["path"]
    if facts["dropped"] and to != "lora":
        why = "the output has only deltas, and base + delta does not give them"
        lines.append(f"{facts['dropped']:,} weights are not exactly those of {source}: {why}")
    return facts, [f"{output}: {lines[0]}", *lines[1:]]


def _lora_lines(lora: "Lora") -> list[str]:
    from . import render

    error = render.relative(lora.error)
    lines = [f"a LoRA adapter of {len(lora.layers):,} layers, r = {lora.rank}, relative error {error}"]
    if lora.saved:
        shown = ", ".join(lora.saved[:3]) + (", …" if len(lora.saved) > 3 else "")
        lines.append(f"stored with their tuned values: {len(lora.saved):,} tensors ({shown})")
    if lora.dropped:
        lines.append(f"{lora.dropped:,} changes are left out, as they are no deltas: NaN, infinite, or a sign of zero")
    return lines
