"""The command `taskvec convert`: adapters of peft from and to task vectors."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from .inputs import MODEL, PATH
from .outputs import folder_name
from .progress import progress_bars

if TYPE_CHECKING:
    from taskvec_formats import Kind

FORMATS = ("shira",)


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="The folder of an adapter of peft, or a .lota file.", **PATH)
    ],
    base: Annotated[str, typer.Option("--base", help="The base: a model folder or a Hub id.", **MODEL)],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="The .lota file to write; with --to, the folder of the adapter.",
            metavar="PATH",
            parser=folder_name,
            show_default=False,
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(help="Convert a .lota file to this kind of adapter: shira.", show_default=False),
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
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", metavar="", help="Run Python code that the base contains.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print the report as JSON.")] = False,
) -> None:
    """Convert an adapter of peft to a task vector, or a task vector to an adapter.

    The vector of an adapter gives the weights of peft's merge_and_unload, to the last bit.

    Example: taskvec convert adapter/ --base base/ -o adapter.lota
    """
    from taskvec.errors import UsageError

    from . import render

    if to is None:
        from taskvec import interop
        from taskvec.destination import check_file
        from taskvec.hub import open_model
        from taskvec.interop.names import check_peft, files_of

        if source.suffix == ".lota":
            raise UsageError(f"{source} is a .lota file: --to names what to convert it to ({', '.join(FORMATS)})")
        check_peft()
        checkpoint = open_model(base, with_code=trust_remote_code)
        check_file(output, force=force, inputs=(*checkpoint.inputs, *files_of(source)))
        with progress_bars() as progress:
            vector = interop.from_peft(
                source,
                checkpoint,
                sparsity,
                kind=cast("Kind", kind or "vector"),
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
            vector.save(output, progress, force=force)
        render.report_file(output, as_json)
        return
    if to not in FORMATS:
        raise UsageError(f"--to must be {' or '.join(FORMATS)}, found {to!r}")
    unused = {"--sparsity": sparsity is not None, "--kind": kind is not None, "--trust-remote-code": trust_remote_code}
    for option in (name for name, given in unused.items() if given):
        raise UsageError(f"{option} has no effect with --to")
    from taskvec import interop

    with progress_bars() as progress:
        written = interop.to_shira(source, base, output, force=force, progress=progress)
    facts = {"r": written.r, "entries": written.entries, "padding": written.padding, "dropped": written.dropped}
    if as_json:
        render.print_json({"path": str(output), "format": to, **facts})
        return
    render.say(f"{output}: a SHiRA adapter, r = {written.r}, of {written.entries:,} entries")
    if written.padding:
        render.say(f"{written.padding:,} further entries are zero: every layer has r · (inputs + outputs) of them")
    if written.dropped:
        render.say(
            f"{written.dropped:,} weights are not exactly those of {source}: an adapter holds deltas, and base + delta "
            "rounds to another value"
        )
