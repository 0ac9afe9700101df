"""Hidden states to losses and gradients, a chunk of rows at a time: what ``_linear.operators`` do.

A chunk is multiplied out, the loss turns its logits into their gradient, and that is multiplied back, at once or, of
16-bit parameters, together with that of other chunks (``_linear.matmul``). Between the matmuls there is nothing but the
loss: what rows need besides is gathered once, a row's loss has its place among all, and what the gradient is divided by
is a factor of the launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from tnt_kernels._call import ROW_DIAGNOSTICS, LossCall, Shard, real_dtype
from tnt_kernels._linear.matmul import Gradients, Head, difference, new_rows
from tnt_kernels._linear.plan import (
    LinearScalars,
    LinearTensors,
    Plan,
    RowGroup,
    in_order,
    per_row,
    rows_at,
    shares_head,
)
from tnt_kernels._linear.sizes import make_layout, part_bytes, sizes_of
from tnt_kernels._operators import write_rows
from tnt_kernels._scalars import Scalars
from tnt_kernels._sharded.agreement import columns_of, join_as_failed
from tnt_kernels._sharded.collectives import all_reduce_
from tnt_kernels.objectives import RowLoss


def _unless_it_reads(side: RowLoss) -> int:
    return int(RowLoss.NONE if side.reads_reference else side)


class RowResults(NamedTuple):
    """Of the rows of a plan."""

    losses: Tensor  # (n,) real, times their weight and alpha
    diagnostics: Tensor | None  # (ROW_DIAGNOSTICS, n) real


class Chunks:
    """The chunks of a call whose ranks have agreed: buffers, gradients, and the way through.

    Args:
        t: with hidden states (N, H).
        wanted: whether the gradients of hidden, weight and bias are.
        upstream: (1,) or (N,) real, multiplies the gradient of every row. None: 1.
    """

    def __init__(
        self,
        t: LinearTensors,
        linear: LinearScalars,
        call: LossCall,
        plan: Plan,
        wanted: Sequence[bool],
        upstream: Tensor | None,
    ) -> None:
        self._call, self._plan, self._hidden = call, plan, t.hidden
        self._wanted, vocab, shard = wanted, linear.vocab_size, call.shard
        widest = vocab if shard is None else columns_of(shard, vocab).widest
        reads = any(group.reads_reference for group in plan.groups)
        self._layout = make_layout(t, linear, reads, shares_head(t, linear), wanted)
        sizes = sizes_of(t, linear, plan.rows, wanted, widest, self._layout)
        self._gradients: Gradients | None = None
        self._buffers: dict[str, Tensor] = {}
        self._chunks, parts = plan.chunks(sizes.chunk), part_bytes(t.hidden, widest)
        with self._joins(self._chunks):
            s = call.scalars
            self._rows = in_order(plan, t, call.tensors, s.ignore_index, upstream, wanted[1])
            self._policy = Head(t.weight, t.bias, linear.softcap, linear.logit_scale, vocab, parts)
            self._reference: Head | None = None
            if t.ref_weight is not None:
                self._reference = Head(
                    t.ref_weight, t.ref_bias, linear.ref_softcap, linear.ref_logit_scale, vocab, parts
                )  # fmt: skip
            self._moved: Tensor | None = None  # the policy's hidden states from the reference's
            if self._layout.differences and self._rows.ref_hidden is not None:
                dtype = self._layout.buffers["ref_logits"]
                self._moved = difference(self._rows.hidden, self._rows.ref_hidden, dtype)
            for name, dtype in self._layout.buffers.items():
                self._buffers[name] = new_rows(t.hidden, sizes.chunk, vocab, dtype)
            if any(wanted):
                self._gradients = Gradients(
                    self._policy, self._rows.hidden, t.weight, t.bias, wanted, shard, sizes.waiting,
                    sizes.one_matmul, parts,
                )  # fmt: skip

    @contextmanager
    def _joins(self, chunks: list[RowGroup]) -> Iterator[None]:
        """Where this rank fails in here, it joins the collectives of the others, whose next chunks these are."""
        try:
            yield
        except Exception:
            if self._call.shard is not None:
                self._buffers, self._gradients = {}, None  # what fails may be for want of memory
                self._join_as_failed(self._call.shard, chunks)
            raise

    def _join_as_failed(self, shard: Shard, chunks: list[RowGroup]) -> None:
        hidden = self._hidden
        for chunk in chunks:
            totals = self._scalars(chunk).loss_needs_totals
            join_as_failed(shard, hidden[: chunk.end - chunk.begin], twice=totals)
            if hidden.device.type == "cpu":
                return  # the others raise in this chunk
        if self._wanted[0]:
            shape = (self._plan.rows, hidden.size(1))
            nan = hidden.new_full(shape, torch.nan, dtype=real_dtype(hidden))
            all_reduce_(nan, shard.group)

    def _scalars(self, group: RowGroup) -> Scalars:
        s = self._call.scalars._replace(reduction="none")
        if group.reads_reference:
            return s
        # None of these rows is of a side that reads it, but a backend asks for it if one side might.
        positive, negative = map(_unless_it_reads, s.sides)
        return s._replace(positive_loss=positive, negative_loss=negative)

    def losses(self) -> RowResults:
        """Goes through all chunks. Adds to the gradients."""
        hidden, n = self._hidden, self._plan.rows
        losses = hidden.new_empty(n, dtype=real_dtype(hidden))
        diagnostics: list[Tensor] = []
        for i, chunk in enumerate(self._chunks):
            found = None
            if self._call.diagnostics:
                shape = (ROW_DIAGNOSTICS, chunk.end - chunk.begin)
                found = losses.new_empty(shape)
                diagnostics.append(found)
            self._run(i, chunk, losses[chunk.begin : chunk.end], found)
        if not self._call.diagnostics:
            return RowResults(losses, None)
        none = losses.new_empty((ROW_DIAGNOSTICS, 0))
        return RowResults(losses, torch.cat(diagnostics, 1) if diagnostics else none)

    def _run(self, i: int, chunk: RowGroup, loss: Tensor, diagnostics: Tensor | None) -> None:
        gradients, n, begin = self._gradients, chunk.end - chunk.begin, chunk.begin
        with self._joins(self._chunks[i:]):
            slot = None if gradients is None else gradients.reserve(n)
            buffers = {name: x[:n] for name, x in self._buffers.items()}
            if slot is not None:
                buffers.setdefault("logits", slot)
            ref_logits, differences = self._multiply(chunk, buffers)
        logits, tanh = buffers["logits"], buffers.get("tanh")
        gradient = slot if slot is not None and self._layout.gradient_in_slot else logits
        here = slice(begin, chunk.end)
        tensors = rows_at(self._rows.tensors, here)._replace(ref_logits=ref_logits)
        write_rows(
            logits, self._call._replace(tensors=tensors, scalars=self._scalars(chunk)), loss, diagnostics,
            None if gradients is None else gradient, upstream=per_row(self._rows.upstream, here),
            differences=differences,
        )  # fmt: skip
        if gradients is None:
            return
        with self._joins(self._chunks[i + 1 :]):
            if tanh is not None:
                # softcap's derivative, 1 - tanh²
                gradient.addcmul_(gradient, tanh.square_(), value=-1)
            gradients.add(begin, gradient, slot)

    def _multiply(self, chunk: RowGroup, buffers: dict[str, Tensor]) -> tuple[Tensor | None, bool]:
        """Fills a chunk's logits; returns the reference's, and whether the policy's are differences to these."""
        here, rows, logits = slice(chunk.begin, chunk.end), self._rows, buffers["logits"]
        ref_logits = None
        if chunk.reads_reference and self._reference is not None and rows.ref_hidden is not None:
            ref_logits = buffers["ref_logits"]
            self._reference.logits(rows.ref_hidden[here], ref_logits)
            if self._moved is not None:
                self._policy.differences(self._moved[here], logits)
                return ref_logits, True
        self._policy.logits(rows.hidden[here], logits, buffers.get("tanh"))
        return ref_logits, False

    def gradients(self) -> list[Tensor]:
        """Of hidden (N, H), weight and bias, those that are wanted, once all chunks have been through."""
        if self._gradients is None:
            return []
        self._buffers = {}
        with self._joins([]):
            self._gradients.multiply_waiting()
        return self._gradients.results(self._plan.order, len(self._hidden))
