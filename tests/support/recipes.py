"""Merge files as vectors and as model folders, without the command line."""

from __future__ import annotations

from pathlib import Path

from taskvec import TaskVector
from taskvec.applying.output import AS_IT_IS, Output
from taskvec.recipes import Recipe, RecipeMerge
from taskvec.recipes.recipe import naming
from taskvec.recipes.references import Models
from taskvec.recipes.relative import relative_to
from taskvec.recipes.result import result_of
from taskvec_formats import ModelFolder


def merged(path: Path) -> TaskVector:
    """Return the result of a merge file as a vector relative to its base."""
    recipe = Recipe.read(path)
    start = recipe.open_start()
    with naming(path):
        found = result_of(recipe, Models(start, recipe.start), start)
    if found.vector is not None:
        return found.vector
    assert start is not None
    return relative_to(start, found)


def merged_folder(path: Path, out: Path, output: Output = AS_IT_IS) -> ModelFolder:
    """Write the result of a merge file as a model folder."""
    recipe = Recipe.read(path)
    RecipeMerge(recipe, recipe.open_start()).write_folder(out, output)
    return ModelFolder(out)
