"""A server that answers requests for several fine-tunes of one model.

Usage: python server.py BASE TASK=VECTOR.lota ... [--port 8000]

One copy of the base is in memory. A request names its task, and the server switches the model to the vector of the task
before it generates. Requests that wait for the same task are answered together, so that the model is switched as rarely
as possible. The vector of the next task is decoded in the background. It needs
`pip install 'taskvec[train]' fastapi uvicorn`.

    curl localhost:8000/generate -H 'Content-Type: application/json' -d '{"task": "sql", "prompt": "..."}'
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import taskvec
import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from transformers import AutoTokenizer

MOST = 16  # the most requests that are answered before another task gets its turn


class Request(BaseModel):
    """The body of POST /generate."""

    task: str
    prompt: str = Field(min_length=1)
    max_new_tokens: int = Field(32, ge=1, le=4096)


@dataclass
class Waiting:
    """A request that has not been answered yet."""

    request: Request
    answer: asyncio.Future[dict[str, Any]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Worker:
    """Answers requests, one task at a time, in the order in which tasks were first asked for.

    Args:
        switcher: The model and its tasks.
        tokenizer: The tokenizer of the model.
    """

    def __init__(self, switcher: taskvec.TaskSwitcher, tokenizer: Any) -> None:
        self.switcher = switcher
        self.tokenizer = tokenizer
        self.swaps: list[float] = []  # seconds per switch of the model
        self.queues: dict[str, list[Waiting]] = {}
        self.has_work = asyncio.Event()

    def submit(self, request: Request) -> asyncio.Future[dict[str, Any]]:
        """Put a request into the queue of its task."""
        waiting = Waiting(request)
        self.queues.setdefault(request.task, []).append(waiting)
        self.has_work.set()
        return waiting.answer

    async def run(self) -> None:
        """Answer requests forever."""
        while True:
            await self.has_work.wait()
            if not self.queues:
                self.has_work.clear()
                continue
            task = next(iter(self.queues))
            queue = self.queues.pop(task)
            batch, rest = queue[:MOST], queue[MOST:]
            if rest:
                self.queues[task] = rest
            following = next((name for name in self.queues if name != task), None)
            if following is not None:
                self.switcher.prefetch(following)
            try:
                answers = await asyncio.to_thread(self.answer, task, [waiting.request for waiting in batch])
            except Exception as error:  # such as a vector that cannot be read: the worker must go on
                answers = [error] * len(batch)
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.answer.done():  # the client went away
                    continue
                if isinstance(answer, Exception):
                    waiting.answer.set_exception(HTTPException(500, f"{type(answer).__name__}: {answer}"))
                else:
                    waiting.answer.set_result(answer)

    def answer(self, task: str, requests: Sequence[Request]) -> list[dict[str, Any] | Exception]:
        """Generate the answers to requests for one task. No other thread changes the weights meanwhile."""
        before, start = self.switcher.digest, time.perf_counter()
        answers: list[dict[str, Any] | Exception] = []
        with self.switcher.use(task) as model, torch.inference_mode():
            if self.switcher.digest != before:
                self.swaps.append(time.perf_counter() - start)
            for request in requests:
                try:
                    answer = self.generate(model, request)
                except Exception as error:  # such as a prompt that the tokenizer refuses
                    answers.append(error)
                else:
                    answers.append({"task": task, "digest": self.switcher.digest, "answer": answer})
        return answers

    def generate(self, model: Any, request: Request) -> str:
        """Generate one answer by greedy decoding."""
        inputs = self.tokenizer(request.prompt, return_tensors="pt").to(model.device)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
        )
        answer: str = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer


def make_app(base: str, vectors: dict[str, str]) -> FastAPI:
    """Load the model and return the application.

    Args:
        base: A model folder or a Hub id.
        vectors: Task name -> path of a `.lota` file.
    """
    model = taskvec.load(base)
    worker = Worker(taskvec.TaskSwitcher(model, vectors), AutoTokenizer.from_pretrained(base))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(worker.run())
        yield
        running.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/generate")
    async def generate(request: Request) -> dict[str, Any]:
        if request.task not in worker.switcher.tasks:
            raise HTTPException(404, f"no task {request.task!r}; there are {', '.join(worker.switcher.tasks)}")
        return await worker.submit(request)

    @app.get("/tasks")
    async def tasks() -> dict[str, Any]:
        return {"tasks": worker.switcher.tasks, "swaps": worker.swaps}

    return app


def main() -> None:
    """Run the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a model folder or a Hub id")
    parser.add_argument("tasks", nargs="+", metavar="TASK=VECTOR.lota")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    vectors = {}
    for text in arguments.tasks:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            parser.error(f"expected TASK=VECTOR.lota, found {text!r}")
        vectors[name] = path
    try:
        app = make_app(arguments.base, vectors)
    except (taskvec.TaskvecError, taskvec.FormatError, OSError) as error:
        sys.exit(f"server.py: {error}")
    uvicorn.run(app, port=arguments.port, log_level="warning", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
