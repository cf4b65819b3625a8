"""A user's program, for the type checker: `make check` checks it strictly, and nothing runs it."""

from pathlib import Path

import torch
from typing_extensions import assert_type

import taskvec


def report(stage: str, done: int, total: int, note: str) -> None:
    """A progress callback."""


vector = taskvec.diff("base", Path("tuned"), 0.9, kind="vector", progress=True)
assert_type(vector, taskvec.TaskVector)
vector.save("x.lota", force=True)
assert_type(taskvec.TaskVector.open("x.lota"), taskvec.TaskVector)
assert_type(vector["w"], taskvec.SparseTensor)
assert_type(vector + 0.5 * vector - vector / 2, taskvec.TaskVector)
assert_type(vector.shrink(0.99), taskvec.TaskVector)
assert_type(vector.to_torch("w", dense=True), torch.Tensor)
assert_type(vector.digest, str)
assert_type(taskvec.TaskVector.from_pretrained("user/repo", "x.lota", revision="main"), taskvec.TaskVector)
assert_type(vector.push_to_hub("user/repo", private=True), taskvec.Pushed)

base = taskvec.open_checkpoint("base")
assert_type(base, taskvec.Checkpoint)
applied = taskvec.apply("x.lota", base, Path("out"), dtype="bfloat16", shard_size=2**31, force=True, progress=report)
assert_type(applied, taskvec.Applied)
assert_type(applied.exact, bool | None)
taskvec.apply("user/repo", None, "out")
merged = taskvec.merge([vector, "y.lota"], "ties", [1.0, 0.5], density=0.2, lam=0.7, base=base, elect="mass")
assert_type(merged, taskvec.TaskVector)
model = taskvec.write_model(["x.lota", Path("y.lota")], "base", "merged", "ties", density=[0.2, 0.3])
assert_type(model, taskvec.MergedModel)
assert_type(taskvec.compose("a.lota", vector, "base"), taskvec.TaskVector)
assert_type(taskvec.overlap(["x.lota", vector])[0].total.jaccard, float)
taskvec.verify("x.lota", "base")

options = taskvec.TrainingOptions(sparsity=0.99, lr="auto", include=("*.mlp.*",))
trained = taskvec.train("base", "data.jsonl", options, disjoint_from=["x.lota"], mix=[("more.jsonl", 0.1)], seed=1)
assert_type(trained.vector, taskvec.TaskVector)
assert_type(trained.warnings, list[str])
assert_type(trained.curve.losses, list[float])
found = taskvec.evaluate("base", "test.jsonl", ["x.lota"], metrics=["loss"])
assert_type(found.metrics["loss"].value, float)

module = torch.nn.Linear(2, 2)
with taskvec.attach(module, "x.lota", 0.5, base="base") as handle:
    module(torch.zeros(2))
    handle.swap(["x.lota", vector], method="ties", weights=[1.0, 0.5])
    assert_type(handle.digest, str | None)
    assert_type(handle.bytes_kept, int)
assert_type(taskvec.attached(module), list[taskvec.Attachment])
with taskvec.sparse_finetune(module, {"weight": torch.tensor([0, 3])}) as tickets:
    torch.optim.SGD(tickets.parameters(), lr=0.1).step()
    tickets.scatter()
    assert_type(tickets.regrow(torch.optim.SGD(tickets.parameters()), total_steps=9, every=3).replaced, int)
try:
    taskvec.apply(vector, "base", "out")
except taskvec.errors.AlreadyAppliedError as error:
    print(error)
except (taskvec.TaskvecError, taskvec.FormatError) as error:
    print(error)
