"""Recipes over whole folders: every tensor equals its dense definition, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.folder_oracle import Oracle
from support.peer_folders import METHODS, Case, by_taskvec, draw

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_writes_the_folder_that_its_dense_definition_says(method: str, tmp_path: Path) -> None:
    dice = np.random.default_rng(METHODS.index(method))
    for number in range(5):
        case: Case = draw(dice, method)
        folder = tmp_path / str(number)
        folder.mkdir()
        case.write(folder)
        found = by_taskvec(folder, folder / "out")
        oracle = Oracle(case)
        assert found.tensors.keys() == case.states["base"].keys()
        for name, info in found.tensors.items():
            if case.inner(name) != "F32":
                continue  # the definition is in f32; test_mergekit_results.py has merges in other dtypes
            expected = oracle.tensor(name)
            assert (info.dtype, info.shape) == (expected.dtype, expected.shape), (case.document, name)
            ours, theirs = (bits.view(info.dtype.real).astype(np.float64) for bits in (found.bits(name), expected.bits))
            assert np.array_equal(ours, theirs), (case.document, name)
