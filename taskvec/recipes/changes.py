"""What a merge file changes besides the weights: layers, tokens, chat template, and the files that describe them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from taskvec_formats import Checkpoint

from ..applying.side_files import CONFIG
from ..merging.tokenizers import TOKENIZER_FILES
from ..vectors.layers import counted
from .configuration import Layers, layer_notes, template_files, template_of, token_notes, with_layers, with_tokens
from .json_files import as_json, json_object
from .owner import Owner
from .recipe import Recipe
from .references import Models
from .sections import is_in
from .vocabulary import Vocabulary


class Changes:
    """The changes of a merge file to the side files of a model.

    Args:
        recipe: The merge file.
        models: Its models.
        start: The model whose side files are written otherwise.

    Attributes:
        vocabulary: The tokens of the result, if its embeddings have other rows than those of a model.
        files: The files that are written instead of those of `start`, by name.
        removed: Names of files of `start` that are not written: those of a tokenizer that is replaced.
        notes: Sentences about files that do not fit each other.

    Raises:
        UsageError, TokenizerError: The configuration, a tokenizer or a template cannot be changed as the file says.
    """

    def __init__(self, recipe: Recipe, models: Models, start: Checkpoint) -> None:
        self._recipe, self._models, self._start = recipe, models, start
        self.vocabulary: Vocabulary | None = None
        self.files: dict[str, bytes] = {}
        self.removed: frozenset[str] = frozenset()
        self.notes: list[str] = []
        if recipe.has_slices:
            self._set_layers()
        if recipe.tokenizer is not None:
            self._set_tokens()
        if recipe.chat_template is not None:
            self._set_template(recipe.chat_template)

    def _owner(self, reference: str) -> Owner:
        opened = self._models[reference]
        files = {file.name: file.read_bytes() for file in opened.checkpoint.side_files}
        listed = None if opened.vector is None else opened.vector.source.files()
        if listed is not None:
            files = {file.name: files.get(file.name, b"") if file.content is None else file.content for file in listed}
        return Owner(reference, opened.checkpoint, files)

    @cached_property
    def _owners(self) -> dict[str, Owner]:
        recipe = self._recipe
        named = [recipe.start, recipe.base, *(each.model for each in recipe.sources)]
        named += [each.base for module in recipe.modules for each in module.slices]
        if recipe.tokenizer is not None and recipe.tokenizer.source not in ("base", "union"):
            named.append(recipe.tokenizer.source)
        return {reference: self._owner(reference) for reference in dict.fromkeys(filter(None, named))}

    def _config(self) -> dict[str, object]:
        content = self.files.get(CONFIG)
        if content is None:
            path = next((file for file in self._start.side_files if file.name == CONFIG), None)
            content = None if path is None else path.read_bytes()
        return json_object(content, f"{self._start.name}: {CONFIG}")

    def _set_layers(self) -> None:
        for module in self._recipe.modules:
            if not module.slices:
                continue
            before = counted(name for name in self._start.tensors if is_in(module.name, name))
            stack = next(iter(before), "")
            first = [each.sources[0] for each in module.slices]
            taken = [
                (json_object(self._owner(source.model).files.get(CONFIG), f"{source.model}: {CONFIG}"), *source.layers)
                for source in first
                if source.layers is not None
            ]
            others = counted(self._start.tensors).keys() - {stack}
            layers = Layers(stack, before.get(stack, 0), taken, others)
            if layers.count != layers.before or len(taken) > 1 or taken[0][1] != 0:
                self.notes += layer_notes(self._config(), layers)
                self.files[CONFIG] = as_json(with_layers(self._config(), layers))

    def _set_tokens(self) -> None:
        recipe, owners = self._recipe, self._owners
        assert recipe.tokenizer is not None
        assert recipe.start is not None
        owners = {reference: self._with_tokenizer(owner, owners[recipe.start]) for reference, owner in owners.items()}
        found = Vocabulary(recipe.tokenizer, owners, recipe.start)
        if not found.keeps_rows:
            self.vocabulary = found
        own = owners[recipe.start]
        self.files |= {name: content for name, content in found.files.items() if own.files.get(name) != content}
        if found.size != own.size:
            self.files[CONFIG] = as_json(with_tokens(self._config(), own.size, found.size))
        if found.source is not own:
            self.notes += token_notes(self._config(), found.source, found.source.files)
            self.removed = frozenset(name for name in TOKENIZER_FILES if name not in found.files)

    def _with_tokenizer(self, owner: Owner, start: Owner) -> Owner:
        """The model; with the tokens of `start` if it has no tokenizer and is not to give that of the result."""
        assert self._recipe.tokenizer is not None
        if owner.reference in (start.reference, self._recipe.tokenizer.source):
            return owner
        if not owner.files.keys().isdisjoint(TOKENIZER_FILES) or start.files.keys().isdisjoint(TOKENIZER_FILES):
            return owner
        self.notes.append(f"{owner.reference} has no tokenizer: it is assumed to have that of {start.reference}")
        files = {name: content for name, content in start.files.items() if name in TOKENIZER_FILES}
        return replace(owner, files={**owner.files, **files})

    def _set_template(self, wanted: str) -> None:
        owners = self._owners
        text = template_of(wanted, list(owners.values()))
        if text is None:
            self.notes.append("chat_template: none of the models has a template, so none is written")
            return
        assert self._recipe.start is not None
        files = {**owners[self._recipe.start].files, **self.files}
        self.files |= template_files(text, files)
