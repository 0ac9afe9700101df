"""Logits whose vocabulary is sharded over a process group: a loss from three launches and two small all-gathers.

Each operator holds its collectives, so that to a compiler it is one call. What travels is summed or merged in rank
order, by the same instructions everywhere, so that all ranks have the same loss to the last bit and p = q stays exactly
0. What the ranks must agree on beforehand, and how one that fails tells the others, is in ``_groups``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tnt_kernels import _ops
from tnt_kernels._groups import (
    Place,
    Shard,
    all_gather,
    facts_of,
    group_rank,
    group_size,
    join_as_failed,
    place,
    raise_for_others,
    settle,
)
from tnt_kernels._ops import SCALARS, TENSORS, RowTensors
from tnt_kernels.backends.call import (
    ROW_PARTS,
    ROW_STATISTICS,
    Scalars,
    gradient_needs_totals,
    loss_needs_totals,
    real_dtype,
)

_SHARD = "str group, SymInt[]? shard_sizes"
_library = torch.library.Library("tnt_kernels", "FRAGMENT")
for _schema in (
    f"sharded_losses(Tensor logits, {TENSORS}, {SCALARS}, {_SHARD}, bool with_gradient, bool with_stats, "
    "bool with_statistics) -> Tensor[]",
    f"sharded_losses_(Tensor(a!) logits, {TENSORS}, {SCALARS}, {_SHARD}, bool with_stats) "
    "-> (Tensor loss, Tensor stats)",
    f"sharded_gradients(Tensor logits, {TENSORS}, {SCALARS}, {_SHARD}, Tensor gathered, Tensor totals, "
    "Tensor upstream) -> Tensor",
    f"sharded_gradients_(Tensor(a!) logits, {TENSORS}, {SCALARS}, {_SHARD}, Tensor gathered, Tensor totals, "
    "Tensor upstream) -> ()",
):
    _library.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))

_SHARD_AT = _ops.LAST_SCALAR
_REST_AT = _SHARD_AT + len(Shard._fields)


def _split(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], Scalars, Shard]:
    return (
        arguments[: _ops.LAST_TENSOR],
        Scalars._make(arguments[_ops.LAST_TENSOR : _ops.LAST_SCALAR]),
        Shard._make(arguments[_SHARD_AT:_REST_AT]),
    )


def _launch(
    logits: Tensor, arguments: tuple[Any, ...], where: Place, **outputs: Tensor | None
) -> None:
    tensors, scalars, _ = _split(arguments)
    _ops.launch(
        logits,
        tensors,
        scalars,
        vocab_offset=where.offset,
        vocab_size=where.vocab_size,
        **outputs,
    )


def _compute(
    logits: Tensor,
    arguments: tuple[Any, ...],
    loss: Tensor,
    stats: Tensor | None,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Writes what is given; returns all shards' statistics, each with its header row, and the totals.

    The ranks have agreed. One that raises all the same, in its first launch, says so by NaN in its header row: on a CPU
    every rank reads the headers; on a device, where reading would wait for it, the NaN reaches the loss.
    """
    _, scalars, shard = _split(arguments)
    n, vocab, device = arguments[1].numel(), logits.size(-1), logits.device
    packed = logits.new_empty((n + 1, ROW_STATISTICS), dtype=real_dtype(logits))
    parts = packed.new_empty((n, ROW_PARTS))
    try:
        where = place(shard, vocab)
        if gradient is logits:
            _ops.check_apart(logits, arguments[0])
        _launch(logits, arguments, where, statistics=packed[:n], stats=stats)
    except Exception:
        join_as_failed(shard, logits, twice=loss_needs_totals(scalars))
        raise
    packed[n] = vocab
    gathered = all_gather(packed, shard.group)
    if device.type == "cpu":
        raise_for_others(gathered[:, n, 0].tolist(), group_rank(shard.group))
    rows, late = gathered[:, :n], gradient_needs_totals(scalars)
    now, later = (None, gradient) if late else (gradient, None)
    totals = torch.zeros_like(parts)
    if loss_needs_totals(scalars) or now is not None:
        _launch(logits, arguments, where, gathered=rows, parts=parts, gradient=now)
    if loss_needs_totals(scalars):
        for part in all_gather(parts, shard.group):
            totals += part
    outputs = {"loss": loss, "stats": stats, "gradient": later}
    _launch(logits, arguments, where, gathered=rows, totals=totals, **outputs)
    return gathered, totals


def _new_losses(logits: Tensor, *arguments: Any) -> list[Tensor]:
    *_, with_statistics = arguments
    outputs = _ops.new_row_losses(logits, *arguments[:_SHARD_AT], *arguments[_REST_AT:-1], False)
    if with_statistics:  # for tracing alone: their size is that of the group
        dtype, n = real_dtype(logits), arguments[1].numel()
        shards = group_size(arguments[_SHARD_AT])
        outputs.append(logits.new_empty((shards, n + 1, ROW_STATISTICS), dtype=dtype))
        outputs.append(logits.new_empty((n, ROW_PARTS), dtype=dtype))
    return outputs


def _settle(logits: Tensor, arguments: tuple[Any, ...]) -> None:
    tensors, scalars, shard = _split(arguments)
    settle(
        shard,
        logits.size(-1),
        logits.device,
        lambda: facts_of(
            "tnt_loss", "logits", logits.dtype, RowTensors._make(tensors), scalars, {}
        ),
    )


def _losses(logits: Tensor, *arguments: Any) -> list[Tensor]:
    """[loss], then what was asked for of [gradient, stats, statistics of all shards and totals]."""
    _settle(logits, arguments)
    return _settled_losses(logits, *arguments)


def _settled_losses(logits: Tensor, *arguments: Any) -> list[Tensor]:
    with_gradient, with_stats, with_statistics = arguments[_REST_AT:]
    outputs = _ops.new_row_losses(logits, *arguments[:_SHARD_AT], with_gradient, with_stats, False)
    stats = outputs[-1] if with_stats else None
    kept = _compute(logits, arguments, outputs[0], stats, outputs[1] if with_gradient else None)
    return [*outputs, *kept] if with_statistics else outputs


def _new_losses_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _ops.new_row_losses_(logits, *arguments[:_SHARD_AT], *arguments[_REST_AT:])


def _losses_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss and stats (empty unless asked for); the gradient lies where the logits were."""
    _settle(logits, arguments)
    return _settled_losses_into(logits, logits, *arguments)


def _settled_losses_into(
    gradient: Tensor, logits: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    loss, stats = _new_losses_(logits, *arguments)
    _compute(logits, arguments, loss, stats if arguments[_REST_AT] else None, gradient)
    return loss, stats


def _write_gradient(logits: Tensor, arguments: tuple[Any, ...], gradient: Tensor) -> None:
    _, _, shard = _split(arguments)
    gathered, totals, upstream = arguments[_REST_AT:]
    outputs = {"totals": totals, "gradient": gradient, "upstream": upstream}
    where = place(shard, logits.size(-1))
    _launch(logits, arguments, where, gathered=gathered[:, : len(totals)], **outputs)


def _gradients(logits: Tensor, *arguments: Any) -> Tensor:
    gradient = _ops.new_gradient(logits)
    _write_gradient(logits, arguments, gradient)
    return gradient


def _gradients_(logits: Tensor, *arguments: Any) -> None:
    _write_gradient(logits, arguments, logits)


for _name, _implementation, _fake in (
    ("sharded_losses", _losses, _new_losses),
    ("sharded_losses_", _losses_, _new_losses_),
    ("sharded_gradients", _gradients, lambda logits, *_: _ops.new_gradient(logits)),
    ("sharded_gradients_", _gradients_, lambda *_: None),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tnt_kernels::{_name}", _fake, lib=_library)

sharded_losses = torch.ops.tnt_kernels.sharded_losses.default
sharded_losses_ = torch.ops.tnt_kernels.sharded_losses_.default
sharded_gradients = torch.ops.tnt_kernels.sharded_gradients.default
sharded_gradients_ = torch.ops.tnt_kernels.sharded_gradients_.default


def losses(
    logits: Tensor, tensors: RowTensors, scalars: Scalars, shard: Shard | None, *wanted: bool
) -> Any:
    """``row_losses``, of logits that are a shard or whole."""
    if shard is None:
        return _ops.row_losses(logits, *tensors, *scalars, *wanted)
    return sharded_losses(logits, *tensors, *scalars, *shard, *wanted)


def losses_(
    logits: Tensor, tensors: RowTensors, scalars: Scalars, shard: Shard | None, with_stats: bool
) -> Any:
    """``row_losses_``, of logits that are a shard or whole."""
    if shard is None:
        return _ops.row_losses_(logits, *tensors, *scalars, with_stats)
    return sharded_losses_(logits, *tensors, *scalars, *shard, with_stats)


def chunk_losses(
    logits: Tensor, tensors: RowTensors, scalars: Scalars, shard: Shard | None, with_stats: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss and stats of some rows of a call whose ranks have agreed; without gradient."""
    if shard is None:
        loss, *more = _ops.row_losses(logits, *tensors, *scalars, False, with_stats, False)
    else:
        arguments = (*tensors, *scalars, *shard, False, with_stats, False)
        loss, *more = _settled_losses(logits, *arguments)
    return loss, more[0] if with_stats else None


def chunk_losses_into(
    gradient: Tensor,
    logits: Tensor,
    tensors: RowTensors,
    scalars: Scalars,
    shard: Shard | None,
    with_stats: bool,
) -> tuple[Tensor, Tensor | None]:
    """As ``chunk_losses``, with a gradient, over the logits or elsewhere, perhaps in bfloat16."""
    if shard is None:
        loss, stats = _ops.row_losses_into(gradient, logits, *tensors, *scalars, with_stats)
    else:
        arguments = (*tensors, *scalars, *shard, with_stats)
        loss, stats = _settled_losses_into(gradient, logits, *arguments)
    return loss, stats if with_stats else None


def gradients(
    logits: Tensor, tensors: RowTensors, scalars: Scalars, shard: Shard | None, *rest: Tensor
) -> Any:
    """``row_gradients``; ``rest`` is what its forward kept, and the upstream factor."""
    if shard is None:
        return _ops.row_gradients(logits, *tensors, *scalars, *rest)
    return sharded_gradients(logits, *tensors, *scalars, *shard, *rest)


def gradients_(
    logits: Tensor, tensors: RowTensors, scalars: Scalars, shard: Shard | None, *rest: Tensor
) -> None:
    """``row_gradients_``; ``rest`` as for ``gradients``."""
    if shard is None:
        _ops.row_gradients_(logits, *tensors, *scalars, *rest)
    else:
        sharded_gradients_(logits, *tensors, *scalars, *shard, *rest)
