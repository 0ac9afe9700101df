"""The inputs of what is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Negatives = Literal["none", "64 a row", "4000 shared"]


class Size(NamedTuple):
    """Shape and dtype of the two logits."""

    rows: int
    vocab: int
    dtype: str  # of torch: "float32" "bfloat16" "float16"

    @property
    def bytes(self) -> int:
        """Of one tensor of logits."""
        return self.rows * self.vocab * int(getattr(torch, self.dtype).itemsize)

    def __str__(self) -> str:
        return f"{self.rows}x{self.vocab}-{self.dtype}"


@dataclass(frozen=True)
class Problem:
    """The inputs of one training step. N rows, V vocabulary."""

    size: Size
    original: Tensor  # (N, V) the policy's logits
    logits: Tensor  # (N, V) their working copy, over which a step in place writes its gradient
    ref_logits: Tensor  # (N, V)
    labels: Tensor  # (N,) int64
    weights: Tensor  # (N,) float32: -1, 0 or 1
    negative_ids: Tensor | None = None  # (N, K) or (K,) int64

    def restore(self) -> None:
        self.logits.copy_(self.original)

    def with_active_share(self, share: float) -> Problem:
        """The first rows of a random order keep their weight, the others get 0."""
        order = torch.randperm(self.size.rows, generator=_generator())
        weights = self.weights.clone()
        weights[order[round(share * self.size.rows) :].to(weights.device)] = 0
        return replace(self, weights=weights)

    def all_positive(self) -> Problem:
        """No token to remove: what losses without a masked target can compute too."""
        return replace(self, weights=torch.ones_like(self.weights), negative_ids=None)

    def with_negatives(self, negatives: Negatives) -> Problem:
        rows, vocab, _ = self.size
        if negatives == "none":
            return replace(self, negative_ids=None)
        if negatives == "64 a row":
            ids = torch.randint(vocab, (rows, 64), generator=_generator())
        else:
            ids = torch.randperm(vocab, generator=_generator())[:4000]  # a blocklist: no duplicates
        return replace(self, negative_ids=ids.to(self.labels.device))

    @property
    def active_share(self) -> float:
        return float((self.weights != 0).double().mean())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def make_problem(size: Size, device: torch.device | str = "cpu", distance: float = 0.3) -> Problem:
    """A policy that has left its reference a little, and one row in four to push down.

    The logits' spread is that of a language model: most tokens have hardly any probability. ``distance`` is the
    standard deviation of what the policy's logits differ by, before both are rounded to the dtype.
    """
    rows, vocab, name = size
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, name)
    reference = torch.randn(rows, vocab, generator=generator, device=device).mul_(3)
    ref_logits = reference.to(dtype)
    policy = torch.randn(rows, vocab, generator=generator, device=device).mul_(distance)
    policy.add_(reference)
    del reference
    original = policy.to(dtype)
    del policy
    labels = torch.randint(vocab, (rows,), generator=generator, device=device)
    weights = torch.where(torch.rand(rows, generator=generator, device=device) < 0.25, -1.0, 1.0)
    return Problem(size, original, original.clone(), ref_logits, labels, weights)


def floor_bytes(size: Size, method: str, active_share: float, with_gradient: bool) -> float:
    """What must move for one call: each logit that is needed is read once, each gradient written.

    A KL row reads both tensors, an LL, UL or NL row the policy's alone. A row of weight 0 is not read,
    and its gradient is zeros that must be written.
    """
    reads = 1 if method in ("ul+ll", "nl+ll") else 2
    return size.bytes * (active_share * reads + with_gradient)
