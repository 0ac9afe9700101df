"""An output layer split over the vocabulary, Megatron style: every rank holds some rows of it and their logits.

The hidden states are the same on all ranks, so their gradient is the sum of the ranks' parts. ``linear_tnt_loss`` with
the same ``group`` does that sum itself, and makes no logits either.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from model import UNWANTED, VOCAB, LanguageModel, batches
from torch import Tensor, nn

import tnt_kernels as tnt


class ReduceGradient(torch.autograd.Function):
    """Megatron's copy to the tensor-parallel region: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


def shard_of(head: nn.Linear) -> nn.Linear:
    """This rank's rows; a vocabulary that does not divide leaves shards of different sizes."""
    rows = head.weight.detach().tensor_split(dist.get_world_size())[dist.get_rank()]
    part = nn.Linear(head.in_features, len(rows), bias=False)
    part.weight = nn.Parameter(rows.clone())
    return part


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = LanguageModel()
    model.head = shard_of(model.head)
    original = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    group = dist.group.WORLD
    for step, batch in enumerate(batches(40)):
        hidden = model.hidden(batch["tokens"])
        with torch.no_grad():
            ref_logits = original(batch["tokens"])
        # Labels and negative_ids are ids of the whole vocabulary, on every rank.
        loss, stats = tnt.tnt_loss(
            model.head(ReduceGradient.apply(hidden)), ref_logits, batch["labels"], batch["weights"],
            negative_ids=UNWANTED, group=group, return_stats=True,
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 8 == 0 and dist.get_rank() == 0:
            mass = stats.negative_mass.nanmean().item()
            print(
                f"step {step:2}: {VOCAB} columns on {group.size()} ranks, p(unwanted) = {mass:.5f}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
