"""Loading of language models and their tokenizers with transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from ..arguments import said, truth
from ..errors import TrainingError, UsageError
from .kinds import check_loaded, loader_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # takes a second and 130 MB, which a refused folder should not cost


def load_model(
    path: Path, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Load the language model of a folder, as the class that its config names, and its tokenizer.

    Args:
        path: The model folder.
        dtype: The dtype of the weights.
        trust_remote_code: Whether Python code in the folder, or in a repository that it names, may run. The user is not
            asked.

    Returns:
        (model, tokenizer).

    Raises:
        UsageError: The folder needs Python code that may not run.
        TrainingError: transformers cannot load the folder, it contains another kind of model, or weights are missing.
    """
    config, tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    loader = loader_of(config, path, trust_remote_code=trust_remote_code)
    model: PreTrainedModel
    with _failing_for(path, trust_remote_code):
        model, report = loader.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # check_loaded refuses them, as it does missing weights
            output_loading_info=True,
        )
    check_loaded(model, report, path)
    return model, tokenizer


def empty_model(path: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """Make the language model of a folder without weights, and load its tokenizer.

    Args:
        path: The model folder.
        dtype: The dtype of the weights.
        trust_remote_code: As in `load_model`.

    Returns:
        (model, tokenizer). The parameters of the model are on the meta device. Its buffers have the values that the
        class gives them.

    Raises:
        UsageError, TrainingError: As in `load_model`.
    """
    config, tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    loader = loader_of(config, path, trust_remote_code=trust_remote_code)
    model: PreTrainedModel
    with _failing_for(path, trust_remote_code):
        with init_empty_weights(include_buffers=False):
            model = loader.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model.tie_weights()
        if model.can_generate() and (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    check_loaded(model, {"missing_keys": [], "mismatched_keys": []}, path)
    return model, tokenizer


def load_weights(path: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    """Load the language model of a folder with the arguments of the caller.

    Args:
        path: The model folder.
        options: Arguments of `from_pretrained`. The dtype is that of the checkpoint unless one is given.

    Raises:
        UsageError, TrainingError: As in `load_model`.
    """
    others = {"dtype": "auto", **options}
    trust_remote_code = truth("trust_remote_code", others.pop("trust_remote_code", False))
    _check_folder(path)
    with _failing_for(path, trust_remote_code):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    loader = loader_of(config, path, trust_remote_code=trust_remote_code)
    with _failing_for(path, trust_remote_code):
        model: PreTrainedModel
        model, report = loader.from_pretrained(
            path, **others, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    check_loaded(model, report, path)
    return model


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load the config and the tokenizer of a model folder. This detects unusable folders quickly.

    Args:
        path: The model folder.
        trust_remote_code: As in `load_model`.

    Returns:
        (config, tokenizer).

    Raises:
        UsageError: As in `load_model`.
        TrainingError: As in `load_model`.
    """
    _check_folder(path)
    with _failing_for(path, trust_remote_code):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    loader_of(config, path, trust_remote_code=trust_remote_code)
    with _failing_for(path, trust_remote_code):
        return config, AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise TrainingError(f"{path} is a single file: a model folder with config and tokenizer is needed here")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def _failing_for(path: Path, trust_remote_code: bool) -> Iterator[None]:
    """Convert any error of an untrusted config, tokenizer or code into an error of one sentence."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if not trust_remote_code and "trust_remote_code" in str(error) and (code := _own_code(path)):
            raise UsageError(
                f"{path} needs Python code from the model, {code}: it is run only with trust_remote_code "
                "(`trust_remote_code`), and can then do whatever you can"
            ) from None
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TrainingError(f"{path} cannot be loaded as a language model: {said(reason[0], 300)[1:-1]}") from None


def _own_code(path: Path) -> str | None:
    """The file of Python code that a model folder needs, and the config file that names it; None if there is none."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            asked = json.loads((path / name).read_bytes())["auto_map"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        # AutoClass -> "module.Class" or "repository--module.Class"; for tokenizers a list of the slow and the fast one
        places = asked.values() if isinstance(asked, dict) else [asked]
        for place in (one for each in places for one in (each if isinstance(each, list) else [each])):
            if isinstance(place, str):
                repository, _, module = place.rpartition("--")
                file = said(f"{module.rpartition('.')[0]}.py")[1:-1]
                holder = said(repository)[1:-1] if repository else "the folder"
                return f"{file} of {holder} (auto_map in {name})"
    return None
