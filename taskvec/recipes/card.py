"""The model card of a merge that a merge file describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taskvec_formats import Checkpoint
from taskvec_formats.text import markdown

from ..hub.card import front_matter
from ..merging.registry import METHODS
from .methods.table import WholeMethod
from .recipe import Recipe


def recipe_card(name: str, recipe: Recipe, models: Sequence[Checkpoint]) -> str:
    """The model card of a merge. The same merge gives the same text.

    Args:
        name: The name of the model.
        recipe: The merge file.
        models: The models that are merged.

    Returns:
        Markdown that names the method and the models, and contains the merge file, with the metadata of the Hub at the
        top.
    """
    method = recipe.method if isinstance(recipe.method, WholeMethod) else METHODS.get(recipe.method)
    known = list(dict.fromkeys(each.commit.repo for each in models if each.commit is not None))
    metadata: dict[str, Any] = {"base_model": known} if known else {}
    metadata |= {"library_name": "transformers", "tags": ["merge", "taskvec"]}
    fence = "`" * max(3, 1 + max(map(len, recipe.text.split("\n")), default=0) * ("```" in recipe.text))
    lines = [
        f"{front_matter(metadata)}# {markdown(name)}",
        "",
        "A merge of language models, by taskvec.",
        "",
        f"Method: [{recipe.named}]({method.source}), {method.summary}."
        if method and method.source
        else f"Method: {recipe.named}.",
        "",
        *(f"- {markdown(each.name)}" for each in models),
        "",
        f"{fence}yaml",
        recipe.text.rstrip("\n"),
        fence,
        "",
    ]
    return "\n".join(lines)
