"""The losses in plain PyTorch (``reference.py``), on any device: the fallback, slow and generous with memory."""

from __future__ import annotations

import torch
from torch import Tensor

from tnt_kernels.backends import eager_shards
from tnt_kernels.backends.call import RowCall, check_indices, real_dtype, scale_by_item
from tnt_kernels.objectives import Objective, RowLoss
from tnt_kernels.reference import row_gradients, row_terms

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def why_not(logits: Tensor | None) -> str:
    """Why this backend cannot serve these logits: it serves all."""
    return ""


def scale_(gradient: Tensor, scale: Tensor) -> None:
    if gradient.device.type == "cpu":
        scale_by_item(gradient, scale)
    else:
        gradient.mul_(scale)


def _inverse_normalizer(call: RowCall) -> Tensor:
    """() real: what a row's loss and gradient are multiplied by, besides its own factor."""
    s, real = call.scalars, real_dtype(call.logits)
    one = call.logits.new_ones((), dtype=real)
    if s.reduction != "mean":
        return one
    if call.normalizer is not None:
        normalizer = call.normalizer
    elif s.normalizer_value is not None:
        normalizer = one * s.normalizer_value
    else:
        active = call.labels != s.ignore_index
        if call.weights is not None:
            active &= call.weights != 0
        normalizer = active.sum().to(real)
    return torch.where(normalizer == 0, 0.0, 1.0 / normalizer)


def launch(call: RowCall) -> None:
    s = call.scalars
    if call.is_first:
        check_indices(call.labels, call.weights, call.negative_ids, call.vocab_size, s.ignore_index)
    if call.statistics is not None or call.gathered is not None:
        return eager_shards.launch(call, _inverse_normalizer(call))
    names = (RowLoss(s.positive_loss).name.lower(), RowLoss(s.negative_loss).name.lower())
    alpha: float | Tensor = (
        s.alpha_value if call.alpha is None else call.alpha.expand(len(call.labels))
    )
    arguments = (call.logits.detach(), call.ref_logits, call.labels, call.weights)
    settings = {
        "objective": Objective(*names),
        "alpha": alpha,
        "negative_ids": call.negative_ids,
        "eps": s.eps,
        "smoothing": "uniform" if s.uniform_smoothing else "negatives",
        "nl_floor": s.nl_floor,
        "temperature": s.temperature,
        "ignore_index": s.ignore_index,
    }
    terms = row_terms(*arguments, **settings)  # type: ignore[arg-type]

    # A factor of 0 is a loss and a gradient of 0, whatever the row holds.
    factor = terms.scale if s.reduction == "none" else terms.scale * _inverse_normalizer(call)
    if call.loss is not None:
        losses = torch.where(factor == 0, 0.0, terms.loss * factor)
        call.loss.copy_(losses.view_as(call.loss) if s.reduction == "none" else losses.sum())
    if call.stats is not None:
        fields = (terms.loss, terms.kl, terms.negative_mass, terms.ref_negative_mass, terms.entropy)
        call.stats.copy_(torch.stack(fields).view_as(call.stats))
    if call.gradient is not None:
        if call.upstream is not None:
            factor = torch.where((factor == 0) | (call.upstream == 0), 0.0, factor * call.upstream)
        gradient = row_gradients(*arguments, **settings)  # type: ignore[arg-type]
        call.gradient.copy_(torch.where((factor == 0)[:, None], 0.0, gradient * factor[:, None]))
