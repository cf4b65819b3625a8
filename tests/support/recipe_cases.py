"""Recipes of every kind, on small models, and the results of mergekit for them.

Usage: python -m support.recipe_cases            run both programs, and print how far their results agree
       python -m support.recipe_cases --freeze   also write digests of mergekit's results to tests/golden/recipes.json

The first recipes are those of mergekit's folder `examples`, with other models. mergekit is run as it is, and once more
with the order of computation of taskvec, as in `peer_folders`; the digests are those of the second run.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from support.building import Tensor, tensor, write_checkpoint
from support.paths import GOLDEN
from support.peer_folders import CONFIG, by_taskvec, drawn, in_order, shapes_of, values_of
from taskvec_formats import Checkpoint
from taskvec_formats.checkpoint import fingerprint, tensor_digest

FROZEN = GOLDEN / "recipes.json"
LAYERS = 6
LETTERS = list("abcdefghij")


@dataclass(frozen=True)
class Case:
    """A recipe.

    Attributes:
        text: The recipe; models are names of folders.
        models: The models: "llama" for a base and three fine-tunes of it, "words" for a base and two models with other
            tokens.
    """

    text: str
    models: str = "llama"


def two(method: str, more: str = "", first: str = "{weight: 0.6}", second: str = "{weight: [0.3, 1]}") -> str:
    """Return a recipe of the models a and b."""
    models = f"models: [{{model: a, parameters: {first}}}, {{model: b, parameters: {second}}}]"
    return f"merge_method: {method}\n{models}\n{more}\n"


def all_three(method: str, more: str = "", each: str = "{}") -> str:
    """Return a recipe of the models a, b and c."""
    models = ", ".join(f"{{model: {name}, parameters: {each}}}" for name in "abc")
    return f"merge_method: {method}\nmodels: [{models}]\n{more}\n"


GRADIENTS = """
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - value: 0.5
dtype: float16
"""
WORDS = "models: [{model: a, parameters: {weight: 0.6}}, {model: b, parameters: {weight: 0.3}}]\nbase_model: base\n"
BASE = "base_model: base"
# "example: " marks those of mergekit's examples
CASES: dict[str, Case] = {
    "example: arcee_fusion": Case(
        "models: [{model: base}, {model: a}]\nmerge_method: arcee_fusion\nbase_model: base\ndtype: bfloat16\n"
    ),
    "example: bio-merge": Case(
        two(
            "ties",
            f"{BASE}\nparameters: {{normalize: false, int8_mask: true}}\ndtype: float16",
            "{density: 0.5, weight: 0.5}",
            "{density: 0.5, weight: 0.5}",
        )
    ),
    "example: gradient-slerp": Case(
        "slices: [{sources: [{model: a, layer_range: [0, 6]}, {model: b, layer_range: [0, 6]}]}]\n"
        f"merge_method: slerp\nbase_model: a\n{GRADIENTS}"
    ),
    "example: gradient-slerp, with models": Case(
        f"models: [{{model: a}}, {{model: b}}]\nmerge_method: slerp\nbase_model: a\n{GRADIENTS}"
    ),
    "example: linear": Case(
        "models:\n- {model: a, parameters: {weight: 1.0}}\n- {model: b, parameters: {weight: 0.3}}\n"
        "- {model: c, parameters: {weight: 0.5}}\nmerge_method: linear\ndtype: float16\n"
    ),
    "example: orcamini-platy-44layer": Case(
        "slices:\n- sources: [{model: a, layer_range: [0, 4]}]\n- sources: [{model: b, layer_range: [3, 6]}]\n"
        "merge_method: passthrough\ndtype: float16\n"
    ),
    "example: ties": Case(
        "models:\n- {model: a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}\n"
        "- {model: b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}\n"
        "- {model: c, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}\n"
        f"merge_method: ties\n{BASE}\nparameters: {{normalize: true, int8_mask: true}}\ndtype: float16\n"
    ),
    "linear": Case(two("linear", f"{BASE}\nparameters: {{weight: 0.5}}")),
    "linear, normalize: false": Case(two("linear", "parameters: {normalize: false}\nout_dtype: bfloat16")),
    "task_arithmetic": Case(two("task_arithmetic", f"{BASE}\nparameters: {{lambda: [0.5, 1.5]}}")),
    "ties": Case(two("ties", f"{BASE}\nparameters: {{density: [0.2, 0.8]}}")),
    "dare_linear": Case(two("dare_linear", f"{BASE}\nparameters: {{density: 0.5}}")),
    "dare_ties": Case(two("dare_ties", f"{BASE}\nparameters: {{density: 0.5, rescale: false}}")),
    "breadcrumbs": Case(two("breadcrumbs", f"{BASE}\nparameters: {{density: 0.5, gamma: 0.1}}")),
    "breadcrumbs_ties": Case(two("breadcrumbs_ties", f"{BASE}\nparameters: {{density: 0.5}}")),
    "della": Case(two("della", f"{BASE}\nparameters: {{density: 0.5, epsilon: 0.2}}")),
    "della_linear": Case(two("della_linear", f"{BASE}\nparameters: {{density: 0.7}}\ndtype: bfloat16")),
    "sce": Case(all_three("sce", f"{BASE}\nparameters: {{select_topk: 0.3}}")),
    "ram": Case(all_three("ram", BASE)),
    "ramplus_tl": Case(all_three("ramplus_tl", f"{BASE}\nparameters: {{r: 0.3, epsilon: 0.01}}")),
    "slerp": Case(two("slerp", "base_model: b\nparameters: {t: [0.1, 0.9]}", "{}", "{}")),
    "nuslerp": Case(two("nuslerp", "dtype: bfloat16")),
    "nuslerp, with a base": Case(two("nuslerp", BASE)),
    "nuslerp, by row": Case(two("nuslerp", f"{BASE}\nparameters: {{nuslerp_flatten: false}}\ndtype: float16")),
    "nuslerp, by column": Case(
        two("nuslerp", "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\nout_dtype: float16")
    ),
    "multislerp": Case(all_three("multislerp", "", "{weight: [0.2, 1]}")),
    "multislerp, with a base": Case(all_three("multislerp", f"{BASE}\ndtype: bfloat16", "{weight: 0.4}")),
    "karcher": Case(all_three("karcher")),
    "model_stock": Case(all_three("model_stock", BASE)),
    "model_stock, filter_wise": Case(all_three("model_stock", f"{BASE}\nparameters: {{filter_wise: true}}")),
    "nearswap": Case(f"merge_method: nearswap\nmodels: [{{model: a}}]\n{BASE}\nparameters: {{t: [0.001, 0.01]}}\n"),
    "arcee_fusion": Case(f"merge_method: arcee_fusion\nmodels: [{{model: a}}]\n{BASE}\n"),
    "passthrough, scaled": Case(
        "merge_method: passthrough\n"
        "models: [{model: a, parameters: {scale: [{filter: o_proj, value: 0.5}, {filter: mlp, value: [1, 0]}]}}]\n"
    ),
    "ties, in slices": Case(
        "slices:\n- sources:\n  - {model: base, layer_range: [0, 2]}\n"
        "  - {model: a, layer_range: [0, 2], parameters: {weight: [0.2, 1], density: 0.5}}\n"
        "  - {model: b, layer_range: [0, 2], parameters: {weight: 1}}\n"
        "- sources:\n  - {model: base, layer_range: [1, 6]}\n"
        "  - {model: a, layer_range: [1, 6], parameters: {weight: [{filter: layers.3., value: 0.5}, {value: 1}]}}\n"
        f"  parameters: {{density: 0.3}}\nmerge_method: ties\n{BASE}\ndtype: bfloat16\n"
    ),
    "linear, in a module": Case(
        "modules:\n  default:\n    slices:\n"
        "    - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [0, 2]}]\n"
        "    - sources: [{model: c, layer_range: [0, 3], parameters: {weight: 2}}]\n    parameters: {weight: [1, 3]}\n"
        "merge_method: linear\n"
    ),
    "tokenizer_source: union": Case(
        f"{WORDS}merge_method: linear\nparameters: {{weight: 0.5}}\ntokenizer_source: union\n", "words"
    ),
    "tokenizer_source: base": Case(f"{WORDS}merge_method: ties\ntokenizer_source: base\n", "words"),
    "tokenizer_source: MODEL": Case(f"{WORDS}merge_method: task_arithmetic\ntokenizer_source: b\n", "words"),
    "tokenizer, with tokens": Case(
        f"{WORDS}merge_method: ties\nparameters: {{density: 0.5}}\ntokenizer:\n  source: union\n"
        "  pad_to_multiple_of: 8\n  tokens:\n    <x>: {source: b, force: true}\n    <new>: {source: {kind: zero}}\n"
        "    <y>: {source: {kind: model_token, model: a, token: c}}\n",
        "words",
    ),
    "chat_template: auto": Case(
        f"{WORDS}merge_method: linear\nparameters: {{weight: 0.5}}\ntokenizer_source: base\nchat_template: auto\n",
        "words",
    ),
}
DTYPES = {"F32": "float32", "BF16": "bfloat16"}


def write_models(folder: Path, kind: str, dtype: str) -> None:
    """Write the model folders of a case."""
    if kind == "llama":
        shapes = shapes_of(LAYERS, tied=False)
        for number, name in enumerate(("base", "a", "b", "c")):
            state = {key: _weights(key, shape, number) for key, shape in shapes.items()}
            _write(folder / name, state, dtype, LAYERS, 12, {})
        return
    for number, (name, words, added) in enumerate(
        (
            ("base", LETTERS, ["<s>"]),
            ("a", LETTERS, ["<s>", "<x>", "<y>"]),
            ("b", [*LETTERS[::-1], "zz"], ["<s>", "<x>"]),
        )
    ):
        rows = len(words) + len(added)
        shapes = {
            key: (rows, *shape[1:]) if shape[0] == 12 else shape for key, shape in shapes_of(2, tied=False).items()
        }
        state = {key: _weights(key, shape, number) for key, shape in shapes.items()}
        _write(folder / name, state, dtype, 2, rows, _tokenizer(words, added, name))


def _weights(name: str, shape: tuple[int, ...], number: int) -> np.ndarray:
    """Weights of a base (0), or of a fine-tune of it that leaves some of them as they are, in multiples of 2^-16."""
    seed = sum(map(ord, name)) * 1000
    values = np.random.default_rng(seed).integers(-6000, 6000, shape)
    if number:
        dice = np.random.default_rng(seed + number)
        values = values + dice.integers(-900, 900, shape) * dice.integers(0, 3, shape)
    return (values / 2**16).astype(np.float32)


def _write(
    folder: Path, state: dict[str, np.ndarray], dtype: str, layers: int, rows: int, files: dict[str, bytes]
) -> None:
    config = {**CONFIG, "num_hidden_layers": layers, "vocab_size": rows, "tie_word_embeddings": False}
    tensors: dict[str, Tensor] = {name: tensor(dtype, values) for name, values in state.items()}
    config["dtype"] = DTYPES[dtype]
    write_checkpoint(folder, tensors, 2, {"config.json": json.dumps(config).encode(), **files})


def _tokenizer(words: list[str], added: list[str], name: str) -> dict[str, bytes]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "added_tokens": [{"id": len(words) + i, "content": token, **flags} for i, token in enumerate(added)],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": []},
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if name != "base":
        config["chat_template"] = "{{ messages[0]['content'] }}"
    return {
        "tokenizer.json": json.dumps(document).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def with_paths(document: Any, folder: Path) -> Any:
    """Return a recipe whose models are paths. A tokenizer_source of base is no model."""
    if isinstance(document, dict):
        models = {
            key: ("a", "b", "c") if key == "tokenizer_source" else ("base", "a", "b", "c")
            for key in ("model", "base_model", "tokenizer_source", "source")
        }
        return {
            key: str(folder / value)
            if isinstance(value, str) and value in models.get(key, ())
            else with_paths(value, folder)
            for key, value in document.items()
        }
    return [with_paths(each, folder) for each in document] if isinstance(document, list) else document


def ours(case: Case, folder: Path, out: str) -> Checkpoint:
    """Merge a case with `taskvec merge`, in a folder that contains its models."""
    document = with_paths(yaml.safe_load(case.text), folder)
    (folder / "ours.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return by_taskvec(folder, folder / out)


def digest_of(checkpoint: Checkpoint) -> str:
    """Return the first digits of a digest of the names, dtypes, shapes and bytes of all tensors."""
    return fingerprint(digests(checkpoint))[:16]


def digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Return tensor name -> a digest of its dtype, shape and bytes. Zeros have no sign."""
    found = {}
    for name, info in checkpoint.tensors.items():
        bits = checkpoint.bits(name).copy()
        bits[bits == np.array(1 << (8 * info.dtype.itemsize - 1), bits.dtype)] = 0
        found[name] = tensor_digest(name, info.form, bits.tobytes())
    return found


def _theirs(case: Case, folder: Path, out: str) -> Checkpoint:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from taskvec_formats import ModelFolder

    document = with_paths(yaml.safe_load(case.text), folder)
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(document), str(folder / out), options)
    return ModelFolder(folder / out)


def _rounded(checkpoint: Checkpoint, like: Checkpoint, folder: Path) -> Checkpoint:
    """Write a checkpoint again in the dtypes of another one."""
    state = {
        name: tensor(info.dtype.name, values_of(checkpoint, name).reshape(info.shape).astype(np.float32))
        for name, info in like.tensors.items()
    }
    return write_checkpoint(folder, state)


def rows() -> Iterator[tuple[str, str, str, int, int, int, int]]:
    """Run both programs on every case.

    Yields (case, dtype of the models, digest of mergekit's result in order, tensors, tensors that are equal to those
    of mergekit as it is, weights that differ in the others, tensors that are equal in order).
    """
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as temporary:
            for kind in ("llama", "words"):
                folder = Path(temporary) / kind
                folder.mkdir()
                write_models(folder, kind, dtype)
                for number, (name, case) in enumerate(CASES.items()):
                    if case.models != kind:
                        continue
                    found = ours(case, folder, f"ours{number}")
                    with drawn():
                        theirs = _theirs(case, folder, f"theirs{number}")
                        with in_order():
                            ordered = _theirs(case, folder, f"ordered{number}")
                    # mergekit writes F32 here, whatever dtype and config.json say
                    if "arcee_fusion" in name or name == "ramplus_tl":
                        theirs, ordered = (
                            _rounded(each, found, folder / f"{which}{number}-rounded")
                            for which, each in (("theirs", theirs), ("ordered", ordered))
                        )
                    wanted = digests(ordered)
                    same = [np.array_equal(values_of(found, key), values_of(theirs, key)) for key in found.tensors]
                    apart = sum(int((values_of(found, key) != values_of(theirs, key)).sum()) for key in found.tensors)
                    mine = digests(found)
                    alike = sum(mine[key] == wanted.get(key) for key in mine)
                    yield name, dtype, digest_of(ordered), len(same), sum(same), apart, alike


def main(*, freeze: bool) -> None:
    """Print how far both programs agree, and optionally write the digests of mergekit's results."""
    frozen: dict[str, str] = {}
    cells: dict[str, list[str]] = {}
    wrong, apart_at_all = [], set()
    for name, dtype, found, count, same, apart, alike in rows():
        print(f"{name}, {dtype}", file=sys.stderr, flush=True)
        frozen[f"{name}, {dtype}"] = found
        cells.setdefault(name, [str(count)]).extend([str(same), str(apart), str(alike)])
        if apart:
            apart_at_all.add(name)
        if alike != count:
            wrong.append(f"{name}, {dtype}")
    print(f"mergekit {version('mergekit')}\n")
    columns = [f"{dtype}: {what}" for dtype in DTYPES for what in ("equal", "other weights", "equal in order")]
    print(f"| recipe | tensors | {' | '.join(columns)} | verdict |")
    print("|---" * (3 + len(columns)) + "|")
    for name, row in cells.items():
        print(f"| {name} | {' | '.join(row)} | {_verdict(name) if name in apart_at_all else 'equal'} |")
    if freeze:
        FROZEN.write_text(json.dumps({"mergekit": version("mergekit"), "recipes": frozen}, indent=1) + "\n")
    if wrong:
        sys.exit(f"these differ from mergekit in the order of taskvec: {'; '.join(wrong)}")


def _verdict(name: str) -> str:
    """Return why the results of a recipe are not equal without the order of computation of taskvec."""
    method = yaml.safe_load(CASES[name].text)["merge_method"]
    trims = method in ("ties", "breadcrumbs", "breadcrumbs_ties")
    return f"other: {'entries of equal magnitude' if trims else 'sums over a tensor'}"


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--freeze"]):
        sys.exit(__doc__)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    main(freeze=bool(sys.argv[1:]))
