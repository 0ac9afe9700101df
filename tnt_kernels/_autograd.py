"""The autograd functions around the operators: what is kept for backward, and when the gradient is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tnt_kernels._call import LossCall, RowTensors
from tnt_kernels._linear.operators import WantedGradients, linear_gradients, linear_losses
from tnt_kernels._linear.plan import LinearScalars, LinearTensors
from tnt_kernels._operators import (
    new_losses,
    row_gradients,
    row_gradients_,
    row_losses,
    row_losses_,
)
from tnt_kernels.backends import BACKENDS

#: Whether the backward under way may come again (``retain_graph=True``).
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def _savable(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As ``save_for_backward`` takes them: it refuses those that were made in ``torch.inference_mode()``, because it
    could not notice that they are written to. Nobody can write to them out of that mode, and none needs a gradient: the
    same memory under another tensor is kept. (A compiler keeps tensors itself, and refuses these.)
    """
    if torch.compiler.is_compiling():
        return tensors
    return tuple(x if x is None or not x.is_inference() else _alias(x) for x in tensors)


def _alias(x: Tensor) -> Tensor:
    """Not a view, which would be what its base is."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


class TNTLossFunction(torch.autograd.Function):
    """Loss and diagnostics of logits that need a gradient.

    The gradient of "mean" and "sum" is written in forward, while the logits are at hand, and neither logits nor
    reference are kept. It is written in backward instead, from a few numbers a row and the two logits, where forward
    cannot know it well: under "none" (every row has its upstream gradient) and for float16 (the mean's 1/N would
    underflow before a GradScaler's factor arrives). Those numbers are the rows' coefficients or, of a sharded
    vocabulary, all shards' statistics and the total sums: backward needs no collective.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: LossCall) -> tuple[Tensor, ...]:
        deferred = call.scalars.reduction == "none" or logits.dtype is torch.float16
        if call.inplace and not deferred:
            loss, diagnostics = new_losses(logits, call)
            row_losses_.on(logits)(logits, call, loss, diagnostics)
            # A mutable schema leaves the counter as it was, for a compiler that traces this too. With it, autograd
            # raises where another operation had saved these logits for its own backward.
            torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(logits)
        else:
            outputs = row_losses.on(logits)(logits, call, not deferred, deferred)
            loss, diagnostics = outputs[0], outputs[1] if call.diagnostics else None
            if deferred:
                saved = outputs[1 + call.diagnostics :]
                ctx.save_for_backward(logits, *_savable(*call.tensors), *saved)
                ctx.scalars, ctx.shard = call.scalars, call.shard
            else:
                ctx.save_for_backward(outputs[-1])
        # Not the call itself, which would keep the reference's logits in memory.
        ctx.backend, ctx.inplace, ctx.deferred = call.backend, call.inplace, deferred
        if diagnostics is None:
            return (loss,)
        ctx.mark_non_differentiable(diagnostics)
        ctx.set_materialize_grads(False)
        return loss, diagnostics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        # Gradients are enabled here under create_graph=True alone, which needs the wrapper that refuses a second one
        # (it costs 4 µs).
        gradient = _gradient_once if torch.is_grad_enabled() else _gradient
        return gradient(ctx, upstream), None


def _gradient(ctx: Any, upstream: Tensor | None) -> Tensor | None:
    if upstream is None:
        return None
    if ctx.inplace:
        if hasattr(ctx, "spent"):
            raise RuntimeError(
                "tnt_loss: a second backward through a loss with inplace=True, whose logits the first one "
                "overwrote; use inplace=False"
            )
        ctx.spent = True
    if ctx.deferred:
        return _deferred_gradient(ctx, upstream)
    gradient: Tensor
    (gradient,) = ctx.saved_tensors
    if torch.compiler.is_compiling():
        return gradient * upstream  # fused by the compiler with what follows
    if _keeps_graph():
        gradient = gradient.clone()
    elif ctx.inplace:
        gradient = gradient.detach()  # of the logits, where it lies
    BACKENDS[ctx.backend].scale_(gradient, upstream)
    return gradient


_gradient_once = once_differentiable(_gradient)


def _deferred_gradient(ctx: Any, upstream: Tensor) -> Tensor:
    saved, *rest = ctx.saved_tensors
    count = len(RowTensors._fields)
    tensors = RowTensors(*rest[:count])
    call = LossCall(tensors, ctx.scalars, ctx.backend, ctx.inplace, False, ctx.shard)
    logits: Tensor = saved.detach()
    # A compiled backward may not write over what forward saved: the same tensor may be saved for another operation.
    if not ctx.inplace or torch.compiler.is_compiling():
        return row_gradients.on(logits)(logits, call, rest[count:], upstream)
    row_gradients_.on(logits)(logits, call, rest[count:], upstream)
    torch.autograd.graph.increment_version(saved)
    return logits


class LinearTNTLossFunction(torch.autograd.Function):
    """Keeps the gradients for backward, or under "none" the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference: tuple[Tensor | None, Tensor | None, Tensor | None],
        linear: LinearScalars,
        call: LossCall,
        wanted: WantedGradients,
    ) -> tuple[Tensor, ...]:
        tensors = LinearTensors(hidden, weight, bias, *reference)
        ctx.linear, ctx.scalars = linear, call.scalars
        ctx.backend, ctx.shard = call.backend, call.shard
        ctx.wanted, ctx.dtype = wanted, hidden.dtype
        ctx.recompute = call.scalars.reduction == "none"
        now = WantedGradients(False, False, False) if ctx.recompute else wanted
        loss, *more = linear_losses(tensors, linear, call, now)
        if ctx.recompute:
            ctx.save_for_backward(*_savable(*tensors, *call.tensors))
        else:
            ctx.save_for_backward(*more[call.diagnostics :])
        if not call.diagnostics:
            return (loss,)
        ctx.mark_non_differentiable(more[0])
        ctx.set_materialize_grads(False)
        return loss, more[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        if ctx.recompute:
            count, saved = len(LinearTensors._fields), ctx.saved_tensors
            tensors = LinearTensors(*saved[:count])
            rows = RowTensors(*saved[count:])
            call = LossCall(rows, ctx.scalars, ctx.backend, False, False, ctx.shard)
            gradients = linear_gradients(tensors, ctx.linear, call, upstream, ctx.wanted)
        elif torch.compiler.is_compiling():
            gradients = [gradient * upstream for gradient in ctx.saved_tensors]
        else:
            keep = _keeps_graph()
            gradients = [x.clone() if keep else x.detach() for x in ctx.saved_tensors]
            for gradient in gradients:
                BACKENDS[ctx.backend].scale_(gradient, upstream)
        found = iter(gradients)
        mine = [next(found).to(ctx.dtype) if want else None for want in ctx.wanted]
        return *mine, None, None, None, None
