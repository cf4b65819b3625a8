"""The result of a merge file, written as a model folder or as a `.lota` file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from taskvec_formats import Checkpoint, Header, Identity, SideFile

from ..applying.apply import apply
from ..applying.output import Output
from ..applying.verified import Application
from ..errors import UsageError
from ..merging.model_folder import write_model
from ..merging.tokenizers import Agreement, Files, check_tokenizers, compare_tokenizers
from ..reporting.progress import Progress, silent
from ..vectors import carried
from ..vectors.diff import Pair
from ..vectors.source import Memory
from ..vectors.vector import TaskVector
from .card import recipe_card
from .configuration import TEMPLATE, TOKENIZER_CONFIG
from .methods.table import WholeMethod
from .recipe import Recipe, naming
from .references import Models
from .relative import relative_to
from .result import Result, result_of


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        provenance: The method, its options, the models and notes.
        notes: Further sentences: on files in which the models differ, and on parts that are not written.
    """

    provenance: dict[str, Any]
    notes: Sequence[str]


def _side_file(name: str, content: bytes) -> SideFile:
    return SideFile(name, hashlib.sha256(content).hexdigest(), content)


@dataclass(frozen=True)
class _Parent:
    name: str
    source: Files


class RecipeMerge:
    """The merge that a file describes.

    Args:
        recipe: The merge file.
        start: The result of `open_start`.
        progress: Called while models are compared and written.
    """

    def __init__(self, recipe: Recipe, start: Checkpoint | None, progress: Progress = silent) -> None:
        self._recipe = recipe
        self._start = start
        self._progress = progress
        self._models = Models(start, recipe.start, progress, is_base=recipe.base is not None)

    def write_folder(
        self, out: Path, output: Output, *, force: bool = False, work: Path | None = None, resume: bool = True
    ) -> Written:
        """Write a model folder.

        Args:
            out: The folder, which appears when it is complete.
            output: The size of shards, and the dtype if it is not that of the file.
            force: Whether to replace an existing folder.
            work: The folder of finished shards, as in `apply`.
            resume: Whether to continue in `work`.

        Raises:
            UsageError: The file names no base model, or its settings are inconsistent.
            MergeError: The models do not have the same tensors or tokens.
            The errors of `apply` are raised too.
        """
        recipe, start = self._recipe, self._start
        with naming(recipe.path):
            if start is None:
                raise UsageError("it names no base_model, so only a .lota file can be written: -o merged.lota")
            output = replace(output, dtype=output.dtype or recipe.dtype)
            result = result_of(recipe, self._models, start, self._progress, dtype=output.dtype, within=recipe.within)
            carried_over = [_side_file(name, content) for name, content in sorted(result.files.items())]
            output = replace(output, carried=(*output.carried, *carried_over))
            if result.vector is not None:
                parents = self._parents(start)
                notes = write_model(
                    result.vector, parents, start, out, self._progress,
                    output=output, force=force, work=work, resume=resume,
                )  # fmt: skip
                return Written(result.provenance, notes)
            return self._write_model(result, start, out, output, force=force, work=work, resume=resume)

    def _write_model(
        self,
        result: Result,
        start: Checkpoint,
        out: Path,
        output: Output,
        *,
        force: bool,
        work: Path | None,
        resume: bool,
    ) -> Written:
        model = result.model
        assert model is not None
        is_chosen = self._recipe.tokenizer is not None  # the tokens were mapped, so tokenizers need not agree
        agreement = Agreement([], []) if is_chosen else compare_tokenizers(self._parents(start), start)
        models = [self._models[name].checkpoint for name in dict.fromkeys(each.model for each in self._recipe.sources)]
        card = recipe_card(out.name, self._recipe, models)
        output = replace(output, card=card, carried=(*agreement.carried, *output.carried))
        nothing = TaskVector(
            Header("vector", Identity(model.name, model.identity), None, tensors=()), [], Memory({}, {}), model.name
        )
        applied = apply(
            nothing, model, out, self._progress, output,
            force=force, work=work, record={"recipe": self._recipe.text}, resume=resume, max_bytes=1 << 62,
        )  # fmt: skip
        left_out = f"not carried from {start.name}: {', '.join(applied.left_out)}"
        return Written(result.provenance, [*agreement.notes, *([left_out] if applied.left_out else [])])

    def write_file(self, path: Path, codec: str = "auto", *, force: bool = False) -> Written:
        """Write a `.lota` file relative to the base model, or to the first model if there is none.

        Args:
            path: The file.
            codec: As in `TaskVector.save`.
            force: Whether to replace an existing file.

        Raises:
            UsageError: The result has other tensors than the base model, or its settings are inconsistent.
            MergeError: The models do not have the same tensors or tokens.
            The errors of `TaskVector.save` are raised too.
        """
        recipe, start = self._recipe, self._start
        with naming(recipe.path):
            result = result_of(recipe, self._models, start, self._progress)
            vector = result.vector
            if vector is None:
                assert start is not None
                vector = relative_to(start, result, self._progress)
            elif start is not None:
                Application(vector, start, self._progress)  # checks that the vectors fit the base of the recipe
            if names := sorted(result.files.keys() - {TEMPLATE, TOKENIZER_CONFIG}):
                raise UsageError(
                    f"the result has its own {', '.join(names)}: write a model folder instead of a .lota file"
                )
            notes = [*check_tokenizers(self._parents(start)), *self._notes_on_file()]
            vector.save(path, self._progress, codec, force=force)
        return Written(result.provenance, notes)

    def _notes_on_file(self) -> list[str]:
        recipe = self._recipe
        start = f"the file is relative to {recipe.start}, the first of the models"
        return [
            *(
                [f"dtype {recipe.dtype} has no effect on a .lota file: a model folder is written in it"]
                if recipe.dtype
                else []
            ),
            *(["chat_template has no effect on a .lota file"] if recipe.chat_template else []),
            *([start] if recipe.start and recipe.base is None else []),
        ]

    def _parents(self, start: Checkpoint | None) -> list[_Parent]:
        """The models that are merged, with their side files."""
        found = []
        for name in dict.fromkeys(each.model for each in self._recipe.sources):
            if start is None:
                vector = TaskVector.open(name)
                found.append(_Parent(vector.name, vector.source))
                continue
            opened = self._models[name]
            if opened.vector is not None:
                found.append(_Parent(opened.vector.name, opened.vector.source))
            elif opened.checkpoint is not start:
                files = carried.carried(opened.checkpoint).files
                found.append(_Parent(opened.checkpoint.name, Pair(start, opened.checkpoint, {}, "vector", files)))
            elif isinstance(self._recipe.method, WholeMethod):  # the base is one of the models
                found.append(_Parent(start.name, Memory({}, {})))
        return found
