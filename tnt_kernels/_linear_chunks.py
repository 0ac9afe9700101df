"""Hidden states to losses and gradients, a chunk of rows at a time: what the operators of ``_linear_ops`` do.

A chunk is multiplied out, the loss turns its logits into their gradient (``_shards.chunk_losses_into``), and that is
multiplied back, at once or, of 16-bit parameters, together with that of other chunks (``_linear_matmul``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tnt_kernels import _shards
from tnt_kernels._groups import Shard, all_reduce_, join_as_failed, place
from tnt_kernels._linear_matmul import Gradients, Head, held_dtype, keeps_float32, padded
from tnt_kernels._ops import RowTensors
from tnt_kernels.backends.call import Scalars, loss_needs_totals, real_dtype
from tnt_kernels.objectives import RowLoss

#: What a call's buffers may take. Every chunk reads all of the weight, and every matmul of gradients reads and writes
#: all of the weight's: at V = 32000 and H = 512, 170 float32 rows at a time take a CPU some 15 % longer than 500. A GPU
#: wants 1000.
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


def _waits(t: LinearTensors, wanted: Sequence[bool]) -> bool:
    """Whether gradients of logits are to be rounded to 16 bits, and then wait for a matmul of many rows."""
    return (wanted[0] or wanted[1]) and t.hidden.dtype != real_dtype(t.hidden)


#: By "logits", "ref_logits" and "tanh" (of softcap), or by the dtype that a matmul of logits rounds to.
_Buffers = dict[str | torch.dtype, Tensor]


class _Layout(NamedTuple):
    """Of a chunk."""

    buffers: dict[str | torch.dtype, torch.dtype]
    logits_in_room: bool  # they become their gradient where that waits for its matmuls
    gradient_in_room: bool  # that is where the loss writes it


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
    ref_hidden, waits = t.ref_hidden if reads else None, _waits(t, wanted)
    dtypes = {x.dtype for x in (hidden, ref_hidden) if x is not None}
    rounds = not keeps_float32(hidden.device.type)
    # The gradient, after the loss.
    changes = (
        linear.softcap is not None or with_upstream or held_dtype(hidden.dtype) != hidden.dtype
    )
    capped = linear.softcap is not None or linear.ref_softcap is not None
    if rounds and dtypes == {hidden.dtype} and not capped and not (any(wanted) and changes):
        names = ["logits"] * (not waits) + ["ref_logits"] * reads
        return _Layout(dict.fromkeys(names, hidden.dtype), waits, waits)
    names = ["logits"] + ["ref_logits"] * reads
    if linear.softcap is not None and any(wanted):
        names.append("tanh")
    buffers: dict[str | torch.dtype, torch.dtype] = dict.fromkeys(names, real)
    if rounds:
        # Where rows wait for the gradient's matmuls, that of the logits may use their room.
        dtypes -= {real, hidden.dtype if waits else real}
        buffers |= {dtype: dtype for dtype in dtypes}
    return _Layout(buffers, False, waits and not changes)


class Sizes(NamedTuple):
    """In rows."""

    chunk: int  # whose logits exist at once
    waiting: int  # whose gradients wait for a matmul at most, 0 where none does
    total: int


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

    if not _waits(t, wanted):
        return Sizes(chunk(budget), 0, total)
    if not wanted[1]:  # a row's gradient has nothing to gain from other rows
        rows = chunk(budget, row + waiting_row)
        return Sizes(rows, rows, total)
    sum_bytes = widest * width * real.itemsize if held_dtype(hidden.dtype) != real else 0
    left, half = budget + sum_bytes - total * waiting_row, chunk(budget // 2)
    if left >= half * row:
        return Sizes(chunk(left), total, total)
    chunks = (budget - half * row) // (half * waiting_row)
    return Sizes(half, half * max(1, chunks), total)


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
        self._t, self._linear, self._s, self._groups, self._shard = t, linear, s, groups, shard
        self._upstream, vocab = upstream, linear.vocab_size
        widest = vocab if shard is None else place(shard, vocab).widest
        layout = _layout(t, linear, groups, wanted, upstream is not None)
        self.sizes = sizes_of(t, linear, groups, wanted, widest, layout)
        self._layout = layout
        self._policy = Head(t.hidden, t.weight, t.bias, linear.softcap, linear.logit_scale, vocab)
        self.gradients: Gradients | None = None
        try:
            self._buffers: _Buffers = {
                name: t.hidden.new_empty((self.sizes.chunk, padded(vocab)), dtype=dtype)[:, :vocab]
                for name, dtype in layout.buffers.items()
            }
            if any(wanted):
                self.gradients = Gradients(
                    self._policy, t.weight, t.bias, real_dtype(t.hidden), wanted, shard,
                    self.sizes.waiting, self.sizes.total, _budget(t.hidden.device) // _MATMUL_SHARE,
                )  # fmt: skip
        except Exception:
            self._join_as_failed(wanted)
            raise

    def _join_as_failed(self, wanted: Sequence[bool]) -> None:
        """Takes part in all collectives of the other ranks, which on a CPU raise in the first chunk."""
        if self._shard is None:
            return
        hidden = self._t.hidden
        for group, index in self._indices():
            totals = loss_needs_totals(self._settings(group))
            join_as_failed(self._shard, hidden[: len(index)], twice=totals)
            if hidden.device.type == "cpu":
                return
        if wanted[0]:
            all_reduce_(hidden.new_zeros(hidden.shape, dtype=real_dtype(hidden)), self._shard.group)

    def _indices(self) -> Iterator[tuple[RowGroup, Tensor]]:
        for group in self._groups:
            for index in group.rows.split(self.sizes.chunk):
                yield group, index

    def _settings(self, group: RowGroup) -> Scalars:
        s = self._s
        if group.reads_reference:
            return s
        # None of these rows is of a side that reads it, but a backend asks for it if one side might.
        sides = _unless_it_reads(s.positive_loss), _unless_it_reads(s.negative_loss)
        return s._replace(positive_loss=sides[0], negative_loss=sides[1])

    def losses(self, with_stats: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Chunk after chunk: its rows' indices, their loss and statistics. Adds to the gradients."""
        t, linear, policy, gradients = self._t, self._linear, self._policy, self.gradients
        reference = None
        if t.ref_hidden is not None and t.ref_weight is not None:
            softcap, scale = linear.ref_softcap, linear.ref_logit_scale
            vocab = linear.vocab_size
            reference = Head(t.ref_hidden, t.ref_weight, t.ref_bias, softcap, scale, vocab)
        for group, index in self._indices():
            n = len(index)
            buffers = {name: x[:n] for name, x in self._buffers.items()}
            room = None if gradients is None else gradients.room(n)
            if room is not None:
                name = "logits" if self._layout.logits_in_room else room.logits.dtype
                buffers.setdefault(name, room.logits)
            rows = torch.index_select(
                policy.hidden, 0, index, out=None if room is None else room.rows
            )
            labels = t.labels[index]
            weights = None if t.weights is None else t.weights[index]
            if not group.all_active:
                # 0 · NaN is NaN: a row of weight 0 must not reach the gradient of the weight
                inactive = ~active_rows(labels, weights, self._s.ignore_index)
                rows.masked_fill_(inactive[:, None], 0.0)
            logits, tanh, ref_logits = buffers["logits"], buffers.get("tanh"), None
            policy.logits(rows, logits, self._rounded(buffers, rows, logits), tanh)
            if group.reads_reference and reference is not None:
                ref_rows, ref_logits = reference.hidden[index], buffers["ref_logits"]
                narrow = self._rounded(buffers, ref_rows, ref_logits)
                reference.logits(ref_rows, ref_logits, narrow, None)
            alpha, ids = t.alpha, t.negative_ids
            tensors = RowTensors(
                ref_logits,
                labels,
                weights,
                alpha if alpha is None or alpha.dim() == 0 else alpha[index],
                ids if ids is None or ids.dim() == 1 else ids[index],
                t.normalizer,
            )
            arguments = (logits, tensors, self._settings(group), self._shard, with_stats)
            if gradients is None:
                yield index, *_shards.chunk_losses(*arguments)
                continue
            gradient = logits
            if room is not None and self._layout.gradient_in_room:
                gradient = room.logits
            loss, stats = _shards.chunk_losses_into(gradient, *arguments)
            if self._upstream is not None:
                gradient.mul_(self._upstream[index][:, None])
            if tanh is not None:
                gradient.addcmul_(
                    gradient, tanh.square_(), value=-1
                )  # softcap's derivative, 1 - tanh²
            gradients.add(index, rows, gradient, room)
            yield index, loss, stats

    @staticmethod
    def _rounded(buffers: _Buffers, rows: Tensor, logits: Tensor) -> Tensor | None:
        """Where a matmul of these rows writes to if it rounds and the logits are not to be what it rounds to."""
        if rows.dtype == logits.dtype or keeps_float32(rows.device.type):
            return None
        return buffers[rows.dtype]
