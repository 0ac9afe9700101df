"""A loss over a sharded vocabulary: three launches, with a small all-gather behind each of the first two.

What travels is summed or merged in an order that the ranks alone decide, by the same instructions everywhere, so that
all ranks have the same loss to the last bit and p = q stays exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnt_kernels._call import (
    ROW_PARTIAL_SUMS,
    ROW_STATISTICS,
    Kind,
    LossCall,
    RowCall,
    Shard,
    as_rows,
    real_dtype,
)
from tnt_kernels._rows.layout import check_no_overlap
from tnt_kernels._sharded.agreement import columns_of, join_as_failed, raise_if_another_failed
from tnt_kernels._sharded.collectives import all_gather, group_rank, group_size
from tnt_kernels.backends import BACKENDS


def new_saved(logits: Tensor, call: LossCall, shard: Shard) -> list[Tensor]:
    """What a later gradient needs: all shards' statistics, each with its header row, and the total sums."""
    n, real, ranks = call.tensors.labels.size(0), real_dtype(logits), group_size(shard.group)
    return [
        logits.new_empty((ranks, n + 1, ROW_STATISTICS), dtype=real),
        logits.new_empty((n, ROW_PARTIAL_SUMS), dtype=real),
    ]


def write_losses(
    logits: Tensor,
    call: LossCall,
    shard: Shard,
    loss: Tensor,
    diagnostics: Tensor | None,
    gradient: Tensor | None,
    upstream: Tensor | None = None,
    differences: bool = False,
) -> list[Tensor]:
    """Writes what is given, of ranks that have agreed; returns what a later gradient needs, as ``new_saved`` has it.

    A rank that raises all the same, in its first launch, puts NaN into its header row: on a CPU every rank reads the
    headers; on a device, where reading would wait for it, the NaN reaches the loss.
    """
    n, scalars = len(call.tensors.labels), call.scalars
    packed = logits.new_empty((n + 1, ROW_STATISTICS), dtype=real_dtype(logits))
    partial_sums = packed.new_empty((n, ROW_PARTIAL_SUMS))
    run, totals = BACKENDS[call.backend].launch, scalars.loss_needs_totals
    try:
        launch = _launch(Kind.STATISTICS, logits, call, shard, differences)
        if gradient is logits:
            check_no_overlap(launch.logits, launch.tensors.ref_logits)
        run(launch._replace(statistics=packed[:n], diagnostics=diagnostics))
    except Exception:
        join_as_failed(shard, logits, twice=totals)
        raise
    packed[n] = logits.size(-1)
    all_statistics = all_gather(packed, shard.group)
    if logits.device.type == "cpu":
        raise_if_another_failed(all_statistics[:, n, 0].tolist(), group_rank(shard.group))
    launch = launch._replace(gathered=all_statistics[:, :n], upstream=upstream)
    if gradient is not None:
        gradient = as_rows(gradient)
    late = scalars.gradient_needs_totals
    now, later = (None, gradient) if late else (gradient, None)
    total_sums = torch.zeros_like(partial_sums)
    if totals or now is not None:
        run(launch._replace(kind=Kind.PARTIAL_SUMS, partial_sums=partial_sums, gradient=now))
    if totals:
        for part in all_gather(partial_sums, shard.group):
            total_sums += part
    launch = launch._replace(kind=Kind.FINISH, total_sums=total_sums)
    run(launch._replace(loss=loss, diagnostics=diagnostics, gradient=later))
    return [all_statistics, total_sums]


def later_gradient(
    logits: Tensor, call: LossCall, shard: Shard, saved: list[Tensor], upstream: Tensor
) -> RowCall:
    """The launch that writes it, without ``gradient`` as yet; it needs no collective."""
    all_statistics, total_sums = saved
    launch = _launch(Kind.FINISH, logits, call, shard)
    gathered = all_statistics[:, : len(total_sums)]
    return launch._replace(gathered=gathered, total_sums=total_sums, upstream=upstream)


def _launch(
    kind: Kind, logits: Tensor, call: LossCall, shard: Shard, differences: bool = False
) -> RowCall:
    columns, rows = columns_of(shard, logits.size(-1)), as_rows(logits)
    return RowCall(
        kind, rows, call.tensors, call.scalars, columns.offset, columns.vocab_size,
        differences=differences,
    )  # fmt: skip
