"""The commands `taskvec push` and `taskvec pull`: `.lota` files to and from the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from .inputs import PATH
from .outputs import FILE
from .progress import progress_bars

Force = Annotated[bool, typer.Option("--force", metavar="", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print the report as JSON.")]


def push(
    vector: Annotated[Path, typer.Argument(metavar="VECTOR", help="The .lota file.", **PATH)],
    repo: Annotated[
        str,
        typer.Argument(
            metavar="REPO", help="The repository, user/repo; created if it does not exist.", show_default=False
        ),
    ],
    path_in_repo: Annotated[
        str | None,
        typer.Option(help="Path of the file in the repository.", show_default="the name of VECTOR"),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch to commit to; created if it does not exist.", show_default="main"),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", metavar="", help="Make the repository private if it is created.")
    ] = False,
    message: Annotated[
        str | None, typer.Option(help="Message of the commit.", show_default="Upload FILE with taskvec")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", metavar="", help="Open a pull request instead of committing to the branch.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Verify a .lota file and upload it to the Hugging Face Hub, with a model card.

    The access token is taken from HF_TOKEN or from hf auth login.
    The text of an existing model card is kept.

    Example: taskvec push sql.lota user/sql-vector
    """
    from taskvec import TaskVector
    from taskvec.errors import UsageError
    from taskvec.hub.push import destination
    from taskvec.hub.reference import parse, written

    from . import render

    if vector.is_dir():
        raise UsageError(f"{vector} is a folder, and push uploads .lota files: use hf upload {written(repo)} {vector}")
    if not vector.exists() and parse(str(vector)) is not None:
        raise UsageError(f"{written(vector)}: no such file; push uploads files of this machine")
    to = destination(repo, path_in_repo, revision, name=vector.name)
    with progress_bars() as progress:
        done = TaskVector.open(vector).push_to_hub(
            to.repo,
            to.file,
            revision=to.revision,
            private=private or None,
            message=message,
            create_pr=create_pr,
            progress=progress,
        )
    if as_json:
        render.print_json(render.push_summary(vector, done))
        return
    place = f"{done.repo}/{done.file}" + ("" if done.revision == "main" else f"@{done.revision}")
    render.say(f"{place}: {'uploaded' if done.changed else 'the repository contains this file already'}")
    render.say(f"commit: {done.commit}")
    render.say(f"url: {done.url}")
    for note in done.notes:
        render.say(f"note: {note}")


def pull(
    vector: Annotated[
        str,
        typer.Argument(
            metavar="VECTOR",
            help="user/repo/file.lota, or user/repo for its only .lota file, with or without @revision.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The .lota file to write.", show_default="the name of the file on the Hub", **FILE
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Download a .lota file from the Hugging Face Hub and check all of it.

    Other commands take VECTOR directly, in place of a .lota file.

    Example: taskvec pull user/sql-vector -o sql.lota
    """
    from taskvec.hub.pull import located, pull_file

    from . import render

    reference, path = located(vector, output, force=force)
    with progress_bars() as progress:
        commit = pull_file(reference, path, progress, force=force)
    place = f"{reference.repo}/{reference.file}"
    facts = {"repo": reference.repo, "file": reference.file, "commit": commit}
    if as_json:
        render.report_file(path, as_json, **facts)
        return
    render.report_file(path, as_json)
    render.say(f"from: {place}@{commit}")
