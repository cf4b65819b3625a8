"""Supported kinds of language models, and checks that a model folder contains one of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)
from transformers.models.auto import modeling_auto

from ..arguments import said
from ..errors import TrainingError

# transformers' loaders in the order in which they are tried, and their tables: model type -> name of the class.
# XLM is in the tables of masked and of causal models, BART in those of masked models and of encoder-decoders.
_LOADERS: dict[Any, dict[str, Any]] = {
    AutoModelForSeq2SeqLM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForMaskedLM: modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForImageTextToText: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
# causal by name, but every token sees the later ones, and the loss compares a token with itself
_UNSHIFTED = ("XLNetLMHeadModel",)
_TRAINED = "only causal, masked and encoder-decoder language models are trained here"


def loader_of(config: Any, path: Path, *, trust_remote_code: bool = False) -> Any:
    """Auto class of transformers that loads the class named by the config's `architectures`.

    If `architectures` is empty or names the bare model, whose head may be tied to its embeddings, it is the first auto
    class that supports the type of the model. The loaded model must then have all its weights.

    Args:
        config: The config of the model.
        path: The model folder, for messages.
        trust_remote_code: Whether classes in the folder's own code may be used.

    Raises:
        TrainingError: The model is of another kind. The message names the architecture.
    """
    listed = getattr(config, "architectures", None) or []
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    named = [name for name in listed if isinstance(name, str)]
    open_to_all = set(named) <= set(_as_tuple(modeling_auto.MODEL_MAPPING_NAMES.get(config.model_type)))
    for loader in _LOADERS:
        known = _classes(loader, config, trust_remote_code)
        if open_to_all:
            chosen = next(iter(known), None) if _suits(loader, config) else None
        else:
            chosen = next((name for name in named if name in known), None)
        if chosen is not None:
            _check_direction(chosen, config, path)
            return loader
    found = said(named[0])[1:-1] if named else f"a model of the type {said(str(config.model_type))[1:-1]}"
    raise TrainingError(f"{path} holds {found}: {_TRAINED}")


def _suits(loader: Any, config: Any) -> bool:
    """Whether a loader may be used for a model whose config does not name a class."""
    if config.is_encoder_decoder:
        return loader is AutoModelForSeq2SeqLM  # the decoder alone is another model, for example in Whisper
    return not (loader is AutoModelForMaskedLM and getattr(config, "is_decoder", False))


def _classes(loader: Any, config: Any, trust_remote_code: bool) -> tuple[str, ...]:
    """Names of the classes that a loader creates for a config."""
    asked = getattr(config, "auto_map", None)
    if trust_remote_code and isinstance(asked, dict) and isinstance(asked.get(loader.__name__), str):
        return (asked[loader.__name__].rpartition(".")[2],)
    known = _LOADERS[loader].get(config.model_type)
    if known is None and config.model_type not in transformers.CONFIG_MAPPING:
        return ()
    if known is None and type(config) in loader._model_mapping:  # registered by the caller
        known = loader._model_mapping[type(config)].__name__
    return _as_tuple(known)


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _check_direction(name: str, config: Any, path: Path) -> None:
    """Raise TrainingError for a model that is causal by name but sees the tokens that it predicts."""
    encoder = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or name == "BertGenerationDecoder"
    encoder &= config.model_type not in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    causal = name == modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    masked = name == modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type)
    if name in _UNSHIFTED:
        raise TrainingError(f"{path} holds {name}, which sees the tokens that it is to predict: {_TRAINED}")
    if encoder and causal and not masked and not getattr(config, "is_decoder", True):
        raise TrainingError(
            f"{path} holds {name} with is_decoder false in its config, so that it sees the tokens that it is to "
            f"predict: {_TRAINED}"
        )
    if causal and masked and getattr(config, "causal", False):
        raise TrainingError(f"{path} holds {name} with causal true in its config: it is trained as a masked model only")


def check_loaded(model: nn.Module, report: dict[str, Any], path: Path) -> None:
    """Check that a folder has all weights of a model, and that text alone is a valid input.

    Args:
        model: The loaded model.
        report: The loading info of `from_pretrained(output_loading_info=True)`. Tied weights do not count as missing.
        path: The model folder, for messages.

    Raises:
        TrainingError: Weights are missing or have another shape, or the model reads no text or computes no loss.
    """
    name = type(model).__name__
    for what, keys in (("lacks", report["missing_keys"]), ("has another shape of", report["mismatched_keys"])):
        if names := sorted(key if isinstance(key, str) else key[0] for key in keys):
            others = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            raise TrainingError(
                f"{path} {what} {len(names):,} of the weights of {name}, {said(names[0])}{others}: "
                "it is no complete model of this class"
            )
    main = getattr(model, "main_input_name", "input_ids")
    if main != "input_ids" or "labels" not in inspect.signature(model.forward).parameters:
        wanted = f"reads {main}, not text" if main != "input_ids" else "computes no loss"
        raise TrainingError(f"{path} holds {name}, which {wanted}: {_TRAINED}")


def check_reading(model: nn.Module, row: Mapping[str, list[int]]) -> None:
    """Check that a model learns from text alone, without seeing the tokens that it predicts.

    Some causal models read a prompt in both directions, and treat all of a text as a prompt without further inputs.
    Some encoder-decoders do not derive the decoder's input from the labels. The check replaces one token of a short
    text: predictions up to it must not change, and those of an encoder-decoder after it must change. Masked models are
    not checked.

    Args:
        model: The model.
        row: A row of the data, "input_ids" and "labels".

    Raises:
        TrainingError: The model fails the check.
    """
    pairs = is_encoder_decoder(model)
    ids, name = row["input_ids"][-16:], type(model).__name__
    held = f"{folder} holds {name}, which" if (folder := getattr(model, "name_or_path", "")) else name
    text = row["labels"][:1] * 2 if pairs else ids
    place = 0 if pairs else len(ids) - 1
    other = next((token for token in (*ids, *row["labels"]) if token not in {text[place], -100}), None)
    if is_masked(model) or other is None:
        return
    batch = torch.tensor([text, [*text[:place], other, *text[place + 1 :]]])
    inputs = {"input_ids": torch.tensor([ids, ids]) if pairs else batch, "labels": batch}
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            logits = model(**{key: values.to(device) for key, values in inputs.items()}).logits
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise TrainingError(f"{held} cannot learn from text alone: {said(str(error), 200)[1:-1]}") from None
    finally:
        model.train(training)
    moved = (logits[0] - logits[1]).float().abs().amax(-1)
    # before: the logits before the token for a causal model, those that predict it for an encoder-decoder
    before, after = (moved[:1], moved[1:]) if pairs else (moved[:-1], moved[-1:])
    if pairs and not bool(after.any()):
        raise TrainingError(f"{held} does not make the decoder's input of the labels: {_TRAINED}")
    # the tolerance is far above the rounding errors
    if bool(before.max() > max(1e-3, 8 * torch.finfo(logits.dtype).eps) * after.max()):
        raise TrainingError(f"{held} sees the tokens that it is to predict when it reads text alone: {_TRAINED}")


def is_masked(model: nn.Module) -> bool:
    """Whether a model fills in masked tokens, as encoders do, instead of continuing a text."""
    name = type(model).__name__
    known = name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    return name.endswith("ForMaskedLM") or (known and not is_encoder_decoder(model))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model reads the prompt with an encoder and generates the completion with a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
