"""Recipes of every kind give the results of mergekit, frozen by `python -m support.recipe_cases --freeze`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.recipe_cases import CASES, DTYPES, FROZEN, digest_of, ours, write_models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=DTYPES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    """Folders with the models in one dtype: kind of models -> folder."""
    found = {}
    for kind in ("llama", "words"):
        found[kind] = tmp_path_factory.mktemp(kind)
        write_models(found[kind], kind, request.param)
    return request.param, found


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_gives_the_result_of_mergekit(name: str, folders: tuple[str, dict[str, Path]]) -> None:
    dtype, found = folders
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))["recipes"]
    folder = found[CASES[name].models]
    assert digest_of(ours(CASES[name], folder, f"ours-{list(CASES).index(name)}")) == frozen[f"{name}, {dtype}"]


def test_every_frozen_result_has_its_recipe() -> None:
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))["recipes"]
    assert frozen.keys() == {f"{name}, {dtype}" for name in CASES for dtype in DTYPES}
