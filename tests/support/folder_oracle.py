"""A naive implementation of mergekit's recipes on whole dense models, after mergekit's documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from support import merge_oracle as naive
from support.building import Tensor, tensor
from support.peer_folders import Case
from taskvec_formats import SparseTensor

SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def depth(name: str, layers: int) -> float:
    """Return the relative depth of a tensor: i / (n − 1) in layer i of n, 1 in an only layer, 0 outside all layers."""
    found = re.search(r"layers\.(\d+)\.", name)
    if not found:
        return 0.0
    return int(found[1]) / (layers - 1) if layers > 1 else 1.0


def number(setting: Any, name: str, at: float) -> float | None:
    """Return the number that a setting gives for a tensor at a depth, or None if no rule matches."""
    if isinstance(setting, list) and isinstance(setting[0], dict):
        for rule in setting:
            if rule.get("filter") is None or rule["filter"] in name:
                return number(rule["value"], name, at)
        return None
    if isinstance(setting, list):
        low = int(at * (len(setting) - 1))
        share = at * (len(setting) - 1) - low
        return (1 - share) * setting[low] + share * setting[min(low + 1, len(setting) - 1)]
    return None if setting is None else float(setting)


def values(each: Tensor, dtype: str | None = None) -> np.ndarray:
    """Return the f32 values of a tensor, rounded to a dtype first if one is given."""
    own = each.bits.view(each.dtype.real).astype(np.float32)
    if dtype is None:
        return own
    rounded = tensor(dtype, own)
    return rounded.bits.view(rounded.dtype.real).astype(np.float32)


def fused(total: float, value: float, weight: float) -> float:
    """Return total + value * weight, rounded once to f32."""
    return float(np.float32(float(Fraction(total) + Fraction(value) * Fraction(weight))))


class Oracle:
    """Computes the expected result of a case, tensor by tensor."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.shared: Mapping[str, Any] = case.document.get("parameters", {})
        self.models = [(each["model"], each.get("parameters", {})) for each in case.document["models"]]
        self.base = case.document.get("base_model")

    def setting(self, parameters: Mapping[str, Any], key: str, name: str, default: float) -> float:
        at = depth(name, self.case.layers)
        for source in (parameters, self.shared):
            found = number(source.get(key), name, at)
            if found is not None:
                return found
        return default

    def tensor(self, name: str) -> Tensor:
        """Return a merged tensor in the dtype in which it is written."""
        document, linear = self.case.document, self.case.method == "linear"
        models = list(self.models)
        if linear and self.base and self.base not in dict(models):
            models.append((self.base, {}))
        used = [model for model, _ in models] + ([self.base] if self.base else [])
        dtypes = {self.case.states[model][name].dtype.name for model in used}
        inner = SAFETENSORS[document["dtype"]] if "dtype" in document else dtypes.pop() if len(dtypes) == 1 else "F32"
        shape = self.case.states[used[0]][name].shape
        written = document.get("out_dtype") or document.get("dtype")
        if linear:
            averaged = tensor(inner, self.average(models, name, inner))
            result = values(averaged)
        else:
            result = self.moved(name)
        return tensor(SAFETENSORS[written] if written else inner, result.reshape(shape))

    def average(self, models: list[tuple[str, Mapping[str, Any]]], name: str, inner: str) -> np.ndarray:
        weights = [naive.f32(self.setting(parameters, "weight", name, 1.0)) for _, parameters in models]
        held = [values(self.case.states[model][name], inner).tolist() for model, _ in models]
        divisor = 0.0
        for weight in weights:
            divisor = naive.f32(divisor + weight)
        found = []
        for each in zip(*held, strict=True):
            total = 0.0
            for value, weight in zip(each, weights, strict=True):
                total = fused(total, value, weight)
            found.append(np.float32(total) / np.float32(divisor))
        return np.array(found, np.float32)

    def moved(self, name: str) -> np.ndarray:
        """Return the base plus the merged deltas of a tensor, in f32."""
        method = {"task_arithmetic": "linear"}.get(self.case.method, self.case.method)
        options: dict[str, Any] = {"dialect": "mergekit"}
        options |= {key: self.shared[key] for key in ("normalize", "gamma") if key in self.shared}
        if "rescale" in self.shared:
            options["rescale"] = "norm" if self.shared["rescale"] else "none"
        base = values(self.case.states["base"][name])
        others = [(model, parameters) for model, parameters in self.models if model != "base"]
        kept, weights = [], []
        for place, (model, parameters) in enumerate(others):
            delta = values(self.case.states[model][name]) - base
            sparse = SparseTensor(delta.shape, np.flatnonzero(delta), delta[delta != 0])
            density = self.setting(parameters, "density", name, 1.0)
            kept.append(naive.pruned(method, place, sparse, name, density, options))
            weights.append(self.setting(parameters, "weight", name, 1.0))
        merged = naive.combined(method, kept, weights, options)
        assert merged is not None
        lam = np.float32(self.setting({}, "lambda", name, 1.0))
        for position, value in merged.items():
            base[position] += np.float32(value) * lam
        return base
