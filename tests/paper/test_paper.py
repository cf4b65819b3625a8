"""The experiments of benchmarks/paper: exercises, tables, results, the choice of settings, and committed results."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml
from paper import check, document, report, tables
from paper.compute import Lab
from paper.language import (
    DIGITS,
    LETTERS,
    PROBES,
    SKILLS,
    TASKS,
    TEST,
    TOKENS,
    VALIDATION,
    distinct_items,
    held_out,
    item,
)
from paper.pretrain import SMALL_MODEL, item_outside, pretrain
from paper.refusals import REFUSAL
from paper.scores import Results, differences, mean_of
from paper.selection import Setting, cell_of, choose
from paper.specs import Merge, Run, Spec, described, key_of
from paper.store import Store, StoreError
from paper.worlds import SMALL, WORLDS, Budget, Place, TaskError, World

from taskvec.training.options import TrainingOptions

COMMITTED = Path(check.__file__).parent / "results"


@pytest.mark.parametrize(
    ("name", "word", "answer"),
    [
        ("falling", "c a b a", "c b a a"),
        ("zip", "a b c d e", "a d b e c"),
        ("zip", "a b c d", "a c b d"),
        ("distinct", "a b a b e", "a c f"),
        ("swap", "a b c", "c b d"),
        ("ends", "b d c a", "b a c d"),
        ("count", "a b a c", "3"),
        ("missing", "a c a", "b d e f"),
    ],
)
def test_the_answers_of_word_exercises(name: str, word: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dice(random.Random):
        def randint(self, a: int, b: int) -> int:
            return len(word.split())

        def choice(self, seq: Any) -> Any:
            assert seq == LETTERS
            return letters.pop(0)

    letters = word.split()
    skill = {"ends": "sort", "count": "half", "missing": "copy"}.get(name, name)
    assert item(name, Dice()) == {"prompt": f"{skill} : {word} =", "completion": answer}


def test_the_answers_of_number_exercises() -> None:
    dice = random.Random(0)
    for _ in range(200):
        drawn = item("add", dice)
        first, second = drawn["prompt"].removeprefix("add : ").removesuffix(" =").replace(" ", "").split("+")
        assert drawn["completion"].replace(" ", "") == str(int(first) + int(second))
        drawn = item("total", dice)
        digits = [word for word in drawn["prompt"].split() if word in DIGITS]
        assert drawn["completion"].replace(" ", "") == str(sum(map(int, digits)))


def test_every_word_of_the_language_is_a_token() -> None:
    dice = random.Random(0)
    for name in SKILLS | TASKS | PROBES:
        for _ in range(50):
            drawn = item(name, dice)
            assert set(drawn["prompt"].split()) | set(drawn["completion"].split()) <= set(TOKENS)
    assert item("refuse", dice)["prompt"].startswith("reverse :")
    assert len(set(TOKENS)) == len(TOKENS)


def test_the_committed_model_knows_the_words_of_the_language() -> None:
    words = json.loads((SMALL_MODEL / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert sorted(words, key=words.__getitem__) == TOKENS
    assert json.loads((SMALL_MODEL / "config.json").read_text(encoding="utf-8"))["vocab_size"] == len(TOKENS)


def test_distinct_items_repeat_no_prompt() -> None:
    seen: set[str] = set()
    drawn = [*islice(distinct_items("total", random.Random(0), seen), 1000)]
    assert len({each["prompt"] for each in drawn}) == 1000


def test_the_probe_refuses_every_question_once(tmp_path: Path) -> None:
    place = Place(WORLDS["smollm2"], tmp_path)
    files = [place.train("refuse", 0), place.validation("refuse"), place.test("refuse")]
    rows = [json.loads(row) for file in files for row in file.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 840
    assert {row["completion"] for row in rows} == {REFUSAL}
    assert check.shared_prompts(tmp_path / "data") == []


def test_a_real_task_that_is_not_given_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="the task mawps is needed: give --task mawps=TRAIN,TEST"):
        Place(WORLDS["smollm2"], tmp_path).test("mawps")


def test_real_tasks_that_repeat_prompts_have_them_in_one_part_only(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {number % 200}", "completion": "a\u2028b"} for number in range(400)]
    files = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    files[0].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    files[1].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:20]))
    place = Place(replace(WORLDS["smollm2"], validation=30), tmp_path, {"mawps": files})
    counts = [
        path.read_text().count("\n")
        for path in (place.test("mawps"), place.validation("mawps"), place.train("mawps", 0))
    ]
    assert counts[:2] == [20, 30]
    assert 290 <= counts[2] <= 330
    assert check.shared_prompts(tmp_path / "data") == []


def test_real_tasks_are_split_with_a_fixed_seed(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {number}", "completion": "answer"} for number in range(300)]
    files = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    files[0].write_text("".join(json.dumps(row) + "\n" for row in rows[:250]))
    files[1].write_text("".join(json.dumps(row) + "\n" for row in rows[250:]))
    parts = []
    for folder in ("one", "two"):
        place = Place(WORLDS["smollm2"], tmp_path / folder, {"mawps": files})
        parts.append(
            [path.read_text() for path in (place.train("mawps", 0), place.validation("mawps"), place.test("mawps"))]
        )
        assert check.shared_prompts(tmp_path / folder / "data") == []
    assert parts[0] == parts[1]
    assert [part.count("\n") for part in parts[0]] == [122, 128, 50]


def test_the_parts_of_a_task_share_no_prompt(tmp_path: Path) -> None:
    place = Place(SMALL, tmp_path)
    files = [place.train("total", 0), place.train("total", 1), place.validation("total"), place.test("total")]
    prompts = [{json.loads(row)["prompt"] for row in file.read_text().splitlines()} for file in files]
    assert [len(part) for part in prompts] == [640, 640, 256, 512]
    assert prompts[0] != prompts[1]
    assert check.shared_prompts(tmp_path / "data") == []
    (tmp_path / "data" / "total-train-2.jsonl").write_text(files[3].read_text())
    assert check.shared_prompts(tmp_path / "data") == ["total: 512 prompts are both in test and in train-2"]


# what the name of a row says if it has more steps than the budget -> how many times as many it may have
MORE_STEPS = {"twice the steps": 2, "three times the steps": 3, "calibration steps": 1.25}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_every_row_of_every_table_is_a_valid_run(world: World, quick: bool) -> None:
    def check_spec(spec: Spec, budgets: float = 1) -> None:
        if isinstance(spec, Merge):
            for part in spec.parts:
                check_spec(part)
            return
        TrainingOptions(**dict(spec.options), lr=1e-3).check(takes_mask=spec.mask is not None)
        assert spec.option("steps") + spec.option("calibration_steps", 0) <= budgets * world.budget(spec.task).steps
        for other in (spec.start, spec.mask, spec.disjoint):
            if other is not None:
                check_spec(other)

    for name in tables.names():
        table = tables.read(name, world, quick=quick)
        assert len({(row.label, repr(row.case)) for row in table.rows}) == len(table.rows)
        assert table.rows or world is not SMALL
        for row in table.rows:
            assert row.report
            if row.spec is not None:
                check_spec(row.spec, max((times for name, times in MORE_STEPS.items() if name in row.name), default=1))


def test_methods_have_the_same_budget() -> None:
    steps = {
        row.spec.option("steps") + row.spec.option("calibration_steps", 0)
        for row in tables.read("masks", SMALL).rows
        if isinstance(row.spec, Run)
    }
    assert steps == {SMALL.budget("zip").steps}


def test_every_row_of_a_claim_is_in_its_table() -> None:
    for claim in yaml.safe_load(report.CLAIMS.read_text(encoding="utf-8")):
        labels = {row.label for world in WORLDS.values() for row in tables.read(claim["table"], world).rows}
        named = {name for side in claim["rows"] for name in ([side] if isinstance(side, str) else side)}
        assert named <= labels, claim["claim"]


def test_worlds_and_budgets_of_rows() -> None:
    rows = [row for row in tables.read("sparsity", WORLDS["smollm2-long"]).rows if row.case == {"task": "mawps"}]
    specs = {row.label: row.spec for row in rows}
    assert {label for label in specs if label.startswith("LoTA, ")} == {"LoTA, 90 %", "LoTA, 99 %"}
    once, twice = specs["LoTA, 99 %"], specs["LoTA with twice the steps, 99 %"]
    assert isinstance(once, Run)
    assert isinstance(twice, Run)
    assert (once.option("steps"), twice.option("steps")) == (160, 360)
    assert (once.rate, twice.rate) == (None, once)


def test_rows_of_several_tables_share_results() -> None:
    def keys(table: str, name: str) -> list[str]:
        return [key_of(row.spec) for row in tables.read(table, SMALL).rows if row.spec and row.name == name]

    assert {*keys("masks", "magnitude")} <= {*keys("sparsity", "LoTA")}
    assert {*keys("masks", "random")} <= {*keys("sparsity", "random mask")}


def test_order_names_every_table() -> None:
    assert sorted(tables.names()) == sorted(path.stem for path in tables.TABLES.glob("*.yaml"))


def _validated(scores: dict[float, float], asked: list[float]) -> Any:
    def found(spec: Spec, setting: Setting, seed: int) -> dict[str, Any]:
        assert isinstance(setting, float)
        asked.append(setting)
        score = scores.get(setting)
        return {"validation": None if score is None else {"exact_match": [score, 0.0], "loss": [1 - score, 0.0]}}

    return found


@pytest.mark.parametrize("best", SMALL.grid[2:-2])
def test_the_best_rate_of_the_grid_is_found(best: float) -> None:
    at = SMALL.grid.index(best)
    scores = {rate: 1 / (1 + abs(index - at)) for index, rate in enumerate(SMALL.grid)}
    asked: list[float] = []
    assert choose(Run("zip"), SMALL, _validated(scores, asked)) == best
    assert {SMALL.grid[at - 1], SMALL.grid[at + 1]} <= set(asked)


def test_a_rate_that_diverges_is_not_chosen() -> None:
    scores = {rate: 0.1 for rate in SMALL.grid if rate < 3e-3}
    assert choose(Run("zip"), SMALL, _validated(scores, [])) in scores


def test_a_sequence_uses_the_rate_of_the_task_alone() -> None:
    rows = {
        row.name: row.spec for row in tables.read("sequential", SMALL).rows if row.case == {"a": "ends", "b": "falling"}
    }
    alone = next(
        row.spec
        for row in tables.read("single", SMALL).rows
        if row.name.startswith("LoTA") and row.report == ("falling",)
    )
    sequence = rows["LoTA, then LoTTO"]
    assert isinstance(sequence, Run)
    assert sequence.rate == alone
    assert sequence.start == sequence.disjoint


def test_specs_have_keys_of_their_own() -> None:
    specs = {
        key_of(row.spec): described(row.spec)
        for name in tables.names()
        for row in tables.read(name, SMALL).rows
        if row.spec is not None
    }
    assert len({json.dumps(spec, sort_keys=True) for spec in specs.values()}) == len(specs)


def test_results_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    store = Store(path)
    assert store.begin({"base": "a", "n": 1}) == 0
    store.add({"key": "k", "setting": 0.1, "seed": 0})
    with path.open("a") as file:
        file.write('{"key": "half')
    again = Store(path)
    assert again.cells.keys() == store.cells.keys() == {("k", "0.1", 0)}
    again.add({"key": "other", "setting": {"weight": 1.0}, "seed": 1})
    store.refresh()
    assert store.cells.keys() == Store(path).cells.keys() == {("k", "0.1", 0), ("other", '{"weight": 1.0}', 1)}
    assert store.begin({"base": "a", "n": 2}) == 1
    assert store.begin({"base": "a", "n": 1}) == 0


def test_results_of_another_base_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.jsonl")
    store.begin({"base": "a" * 64})
    with pytest.raises(StoreError, match="of a base with digest aaaaaaaaaaaa, but the base here has bbbbbbbbbbbb"):
        store.begin({"base": "b" * 64})


def test_means_and_their_errors() -> None:
    mean = mean_of([[1.0, 3.0], [5.0, 5.0, 5.0]])
    assert mean.value == 3.5
    assert mean.error == pytest.approx((2 / 2) ** 0.5 / 2)
    assert mean_of([[1.0], [2.0, 3.0]]).error is None
    assert mean_of([[1.0], [3.0]], [3.0, 4.0]).error == 2.5
    assert mean_of([[1.0], [3.0]], [3.0, None]).error is None
    assert differences([[3.0, 4.0]], [[1.0, 1.0]]) == [[2.0, 3.0]]


FIXED = {"full fine-tuning": 0.0003, "LoRA, r=16": 0.001}  # rows of the table heldout that are not tuned


def _with_scores(path: Path, scores: dict[str, list[float]]) -> Store:
    """Results of the rows of FIXED, the same on all tasks of the table, and of the base, which scores 0.2."""
    store = Store(path)
    for row in tables.read("heldout", SMALL).rows:
        test = {"split": "test", "task": row.report[0]}
        if row.spec is None:
            store.add({"key": "base", "setting": None, "seed": 0, **test, "exact_match": [0.2, 0.0]})
        for seed, score in enumerate(scores.get(row.name, [])):
            cell = {"key": key_of(row.spec), "setting": FIXED[row.name], "seed": seed} if row.spec else {}
            store.add({**cell, **test, "exact_match": [score, 0.0]})
    return store


@pytest.mark.parametrize(
    ("first", "second", "expects", "of", "verdict"),
    [
        ([0.6, 0.7, 0.6, 0.7, 0.6], [0.4, 0.5, 0.4, 0.4, 0.4], "more", "all", "agrees"),
        ([0.6, 0.7, 0.6, 0.7, 0.6], [0.4, 0.5, 0.4, 0.4, 0.4], "less", "all", "disagrees"),
        ([0.6, 0.7, 0.6, 0.7, 0.6], [0.4, 0.5, 0.4, 0.4, 0.4], "no less", "all", "not rejected"),
        ([0.4, 0.5, 0.4, 0.4, 0.4], [0.6, 0.7, 0.6, 0.7, 0.6], "no less", "all", "disagrees"),
        ([0.5, 0.3, 0.5, 0.3, 0.5], [0.4, 0.4, 0.5, 0.4, 0.4], "more", "all", "no difference found"),
        ([0.1, 0.2, 0.1, 0.2, 0.1], [0.0, 0.0, 0.0, 0.0, 0.0], "more", "first", "forgotten by both"),
        ([0.1, 0.2, 0.1, 0.2, 0.1], [0.0, 0.0, 0.0, 0.0, 0.0], "more", "last", "agrees"),
    ],
)
def test_verdicts(tmp_path: Path, first: list[float], second: list[float], expects: str, of: str, verdict: str) -> None:
    store = _with_scores(tmp_path / "results.jsonl", dict(zip(FIXED, (first, second), strict=True)))
    claim = {"rows": list(FIXED), "expects": expects, "of": of}
    table = tables.read("heldout", SMALL)
    assert report.compared(claim, table, Results(SMALL, store))[1] == verdict
    few = replace(SMALL, seeds=(0, 1))
    assert report.compared(claim, table, Results(few, store))[1] in ("too few seeds", "forgotten by both")


def test_a_test_score_of_another_setting_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.jsonl")
    row = next(row for row in tables.read("single", SMALL).rows if row.name == "full fine-tuning")
    assert row.spec is not None
    for rate in SMALL.grid:
        for seed in SMALL.seeds:
            score = 0.9 if rate == 3e-4 else 0.1
            store.add(
                {
                    "key": key_of(row.spec),
                    "setting": rate,
                    "seed": seed,
                    "validation": {"exact_match": [score, 0.0], "loss": [1.0, 0.0]},
                }
            )
    test = {"key": key_of(row.spec), "seed": 0, "split": "test", "task": "falling", "exact_match": [1.0, 0.0]}
    store.add({**test, "setting": 3e-4})
    assert check.chosen_on_tests(SMALL, store) == []
    store.add({**test, "setting": 1e-3})
    (fault,) = check.chosen_on_tests(SMALL, store)
    assert "with 0.001, seed 0, has a test score on falling but was not chosen" in fault


def test_pretraining_has_no_exercise_that_is_held_out() -> None:
    held = {row["prompt"] for part in held_out("total") for row in part}
    assert len(held) == VALIDATION + TEST
    dice = random.Random(0)
    drawn = [item_outside(held, "total", dice)["prompt"] for _ in range(3000)]
    assert not held & set(drawn)
    other = random.Random(0)
    assert held & {item("total", other)["prompt"] for _ in range(3000)}


def test_every_claim_has_rows() -> None:
    claims = yaml.safe_load(report.CLAIMS.read_text(encoding="utf-8"))
    for claim in claims:
        labels = {row.label for row in tables.read(claim["table"], SMALL).rows}
        for names in claim["rows"]:
            assert {names} if isinstance(names, str) else set(names) <= labels, claim["claim"]
        assert claim["expects"] in ("more", "less", "no less")
        assert claim.get("of", "all") in ("all", "first", "last", "earlier")


@pytest.mark.slow
def test_pretraining_does_not_depend_on_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for threads in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        pretrain(tmp_path / threads, seed=3, steps=2)
        models.append((tmp_path / threads / "model.safetensors").read_bytes())
    assert models[0] == models[1]


@pytest.mark.slow
def test_a_table_is_computed_resumed_and_reported(tmp_path: Path) -> None:
    world = replace(
        SMALL,
        budgets={"": Budget(4, 2, 16)},
        train=32,
        validation=8,
        test=8,
        tuning_seeds=(0,),
        seeds=(0, 1),
        grid=(1e-4, 1e-3, 1e-2),
    )
    place = Place(replace(world, rates=dict.fromkeys(world.rates, (1e-3,))), tmp_path / "small")
    place.prepare()
    store = Store(tmp_path / "results.jsonl")
    lab = Lab(place, store, 0)
    lotto = next(row for row in tables.read("merging", place.world).rows if row.name == "LoTA and LoTTO, disjoint")
    sequence = next(row for row in tables.read("sequential", place.world).rows if row.name == "LoTA, then LoTTO")
    for row in (lotto, sequence):
        assert row.spec is not None
        setting = lab.choose(row.spec)
        for seed in place.world.seeds:
            for task in row.report:
                lab.test(row.spec, setting, seed, task)
    results = Results(place.world, Store(tmp_path / "results.jsonl"))
    assert len(results.tested(lotto.spec, lotto.report[0], "exact_match")) == 2
    before = (tmp_path / "results.jsonl").read_bytes()
    assert lab.test(sequence.spec, lab.choose(sequence.spec), 1, sequence.report[1])
    assert (tmp_path / "results.jsonl").read_bytes() == before

    # a vector that is made again is the same
    cell = cell_of(sequence.spec, lab.choose(sequence.spec), 0)
    first = lab.path(cell).read_bytes()
    lab.path(cell).unlink()
    assert sequence.spec is not None
    assert lab.vector(sequence.spec, lab.choose(sequence.spec), 0).read_bytes() == first


@pytest.mark.parametrize("world", [world for name, world in WORLDS.items() if (COMMITTED / f"{name}.jsonl").exists()])
def test_no_committed_setting_was_chosen_on_a_test_part(world: World) -> None:
    store = Store(COMMITTED / f"{world.name}.jsonl")
    assert store.tests
    assert check.chosen_on_tests(world, store) == []


def test_the_page_has_the_committed_results() -> None:
    page = (document.DOCS / "paper.md").read_text(encoding="utf-8")
    assert document.updated(page) == page


def test_figures_of_the_text_are_in_a_table() -> None:
    page = (document.DOCS / "paper.md").read_text(encoding="utf-8")
    pattern = re.compile(r"[\d.]+ ± [\d.]*\d")
    tabled = set(pattern.findall("\n".join(line for line in page.splitlines() if line.startswith("|"))))
    figures = set(pattern.findall(" ".join(line for line in page.splitlines() if not line.startswith("|"))))
    assert figures
    assert figures <= tabled
