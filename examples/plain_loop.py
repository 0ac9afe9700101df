"""A plain PyTorch loop: the original model next to the one in training, gradients accumulated over two batches."""

from __future__ import annotations

import copy

import torch
from model import UNWANTED, LanguageModel, batches

import tnt_kernels as tnt

ACCUMULATE = 2


def main() -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    original = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pending = list(batches(40))
    for step in range(0, len(pending), ACCUMULATE):
        group = pending[step : step + ACCUMULATE]
        # One mean over all batches of a step, however their sizes differ.
        rows = sum((batch["weights"] != 0).sum() for batch in group)
        for batch in group:
            with torch.no_grad():
                ref_logits = original(batch["tokens"])
            loss, stats = tnt.tnt_loss(
                model(batch["tokens"]), ref_logits, batch["labels"], batch["weights"],
                negative_ids=UNWANTED, normalizer=rows, inplace=True, return_stats=True,
            )  # fmt: skip
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 8 == 0:
            print(f"step {step:2}: p(unwanted) = {stats.negative_mass.nanmean().item():.5f}")


if __name__ == "__main__":
    main()
