"""Options of a run from a file: what wins, what is refused, and a run that is repeated from its own record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.building import sparse, vector_of
from support.commands import inside, ok, refused
from support.models import ROWS, make_llama, write_rows

from taskvec import TaskVector
from taskvec.errors import UsageError
from taskvec.training.config import Config
from taskvec_formats import ModelFolder

pytestmark = pytest.mark.slow

KINDS = {"steps": "int", "lr": "float", "low_memory": "bool", "mask": "str", "mix": "list", "via": "numbers"}
RECIPE = "--calibration-steps 2 --steps 4 --batch-size 2 --lr 1e-3 --device cpu --seed 3".split()


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def recorded(path: Path) -> dict[str, object]:
    options: dict[str, object] = TaskVector.open(path).provenance["run"]["options"]
    return options


def test_values_have_the_types_of_the_options(tmp_path: Path) -> None:
    text = "steps: 3\nlr: 1e-4\nlow-memory: true\nmask: random\nmix: [a:0.1, b:0.2]\n"
    config = Config.read(written(tmp_path / "c.yaml", text), KINDS)
    assert config.settings == {"steps": 3, "lr": 1e-4, "low_memory": True, "mask": "random", "mix": ["a:0.1", "b:0.2"]}
    assert type(config.settings["lr"]) is float
    assert config.record is None
    one = Config.read(written(tmp_path / "c.yaml", "mix: a:0.1\nsteps: null\nlr: 1\nlow_memory: false"), KINDS)
    assert one.settings == {"mix": ["a:0.1"], "lr": 1, "low_memory": False}
    for text, numbers in (("0.9", [0.9]), ("[9e-1, 0.99]", [0.9, 0.99])):
        assert Config.read(written(tmp_path / "c.yaml", f"via: {text}"), KINDS).settings == {"via": numbers}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown key 'stepz', expected an option of taskvec train; did you mean steps?"),
        ("steps: 3.0", "steps must be a whole number, found 3.0"),
        ("steps: true", "steps must be a whole number, found True"),
        ("steps: '3'", "steps must be a whole number, found '3'"),
        ("lr: fast", "lr must be a number, found 'fast'"),
        ("lr: true", "lr must be a number, found True"),
        ("low-memory: 1", "low-memory must be true or false, found 1"),
        ("mask: 3", "mask must be text, found 3"),
        ("mix: [a, 3]", "mix must be a list of texts, found ['a', 3]"),
        ("via: [0.9, most]", "via must be a list of numbers, found [0.9, 'most']"),
        ("low-memory: true\nlow_memory: true", "'low_memory' is given twice, with a hyphen and with an underscore"),
        ("force: true", "'force' cannot be set in a file: give `force` on the command line"),
        ("- steps", "expected a mapping of options, such as lr: 0.001, found ['steps']"),
        ("steps: &a 3", "line 1: anchors and aliases are not supported"),
        ("steps: 3\nsteps: 4", "is given twice"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", text)
    with pytest.raises(UsageError) as caught:
        Config.read(path, KINDS, ["force"])
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_file_that_is_missing_or_of_no_run_is_refused(vector: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"c\.yaml: no such file"):
        Config.read(tmp_path / "c.yaml", KINDS)
    with pytest.raises(UsageError, match=r"tuned\.lota contains no record of a run"):
        Config.read(vector, KINDS)


def test_a_whole_run_stands_in_a_file_and_the_command_line_wins(llama: Path, data: Path, tmp_path: Path) -> None:
    text = f"base: {llama}\ndata: {data}\noutput: {tmp_path / 'a.lota'}\nlr: 1e-3\ncalibration-steps: 2\nsteps: 9\n"
    config = written(tmp_path / "c.yaml", text + "batch_size: 2\ndevice: cpu\neval-split: 0.5\n")
    ok("train", "--config", config, "--steps", "2", "--lr", "1e-4")
    found = recorded(tmp_path / "a.lota")
    expected = {"steps": 2, "lr": 1e-4, "calibration_steps": 2, "batch_size": 2, "eval_split": 0.5}
    assert {key: found[key] for key in expected} == expected
    # what replaces an option of the file sets it aside
    ok("train", "--config", config, "--epochs", "1", "--eval-data", data, "-o", tmp_path / "b.lota")
    provenance = TaskVector.open(tmp_path / "b.lota").provenance
    assert provenance["steps"] == 2, "one pass over four examples, two at a time"
    assert (provenance["run"]["options"]["steps"], provenance["run"]["options"]["eval_split"]) == (None, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 2\nepochs: 3\n", "--epochs has no effect together with --steps"),
        ("rank: 64\n", "--rank has no effect without --method lora"),
        ("relative-to: base\n", "--relative-to has no effect without --start-from"),
        ("mask: random\ncalibration-steps: 20\n", "--calibration-steps has no effect here: --mask random needs no"),
    ],
)
def test_a_yaml_file_is_treated_as_the_command_line(
    text: str, message: str, llama: Path, data: Path, tmp_path: Path
) -> None:
    config = written(tmp_path / "c.yaml", text)
    asked = ["train", llama, data, "-o", tmp_path / "x.lota"]
    assert message in refused(2, *asked, "--config", config)
    typed = [word for line in text.splitlines() for word in f"--{line}".split(": ")]
    assert message in refused(2, *asked, *typed)


def test_what_the_command_line_replaces_and_flags_that_are_false_have_not_been_given(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    config = written(tmp_path / "c.yaml", "epochs: 3\nmask: random\nlow-memory: false\nbatch-size: 2\ndevice: cpu\n")
    ok("train", llama, data, "--config", config, "--steps", "1", "-o", tmp_path / "x.lota")
    assert recorded(tmp_path / "x.lota")["steps"] == 1


def test_what_a_file_must_not_say_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for key in ("force", "resume", "json", "trust-remote-code", "config"):
        config = written(tmp_path / "c.yaml", f"{key}: true\n")
        said = refused(2, "train", "nowhere", "nowhere.jsonl", "-o", tmp_path / "x.lota", "--config", config)
        assert said == f"taskvec: {config}: '{key}' cannot be set in a file: give --{key} on the command line\n"
    config = written(tmp_path / "c.yaml", "context: 1\n")
    assert "unknown key 'context'" in refused(2, "train", "x", "x", "-o", tmp_path / "x.lota", "--config", config)


def test_a_run_is_repeated_from_its_record(llama: Path, data: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", ROWS[:2])
    first, again = tmp_path / "a.lota", tmp_path / "b.lota"
    files = ["--eval-data", data, "--mix", f"{other}:0.2"]
    ok("train", llama, data, *files, *RECIPE, "--scope", "tensor", "-o", first)
    said = ok("train", llama, data, *files, "--config", first, "--device", "cpu", "-o", again)
    assert said.startswith(str(again))
    assert again.read_bytes() == first.read_bytes()
    shown = json.loads(ok("inspect", first, "--json"))["files"][0]["provenance"]["run"]["options"]
    assert (shown["scope"], shown["seed"]) == ("tensor", 3)
    longer = tmp_path / "c.lota"
    ok("train", llama, data, *files, "--config", first, "--device", "cpu", "-o", longer, "--steps", "5")
    assert recorded(longer) == {**recorded(first), "steps": 5}


def test_a_run_via_several_tickets_is_repeated_from_its_record(llama: Path, data: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "a.lota", tmp_path / "b.lota"
    recipe = "--calibration-steps 2 --steps 4 --batch-size 2 --device cpu".split()
    said = ok("train", llama, data, *recipe, "--via", "0.5", "--via", "0.8", "--sparsity", "0.9", "-o", first)
    assert "\nlearning rates: 6e-05, then 0.00015, then 0.0003\n" in said
    assert recorded(first)["via"] == [0.5, 0.8]
    ok("train", llama, data, "--config", first, "--device", "cpu", "-o", again)
    assert again.read_bytes() == first.read_bytes()
    planned = json.loads(ok("train", llama, data, "--config", first, "-o", tmp_path / "c.lota", "--dry-run", "--json"))
    assert [(phase["name"], phase["lr"]) for phase in planned["phases"]] == [
        ("50%: calibrating", 3e-5),
        ("50%: training", 6e-5),
        ("80%: training", 1.5e-4),
        ("training", 3e-4),
    ]


def test_a_record_of_files_that_are_not_given_again_is_refused(llama: Path, data: Path, tmp_path: Path) -> None:
    mask, first, output = (tmp_path / f"{name}.lota" for name in ("mask", "first", "x"))
    ok("train", llama, data, "--calibration-steps", "2", "--steps", "0", "--device", "cpu", "-o", mask)
    files = ["--mask-from", mask, "--eval-data", data]
    ok("train", llama, data, *RECIPE[2:], *files, "-o", first)  # without calibration steps
    said = refused(2, "train", llama, data, "--config", first, "-o", output, "--device", "cpu")
    assert said == (
        f"taskvec: {first}: the run had --mask-from mask.lota: the record contains no paths, so give it again\n"
    )
    said = refused(2, "train", llama, data, "--config", first, "-o", output, "--mask-from", mask)
    assert f"the run had --eval-data {data.name}: " in said
    assert not output.exists()
    ok("train", llama, data, "--config", first, "-o", output, *files, "--device", "cpu")
    assert output.read_bytes() == first.read_bytes()


def test_a_run_on_folders_is_repeated_from_its_record(llama: Path, tmp_path: Path) -> None:
    first, output = tmp_path / "a.lota", tmp_path / "b.lota"
    for name in ("train", "held", "more"):
        (tmp_path / name).mkdir()
        for i in range(2):
            write_rows(tmp_path / name / f"{i}.jsonl", ROWS[i : i + 2])
    files = [tmp_path / "train", "--eval-data", tmp_path / "held", "--mix", f"{tmp_path / 'more'}:0.2"]
    ok("train", llama, *files, *RECIPE, "-o", first)
    done = inside("train", llama, *files, "--config", first, "--device", "cpu", "-o", output)
    assert (done.returncode, done.stderr) == (0, "")
    assert output.read_bytes() == first.read_bytes()
    write_rows(tmp_path / "held" / "1.jsonl", ROWS[:3])
    done = inside("train", llama, *files, "--config", first, "--device", "cpu", "-o", output, "--force")
    assert "--eval-data was held/1.jsonl with SHA-256 " in done.stderr


def test_what_differs_from_the_recorded_run_is_said(llama: Path, data: Path, tmp_path: Path) -> None:
    first, output = tmp_path / "a.lota", tmp_path / "b.lota"
    ok("train", llama, data, *RECIPE, "-o", first)
    other, base = write_rows(tmp_path / "other.jsonl", ROWS[:2]), make_llama(tmp_path / "base", seed=1)
    done = inside("train", base, other, "--config", first, "--device", "cpu", "-o", output)
    assert done.returncode == 0, done.stderr
    begins = f"taskvec: warning: this run differs from that of {first}: "
    assert [line.removeprefix(begins)[:20] for line in done.stderr.splitlines()] == [
        "the base is another one"[:20],
        f"data was {data.name} with"[:20],
    ]


def test_versions_shares_and_vectors_are_compared(llama: Path, data: Path, vector: Path, tmp_path: Path) -> None:
    base, first = ModelFolder(llama), tmp_path / "a.lota"
    ok(
        "train",
        llama,
        data,
        "--mix",
        f"{data}:0.2",
        "--disjoint-from",
        _few(vector, tmp_path),
        *RECIPE,
        "-o",
        first,
    )
    config = Config.read(first, dict.fromkeys(recorded(first), "str") | _kinds(first))
    assert config.record is not None
    few = TaskVector.open(tmp_path / "few.lota")
    given = {"mask_from": None, "disjoint_from": [few], "start_from": None, "mix": [(data, 0.2)], "eval_data": None}
    assert config.differences(base, data, **given) == []  # type: ignore[arg-type]
    changed = Config(first, {}, {**config.record, "versions": {"torch": "0.1", "no-such-package": "1"}})
    (torch, missing) = changed.differences(base, data, **given)  # type: ignore[arg-type]
    assert torch.startswith("torch was 0.1, here it is ")
    assert missing == "no-such-package was 1, here it is None"
    given |= {"mix": [(data, 0.3)], "disjoint_from": [], "eval_data": data}
    assert config.differences(base, data, **given) == [  # type: ignore[arg-type]
        f"`eval_data` {data} is read, but was not given to the recorded run",
        f"the share of {data} was 0.2, here it is 0.3",
        "`disjoint_from` was another vector, or in another order",
    ]


def _few(vector: Path, folder: Path) -> Path:
    """A vector of one entry in an eligible tensor."""
    opened = TaskVector.open(vector)
    name = next(name for name in opened if "q_proj" in name)
    made = vector_of({name: sparse(opened.specs[name].shape, {0: 1.0})}, name="few.lota")
    made.save(folder / "few.lota")
    return folder / "few.lota"


def _kinds(path: Path) -> dict[str, str]:
    return {
        key: type(value).__name__ for key, value in recorded(path).items() if type(value) in (int, float, bool, list)
    }
