"""The loss under accelerate: any number of processes, mixed precision and gradient accumulation as it sets them up."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from model import UNWANTED, LanguageModel, batches
from torch.utils.data import DataLoader

import tnt_kernels as tnt


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = LanguageModel()
    original = copy.deepcopy(model).requires_grad_(False).eval().to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(list(batches(40)), batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss_of = tnt.TNTLoss(method="tnff", negative_ids=UNWANTED, return_stats=True)
    for step, batch in enumerate(loader):
        with accelerator.accumulate(model):
            with torch.no_grad():
                ref_logits = original(batch["tokens"])
            logits = model(batch["tokens"])
            loss, stats = loss_of(logits, ref_logits, batch["labels"], batch["weights"])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if step % 8 == 0:
            mass = stats.negative_mass.nanmean().item()
            accelerator.print(f"step {step:2}: p(unwanted) = {mass:.5f}")


if __name__ == "__main__":
    main()
