"""The model card of a merge: a README.md with the metadata of the Hugging Face Hub."""

from __future__ import annotations

import re
from typing import Any

import yaml

from taskvec_formats.text import json_text, markdown

from ..vectors.vector import TaskVector
from .registry import METHODS

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of the id of a repository of the Hub."""
    return _HUB_ID.fullmatch(name) is not None


def model_card(name: str, merged: TaskVector) -> str:
    """The model card of a merge. The same merge gives the same text.

    Metadata: https://huggingface.co/docs/hub/model-cards#model-card-metadata.

    Args:
        name: The name of the model.
        merged: The result of `merge`.

    Returns:
        Markdown that names the base, the parents, the method and the parameters, with the metadata of the Hub at the
        top.
    """
    made = merged.provenance
    method = METHODS[made["method"]]
    metadata = {"library_name": "transformers", "tags": ["merge", "taskvec"]}
    if is_hub_id(merged.base.name):
        metadata = {"base_model": merged.base.name, **metadata}
    parents = [
        f"| {markdown(parent['name'])} | {_short(weight)} | `{parent['digest']}` |"
        for parent, weight in zip(made["parents"], made["weights"], strict=True)
    ]
    options = {**made["options"], "lambda": made["lambda"]}
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        f"# {markdown(name)}",
        "",
        f"A merge of task vectors of {markdown(merged.base.name)} (fingerprint `{merged.base.fingerprint[:12]}`), by "
        "taskvec.",
        "",
        f"Method: [{method.name}]({method.source}), {method.summary}." if method.source else f"Method: {method.name}.",
        "",
        "| vector | weight | digest |",
        "|---|---|---|",
        *parents,
        "",
        "| parameter | value |",
        "|---|---|",
        *(f"| {markdown(key.replace('_', '-'))} | {_short(value)} |" for key, value in sorted(options.items())),
        "",
    ]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return markdown(value if isinstance(value, str) else json_text(value, indent=None))
