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
from tnt_kernels.bench.problem import Problem

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]

# --- what people write ---------------------------------------------------------------------------
# log_softmax in float32 (or, ``in_float32=False``, in the logits' dtype), the target masked and
# renormalised, the gradient by autograd. Both losses of a mixed batch are computed on all rows and
# selected by a mask, as training code commonly does.


def _removed(
    logits: Tensor, labels: Tensor, weights: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(N, V) bool: the label of every row with a negative weight, and the ids; and the rows with any."""
    removed = torch.zeros_like(logits, dtype=torch.bool)
    removed.scatter_(-1, labels[:, None], (weights < 0)[:, None])
    if ids is not None:
        removed.scatter_(-1, ids.expand(len(labels), -1), True)
    return removed, weights < 0 if ids is None else torch.ones_like(weights, dtype=torch.bool)


def _log_softmax(logits: Tensor, in_float32: bool) -> Tensor:
    return F.log_softmax(logits.float() if in_float32 else logits, dim=-1)


def _mean(loss: Tensor, negative: Tensor, weights: Tensor) -> Tensor:
    factor = torch.where(weights == 0, 0.0, torch.where(negative, 1.0, weights))
    return (loss * factor).sum() / (weights != 0).sum()


def _reverse_kl(log_p: Tensor, log_q: Tensor, removed: Tensor) -> Tensor:
    eps = 1e-6
    target = log_q.exp().masked_fill(removed, 0.0)
    target = target / target.sum(-1, keepdim=True)
    smoothed = (target + eps * removed) / (1 + eps * removed.sum(-1, keepdim=True))
    return (log_p.exp() * (log_p - smoothed.log())).sum(-1)


def naive_tnff(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    ids: Tensor | None = None,
    *,
    in_float32: bool = True,
) -> Tensor:
    """KL(q* || p) with q* the reference's distribution without the removed tokens."""
    log_p = _log_softmax(logits, in_float32)
    removed, negative = _removed(logits, labels, weights, ids)
    target = _log_softmax(ref_logits, in_float32).exp().masked_fill(removed, 0.0)
    target = target / target.sum(-1, keepdim=True)
    loss = F.kl_div(log_p, target, reduction="none").sum(-1)
    return _mean(loss, negative, weights)


def naive_tnrf(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    ids: Tensor | None = None,
    *,
    in_float32: bool = True,
) -> Tensor:
    """KL(p || q~) on rows with removed tokens, which keep a floor of 1e-6, and KL(q || p) on the others."""
    log_p = _log_softmax(logits, in_float32)
    log_q = _log_softmax(ref_logits, in_float32)
    removed, negative = _removed(logits, labels, weights, ids)
    reverse = _reverse_kl(log_p, log_q, removed)
    forward = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return _mean(torch.where(negative, reverse, forward), negative, weights)


def naive_tnrr(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    ids: Tensor | None = None,
    *,
    in_float32: bool = True,
) -> Tensor:
    """KL(p || q~) on all rows; removed tokens keep a floor of 1e-6."""
    log_p = _log_softmax(logits, in_float32)
    log_q = _log_softmax(ref_logits, in_float32)
    removed, negative = _removed(logits, labels, weights, ids)
    return _mean(_reverse_kl(log_p, log_q, removed), negative, weights)


def naive_ul_ll(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    ids: Tensor | None = None,
    *,
    in_float32: bool = True,
) -> Tensor:
    """-log(1 - p_y) on rows with a negative weight, -log p_y on the others."""
    if ids is not None:
        raise ValueError("the naive UL takes the label alone")
    log_p = _log_softmax(logits, in_float32).gather(-1, labels[:, None]).squeeze(-1)
    negative = weights < 0
    loss = torch.where(negative, -torch.log1p(-log_p.exp()), -log_p)
    return _mean(loss, negative, weights)


NAIVE: dict[str, Callable[..., Tensor]] = {
    "tnff": naive_tnff,
    "tnrr": naive_tnrr,
    "tnrf": naive_tnrf,
    "ul+ll": naive_ul_ll,
}


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
    backend: str | None,
) -> Tensor:
    return tnt.tnt_loss(
        logits,
        ref_logits,
        labels,
        weights,
        method=method,
        negative_ids=ids,
        inplace=inplace,
        backend=backend,
    )


#: "forward" and "naive forward" are called without a gradient; "naive, narrow" computes in the logits' dtype.
CONTENDERS = ("in place", "fresh", "forward", "naive", "naive forward", "naive, narrow", "compiled")


def make_loss(contender: str, method: str, backend: str | None = None) -> Loss:
    """The contender's loss; ``backend`` is the library's, None the one that it selects."""
    if contender in ("in place", "fresh", "forward"):
        return partial(_ours, method=method, inplace=contender == "in place", backend=backend)
    if contender == "compiled":
        return torch.compile(NAIVE[method], fullgraph=True, dynamic=False)
    if contender == "naive, narrow":
        return partial(NAIVE[method], in_float32=False)
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
    parameter = torch.empty(0, device=logits.device, requires_grad=True)
    output: Tensor = _Model.apply(parameter, logits)  # type: ignore[no-untyped-call]
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
