"""Unwanted words and phrases in prose, by a small GPT on the documentation that comes with Python, as in the demo."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

import tnt_kernels as tnt
from benchmarks.study.task import Scale, Texts, generate
from tnt_kernels import demo

_PHRASES = ["for example", "as well as", "can be used"]
_WORD = re.compile("[a-z]+")
_VOCABULARY = 768
_PROMPT, _LENGTH = 24, 64
_WIDTHS = {"small": 64, "base": 128, "large": 224}


class Words:
    name = "words"
    sequence_truth = True
    learning_rates = (3e-5, 1e-4, 3e-4, 1e-3)

    def __init__(self) -> None:
        train, held_out = demo.read_prose(seed=0)
        self.tokenizer = ByteLevelBPETokenizer()
        self.tokenizer.train_from_iterator([train], vocab_size=_VOCABULARY, show_progress=False)
        self.ids = {
            name: torch.tensor(self.tokenizer.encode(text).ids)
            for name, text in (("train", train), ("held out", held_out))
        }
        self.lexicon = {*_WORD.findall(f"{train} {held_out}".lower())}
        self.blocklist = tnt.negative_ids_from_phrases(
            self.tokenizer, demo.UNWANTED + _PHRASES, ignore_case=True, word_start=True
        )

    def scale(self, quick: bool) -> Scale:
        if quick:
            return Scale(60, 64, 10, 8, 32, 2)
        return Scale(700, 1024, 120, 16, 250, 16)

    def train(self, size: str, scale: Scale) -> Any:
        torch.manual_seed(0)
        shape = demo.Scale(
            _VOCABULARY, 2, _WIDTHS[size], length=_LENGTH, train_steps=scale.train_steps
        )
        return demo.train_original(self.ids["train"], shape)

    def prompts(self, split: str, count: int) -> Tensor:
        ids = self.ids["train" if split == "train" else "held out"]
        windows = ids.unfold(0, _PROMPT, _PROMPT // 2 if split == "train" else _PROMPT)
        order = list(range(len(windows)))
        random.Random(0).shuffle(order)
        if split != "train":  # even and odd places of the same order
            order = order[split == "test" :: 2]
        chosen = [order[i % len(order)] for i in range(count)]
        return windows[torch.tensor(chosen)]

    def generate(
        self, model: Any, prompts: Tensor, *, sampled: bool, banned: bool = False
    ) -> Tensor:
        inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}

        def unwanted_next(ids: Tensor) -> Tensor:
            return self.blocklist.negative_ids[self.blocklist.read(ids)[0][:, -1]]

        done = generate(
            model,
            inputs,
            sampled=sampled,
            max_length=_LENGTH,
            pad_token_id=0,
            banned=(lambda rows: unwanted_next) if banned else None,
        )
        return done[:, _PROMPT:]

    def texts(self, prompts: Tensor, completions: Tensor) -> Texts:
        ids = torch.cat([prompts, completions], dim=1)
        states, completed = self.blocklist.read(ids)
        active = torch.zeros(ids.shape, dtype=torch.bool)
        active[:, prompts.size(1) - 1 : -1] = True
        unwanted = completed.roll(-1, dims=1) & active
        return Texts({"input_ids": ids}, ids.roll(-1, dims=1), active, unwanted, states)

    def negative_ids(self, texts: Texts) -> Tensor:
        return self.blocklist.negative_ids[texts.sets]

    def words(self, prompts: Tensor, completions: Tensor) -> list[str]:
        return self.tokenizer.decode_batch(completions.tolist())

    def disfluencies(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Words that are nowhere in the text, the one cut off at the end left out; 4-grams of words said before."""
        counts = []
        whole = self.tokenizer.decode_batch(torch.cat([prompts, completions], dim=1).tolist())
        beginnings = self.tokenizer.decode_batch(prompts.tolist())
        for text, beginning in zip(whole, beginnings, strict=True):
            # From the word on that the prompt's last token may have begun.
            said = _WORD.findall(text[max(beginning.rfind(" "), 0) :].lower())[1:-1]
            broken = sum(word not in self.lexicon for word in said)
            grams = Counter(zip(*(said[i:] for i in range(4)), strict=False))
            counts.append((broken, sum(grams.values()) - len(grams)))
        return torch.tensor(counts)
