"""Hidden states to losses and gradients, a chunk of rows at a time: what the operators of ``_linear_ops`` do.

A chunk is multiplied out, the loss turns its logits into their gradient (``_shards.chunk_losses_into``), and that is
multiplied back, at once or, of 16-bit parameters, together with that of other chunks (``_linear_matmul``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from tnt_kernels import _shards
from tnt_kernels._groups import Shard, all_reduce_, join_as_failed, place
from tnt_kernels._linear_matmul import (
    Gradients,
    Head,
    Waiting,
    held_dtype,
    keeps_float32,
    new_rows,
    padded,
)
from tnt_kernels._ops import RowTensors
from tnt_kernels.backends.call import Scalars, loss_needs_totals, real_dtype
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
    """The operators' tensors, in this order. V: the vocabulary, which the parameters may exceed."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (>= V, H)
    bias: Tensor | None  # (>= V,)
    ref_hidden: Tensor | None  # (..., H_ref)
    ref_weight: Tensor | None  # (>= V, H_ref)
    ref_bias: Tensor | None  # (>= V,)
    labels: Tensor  # (...) int64
    weights: Tensor | None  # (...) real
    alpha: Tensor | None  # (...) or () real
    negative_ids: Tensor | None  # (..., K) or (K,) int64
    normalizer: Tensor | None  # () real


class LinearScalars(NamedTuple):
    """The operators' first scalars, in this order; ``Scalars`` follow."""

    softcap: float | None
    ref_softcap: float | None
    logit_scale: float
    ref_logit_scale: float
    vocab_size: int
    chunk_size: int | None  # rows; None: what fits into the budget
    max_active_rows: int | None  # None: as many as there are


def _budget(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE)


def flatten_rows(t: LinearTensors) -> LinearTensors:
    """(...) as (N,). What holds for every row stays as it is."""
    alpha, ids = t.alpha, t.negative_ids
    return t._replace(
        hidden=t.hidden.reshape(-1, t.hidden.size(-1)),
        ref_hidden=None
        if t.ref_hidden is None
        else t.ref_hidden.reshape(-1, t.ref_hidden.size(-1)),
        labels=t.labels.reshape(-1),
        weights=None if t.weights is None else t.weights.reshape(-1),
        alpha=alpha if alpha is None or alpha.dim() == 0 else alpha.reshape(-1),
        negative_ids=ids if ids is None or ids.dim() == 1 else ids.reshape(-1, ids.size(-1)),
    )


def active_rows(labels: Tensor, weights: Tensor | None, ignore_index: int) -> Tensor:
    active = labels != ignore_index
    return active if weights is None else active & (weights != 0)


class RowGroup(NamedTuple):
    """Rows that are computed alike."""

    rows: Tensor  # (n,) int64, their indices
    reads_reference: bool
    all_active: bool


def plan(
    t: LinearTensors, s: Scalars, max_active_rows: int | None
) -> tuple[list[RowGroup], Tensor]:
    """The rows to compute, those that read the reference apart from the others; and the number of active rows.

    That number sits on the device: to ask for it is the one place where a GPU is waited for. With ``max_active_rows``
    it is not asked for, and that many rows are taken, active ones first, all with their reference.
    """
    active = active_rows(t.labels, t.weights, s.ignore_index)
    positive, negative = (RowLoss(x).reads_reference for x in (s.positive_loss, s.negative_loss))
    reads = torch.full_like(active, positive)
    if positive != negative:
        is_negative = torch.zeros_like(active) if t.weights is None else t.weights < 0
        if t.negative_ids is not None:
            is_negative |= (t.negative_ids >= 0).any(-1)
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
    gradient_in_room: bool  # the loss writes it where it waits


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
            # Where rows wait for the gradient's matmuls, that of the logits may use their room.
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


def _unless_it_reads(row_loss: int) -> int:
    return int(RowLoss.NONE if RowLoss(row_loss).reads_reference else row_loss)


class Chunks:
    """The chunks of a call whose ranks have agreed: buffers, gradients, and the way through.

    Args:
        t: with flat rows.
        wanted: whether the gradients of hidden, weight and bias are.
        upstream: (N,), multiplies the gradient of every row.
    """

    def __init__(
        self,
        t: LinearTensors,
        linear: LinearScalars,
        s: Scalars,
        groups: list[RowGroup],
        wanted: Sequence[bool],
        upstream: Tensor | None,
        shard: Shard | None,
    ) -> None:
        self._t, self._s, self._shard = t, s, shard
        self._wanted, self._upstream, vocab = wanted, upstream, linear.vocab_size
        widest = vocab if shard is None else place(shard, vocab).widest
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
            if self._shard is not None:
                self._buffers, self._gradients = {}, None  # what fails may be for want of memory
                self._join_as_failed(self._shard, chunks)
            raise

    def _join_as_failed(self, shard: Shard, chunks: list[tuple[RowGroup, Tensor]]) -> None:
        hidden = self._t.hidden
        for group, index in chunks:
            totals = loss_needs_totals(self._settings(group))
            join_as_failed(shard, hidden[: len(index)], twice=totals)
            if hidden.device.type == "cpu":
                return  # the others raise in this chunk
        if self._wanted[0]:
            nan = hidden.new_full(hidden.shape, torch.nan, dtype=real_dtype(hidden))
            all_reduce_(nan, shard.group)

    def _settings(self, group: RowGroup) -> Scalars:
        s = self._s
        if group.reads_reference:
            return s
        # None of these rows is of a side that reads it, but a backend asks for it if one side might.
        sides = _unless_it_reads(s.positive_loss), _unless_it_reads(s.negative_loss)
        return s._replace(positive_loss=sides[0], negative_loss=sides[1])

    def losses(self, with_stats: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Chunk after chunk: its rows' indices, their loss and statistics. Adds to the gradients."""
        gradients = self._gradients
        for i, (group, index) in enumerate(self._chunks):
            with self._joins(self._chunks[i:]):
                room = None if gradients is None else gradients.room(len(index))
                buffers = {name: x[: len(index)] for name, x in self._buffers.items()}
                if room is not None:
                    buffers.setdefault("logits", room.logits)
                    buffers.setdefault(room.logits.dtype, room.logits)
                rows, tensors = self._multiply(group, index, buffers, room)
                logits, tanh = buffers["logits"], buffers.get("tanh")
            arguments = (logits, tensors, self._settings(group), self._shard, with_stats)
            if gradients is None:
                yield index, *_shards.chunk_losses(*arguments)
                continue
            gradient = logits
            if room is not None and self._layout.gradient_in_room:
                gradient = room.logits
            loss, stats = _shards.chunk_losses_into(gradient, *arguments)
            with self._joins(self._chunks[i + 1 :]):
                if self._upstream is not None:
                    gradient.mul_(self._upstream[index][:, None])
                if tanh is not None:
                    # softcap's derivative, 1 - tanh²
                    gradient.addcmul_(gradient, tanh.square_(), value=-1)
                gradients.add(index, rows, gradient, room)
            yield index, loss, stats

    def gradients(self) -> list[Tensor]:
        """Of hidden (N, H), weight and bias, those that are wanted, once all chunks have been through."""
        if self._gradients is None:
            return []
        self._buffers = {}
        with self._joins([]):
            self._gradients.multiply_waiting()
        return self._gradients.results()

    def _multiply(
        self, group: RowGroup, index: Tensor, buffers: _Buffers, room: Waiting | None
    ) -> tuple[Tensor, RowTensors]:
        """Fills a chunk's logits; returns its hidden states and what else the loss takes."""
        t = self._t
        rows = torch.index_select(t.hidden, 0, index, out=None if room is None else room.rows)
        labels = t.labels[index]
        weights = None if t.weights is None else t.weights[index]
        if not group.all_active:
            # 0 · NaN is NaN: a row of weight 0 must not reach the gradient of the weight
            inactive = ~active_rows(labels, weights, self._s.ignore_index)
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
            alpha if alpha is None or alpha.dim() == 0 else alpha[index],
            ids if ids is None or ids.dim() == 1 else ids[index],
            t.normalizer,
        )


def _rounded(buffers: _Buffers, rows: Tensor, logits: Tensor) -> Tensor | None:
    """Where a matmul of these rows writes to if it rounds and the logits are not to be what it rounds to."""
    if rows.dtype == logits.dtype or keeps_float32(rows.device.type):
        return None
    return buffers[rows.dtype]
