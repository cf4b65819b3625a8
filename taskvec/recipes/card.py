"""The model card of a merge that a merge file describes."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from taskvec_formats.text import markdown

from ..merging.card import is_hub_id
from ..merging.registry import METHODS
from .methods import WholeMethod
from .recipe import Recipe


def recipe_card(name: str, recipe: Recipe, models: Sequence[str]) -> str:
    """The model card of a merge. The same merge gives the same text.

    Args:
        name: The name of the model.
        recipe: The merge file.
        models: The names of the models that are merged.

    Returns:
        Markdown that names the method and the models, and contains the merge file, with the metadata of the Hub at the
        top.
    """
    method = recipe.method if isinstance(recipe.method, WholeMethod) else METHODS.get(recipe.method)
    known = [
        each for each in dict.fromkeys([recipe.base or "", *(each.model for each in recipe.sources)]) if is_hub_id(each)
    ]
    metadata = {
        **({"base_model": known} if known else {}),
        "library_name": "transformers",
        "tags": ["merge", "taskvec"],
    }
    fence = "`" * max(3, 1 + max(map(len, recipe.text.split("\n")), default=0) * ("```" in recipe.text))
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        f"# {markdown(name)}",
        "",
        "A merge of language models, by taskvec.",
        "",
        f"Method: [{recipe.named}]({method.source}), {method.summary}."
        if method and method.source
        else f"Method: {recipe.named}.",
        "",
        *(f"- {markdown(each)}" for each in models),
        "",
        f"{fence}yaml",
        recipe.text.rstrip("\n"),
        fence,
        "",
    ]
    return "\n".join(lines)
