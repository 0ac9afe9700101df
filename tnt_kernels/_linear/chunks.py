"""Hidden states to losses and gradients, a chunk of rows at a time: what ``_linear.operators`` do.

A chunk is multiplied out, the loss turns its logits into their gradient, and that is multiplied back, at once or, of
16-bit parameters, together with that of other chunks (``_linear.matmul``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from tnt_kernels._call import (
    LossCall,
    RowTensors,
    Shard,
    active_rows,
    negative_rows,
    real_dtype,
)
from tnt_kernels._linear.matmul import (
    Gradients,
    Head,
    Slot,
    held_dtype,
    keeps_float32,
    new_rows,
    padded,
)
from tnt_kernels._operators import losses_into
from tnt_kernels._scalars import Scalars
from tnt_kernels._sharded.agreement import columns_of, join_as_failed
from tnt_kernels._sharded.collectives import all_reduce_
from tnt_kernels.objectives import RowLoss

#: What a call's buffers may take. Every chunk reads all of the weight, and every matmul of gradients reads and writes
#: all of the weight's: at V = 32000 and H = 512, 170 float32 rows at a time take a CPU some 15 % longer than 500.
CHUNK_BYTES = {"cpu": 64 << 20}
CHUNK_BYTES_ELSEWHERE = 1 << 30
#: An eighth of them is left to matmuls: to a CPU's copies of their operands (some 10 MiB), and to the 16-bit parts of
#: the weight's gradient on their way to its float32 sum.
_MATMUL_SHARE = 8
#: Rows of a tile of a GPU's matmuls: chunks of 683 rows would cost as much as 768.
_TILE_ROWS = 128


class LinearTensors(NamedTuple):
    """What both models multiply. V is the vocabulary, which the parameters may exceed."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (>= V, H)
    bias: Tensor | None  # (>= V,)
    ref_hidden: Tensor | None  # (..., H_ref)
    ref_weight: Tensor | None  # (>= V, H_ref)
    ref_bias: Tensor | None  # (>= V,)


class LinearScalars(NamedTuple):
    """What models put between hidden states and logits, and how many rows are taken at a time."""

    softcap: float | None
    ref_softcap: float | None
    logit_scale: float
    ref_logit_scale: float
    vocab_size: int
    chunk_size: int | None  # rows; None: what fits into the budget
    max_active_rows: int | None  # None: as many as there are


def _budget(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE)


def flat_hidden(t: LinearTensors) -> LinearTensors:
    """(..., H) as (N, H)."""
    ref_hidden = t.ref_hidden
    if ref_hidden is not None:
        ref_hidden = ref_hidden.reshape(-1, ref_hidden.size(-1))
    return t._replace(hidden=t.hidden.reshape(-1, t.hidden.size(-1)), ref_hidden=ref_hidden)


class RowGroup(NamedTuple):
    """Rows that are computed alike."""

    rows: Tensor  # (n,) int64, their indices
    reads_reference: bool
    all_active: bool


def plan(
    rows: RowTensors, s: Scalars, max_active_rows: int | None
) -> tuple[list[RowGroup], Tensor]:
    """The rows to compute, those that read the reference apart from the others; and the number of active rows.

    That number sits on the device: to ask for it is the one place where a GPU is waited for. With ``max_active_rows``
    it is not asked for, and that many rows are taken, active ones first, all with their reference.
    """
    active = active_rows(rows.labels, rows.weights, s.ignore_index)
    positive, negative = (side.reads_reference for side in s.sides)
    reads = torch.full_like(active, positive)
    if positive != negative:
        is_negative = negative_rows(rows.labels, rows.weights, rows.negative_ids)
        reads = is_negative if negative else ~is_negative
    count = active.sum()
    # 0: reads the reference, 1: does not, 2: nothing to do
    order = torch.where(active, (~reads).to(torch.int8), 2).argsort(stable=True)
    if max_active_rows is not None:
        groups = [RowGroup(order[:max_active_rows], positive or negative, False)]
    else:
        total, with_reference = torch.stack((count, (active & reads).sum())).tolist()
        groups = [
            RowGroup(order[:with_reference], True, True),
            RowGroup(order[with_reference:total], False, True),
        ]
    return [group for group in groups if len(group.rows)], count


#: By "logits", "ref_logits" and "tanh" (of softcap), or by the dtype that a matmul of logits rounds to.
_Buffers = dict[str | torch.dtype, Tensor]


class _Layout(NamedTuple):
    """Of a chunk."""

    #: Without "logits": they are where their gradient waits.
    buffers: dict[str | torch.dtype, torch.dtype]
    waits: bool  # the gradient of logits is to be rounded to 16 bits, and then waits for a matmul of many rows
    gradient_in_slot: bool  # the loss writes it where it waits


def _layout(
    t: LinearTensors,
    linear: LinearScalars,
    groups: list[RowGroup],
    wanted: Sequence[bool],
    with_upstream: bool,
) -> _Layout:
    """Logits are ``real``, unless their matmul has rounded them and their gradient is to be rounded, too, at once."""
    hidden, real = t.hidden, real_dtype(t.hidden)
    reads = any(group.reads_reference for group in groups)
    waits = (wanted[0] or wanted[1]) and hidden.dtype != real
    dtypes = {x.dtype for x in (hidden, t.ref_hidden if reads else None) if x is not None}
    rounds, capped = not keeps_float32(hidden.device.type), linear.softcap is not None
    # Something is yet to happen to the gradient when the loss has written it. (On a CPU, PyTorch would copy a 16-bit
    # one to sum it up for the bias.)
    changes = with_upstream or held_dtype(hidden.dtype) != hidden.dtype or (rounds and wanted[2])
    changes = capped or (any(wanted) and changes)
    names = ["logits"] + ["ref_logits"] * reads
    if rounds and dtypes == {hidden.dtype} and not changes and linear.ref_softcap is None:
        buffers: dict[str | torch.dtype, torch.dtype] = dict.fromkeys(names, hidden.dtype)
        if waits:
            del buffers["logits"]
    else:
        if capped and any(wanted):
            names.append("tanh")
        buffers = dict.fromkeys(names, real)
        if rounds:
            # Where rows wait for the gradient's matmuls, that of the logits may use their slot.
            dtypes -= {real, hidden.dtype if waits else real}
            buffers |= {dtype: dtype for dtype in dtypes}
    return _Layout(buffers, waits, waits and not changes)


class Sizes(NamedTuple):
    """In rows."""

    chunk: int  # whose logits exist at once
    waiting: int  # whose gradients wait for a matmul at most, 0 where none does
    one_matmul: bool  # all of them fit


def sizes_of(
    t: LinearTensors,
    linear: LinearScalars,
    groups: list[RowGroup],
    wanted: Sequence[bool],
    widest: int,
    layout: _Layout,
) -> Sizes:
    """What the budget holds. ``widest`` is V, of the largest shard, as all ranks have chunks of the same rows.

    The float32 sum of a 16-bit weight's gradient takes as much as the gradients of 2 H rows of logits. Where those of
    all rows fit into the budget and the place of that sum, they wait for one matmul, and there is no sum.
    """
    hidden, real, total = t.hidden, real_dtype(t.hidden), sum(len(x.rows) for x in groups)
    width, bytes_ = hidden.size(1), hidden.element_size()
    budget = _budget(hidden.device)
    budget -= budget // _MATMUL_SHARE
    row = padded(widest) * sum(dtype.itemsize for dtype in layout.buffers.values())
    row += width * (bytes_ + real.itemsize)  # gathered; multiplied back
    if "ref_logits" in layout.buffers and t.ref_hidden is not None:
        row += t.ref_hidden.size(1) * t.ref_hidden.element_size()
    waiting_row = padded(widest) * bytes_ + width * (2 * bytes_ + real.itemsize)

    def chunk(available: int, row: int = row) -> int:
        most, tile = max(1, linear.chunk_size or available // row), 1
        if linear.chunk_size is None and hidden.device.type != "cpu" and most >= _TILE_ROWS:
            tile = _TILE_ROWS
        most -= most % tile
        even = -(-total // max(1, -(-total // most)))
        return max(1, min(total, -(-even // tile) * tile))

    if not layout.waits:
        return Sizes(chunk(budget), 0, False)
    if not wanted[1]:  # a row's gradient has nothing to gain from other rows
        rows = chunk(budget, row + waiting_row)
        return Sizes(rows, rows, False)
    sum_bytes = widest * width * real.itemsize if held_dtype(hidden.dtype) != real else 0
    left, half = budget + sum_bytes - total * waiting_row, chunk(budget // 2)
    if left >= half * row:
        return Sizes(chunk(min(left, budget)), total, True)
    chunks = (budget - half * row) // (half * waiting_row)
    return Sizes(half, half * max(1, chunks), False)


def _unless_it_reads(side: RowLoss) -> int:
    return int(RowLoss.NONE if side.reads_reference else side)


class Chunks:
    """The chunks of a call whose ranks have agreed: buffers, gradients, and the way through.

    Args:
        t: with hidden states (N, H).
        wanted: whether the gradients of hidden, weight and bias are.
        upstream: (N,), multiplies the gradient of every row.
    """

    def __init__(
        self,
        t: LinearTensors,
        linear: LinearScalars,
        call: LossCall,
        groups: list[RowGroup],
        wanted: Sequence[bool],
        upstream: Tensor | None,
    ) -> None:
        self._t, self._call, shard = t, call, call.shard
        self._wanted, self._upstream, vocab = wanted, upstream, linear.vocab_size
        widest = vocab if shard is None else columns_of(shard, vocab).widest
        self._layout = _layout(t, linear, groups, wanted, upstream is not None)
        self._sizes = sizes_of(t, linear, groups, wanted, widest, self._layout)
        self._policy = Head(t.hidden, t.weight, t.bias, linear.softcap, linear.logit_scale, vocab)
        self._reference: Head | None = None
        if t.ref_hidden is not None and t.ref_weight is not None:
            softcap, scale = linear.ref_softcap, linear.ref_logit_scale
            self._reference = Head(t.ref_hidden, t.ref_weight, t.ref_bias, softcap, scale, vocab)
        self._gradients: Gradients | None = None
        self._buffers: _Buffers = {}
        self._chunks = [(x, index) for x in groups for index in x.rows.split(self._sizes.chunk)]
        with self._joins(self._chunks):
            for name, dtype in self._layout.buffers.items():
                self._buffers[name] = new_rows(t.hidden, self._sizes.chunk, vocab, dtype)
            if any(wanted):
                self._gradients = Gradients(
                    self._policy, t.weight, t.bias, wanted, shard, self._sizes.waiting, self._sizes.one_matmul,
                    _budget(t.hidden.device) // _MATMUL_SHARE,
                )  # fmt: skip

    @contextmanager
    def _joins(self, chunks: list[tuple[RowGroup, Tensor]]) -> Iterator[None]:
        """Where this rank fails in here, it joins the collectives of the others, whose next chunks these are."""
        try:
            yield
        except Exception:
            if self._call.shard is not None:
                self._buffers, self._gradients = {}, None  # what fails may be for want of memory
                self._join_as_failed(self._call.shard, chunks)
            raise

    def _join_as_failed(self, shard: Shard, chunks: list[tuple[RowGroup, Tensor]]) -> None:
        hidden = self._t.hidden
        for group, index in chunks:
            totals = self._scalars(group).loss_needs_totals
            join_as_failed(shard, hidden[: len(index)], twice=totals)
            if hidden.device.type == "cpu":
                return  # the others raise in this chunk
        if self._wanted[0]:
            nan = hidden.new_full(hidden.shape, torch.nan, dtype=real_dtype(hidden))
            all_reduce_(nan, shard.group)

    def _scalars(self, group: RowGroup) -> Scalars:
        s = self._call.scalars
        if group.reads_reference:
            return s
        # None of these rows is of a side that reads it, but a backend asks for it if one side might.
        positive, negative = map(_unless_it_reads, s.sides)
        return s._replace(positive_loss=positive, negative_loss=negative)

    def losses(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Chunk after chunk: its rows' indices, their loss, diagnostics if they are wanted. Adds to the gradients."""
        gradients = self._gradients
        for i, (group, index) in enumerate(self._chunks):
            with self._joins(self._chunks[i:]):
                slot = None if gradients is None else gradients.reserve(len(index))
                buffers = {name: x[: len(index)] for name, x in self._buffers.items()}
                if slot is not None:
                    buffers.setdefault("logits", slot.logits)
                    buffers.setdefault(slot.logits.dtype, slot.logits)
                rows, tensors = self._multiply(group, index, buffers, slot)
                logits, tanh = buffers["logits"], buffers.get("tanh")
            gradient = logits
            if slot is not None and self._layout.gradient_in_slot:
                gradient = slot.logits
            loss, diagnostics = losses_into(
                None if gradients is None else gradient,
                logits,
                self._call._replace(tensors=tensors, scalars=self._scalars(group)),
            )
            if gradients is None:
                yield index, loss, diagnostics
                continue
            with self._joins(self._chunks[i + 1 :]):
                if self._upstream is not None:
                    gradient.mul_(self._upstream[index][:, None])
                if tanh is not None:
                    # softcap's derivative, 1 - tanh²
                    gradient.addcmul_(gradient, tanh.square_(), value=-1)
                gradients.add(index, rows, gradient, slot)
            yield index, loss, diagnostics

    def gradients(self) -> list[Tensor]:
        """Of hidden (N, H), weight and bias, those that are wanted, once all chunks have been through."""
        if self._gradients is None:
            return []
        self._buffers = {}
        with self._joins([]):
            self._gradients.multiply_waiting()
        return self._gradients.results()

    def _multiply(
        self, group: RowGroup, index: Tensor, buffers: _Buffers, slot: Slot | None
    ) -> tuple[Tensor, RowTensors]:
        """Fills a chunk's logits; returns its hidden states and what else the loss takes."""
        t = self._call.tensors
        out = None if slot is None else slot.rows
        rows = torch.index_select(self._t.hidden, 0, index, out=out)
        labels = t.labels[index]
        weights = None if t.weights is None else t.weights[index]
        if not group.all_active:
            # 0 · NaN is NaN: a row of weight 0 must not reach the gradient of the weight
            inactive = ~active_rows(labels, weights, self._call.scalars.ignore_index)
            rows.masked_fill_(inactive[:, None], 0.0)
        logits, ref_logits = buffers["logits"], None
        self._policy.logits(rows, logits, _rounded(buffers, rows, logits), buffers.get("tanh"))
        if group.reads_reference and self._reference is not None:
            ref_rows, ref_logits = self._reference.hidden[index], buffers["ref_logits"]
            narrow = _rounded(buffers, ref_rows, ref_logits)
            self._reference.logits(ref_rows, ref_logits, narrow, None)
        alpha, ids = t.alpha, t.negative_ids
        return rows, RowTensors(
            ref_logits,
            labels,
            weights,
            alpha if alpha is None or len(alpha) == 1 else alpha[index],
            ids if ids is None or ids.dim() == 1 else ids[index],
            t.normalizer,
        )


def _rounded(buffers: _Buffers, rows: Tensor, logits: Tensor) -> Tensor | None:
    """Where a matmul of these rows writes to if it rounds and the logits are not to be what it rounds to."""
    if rows.dtype == logits.dtype or keeps_float32(rows.device.type):
        return None
    return buffers[rows.dtype]
