"""The small model: a Llama of 0.3 million weights, pretrained on the exercises of `language` in three minutes.

Usage: python -m paper.pretrain FOLDER SEED STEPS. SMALL_MODEL has seed 0 and 2000 steps. It is committed, so that the
results of all machines are about the same base.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from taskvec_formats.system.atomic import atomic_directory

from .language import SKILLS, TASKS, TOKENS, Item, held_out, item

SMALL_MODEL = Path(__file__).parent / "base"
BATCH, RATE = 64, 2e-3
# Instructions that torch and MKL use. Other ones round differently, which after some hundred steps gives another model;
# the newest are left out, so that the bytes depend less on the processor.
_INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"}
# how many times rarer than a skill a task is in the pretraining
RARITY = {"falling": 25, "zip": 20, "distinct": 25, "swap": 30, "total": 7}


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


def pretrain(folder: Path, seed: int, steps: int) -> None:
    """Pretrain the model and write its folder, in a process of its own.

    Args:
        folder: The model folder to write.
        seed: Seed of the initial weights and of the exercises.
        steps: Optimizer steps.

    Raises:
        subprocess.CalledProcessError: The process failed.
    """
    command = [sys.executable, "-W", "ignore", "-m", "paper.pretrain", str(folder.absolute()), str(seed), str(steps)]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    # both variables are read when torch is imported
    subprocess.run(command, check=True, env={**os.environ, **_INSTRUCTIONS, "PYTHONPATH": path})


def write_model(folder: Path, seed: int, steps: int) -> None:
    """Pretrain the model here. Uses one thread, so that the weights do not depend on their number."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    dice, words, model = random.Random(seed), tokenizer(), LlamaForCausalLM(config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    weights = [1.0] * len(SKILLS) + [1 / RARITY[name] for name in TASKS]
    held = {row["prompt"] for name in TASKS for part in held_out(name) for row in part}
    for step in range(1, steps + 1):
        names = dice.choices([*SKILLS, *TASKS], weights, k=BATCH)
        rows = [_encoded(words, item_outside(held, name, dice)) for name in names]
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
            print(f"pretraining, step {step} of {steps}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        words.save_pretrained(temporary)


def item_outside(held: set[str], name: str, dice: random.Random) -> Item:
    """Draw an exercise that is not held out."""
    return next(drawn for drawn in iter(lambda: item(name, dice), None) if drawn["prompt"] not in held)


def _encoded(words: PreTrainedTokenizerFast, drawn: Item) -> tuple[list[int], int]:
    """The tokens of an exercise, and the position of the first of its answer."""
    prompt = words.encode(drawn["prompt"], add_special_tokens=False)
    return [*prompt, *words.encode(drawn["completion"], add_special_tokens=False), 2], len(prompt)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    write_model(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
