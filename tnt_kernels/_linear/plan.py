"""Which rows of ``linear_tnt_loss`` are computed, and in which order; what a call is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tnt_kernels._call import RowTensors, active_rows, negative_rows
from tnt_kernels._scalars import Scalars


class LinearTensors(NamedTuple):
    """What both models multiply. V is the vocabulary, which the parameters may exceed."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (>= V, H)
    bias: Tensor | None  # (>= V,)
    ref_hidden: Tensor | None  # (..., H_ref)
    ref_weight: Tensor | None  # (>= V, H_ref)
    ref_bias: Tensor | None  # (>= V,)


class LinearScalars(NamedTuple):
    """What models put between hidden states and logits, and how these are computed."""

    softcap: float | None
    ref_softcap: float | None
    logit_scale: float
    ref_logit_scale: float
    vocab_size: int
    chunk_size: int | None  # rows; None: what fits into the budget
    max_active_rows: int | None  # None: as many as there are
    #: whether a pair of logits is held in 16 bits: the reference's, and the difference
    rounds_pairs: bool


def flat_hidden(t: LinearTensors) -> LinearTensors:
    """(..., H) as (N, H)."""
    ref_hidden = t.ref_hidden
    if ref_hidden is not None:
        ref_hidden = ref_hidden.reshape(-1, ref_hidden.size(-1))
    return t._replace(hidden=t.hidden.reshape(-1, t.hidden.size(-1)), ref_hidden=ref_hidden)


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether these parameters are one in memory, though perhaps padded to different lengths."""
    if a is None or b is None:
        return a is b
    return _place(a) == _place(b)


def _place(x: Tensor) -> tuple[object, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), x.dtype, x.stride()


def shares_head(t: LinearTensors, linear: LinearScalars) -> bool:
    """Whether both models' logits are one linear function of their hidden states, but for a constant.

    The difference of the logits is then that function of the difference of the hidden states, with all its digits.
    """
    return (
        is_same(t.weight, t.ref_weight)
        and is_same(t.bias, t.ref_bias)
        and linear.softcap is None
        and linear.ref_softcap is None
        and linear.logit_scale == linear.ref_logit_scale
    )


class RowGroup(NamedTuple):
    """Rows ``begin`` to ``end`` of a plan, which are computed alike."""

    begin: int
    end: int
    reads_reference: bool


class Plan(NamedTuple):
    """The rows to compute, those that read the reference before the others."""

    order: Tensor | None  # (n,) int64, their indices; None: all, as they stand
    groups: list[RowGroup]
    all_active: bool
    active: Tensor  # () int64, how many rows are, on the device

    @property
    def rows(self) -> int:
        return sum(group.end - group.begin for group in self.groups)

    def chunks(self, size: int) -> list[RowGroup]:
        """``size`` rows at a time."""
        return [
            RowGroup(i, min(i + size, group.end), group.reads_reference)
            for group in self.groups
            for i in range(group.begin, group.end, size)
        ]


def make_plan(rows: RowTensors, s: Scalars, max_active_rows: int | None) -> Plan:
    """The numbers of rows sit on the device: to ask for them, once and before any matmul, is the one place where a GPU
    is waited for. With ``max_active_rows`` they are not asked for, and that many rows are taken, active ones first, all
    with their reference.
    """
    active = active_rows(rows.labels, rows.weights, s.ignore_index)
    total, count = len(active), active.sum()
    positive, negative = (side.reads_reference for side in s.sides)
    if max_active_rows is not None:
        most = min(max_active_rows, total)
        index = None if most == total else (~active).to(torch.int8).argsort(stable=True)[:most]
        groups = [RowGroup(0, most, positive or negative)]
        return Plan(index, groups if most else [], False, count)
    reads = None
    if positive != negative:
        is_negative = negative_rows(rows.labels, rows.weights, rows.negative_ids)
        reads = active & (is_negative if negative else ~is_negative)
        found, reading = torch.stack((count, reads.sum())).tolist()
    else:
        found = int(count)
        reading = found if positive else 0
    index = None
    if found < total or 0 < reading < found:
        # 0: reads the reference, 1: does not, 2: nothing to do
        kind = torch.where(active, 0 if reads is None else (~reads).to(torch.int8), 2)
        index = kind.argsort(stable=True)[:found]
    groups = [RowGroup(0, reading, True), RowGroup(reading, found, False)]
    return Plan(index, [x for x in groups if x.end > x.begin], True, count)


class OrderedRows(NamedTuple):
    """What a call has of its rows, as a plan has them: the tensors themselves where it has all as they stand."""

    hidden: Tensor  # (n, H)
    #: (n, H) or (n, H_ref), or less where the last rows read no reference
    ref_hidden: Tensor | None
    tensors: RowTensors
    upstream: Tensor | None  # (n,) or (1,)


def per_row(x: Tensor | None, at: Tensor | slice) -> Tensor | None:
    """Of (N,), the rows ``at``; of (1,), which holds for all rows, that."""
    return x if x is None or len(x) == 1 else x[at]


def rows_at(rows: RowTensors, at: Tensor | slice) -> RowTensors:
    """The tensors of these rows, without the reference's logits and the normaliser."""
    weights, ids = rows.weights, rows.negative_ids
    return RowTensors(
        None,
        rows.labels[at],
        None if weights is None else weights[at],
        per_row(rows.alpha, at),
        ids if ids is None or ids.dim() == 1 else ids[at],
        None,
    )


def in_order(
    plan: Plan,
    t: LinearTensors,
    rows: RowTensors,
    ignore_index: int,
    upstream: Tensor | None,
    masks: bool,
) -> OrderedRows:
    """``masks``: hidden states of inactive rows are to be 0, because a sum over rows has 0 · NaN of these."""
    index, hidden, ref_hidden = plan.order, t.hidden, t.ref_hidden
    if index is not None:
        hidden, rows, upstream = hidden[index], rows_at(rows, index), per_row(upstream, index)
        if ref_hidden is not None:
            reading = max((x.end for x in plan.groups if x.reads_reference), default=0)
            ref_hidden = ref_hidden[index[:reading]]
    if masks and not plan.all_active:
        inactive = ~active_rows(rows.labels, rows.weights, ignore_index)
        hidden = hidden.masked_fill(inactive[:, None], 0.0)
    return OrderedRows(hidden, ref_hidden, rows, upstream)
