"""Named vectors for one model: switching, prefetching, and the example server under load."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.live import Small, loaded, on_disk, state_of, task
from support.models import make_llama
from transformers import AutoTokenizer

import taskvec
from taskvec import TaskSwitcher, TaskVector, attach, attached
from taskvec.applying.overlay import Patched
from taskvec.errors import BaseMismatchError, UsageError
from taskvec.models.live_state import state_of as live_state

pytestmark = pytest.mark.slow

SERVER = Path(__file__).parents[2] / "docs" / "examples" / "server.py"


def test_a_switcher_attaches_the_vector_of_the_task(small: Small, tmp_path: Path) -> None:
    model, base, files = small
    third = task(base.path, tmp_path / "third.lota", slice(None), seed=5)
    expected = {path.stem: on_disk(Patched(base, TaskVector.open(path))) for path in (*files, third)}
    seen: list[str | None] = []
    with TaskSwitcher(model, {path.stem: path for path in files}) as switcher:
        switcher.on_change(seen.append)
        switcher.add("third", TaskVector.open(third))
        assert switcher.tasks == ("0", "1", "third")
        assert (switcher.task, switcher.digest) == (None, None)
        for name in ("0", "third", "1", "1", "0"):
            with switcher.use(name) as used:
                assert used is model
                assert state_of(model, base) == expected[name]
            assert switcher.task == name
        assert repr(switcher) == "<TaskSwitcher on LlamaForCausalLM: 3 tasks, '0' is attached>"
        with switcher.use(None):
            assert state_of(model, base) == on_disk(base)
        switcher.remove("third")
        with pytest.raises(UsageError, match="the task is one of 0, 1, found 'third'"), switcher.use("third"):
            pass
        with switcher.use("1"):
            pass
    assert state_of(model, base) == on_disk(base)
    assert attached(model) == []
    assert len(seen) == 7


def test_a_task_that_does_not_fit_leaves_the_one_before(small: Small, tmp_path: Path) -> None:
    model, base, files = small
    other = task(make_llama(tmp_path / "other", seed=9), tmp_path / "x.lota", slice(None), seed=1)
    with TaskSwitcher(model, {"good": files[0], "bad": other}) as switcher:
        with switcher.use("good"):
            before = state_of(model, base)
        with pytest.raises(BaseMismatchError):
            switcher.prefetch("bad").result()
        with pytest.raises(BaseMismatchError), switcher.use("bad"):
            pass
        assert switcher.task == "good"
        assert state_of(model, base) == before
        with pytest.raises(UsageError, match="no such file"):
            switcher.add("absent", tmp_path / "absent.lota")
    with pytest.raises(UsageError, match="`cache_bytes` must be at least 0, found -1"):
        TaskSwitcher(model, cache_bytes=-1)


def test_decoded_vectors_are_kept_within_the_limit(small: Small) -> None:
    model, base, files = small
    with attach(model, files[0]) as handle:
        size = handle.bytes_kept
    tasks = {"a": files[0], "b": files[1]}
    with TaskSwitcher(model, tasks, base=base.path, cache_bytes=size + 1) as switcher:
        cache = live_state(model).cache
        for name in ("a", "b", "a"):
            switcher.prefetch(name).result()
            with switcher.use(name):
                assert state_of(model, base) != on_disk(base)
                assert list(cache) == [switcher.digest]


def test_threads_get_the_weights_of_their_task(small: Small, tmp_path: Path) -> None:
    """Also while vectors are decoded again and again, because none of them is kept."""
    model, base, files = small
    ids = torch.arange(6)[None]
    expected = {}
    for file in files:
        with attach(model, file):
            expected[file.stem] = model(ids).logits
    with TaskSwitcher(model, {file.stem: file for file in files}, cache_bytes=0) as switcher:

        def ask(number: int) -> bool:
            name = files[number % 2].stem
            with switcher.use(name):
                return torch.equal(model(ids).logits, expected[name])

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(ask, range(40)))
    assert state_of(model, base) == on_disk(base)


def test_the_example_server_answers_as_the_written_models_do(small: Small, tmp_path: Path) -> None:
    """Sixty requests for three tasks, eight at a time."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    _, base, files = small
    files = [*files, task(base.path, tmp_path / "2.lota", slice(None), seed=5)]
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    prompts = ["one plus one is", "two plus two is", "one plus two is"]
    expected = {}
    for file in files:
        taskvec.apply(file, base, tmp_path / f"written-{file.stem}")
        model = loaded(tmp_path / f"written-{file.stem}")
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
            output = model.generate(inputs, do_sample=False, max_new_tokens=8, attention_mask=torch.ones_like(inputs))
            expected[file.stem, prompt] = tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
    assert len(set(expected.values())) > 3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    broken = shutil.copy(files[0], tmp_path / "broken.lota")
    tasks = [f"{file.stem}={file}" for file in [*files, broken]]
    command = [sys.executable, SERVER, base.path, *tasks, "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server, httpx.Client(timeout=60) as client:
        try:
            while True:
                assert server.poll() is None, server.stderr and server.stderr.read()
                try:
                    assert client.get(f"{address}/tasks").json()["tasks"] == ["0", "1", "2", "broken"]
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)

            def ask(number: int) -> bool:
                name, prompt = files[number % 3].stem, prompts[number // 3 % 3]
                body = {"task": name, "prompt": prompt, "max_new_tokens": 8}
                found = client.post(f"{address}/generate", json=body)
                assert found.status_code == 200, found.text
                answer = found.json()
                return answer == {
                    "task": name,
                    "digest": TaskVector.open(files[number % 3]).digest,
                    "answer": expected[name, prompt],
                }

            def status(**body: object) -> int:
                text = json.dumps({"task": "0", "prompt": prompts[0], "max_new_tokens": 1, **body})
                headers = {"Content-Type": "application/json"}
                return client.post(f"{address}/generate", content=text, headers=headers).status_code

            with broken.open("r+b") as file:
                file.truncate(broken.stat().st_size // 2)
            assert [status(prompt=""), status(max_new_tokens=0), status(task="x")] == [422, 422, 404]
            assert status(task="broken") == 500
            with ThreadPoolExecutor(8) as threads:
                assert all(threads.map(ask, range(60)))
            assert len(client.get(f"{address}/tasks").json()["swaps"]) >= 3
        finally:
            server.terminate()


@pytest.mark.parametrize(
    ("arguments", "message"), [(["base", "a"], "expected TASK=VECTOR.lota, found 'a'"), (["absent", "a=x"], "absent")]
)
def test_the_example_server_refuses_arguments_in_one_sentence(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("fastapi")
    done = subprocess.run(
        [sys.executable, SERVER, *arguments], capture_output=True, check=False, text=True, cwd=tmp_path
    )
    assert done.returncode
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_task_is_not_used_within_another_one(small: Small) -> None:
    model, _, files = small
    with TaskSwitcher(model, {"a": files[0], "b": files[1]}) as switcher:
        with switcher.use("a"):
            switcher.prefetch("b").result(30)  # the lock of the model is not needed to decode
            with pytest.raises(UsageError, match="task 'a' is in use in this thread"), switcher.use("b"):
                pass
            assert switcher.task == "a"
        with switcher.use("b"):
            assert switcher.task == "b"
    for closed in (switcher.prefetch, lambda name: switcher.use(name).__enter__()):
        with pytest.raises(UsageError, match="the switcher is closed"):
            closed("a")


def test_a_switcher_that_was_closed_attaches_nothing(small: Small) -> None:
    model, base, files = small
    switcher = TaskSwitcher(model, {"a": files[0], "b": files[1]})
    found: list[Exception] = []

    def wait_for_b() -> None:
        try:
            with switcher.use("b"):
                pass
        except UsageError as error:
            found.append(error)

    with switcher.use("a"):
        with pytest.raises(UsageError, match="in use in this thread"):
            switcher.close()
        waiting = threading.Thread(target=wait_for_b)
        waiting.start()
        closing = threading.Thread(target=switcher.close)
        closing.start()
        time.sleep(0.1)
    waiting.join()
    closing.join()
    assert switcher.digest is None
    assert state_of(model, base) == on_disk(base)
    assert all("closed" in str(error) for error in found)


def test_arguments_of_a_switcher_are_checked(small: Small, tmp_path: Path) -> None:
    model, _, files = small
    with pytest.raises(UsageError, match="tasks must be"):
        TaskSwitcher(model, ["a"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no such file"):
        TaskSwitcher(model, {"a": tmp_path / "absent.lota"})
    with attach(model, files[0]), pytest.raises(UsageError, match=r"0\.lota is attached to the model: detach it"):
        TaskSwitcher(model, {"a": files[1]})
    assert attached(model) == []
    with TaskSwitcher(model) as switcher, pytest.raises(UsageError, match="no task 'a': the switcher has no tasks"):
        switcher.prefetch("a")
