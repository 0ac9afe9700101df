"""The loss in a LightningModule: any trainer flags (devices, precision, accumulation) apply as they do to others."""

from __future__ import annotations

import copy

import lightning
import torch
from model import UNWANTED, LanguageModel, batches
from torch import Tensor
from torch.utils.data import DataLoader

import tnt_kernels as tnt


class TargetedUpdate(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = LanguageModel()
        # A submodule moves with the others. No gradient, and in eval mode: Lightning leaves frozen modules there.
        self.original = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.loss = tnt.TNTLoss(method="tnff", inplace=True, return_stats=True)
        self.register_buffer("unwanted", UNWANTED, persistent=False)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        with torch.no_grad():
            ref_logits = self.original(batch["tokens"])
        loss, stats = self.loss(
            self.model(batch["tokens"]), ref_logits, batch["labels"], batch["weights"],
            negative_ids=self.unwanted,
        )  # fmt: skip
        if index % 8 == 0:
            self.print(f"step {index:2}: p(unwanted) = {stats.negative_mass.nanmean().item():.5f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)


def main() -> None:
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=2, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(TargetedUpdate(), DataLoader(list(batches(40)), batch_size=None))


if __name__ == "__main__":
    main()
