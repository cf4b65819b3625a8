"""Which models are trained as what: the class that a config names, encoder-decoders, eligible weights of families."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
from families import FAMILIES, make_model, make_tokenizer, row_of
from safetensors.torch import load_file, save_file
from support.commands import inside, ok, refused
from support.models import make_llama, write_rows
from transformers import BartForCausalLM, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from taskvec.data.examples import Example, read_examples
from taskvec.data.pairs import collate_pairs, collator_of, encode_all_pairs, encode_pair, encode_source
from taskvec.data.rows import IGNORED, first_position, length_limit
from taskvec.errors import DataError, TrainingError
from taskvec.evaluation.evaluate import evaluate
from taskvec.models.kinds import check_reading, is_encoder_decoder, is_masked
from taskvec.models.loading import load_model, load_tokenizer
from taskvec.models.placement import eligible_parameters
from taskvec.training.train import train
from taskvec_formats import ModelFolder

# warnings come from the models' own code
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

BY_NAME = {family.name: family for family in FAMILIES}
TRAINED = "only causal, masked and encoder-decoder language models are trained here"
TAKEN_THROUGH = """GPT2LMHeadModel Qwen2MoeForCausalLM MambaForCausalLM BertForMaskedLM BartForConditionalGeneration
    T5ForConditionalGeneration LlavaForConditionalGeneration PaliGemmaForConditionalGeneration
    WhisperForConditionalGeneration""".split()


def made(name: str, folder: Path) -> Path:
    return make_model(BY_NAME[name], folder)


def model_of(name: str) -> PreTrainedModel:
    return families.model_of(BY_NAME[name])


def set_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_bytes()), **values}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "questions.jsonl", families.ROWS)


@pytest.mark.parametrize("name", TAKEN_THROUGH)
def test_a_family_is_taken_through_or_refused(name: str) -> None:
    line, right = row_of(BY_NAME[name])
    assert right, line


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "LlamaForSequenceClassification", "WhisperForConditionalGeneration"]
)
def test_another_kind_of_model_is_refused_by_its_config(name: str, questions: Path, tmp_path: Path) -> None:
    base = made(name, tmp_path / "base")
    expected = f"taskvec: {base} holds {name}: {TRAINED}\n"
    assert refused(1, "train", base, questions, "-o", tmp_path / "x.lota") == expected
    assert refused(1, "eval", base, "--data", questions) == expected
    (base / "model.safetensors").unlink()
    (base / "tokenizer.json").unlink()
    with pytest.raises(TrainingError, match=f"holds {name}"):
        load_tokenizer(base)


def test_an_encoder_is_no_causal_model(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="BertLMHeadModel with is_decoder false in its config"):
        load_model(made("BertLMHeadModel", tmp_path / "base"))
    set_config(tmp_path / "base", is_decoder=True)
    model, _ = load_model(tmp_path / "base")
    assert type(model).__name__ == "BertLMHeadModel"
    assert not is_masked(model)


def test_a_causal_model_must_not_see_what_it_predicts() -> None:
    row = {"input_ids": [6, 7, 8, 9], "labels": [IGNORED, IGNORED, 8, 9]}
    for name in ("LlamaForCausalLM", "LlavaForConditionalGeneration", "MambaForCausalLM", "T5ForConditionalGeneration"):
        check_reading(model_of(name), row)
    with pytest.raises(TrainingError, match="sees the tokens that it is to predict when it reads text alone"):
        check_reading(model_of("PaliGemmaForConditionalGeneration"), row)
    with pytest.raises(TrainingError, match=r"FSMT.* does not make the decoder's input of the labels"):
        check_reading(model_of("FSMTForConditionalGeneration"), {"input_ids": [6, 7], "labels": [8, 9]})
    with pytest.raises(TrainingError, match="GitForCausalLM cannot learn from text alone: "):
        check_reading(model_of("GitForCausalLM"), row)


def test_weights_that_are_not_there_are_not_made_up(llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")  # its head is tied: not in the folder, and not missing
    load_model(base)
    tensors = load_file(base / "model.safetensors")
    gone = [name for name in tensors if "k_proj" in name]
    save_file({name: values for name, values in tensors.items() if name not in gone}, base / "model.safetensors")
    with pytest.raises(TrainingError) as caught:
        load_model(base)
    assert str(caught.value) == (
        f"{base} lacks 2 of the weights of LlamaForCausalLM, 'model.layers.0.self_attn.k_proj.weight' and 1 more: "
        "it is no complete model of this class"
    )
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(TrainingError, match=r"has another shape of 1 of the weights .*, 'model\.norm\.weight': it is"):
        load_model(base)


def test_without_architectures_all_weights_must_be_there(llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    set_config(base, architectures=None)
    assert type(load_model(base)[0]).__name__ == "LlamaForCausalLM"
    for name, loaded in (
        ("BartForConditionalGeneration", None),
        ("BertForMaskedLM", None),
        ("T5EncoderModel", "T5For"),
    ):
        other = made(name, tmp_path / name)
        set_config(other, architectures=None)
        if loaded is None:
            assert type(load_model(other)[0]).__name__ == name
        else:
            with pytest.raises(TrainingError, match=f"lacks .* of the weights of {loaded}"):
                load_model(other)
    whisper = made("WhisperForConditionalGeneration", tmp_path / "whisper")
    set_config(whisper, architectures=None)
    with pytest.raises(TrainingError, match="holds a model of the type whisper: "):
        load_model(whisper)
    set_config(made("ViTForImageClassification", tmp_path / "vit"), architectures=None)
    with pytest.raises(TrainingError, match=f"holds a model of the type vit: {TRAINED}"):
        load_model(tmp_path / "vit")


@pytest.mark.parametrize(
    ("name", "bare"),
    [("BartForConditionalGeneration", "model"), ("GPT2LMHeadModel", "transformer"), ("BertForMaskedLM", "bert")],
)
def test_a_bare_model_is_accepted_where_its_head_is_tied(name: str, bare: str, tmp_path: Path) -> None:
    model = model_of(name)
    base = getattr(model, bare)
    base.config.architectures = [type(base).__name__]
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    if name == "BertForMaskedLM":
        with pytest.raises(TrainingError, match="lacks 6 of the weights of BertForMaskedLM"):
            load_model(tmp_path / "base")
        return
    loaded, _ = load_model(tmp_path / "base")
    assert type(loaded).__name__ == name
    after = loaded.state_dict()
    assert all(torch.equal(values, after[key]) for key, values in model.state_dict().items())


def test_a_decoder_of_an_encoder_decoder_is_a_causal_model(tmp_path: Path) -> None:
    config = model_of("BartForConditionalGeneration").config
    BartForCausalLM(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    loaded, _ = load_model(tmp_path / "base")
    assert type(loaded).__name__ == "BartForCausalLM"
    assert not is_encoder_decoder(loaded)
    check_reading(loaded, {"input_ids": [6, 7, 8, 9], "labels": [IGNORED, IGNORED, 8, 9]})


@pytest.mark.parametrize("architectures", ["Own\nForCausalLM", [None, "Own\nForCausalLM"]])
def test_an_odd_list_of_architectures_ends_in_a_sentence(architectures: object, llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    set_config(base, architectures=architectures)
    with pytest.raises(TrainingError, match=r"^[ -~]*holds Own\\nForCausalLM: [ -~]*$"):
        load_model(base)


# encoder-decoders


@pytest.fixture(scope="module", params=["T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings, and with them the tied head, large enough for a loss near zero; no dropout."""
    folder = made(request.param, tmp_path_factory.mktemp("pair"))
    set_config(folder, dropout=0, attention_dropout=0, dropout_rate=0)
    tensors = load_file(folder / "model.safetensors")
    if request.param != "T5ForConditionalGeneration":
        tensors["model.shared.weight"] *= 25
    save_file(tensors, folder / "model.safetensors")
    return folder


def example(prompt: str, completion: str) -> Example:
    return Example(({"role": "user", "content": prompt},), completion, "here:1")


def test_the_prompt_is_the_encoders_and_the_completion_the_decoders() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("one plus two is")["input_ids"]
    answer = tokenizer("three")["input_ids"]
    rows = [
        encode_pair(example("one plus two is", "three"), tokenizer, 64),
        encode_pair(example("one plus two is", "three"), tokenizer, 3),
    ]
    assert rows[0] == {"input_ids": ids, "labels": [*answer, tokenizer.eos_token_id]}
    assert rows[1] == {"input_ids": ids[-3:], "labels": [*answer, tokenizer.eos_token_id][:3]}
    assert tokenizer.truncation_side == "right"
    assert encode_source(example("one plus two is", "three"), tokenizer, 64) == ids, "truncation was left on"
    batch = collate_pairs([{"input_ids": [6, 7, 8], "labels": [9]}, {"input_ids": [6], "labels": [9, 2]}], 0)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[6, 7, 8], [6, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[9, IGNORED], [9, 2]],
    }


def test_special_tokens_stay_around_a_prompt_that_is_cut() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    row = encode_pair(example("one plus two is", "three"), tokenizer, 4)
    middle = tokenizer("one plus two is", add_special_tokens=False)["input_ids"]
    assert row["input_ids"] == [1, *middle[-2:], 2]
    assert row["labels"][-1] == 2
    assert row["labels"].count(2) == 1, "the tokenizer had ended the completion already"


def test_a_target_that_ends_with_a_language_is_closed_already() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    closing = [("</s>", 2), ("<mask>", 4)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A </s> <mask>", special_tokens=closing)
    row = encode_pair(example("one", "three"), tokenizer, 64)
    assert row["labels"][-2:] == [2, 4]
    assert row["labels"].count(2) == 1
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("</s> $A", special_tokens=closing)
    row = encode_pair(example("one", "three"), tokenizer, 64)
    assert [row["labels"][0], row["labels"][-1]] == [2, 2]


def test_plain_text_has_no_prompt() -> None:
    with pytest.raises(DataError, match=r'^here:1: an encoder-decoder reads a prompt, which \{"text"\} does not have$'):
        encode_pair(Example((), "one", "here:1"), make_tokenizer(), 64)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_its_loss_is_transformers_own(batch_size: int, pair: Path, questions: Path) -> None:
    model, tokenizer = load_model(pair)
    assert is_encoder_decoder(model)
    total = count = 0.0
    for each in read_examples(questions):
        row = encode_pair(each, tokenizer, 64)
        output: Seq2SeqLMOutput = model(**{name: torch.tensor([ids]) for name, ids in row.items()})
        total += float(output.loss) * len(row["labels"])
        count += len(row["labels"])
    found = evaluate(model, tokenizer, read_examples(questions), batch_size=batch_size).metrics["loss"]
    assert found.value == pytest.approx(total / count, abs=1e-5)


def test_it_learns_its_task_and_answers(pair: Path, questions: Path, tmp_path: Path) -> None:
    """Answers in a batch are those of a loop without batch, padding or cache."""
    report = json.loads(
        ok("train", pair, questions, "-o", tmp_path / "x.lota", "--sparsity", "0.5", "--lr", "3e-3", "--json",
           "--steps", "70", "--calibration-steps", "3", "--device", "cpu")
    )  # fmt: skip
    assert report["final_loss"] < 0.6
    assert report["first_loss"] > 3
    answers = tmp_path / "answers.jsonl"
    ok("unpack", tmp_path / "x.lota", "--base", pair, "-o", tmp_path / "out")
    lines = ok("eval", tmp_path / "out", "--data", questions, "--metric", "loss", "--metric", "exact_match",
               "--answers", answers, "--json")  # fmt: skip
    assert json.loads(lines)["metrics"]["exact_match"]["value"] >= 0.5
    model, tokenizer = load_model(tmp_path / "out")
    for line in answers.read_text().splitlines():
        said = json.loads(line)
        source = torch.tensor([encode_source(example(said["prompt"], ""), tokenizer, 64)])
        ids = [model.config.decoder_start_token_id]
        while len(ids) < 8 and (len(ids) == 1 or ids[-1] != tokenizer.eos_token_id):
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            logits[tokenizer.pad_token_id] = -torch.inf
            ids.append(int(logits.argmax()))
        assert tokenizer.decode(ids[1:], skip_special_tokens=True).strip() == said["answer"]


def test_a_prompt_is_cut_to_the_positions_of_an_encoder(tmp_path: Path) -> None:
    """The models have 64, and options allow 1024 tokens."""
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "one plus " * 90, "completion": "two"}])
    for name in ("BartForConditionalGeneration", "LEDForConditionalGeneration"):
        base = made(name, tmp_path / name)
        train(ModelFolder(base), long, replace(families.OPTIONS, max_length=1024))
        found = evaluate(*load_model(base), read_examples(long), ("loss", "exact_match"))
        assert len(found.answers) == 1


def test_masks_of_encoder_decoders_hold_k_entries_of_both_halves(pair: Path, questions: Path) -> None:
    trained = train(ModelFolder(pair), questions, replace(families.OPTIONS, sparsity=0.7))
    assert trained.entries == round(0.3 * trained.vector.eligible)
    assert trained.unreached == 0
    for half in ("encoder.", "decoder."):
        assert any(half in name and len(trained.vector[name].indices) for name in trained.vector)


# eligible weights

NOT_ELIGIBLE = ("router", "gate.weight", "shared_expert_gate", "time_mix", "vision", "visual", "audio", "conv1d")


@pytest.mark.parametrize(
    ("name", "a_layer"),
    [
        ("MixtralForCausalLM", "self_attn.k_proj.weight self_attn.o_proj.weight self_attn.q_proj.weight "
         "self_attn.v_proj.weight mlp.experts.down_proj mlp.experts.gate_up_proj"),
        ("Qwen2MoeForCausalLM", "self_attn.k_proj.weight self_attn.o_proj.weight self_attn.q_proj.weight "
         "self_attn.v_proj.weight mlp.experts.down_proj mlp.experts.gate_up_proj mlp.shared_expert.down_proj.weight "
         "mlp.shared_expert.gate_proj.weight mlp.shared_expert.up_proj.weight"),
        ("Llama4ForCausalLM", "self_attn.k_proj.weight self_attn.o_proj.weight self_attn.q_proj.weight "
         "self_attn.v_proj.weight feed_forward.experts.down_proj feed_forward.experts.gate_up_proj "
         "feed_forward.shared_expert.down_proj.weight feed_forward.shared_expert.gate_proj.weight "
         "feed_forward.shared_expert.up_proj.weight"),
        ("JetMoeForCausalLM", "self_attention.experts.input_linear.weight self_attention.experts.output_linear.weight "
         "self_attention.kv_proj.weight mlp.input_linear.weight mlp.output_linear.weight"),
        ("RwkvForCausalLM", "attention.key.weight attention.output.weight attention.receptance.weight "
         "attention.value.weight feed_forward.key.weight feed_forward.receptance.weight feed_forward.value.weight"),
    ],
)  # fmt: skip
def test_routers_are_not_eligible(name: str, a_layer: str) -> None:
    chosen = {weight.split(".", 3)[3] for weight in eligible_parameters(model_of(name))}
    assert chosen == set(a_layer.split())


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if "experts" in family.kind])
def test_no_router_of_any_family_is_eligible(name: str) -> None:
    model = model_of(name)
    chosen = eligible_parameters(model)
    assert not [weight for weight in chosen if any(part in weight for part in NOT_ELIGIBLE)]
    assert [weight for weight in chosen if "expert" in weight or "linear" in weight], "its experts are"


@pytest.mark.parametrize(
    "name",
    ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "SmolVLMForConditionalGeneration",
     "VoxtralForConditionalGeneration", "Florence2ForConditionalGeneration", "Llama4ForConditionalGeneration"],
)  # fmt: skip
def test_what_sees_or_hears_is_not_eligible(name: str) -> None:
    model = model_of(name)
    chosen = eligible_parameters(model)
    assert not [weight for weight in chosen if any(part in weight for part in NOT_ELIGIBLE)]
    assert chosen.keys() < {
        weight for weight, values in model.named_parameters() if "language_model" in weight or "text_model" in weight
    }


def test_eligible_weights_that_the_data_never_reaches_are_said(questions: Path, tmp_path: Path) -> None:
    """Layers that look at images have nothing to do in a text."""
    base = made("MllamaForConditionalGeneration", tmp_path / "base")
    command = ["train", base, questions, "-o", tmp_path / "x.lota", "--steps", 1, "--calibration-steps", 1]
    done = inside(*command, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["unreached"] == pytest.approx(0.5)
    assert done.stderr.count("\n") == 1
    assert done.stderr == (
        "taskvec: warning: 50.0% of the eligible weights are in tensors that got no gradient from the data during "
        "calibration\n"
    )
    whole = make_llama(tmp_path / "llama")
    done = inside(
        "train", whole, questions, "-o", tmp_path / "y.lota", "--steps", 1, "--calibration-steps", 1, "--json"
    )
    assert json.loads(done.stdout)["unreached"] == 0
    assert done.stderr == ""


def test_an_encoder_decoder_learns_one_turn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made("T5ForConditionalGeneration", tmp_path / "t5"))[1]
    talk = [{"role": role, "content": "a b"} for role in ("user", "assistant", "user")]
    example = Example(tuple(talk), "a", "here:1")
    with pytest.raises(DataError, match="here:1: an encoder-decoder learns one turn of a conversation; `turns=last`"):
        encode_all_pairs([example], tokenizer, 64, "all")
    rows, _ = encode_all_pairs([example], tokenizer, 64, "last")
    assert rows[0]["labels"]


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "MPNetForMaskedLM"])
def test_models_that_number_their_tokens_themselves_do(name: str) -> None:
    """Positions begin after that of padding, on whichever side a row is padded."""
    model = model_of(name).eval()
    first = first_position(model)
    assert first > 0
    most = length_limit(model.config, 1024, first)
    assert most == model.config.max_position_embeddings - first
    rows = [{"input_ids": [7, 8, 9] * most, "labels": [7, 8, 9] * most}, {"input_ids": [7, 9], "labels": [7, 9]}]
    rows = [{key: values[:most] for key, values in row.items()} for row in rows]
    batch = collator_of(model, first - 1)(rows)
    together = model(**batch).logits
    for row, logits in zip(rows, together, strict=True):
        alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(logits[-len(alone) :], alone, atol=1e-5, rtol=1e-4)
