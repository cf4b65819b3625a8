"""Data as people have it: forms of rows, kinds of files, turns that train, packed rows, and counts of all that."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import zstandard
from pyarrow import parquet
from support.commands import refused
from support.models import ROWS, TEMPLATE, make_architecture, make_tokenizer, write_rows
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

from taskvec.data.conversations import alpaca_prompt
from taskvec.data.corpus import read_corpus
from taskvec.data.examples import example_of, read_examples
from taskvec.data.packing import check_packing, pack
from taskvec.data.rows import (
    IGNORED,
    accepted_arguments,
    collate,
    encode,
    encode_all,
    encode_completion,
    encode_prompt,
    length_limit,
)
from taskvec.data.sources import data_path, find_files, read_tables
from taskvec.errors import DataError, TrainingError, UsageError
from taskvec.evaluation.evaluate import evaluate
from taskvec.models.loading import load_model
from taskvec.training.options import TrainingOptions
from taskvec.training.preview import preview
from taskvec.training.train import train
from taskvec_cli.main import app
from taskvec_formats import ModelFolder

pytestmark = pytest.mark.slow

QUICK = TrainingOptions(calibration_steps=1, steps=3, batch_size=2, lr=1e-2, device="cpu")
PAIRS = [("one plus one is", "two"), ("one plus two is", "three"), ("two plus two is", "four")]
# marks what the assistant says, and its end
MARKING = (
    "{% for m in messages %}<s> {{ m['role'] }} : {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} </s> {% endgeneration %}{% else %}{{ m['content'] }} </s> {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)
# leaves out what the assistant said before, as templates do with its thoughts
REWRITING = (
    "{% for m in messages %}<s> {{ m['role'] }} : "
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else 'one' }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)
CALLING = (
    "{% if tools %}<s> system : {{ tools[0]['name'] }} </s> {% endif %}"
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }}"
    "{% for call in m.get('tool_calls', []) %} {{ call.function.name }} {{ call.function.arguments.a }}{% endfor %}"
    " </s> {% endfor %}{% if add_generation_prompt %}<s> assistant : {% endif %}"
)


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict[str, object]:
    return {"role": "assistant", "content": content}


FORMS: dict[str, Callable[[str, str], dict[str, object]]] = {
    "messages": lambda q, a: {"messages": [user(q), assistant(a)]},
    "text parts": lambda q, a: {
        "messages": [user([{"type": "text", "text": q[:4]}, {"type": "text", "text": q[4:]}]), assistant(a)]
    },
    "conversations": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "lists": lambda q, a: {"prompt": [user(q)], "completion": [assistant(a)]},
    "a list and a text": lambda q, a: {"prompt": [user(q)], "completion": a},
    "a text and a list": lambda q, a: {"prompt": q, "completion": [assistant(a)]},
    "nulls": lambda q, a: {"messages": None, "prompt": q, "completion": a, "text": None},
}


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_folder(path: Path, rows: list[dict[str, object]]) -> None:
    path.mkdir()
    (path / "b.jsonl").write_bytes(lines(rows[1:]))
    (path / "a.json").write_text(json.dumps(rows[:1], indent=1))
    (path / "README.md").write_text("nothing to read")
    (path / ".hidden.jsonl").write_text("nothing to read")


FILES: dict[str, Callable[[Path, list[dict[str, object]]], object]] = {
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "lines.json": lambda path, rows: path.write_bytes(lines(rows)),
    "rows.csv": write_csv,
    "rows.parquet": lambda path, rows: parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "rows.jsonl.zst": lambda path, rows: path.write_bytes(
        zstandard.compress(lines(rows[:1])) + zstandard.compress(lines(rows[1:]))
    ),
    "folder": write_folder,
}


@pytest.fixture(scope="module")
def losses(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of the same task as prompts and completions in JSON lines."""
    return train(ModelFolder(llama), plain(tmp_path_factory.mktemp("plain")), QUICK).curve.losses


def plain(folder: Path) -> Path:
    return write_rows(folder / "rows.jsonl", [{"prompt": q, "completion": a} for q, a in PAIRS])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_the_same(form: str, losses: list[float], llama: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [FORMS[form](*pair) for pair in PAIRS])
    assert train(ModelFolder(llama), data, QUICK).curve.losses == losses


@pytest.mark.parametrize("name", FILES)
def test_every_file_trains_the_same(name: str, losses: list[float], llama: Path, tmp_path: Path) -> None:
    data = tmp_path / name
    FILES[name](data, [{"prompt": q, "completion": a} for q, a in PAIRS])
    assert train(ModelFolder(llama), data, QUICK).curve.losses == losses
    assert [len(example.messages) for example in read_examples(data)] == [1] * 3


def test_parquet_keeps_what_other_rows_lack(tmp_path: Path) -> None:
    """A column has one type: fields that only some rows have are null in the others."""
    call = {"function": {"name": "plus", "arguments": '{"a": "one"}'}}
    rows = [
        {
            "messages": [user("one"), {"role": "assistant", "content": None, "tool_calls": [call]}],
            "tools": '[{"name": "x"}]',
        },
        {"messages": [user("one"), assistant("two")], "tools": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    calling, plainer = read_examples(tmp_path / "rows.parquet")
    assert calling.answer is not None
    assert calling.answer["tool_calls"] == [{"function": {"name": "plus", "arguments": {"a": "one"}}}]
    assert calling.tools == ({"name": "x"},)
    assert plainer == example_of({"messages": [user("one"), assistant("two")]}, plainer.where)


def test_alpaca_rows_have_alpaca_s_prompt() -> None:
    without = example_of({"instruction": "Add {input}.", "input": "", "output": "4"}, "here:1")
    asked = (
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd {input}.\n\n### Response:"
    )
    text = without.messages[0]["content"]
    assert text == f"Below is an instruction that describes a task. {asked}"
    row = {"instruction": "Add.", "input": "2, {instruction}", "output": "4"}
    filled = example_of(row, "here:2")
    assert filled.messages[0]["content"] == alpaca_prompt("Add.", "2, {instruction}")
    assert "### Instruction:\nAdd.\n\n### Input:\n2, {instruction}\n\n### Response:" in filled.messages[0]["content"]
    equal = {"prompt": alpaca_prompt("Add.", "2, {instruction}"), "completion": "4"}
    assert filled == example_of(equal, "here:2")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"messages": [user([{"type": "image", "url": "x"}]), assistant("a")]},
            "message 1 of .messages.: only text parts .*'image'",
        ),
        (
            {"messages": [user([{"type": "text", "text": 5}]), assistant("a")]},
            '"text" of a part of message 1 of "messages" must be text, found 5',
        ),
        (
            {"messages": [user(["a"]), assistant("a")]},
            '"content" of message 1 of "messages" must be text or a list of text parts, found the part \'a\'',
        ),
        (
            {"messages": [user(3), assistant("a")]},
            '"content" of message 1 of "messages" must be text or a list of text parts, found 3',
        ),
        ({"messages": [user("a"), assistant(None)]}, 'message 2 of "messages" has no "content"'),
        ({"messages": [user("a"), assistant(" ")]}, "the last message is empty"),
        ({"messages": "a"}, '"messages" must be a list of {"role", "content"} objects, found \'a\''),
        ({"messages": None}, '"messages" must be a list of {"role", "content"} objects, found null'),
        ({"messages": [3]}, '"messages" must be a list of {"role", "content"} objects, found 3 as message 1'),
        ({"messages": [{"content": "a"}]}, 'message 1 of "messages" has no "role"'),
        ({"messages": [{"role": 5, "content": "a"}]}, '"role" of message 1 of "messages" must be text, found 5'),
        ({"messages": [user("a"), assistant("b"), user("c")]}, "the last is by 'user'"),
        (
            {"messages": [user("a"), {**assistant(""), "tool_calls": [3]}]},
            '"tool_calls" of message 2 of "messages" must be a list of .* objects, found the call 3',
        ),
        (
            {"messages": [user("a"), {**assistant(""), "tool_calls": "f"}]},
            '"tool_calls" of message 2 of "messages" must be a list of .* objects, found \'f\'',
        ),
        (
            {"messages": [user("a"), {**assistant(""), "tool_calls": [{"name": "f", "arguments": "x"}]}]},
            '"arguments" of a tool call of message 2 of "messages" must be an object, found \'x\'',
        ),
        ({"messages": [user("a"), assistant("b")], "tools": "f()"}, '"tools" must be a list of objects'),
        ({"conversations": "hello"}, '"conversations" must be a list of {"from", "value"} objects, found .hello'),
        ({"conversations": ["a"]}, '"conversations" must be a list of .* objects, found .a. as message 1'),
        ({"conversations": [{"from": "human"}]}, 'message 1 of "conversations" has no "value"'),
        (
            {"conversations": [{"from": "human", "value": 5}]},
            '"value" of message 1 of "conversations" must be text, found 5',
        ),
        (
            {"conversations": [{"from": 5, "value": "a"}]},
            '"from" of message 1 of "conversations" must be text, found 5',
        ),
        (
            {"conversations": [{"from": "bing", "value": "a"}]},
            '"from" of message 1 of "conversations" must be human, gpt, system or tool, found .bing',
        ),
        ({"prompt": [user("a")], "completion": []}, "the completion is empty"),
        ({"prompt": [user("a")], "completion": 3}, '"completion" must be text or a list of messages, found 3'),
        ({"prompt": None, "completion": "a"}, '"prompt" must be text or a list of messages, found null'),
        ({"prompt": ["a"], "completion": "b"}, '"prompt" must be a list of .* objects, found .a. as message 1'),
        ({"prompt": 3, "completion": "a", "text": "b"}, '"prompt" must be text or a list of messages, found 3'),
        ({"text": 5}, '"text" must be text, found 5'),
        ({"text": None}, '"text" must be text, found null'),
        ({"text": " "}, "the text is empty"),
        ({"instruction": 5, "output": "a"}, '"instruction" must be text, found 5'),
        ({"instruction": "a", "input": [], "output": "b"}, '"input" must be text, found '),
        ({"instruction": "a", "output": None}, '"output" must be text, found null'),
        ({"instruction": "a", "input": "b"}, "found the keys"),
        ({"instruction": "a", "output": " "}, "the output is empty"),
        ({"messages": [user("\ud800"), assistant("b")]}, "half of a surrogate pair"),
    ],
)
def test_a_row_that_is_not_understood_is_named(row: dict[str, object], complaint: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "fine"}, row])
    with pytest.raises(DataError, match=complaint) as caught:
        read_examples(data)
    assert str(caught.value).startswith(f"{data}:2: ")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.json", b'[{"text": "a"}, 3]', "x.json, row 2: expected .* found 3$"),
        ("x.json", b'[{"text": "a"}', "x.json: not valid JSON"),
        ("x.json", b"[]", "x.json: the file is empty"),
        ("x.json", b'{\n"text": "a"}', "x.json:1: not valid JSON"),
        ("x.csv", b"prompt,completion\na,b\nc\n", "x.csv, row 2: expected 2 cells, found 1"),
        ("x.csv", b'prompt,completion\na,"b\n', "x.csv, row 1: not valid CSV"),
        ("x.csv", b"prompt,answer\na,b\n", "x.csv, row 1: expected .* found the keys"),
        ("x.csv", b"prompt,completion\na,b\nc,\n", "x.csv, row 2: the completion is empty"),
        ("x.csv", b"text,text\na,b\n", "x.csv: the first line names a column twice"),
        ("x.csv", b"text\n", "x.csv: the file is empty"),
        ("x.csv", b"text\ncaf\xe9\n", "x.csv cannot be read as UTF-8 text"),
        ("x.parquet", b"PAR1 and no more", "x.parquet cannot be read as Parquet"),
        ("x.jsonl.gz", b"{}", "x.jsonl.gz cannot be decompressed"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "x.jsonl.gz cannot be decompressed"),
        ("x.jsonl.zst", zstandard.compress(bytes(range(99)))[:-9], "x.jsonl.zst cannot be decompressed"),
        ("x.jsonl.zst", b"{}", "x.jsonl.zst cannot be decompressed"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        read_examples(tmp_path / name)


@pytest.mark.parametrize(("name", "text"), [("x.jsonl", '{"text": "a"}\n'), ("x.json", '[{"text": "a"}]')])
def test_a_byte_order_mark_is_no_part_of_the_text(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [example.completion for example in read_examples(tmp_path / name)] == ["a"]


def test_cells_of_csv_are_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b'prompt,completion\r\n"2, ""and"" 2\nis",04\r\nmissing?,NA\r\n')
    first, second = read_examples(tmp_path / "x.csv")
    assert (first.messages[0]["content"], first.completion) == ('2, "and" 2\nis', "04")
    assert second.completion == "NA"


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(UsageError, match="is a folder without data"):
        read_examples(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is a model folder; expected JSON lines"):
        read_examples(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "x.parquet").mkdir()
    with pytest.raises(UsageError, match="is a folder without data"):
        read_examples(tmp_path)
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(UsageError, match=r"x\.jsonl is not a regular file"):
        read_examples(tmp_path)


def test_files_are_recorded_with_what_was_taken_of_them(tmp_path: Path) -> None:
    task, others = tmp_path / "task.jsonl", tmp_path / "others"
    numbers = [{"prompt": f"task {i}", "completion": str(i)} for i in range(60)]
    write_rows(task, numbers[:30])
    others.mkdir()
    for i, name in enumerate("ab"):
        write_rows(others / f"{name}.jsonl", numbers[30 + 15 * i :][:15])
    corpus = read_corpus(task, mix=[(others, 0.25)])
    taken = [int(example.completion) for example in corpus.train[30:]]
    names = {file["name"]: file["examples"] for file in corpus.files}
    assert names == {
        "task.jsonl": 30,
        "others/a.jsonl": sum(number < 45 for number in taken),
        "others/b.jsonl": sum(number >= 45 for number in taken),
    }
    assert len(taken) == 10
    assert len({str(file["sha256"]) for file in corpus.files}) == 3


def test_rows_of_the_hub_are_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache of datasets, as for a data set that was loaded before: no network is reached here."""
    import datasets

    source, cache = tmp_path / "toys", tmp_path / "cache"
    source.mkdir()
    write_rows(source / "train.jsonl", ROWS[:2])
    write_rows(source / "test.jsonl", ROWS[1:2])
    datasets.load_dataset(str(source), cache_dir=str(cache))
    (cache / "toys").rename(cache / "some___toys")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    (info,) = cache.glob("some___toys/default/0.0.0/*/dataset_info.json")
    described = json.loads(info.read_text())
    described["download_checksums"] = {f"hf://datasets/some/toys@{'0a' * 20}/train.jsonl": {"num_bytes": 1}}
    info.write_text(json.dumps(described))
    monkeypatch.chdir(tmp_path)

    expected = read_examples(source / "train.jsonl")
    found = read_examples(Path("some/toys"))
    assert [(e.messages, e.completion) for e in found] == [(e.messages, e.completion) for e in expected]
    assert [e.where for e in found] == ["some/toys:train, row 1", "some/toys:train, row 2"]
    (table,) = read_tables(Path("some/toys:default:test"))
    assert [row for _, row in table.rows] == ROWS[1:2]
    digest = str(table.record.pop("sha256"))
    assert table.record == {"name": "some/toys", "config": "default", "split": "test", "revision": "0a" * 20}
    assert read_tables(Path("some/toys:test"))[0].record["sha256"] == digest
    assert read_tables(Path("some/toys"))[0].record["sha256"] != digest
    with pytest.raises(UsageError, match="cannot be loaded from the Hub, split 'dev': Unknown split"):
        read_examples(Path("some/toys:dev"))
    with pytest.raises(UsageError, match="no such file, and some/others cannot be loaded from the Hub"):
        read_examples(Path("some/others"))
    Path("some").mkdir()
    write_rows(Path("some/toys"), ROWS[2:])
    assert len(read_examples(Path("some/toys"))) == 2, "a path that is there comes before a data set of its name"


@pytest.mark.parametrize("text", ["./some/toys", "./some/toys:train", "../toys", "/some/toys", "~/toys"])
def test_a_text_that_is_a_path_is_no_id_of_the_hub(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^{text}: no such file$"):
        data_path(text)
    output = tmp_path / "x.lota"
    for command in (
        ("train", tmp_path, text, "-o", output),
        ("train", tmp_path, "some/toys", "-o", output, "--eval-data", text),
        ("train", tmp_path, "some/toys", "-o", output, "--mix", f"{text}:0.1"),
        ("eval", tmp_path, "--data", text),
    ):
        assert refused(2, *command) == f"taskvec: {text}: no such file\n"


def test_a_path_that_is_there_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some").mkdir()
    written = write_rows(Path("some/toys"), ROWS)
    assert data_path("./some/toys") == data_path("some/toys") == written
    assert data_path("some/others") == Path("some/others")


@pytest.mark.parametrize("name", ["toys.jsonl", "toys.csv", "toys.parquet", "toys.jsonl.gz", "toys.zst", "toys.JSON"])
def test_a_name_of_a_data_file_is_no_id_of_the_hub(name: str) -> None:
    with pytest.raises(UsageError, match=f"^some/{name}: no such file$"):
        find_files(Path(f"some/{name}"))


def test_a_share_that_leaves_nothing_to_train_on_is_named(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UsageError, match=r"`eval_split=0\.99` would hold out 4 of 4 examples, and none is left"):
        read_corpus(rows, eval_split=0.99)


def test_json_needs_neither_datasets_nor_torch(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    write_csv(tmp_path / "c.csv", [{"text": "four"}])
    script = (
        "import sys\n"
        "sys.modules['datasets'] = sys.modules['pyarrow'] = None\n"
        "from pathlib import Path\n"
        "from taskvec.data.examples import check_examples, read_examples\n"
        f"print(len(read_examples(Path({str(tmp_path)!r}))), 'torch' in sys.modules, 'transformers' in sys.modules)\n"
        f"Path({str(tmp_path / 'd.parquet')!r}).touch()\n"
        "for name in ('some/toys', sys.argv[1]):\n"
        "    try:\n"
        "        check_examples(Path(name))\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    run = [sys.executable, "-c", script, str(tmp_path / "d.parquet")]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "9 False False"
    assert (
        "some/toys: no such file; a data set of the Hub needs the package datasets: pip install 'taskvec[data]'"
        in said[1]
    )
    assert "d.parquet needs the package pyarrow: pip install 'taskvec[data]'" in said[2]


def learnt(row: dict[str, list[int]], tokenizer: Any) -> list[str]:
    """The runs of words that a row trains."""
    words = [tokenizer.decode([label]) if label != IGNORED else "\n" for label in row["labels"]]
    return [run.strip() for run in " ".join(words).split("\n") if run.strip()]


TALK = {
    "messages": [user("one"), assistant("two three"), user("four"), assistant("five"), user("six"), assistant("is")]
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, ["two three </s>", "five </s>", "is </s>"]),
        (MARKING, ["two three </s>", "five </s>", "is </s>"]),
        (None, ["two three", "five", "is </s>"]),
    ],
)
def test_all_turns_of_the_assistant_train(template: str | None, expected: list[str]) -> None:
    tokenizer, example = make_tokenizer(template), example_of(TALK, "here:1")
    row = encode(example, tokenizer, 64)
    assert learnt(row, tokenizer) == expected
    last = encode(example, tokenizer, 64, turns="last")
    assert learnt(last, tokenizer) == expected[-1:]
    assert (
        last["input_ids"]
        == row["input_ids"]
        == encode_prompt(example, tokenizer) + encode_completion(example, tokenizer)
    )
    assert all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


@pytest.mark.parametrize("template", [TEMPLATE, MARKING, None])
def test_the_prompt_of_a_list_does_not_train(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    messages = TALK["messages"]
    example = example_of({"prompt": messages[:3], "completion": messages[3:]}, "here:1")
    runs = learnt(encode(example, tokenizer, 64), tokenizer)
    assert [run.removesuffix(" </s>") for run in runs] == ["five", "is"]


def test_a_cut_takes_labels_and_tokens_together() -> None:
    tokenizer, example = make_tokenizer(TEMPLATE), example_of(TALK, "here:1")
    whole = encode(example, tokenizer, 64)
    for length in range(2, len(whole["input_ids"])):
        row = encode(example, tokenizer, length)
        assert row["input_ids"] == whole["input_ids"][-length:]
        assert row["labels"][1:] == whole["labels"][1 - length :]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer, example = make_tokenizer(REWRITING), example_of(TALK, "here:7")
    with pytest.raises(DataError, match=r"here:7: the chat template writes message 2 differently .*`turns=last`"):
        encode(example, tokenizer, 64)
    assert learnt(encode(example, tokenizer, 64, turns="last"), tokenizer) == ["is </s>"]
    marking = make_tokenizer(MARKING.replace("m['role'] == 'assistant'", "loop.last"))
    with pytest.raises(DataError, match=r"here:7: the chat template marks 1 texts .* has 2 turns"):
        encode(example, marking, 64)
    first = example_of({"messages": [assistant("one"), user("two"), assistant("three")]}, "here:8")
    with pytest.raises(DataError, match=r"here:8: the assistant speaks first; `turns=last`"):
        encode(first, make_tokenizer(TEMPLATE), 64)


def test_a_conversation_trains_to_the_end_of_each_turn(llama: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [TALK])
    options = replace(QUICK, steps=1, batch_size=1)
    trained, last = (train(ModelFolder(llama), data, replace(options, turns=turns)) for turns in ("all", "last"))
    assert (trained.rows.trained, last.rows.trained) == (7, 2)
    assert trained.rows.tokens == last.rows.tokens
    model, tokenizer = load_model(llama)
    example = read_examples(data)[0]
    batch = collate([encode(example, tokenizer, 64)], 0, frozenset())
    with torch.no_grad():
        assert trained.calibration_losses[0] == pytest.approx(float(model(**batch).loss), rel=1e-4)
    alone = evaluate(model, tokenizer, [example]).metrics["loss"].value
    assert last.calibration_losses[0] == pytest.approx(alone, rel=1e-4), "evaluation scores the last turn alone"


def test_an_encoder_sees_a_mask_for_every_turn_that_trains() -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.mask_token = "<unk>"
    row = encode(example_of(TALK, "here:1"), tokenizer, 64, masked=True)
    masks = [token == tokenizer.mask_token_id for token in row["input_ids"]]
    assert masks == [label != IGNORED for label in row["labels"]]
    assert sum(masks) == 7


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "plus", "arguments": '{"a": "one"}'}}],
}
TOOLS = [{"name": "plus"}]


def test_tool_calls_go_through_the_template() -> None:
    tokenizer = make_tokenizer(CALLING)
    answered = {
        "messages": [user("two"), CALL, {"role": "tool", "content": "three"}, assistant("four")],
        "tools": TOOLS,
    }
    row = encode(example_of(answered, "here:1"), tokenizer, 64)
    assert tokenizer.decode(row["input_ids"]).startswith("<s> <unk> : plus </s> <s> user : two </s>")
    assert learnt(row, tokenizer) == ["plus one </s>", "four </s>"]
    calling = {"messages": [user("two"), CALL], "tools": json.dumps(TOOLS)}
    row = encode(example_of(calling, "here:1"), tokenizer, 64)
    assert learnt(row, tokenizer) == ["plus one </s>"]
    assert row["input_ids"][-1] == tokenizer.eos_token_id != row["input_ids"][-2]


THINKING = (
    "{% for m in messages %}<s> {{ m['role'] }} : "
    "{% if m.reasoning_content is defined %}{{ m.reasoning_content }} plus {% endif %}{{ m['content'] }} </s> "
    "{% endfor %}{% if add_generation_prompt %}<s> assistant : {% endif %}"
)


def test_thoughts_go_through_the_template(llama: Path) -> None:
    tokenizer = make_tokenizer(THINKING)
    first, last = ({**assistant(text), "reasoning_content": "six"} for text in ("two", "four"))
    example = example_of({"messages": [user("one"), first, user("three"), last]}, "here:1")
    assert learnt(encode(example, tokenizer, 64), tokenizer) == ["six plus two </s>", "six plus four </s>"]
    plain = example_of({"messages": [user("one"), {**assistant("two"), "reasoning_content": None}]}, "here:2")
    assert learnt(encode(plain, tokenizer, 64), tokenizer) == ["two </s>"]
    with pytest.raises(DataError, match='here:1: the chat template has no place for "reasoning_content"'):
        encode(example, make_tokenizer(TEMPLATE), 64)
    with pytest.raises(DataError, match="here:1: tools and thoughts need a chat template"):
        encode(example, make_tokenizer(None), 64)
    model, _ = load_model(llama)
    with pytest.raises(DataError, match="here:1: the last turn calls tools or has thoughts: only its loss can be"):
        evaluate(model, tokenizer, [example], ["rouge1"])


@pytest.mark.parametrize("template", [TEMPLATE, MARKING, None])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_messages_without_weight_do_not_train(form: str, template: str | None) -> None:
    tokenizer = make_tokenizer(template)

    def runs(*weights: object) -> list[str]:
        messages = [{**message, "weight": weight} for message, weight in zip(TALK["messages"], weights, strict=True)]
        if form == "conversations":
            speakers = {"user": "human", "assistant": "gpt"}
            messages = [
                {"from": speakers[str(m["role"])], "value": m["content"], "weight": m["weight"]} for m in messages
            ]
        row = encode(example_of({form: messages}, "here:1"), tokenizer, 64)
        return [run.removesuffix(" </s>") for run in learnt(row, tokenizer)]

    assert runs(None, 1, None, 0, 1, None) == ["two three", "is"]
    assert runs(None, 0, None, 1, None, 1) == ["five", "is"]
    assert runs(0, 1, 0, 1, 0, 0) == ["two three", "five"], "what follows is left out"
    with pytest.raises(DataError, match='here:1: no message by the assistant has a "weight" other than 0'):
        runs(None, 0, None, 0, None, 0)
    with pytest.raises(DataError, match=r'here:1: "weight" of message 2 must be 0 or 1, found 0\.5'):
        runs(None, 0.5, None, 0, None, 0)


def test_a_template_that_leaves_messages_out_is_refused() -> None:
    silent = make_tokenizer(
        TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    )
    told = {"messages": [{"role": "system", "content": "six"}, user("one"), assistant("two")]}
    with pytest.raises(DataError, match="here:1: the chat template leaves out message 1, by 'system'"):
        encode(example_of(told, "here:1"), silent, 64)
    example = example_of({"messages": told["messages"][1:]}, "here:2")
    assert encode(example, silent, 64) == encode(example, make_tokenizer(TEMPLATE), 64)


def test_a_template_that_takes_parts_is_given_parts() -> None:
    """Those of vision models write nothing of a text that is no part."""
    written = "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    parts = make_tokenizer(TEMPLATE.replace("{{ m['content'] }}", written))
    example = example_of(TALK, "here:1")
    assert encode(example, parts, 64) == encode(example, make_tokenizer(TEMPLATE), 64)


@pytest.mark.parametrize(
    "row", [{"messages": [assistant("four")]}, {"prompt": [], "completion": [assistant("four")]}, {"messages": [CALL]}]
)
def test_an_answer_to_nothing_is_refused(row: dict[str, object]) -> None:
    with pytest.raises(DataError, match="here:1: the assistant speaks first"):
        example_of({**row, "tools": TOOLS}, "here:1")


def test_a_text_begins_as_the_tokenizer_begins_texts() -> None:
    """So its first word has something before it, and an answer from nothing begins in the same way."""
    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    row = encode(example_of({"text": "two three"}, "here:1"), tokenizer, 64)
    assert row["input_ids"] == [
        tokenizer.bos_token_id,
        *tokenizer("two three")["input_ids"][1:],
        tokenizer.eos_token_id,
    ]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_tools_that_no_template_would_show_are_refused(llama: Path) -> None:
    described = example_of({"messages": [user("two"), assistant("four")], "tools": TOOLS}, "here:1")
    calling = example_of({"messages": [user("two"), CALL]}, "here:2")
    with pytest.raises(DataError, match='here:1: the chat template has no place for "tools"'):
        encode(described, make_tokenizer(TEMPLATE), 64)
    with pytest.raises(DataError, match='here:2: the chat template has no place for "tool_calls"'):
        encode(calling, make_tokenizer(TEMPLATE), 64)
    for example in (described, calling):
        with pytest.raises(DataError, match="tools and thoughts need a chat template"):
            encode(example, make_tokenizer(None), 64)
    model, _ = load_model(llama)
    with pytest.raises(DataError, match="here:2: the last turn calls tools or has thoughts: only its loss"):
        evaluate(model, make_tokenizer(CALLING), [calling], ["exact_match"])
    assert evaluate(model, make_tokenizer(CALLING), [calling]).metrics["loss"].value > 0


def many_rows(tokenizer: Any) -> list[dict[str, list[int]]]:
    talks = [{"messages": TALK["messages"][: 2 * turns]} for turns in (1, 2, 3)]
    examples = [example_of(row, f"here:{i}") for i, row in enumerate([*ROWS, *talks] * 4)]
    return encode_all(examples, tokenizer, 64)[0]


def token_loss(model: Any, rows: list[dict[str, list[int]]], size: int) -> tuple[float, int]:
    """Σ loss of all tokens, and how many they are, in batches of so many rows."""
    total, count = 0.0, 0
    for start in range(0, len(rows), size):
        inputs = collate(rows[start : start + size], 0, accepted_arguments(model))
        tokens = sum(label != IGNORED for row in rows[start : start + size] for label in row["labels"])
        with torch.no_grad():
            total += float(model(**inputs).loss) * tokens
        count += tokens
    return total, count


@pytest.mark.parametrize("name", ["llama", "gpt2", "sliding"])
def test_packed_rows_give_the_loss_of_their_examples(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    if name == "sliding":
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            sliding_window=6,
        )
        model: Any = MistralForCausalLM(config)
    else:
        model, _ = load_model(request.getfixturevalue(name))
    model.eval()
    rows = many_rows(tokenizer)
    packed = pack(rows, 48, 0)
    check_packing(model, rows, 0)
    assert len(packed) < len(rows) / 2
    expected, tokens = token_loss(model, rows, 5)
    found, same = token_loss(model, packed, 3)
    assert same == tokens
    assert found == pytest.approx(expected, rel=5e-6)
    # were attention or positions not kept apart, the loss would be another
    joined = [{key: values for key, values in row.items() if key != "position_ids"} for row in packed]
    assert abs(token_loss(model, joined, 3)[0] - expected) > 5e-5 * expected


def test_packing_is_drawn_by_the_seed_and_loses_nothing() -> None:
    rows = many_rows(make_tokenizer(TEMPLATE))
    packed = pack(rows, 48, 3)
    assert pack(rows, 48, 3) == packed != pack(rows, 48, 4)
    pieces = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 48
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            piece = {name: row[name][start:stop] for name in ("input_ids", "labels")}
            assert piece["labels"][0] == IGNORED
            assert row["position_ids"][start:stop] == list(range(len(piece["labels"])))
            pieces.append(piece)
    assert sorted(map(str, pieces)) == sorted(map(str, rows))


def test_a_packed_run_takes_the_steps_of_its_rows(llama: Path, tmp_path: Path) -> None:
    """One batch of everything: packing changes neither the loss nor the weight of a token in it."""
    data = write_rows(tmp_path / "rows.jsonl", [TALK, *ROWS])
    options = TrainingOptions(batch_size=8, epochs=2, max_length=40, mask="random", lr=1e-2, device="cpu")
    unpacked = train(ModelFolder(llama), data, options, eval_data=data)
    packed = train(ModelFolder(llama), data, replace(options, pack=True), eval_data=data)
    assert packed.rows == replace(unpacked.rows, packed=2)
    assert packed.curve.losses == pytest.approx(unpacked.curve.losses, rel=1e-5)
    assert packed.eval_rows == unpacked.eval_rows
    assert packed.curve.eval_losses[0][1] == pytest.approx(unpacked.curve.eval_losses[0][1], rel=1e-4)


@pytest.mark.parametrize("method", ["fft", "lora"])
def test_other_methods_train_on_packed_rows(method: str, gpt2: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [TALK, *ROWS])
    options = TrainingOptions(method=method, sparsity=None, steps=1, batch_size=8, lr=1e-2, device="cpu")
    losses = [train(ModelFolder(gpt2), data, replace(options, pack=pack)).curve.losses for pack in (False, True)]
    # dropout is drawn for other shapes
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_models_that_cannot_keep_examples_apart_are_refused(tmp_path: Path, data: Path) -> None:
    bert = make_architecture("bert", tmp_path / "bert", dtype="float32")
    with pytest.raises(TrainingError, match="BertForMaskedLM cannot keep packed examples apart; train without `pack`"):
        train(ModelFolder(bert), data, replace(QUICK, pack=True))
    rows = many_rows(make_tokenizer(TEMPLATE))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=2))
    with pytest.raises(TrainingError, match="MambaForCausalLM cannot keep packed examples apart"):
        check_packing(mamba, rows, 0)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_examples_beyond_the_window_of_their_positions_are_not_packed(kind: str) -> None:
    """Positions of the whole row would change with the longest example in it."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 2, "long_factor": [4.0] * 2, "original_max_position_embeddings": 16}
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32 if kind == "longrope" else 16,
        rope_parameters=rope,
    )
    model, rows = LlamaForCausalLM(config), many_rows(make_tokenizer(TEMPLATE))
    with pytest.raises(TrainingError, match=r"longer than 16 tokens .* longest here has \d+: train without `pack`"):
        check_packing(model, rows, 0)
    check_packing(model, [row for row in rows if len(row["input_ids"]) <= 16], 0)


def test_rows_are_cut_to_the_positions_of_the_model_and_counted(gpt2: Path, llama: Path, tmp_path: Path) -> None:
    long = {"prompt": "one plus " * 50, "completion": "two"}
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS, long])
    options = replace(QUICK, steps=1, batch_size=8)
    trained = train(ModelFolder(gpt2), data, options, eval_data=data)
    counts = trained.rows
    assert (counts.rows, counts.truncated, counts.limit, counts.longest) == (5, 1, 64, 102)
    tokenizer = load_model(gpt2)[1]
    rows = [encode(example, tokenizer, 64) for example in read_examples(data)]
    assert counts.tokens == sum(len(row["input_ids"]) for row in rows)
    assert counts.trained == sum(label != IGNORED for row in rows for label in row["labels"])
    assert trained.eval_rows == counts
    config = load_model(llama)[0].config
    assert length_limit(config, 9) == 9
    assert length_limit(config, 10**6) == config.max_position_embeddings
    assert length_limit(MambaConfig(), 10**6) == 10**6


def test_an_example_is_shown_as_it_trains() -> None:
    shown = preview(example_of(TALK, "here:1"), make_tokenizer(TEMPLATE), 64)
    assert [trains for _, trains in shown.parts] == [False, True] * 3
    assert shown.parts[0][0] == "<s> user : one </s> <s> assistant :"
    assert shown.parts[-1] == ("is </s>", True)
    assert (shown.where, shown.tokens, shown.trained) == ("here:1", 31, 7)


def test_the_command_shows_an_example_and_counts_rows(gpt2: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "rows", tmp_path / "x.lota"
    write_folder(data, [TALK, {"prompt": "one " * 80, "completion": "two"}])
    arguments = ["train", gpt2, data, "-o", out, "--steps", "1", "--calibration-steps", "1", "--device", "cpu"]
    ran = CliRunner().invoke(app, [*map(str, arguments), "--pack", "--show-example", "--json"])
    assert ran.exit_code == 0, ran.output
    said = ran.stderr.splitlines()
    assert f"{data / 'a.json'}, row 1: 8 tokens, 5 of them trained on" in ran.stderr
    assert 'trained: "two three"' in said
    report = json.loads(ran.stdout)
    assert report["rows"] == {
        "rows": 2,
        "truncated": 1,
        "limit": 64,
        "tokens": 64 + 8,
        "trained": 7,
        "longest": 82,
        "packed": 2,
    }
    text = CliRunner().invoke(app, [*map(str, arguments), "--force"])
    line = "examples: 2, 72 tokens, 7 of them with a loss; the longest has 82, 1 cut to 64 tokens"
    assert line in text.stdout.splitlines(), text.output
    scored = CliRunner().invoke(app, ["eval", str(gpt2), "--data", str(data), "--device", "cpu", "--json"])
    assert json.loads(scored.stdout)["rows"]["truncated"] == 1
    assert "warning: 1 of 2 examples were cut to 64 tokens; the longest has 82" in scored.stderr
    answered = [*map(str, ["eval", gpt2, "--data", data, "--device", "cpu"]), "--metric", "exact_match"]
    scored = CliRunner().invoke(app, [*answered, "--max-new-tokens", "2"])
    assert "warning: 1 of 2 prompts lost their beginning to leave room for the answer" in scored.stderr


def test_an_output_that_is_one_of_the_files_of_a_folder_is_refused(llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows"
    write_folder(data, [TALK, *ROWS])
    ran = CliRunner().invoke(app, ["train", str(llama), str(data), "-o", str(data / "b.jsonl"), "--force"])
    assert "b.jsonl is an input" in str(ran.exception)
