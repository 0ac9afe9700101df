"""A small model of a small language, so that the examples run anywhere. You would load one from the Hub."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

PROMPTS = ["the", "a"]
UNWANTED = ("damn", "bloody")


def sentence(draw: random.Random) -> str:
    adjective = draw.choice(["old ", "small ", "damn ", "bloody ", ""])
    animal, verb = draw.choice(["cat", "dog", "fox"]), draw.choice(["sat", "slept", "ate"])
    return (
        f"{draw.choice(PROMPTS)} {adjective}{animal} {verb} on the {draw.choice(['mat', 'roof'])}."
    )


@functools.cache
def _trained() -> tuple[Any, Any]:
    draw = random.Random(0)
    texts = [sentence(draw) for _ in range(512)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<pad>", "<eos>"], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        part = [text + "<eos>" for text in draw.sample(texts, 32)]
        batch = tokenizer(part, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def load() -> tuple[Any, Any]:
    """A GPT-2 that swears now and then, and its tokenizer."""
    model, tokenizer = _trained()
    return copy.deepcopy(model), tokenizer


def unwanted_rate(completions: list[dict[str, Any]]) -> float:
    return sum(any(word in x["text"] for word in UNWANTED) for x in completions) / len(completions)
