"""The configuration and the chat template of a result that has other layers, tokens or templates than its base."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskvec_formats.text import printable

from ..arguments import shown
from ..errors import TokenizerError, UsageError
from .json_files import as_json, json_object
from .owner import Owner
from .templates import TEMPLATES

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
# names of the number of layers in the configurations of transformers
_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "num_block_layers",
    "depth",
)
# names of keys that refer to layers by their numbers, or by a pattern over them
_NUMBERED = (
    "first_k_dense_replace",
    "mlp_only_layers",
    "decoder_sparse_step",
    "moe_layer_freq",
    "attn_layer_period",
    "attn_layer_offset",
    "expert_layer_period",
    "expert_layer_offset",
    "cross_attention_layers",
    "fullatt_block_indexes",
    "deepstack_visual_indexes",
    "global_attn_every_n_layers",
    "num_kv_shared_layers",
)
# such keys that have no effect beside `layer_types`
_PATTERNS = ("sliding_window_pattern", "full_attention_interval")


@dataclass(frozen=True)
class Layers:
    """The layers of one stack of the result.

    Attributes:
        stack: The stack, such as "model.layers".
        before: The number of its layers in the model that the result resembles.
        taken: (configuration of the model, first layer, end) of each slice.
        others: The other stacks of that model.
    """

    stack: str
    before: int
    taken: Sequence[tuple[Mapping[str, Any], int, int]]
    others: Collection[str] = ()

    @property
    def count(self) -> int:
        """The number of layers of the result."""
        return sum(end - first for _, first, end in self.taken)


def with_layers(config: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """Return a configuration with another number of layers.

    Lists with one item per layer, such as `layer_types`, are put together from those of the models.

    Args:
        config: The configuration of the model that the result resembles. It is not changed.
        layers: The layers.

    Raises:
        UsageError: It is uncertain which key is the number of layers, or a model lacks a list that another one has.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config))
    *above, key = _count_in(changed, layers)
    owner = _at(changed, above)
    parts = layers.stack.split(".")
    if key == "num_layers" and "num_decoder_layers" not in owner and {"encoder", "decoder"} & {*parts}:
        # T5: the number of layers of the decoder is that of the encoder unless it is given
        owner["num_decoder_layers"] = layers.before
        key = "num_decoder_layers" if "decoder" in parts else key
    owner[key] = layers.count
    for name, value in list(owner.items()):
        if isinstance(value, list) and len(value) == layers.before and layers.before > 1:
            parts_of = []
            for other, first, end in layers.taken:
                own = _at(other, above).get(name)
                if not isinstance(own, list) or len(own) < end:
                    raise UsageError(f"config.json has one {name} for each layer, which not all models have")
                parts_of += own[first:end]
            owner[name] = parts_of
    return changed


def _count_in(config: Mapping[str, Any], layers: Layers) -> tuple[str, ...]:
    """The path of the key that is the number of layers."""
    places = [path for path, value in _leaves(config) if path[-1] in _COUNTS and value == layers.before]
    if len(places) > 1:
        parts = layers.stack.split(".")
        other = {part for stack in layers.others for part in stack.split(".")} - set(parts)
        near = [path for path in places if _names(path, parts)]
        places = near or [path for path in places if not _names(path, other)] or places
        if len(places) > 1:
            places = [path for path in places if len(path) == 1] or places
    if len(places) != 1:
        found = ", ".join(".".join(path) for path in places) or "none"
        raise UsageError(
            f"config.json must say the number of layers of {layers.stack}, {layers.before}, in one key, found {found}"
        )
    return places[0]


def layer_notes(config: dict[str, Any], layers: Layers) -> list[str]:
    """Notes on keys of a configuration that say what layers are by their numbers, which are others in the result.

    Args:
        config: The configuration of the model that the result resembles.
        layers: The layers.

    Raises:
        UsageError: As in `with_layers`.
    """
    *above, _ = _count_in(config, layers)
    owner = _at(config, above)
    known = _NUMBERED if "layer_types" in owner else (*_NUMBERED, *_PATTERNS)
    trivial = {name: 1 if name.endswith(("_step", "_freq", "_period")) else None for name in known}
    return [
        f"config.json: {'.'.join([*above, name])} refers to layers by their numbers, and is not changed"
        for name in known
        if owner.get(name) and owner[name] != trivial[name]
    ]


def with_tokens(config: dict[str, Any], before: int, size: int) -> dict[str, Any]:
    """Return a configuration with another number of tokens, in all places where it has the number before."""

    def changed(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "vocab_size": size} if part.get("vocab_size") == before else part

    return changed({name: changed(value) if isinstance(value, dict) else value for name, value in config.items()})


def template_of(wanted: str, owners: Sequence[Owner]) -> str | None:
    """Return the text of a chat template.

    Args:
        wanted: "auto" for the one that most models have, the name of a template, or its text.
        owners: The models.

    Returns:
        The text, or None if no model has a template.

    Raises:
        UsageError: There is no template of this name.
    """
    if wanted == "auto":
        found = Counter(text for owner in owners if (text := _own_template(owner)))
        return found.most_common(1)[0][0] if found else None
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if "{" not in wanted:
        raise UsageError(
            f"chat_template must be auto, {', '.join(TEMPLATES)} or the text of a template, found {shown(wanted)}"
        )
    return wanted


def template_files(text: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files that give a tokenizer a chat template.

    Args:
        text: The template.
        files: The files of the tokenizer by name.

    Raises:
        TokenizerError: The text or a file is damaged.
    """
    try:
        found = {TEMPLATE: text.encode()}
    except UnicodeEncodeError as error:
        raise TokenizerError(f"the chat template cannot be written as UTF-8: {error.reason}") from None
    if TOKENIZER_CONFIG in files:
        config = json_object(files[TOKENIZER_CONFIG], TOKENIZER_CONFIG)
        if config.pop("chat_template", None) is not None:
            found[TOKENIZER_CONFIG] = as_json(config)
    return found


def token_notes(config: Mapping[str, Any], source: Owner, files: Mapping[str, bytes]) -> list[str]:
    """Notes on special tokens that the configuration numbers differently from the model whose tokenizer is written."""
    other = json_object(files.get("config.json"), f"{source.reference}: config.json")
    keys = [key for key in config if key.endswith("_token_id") and key in other and other[key] != config[key]]
    return [
        f"config.json has {key} {printable(str(config[key]), 40)}, and {printable(source.reference, 80)}, whose "
        f"tokenizer is written, has {printable(str(other[key]), 40)}"
        for key in keys
    ]


def _own_template(owner: Owner) -> str | None:
    if TEMPLATE in owner.files:
        return owner.files[TEMPLATE].decode(errors="replace").strip()
    content = owner.files.get(TOKENIZER_CONFIG)
    found = json_object(content, f"{owner.reference}: {TOKENIZER_CONFIG}").get("chat_template") if content else None
    if isinstance(found, list):  # several templates by name
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found.strip() if isinstance(found, str) and found.strip() else None


def _leaves(document: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _at(document: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = document
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _names(path: Sequence[str], parts: Collection[str]) -> bool:
    """Whether the path of a key in a configuration names one of these parts of a model."""
    return any(_alike(word, part) for word in path for part in parts)


def _alike(word: str, part: str) -> bool:
    """Whether a key of a configuration names a part of the model: text_config and language_model.text, for example."""
    return any(each in word for each in part.split("_") if len(each) > 3) or part in word.split("_")
