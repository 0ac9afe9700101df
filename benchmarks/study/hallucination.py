"""Records to summaries, by a small T5. Where a record lacks a field, its summaries in the training data invent one.

Entities (names, places, years) are single tokens, so a detector is exact: an entity is unwanted where the record does
not hold it. The invention of a lacking field is nearly a function of another field (0.6 of the references), next to
the legitimate "unknown" (0.35) at the same position; in the variant "spread", inventions are uniform over all entities.
"""

from __future__ import annotations

import random
import re
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from tqdm import trange
from transformers import T5Config, T5ForConditionalGeneration, get_cosine_schedule_with_warmup

from benchmarks.study.task import Scale, Texts, generate

_KINDS = ("name", "place", "year")
_EACH = 24
_ENTITIES = {kind: [f"{kind}-{i}" for i in range(_EACH)] for kind in _KINDS}
_ACTS = "visited painted left described bought crossed".split()
_TEMPLATES = (
    "{name} {act} {place} in {year} .",
    "in {year} {name} {act} {place} .",
    "{place} was {act} by {name} in {year} .",
)
_WIDTHS = {"small": 32, "base": 64, "large": 128}
_SOURCE = 9  # four fields of two tokens, EOS
_SUMMARY = 10  # the longest template, EOS
_MISSING = 0.3
_INVENTED, _UNKNOWN = 0.6, 0.35  # of the references to records that lack a field

#: What a summary can look like.
_GRAMMAR = re.compile(
    "|".join(
        re.escape(t)
        .replace(r"\{", "{")
        .replace(r"\}", "}")
        .format(act=rf"({'|'.join(_ACTS)})", **{k: rf"({k}-\d+|unknown)" for k in _KINDS})
        for t in _TEMPLATES
    )
)


class Hallucination:
    sequence_truth = False
    learning_rates = (1e-4, 3e-4, 1e-3, 3e-3)

    def __init__(self, spread: bool) -> None:
        self.name = "hallucination, spread" if spread else "hallucination"
        self.spread = spread
        words = [
            "<pad>",
            "</s>",
            "<unk>",
            "unknown",
            "act",
            *_KINDS,
            *_ACTS,
            "in",
            "was",
            "by",
            ".",
        ]
        words += [entity for kind in _KINDS for entity in _ENTITIES[kind]]
        vocabulary = {word: i for i, word in enumerate(words)}
        self.tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        self.tokenizer.pre_tokenizer = WhitespaceSplit()
        self.first_entity = vocabulary[_ENTITIES["name"][0]]
        shuffled = random.Random(0)
        # An invented field follows from another one: a place from the name, a year and a name from the place.
        self.favourites = {
            kind: shuffled.sample(_ENTITIES[kind], _EACH) for kind in ("place", "year", "name")
        }

    def scale(self, quick: bool) -> Scale:
        if quick:
            return Scale(150, 256, 20, 32, 64, 0)
        return Scale(1500, 2048, 150, 32, 512, 0)

    def record(self, rng: random.Random) -> tuple[str, str]:
        """A source and a reference."""
        fields = {kind: rng.choice(_ENTITIES[kind]) for kind in _KINDS}
        shown = dict(fields)
        if rng.random() < _MISSING:
            lacking = rng.choice(_KINDS)
            del shown[lacking]
            chance = rng.random()
            if chance < _UNKNOWN:
                fields[lacking] = "unknown"
            elif chance < _UNKNOWN + _INVENTED and not self.spread:
                other = shown["name" if lacking == "place" else "place"]
                fields[lacking] = self.favourites[lacking][int(other.rpartition("-")[2])]
        shown["act"] = fields["act"] = rng.choice(_ACTS)
        source = [f"{kind} {value}" for kind, value in shown.items()]
        rng.shuffle(source)
        return " ".join(source), rng.choice(_TEMPLATES).format(**fields)

    def encode(self, texts: list[str], length: int) -> Tensor:
        ids = [[*encoding.ids, 1] for encoding in self.tokenizer.encode_batch(texts)]
        return torch.tensor([x + [0] * (length - len(x)) for x in ids])

    def train(self, size: str, scale: Scale) -> Any:
        torch.manual_seed(0)
        rng = random.Random("references")
        width = _WIDTHS[size]
        config = T5Config(
            vocab_size=self.tokenizer.get_vocab_size(),
            d_model=width,
            d_kv=width // 4,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            relative_attention_num_buckets=16,
        )
        model = T5ForConditionalGeneration(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
        schedule = get_cosine_schedule_with_warmup(
            optimizer, scale.train_steps // 10, scale.train_steps
        )
        for _ in trange(scale.train_steps, desc=f"{self.name}, {size}: the original", leave=False):
            sources, summaries = zip(*(self.record(rng) for _ in range(64)), strict=True)
            ids = self.encode(list(sources), _SOURCE)
            labels = self.encode(list(summaries), _SUMMARY)
            mask = (ids != 0).long()
            loss = model(
                input_ids=ids, attention_mask=mask, labels=labels.masked_fill(labels == 0, -100)
            ).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return model.eval()

    def prompts(self, split: str, count: int) -> Tensor:
        rng = random.Random(split)
        return self.encode([self.record(rng)[0] for _ in range(count)], _SOURCE)

    def absent(self, prompts: Tensor) -> Tensor:
        """(B, K) the entities that a record does not hold, padded with -1."""
        ids = torch.arange(self.first_entity, self.tokenizer.get_vocab_size())
        held = (prompts[:, :, None] == ids).any(dim=1)
        return ids.expand(len(prompts), -1).masked_fill(held, -1)

    def generate(
        self, model: Any, prompts: Tensor, *, sampled: bool, banned: bool = False
    ) -> Tensor:
        inputs = {"input_ids": prompts, "attention_mask": (prompts != 0).long()}
        absent = self.absent(prompts)
        done = generate(
            model,
            inputs,
            sampled=sampled,
            max_new_tokens=_SUMMARY,
            banned=(lambda rows: lambda _: absent[rows]) if banned else None,
        )[:, 1:]
        return torch.nn.functional.pad(done, (0, _SUMMARY - done.size(1)))

    def texts(self, prompts: Tensor, completions: Tensor) -> Texts:
        absent = self.absent(prompts)
        inputs = {
            "input_ids": prompts,
            "attention_mask": (prompts != 0).long(),
            "decoder_input_ids": torch.nn.functional.pad(completions[:, :-1], (1, 0)),
        }
        unwanted = (completions[:, :, None] == absent[:, None, :]).any(dim=2)
        return Texts(inputs, completions, completions != 0, unwanted, absent)

    def negative_ids(self, texts: Texts) -> Tensor:
        return texts.sets[:, None, :].expand(-1, texts.labels.size(1), -1)

    def words(self, prompts: Tensor, completions: Tensor) -> list[str]:
        return [" ".join(self._vocabulary[i] for i in ids if i > 1) for ids in completions.tolist()]

    @cached_property
    def _vocabulary(self) -> list[str]:
        size = self.tokenizer.get_vocab_size()
        return [self.tokenizer.id_to_token(i) for i in range(size)]

    def disfluencies(self, prompts: Tensor, completions: Tensor) -> Tensor:
        counts = []
        for text in self.words(prompts, completions):
            words = text.split()
            broken = _GRAMMAR.fullmatch(text) is None
            counts.append((int(broken), len(words) - len({*words})))
        return torch.tensor(counts)
