"""The autograd function around the operators: what is kept for backward, and when the gradient is written."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tnt_kernels import _linear_ops, _shards
from tnt_kernels._groups import Shard
from tnt_kernels._linear_chunks import LinearScalars
from tnt_kernels._ops import RowTensors
from tnt_kernels.backends import BACKENDS
from tnt_kernels.backends.call import Scalars


def _keeps_graph() -> bool:
    """Whether the backward under way may come again (``retain_graph=True``)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


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
    """Loss and row statistics of logits that need a gradient.

    The gradient of "mean" and "sum" is written in forward, while the logits are at hand, and neither logits nor
    reference are kept. It is written in backward instead, from a few numbers a row and the two logits, where forward
    cannot know it well: under "none" (every row has its upstream gradient) and for float16 (the mean's 1/N would
    underflow before a GradScaler's factor arrives). Those numbers are ``ROW_COEFFICIENTS`` or, of a sharded vocabulary,
    all shards' statistics and the totals: backward needs no collective.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tensors: RowTensors,
        scalars: Scalars,
        shard: Shard | None,
        inplace: bool,
        with_stats: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.scalars, ctx.shard, ctx.inplace, ctx.spent = scalars, shard, inplace, False
        ctx.deferred = scalars.reduction == "none" or logits.dtype == torch.float16
        if ctx.deferred:
            loss, *more = _shards.losses(logits, tensors, scalars, shard, False, with_stats, True)
            kept = more[with_stats:]
            ctx.save_for_backward(logits, *_savable(*tensors), *kept)
        elif inplace:
            loss, stats = _shards.losses_(logits, tensors, scalars, shard, with_stats)
            # A mutable schema leaves the counter as it was, for a compiler that traces this too. With it, autograd
            # raises where another operation had saved these logits for its own backward.
            torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(logits)
            more = [stats]
        else:
            loss, gradient, *more = _shards.losses(
                logits, tensors, scalars, shard, True, with_stats, False
            )
            ctx.save_for_backward(gradient)
        if not with_stats:
            return cast(Tensor, loss)
        ctx.mark_non_differentiable(*more)
        ctx.set_materialize_grads(False)
        return loss, more[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        # Gradients are enabled here under create_graph=True alone, which needs the wrapper that refuses a second one
        # (it costs 4 µs).
        backward = _backward_once if torch.is_grad_enabled() else _backward
        return backward(ctx, upstream)


def _backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 6
    if ctx.inplace:
        if ctx.spent:
            raise RuntimeError(
                "tnt_loss: a second backward through a loss with inplace=True, whose logits the first one "
                "overwrote; use inplace=False"
            )
        ctx.spent = True
    if ctx.deferred:
        logits, *saved = ctx.saved_tensors
        last = len(RowTensors._fields)
        tensors, kept = RowTensors._make(saved[:last]), saved[last:]
        arguments = (logits.detach(), tensors, ctx.scalars, ctx.shard, *kept, upstream)
        # A compiled backward may not write over what forward saved: the same tensor may be saved for another operation.
        if ctx.inplace and not torch.compiler.is_compiling():
            _shards.gradients_(*arguments)
            torch.autograd.graph.increment_version(logits)
            gradient = logits.detach()
        else:
            gradient = _shards.gradients(*arguments)
    else:
        (gradient,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            gradient = gradient * upstream  # fused by the compiler with what follows
        else:
            gradient = gradient.clone() if _keeps_graph() else gradient.detach()
            BACKENDS[ctx.scalars.backend].scale_(gradient, upstream)
    return gradient, None, None, None, None, None


_backward_once = once_differentiable(_backward)


class LinearTNTLossFunction(torch.autograd.Function):
    """Keeps the gradients for backward, or under "none" the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rest: tuple[Tensor | None, ...],
        linear: LinearScalars,
        scalars: Scalars,
        shard: Shard | None,
        with_stats: bool,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.scalars, ctx.wanted, ctx.dtype = scalars, wanted, hidden.dtype
        ctx.settings = (*linear, *scalars, *(shard or (None, None)))
        ctx.recompute = scalars.reduction == "none"
        tensors = (hidden, weight, bias, *rest)
        now = (False, False, False) if ctx.recompute else wanted
        loss, *more = _linear_ops.linear_losses(*tensors, *ctx.settings, with_stats, *now)
        if ctx.recompute:
            ctx.save_for_backward(*_savable(*tensors))
        else:
            ctx.save_for_backward(*more[with_stats:])
        if not with_stats:
            return cast(Tensor, loss)
        ctx.mark_non_differentiable(more[0])
        ctx.set_materialize_grads(False)
        return loss, more[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 9
        if ctx.recompute:
            gradients = _linear_ops.linear_gradients(
                *ctx.saved_tensors, *ctx.settings, upstream, *ctx.wanted
            )
        elif torch.compiler.is_compiling():
            gradients = [gradient * upstream for gradient in ctx.saved_tensors]
        else:
            keep = _keeps_graph()
            gradients = [x.clone() if keep else x.detach() for x in ctx.saved_tensors]
            for gradient in gradients:
                BACKENDS[ctx.scalars.backend].scale_(gradient, upstream)
        found = iter(gradients)
        mine = [next(found).to(ctx.dtype) if want else None for want in ctx.wanted]
        return *mine, None, None, None, None, None, None
