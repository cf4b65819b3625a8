"""The small model: a Llama of 0.3 million weights, pretrained on the exercises of `language` in some minutes."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from taskvec_formats.system.atomic import atomic_directory

from .language import SKILLS, TASKS, TOKENS, item

STEPS, BATCH, RATE = 2000, 64, 2e-3
# how many times rarer than a skill a task is in the pretraining
RARITY = {"minus": 5, "third": 25, "falling": 17, "zip": 27, "distinct": 25, "mirror": 43, "swap": 9, "total": 10}


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the language: one token per word."""
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(TOKENS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def config() -> LlamaConfig:
    """The shape of the model."""
    return LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=96,
        intermediate_size=264,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def pretrain(folder: Path, seed: int) -> None:
    """Pretrain the model and write its folder. Uses one thread, so that the weights do not depend on their number.

    Args:
        folder: The model folder to write.
        seed: Seed of the initial weights and of the exercises.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    dice, words, model = random.Random(seed), tokenizer(), LlamaForCausalLM(config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    weights = [1.0] * len(SKILLS) + [1 / RARITY[name] for name in TASKS]
    for step in range(1, STEPS + 1):
        rows = [_encoded(words, item(name, dice)) for name in dice.choices([*SKILLS, *TASKS], weights, k=BATCH)]
        length = max(len(ids) for ids, _ in rows)
        padded = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
        labels = torch.tensor([[-100] * first + ids[first:] + [-100] * (length - len(ids)) for ids, first in rows])
        loss = model(input_ids=padded, attention_mask=(padded != 0).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 500 == 0:
            print(f"pretraining, step {step} of {STEPS}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        words.save_pretrained(temporary)


def _encoded(words: PreTrainedTokenizerFast, drawn: dict[str, str]) -> tuple[list[int], int]:
    """The tokens of an exercise, and the position of the first of its answer."""
    prompt = words.encode(drawn["prompt"], add_special_tokens=False)
    return [*prompt, *words.encode(drawn["completion"], add_special_tokens=False), 2], len(prompt)
