"""What is measured: the cases, as data, and their inputs."""

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


SIZES = tuple(Size(512, v, d) for v in (32000, 128256) for d in ("float32", "bfloat16"))
HALF = Size(512, 32000, "float16")
#: For --quick and the tests: every line runs, and the figures mean nothing.
QUICK_SIZES = (Size(16, 5000, "float32"), Size(16, 5000, "bfloat16"))
QUICK_HALF = Size(16, 5000, "float16")

SPARSE = 0.1  # active share where "one row in ten" is measured


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
        weights[order[round(share * self.size.rows) :]] = 0
        return replace(self, weights=weights)

    def with_negatives(self, negatives: Negatives) -> Problem:
        rows, vocab, _ = self.size
        if negatives == "none":
            return replace(self, negative_ids=None)
        if negatives == "64 a row":
            shape: tuple[int, ...] = (rows, 64)
            return replace(self, negative_ids=torch.randint(vocab, shape, generator=_generator()))
        ids = torch.randperm(vocab, generator=_generator())[:4000]  # a blocklist: no duplicates
        return replace(self, negative_ids=ids)

    @property
    def active_share(self) -> float:
        return float((self.weights != 0).double().mean())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def make_problem(size: Size) -> Problem:
    """A policy that has left its reference a little, and one row in four to push down.

    The logits' spread is that of a language model: most tokens have hardly any probability.
    """
    rows, vocab, name = size
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, name)
    reference = torch.randn(rows, vocab, generator=generator).mul_(3)
    ref_logits = reference.to(dtype)
    policy = torch.randn(rows, vocab, generator=generator).mul_(0.3).add_(reference)
    del reference
    original = policy.to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    weights = torch.where(torch.rand(rows, generator=generator) < 0.25, -1.0, 1.0)
    return Problem(size, original, original.clone(), ref_logits, labels, weights)


def floor_bytes(size: Size, method: str, active_share: float, with_gradient: bool) -> float:
    """What must move for one call: each logit that is needed is read once, each gradient written.

    A KL row reads both tensors, an LL or UL row the policy's alone. A row of weight 0 is not read,
    and its gradient is zeros that must be written.
    """
    reads = 1 if method == "ul+ll" else 2
    return size.bytes * (active_share * reads + with_gradient)
