"""What passes between the operators and a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tnt_kernels.objectives import RowLoss

#: Numbers that a kernel keeps of a row between its loss and a gradient that is written later (csrc/params.h).
ROW_COEFFICIENTS = 16
#: Numbers that one shard of the vocabulary tells the others about a row (csrc/row_math.h, ``pack``).
ROW_STATISTICS = 15
#: Numbers of a row that are summed over the shards: the loss terms of the second pass, NL's active tokens.
ROW_PARTS = 2


class Scalars(NamedTuple):
    """The settings of a call; the operators take them in this order."""

    positive_loss: int  # objectives.RowLoss
    negative_loss: int
    alpha_value: float
    eps: float
    uniform_smoothing: bool
    nl_floor: float | None
    temperature: float
    ignore_index: int
    reduction: str  # "mean" "sum" "none"
    normalizer_value: float | None
    backend: str


class RowCall(NamedTuple):
    """All that a backend needs for one launch. N rows, V vocabulary; "real" is float32, or float64 for float64 logits.

    A launch computes one of three things: loss and gradient (``loss``, ``gradient``), the loss alone, with what a later
    gradient needs (``loss``, ``coefficients``), or that gradient (``coefficients``, ``gradient``, ``upstream``).

    Where the vocabulary is sharded over S devices, V counts this shard's columns, labels and ids are those of the whole
    vocabulary, and a loss takes three launches, with a collective after the first and after the second:

    1. ``statistics`` is written. ``stats``, given here too where they are wanted in the end, asks for their sums.
    2. ``gathered`` in; ``parts`` is written, and ``gradient`` where it neither waits for an upstream factor nor needs
       totals (see :func:`gradient_needs_totals`).
    3. ``gathered`` and ``totals`` in; ``loss`` and ``stats`` are written without a look at the vocabulary, and the
       ``gradient`` that had to wait, with ``upstream`` where that is set.
    """

    logits: Tensor  # (N, V), dense rows
    ref_logits: Tensor | None  # (N, V), dense rows
    labels: Tensor  # (N,) int64
    weights: Tensor | None  # (N,) real
    alpha: Tensor | None  # (N,) or (1,) real, any stride; None: scalars.alpha_value
    negative_ids: Tensor | None  # (N, K) or (K,) int64
    normalizer: (
        Tensor | None
    )  # () real; None: scalars.normalizer_value; neither: the number of active rows
    scalars: Scalars
    loss: Tensor | None  # () real, (N,) where the reduction is "none"
    stats: Tensor | None  # (5, N) real: loss, kl, negative_mass, ref_negative_mass, entropy
    coefficients: Tensor | None  # (N, ROW_COEFFICIENTS) real
    #: (N, V) in the logits' dtype, or bfloat16 where that is float32; may be the logits
    gradient: Tensor | None
    upstream: Tensor | None  # (1,) or (N,) real: the gradient of the loss
    vocab_offset: int  # the vocabulary id of column 0
    vocab_size: int  # of the whole vocabulary; V where it is not sharded
    statistics: Tensor | None  # (N, ROW_STATISTICS) real, out
    gathered: Tensor | None  # (S, N, ROW_STATISTICS) real, in; shard after shard, at any distance
    parts: Tensor | None  # (N, ROW_PARTS) real, out
    totals: Tensor | None  # (N, ROW_PARTS) real, in: parts, summed over the shards

    @property
    def is_first(self) -> bool:
        """Whether no launch of these rows came before."""
        return self.upstream is None and self.gathered is None


def check_indices(
    labels: Tensor,
    weights: Tensor | None,
    negative_ids: Tensor | None,
    vocab: int,
    ignore_index: int,
) -> None:
    """On the CPU, labels and ids outside the vocabulary are an error; elsewhere asking would wait for the device.

    Rows are (N,).
    """
    if labels.device.type != "cpu":
        return
    active = labels != ignore_index
    if weights is not None:
        active &= weights != 0
    outside = active & ((labels < 0) | (labels >= vocab))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"labels: row {row} has label {int(labels[row])}, expected 0 <= label < V "
            f"(vocabulary size {vocab}) or ignore_index ({ignore_index})"
        )
    if negative_ids is not None:
        outside = (negative_ids < -1) | (negative_ids >= vocab)
        per_row = negative_ids.dim() == 2
        if per_row:
            outside &= active[:, None]
        if outside.any() and len(active):
            index = outside.nonzero()[0].tolist()
            raise ValueError(
                f"negative_ids: row {index[0] if per_row else 0} has id {int(negative_ids[tuple(index)])}, "
                f"expected 0 <= id < V (vocabulary size {vocab}), or -1 as padding"
            )


def gradient_needs_totals(s: Scalars) -> bool:
    """Whether, for some row of the call, the gradient needs what all shards' second passes yield."""
    sides = (s.positive_loss, s.negative_loss)
    uniform_reverse = s.uniform_smoothing and s.eps > 0 and RowLoss.REVERSE_KL in sides
    return uniform_reverse or (s.nl_floor is not None and RowLoss.NEGATIVE_LIKELIHOOD in sides)


def loss_needs_totals(s: Scalars) -> bool:
    """Whether some row's loss is not known from the statistics alone."""
    sides = (s.positive_loss, s.negative_loss)
    return any(
        RowLoss(side).reads_reference or side == RowLoss.NEGATIVE_LIKELIHOOD for side in sides
    )


def real_dtype(logits: Tensor) -> torch.dtype:
    """What the arithmetic, the loss, the weights and the diagnostics are in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def describe(logits: Tensor) -> str:
    return f"{str(logits.dtype).removeprefix('torch.')} on {logits.device}"


def scale_by_item(gradient: Tensor, scale: Tensor) -> None:
    """Multiplies in place by a number on the CPU, where it costs nothing to see that it is 1."""
    if scale.item() != 1:
        with torch.no_grad():
            gradient.mul_(scale)
