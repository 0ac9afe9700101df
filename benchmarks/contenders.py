"""What is compared: the losses as people write them, that under ``torch.compile``, and the library.

A contender is a function of (logits, ref_logits, labels, weights, negative_ids) to the mean loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import tnt_kernels as tnt
from benchmarks.problem import Problem

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]

# --- what people write ---------------------------------------------------------------------------
# log_softmax in float32, the target masked and renormalised, the gradient by autograd. Both losses
# of a mixed batch are computed on all rows and selected by a mask, as training code commonly does.


def _removed(
    logits: Tensor, labels: Tensor, weights: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(N, V) bool: the label of every row with a negative weight, and the ids; and the rows with any."""
    removed = torch.zeros_like(logits, dtype=torch.bool)
    removed.scatter_(-1, labels[:, None], (weights < 0)[:, None])
    if ids is not None:
        removed.scatter_(-1, ids.expand(len(labels), -1), True)
    return removed, weights < 0 if ids is None else torch.ones_like(weights, dtype=torch.bool)


def _mean(loss: Tensor, negative: Tensor, weights: Tensor) -> Tensor:
    factor = torch.where(weights == 0, 0.0, torch.where(negative, 1.0, weights))
    return (loss * factor).sum() / (weights != 0).sum()


def naive_tnff(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, weights: Tensor, ids: Tensor | None = None
) -> Tensor:
    """KL(q* || p) with q* the reference's distribution without the removed tokens."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    removed, negative = _removed(logits, labels, weights, ids)
    target = F.log_softmax(ref_logits.float(), dim=-1).exp().masked_fill(removed, 0.0)
    target = target / target.sum(-1, keepdim=True)
    loss = F.kl_div(log_p, target, reduction="none").sum(-1)
    return _mean(loss, negative, weights)


def naive_tnrf(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, weights: Tensor, ids: Tensor | None = None
) -> Tensor:
    """KL(p || q~) on rows with removed tokens, which keep a floor of 1e-6, and KL(q || p) on the others."""
    eps = 1e-6
    log_p = F.log_softmax(logits.float(), dim=-1)
    log_q = F.log_softmax(ref_logits.float(), dim=-1)
    removed, negative = _removed(logits, labels, weights, ids)
    target = log_q.exp().masked_fill(removed, 0.0)
    target = target / target.sum(-1, keepdim=True)
    smoothed = (target + eps * removed) / (1 + eps * removed.sum(-1, keepdim=True))
    reverse = (log_p.exp() * (log_p - smoothed.log())).sum(-1)
    forward = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return _mean(torch.where(negative, reverse, forward), negative, weights)


def naive_ul_ll(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, weights: Tensor, ids: Tensor | None = None
) -> Tensor:
    """-log(1 - p_y) on rows with a negative weight, -log p_y on the others."""
    if ids is not None:
        raise ValueError("the naive UL takes the label alone")
    log_p = F.log_softmax(logits.float(), dim=-1).gather(-1, labels[:, None]).squeeze(-1)
    negative = weights < 0
    loss = torch.where(negative, -torch.log1p(-log_p.exp()), -log_p)
    return _mean(loss, negative, weights)


NAIVE: dict[str, Loss] = {"tnff": naive_tnff, "tnrf": naive_tnrf, "ul+ll": naive_ul_ll}


# --- the library, and all of them by name --------------------------------------------------------


def _ours(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    ids: Tensor | None,
    *,
    method: str,
    inplace: bool,
) -> Tensor:
    return tnt.tnt_loss(
        logits, ref_logits, labels, weights, method=method, negative_ids=ids, inplace=inplace
    )


#: "forward" and "naive forward" are called without a gradient.
CONTENDERS = ("in place", "fresh", "forward", "naive", "naive forward", "compiled")


def make_loss(contender: str, method: str) -> Loss:
    if contender in ("in place", "fresh", "forward"):
        return partial(_ours, method=method, inplace=contender == "in place")
    if contender == "compiled":
        return torch.compile(NAIVE[method], fullgraph=True, dynamic=False)
    return NAIVE[method]


class _Model(torch.autograd.Function):
    """Stands for the model before the loss, because only its output can be overwritten, not a leaf."""

    @staticmethod
    def forward(ctx: object, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[None, None]:
        return None, None


def model_output(logits: Tensor) -> Tensor:
    """``logits``, the same memory, as an output that asks for its gradient."""
    output: Tensor = _Model.apply(torch.empty(0, requires_grad=True), logits)  # type: ignore[no-untyped-call]
    return output


#: float16 training multiplies the loss, or the mean's 1/N would underflow in the gradient.
FLOAT16_SCALE = 65536.0


def gradient_scale(problem: Problem) -> float:
    return FLOAT16_SCALE if problem.logits.dtype == torch.float16 else 1.0


def training_step(loss_function: Loss, problem: Problem) -> Tensor:
    """Loss and gradient; returns the gradient."""
    logits = model_output(problem.logits)
    loss = loss_function(
        logits, problem.ref_logits, problem.labels, problem.weights, problem.negative_ids
    )
    scale = gradient_scale(problem)
    upstream = None if scale == 1 else torch.full_like(loss, scale)
    return torch.autograd.grad(loss, logits, upstream)[0]


@torch.no_grad()
def forward(loss_function: Loss, problem: Problem) -> Tensor:
    return loss_function(
        problem.logits, problem.ref_logits, problem.labels, problem.weights, problem.negative_ids
    )
