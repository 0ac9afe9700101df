"""What the two tasks have in common: an original model, its texts, and which tokens of them are unwanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

BATCH = 256  # texts, where no gradient is needed


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    train_steps: int  # of the original model
    samples: int  # to finetune on
    steps: int  # of finetuning
    batch: int
    test_prompts: int
    truth_samples: int  # continuations of a prompt that estimate how often the original is clean


@dataclass(frozen=True)
class Texts:
    """Prompts with completions as a model reads them; row t of its logits predicts ``labels[:, t]``.

    Attributes:
        inputs: keywords of the model, each (B, ...).
        labels: (B, T) token ids.
        active: (B, T) bool, True where the label is of the completion.
        unwanted: (B, T) bool, True where the label is active and unwanted.
        sets: (B,) or (B, T), what ``Task.negative_ids`` looks the unwanted tokens of a prefix up with.
        ref_logits: (B, T, V) of the original model, or None.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    active: Tensor
    unwanted: Tensor
    sets: Tensor
    ref_logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> Texts:
        return Texts(
            {name: value[rows] for name, value in self.inputs.items()},
            *(x[rows] for x in (self.labels, self.active, self.unwanted, self.sets)),
            None if self.ref_logits is None else self.ref_logits[rows],
        )

    def batches(self) -> Iterator[Texts]:
        for begin in range(0, len(self), BATCH):
            yield self[begin : begin + BATCH]

    @torch.no_grad()
    def with_reference(self, model: Any) -> Texts:
        logits = torch.cat([model(**part.inputs).logits for part in self.batches()])
        return replace(self, ref_logits=logits)


class Task(Protocol):
    """A task. Prompts are (B, P) ids and completions (B, L) ids, padded behind their end where they have one."""

    name: str
    #: Whether the original given a clean sequence is estimated, by rejection sampling.
    sequence_truth: bool
    learning_rates: tuple[float, ...]  # to tune over

    def scale(self, quick: bool) -> Scale: ...

    def train(self, size: str, scale: Scale) -> Any:
        """The original model, (``size``: "small", "base" or "large")."""

    def prompts(self, split: str, count: int) -> Tensor:
        """Prompts to "train" on, to tune on ("validation") and to report on ("test")."""

    def generate(self, model: Any, prompts: Tensor, **options: Any) -> Tensor:
        """Completions by ``model.generate`` with ``options``."""

    def texts(self, prompts: Tensor, completions: Tensor) -> Texts: ...

    def negative_ids(self, texts: Texts) -> Tensor:
        """(B, T, K) or (B, 1, K): the unwanted tokens at each prefix, padded with -1."""

    def words(self, prompts: Tensor, completions: Tensor) -> list[str]:
        """The completions as text."""

    def disfluencies(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """(B, 2) counts: what is broken in each completion, and what it repeats."""


class Banned(LogitsProcessor):
    """Removes a prefix's unwanted tokens while decoding: ``ids_of`` gives them, (B, K), from all ids so far."""

    def __init__(self, ids_of: Any) -> None:
        self.ids_of = ids_of

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids = self.ids_of(input_ids)
        mask = torch.zeros(scores.size(0), scores.size(1) + 1, dtype=torch.bool)
        mask.scatter_(1, ids % (scores.size(1) + 1), True)  # -1 falls on the column too many
        return scores.masked_fill(mask[:, :-1], -torch.inf)


def generate(
    model: Any, inputs: dict[str, Tensor], *, sampled: bool, banned: Any = None, **options: Any
) -> Tensor:
    """``model.generate`` in batches; ``banned(rows)`` is what a batch's ``Banned`` looks ids up with."""
    # top_k=0: transformers would sample from the 50 likeliest tokens, not from the model.
    options |= {"do_sample": True, "top_k": 0} if sampled else {"do_sample": False}
    parts = []
    for begin in range(0, len(inputs["input_ids"]), BATCH):
        rows = slice(begin, begin + BATCH)
        if banned is not None:
            options["logits_processor"] = LogitsProcessorList([Banned(banned(rows))])
        parts.append(model.generate(**{k: v[rows] for k, v in inputs.items()}, **options))
    longest = max(part.size(1) for part in parts)
    pad = model.config.pad_token_id or 0
    return torch.cat(
        [torch.nn.functional.pad(x, (0, longest - x.size(1)), value=pad) for x in parts]
    )
