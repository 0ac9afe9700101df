"""The operators on rows, of a whole vocabulary or of a shard: from logits (..., V) to the launch of a backend.

``row_losses`` yields loss and gradient of a batch in one call, ``row_losses_`` writes that gradient over the logits.
``row_gradients`` and ``row_gradients_`` write the gradient later, from what ``row_losses`` saved of every row, with the
upstream factor folded in. Of a shard, each holds its collectives, so that to a compiler it is one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tnt_kernels._call import (
    ROW_COEFFICIENTS,
    ROW_DIAGNOSTICS,
    Kind,
    LossCall,
    RowCall,
    Shard,
    as_rows,
    real_dtype,
)
from tnt_kernels._rows.layout import check_no_overlap
from tnt_kernels._rows.schema import nothing, operator
from tnt_kernels._sharded.agreement import Facts, agree, facts_of
from tnt_kernels._sharded.losses import later_gradient, new_saved, write_losses
from tnt_kernels.backends import BACKENDS


def _new_gradient(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def new_losses(logits: Tensor, call: LossCall) -> tuple[Tensor, Tensor | None]:
    """Loss and, if they are wanted, diagnostics, with any values."""
    none, real = call.scalars.reduction == "none", real_dtype(logits)
    loss = logits.new_empty(logits.shape[:-1] if none else (), dtype=real)
    if not call.diagnostics:
        return loss, None
    return loss, logits.new_empty((ROW_DIAGNOSTICS, *logits.shape[:-1]), dtype=real)


def _new_outputs(logits: Tensor, call: LossCall, now: bool, later: bool) -> list[Tensor]:
    loss, diagnostics = new_losses(logits, call)
    outputs = [loss] if diagnostics is None else [loss, diagnostics]
    if now:
        outputs.append(torch.empty_like(logits, memory_format=torch.contiguous_format))
    elif later and call.shard is not None:
        outputs.extend(new_saved(logits, call, call.shard))
    elif later:
        shape = (call.tensors.labels.size(0), ROW_COEFFICIENTS)
        outputs.append(loss.new_empty(shape))
    return outputs


@operator(_new_outputs)
def row_losses(logits: Tensor, call: LossCall, now: bool, later: bool) -> list[Tensor]:
    """[loss], diagnostics if they are wanted, and the gradient ``now`` or what a ``later`` one needs, or neither."""
    whole = call.shard is None
    outputs = _new_outputs(logits, call, now, later and whole)
    diagnostics = outputs[1] if call.diagnostics else None
    gradient, coefficients = outputs[-1] if now else None, outputs[-1] if later and whole else None
    if call.shard is not None:
        _agree(logits, call, call.shard)
    saved = write_rows(logits, call, outputs[0], diagnostics, gradient, coefficients)
    return [*outputs, *saved] if later else outputs


@operator(nothing, overwrites=("logits", "loss", "row_diagnostics"))
def row_losses_(
    logits: Tensor, call: LossCall, loss: Tensor, row_diagnostics: Tensor | None
) -> None:
    """Writes to what ``new_losses`` made; the gradient lies where the logits were."""
    if call.shard is not None:
        _agree(logits, call, call.shard)
    write_rows(logits, call, loss, row_diagnostics, logits)


def _agree(logits: Tensor, call: LossCall, shard: Shard) -> None:
    def facts() -> Facts:
        return facts_of("tnt_loss", "logits", logits.dtype, call, {})

    agree(shard, logits.size(-1), logits.device, facts)


def write_rows(
    logits: Tensor,
    call: LossCall,
    loss: Tensor,
    diagnostics: Tensor | None,
    gradient: Tensor | None,
    coefficients: Tensor | None = None,
    upstream: Tensor | None = None,
    differences: bool = False,
) -> list[Tensor]:
    """Writes what is given, as ``RowCall`` has it; the gradient may lie over the logits or elsewhere.

    Ranks of a sharded vocabulary have agreed. Returns what a later gradient of theirs needs.
    """
    if call.shard is not None:
        return write_losses(
            logits, call, call.shard, loss, diagnostics, gradient, upstream, differences
        )
    rows = as_rows(logits)
    if gradient is logits:
        check_no_overlap(rows, call.tensors.ref_logits)
        gradient = rows
    elif gradient is not None:
        gradient = as_rows(gradient)
    BACKENDS[call.backend].launch(
        RowCall(
            Kind.FUSED, rows, call.tensors, call.scalars, 0, rows.size(1),
            loss, diagnostics, coefficients, gradient, upstream, differences=differences,
        )
    )  # fmt: skip
    return []


def _backward(logits: Tensor, call: LossCall, saved: list[Tensor], upstream: Tensor) -> RowCall:
    """The launch that writes the gradient, without ``gradient`` as yet."""
    upstream = upstream.reshape(-1)
    if call.shard is not None:
        return later_gradient(logits, call, call.shard, saved, upstream)
    (coefficients,), rows = saved, as_rows(logits)
    return RowCall(
        Kind.BACKWARD, rows, call.tensors, call.scalars, 0, rows.size(1),
        coefficients=coefficients, upstream=upstream,
    )  # fmt: skip


@operator(_new_gradient)
def row_gradients(logits: Tensor, call: LossCall, saved: list[Tensor], upstream: Tensor) -> Tensor:
    gradient = _new_gradient(logits)
    launch = _backward(logits, call, saved, upstream)
    BACKENDS[call.backend].launch(launch._replace(gradient=as_rows(gradient)))
    return gradient


@operator(nothing, overwrites=("logits",))
def row_gradients_(logits: Tensor, call: LossCall, saved: list[Tensor], upstream: Tensor) -> None:
    """The gradient lies where the logits were."""
    launch = _backward(logits, call, saved, upstream)
    check_no_overlap(launch.logits, launch.tensors.ref_logits)
    BACKENDS[call.backend].launch(launch._replace(gradient=launch.logits))
