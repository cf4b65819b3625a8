"""Uploads, downloads and the model card."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.adapters import make_adapter
from support.building import package, vector_of
from support.hub import Files, Hub, python, run_all

from taskvec import TaskVector
from taskvec.hub.card import merge_tables, metadata_of, read_metadata, section, updated
from taskvec.hub.reference import Reference
from taskvec_formats import Header, Identity, SparseTensor

pytestmark = pytest.mark.slow

BASE = Identity("base", "ba5e" * 16)


def ran(done: list[subprocess.CompletedProcess[str]]) -> list[str]:
    """Check that commands succeeded, and return what they printed."""
    for each in done:
        assert each.returncode == 0, each.stderr
        assert each.stderr == "", each.args
    return [each.stdout for each in done]


def files_of(hub: Hub, name: str, revision: str = "main") -> dict[str, bytes]:
    found = hub.repos[name].files(revision)
    assert found is not None
    return found[1]


def front(page: bytes) -> dict[str, Any]:
    """Return the metadata of a model card."""
    document = yaml.safe_load(page.decode().split("---\n")[1])
    assert isinstance(document, dict)
    return document


def test_push_pull_merge_push(hub: Hub, home: Path, made: Files, tmp_path: Path) -> None:
    environment = hub.environment(home)
    one, two = made.vectors
    said = ran(
        run_all(
            environment,
            ["push", one, "user/one"],
            ["push", two, "user/two/in/two.lota@dev", "--json", "--message", "Second"],
            ["pull", "user/one"],
            ["pull", "user/two@dev", "-o", "new/two.lota", "--json"],
            ["merge", "user/one", "hf://user/two/in/two.lota@dev", "-o", "both.lota"],
            ["arith", "2*user/one/one.lota - hf://user/two@dev/in/two.lota", "-o", "sum.lota"],
            ["arith", "2*one.lota - new/two.lota", "-o", "same.lota"],
            ["push", "both.lota", "user/both", "--private", "--json"],
            ["push", "both.lota", "user/both", "--json"],
            ["push", "one.lota", "user/both", "--create-pr", "--json"],
            cwd=tmp_path,
        )
    )
    commit = hub.repos["user/one"].refs["main"]
    assert said[0].splitlines() == [
        "user/one/one.lota: uploaded",
        f"commit: {commit}",
        f"url: {hub.url}/user/one/commit/{commit}",
    ]
    second = json.loads(said[1])
    assert (second["revision"], second["file"], second["changed"]) == ("dev", "in/two.lota", True)
    assert second["commit"] == hub.repos["user/two"].refs["dev"]
    assert "in/two.lota" not in files_of(hub, "user/two")
    assert f"from: user/one/one.lota@{commit}" in said[2]
    assert json.loads(said[3])["commit"] == second["commit"]
    assert (tmp_path / "one.lota").read_bytes() == one.read_bytes() == files_of(hub, "user/one")["one.lota"]
    assert (tmp_path / "new/two.lota").read_bytes() == two.read_bytes()
    merged = TaskVector.open(tmp_path / "both.lota")
    assert [parent["name"] for parent in merged.provenance["parents"]] == ["user/one/one.lota", "user/two/in/two.lota"]
    whole, again, request = (json.loads(text) for text in said[7:])
    assert TaskVector.open(tmp_path / "sum.lota") == TaskVector.open(tmp_path / "same.lota")
    assert hub.repos["user/both"].private
    assert files_of(hub, "user/both")["both.lota"] == (tmp_path / "both.lota").read_bytes()
    assert (whole["changed"], again["changed"], again["commit"]) == (True, False, whole["commit"])
    assert (request["revision"], request["url"]) == ("refs/pr/1", f"{hub.url}/user/both/discussions/1")
    assert "one.lota" not in files_of(hub, "user/both")
    assert "one.lota" in files_of(hub, "user/both", "refs/pr/1")


def test_the_base_is_recorded_and_found_again(hub: Hub, home: Path, made: Files, tmp_path: Path) -> None:
    """The commit that was packed is used, also if the main branch has other weights by now."""
    environment, commit = hub.environment(home), hub.repos["org/base"].refs["main"]
    ran(
        run_all(
            environment,
            ["pack", "org/base", made.tuned, "-o", "one.lota"],
            ["pack", f"hf://org/base@{commit}", made.folder / "other", "-o", "two.lota"],
            ["merge", "one.lota", "two.lota", "-o", "both.lota"],
            ["shrink", "both.lota", "--sparsity", "0.9", "-o", "small.lota"],
            ["arith", "0.5 * one.lota", "-o", "half.lota"],
            ["push", "one.lota", "user/one"],
            ["push", "both.lota", "user/both"],
            cwd=tmp_path,
        )
    )
    for name in ("one", "two", "both", "small", "half"):
        vector = TaskVector.open(tmp_path / f"{name}.lota")
        assert vector.base.name == "org/base"
        assert vector.provenance["hub_base"] == {"repo": "org/base", "revision": commit}, name
    hub.add("org/base", {"model.safetensors": (made.folder / "other" / "model.safetensors").read_bytes()})
    said = ran(
        run_all(
            hub.environment(tmp_path / "other home"),
            ["unpack", "user/one", "-o", "out"],
            ["unpack", "user/one", "-o", "json", "--json"],
            ["inspect", "user/one"],
            cwd=tmp_path,
        )
    )
    assert f"base: org/base@{commit[:12]}, which user/one/one.lota records\n" in said[0]
    assert json.loads(said[1])["base"] == {"name": "org/base", "revision": commit}
    assert f"base on the Hub: org/base@{commit}\n" in said[2]
    assert package(tmp_path / "out") == package(made.tuned)
    (refused,) = run_all(environment, ["unpack", "one.lota", "--base", "org/base", "-o", "x"], cwd=tmp_path)
    assert refused.returncode == 1  # other weights now
    page = files_of(hub, "user/one")["README.md"]
    assert front(page) == {
        "library_name": "taskvec",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "tags": ["taskvec", "task-vector"],
        "license": "apache-2.0",
    }
    assert front(files_of(hub, "user/both")["README.md"])["base_model_relation"] == "merge"


def test_training_records_the_base(hub: Hub, home: Path, llama: Path, data: Path, tmp_path: Path) -> None:
    commit = hub.add_folder("org/llama", llama)
    options = ["--steps", "1", "--calibration-steps", "1", "--lr", "1e-3", "--device", "cpu"]
    train, push = run_all(
        hub.environment(home),
        ["train", "org/llama", data, "-o", "task.lota", *options],
        ["push", "task.lota", "user/task", "--json"],
        cwd=tmp_path,
    )
    assert train.returncode == 0, train.stderr
    made = TaskVector.open(tmp_path / "task.lota").provenance
    assert made["hub_base"] == {"repo": "org/llama", "revision": commit}
    assert json.loads(push.stdout)["notes"] == ["the model card names no license: that of org/llama names none"]
    page = files_of(hub, "user/task")["README.md"].decode()
    assert "\n| method | lota |\n" in page
    assert "lottery-ticket-adaptation" in front(page.encode())["tags"]


def test_adapters_of_the_hub_are_named_and_record_the_base(hub: Hub, home: Path, llama: Path, tmp_path: Path) -> None:
    commit = hub.add_folder("org/llama", llama)
    hub.add_folder("user/lora", make_adapter(llama, tmp_path / "adapter"))
    ran(
        run_all(
            hub.environment(home),
            ["convert", "user/lora", "--base", "org/llama", "-o", "one.lota"],
            ["convert", "user/lora", "adapter", "--base", "org/llama", "-o", "sum.lota"],
            ["merge", "user/lora", "adapter", "--base", "org/llama", "--method", "linear", "-o", "both"],
            cwd=tmp_path,
        )
    )
    one, total = (TaskVector.open(tmp_path / f"{name}.lota") for name in ("one", "sum"))
    assert one.header.tuned is not None
    assert one.header.tuned.name == "user/lora"
    for each in (one, total):
        assert each.provenance["hub_base"] == {"repo": "org/llama", "revision": commit}
    assert [each["name"] for each in total.provenance["adapters"]] == ["user/lora", "adapter"]
    page = (tmp_path / "both" / "README.md").read_text()
    assert "| user/lora.lota | 1.0 |" in page
    assert "| adapter.lota | 1.0 |" in page


def test_the_commands_and_the_program_of_the_card_run(hub: Hub, home: Path, made: Files, tmp_path: Path) -> None:
    """For a base of the Hub with a recorded commit, and for one in a folder."""
    environment = hub.environment(home)
    ran(
        run_all(
            environment,
            ["pack", "org/base", made.tuned, "-o", "hub.lota"],
            ["push", "hub.lota", "user/one", "--revision", "dev"],
            ["push", made.vectors[0], "user/local"],
            cwd=tmp_path,
        )
    )
    for name, revision in (("user/one", "dev"), ("user/local", "main")):
        page = files_of(hub, name, revision)["README.md"].decode()
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "base").symlink_to(made.base)
        (command,) = re.findall(r"```bash\ntaskvec (.*)\n```", page)
        ran(run_all(environment, command.split(), cwd=folder))
        (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        done = python(environment, program, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert package(folder / "model") == package(folder / "tuned") == package(made.tuned)


def test_the_python_interface(hub: Hub, home: Path, made: Files, tmp_path: Path) -> None:
    program = f"""
import taskvec

vector = taskvec.pack("org/base", {str(made.tuned)!r}, "one.lota")
pushed = vector.push_to_hub("user/one", private=True, message="First")
assert (pushed.file, pushed.changed, pushed.notes) == ("one.lota", True, ()), pushed
half = 0.5 * vector
named = half.push_to_hub("user/one", "in/half.lota", revision="dev")
assert named.revision == "dev"
again = taskvec.TaskVector.from_pretrained("user/one", revision=pushed.commit)
assert again == vector and again.name == "user/one/one.lota" and again.provenance == vector.provenance
remote = taskvec.TaskVector.from_pretrained("user/one", "in/half.lota", revision="dev", download=False)
assert remote.inputs == () and len(remote["model.layers.1.w"]) > 0
copied = remote.push_to_hub("user/copy")
assert copied.file == "half.lota"
merged = taskvec.merge(["user/one/one.lota@dev", remote])
taskvec.apply("user/one", None, "applied")
assert taskvec.overlap(["user/one", remote])[0].total.intersection > 0
try:
    vector.push_to_hub("user/one", 3)
except taskvec.TaskvecError as error:
    assert str(error) == "path_in_repo must be a string, found 3", error
try:
    taskvec.apply(taskvec.TaskVector.open({str(made.vectors[0])!r}), None, "x")
except taskvec.TaskvecError as error:
    assert str(error) == "one.lota does not record a base on the Hugging Face Hub: give the base (`base`)", error
"""
    done = python(hub.environment(home), program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert package(tmp_path / "applied") == package(made.tuned)
    assert hub.repos["user/one"].private


def test_vectors_and_models_of_the_hub_in_merges_and_recipes(hub: Hub, home: Path, made: Files, tmp_path: Path) -> None:
    hub.add("user/one", {"one.lota": made.vectors[0].read_bytes()})
    hub.add_folder("user/other", made.folder / "other")
    hub.add_folder("user/mixed", made.folder / "other")
    hub.add("user/mixed", {"one.lota": made.vectors[0].read_bytes()})
    recipe = tmp_path / "recipe.yaml"
    lines = "merge_method: task_arithmetic\nbase_model: {}\nmodels:\n- model: {}\n- model: {}\n"
    recipe.write_text(lines.format("org/base@main", "user/one@main", "user/other"))
    local = tmp_path / "local.yaml"
    local.write_text(lines.format(made.base, made.vectors[0], made.folder / "other"))
    *done, mixed, named = run_all(
        hub.environment(home),
        ["merge", "--recipe", recipe, "-o", "remote"],
        ["merge", "--recipe", local, "-o", "local"],
        ["merge", "user/one", "user/other", "--base", "org/base", "--method", "linear", "-o", "listed"],
        ["merge", "user/mixed", "--base", "org/base", "-o", "mixed"],
        ["merge", "user/mixed/one.lota", "--base", "org/base", "-o", "named"],
        cwd=tmp_path,
    )
    ran(done)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("remote", "local", "listed")]
    assert weights[0] == weights[1] == weights[2]
    assert mixed.returncode == 2
    assert mixed.stderr == (
        "taskvec: user/mixed contains a model and .lota files: name a file, as in user/mixed/one.lota\n"
    )
    assert named.returncode == 0, named.stderr


def test_a_damaged_file_is_not_uploaded(hub: Hub, home: Path, made: Files, tmp_path: Path) -> None:
    data = bytearray(made.vectors[0].read_bytes())
    data[-1000] ^= 1
    (tmp_path / "bad.lota").write_bytes(data)
    done, pulled = run_all(
        hub.environment(home), ["push", "bad.lota", "user/bad"], ["inspect", "user/bad"], cwd=tmp_path
    )
    assert done.returncode == 1
    assert "the stored bytes" in done.stderr or "digest" in done.stderr
    assert pulled.returncode == 1
    assert "user/bad" not in hub.repos
    hub.add("user/bad", {"bad.lota": bytes(data)})
    (done,) = run_all(hub.environment(home), ["pull", "user/bad", "-o", "new.lota"], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("taskvec: user/bad/bad.lota: tensor 'model.layers.1.w', block at element 0, byte ")
    assert "; to download it again, remove " in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["bad.lota"]


def test_a_model_card_that_changes_during_the_upload_is_not_lost(hub: Hub, home: Path, made: Files) -> None:
    hub.add("user/one", {"README.md": b"first\n"})

    def edit(method: str, path: str) -> None:
        if path.endswith("/preupload/main"):
            hub.before = lambda method, path: None
            hub.add("user/one", {"README.md": b"second\n"})

    hub.before = edit
    environment = hub.environment(home)
    done, again = run_all(environment, *[["push", made.vectors[0], "user/one"]] * 2, cwd=home.parent)
    assert done.returncode == 1
    assert "pushing to user/one: the repository was changed by someone else in the meantime; try again" in done.stderr
    assert again.returncode == 0
    assert "second\n" in files_of(hub, "user/one")["README.md"].decode()


def test_a_page_of_a_user_is_kept(hub: Hub, home: Path, made: Files) -> None:
    page = b"---\n# mine\nlicense: mit\nbase_model: org/elsewhere\ntags: [mine]\n---\n# My vectors\n\nText.\n"
    hub.add("user/one", {"README.md": page})
    one, two = made.vectors
    said = ran(
        run_all(
            hub.environment(home),
            ["pack", "org/base", made.tuned, "-o", home.parent / "one.lota"],
            ["push", home.parent / "one.lota", "user/one"],
            ["push", two, "user/one"],
            ["push", one, "user/one"],
            cwd=home.parent,
        )
    )
    assert "note: README.md keeps its `base_model`, 'org/elsewhere'; for taskvec it is 'org/base'\n" in said[1]
    found = files_of(hub, "user/one")["README.md"].decode()
    assert found.startswith(
        "---\n# mine\nlicense: mit\nbase_model: org/elsewhere\ntags: [mine]\nlibrary_name: taskvec\n"
    )
    assert "---\n# My vectors\n\nText.\n\n<!-- taskvec {" in found
    assert [found.count(f"\n## {name}.lota\n") for name in ("one", "two")] == [1, 1]


def test_a_license_that_is_no_text_is_not_copied(hub: Hub, home: Path, made: Files) -> None:
    hub.add("org/base", {"README.md": b"---\nlicense: &a [*a]\nlicense_name: 2024-01-01\n---\n"})
    one = home.parent / "one.lota"
    said = ran(
        run_all(
            hub.environment(home),
            ["pack", "org/base", made.tuned, "-o", one],
            ["push", one, "user/one"],
            cwd=home.parent,
        )
    )
    assert "note: the model card names no license: that of org/base names none\n" in said[1]


# the text of a model card, without a server


def header(**provenance: Any) -> Header:
    return Header("vector", BASE, None, tensors=(), provenance=provenance)


def test_sections_are_replaced_and_metadata_follow() -> None:
    first = {"library_name": "taskvec", "base_model": "a/b", "tags": ["taskvec"], "license": "mit"}
    second = {**first, "base_model": "c/d", "tags": ["taskvec", "merge"]}
    page, _ = updated(None, "repo", "x.lota", first, "BODY 1")
    assert front(page.encode()) == first
    both, notes = updated(page, "repo", "y.lota", second, "BODY 2")
    assert notes == []
    assert front(both.encode()) == {**first, "base_model": ["a/b", "c/d"], "tags": ["taskvec", "merge"]}
    assert updated(both, "repo", "y.lota", second, "BODY 2") == (both, [])
    edited = both.replace("# repo", "# My title\n\nMy text.")
    only, _ = updated(edited, "repo", "x.lota", second, "BODY 3")
    assert front(only.encode())["base_model"] == "c/d"
    assert "# My title\n\nMy text." in only
    assert [only.count(body) for body in ("BODY 1", "BODY 2", "BODY 3")] == [0, 1, 1]
    assert only.index("BODY 3") < only.index("BODY 2")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", "# repo\n"),
        ("Text without metadata.\n", "Text without metadata.\n\n"),
        ("---\n[not, a, mapping]\n---\nText.\n", "---\n[not, a, mapping]\n---\nText.\n"),
        ("---\nbad: [yaml\n---\nText.\n", "---\nbad: [yaml\n---\nText.\n"),
        ("---\r\nlicense: mit\r\n---\r\nText.\r\n", "---\r\nlicense: mit\r\n"),
        ("A line.\n---\nAnother.\n", "A line.\n---\nAnother.\n"),
        ("<!-- taskvec {broken} -->\nmine\n<!-- /taskvec -->\n", "{broken} -->\nmine\n"),
        ("---\n{license: mit}\n---\nText.\n", "---\n{license: mit}\n---\nText.\n"),
        ("---\n  license: mit\n---\nText.\n", "---\n  license: mit\n---\nText.\n"),
        ("---\nlicense: mit\n...\n---\nText.\n", "---\nlicense: mit\n...\n---\nText.\n"),
        ('<!-- taskvec {"file": 3} -->\nmine\n<!-- /taskvec -->\n', '{"file": 3} -->\nmine\n'),
    ],
)
def test_any_text_of_a_user_is_kept(text: str, kept: str) -> None:
    page, _ = updated(text, "repo", "x.lota", {"library_name": "taskvec"}, "BODY")
    assert kept in page
    assert page.count("BODY") == 1
    metadata = read_metadata(text)
    assert read_metadata(page) in (metadata, {**(metadata or {}), "library_name": "taskvec"})
    again, _ = updated(page, "repo", "x.lota", {"library_name": "taskvec"}, "BODY")
    assert again == page


def test_metadata_of_any_type_are_named() -> None:
    text = "---\nlicense: 2024-01-01\nbase_model: &a [*a]\n---\nText.\n"
    _, notes = updated(text, "repo", "x.lota", {"license": "mit", "base_model": "a/b"}, "BODY")
    assert [note.partition(";")[0] for note in notes] == [
        "README.md keeps its `base_model`, [[...]]",
        "README.md keeps its `license`, datetime.date(2024, 1, 1)",
    ]


def test_a_section_ends_at_its_own_comment() -> None:
    """Names of files and lines that end as on Windows do not hide the end."""
    metadata = {"library_name": "taskvec"}
    body = "```bash\ntaskvec unpack 'user/repo/x<!-- /taskvec -->.lota'\n```"
    page, _ = updated(None, "repo", "x<!-- /taskvec -->.lota", metadata, body)
    assert updated(page, "repo", "x<!-- /taskvec -->.lota", metadata, body) == (page, [])
    windows = page.replace("\n", "\r\n")
    again, _ = updated(windows, "repo", "x<!-- /taskvec -->.lota", metadata, "BODY")
    assert again.count("BODY") == 1
    assert "```bash" not in again


def test_metadata_of_training_and_of_untrusted_files() -> None:
    run: dict[str, list[Any]] = {
        "data": [{"name": "org/data", "split": "train", "use": "data"}, {"name": "own.jsonl", "use": "data"}, 3]
    }
    run["data"] += [{"name": name, "split": "train"} for name in ("squad", "a b", "a/b\n", 3, None, "a/b/c")]
    facts = metadata_of(header(made_by="train", method="lota", run=run), {"license": "mit"})
    assert facts["datasets"] == ["org/data", "squad"]
    assert facts["tags"] == ["taskvec", "task-vector", "lottery-ticket-adaptation"]
    assert "base_model" not in facts
    hostile = header(
        made_by="merge", parents=["x", {"name": "<b>-->"}], weights=3, options=[], hub_base={"repo": "../x"}
    )
    text = section(Reference("user/repo", "x.lota"), hostile, 10, "0" * 64)
    assert "<b>" not in text
    assert "-->" not in text
    assert metadata_of(hostile, {}) == {"library_name": "taskvec", "tags": ["taskvec", "task-vector", "merge"]}
    assert merge_tables({})[:2] == ["| vector | weight | digest |", "|---|---|---|"]
    assert "run" not in section(Reference("u/r", "x.lota"), header(made_by="train", run=[1]), 10, "0" * 64)


# a process that is killed


def killed(hub: Hub, hold: tuple[str, str, int], environment: dict[str, str], *words: object, cwd: Path) -> None:
    """Start a command, and kill it when it has come to a request."""
    with hub.holding(*hold) as held:
        process = subprocess.Popen(
            [sys.executable, "-c", "from taskvec_cli.main import main; main()", *map(str, words)],
            env=environment,
            cwd=cwd,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert held.arrived.wait(60)
        finally:
            process.kill()
            process.wait()


def test_each_step_can_be_killed_and_run_again(hub: Hub, home: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("one", "two"):
        values = random.normal(size=100_000).astype(np.float32)
        positions = np.sort(random.choice(1 << 20, 100_000, replace=False))
        vector_of({"w": SparseTensor((1 << 20,), positions, values)}).save(tmp_path / f"{name}.lota")
    environment = {**hub.environment(home), "PYTHONPATH": ":".join(sys.path)}
    halfway, part = 1 << 17, 1 << 16

    def again(*words: object) -> None:
        ran(run_all(environment, words, cwd=tmp_path))

    def stop(method: str, path: str, after: int, *words: object) -> None:
        killed(hub, (method, path, after), environment, *words, cwd=tmp_path)

    stop("PUT", "/storage/", halfway, "push", "one.lota", "user/one")
    assert (hub.objects, list(files_of(hub, "user/one"))) == ({}, [".gitattributes"])
    stop("POST", "/api/models/user/one/commit/", 100, "push", "one.lota", "user/one")
    assert list(files_of(hub, "user/one")) == [".gitattributes"]
    again("push", "one.lota", "user/one")
    assert files_of(hub, "user/one")["one.lota"] == (tmp_path / "one.lota").read_bytes()
    hub.add("user/two", {"two.lota": (tmp_path / "two.lota").read_bytes()})

    def is_whole(path: Path) -> bool:
        return path.read_bytes() in [(tmp_path / f"{name}.lota").read_bytes() for name in ("one", "two")]

    stop("GET", "/storage/", part, "pull", "user/one", "-o", "new.lota")
    assert not (tmp_path / "new.lota").exists()
    assert not list(home.rglob("*.lota"))
    again("pull", "user/one", "-o", "new.lota")
    assert (tmp_path / "new.lota").read_bytes() == (tmp_path / "one.lota").read_bytes()

    stop("GET", "/storage/", part, "merge", "user/one", "user/two", "-o", "both.lota")
    assert not (tmp_path / "both.lota").exists()
    assert all(is_whole(path) for path in home.rglob("*.lota"))
    merges = [
        ["merge", "user/one", "user/two", "-o", "both.lota"],
        ["merge", "one.lota", "two.lota", "-o", "local.lota"],
    ]
    ran(run_all(environment, *merges, cwd=tmp_path))
    assert TaskVector.open(tmp_path / "both.lota") == TaskVector.open(tmp_path / "local.lota")

    stop("POST", "/api/models/user/both/commit/", 100, "push", "both.lota", "user/both")
    assert "both.lota" not in files_of(hub, "user/both")
    again("push", "both.lota", "user/both")
    assert files_of(hub, "user/both")["both.lota"] == (tmp_path / "both.lota").read_bytes()
    assert hub.authorized == {"hub"}
