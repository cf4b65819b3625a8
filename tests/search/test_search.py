"""Search for the best merge: what is evaluated, what is reported, and what is refused."""

from __future__ import annotations

import itertools
import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import inside, ok, refused
from support.live import Small, loaded, on_disk, task
from support.models import ROWS, make_llama, make_mixtral, write_rows

from taskvec import TaskVector, apply, diff, evaluate, search_merge
from taskvec.applying.overlay import Patched
from taskvec.data.examples import read_examples
from taskvec.errors import UsageError
from taskvec.merging.settings import resolve
from taskvec.search.data import split
from taskvec.search.search import Search
from taskvec.search.space import Candidate, Space

pytestmark = pytest.mark.slow

pytest.importorskip("optuna")
QUICK: dict[str, Any] = {"trials": 7, "device": "cpu", "max_length": 64}


NUMBERS = ["one", "two", "three", "four"]


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Path]:
    """Two tasks of twelve different examples each."""
    rows = [{"prompt": f"{a} {b} is", "completion": f" {a}"} for a in NUMBERS for b in [*NUMBERS, "plus", "is"]]
    return {name: write_rows(tmp_path / f"{name}.jsonl", rows[n::2]) for n, name in enumerate(("one", "two"))}


def suggest(space: Space, **numbers: Any) -> Candidate:
    from optuna.trial import FixedTrial

    return space.suggest(FixedTrial({**space.plain, **numbers}))  # type: ignore[arg-type]


def test_the_values_are_those_of_models_that_are_written(small: Small, sets: dict[str, Path], tmp_path: Path) -> None:
    _, base, files = small
    files = [files[0], task(base.path, tmp_path / "third.lota", slice(None), seed=7)]
    found = search_merge(files, base.path, sets, **QUICK)
    assert [row.number for row in found.trials] == list(range(7))
    assert found.vector is not None
    best = min((row for row in found.trials if row.values), key=lambda row: row.values)
    assert found.best[0].trial == best.number
    candidate = found.candidate(best.number)

    # on the examples that were searched on, and on those that were held out
    parts = split(sets, 0.5)
    written = []
    for part in ("chosen_on", "reported_on"):
        losses = []
        for each in parts:
            rows = [{"prompt": e.messages[0]["content"], "completion": e.completion} for e in getattr(each, part)]
            data = write_rows(tmp_path / f"{part}-{each.name}.jsonl", rows)
            model = tmp_path / f"model-{len(written)}"
            if not model.exists():
                merged = candidate.merged([TaskVector.open(file) for file in files], base)
                merged.save(tmp_path / "m.lota", force=True)
                apply(tmp_path / "m.lota", base, model)
            losses.append(evaluate(model, data, metrics=["loss"], device="cpu", max_length=64).metrics["loss"])
        written.append(losses)
    assert best.values == pytest.approx((sum(loss.value for loss in written[0]) / 2,), rel=1e-6)
    for name, loss in zip(sets, written[1], strict=True):
        assert found.best[0].metrics[name].value == pytest.approx(loss.value, rel=1e-6)
        assert found.best[0].metrics[name].standard_error == pytest.approx(loss.standard_error, rel=1e-6)
    mean = sum(found.best[0].plain[name].value - found.best[0].metrics[name].value for name in sets) / 2
    assert found.best[0].gain.value == pytest.approx(mean, rel=1e-6)
    record = found.vector.provenance["search"]
    assert record["trial"] == best.number
    assert record["data"]["one"]["files"][0]["name"] == "one.jsonl"
    assert (record["data"]["one"]["chosen_on"], record["data"]["one"]["reported_on"]) == (6, 6)


def test_the_seed_makes_it_reproducible_also_in_pieces(small: Small, sets: dict[str, Path], tmp_path: Path) -> None:
    _, base, files = small
    whole = search_merge(files, base.path, sets, seed=3, **QUICK)
    study = tmp_path / "study.db"
    for trials in (2, 5, 7):
        again = search_merge(files, base.path, sets, seed=3, study=study, **{**QUICK, "trials": trials})
        assert len(again.trials) == trials
    for one, other in zip(whole.trials, again.trials, strict=True):
        assert (one.candidate, one.values, one.state) == (other.candidate, other.values, other.state)
    assert again.best == whole.best
    other = search_merge(files, base.path, sets, seed=4, **QUICK)
    assert [row.candidate for row in other.trials[1:]] != [row.candidate for row in whole.trials[1:]]
    with pytest.raises(UsageError, match=r"study\.db is the study of another search: seed is 3 there, but 4 here"):
        search_merge(files, base.path, sets, seed=4, study=study, **QUICK)
    with pytest.raises(UsageError, match="is the study of another search: it has other vectors"):
        search_merge(files[::-1], base.path, sets, seed=3, study=study, **QUICK)


def test_an_interrupted_trial_is_repeated(
    small: Small, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, files = small
    whole = search_merge(files, base.path, sets, **QUICK)
    study = tmp_path / "s?mode=memory #%41.db"  # no part of it has a meaning
    switch, calls = Search._switch, itertools.count()
    stops = {1, 5}  # the first one is that of `begin`

    def stopping(self: Search, vector: TaskVector) -> None:
        if next(calls) in stops:
            raise KeyboardInterrupt
        switch(self, vector)

    monkeypatch.setattr(Search, "_switch", stopping)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            search_merge(files, base.path, sets, study=study, **QUICK)
    stops.clear()
    again = search_merge(files, base.path, sets, study=study, **QUICK)
    assert study.exists()
    assert [(row.candidate, row.values) for row in again.trials] == [
        (row.candidate, row.values) for row in whole.trials
    ]


def test_a_merge_that_fails_does_not_end_the_search(small: Small, sets: dict[str, Path], tmp_path: Path) -> None:
    _, base, files = small
    files = [files[0], task(base.path, tmp_path / "third.lota", slice(None), seed=7)]
    found = search_merge(files, base.path, sets, methods=["linear", "disjoint"], **QUICK)
    failed = [row for row in found.trials if row.state == "failed"]
    assert len(found.trials) == 7
    assert failed
    for row in failed:
        assert row.candidate.method == "disjoint"
        assert row.error is not None
        assert "more than one vector" in row.error
    assert found.candidate(found.best[0].trial).method == "linear"
    asked = [
        "search",
        *files,
        "--base",
        base.path,
        f"--data=one={sets['one']}",
        "--trials",
        "2",
        "--method",
        "disjoint",
    ]
    done = inside(*asked, "--device", "cpu", "-o", tmp_path / "x.lota")
    assert done.returncode == 1
    assert done.stdout.startswith("2 trials, 0 of them pruned, 2 failed\ntrial 0 failed: disjoint")
    assert done.stderr == "taskvec: no trial was completed, so there is no best merge, and none is written\n"
    assert not (tmp_path / "x.lota").exists()


def test_a_result_does_not_need_plain_ties(small: Small, sets: dict[str, Path], tmp_path: Path) -> None:
    """The sum of two vectors overflows, with smaller weights it does not."""
    _, base, _ = small
    files = []
    for n, name in enumerate(("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight")):
        state = loaded(base.path).state_dict()
        state[name][:] = 3e18 * 10 ** (1 - n)
        files.append(tmp_path / f"large{n}.lota")
        diff(base, {name: state[name] for name in base.tensors}).save(files[-1])
    found = search_merge(files, base.path, sets, methods=["linear"], **{**QUICK, "trials": 12})
    assert found.trials[0].state == "failed"
    asked = ["search", *files, "--base", base.path, f"--data=one={sets['one']}", "--trials", 12, "--device", "cpu"]
    done = inside(*asked, "--method", "linear", "-o", tmp_path / "x.lota")
    assert found.plain_error is not None
    assert found.best[0].gain is None
    assert not found.best[0].is_better
    assert "plain TIES cannot be evaluated, so nothing is compared with it" in done.stdout
    assert (tmp_path / "x.lota").exists()


def test_several_objectives_give_a_front(small: Small, sets: dict[str, Path]) -> None:
    _, base, files = small
    found = search_merge(files, base.path, sets, pareto=True, **QUICK)
    values = {row.number: row.values for row in found.trials}
    front = [each.trial for each in found.best]
    for number, own in values.items():
        better = [o for o in values.values() if o != own and all(a <= b for a, b in zip(o, own, strict=True))]
        assert (number in front) == (not better)
    assert all(row.state == "complete" for row in found.trials)


@pytest.mark.parametrize("by", [None, "layer-thirds", "module"])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "breadcrumbs"])
def test_a_candidate_is_its_recipe(by: str | None, method: str, small: Small, tmp_path: Path) -> None:
    _, base, files = small
    vectors = [TaskVector.open(file) for file in files]
    space = Space(vectors, [method], by)
    names = [name for name in space.plain if name.startswith("weight")]
    numbers = {name: round(0.05 * (3 + n), 2) for n, name in enumerate(names)}
    candidate = suggest(space, method=method, **numbers, **{"lambda": 0.8})
    assert [number for each in candidate.numbers for number in each] == list(numbers.values())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(candidate.recipe([str(file) for file in files], str(base.path))))
    ok("merge", "--recipe", recipe, "-o", tmp_path / "x.lota")
    assert on_disk(Patched(base, TaskVector.open(tmp_path / "x.lota"))) == on_disk(
        Patched(base, candidate.merged(vectors, base))
    )


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs", "magnitude_prune"])
def test_kept_is_a_share_of_the_entries_of_a_sparse_vector(method: str, small: Small) -> None:
    """With `kept` 1 nearly all entries are kept and not rescaled, with less a share of them."""
    _, base, files = small
    sparse = [TaskVector.open(file).shrink(0.98) for file in files]
    space = Space(sparse, [method])
    entries = sum(len(sparse[0][name]) for name in sparse[0])
    largest = max(abs(sparse[0][name].values).max() for name in sparse[0] if len(sparse[0][name]))
    shares = []
    for kept in (1.0, 0.5):
        merged = suggest(space, **{"weight 2": 0.0}, kept=kept).merged(sparse, base)
        values = [merged[name].values for name in merged]
        shares.append(sum(len(each) for each in values) / entries)
        factor = 1 / kept if method.startswith("dare") else 1
        assert max(abs(each).max() for each in values if len(each)) <= largest * factor * 1.0001
    assert shares[0] == 1 if method in ("ties", "dare_ties", "magnitude_prune") else shares[0] > 0.9
    assert shares[0] >= shares[1] > 0.2
    if method in ("ties", "dare_ties"):
        assert shares[1] < 0.7


def test_groups_of_experts_are_those_that_filters_can_name(tmp_path: Path) -> None:
    base = make_mixtral(tmp_path / "base")
    vectors = [TaskVector.open(task(base, tmp_path / f"{n}.lota", slice(n, None, 2), seed=n)) for n in range(2)]
    space = Space(vectors, ["linear"], "module")
    numbers = {
        f"weight {n} of {group}": round(0.05 * (1 + m), 2) for n in (1, 2) for m, group in enumerate(space.groups)
    }
    weights = suggest(space, **numbers).weights[0]
    used = {name: resolve(weights, name, 0.0) for name in vectors[0].specs}
    assert set(used.values()) == set(numbers.values())  # each number has an effect
    for name, weight in used.items():
        group = list(space.groups)[round(weight / 0.05) - 1]
        assert group == "other tensors" or f".{group}." in name
        assert (group == "other tensors") == (".layers." not in name)


def test_groups_cover_all_tensors(small: Small) -> None:
    _, _, files = small
    vectors = [TaskVector.open(file) for file in files]
    thirds, modules = (Space(vectors, ["linear"], by) for by in ("layer-thirds", "module"))
    assert list(thirds.groups) == ["first third", "second third", "other tensors"]  # of two layers
    candidate = suggest(
        thirds,
        **{f"weight {n} of {group}": 0.25 * (1 + m) for n in (1, 2) for m, group in enumerate(thirds.groups)},
    )
    expected = {"model.layers.0.mlp.up_proj.weight": 0.25, "model.layers.1.self_attn.q_proj.weight": 0.5}
    for name, weight in {**expected, "model.embed_tokens.weight": 0.75, "model.norm.weight": 0.75}.items():
        assert resolve(candidate.weights[0], name, 0.0) == weight
    assert "self_attn.q_proj" in modules.groups
    assert list(modules.groups)[-1] == "other tensors"
    assert set(Space(vectors, ["ties"]).plain) == {"method", "weight 1", "weight 2", "lambda", "kept"}


def test_the_command_writes_what_it_found(small: Small, sets: dict[str, Path], tmp_path: Path) -> None:
    _, base, files = small
    asked = ["search", *files, "--base", base.path, *(f"--data={name}={path}" for name, path in sets.items())]
    asked += ["--trials", "5", "--device", "cpu", "--metric", "rouge1", "--max-new-tokens", "4"]
    outputs = [tmp_path / name for name in ("best.lota", "best.yaml", "trials.png")]
    written = [word for pair in zip(("-o", "--recipe", "--plot"), outputs, strict=True) for word in pair]
    report = json.loads(ok(*asked, *written, "--json"))
    assert report["written"] == list(map(str, outputs))
    assert [trial["number"] for trial in report["trials"]] == list(range(5))
    assert report["best"][0]["held_out"].keys() == {"one", "two"}
    ok("merge", "--recipe", outputs[1], "-o", tmp_path / "again.lota")
    again, best = (TaskVector.open(path) for path in (tmp_path / "again.lota", outputs[0]))
    assert on_disk(Patched(base, again)) == on_disk(Patched(base, best))
    assert best.provenance["search"]["metric"] == "rouge1"
    assert outputs[2].stat().st_size > 1000
    said = ok(*asked)
    assert "5 trials, " in said
    assert "On the examples that were held out" in said
    assert (
        f"trial {report['best'][0]['trial']} is no better than plain TIES: the gain is " in said or "is better" in said
    )
    assert "--force replaces it" in refused(2, *asked, "-o", outputs[0])


def completed(study: Path) -> int:
    """The number of trials in a study that is being written."""
    if not study.exists():
        return 0
    with closing(sqlite3.connect(study)) as connection, suppress(sqlite3.OperationalError):
        count: int = connection.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone()[0]
        return count
    return 0


@pytest.mark.parametrize("number", range(3))
def test_what_was_found_is_kept_after_a_signal(
    number: int, small: Small, sets: dict[str, Path], tmp_path: Path
) -> None:
    """SIGTERM, because SIGINT is ignored if the tests run in the background."""
    _, base, files = small
    study, recipe = tmp_path / "s.db", tmp_path / "best.yaml"
    command = [sys.executable, "-c", "from taskvec_cli.main import main; main()", "search", *files, "--base", base.path]
    command += [f"--data={name}={path}" for name, path in sets.items()]
    command += ["--trials", "100000", "--device", "cpu", "--study", study, "--recipe", recipe]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while completed(study) < 3:
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(0.037 * number)  # at different moments of a trial
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert errors.endswith("taskvec: terminated; the result of the trials until now was kept\n")
    assert "On the examples that were held out" in said
    assert yaml.safe_load(recipe.read_text())["base_model"] == str(base.path)


def test_requests_are_refused_before_the_model_is_loaded(small: Small, sets: dict[str, Path], tmp_path: Path) -> None:
    _, base, files = small
    (tmp_path / "text.db").write_text("not a study" * 1000)
    few = write_rows(tmp_path / "few.jsonl", ROWS[:3])
    calls = tmp_path / "calls.jsonl"
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    calls.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [{"messages": messages}, *({"prompt": name, "completion": "b"} for name in "abcdefghi")]
        )
    )
    other = task(make_llama(tmp_path / "other", seed=9), tmp_path / "foreign.lota", slice(None), seed=1)
    asked = ["search", *files, "--base", base.path]
    one = ["--data", f"one={sets['one']}"]
    for arguments, message in (
        ([*asked, "--data", sets["one"]], "--data needs a name of letters, digits"),
        ([*asked, *one, *one], "two --data have the name 'one'"),
        ([*asked, *one, "--pareto"], "--pareto needs the data of at least two tasks"),
        ([*asked, "--data", f"few={few}"], "3 examples are too few: with --holdout 0.5, 2 of them are reported on"),
        ([*asked, *one, "--holdout", "1"], "--holdout must be between 0 and 1, both excluded; found 1.0"),
        ([*asked, *one, "--trials", "0"], "--trials must be greater than zero, found 0"),
        ([*asked, *one, "--by", "row"], "--by is one of layer-thirds, module, found 'row'"),
        ([*asked, *one, "--method", "slerp"], "slerp"),
        ([*asked, *one, "--metric", "bleu"], "--metric is one of loss, exact_match, rouge1"),
        ([*asked, *one, "--timeout", "0"], "--timeout must be greater than zero"),
        ([*asked, "--data", f"calls={calls}", "--metric", "rouge1"], "calls.jsonl:1: the last turn calls tools"),
        (["search", files[0], "--base", base.path, *one], "a search needs at least two vectors, found 1"),
        ([*asked, *one, "--study", tmp_path / "text.db"], "text.db is not an Optuna study in SQLite"),
    ):
        assert message in refused(2, *arguments)
    with closing(sqlite3.connect(tmp_path / "foreign.db")) as connection:
        connection.execute("CREATE TABLE precious (x)")
    for arguments, message in (
        (
            ["--study", tmp_path / "foreign.db"],
            "foreign.db is a database of another program: it has the table 'precious'",
        ),
        (["--method", "auto"], "the method auto is not searched"),
        (["--method", "average"], "the method average is not searched: it is linear with other weights"),
        (["--recipe", sets["one"], "--force"], "is an input: choose another output path"),
    ):
        assert message in refused(2, *asked, *one, *arguments)
    with pytest.raises(UsageError, match="at least one task"):
        search_merge(files, base.path, {})
    mixed = ["search", files[0], other, "--base", base.path, *one]
    assert "have different bases" in refused(1, *mixed)


def test_what_is_reported_on_was_not_searched_on(tmp_path: Path) -> None:
    """Equal examples, of one task or of several, are in the same part."""
    rows = [{"prompt": f"{a} {b}", "completion": a} for a in NUMBERS for b in NUMBERS]
    paths = {"a": rows, "same": rows, "half": rows[:8], "twice": rows[4:] + rows[:6], "copies": rows[:8] * 2}
    data = {name: write_rows(tmp_path / f"{name}.jsonl", each) for name, each in paths.items()}
    for seed in range(5):
        parts = split(data, 0.3, seed=seed)
        chosen, reported = (
            {(example.messages[0]["content"], example.completion) for task in parts for example in getattr(task, part)}
            for part in ("chosen_on", "reported_on")
        )
        assert not chosen & reported
        assert {part.name: len(part.chosen_on) + len(part.reported_on) for part in parts} == {
            name: len(each) for name, each in paths.items()
        }
    assert [e.where.split(":")[1] for e in parts[0].reported_on] == [
        e.where.split(":")[1] for e in parts[1].reported_on
    ]


def test_the_division_of_the_data_depends_on_the_seed(sets: dict[str, Path]) -> None:
    one, two = split(sets, 0.25, seed=1)
    assert (len(one.chosen_on), len(one.reported_on)) == (9, 3)
    whole = sorted(example.where for example in read_examples(sets["one"]))
    assert sorted(example.where for example in (*one.chosen_on, *one.reported_on)) == whole
    assert [e.where for e in split(sets, 0.25, seed=1)[0].reported_on] == [e.where for e in one.reported_on]
    others = [split(sets, 0.25, seed=seed)[0].reported_on for seed in range(2, 6)]
    assert any([e.where for e in each] != [e.where for e in one.reported_on] for each in others)
    assert len(split(sets, 0.5, limit=4)[1].reported_on) == 2
    assert two.name == "two"
    few = write_rows(sets["one"].with_name("few.jsonl"), ROWS[:1])
    with pytest.raises(UsageError, match="1 example is too few"):
        split({"few": few}, 0.5)
    same = write_rows(sets["one"].with_name("same.jsonl"), [ROWS[0]] * 9 + ROWS[1:3])
    with pytest.raises(UsageError, match=r"11 examples are too few.*at least 2 different ones"):
        split({"same": same}, 0.5)
