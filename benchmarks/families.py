"""Compatibility of model families: a tiny random model of each is trained and merged, or refused with an error.

Usage: python benchmarks/families.py [CLASS ...], for some families or, without CLASS, for all. Each model is trained
for a few steps. Its vector is then applied, packed again, merged, applied again and evaluated. Weights outside the mask
must keep their bits. Prints a Markdown table. Exits with 1 if a family that should train does not, or one that should
be refused is not.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from taskvec import Checkpoint, TaskVector, apply, diff, merge
from taskvec.data.examples import read_examples
from taskvec.errors import TaskvecError
from taskvec.evaluation.evaluate import evaluate_variants
from taskvec.training.options import TrainingOptions
from taskvec.training.result import TrainingResult
from taskvec.training.train import train
from taskvec_formats import ModelFolder

NUMBERS = "one two three four five six seven eight nine".split()
ROWS = [
    {"prompt": f"{NUMBERS[a - 1]} plus {NUMBERS[b - 1]} is", "completion": NUMBERS[a + b - 1]}
    for a, b in ((1, 1), (1, 2), (2, 2), (3, 1), (4, 2), (1, 5), (3, 3), (2, 5))
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "<image>"]
OPTIONS = TrainingOptions(
    sparsity=0.9, steps=2, calibration_steps=2, batch_size=4, lr=1e-2, max_length=32, device="cpu"
)

TOKENS: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
# sizes of models like BART, and of models like T5
HALVES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
VISION: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 8}
LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
IMAGE: dict[str, Any] = {"image_token_id": 5, "image_token_index": 5}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: The class in transformers.
        kind: The kind of model, as shown in the table.
        config: The config of a tiny model.
        trains: Whether the family should train. If not, it should be refused.
    """

    name: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    trains: bool = True


def _causal() -> Iterator[Family]:
    plain = (
        "GPT2LMHeadModel GPTNeoXForCausalLM GPTBigCodeForCausalLM BloomForCausalLM OpenAIGPTLMHeadModel "
        "FalconForCausalLM CTRLLMHeadModel XGLMForCausalLM BioGptForCausalLM PersimmonForCausalLM"
    )
    for name in plain.split():
        yield Family(name, "causal", {**SIZES, "ffn_dim": 48, "dff": 48})
    grouped = (
        "LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM GemmaForCausalLM Gemma2ForCausalLM "
        "Gemma3ForCausalLM Phi3ForCausalLM StableLmForCausalLM Starcoder2ForCausalLM CohereForCausalLM "
        "Cohere2ForCausalLM OlmoForCausalLM Olmo2ForCausalLM GraniteForCausalLM NemotronForCausalLM SmolLM3ForCausalLM "
        "Glm4ForCausalLM PhiForCausalLM Exaone4ForCausalLM"
    )
    for name in grouped.split():
        yield Family(name, "causal", {**SIZES, **GROUPED})
    side_inputs = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.5, 0.0]}
    unshared = {"num_kv_shared_layers": 0}
    yield Family("Gemma3nForCausalLM", "causal", {**SIZES, **GROUPED, **side_inputs, **layers, **unshared})
    yield Family("GPTNeoForCausalLM", "causal", {**SIZES, "num_layers": 2, "attention_types": [[["global"], 2]]})
    yield Family("GPTJForCausalLM", "causal", {**SIZES, "rotary_dim": 4})
    yield Family("CodeGenForCausalLM", "causal", {**SIZES, "rotary_dim": 4})
    yield Family("OPTForCausalLM", "causal", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32})
    yield Family("MptForCausalLM", "causal", {**SIZES, "max_seq_len": 64})


def _experts() -> Iterator[Family]:
    kind = "mixture of experts"
    sizes = {**SIZES, **GROUPED, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    several = {**sizes, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4}
    for (
        name
    ) in "MixtralForCausalLM OlmoeForCausalLM PhimoeForCausalLM GraniteMoeForCausalLM Qwen3MoeForCausalLM".split():
        yield Family(name, kind, several)
    yield Family("Qwen2MoeForCausalLM", kind, {**several, "shared_expert_intermediate_size": 24})
    yield Family("GptOssForCausalLM", kind, several)
    yield Family("Llama4ForCausalLM", kind, {**several, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 1})
    latent = {
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    for name in ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"):
        yield Family(name, kind, {**several, "head_dim": 4, **latent})
    yield Family(
        "LongcatFlashForCausalLM",
        kind,
        {
            **several,
            **latent,
            "head_dim": 4,
            "num_layers": 1,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 24,
        },
    )
    yield Family("JetMoeForCausalLM", kind, {**several, "num_key_value_heads": 2, "kv_channels": 8})
    yield Family("Ernie4_5_MoeForCausalLM", kind, {**several, "moe_num_experts": 4, "moe_k": 2})


def _recurrent() -> Iterator[Family]:
    state = {**SIZES, "state_size": 4, "time_step_rank": 4}
    for name in ("MambaForCausalLM", "FalconMambaForCausalLM"):
        yield Family(name, "state space", state)
    yield Family("Mamba2ForCausalLM", "state space", {**state, "num_heads": 8, "head_dim": 8, "n_groups": 1})
    yield Family("RwkvForCausalLM", "recurrent", {**SIZES, "attention_hidden_size": 32})
    yield Family(
        "RecurrentGemmaForCausalLM", "recurrent", {**SIZES, **GROUPED, "num_hidden_layers": 3, "lru_width": 32}
    )
    hybrid = {**SIZES, **GROUPED, "num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    layout = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    yield Family("JambaForCausalLM", "state space, mixture of experts", {**hybrid, **layout})
    heads = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    yield Family(
        "BambaForCausalLM", "state space and attention", {**SIZES, **GROUPED, **heads, "attn_layer_indices": [1]}
    )
    shared = {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "attention_hidden_size": 64}
    inner = {"mamba_headdim": 8, "n_mamba_heads": 8, "mamba_d_state": 4, "mamba_ngroups": 1, "attention_head_dim": 16}
    yield Family(
        "Zamba2ForCausalLM", "state space and attention", {**SIZES, "num_key_value_heads": 4, **shared, **inner}
    )
    experts = {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    for name in ("Qwen3NextForCausalLM", "Qwen3_5MoeForCausalLM"):
        yield Family(name, "linear attention, mixture of experts", {**SIZES, **GROUPED, **LINEAR, **experts})
    yield Family("Lfm2ForCausalLM", "convolutions and attention", {**SIZES, **GROUPED, "full_attn_idxs": [1]})


def _masked() -> Iterator[Family]:
    names = (
        "BertForMaskedLM RobertaForMaskedLM XLMRobertaForMaskedLM ElectraForMaskedLM AlbertForMaskedLM "
        "MPNetForMaskedLM DebertaV2ForMaskedLM ModernBertForMaskedLM CamembertForMaskedLM"
    )
    for name in names.split():
        yield Family(name, "masked", {**SIZES, "embedding_size": 32})
    yield Family("DistilBertForMaskedLM", "masked", {**SIZES, "hidden_dim": 48})


def _encoder_decoders() -> Iterator[Family]:
    kind = "encoder-decoder"
    names = (
        "BartForConditionalGeneration MBartForConditionalGeneration PegasusForConditionalGeneration MarianMTModel "
        "BlenderbotForConditionalGeneration M2M100ForConditionalGeneration MvpForConditionalGeneration "
        "PLBartForConditionalGeneration"
    )
    for name in names.split():
        yield Family(name, kind, HALVES)
    longer = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 8}
    yield Family("LEDForConditionalGeneration", kind, {**HALVES, **longer})
    yield Family(
        "ProphetNetForConditionalGeneration",
        kind,
        {
            "hidden_size": 32,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
        },
    )
    yield Family("PegasusXForConditionalGeneration", kind, {**HALVES, "block_size": 8, "num_global_tokens": 2})
    names = "T5ForConditionalGeneration MT5ForConditionalGeneration UMT5ForConditionalGeneration"
    for name in names.split():
        yield Family(name, kind, T5)
    yield Family("LongT5ForConditionalGeneration", kind, {**T5, "local_radius": 8})
    gemma = {**TOKENS, **SIZES, **GROUPED}
    yield Family("T5GemmaForConditionalGeneration", kind, {"encoder": gemma, "decoder": gemma})
    # refused: it derives the decoder's input from the prompt
    langs = {"langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64}
    yield Family("FSMTForConditionalGeneration", kind, {**HALVES, **langs}, trains=False)
    experts = {"num_experts": 4, "expert_capacity": 64, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    yield Family("SwitchTransformersForConditionalGeneration", f"{kind}, mixture of experts", {**T5, **experts})
    sparse = {"num_experts": 4, "expert_capacity": 64, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
    yield Family("NllbMoeForConditionalGeneration", f"{kind}, mixture of experts", {**HALVES, **sparse})


def _multimodal() -> Iterator[Family]:
    kind = "vision-language"
    text = {**TOKENS, **SIZES, **GROUPED}
    llama, qwen = {**text, "model_type": "llama"}, {**text, "model_type": "qwen2"}
    clip = {**VISION, "model_type": "clip_vision_model"}
    siglip = {**VISION, "model_type": "siglip_vision_model"}
    yield Family("LlavaForConditionalGeneration", kind, {"text_config": llama, "vision_config": clip, **IMAGE})
    yield Family(
        "Gemma3ForConditionalGeneration",
        kind,
        {"text_config": text, "vision_config": siglip, "mm_tokens_per_image": 4, **IMAGE},
    )
    gemma = {**text, "model_type": "gemma"}
    # refused: without images it attends to the prompt in both directions, and a plain text counts as a prompt
    yield Family(
        "PaliGemmaForConditionalGeneration",
        kind,
        {"text_config": gemma, "vision_config": {**siglip, "projection_dim": 32}, "projection_dim": 32, **IMAGE},
        trains=False,
    )
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    qwen_vision = {
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "depth": 2,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0, 0, 1],
    }
    for name in (
        "Qwen3VLForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
    ):
        yield Family(name, kind, {"text_config": {**text, **rope}, "vision_config": qwen_vision, **IMAGE})
    hybrid = {"text_config": {**text, **rope, **LINEAR}, "vision_config": qwen_vision, **IMAGE}
    yield Family("Qwen3_5ForConditionalGeneration", f"{kind}, linear attention", hybrid)
    yield Family("Idefics3ForConditionalGeneration", kind, {"text_config": llama, "vision_config": VISION, **IMAGE})
    yield Family("SmolVLMForConditionalGeneration", kind, {"text_config": llama, "vision_config": VISION, **IMAGE})
    intern = {**SIZES, "image_size": [16, 16], "patch_size": [8, 8]}
    yield Family("InternVLForConditionalGeneration", kind, {"text_config": qwen, "vision_config": intern, **IMAGE})
    pixtral = {**VISION, "head_dim": 8, "model_type": "pixtral"}
    mistral = {**text, "model_type": "mistral"}
    yield Family("Mistral3ForConditionalGeneration", kind, {"text_config": mistral, "vision_config": pixtral, **IMAGE})
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 40}
    llama_vision = {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    yield Family(
        "Llama4ForConditionalGeneration",
        f"{kind}, mixture of experts",
        {"text_config": {**text, **experts, "interleave_moe_layer_step": 1}, "vision_config": llama_vision, **IMAGE},
    )
    bart = {**HALVES, **TOKENS, "model_type": "bart"}
    yield Family("Florence2ForConditionalGeneration", f"{kind}, encoder-decoder", {"text_config": bart, **IMAGE})
    sound = {**SIZES, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    audio_encoder = {**sound, "num_mel_bins": 8, "max_source_positions": 16}
    for name, own in (("VoxtralForConditionalGeneration", llama), ("Qwen2AudioForConditionalGeneration", qwen)):
        audio = {"audio_token_id": 5, "audio_token_index": 5}
        yield Family(name, "audio-language", {"text_config": own, "audio_config": audio_encoder, **audio})
    crossed = {**text, "cross_attention_layers": [1]}
    mllama = {
        "hidden_size": 32,
        "attention_heads": 4,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 8,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [1],
    }
    yield Family("MllamaForConditionalGeneration", kind, {"text_config": crossed, "vision_config": mllama, **IMAGE})


def _refused() -> Iterator[Family]:
    encoders = (
        "BertForSequenceClassification BertForPreTraining BertForQuestionAnswering BertModel "
        "RobertaForTokenClassification"
    )
    for name in encoders.split():
        yield Family(name, "encoder", SIZES, trains=False)
    for (
        name
    ) in "LlamaForSequenceClassification LlamaModel Qwen2ForTokenClassification GPT2ForSequenceClassification".split():
        yield Family(name, "decoder", {**SIZES, **GROUPED}, trains=False)
    yield Family("GitForCausalLM", "vision-language", {**SIZES, "vision_config": VISION}, trains=False)
    yield Family("BertLMHeadModel", "encoder with a causal head", SIZES, trains=False)
    yield Family(
        "XLNetLMHeadModel",
        "permutations",
        {"d_model": 32, "d_inner": 48, "n_layer": 2, "n_head": 4},
        trains=False,
    )
    yield Family("BartForSequenceClassification", "encoder-decoder", HALVES, trains=False)
    yield Family("T5EncoderModel", "encoder", T5, trains=False)
    yield Family(
        "WhisperForConditionalGeneration",
        "speech",
        {**HALVES, "max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 8},
        trains=False,
    )
    yield Family("ViTForImageClassification", "images", VISION, trains=False)
    yield Family(
        "CLIPModel", "images and text", {"text_config": {**TOKENS, **SIZES}, "vision_config": VISION}, trains=False
    )
    yield Family(
        "Wav2Vec2ForCTC",
        "speech",
        {
            **SIZES,
            "conv_dim": [16, 16],
            "conv_stride": [2, 2],
            "conv_kernel": [3, 3],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        trains=False,
    )
    yield Family(
        "BlipForConditionalGeneration",
        "vision-language",
        {"text_config": {**TOKENS, **SIZES, "encoder_hidden_size": 32}, "vision_config": VISION},
        trains=False,
    )


FAMILIES = [
    *_causal(),
    *_experts(),
    *_recurrent(),
    *_masked(),
    *_encoder_decoders(),
    *_multimodal(),
    *_refused(),
]


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on ROWS. Families with their own tokenizer class can load its files too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=TOKENS["vocab_size"], special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([text for row in ROWS for text in row.values()], trainer)
    names = ("pad_token", "bos_token", "eos_token", "unk_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, SPECIAL, strict=False)), additional_special_tokens=SPECIAL[-1:]
    )


def model_of(family: Family) -> transformers.PreTrainedModel:
    """Build a tiny model with random weights.

    Args:
        family: The family.

    Returns:
        The model, in eval mode.
    """
    torch.manual_seed(0)
    model_class = getattr(transformers, family.name)
    composed = not {"text_config", "encoder"}.isdisjoint(family.config)
    config = model_class.config_class(**({} if composed else TOKENS), **family.config)
    if composed:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, TOKENS[name])
    model: transformers.PreTrainedModel = model_class(config)
    model.eval()
    return model


def make_model(family: Family, folder: Path) -> Path:
    """Write a tiny model and its tokenizer.

    Args:
        family: The family.
        folder: The folder to write.

    Returns:
        The folder.
    """
    model_of(family).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def take_through(base: Path, scratch: Path, *, masked: bool) -> TrainingResult:
    """Train, apply, pack, merge, apply again and evaluate.

    Args:
        base: The model folder.
        scratch: A folder for the results.
        masked: Whether it is a masked language model, which is not evaluated.

    Returns:
        The result of the training.

    Raises:
        TaskvecError: The model is refused.
        AssertionError: A weight or a score is wrong.
    """
    data = scratch / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    start = ModelFolder(base)
    trained = train(start, data, OPTIONS)
    trained.vector.save(scratch / "trained.lota")
    vector = TaskVector.open(scratch / "trained.lota")
    apply(vector, start, scratch / "tuned")
    tuned = ModelFolder(scratch / "tuned")
    check(start, tuned, vector)
    diff(start, tuned).save(scratch / "packed.lota")
    packed = TaskVector.open(scratch / "packed.lota")
    merged = merge([vector, packed], "average")
    apply(merged, start, scratch / "merged")
    if masked:
        return trained  # an encoder is not evaluated
    examples = read_examples(data)
    metrics = ("loss", "exact_match")
    variants = ((ModelFolder(scratch / "merged"), None), (start, merged))
    rows = [
        evaluate_variants(checkpoint, [with_vector], {"": examples}, metrics, device="cpu", max_length=32)
        for checkpoint, with_vector in variants
    ]
    found = [row[""].metrics for (row,) in rows]
    assert found[0] == found[1], "the merged folder and the vector on its base are not evaluated alike"
    return trained


def check(start: Checkpoint, tuned: Checkpoint, vector: TaskVector) -> None:
    """Check that some weights changed, and none outside the mask.

    Raises:
        AssertionError: Nothing changed, or a weight outside the mask changed.
    """
    changed = 0
    for name in start.tensors:
        differs = np.flatnonzero(start.bits(name) != tuned.bits(name))
        held = vector[name].indices if name in vector else np.empty(0, np.int64)
        assert np.isin(differs, held).all(), f"{name} changed outside the mask"
        changed += len(differs)
    assert changed, "nothing changed"


def row_of(family: Family) -> tuple[str, bool]:
    """Test a family.

    Args:
        family: The family.

    Returns:
        The line of the table, and whether the family trained or was refused as expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        base = make_model(family, scratch / "base")
        try:
            trained = take_through(base, scratch, masked=family.kind == "masked")
        except TaskvecError as error:
            message = str(error).replace(f"{base} ", "")
            return f"| {family.name} | {family.kind} | {message} |", not family.trains
        line = f"{trained.vector.eligible:,} in {len(trained.vector.specs)} tensors"
        if trained.unreached:
            line += f"; {trained.unreached:.0%} without a gradient"
        return f"| {family.name} | {family.kind} | {line} |", family.trains


def main(wanted: list[str]) -> int:
    """Print the table, one line as soon as it is known.

    Args:
        wanted: Names of classes. Empty for all.

    Returns:
        The exit status.
    """
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # with models this small, threads only add overhead
    wrong = []
    print("| class | kind | eligible weights, or why it is refused |\n|---|---|---|")
    for family in FAMILIES:
        if wanted and family.name not in wanted:
            continue
        try:
            line, right = row_of(family)
        except Exception as error:
            traceback.print_exc()
            line, right = f"| {family.name} | {family.kind} | {type(error).__name__}: {error} |", False
        print(line, flush=True)
        if not right:
            wrong.append(family.name)
    if wrong:
        print(f"not as they should be: {', '.join(wrong)}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
