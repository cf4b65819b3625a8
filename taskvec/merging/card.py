"""The model card of a merge: a README.md with the metadata of the Hugging Face Hub."""

from __future__ import annotations

from typing import Any

from taskvec_formats.text import markdown

from ..hub.card import base_model, front_matter, merge_tables
from ..vectors.vector import TaskVector
from .registry import METHODS


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
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "taskvec"]}
    if (base := base_model(merged.header)) is not None:
        metadata = {"base_model": base, **metadata}
    lines = [
        f"{front_matter(metadata)}# {markdown(name)}",
        "",
        f"A merge of task vectors of {markdown(merged.base.name)} (fingerprint `{merged.base.fingerprint[:12]}`), by "
        "taskvec.",
        "",
        f"Method: [{method.name}]({method.source}), {method.summary}." if method.source else f"Method: {method.name}.",
        "",
        *merge_tables(made),
        "",
    ]
    return "\n".join(lines)
