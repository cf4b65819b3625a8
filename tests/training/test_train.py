"""LoTA training: exactly k entries, an untouched rest, and leaves that train what a dense mask would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import ROWS, make_llama, make_tokenizer, write_rows
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from taskvec import Applied, Checkpoint, TaskVector, apply, diff, merge
from taskvec.data.examples import read_examples
from taskvec.data.rows import IGNORED, collate, encode
from taskvec.errors import AlreadyAppliedError, DataError, DivergedError, MaskError, TrainingError, UsageError
from taskvec.evaluation.evaluate import evaluate
from taskvec.models.attach import attach
from taskvec.models.loading import load_model
from taskvec.models.placement import Place, bits_of, eligible_parameters, places
from taskvec.training.options import TrainingOptions
from taskvec.training.train import train
from taskvec_formats import ModelFolder

pytestmark = pytest.mark.slow

QUICK = TrainingOptions(calibration_steps=2, steps=3, batch_size=2, lr=1e-3, device="cpu")
UNCALIBRATED = replace(QUICK, calibration_steps=TrainingOptions.calibration_steps)  # where a setting of it is refused
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("fixture", ["llama", "llama_bf16", "gpt2"])
@pytest.mark.parametrize("sparsity", [0.9, 0.99])
def test_a_ticket_has_exactly_k_entries_and_leaves_the_rest_alone(
    fixture: str, sparsity: float, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    base = ModelFolder(folder)
    training = train(base, data, replace(QUICK, sparsity=sparsity))
    vector = training.vector
    eligible = sum(np.prod(base.tensors[name].shape) for name in vector)
    assert vector.eligible == eligible
    assert sum(len(vector[name]) for name in vector) == round((1 - sparsity) * eligible)
    assert len(training.calibration_losses) == 2
    assert len(training.curve.losses) == 3

    vector.save(tmp_path / "x.lota")
    saved = TaskVector.open(tmp_path / "x.lota")
    assert saved.header.tuned is None
    assert apply(saved, base, tmp_path / "out") == Applied(None)
    tuned = ModelFolder(tmp_path / "out")
    with pytest.raises(AlreadyAppliedError, match=r"x\.lota is applied to out already"):
        apply(saved, tuned, tmp_path / "twice")
    for name in base.tensors:
        changed = np.flatnonzero(tuned.bits(name) != base.bits(name))
        masked = vector[name].indices if name in vector else []
        assert np.isin(changed, masked).all(), f"{name} changed outside the mask"
    assert any((tuned.bits(name) != base.bits(name)).any() for name in vector)


def masked(vector: TaskVector) -> set[tuple[str, int]]:
    return {(name, int(place)) for name in vector for place in vector[name].indices}


@pytest.mark.parametrize("mask", ["magnitude", "random"])
def test_tasks_in_a_row_share_no_position(mask: str, llama: Path, data: Path, tmp_path: Path) -> None:
    """LoTTO: three tasks, then a fourth for which nothing is left; merging them is a disjoint sum."""
    base, earlier = ModelFolder(llama), []
    for task in range(3):
        options = replace(UNCALIBRATED if mask == "random" else QUICK, sparsity=0.7, seed=task, mask=mask)
        training = train(base, data, options, disjoint_from=earlier)
        training.vector.save(tmp_path / f"{task}.lota")
        earlier.append(TaskVector.open(tmp_path / f"{task}.lota"))
        assert len(masked(earlier[-1])) == round(0.3 * training.vector.eligible)
        assert training.free_share == pytest.approx(1 - 0.3 * (task + 1), abs=1e-3)
        assert earlier[-1].provenance["disjoint_from"] == [f"{before}.lota" for before in range(task)]
    assert not masked(earlier[0]) & masked(earlier[1])
    assert not (masked(earlier[0]) | masked(earlier[1])) & masked(earlier[2])
    assert merge(earlier).provenance["method"] == "disjoint"
    with pytest.raises(MaskError, match=r"entries are wanted but earlier masks leave [\d,]+ of [\d,]+ weights free"):
        train(base, data, replace(QUICK, sparsity=0.7), disjoint_from=earlier)


def test_a_mask_is_taken_from_another_vector(llama: Path, data: Path, tmp_path: Path) -> None:
    """Whole, or its largest part: the paper's 99 % mask from a 90 % vector."""
    base = ModelFolder(llama)
    train(base, data, replace(QUICK, sparsity=0.9)).vector.save(tmp_path / "wide.lota")
    wide = TaskVector.open(tmp_path / "wide.lota")
    same = train(base, data, replace(UNCALIBRATED, sparsity=None), mask_from=wide)
    assert masked(same.vector) == masked(wide)
    assert same.calibration_losses == []
    assert same.vector.provenance["mask_from"] == "wide.lota"
    narrow = train(base, data, replace(UNCALIBRATED, sparsity=0.99), mask_from=wide).vector
    chosen = masked(narrow)
    assert len(chosen) == round(0.01 * narrow.eligible)
    pairs = {name: zip(wide[name].indices, wide[name].values, strict=True) for name in wide}
    sizes = {(name, int(at)): abs(float(value)) for name, entries in pairs.items() for at, value in entries}
    assert chosen <= masked(wide)
    assert min(sizes[place] for place in chosen) >= max(size for place, size in sizes.items() if place not in chosen)


@pytest.mark.parametrize(("fixture", "lr", "few"), [("llama", 1e-6, False), ("llama_bf16", 1e-6, True)])
def test_what_is_rounded_away_is_counted(
    fixture: str, lr: float, few: bool, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = ModelFolder(request.getfixturevalue(fixture))
    training = train(base, data, replace(QUICK, lr=lr, calibration_lr=1e-3))
    apply(training.vector, base, tmp_path / "out")
    tuned = ModelFolder(tmp_path / "out")
    changed = sum(int(np.count_nonzero(tuned.bits(name) != base.bits(name))) for name in base.tensors)
    assert training.survived == training.vector.provenance["survived"] == changed
    assert training.entries == round(0.1 * training.vector.eligible)
    assert (2 * training.survived < training.entries) == few


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam", "adamw", "sgd"])
def test_other_optimizers_train_too(optimizer: str, llama: Path, data: Path) -> None:
    training = train(ModelFolder(llama), data, replace(QUICK, optimizer=optimizer, lr=1e-2, calibration_lr=1e-2))
    assert training.vector.provenance["run"]["options"]["optimizer"] == optimizer
    assert training.survived > 0.9 * training.entries


def test_a_mask_may_be_chosen_tensor_by_tensor(llama: Path, data: Path) -> None:
    vector = train(ModelFolder(llama), data, replace(QUICK, scope="tensor")).vector
    assert sum(len(vector[name]) for name in vector) == round(0.1 * vector.eligible)
    for name, spec in vector.specs.items():
        assert abs(len(vector[name]) - 0.1 * spec.size) < 1


def test_masks_that_cannot_be_meant_are_refused(llama: Path, data: Path, tmp_path: Path) -> None:
    base = ModelFolder(llama)
    vector = train(base, data, QUICK).vector
    for options, message in (
        (replace(QUICK, mask="best"), "`mask` is one of magnitude, gradient"),
        (replace(QUICK, scope="layer"), "`scope` is one of global, tensor"),
        (replace(QUICK, optimizer="lion"), "`optimizer` is one of rmsprop, adam, adamw, sgd"),
        (replace(QUICK, mask="random", scope="tensor"), "`mask=random` draws positions from all weights together"),
        (replace(QUICK, via=(0.95,)), "`via` must be lower than `sparsity`"),
        (replace(QUICK, method="fft"), "`method=fft` has no mask"),
        (replace(QUICK, method="lora", sparsity=None, l1=1.0), "does not support `steps=0` or `l1`"),
        (replace(QUICK, relative_to="start"), "`relative_to` has no effect without `start_from`"),
        (replace(QUICK, patience=1), "needs examples to evaluate on"),
        (replace(QUICK, low_memory=True, l1=1.0), "`low_memory` does not support"),
        (replace(QUICK, sparsity=None), "`sparsity` is required unless `mask_from` is given"),
    ):
        with pytest.raises(UsageError, match=message):
            train(base, data, options)
    for name, value in (("mask", "random"), ("scope", "tensor"), ("via", (0.5,))):
        for sparsity in (0.9, None):
            with pytest.raises(UsageError, match=f"`mask_from` takes .*: it cannot be combined with `{name}`"):
                train(base, data, replace(QUICK, sparsity=sparsity, **{name: value}), mask_from=vector)
    dense = replace(QUICK, method="fft", sparsity=None)
    with pytest.raises(UsageError, match="it takes no `mask_from` and no `disjoint_from`"):
        train(base, data, dense, disjoint_from=[vector])


def test_training_is_repeatable_and_depends_on_its_seed(llama: Path, data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = replace(QUICK, seed=seed)
        train(ModelFolder(llama), data, options).vector.save(tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_ticket_learns_its_task(llama: Path, tmp_path: Path) -> None:
    base, data = ModelFolder(llama), write_rows(tmp_path / "questions.jsonl", ROWS[:3])
    model, tokenizer = load_model(llama)
    examples = read_examples(data)
    metrics = ("loss", "exact_match")
    before = evaluate(model, tokenizer, examples, metrics)
    vector = train(base, data, replace(QUICK, steps=60, lr=1e-2, sparsity=0.5)).vector
    with attach(model, vector, base=base):
        after = evaluate(model, tokenizer, examples, metrics)
    assert after.metrics["loss"].value < before.metrics["loss"].value - 0.4
    assert [scored.metrics["exact_match"].value for scored in (before, after)] == [0, 1]
    assert evaluate(model, tokenizer, examples, metrics) == before, "taking the vector off did not restore the model"


@pytest.mark.parametrize("kind", ["vector", "patch"])
def test_a_live_model_has_the_tuned_weights_and_then_its_own_again(kind: str, llama: Path, tuned: Path) -> None:
    base, after = ModelFolder(llama), ModelFolder(tuned)
    model, _ = load_model(llama)
    parameters = dict(model.named_parameters())

    def state() -> dict[str, bytes]:
        return {name: bits_of(base.tensors[name].dtype, p).tobytes() for name, p in parameters.items()}

    def on_disk(checkpoint: Checkpoint) -> dict[str, bytes]:
        return {name: checkpoint.bits(name).tobytes() for name in parameters}

    with attach(model, diff(base, after, kind=kind), base=base):
        assert state() == on_disk(after)
    assert state() == on_disk(base)


def test_eligible_are_the_linear_layers_of_the_blocks(llama: Path, gpt2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert set(eligible_parameters(model)) == {
        name for name, _ in model.named_parameters() if any(f".{part}." in name for part in LINEAR)
    }
    gpt = AutoModelForCausalLM.from_pretrained(gpt2)
    chosen = eligible_parameters(gpt)
    assert {name.split(".", 3)[3] for name in chosen} == {
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }
    forms = {name: info.form for name, info in ModelFolder(gpt2).tensors.items()}
    assert places(gpt, forms)["h.0.attn.c_attn.weight"] == Place("transformer.h.0.attn.c_attn.weight")
    # an encoder has no "mlp" in its names
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        is_decoder=True,
    )
    bert = BertLMHeadModel(config)
    assert len(eligible_parameters(bert)) == 2 * 6


def test_bits_of_rounds_to_nearest_even_as_numpy_does(llama_bf16: Path) -> None:
    base = ModelFolder(llama_bf16)
    model = AutoModelForCausalLM.from_pretrained(llama_bf16, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert np.array_equal(bits_of(base.tensors[name].dtype, parameter), base.bits(name))


@pytest.mark.parametrize("template", [True, False])
def test_the_loss_is_on_the_completion_only(data: Path, *, template: bool) -> None:
    from support.models import TEMPLATE

    tokenizer = make_tokenizer(TEMPLATE if template else None)
    for example in read_examples(data):
        row = encode(example, tokenizer, 64)
        learnt = [token for token in row["labels"] if token != IGNORED]
        assert row["input_ids"][-len(learnt) :] == learnt
        text = tokenizer.decode(row["input_ids"])
        if example.messages:
            assert tokenizer.decode(learnt) == f"{example.completion} </s>"
            assert example.messages[-1]["content"] in text
            assert ("assistant :" in text) is template
        else:
            assert text == f"{example.completion} </s>"
            assert len(learnt) == len(row["labels"]) - 1, "nothing comes before the first token to predict it from"


def test_a_long_prompt_loses_its_beginning(data: Path) -> None:
    example = read_examples(data)[0]
    row = encode(example, make_tokenizer(None), 4)
    assert make_tokenizer(None).decode(row["input_ids"]) == "one is two </s>"


def test_a_batch_gives_the_loss_of_its_rows(llama: Path, data: Path) -> None:
    """Padding on the left, positions and the cut of the logits change nothing."""
    model, tokenizer = load_model(llama)
    model.eval()
    rows = [encode(example, tokenizer, 64) for example in read_examples(data)]
    accepts = frozenset({"position_ids", "logits_to_keep"})
    batch = collate(rows, 0, accepts)
    plain = collate(rows, 0, frozenset())
    assert batch["labels"].shape[1] < plain["labels"].shape[1] or batch["logits_to_keep"] == plain["labels"].shape[1]
    with torch.no_grad():
        losses = [model(**collate([row], 0, frozenset())).loss for row in rows]
        counts = [sum(label != IGNORED for label in row["labels"]) for row in rows]
        expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
        torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "empty line"),
        ("{", "not valid JSON"),
        ("[1]", r"expected {.*found \[1\]"),
        ("null", "expected {.*found null"),
        ('{"prompt": "a"}', "found the keys"),
        ('{"prompt": "a", "completion": 3}', '"completion" must be text or a list of messages, found 3'),
        ('{"prompt": "a", "completion": "  "}', "the completion is empty"),
        ('{"text": ""}', "the text is empty"),
        ('{"messages": []}', "the last by the assistant"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last by the assistant"),
        ('{"messages": [{"role": "assistant"}]}', 'message 1 of "messages" has no "content"'),
    ],
)
def test_a_bad_line_is_named(line: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n{{"text": "fine"}}\n', encoding="utf-8")
    with pytest.raises(DataError, match=complaint) as caught:
        read_examples(path)
    assert f"{path}:2:" in str(caught.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_examples(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        read_examples(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="UTF-8"):
        read_examples(tmp_path / "latin.jsonl")


def test_a_template_s_refusal_names_the_line(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{{ raise_exception('no system role') }}")
    example = read_examples(write_rows(tmp_path / "d.jsonl", [ROWS[0]]))[0]
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*no system role"):
        encode(example, tokenizer, 64)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"sparsity": 1.0}, "`sparsity` must be between 0 and 1, both excluded; found 1.0"),
        ({"steps": -1}, "steps"),
        ({"lr": float("nan")}, "lr"),
        ({"batch_size": -1}, "`batch_size` must be greater than zero"),
        ({"device": "toaster"}, "device"),
        ({"schedule": "zigzag"}, "schedule"),
        ({"method": "magic"}, "method"),
        ({"turns": "some"}, "`turns` is one of all, last"),
        ({"pack": "yes"}, "`pack` must be True or False"),
        ({"dtype": "float8"}, "dtype"),
        ({"eval_split": 1.0}, "`eval_split` must be at least 0"),
        ({"via": (1.5,)}, "`via` must be between 0 and 1, both excluded; found 1.5"),
        ({"report_to": "nowhere"}, "`report_to=nowhere`"),
    ],
)
def test_settings_that_cannot_be_meant(setting: dict[str, object], complaint: str, llama: Path, data: Path) -> None:
    with pytest.raises(UsageError, match=complaint):
        train(ModelFolder(llama), data, replace(QUICK, **setting))


def test_fewer_changes_than_entries_is_an_error(llama: Path, data: Path) -> None:
    with pytest.raises(MaskError, match="only 0 weights changed"):
        train(ModelFolder(llama), data, replace(QUICK, calibration_lr=1e-30))


def test_a_loss_that_is_not_a_number_stops_training(llama: Path, data: Path) -> None:
    with pytest.raises(DivergedError, match=r"at step \d of calibrating; try a lower `calibration_lr`$"):
        train(ModelFolder(llama), data, replace(QUICK, calibration_lr=3e38, calibration_steps=5))
    with pytest.raises(DivergedError, match=r"at step \d of training; try a lower `lr`$"):
        train(ModelFolder(llama), data, replace(QUICK, lr=3e38, steps=5))


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        (QUICK, "calibrating"),
        (replace(QUICK, calibration_lr="auto"), "finding a learning rate"),
        (replace(QUICK, mask="random", calibration_steps=20, accumulate=2), "training"),
        (replace(QUICK, mask="random", calibration_steps=20, lr="auto"), "finding a learning rate"),
    ],
)
def test_a_model_whose_loss_is_not_a_number_is_not_blamed_on_the_rate(
    options: TrainingOptions, stage: str, data: Path, tmp_path: Path
) -> None:
    base = make_llama(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(DivergedError) as caught:
        train(ModelFolder(base), data, options)
    assert str(caught.value) == (
        f"the loss is nan before the first step of {stage}: the fault is in the model or in a row of the data, not in "
        "the learning rate"
    )


@pytest.mark.parametrize("phase", ["calibration", "training"])
def test_a_last_step_that_diverges_is_not_stored(phase: str, llama: Path, data: Path) -> None:
    """No later loss shows it."""
    rates = {"calibration": (3e38, 1e-3), "training": (1e-3, 3e38)}
    calibration_lr, lr = rates[phase]
    options = replace(QUICK, calibration_steps=1, steps=1, calibration_lr=calibration_lr, lr=lr)
    with pytest.raises(TrainingError, match=f"{phase} ended in weights that are not numbers"):
        train(ModelFolder(llama), data, options)


def test_a_line_that_leaves_nothing_to_learn_is_named(data: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: no token of the completion"):
        encode(read_examples(data)[0], make_tokenizer(None), 1)


def test_what_cannot_be_trained_is_refused(llama: Path, data: Path, tmp_path: Path) -> None:
    shard = llama / "model.safetensors"
    with pytest.raises(TrainingError, match="single file"):
        train(ModelFolder(shard), data, QUICK)
    other = make_llama(tmp_path / "other")
    (other / "config.json").write_text("{}")
    with pytest.raises(TrainingError, match="cannot be loaded"):
        train(ModelFolder(other), data, QUICK)
    with pytest.raises(TrainingError, match="no linear layers"):
        eligible_parameters(nn.Linear(2, 2))
