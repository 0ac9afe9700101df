"""What passes between the operators and a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Numbers that a kernel keeps of a row between its loss and a gradient that is written later (csrc/params.h).
ROW_COEFFICIENTS = 16


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
    gradient: Tensor | None  # (N, V) in the logits' dtype; may be the logits
    upstream: Tensor | None  # (1,) or (N,) real: the gradient of the loss


def describe(logits: Tensor) -> str:
    return f"{str(logits.dtype).removeprefix('torch.')} on {logits.device}"


def scale_by_item(gradient: Tensor, scale: Tensor) -> None:
    """Multiplies in place by a number on the CPU, where it costs nothing to see that it is 1."""
    if scale.item() != 1:
        with torch.no_grad():
            gradient.mul_(scale)
