"""What is logged beside the loss of training: averages over the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tnt_kernels.functional import RowStats
from tnt_kernels.hf.batch_loss import Outcome
from tnt_kernels.hf.rows import Rows
from tnt_kernels.objectives import Objective


class Logged:
    """Adds up what is logged of training and of an evaluation. Sums stay on the device until averages are wanted."""

    def __init__(self, accelerator: Any, objective: Objective, alpha: float) -> None:
        self.accelerator, self.objective, self.alpha = accelerator, objective, alpha
        self._totals: dict[bool, Tensor] = {}  # (8,) of training (True), and of an evaluation

    @torch.no_grad()
    def add(self, rows: Rows, outcome: Outcome, training: bool) -> None:
        sums = self._sums(rows, outcome.stats)
        routed = sums.new_zeros(2)  # the auxiliary losses, and how many there are
        if outcome.auxiliary is not None:
            routed = torch.stack((outcome.auxiliary.loss.to(sums), sums.new_ones(())))
        if not training:  # of all processes, without the examples that fill up the last batch
            sums = self.accelerator.gather_for_metrics(sums)
            routed = self.accelerator.reduce(routed)
        total = torch.cat((sums.sum(dim=0), routed))
        self._totals[training] = self._totals.get(training, 0) + total

    def averages(self, training: bool) -> dict[str, float]:
        """The averages since the last call; none if no batch was added. Waits for the device once."""
        total = self._totals.pop(training, None)
        if total is None:
            return {}
        total = self.accelerator.reduce(total) if training else total
        rows, negatives, loss, mass, ref_mass, kl, auxiliary, batches = total.tolist()
        found = {"loss": loss / rows if rows else 0.0, "active_rows": rows}
        if batches:
            found["aux_loss"] = auxiliary / batches
        found["negative_share"] = negatives / rows if rows else 0.0
        if negatives:
            found["negative_mass"] = mass / negatives
            if self.objective.negative_loss.reads_reference:
                found["ref_negative_mass"] = ref_mass / negatives
        if rows > negatives and self.objective.positive_loss.reads_reference:
            found["positive_kl"] = kl / (rows - negatives)
        return found

    def _sums(self, rows: Rows, stats: RowStats) -> Tensor:
        """(B, 6) float32, for each text: rows, negative rows, and the sums that ``averages`` divides by these."""
        active, negative, loss = rows.active(), rows.negative(), stats.loss
        weights = torch.ones_like(loss) if rows.weights is None else rows.weights.to(loss)
        on_negatives = torch.full_like(weights, self.alpha)
        if self.objective.negative_loss.scaled_by_weight:
            on_negatives = torch.where(weights < 0, -self.alpha * weights, on_negatives)
        factor = torch.where(negative, on_negatives, weights)

        def total(values: Tensor, where: Tensor) -> Tensor:
            return torch.where(where, values, 0.0).sum(dim=1)

        sums = [
            active.sum(dim=1),
            negative.sum(dim=1),
            total(factor * loss, active),
            total(stats.negative_mass, negative),
            total(stats.ref_negative_mass, negative),
            total(stats.kl, active & ~negative),
        ]
        return torch.stack(sums, dim=1).float()
