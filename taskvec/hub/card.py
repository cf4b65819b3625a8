"""Model cards of task vectors: a section of README.md for each `.lota` file, and the metadata of the Hub at the top.

A section is enclosed in comments, so that the text around it is kept when the file is uploaded again. The first comment
contains the metadata that belong to the file. Metadata: https://huggingface.co/docs/hub/model-cards#model-card-metadata.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from taskvec_formats import Header
from taskvec_formats.text import json_text, markdown

from ..arguments import shown
from .base import recorded
from .reference import REPO_ID, Reference

Metadata = dict[str, Any]

_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
# the last comment is a line of its own, unlike one in the name of a file
_SECTION = re.compile(r"<!-- taskvec (\{[^\n]*\}) -->\r?\n.*?^<!-- /taskvec -->(?=\s*?$)", re.DOTALL | re.MULTILINE)
_END = "<!-- /taskvec -->"
_DATASET = re.compile(rf"{REPO_ID.pattern}|\w[\w.-]*", re.ASCII)  # the oldest ones have no user
# provenance of training -> row of the table
_TRAINING = {
    "method": "method",
    "data": "data",
    "examples": "examples",
    "steps": "steps",
    "lr": "learning rate",
    "sparsity": "sparsity",
    "mask_from": "mask from",
    "disjoint_from": "disjoint from",
    "start_from": "started from",
    "final_loss": "training loss at the end",
}
_OPTIONS = {"batch_size": "batch size", "optimizer": "optimizer", "schedule": "schedule", "seed": "seed"}


def base_model(header: Header) -> str | None:
    """Return the repository of the base, as recorded or as its name says; None if it is not from the Hub."""
    if (commit := recorded(header.provenance)) is not None:
        return commit.repo
    return header.base.name if REPO_ID.fullmatch(header.base.name) else None


def metadata_of(header: Header, license_of_base: Mapping[str, Any]) -> Metadata:
    """Return the metadata of a file.

    Args:
        header: The header of the file.
        license_of_base: The metadata of the base that name its license.
    """
    made = header.provenance
    merged = made.get("made_by") == "merge"
    tags = ["taskvec", "task-vector", *(["merge"] if merged else [])]
    if made.get("method") == "lota" and not merged:
        tags.append("lottery-ticket-adaptation")
    found: Metadata = {"library_name": "taskvec"}
    if (base := base_model(header)) is not None:
        found |= {"base_model": base, "base_model_relation": "merge" if merged else "adapter"}
    found["tags"] = tags
    if datasets := _datasets(made):
        found["datasets"] = datasets
    return found | dict(license_of_base)


def _datasets(provenance: Mapping[str, Any]) -> list[str]:
    """Return the data sets of the Hub that a vector, or the vectors that it is made of, were trained on."""
    ancestors = provenance.get("ancestors")
    facts = [provenance, *(ancestors.values() if isinstance(ancestors, dict) else ())]
    runs = [each.get("run") for each in facts if isinstance(each, dict)]
    tables = [table for run in runs if isinstance(run, dict) for table in _list(run.get("data"))]
    # only data of the Hub have a split
    used = [each for each in tables if isinstance(each, dict) and "split" in each and each.get("use") != "eval_data"]
    names = (table.get("name") for table in used)
    return sorted({name for name in names if isinstance(name, str) and _DATASET.fullmatch(name)})


def _list(value: object) -> list[Any]:
    """Return a value of a provenance, which may be of any type, as a list."""
    return value if isinstance(value, list) else []


def section(reference: Reference, header: Header, size: int, sha256: str) -> str:
    """Return the section of a file, in Markdown: its figures, how it was made, and how it is used.

    Args:
        reference: The file on the Hub.
        header: The header of the file.
        size: The size of the file in bytes.
        sha256: The SHA-256 of the file, in hex.
    """
    made, base = header.provenance, header.base
    commit = recorded(made)
    origin = f", revision `{commit.revision[:12]}`" if commit else ""
    name = commit.repo if commit else base.name
    kind = "patch" if header.kind == "patch" else "task vector"
    lines = [
        f"## {markdown(reference.file)}",
        "",
        f"A {kind} of {markdown(name)}{origin} (fingerprint `{base.fingerprint[:12]}`), by taskvec.",
        "",
        *_table(("figure", "value"), [*_figures(header, size), ("SHA-256 of the file", sha256)]),
    ]
    if made.get("made_by") == "train":
        lines += ["", "Training:", "", *_table(("setting", "value"), _training(made))]
    if evaluated := [(key.removeprefix("eval_"), made[key]) for key in sorted(made) if key.startswith("eval_")]:
        rows = [(key.replace("_", " "), value) for key, value in evaluated if value is not None]
        lines += ["", "Evaluation on the held-out data of the training:", "", *_table(("metric", "value"), rows)]
    if made.get("made_by") == "merge":
        lines += ["", f"Merge method: {markdown(made.get('method'))}.", "", *merge_tables(made)]
    return "\n".join([*lines, "", *_use(reference, header)])


def _figures(header: Header, size: int) -> list[tuple[str, object]]:
    tensors = header.tensors
    entries = sum(spec.replaced if header.kind == "patch" else spec.entries for spec in tensors)
    eligible = sum(spec.size for spec in tensors if spec.eligible)
    rows: list[tuple[str, object]] = [("changed weights", f"{entries:,}"), ("eligible weights", f"{eligible:,}")]
    if eligible:
        rows += [("density", f"{entries / eligible:.2%}"), ("sparsity", f"{1 - entries / eligible:.2%}")]
    rows += [("tensors", f"{len(tensors):,}"), ("size of the file", f"{size:,} bytes")]
    return [*rows, ("bits per changed weight", f"{8 * size / entries:.1f}")] if entries else rows


def _training(made: Mapping[str, Any]) -> list[tuple[str, object]]:
    run = made.get("run")
    options = run.get("options") if isinstance(run, dict) else None
    rows = [(row, made.get(key)) for key, row in _TRAINING.items()]
    rows += [(row, options.get(key)) for key, row in _OPTIONS.items()] if isinstance(options, dict) else []
    return [(row, value) for row, value in rows if value not in (None, [])]


def merge_tables(made: Mapping[str, Any]) -> list[str]:
    """Return the tables of a merge, in Markdown: the vectors with their weights, and the parameters.

    Args:
        made: The provenance of the merge.
    """
    parents = [parent for parent in _list(made.get("parents")) if isinstance(parent, dict)]
    weights = [*_list(made.get("weights")), *[None] * len(parents)]
    options = {**(options if isinstance(options := made.get("options"), dict) else {}), "lambda": made.get("lambda")}
    return [
        "| vector | weight | digest |",
        "|---|---|---|",
        *(
            f"| {markdown(parent.get('name'))} | {_short(weight)} | `{markdown(parent.get('digest'))}` |"
            for parent, weight in zip(parents, weights, strict=False)
        ),
        "",
        *_table(("parameter", "value"), [(key.replace("_", "-"), value) for key, value in sorted(options.items())]),
    ]


def _table(head: tuple[str, str], rows: Iterable[tuple[str, object]]) -> list[str]:
    return [
        f"| {head[0]} | {head[1]} |",
        "|---|---|",
        *(f"| {markdown(key)} | {_short(value)} |" for key, value in rows),
    ]


def _short(value: object) -> str:
    if isinstance(value, float) and value != round(value, 6):
        return f"{value:.4g}"
    return markdown(value if isinstance(value, str) else json_text(value, indent=None))


def _use(reference: Reference, header: Header) -> list[str]:
    """Return how the file is applied, on the command line and in Python."""
    given = shlex.quote(str(reference))
    base = None if recorded(header.provenance) else base_model(header) or "base"
    arguments = [repr(reference.repo), repr(reference.file)]
    if reference.revision is not None:
        arguments.append(f"revision={reference.revision!r}")
    where = [] if base != "base" else [f"`base` is a folder with the base, {markdown(header.base.name)}.", ""]
    return [
        "Apply it to its base, on the command line or in Python:",
        "",
        *where,
        "```bash",
        f"taskvec unpack {given}{'' if base is None else f' --base {shlex.quote(base)}'} -o model/",
        "```",
        "",
        "```python",
        "import taskvec",
        "",
        f"vector = taskvec.TaskVector.from_pretrained({', '.join(arguments)})",
        f"taskvec.apply(vector, {base!r}, 'tuned')",
        "```",
    ]


def front_matter(metadata: Metadata) -> str:
    """Return metadata as the first lines of a README.md."""
    import yaml

    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"


def read_metadata(text: str) -> Metadata | None:
    """Return the metadata at the top of a README.md; empty if there are none, None if they are not valid."""
    import yaml

    found = _FRONT.match(text)
    try:
        document = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if document is None:
        return {}
    return document if isinstance(document, dict) else None


def updated(text: str | None, title: str, file: str, metadata: Metadata, body: str) -> tuple[str, list[str]]:
    """Return a README.md with the section of a file.

    The text of a user is kept. Metadata that were written by a user are completed, never changed.

    Args:
        text: The README.md that exists, or None.
        title: The heading of a new one.
        file: The file.
        metadata: Its metadata.
        body: Its section.

    Returns:
        The text, and notes on metadata of the user that differ.
    """
    marker = json.dumps({"file": file, "metadata": metadata}).replace("<", "\\u003c").replace(">", "\\u003e")
    block = f"<!-- taskvec {marker} -->\n{body}\n{_END}"
    if text is None:
        return f"{front_matter(metadata)}\n# {markdown(title)}\n\n{block}\n", []
    sections = {found: facts for found in _SECTION.finditer(text) if (facts := _facts(found[1]))}
    own = next((found for found, facts in sections.items() if facts["file"] == file), None)
    before = [facts["metadata"] for facts in sections.values()]
    after = [facts["metadata"] for found, facts in sections.items() if found is not own] + [metadata]
    if own is not None:
        after = [metadata if found is own else facts["metadata"] for found, facts in sections.items()]
        text = text[: own.start()] + block + text[own.end() :]
    else:
        text = f"{text.rstrip()}\n\n{block}\n" if text.strip() else f"# {markdown(title)}\n\n{block}\n"
    return _with_metadata(text, common(before), common(after))


def _facts(text: str) -> dict[str, Any] | None:
    """Return the content of the comment at the beginning of a section; None if it was not written by `updated`."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(document, dict) and isinstance(document.get("file"), str)
    return document if valid and isinstance(document.get("metadata"), dict) else None


def common(parts: Sequence[Metadata]) -> Metadata:
    """Return the metadata of several files together: lists are joined, and other values are kept if they are equal.

    Args:
        parts: The metadata of each file.
    """
    found: Metadata = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [part[key] for part in parts if key in part]
        flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
        distinct = list({json.dumps(each): each for each in flat}.values())
        if len(distinct) == 1 and not isinstance(values[0], list):
            found[key] = distinct[0]
        elif key == "base_model" or any(isinstance(value, list) for value in values):
            found[key] = distinct
    return found


def _with_metadata(text: str, before: Metadata, after: Metadata) -> tuple[str, list[str]]:
    """Replace the metadata that taskvec wrote; complete others."""
    front = _FRONT.match(text)
    if front is None:
        return f"{front_matter(after)}\n{text}", []
    if front[0].strip() == front_matter(before).strip():
        return front_matter(after) + text[front.end() :], []
    found = read_metadata(text)
    if found is None:
        return text, ["README.md has metadata that are not a YAML mapping: they are left as they are"]
    missing = {key: value for key, value in after.items() if key not in found}
    notes = [
        f"README.md keeps its `{key}`, {shown(found[key])}; for taskvec it is {shown(after[key])}"
        for key in ("base_model", "base_model_relation", "library_name", "license")
        if key in after and key in found and found[key] != after[key]
    ]
    if not missing:
        return text, notes
    added = front_matter(missing).removeprefix("---\n").removesuffix("---\n")
    end = front.end(1)
    page = text[:end] + added + text[end:]
    whole = read_metadata(page)
    if whole and whole.keys() == found.keys() | missing.keys() and all(whole[key] == missing[key] for key in missing):
        return page, notes
    keys = ", ".join(f"`{key}`" for key in missing)
    return text, [*notes, f"README.md has metadata that no lines can be added to, which lack {keys}"]
