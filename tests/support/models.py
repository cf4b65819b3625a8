"""Small models of real architectures, as model folders, and small data for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WORDS = "<pad> <s> </s> <unk> user assistant : one two three four five six plus is".split()
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)
ROWS = [
    {"prompt": "one plus one is", "completion": "two"},
    {"prompt": "one plus two is", "completion": "three"},
    {"messages": [{"role": "user", "content": "two plus two is"}, {"role": "assistant", "content": "four"}]},
    {"text": "three plus three is six"},
]


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Build a tokenizer that maps WORDS to ids and all other words to <unk>."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def _save(
    model: PreTrainedModel, folder: Path, dtype: str, shard_size: str | None, template: str | None = TEMPLATE
) -> Path:
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **({"max_shard_size": shard_size} if shard_size else {}))
    make_tokenizer(template).save_pretrained(folder)
    return folder


def make_llama(folder: Path, *, dtype: str = "float32", shard_size: str | None = None, seed: int = 0) -> Path:
    """Write a Llama with two blocks of width 32 and tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(LlamaForCausalLM(config), folder, dtype, shard_size)


def make_qwen2(folder: Path) -> Path:
    """Write a Qwen2 with two blocks of width 32, separate embeddings, and biases in some of its linear layers."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(Qwen2ForCausalLM(config), folder, "float32", None)


def make_mixtral(folder: Path, *, dtype: str = "float32") -> Path:
    """Write a Mixtral with two blocks of width 16 and four experts per block."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(MixtralForCausalLM(config), folder, dtype, None)


def make_bert(folder: Path, *, dtype: str = "float32") -> Path:
    """Write a BERT with two blocks of width 16; the weights of its head are tied to the embeddings."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    folder = _save(BertForMaskedLM(config), folder, dtype, None)
    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.mask_token = "<unk>"
    tokenizer.save_pretrained(folder)
    return folder


def make_architecture(name: str, folder: Path, *, dtype: str) -> Path:
    """Write a model of the architecture llama, mixtral or bert."""
    return {"llama": make_llama, "mixtral": make_mixtral, "bert": make_bert}[name](folder, dtype=dtype)


def make_gpt2(folder: Path) -> Path:
    """Write a GPT-2 with two blocks of width 32; its tensors lack the prefix `transformer.`, as in the original."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1)
    config.eos_token_id, config.pad_token_id = 2, 0
    model = GPT2LMHeadModel(config)
    folder = _save(model, folder, "float32", None, template=None)
    bare = model.transformer
    config_file = folder / "config.json"
    whole = config_file.read_bytes()
    bare.save_pretrained(folder)
    config_file.write_bytes(whole)  # the config of the model with the head
    return folder


def perturb(
    source: Path, target: Path, *, dtype: str, shard_size: str | None = None, scale: float = 1e-2, seed: int = 1
) -> Path:
    """Write a full fine-tune of `source`: normal noise of standard deviation `scale` is added to every parameter."""
    torch.manual_seed(seed)
    (architecture,) = AutoConfig.from_pretrained(source).architectures
    model = getattr(transformers, architecture).from_pretrained(source, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return _save(model, target, dtype, shard_size)


def write_rows(path: Path, rows: list[dict[str, object]] | None = None) -> Path:
    """Write rows, by default ROWS, as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS), encoding="utf-8")
    return path
