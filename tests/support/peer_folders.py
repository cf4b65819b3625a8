"""Conformance of whole model folders: random recipes, merged by mergekit and by `taskvec merge`.

Usage: python -m support.peer_folders RECIPES SEED

The results are compared tensor by tensor. mergekit is run twice. In the first run only the random choices of DARE are
replaced by those of taskvec, since every program draws in its own way. In the second run the order of computation is
that of taskvec, too: sums in the order of the models, norms in f64, and of entries with equal magnitude those at the
first positions are taken, for which torch guarantees no order.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from support import merge_oracle as naive
from support.building import Tensor, tensor, write_checkpoint
from support.peers import TORCH_SUM
from taskvec import diff
from taskvec_formats import Checkpoint, ModelFolder
from taskvec_formats.dtypes import DTYPES as KNOWN

METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
WIDTH, INNER, WORDS = 6, 10, 12
FILTERS = ("mlp", "self_attn", "norm", ".0.", "embed")


@dataclass(frozen=True)
class Case:
    """A recipe and the models that it names.

    Attributes:
        document: The recipe.
        layers: The number of layers of the models.
        states: Model -> tensor name -> tensor.
        shards: Model -> number of shards.
        packed: The models that are given to taskvec as `.lota` files.
    """

    document: dict[str, Any]
    layers: int
    states: Mapping[str, Mapping[str, Tensor]]
    shards: Mapping[str, int]
    packed: frozenset[str]

    @property
    def method(self) -> str:
        return str(self.document["merge_method"])

    @property
    def merged(self) -> int:
        """The number of vectors, or of whole models, that are added."""
        models = [each["model"] for each in self.document["models"]]
        if self.method != "linear":
            return len([model for model in models if model != "base"])
        return len(models) + ("base_model" in self.document and "base" not in models)

    def inner(self, name: str) -> str:
        """Return the dtype in which mergekit computes a tensor."""
        used = {each["model"] for each in self.document["models"]} | {self.document.get("base_model", "base")}
        if self.document.get("base_model") is None:
            used.discard("base")
        given = {self.states[model][name].dtype.name for model in used}
        own = DTYPES[self.document["dtype"]] if "dtype" in self.document else given.pop() if len(given) == 1 else "F32"
        return "F32" if self.method == "linear" else own

    def write(self, folder: Path) -> None:
        """Write the model folders, merge.yaml for mergekit, and ours.yaml for taskvec; their paths are absolute."""
        for name, state in self.states.items():
            config = {**CONFIG, "num_hidden_layers": self.layers, "tie_word_embeddings": "lm_head.weight" not in state}
            write_checkpoint(folder / name, state, self.shards[name], {"config.json": json.dumps(config).encode()})
        for name in self.packed:
            diff(ModelFolder(folder / "base"), ModelFolder(folder / name)).save(folder / f"{name}.lota")
        for file, packed in (("merge.yaml", frozenset[str]()), ("ours.yaml", self.packed)):
            document = json.loads(json.dumps(self.document))
            for each in document["models"]:
                each["model"] = str(folder / each["model"]) + (".lota" if each["model"] in packed else "")
            if "base_model" in document:
                document["base_model"] = str(folder / document["base_model"])
            (folder / file).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
}


def shapes_of(layers: int, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a small Llama: name -> shape."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(layers):
        block = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
        block |= {"mlp.up_proj": (INNER, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
        norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (WIDTH,))
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in {**block, **norms}.items()}
    return found if tied else found | {"lm_head.weight": (WORDS, WIDTH)}


def draw(dice: np.random.Generator, method: str) -> Case:
    """Draw a random recipe and its models, with gradients, filters, partial fine-tunes, several dtypes and shards."""
    layers, count = int(dice.integers(1, 6)), int(dice.integers(2, 6))
    shapes = shapes_of(layers, tied=bool(dice.integers(2)))
    names = ["base", *(f"model{i}" for i in range(count))]
    own = str(dice.choice(list(DTYPES.values())))
    mixed = dice.random() < 0.35
    dtypes = {name: str(dice.choice(list(DTYPES.values()))) if mixed else own for name in names}
    base = {name: dice.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    base = {name: tensor(dtypes["base"], values) for name, values in base.items()}
    states: dict[str, dict[str, Tensor]] = {"base": base}
    for model in names[1:]:
        part, deepest = str(dice.choice(["", "mlp", "layers", "attn"])), int(dice.integers(1, layers + 1))
        states[model] = {}
        for name, each in base.items():
            values = each.bits.view(each.dtype.real).astype(np.float32).reshape(each.shape)
            beyond = any(f"layers.{i}." in name for i in range(deepest, layers))
            if part in name and not beyond:
                values = values + dice.normal(size=each.shape).astype(np.float32) * (dice.random(each.shape) < 0.7)
            states[model][name] = tensor(dtypes[model], values)
    document = draw_document(dice, method, names[1:])
    packed = frozenset(name for name in names[1:] if "base_model" in document and dice.random() < 0.25)
    return Case(document, layers, states, {name: int(dice.integers(1, 4)) for name in names}, packed)


def draw_document(dice: np.random.Generator, method: str, models: list[str]) -> dict[str, Any]:
    """Draw a random recipe that names these models and "base"."""
    document: dict[str, Any] = {"merge_method": method, "models": []}
    for model in models:
        parameters: dict[str, Any] = {"weight": _setting(dice, [1.0, 0.5, 0.3, 2.0, 0.7], required=True)}
        if method not in ("linear", "task_arithmetic") and dice.random() < 0.8:
            parameters["density"] = _setting(dice, [0.1, 0.2, 0.5, 0.77, 1.0])
        document["models"].append({"model": model, "parameters": parameters})
    shared: dict[str, Any] = {}
    if method != "linear" or dice.random() < 0.5:
        document["base_model"] = "base"
    if method == "linear" and "base_model" in document:
        if dice.random() < 0.5:
            place = int(dice.integers(len(models) + 1))
            document["models"].insert(place, {"model": "base", "parameters": {"weight": 0.5}})
        else:
            shared["weight"] = _setting(dice, [0.4, 1.0], required=True)
    if method != "linear":
        shared |= draw_shared(dice, method)
    if shared:
        document["parameters"] = shared
    if dice.random() < 0.6:
        document["dtype"] = str(dice.choice(list(DTYPES), p=[0.8, 0.1, 0.1]))
    if dice.random() < 0.4:
        document["out_dtype"] = str(dice.choice(list(DTYPES)))
    return document


def draw_shared(dice: np.random.Generator, method: str) -> dict[str, Any]:
    """Draw random parameters for all models, for a method that merges deltas."""
    shared: dict[str, Any] = {}
    if dice.random() < 0.4:
        shared["normalize"] = bool(dice.integers(2))
    if dice.random() < 0.3:
        shared["lambda"] = _setting(dice, [0.5, 1.5, 1.0], required=True)
    if method != "task_arithmetic" and dice.random() < 0.4:
        shared["rescale"] = bool(dice.integers(2))
    if method.startswith("breadcrumbs") and dice.random() < 0.6:
        shared["gamma"] = float(dice.choice([0.0, 0.01, 0.1]))
    if dice.random() < 0.2:
        shared["int8_mask"] = True
    return shared


def _setting(dice: np.random.Generator, numbers: list[float], *, required: bool = False) -> Any:
    """Draw a number, a gradient or a list of rules. If required, the last rule applies to all tensors."""

    def number() -> float:
        return float(dice.choice(numbers))

    def gradient() -> list[float]:
        return [number() for _ in range(int(dice.integers(2, 5)))]

    kind = dice.random()
    if kind < 0.4:
        return number()
    if kind < 0.7:
        return gradient()
    rules: list[dict[str, Any]] = [
        {"filter": str(dice.choice(FILTERS)), "value": gradient() if dice.random() < 0.5 else number()}
        for _ in range(int(dice.integers(1, 3)))
    ]
    return [*rules, {"value": number()}] if required or dice.random() < 0.7 else rules


def by_taskvec(folder: Path, out: Path) -> Checkpoint:
    """Merge ours.yaml with `taskvec merge`."""
    from taskvec_cli.main import app

    with redirect_stdout(StringIO()):
        app(["merge", "--recipe", str(folder / "ours.yaml"), "-o", str(out), "--json"], standalone_mode=False)
    return ModelFolder(out)


def by_mergekit(folder: Path, out: Path) -> Checkpoint:
    """Merge merge.yaml with mergekit, as `mergekit-yaml` does."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    document = yaml.safe_load((folder / "merge.yaml").read_text(encoding="utf-8"))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(document), str(out), options)
    return ModelFolder(out)


@contextmanager
def drawn() -> Iterator[None]:
    """Within the block, the DARE of mergekit drops the same entries as taskvec."""
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge as Method

    merge_group, bernoulli = Method.merge_group, torch.bernoulli
    masks: Iterator[torch.Tensor] = iter(())

    def merge_drawn(self: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
        nonlocal masks
        base, name = group.base.tensor, group.metadata.name
        shape = base.shape
        rows = (shape if len(shape) > 1 else (1, *shape)) if "epsilon" in parameters else shape

        def mask(number: int, entry: Any, density: float) -> torch.Tensor:
            shares = [density] * shape.numel()
            if "epsilon" in parameters:
                delta = (entry.tensor - base).float().flatten().tolist()
                shares = naive.probabilities(delta, rows[-1], density, parameters["epsilon"][entry.id])
            kept = [float(naive.drawn_below(0, number, name, i, share)) for i, share in enumerate(shares)]
            return torch.tensor(kept).reshape(rows)

        densities = [parameters["density"][entry.id] for entry in group.non_base]
        masks = iter(
            [
                mask(number, entry, density)
                for number, (entry, density) in enumerate(zip(group.non_base, densities, strict=True))
                if 0 < density < 1 or (density == 0 and "epsilon" not in parameters)
            ]
        )
        return merge_group(self, group, **parameters)  # type: ignore[no-any-return]

    Method.merge_group = merge_drawn
    torch.bernoulli = lambda probabilities: next(masks).to(probabilities.dtype)
    try:
        yield
    finally:
        Method.merge_group, torch.bernoulli = merge_group, bernoulli


@contextmanager
def in_order() -> Iterator[None]:
    """Within the block, torch adds models in order, computes sums over a tensor and functions of one number in f64, and
    ranks equal values by position.
    """
    argsort, sort, add = torch.argsort, torch.sort, torch.sum

    def sum_in_order(values: torch.Tensor, dim: int | None = None, **more: Any) -> torch.Tensor:
        if values.dtype == torch.bool:
            return TORCH_SUM(values, dim, **more)
        weights = dim == 1 and values.dim() == 2 and len(values) == 1 and not more  # of `linear`
        if dim != 0 and not weights:
            return TORCH_SUM(values.double(), dim, **more).to(values.dtype)
        assert dim is not None
        total = torch.zeros_like(values.select(dim, 0), dtype=torch.promote_types(values.dtype, torch.float32))
        for row in values.unbind(dim):
            total = total + row
        total = total.to(values.dtype)
        return total.unsqueeze(0) if more.get("keepdim") else total

    def largest_first(values: torch.Tensor, descending: bool = False, dim: int | None = None) -> torch.Tensor:
        if dim is not None:
            return argsort(values, dim=dim, descending=descending, stable=True)
        order = argsort(values, descending=True, stable=True)
        return order if descending else order.flip(0)

    class Sorted(NamedTuple):
        values: torch.Tensor
        indices: torch.Tensor

    def sorted_by_position(values: torch.Tensor, descending: bool = False) -> Sorted:
        indices = largest_first(values, descending)
        return Sorted(values[indices], indices)

    kept = [(owner, name, getattr(owner, name)) for owner, name in _IN_F64]
    for owner, name, function in kept:
        setattr(owner, name, _in_f64(function))
    torch.Tensor.sum = torch.sum = sum_in_order  # type: ignore[assignment,method-assign]
    torch.argsort, torch.sort = largest_first, sorted_by_position  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.Tensor.sum, torch.sum = TORCH_SUM, add  # type: ignore[method-assign]
        torch.argsort, torch.sort = argsort, sort
        for owner, name, function in kept:
            setattr(owner, name, function)


_IN_F64: tuple[tuple[Any, str], ...] = (
    *((torch, name) for name in ("norm", "var", "dot", "acos", "arccos", "sin", "cos", "log")),
    (torch.linalg, "vector_norm"),
    (torch.Tensor, "mean"),
    (torch.nn.functional, "softmax"),
)


def _in_f64(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function of tensors that computes in f64 and rounds its result."""

    def in_f64(values: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        others = [each.double() if isinstance(each, torch.Tensor) else each for each in more]
        return function(values.double(), *others, **named).to(values.dtype)

    return in_f64


def values_of(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Return the values of a tensor in f64."""
    dtype = checkpoint.tensors[name].dtype
    return checkpoint.bits(name).view(dtype.real).astype(np.float64)


def ulps(one: Checkpoint, other: Checkpoint, name: str, inner: str) -> float:
    """Return the largest difference between two tensors, in units in the last place (ULP) of their largest value.

    Args:
        one: A checkpoint.
        other: Another checkpoint.
        name: The name of the tensor.
        inner: The dtype in which one of the tensors was computed. It gives the unit if it is coarser than the dtype of
            the tensors.
    """
    a, b = values_of(one, name), values_of(other, name)
    mantissa = min(dtype.mantissa or 0 for dtype in (one.tensors[name].dtype, KNOWN[inner]))
    exponent = int(np.frexp(max(abs(a).max(), abs(b).max()))[1])
    return float(abs(a - b).max() / 2.0 ** (exponent - 1 - mantissa))


def equal(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether two tensors have the same dtype, shape and values; zeros of either sign are equal."""
    return one.tensors[name].form == other.tensors[name].form and np.array_equal(
        values_of(one, name), values_of(other, name), equal_nan=True
    )


def compare(case: Case, folder: Path, report: Callable[[str, str, bool, bool, float], None]) -> None:
    """Run both programs on a case and report each tensor.

    Args:
        case: The case.
        folder: An empty folder for its models and results.
        report: Called with the name of the tensor, the dtype in which mergekit computes it, whether both results are
            equal, whether they are equal if mergekit computes in the order of taskvec, and the difference in ULP.
    """
    case.write(folder)
    ours = by_taskvec(folder, folder / "ours")
    with drawn():
        theirs = by_mergekit(folder, folder / "theirs")
        with in_order():
            ordered = by_mergekit(folder, folder / "ordered")
    if not ours.tensors.keys() == theirs.tensors.keys() == ordered.tensors.keys():
        raise AssertionError(f"other tensors: {sorted(ours.tensors.keys() ^ theirs.tensors.keys())}")
    for name in ours.tensors:
        if ours.tensors[name].form != theirs.tensors[name].form:
            raise AssertionError(f"{name} is {ours.tensors[name].form} here, {theirs.tensors[name].form} there")
        same, alike = equal(ours, theirs, name), equal(ours, ordered, name)
        report(name, case.inner(name), same, alike, 0.0 if same else ulps(ours, theirs, name, case.inner(name)))


def main(count: int, seed: int) -> None:
    """Draw recipes, run both programs, and print how many tensors agree."""
    dice = np.random.default_rng(seed)
    rows: dict[tuple[str, str, str], list[tuple[int, bool, bool, float]]] = {}
    wrong = []
    for number in range(count):
        case = draw(dice, METHODS[number % len(METHODS)])
        few = "2 to 4" if case.merged <= 4 else "5 or 6"

        def report(name: str, inner: str, same: bool, alike: bool, apart: float) -> None:
            rows.setdefault((case.method, inner, few), []).append((number, same, alike, apart))  # noqa: B023
            if not alike:
                wrong.append(f"recipe {number}: {name}: {apart:.1f} ULP: {json.dumps(case.document)}")  # noqa: B023

        folder = Path(tempfile.mkdtemp())
        try:
            compare(case, folder, report)
        except BaseException:
            print(f"recipe {number}: {json.dumps(case.document)}", file=sys.stderr)
            raise
        finally:
            shutil.rmtree(folder)
    print(f"seed {seed}, mergekit {version('mergekit')}, whole folders\n")
    print(
        "| method | mergekit computes in | models | recipes | tensors | equal to the bit | most ULP | equal in order |"
    )
    print("|---" * 8 + "|")
    for row, found in sorted(rows.items()):
        same, alike = sum(each[1] for each in found), sum(each[2] for each in found)
        recipes, most = len({each[0] for each in found}), max(each[3] for each in found)
        print(f"| {' | '.join(row)} | {recipes} | {len(found):,} | {same:,} | {most:.1f} | {alike:,} |")
    if wrong:
        sys.exit("\n".join([f"{len(wrong)} tensors differ:", *wrong[:20]]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main(int(sys.argv[1]), int(sys.argv[2]))
