"""How kernels find a row: from the boundary of 16 bytes before it, so that vectors load it at any address."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from tnt_kernels.backends.triton.objectives import AWAY

SAMPLES = tl.constexpr(32)  # places along a row from which its level is taken, 16 bytes at each


@triton.jit
def columns_before(row):
    """How many columns lie between the boundary and the row."""
    GROUP: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    return ((row.to(tl.int64) % 16) // (16 // GROUP)).to(tl.int32)


@triton.jit
def row_of(rows, index, stride, before, GROUP: tl.constexpr, ALIKE: tl.constexpr):
    """A row of another tensor from so many columns before it: ALIKE, from a boundary of GROUP columns."""
    row = rows + index * stride - before
    if ALIKE:
        BYTES: tl.constexpr = GROUP * rows.dtype.element_ty.primitive_bitwidth // 8
        row = tl.multiple_of(row, BYTES)
    return row


@triton.jit
def gather(elements, origin, v, mask, other):
    """Logits of a row, from its boundary: the elements, with those of ``origin`` where they are differences to it."""
    x = tl.load(elements + v, mask=mask, other=other).to(tl.float32)
    if origin is not None:
        x += tl.load(origin + v, mask=mask, other=0.0).to(tl.float32)
    return x


class Samples(NamedTuple):
    """Of a few entries all along two rows: the maxima, and how far o lies above x on average."""

    x_top: tl.tensor
    o_top: tl.tensor
    above: tl.tensor


@triton.jit
def _level(x0, o0, d0, x1, o1, d1):
    return tl.maximum(x0, x1), tl.maximum(o0, o1), d0 + d1


@triton.jit
def samples(x, o, begin, vocab, DIFFERENCES: tl.constexpr):
    """Of rows given from their boundary; DIFFERENCES: x lies there as its difference to o."""
    GROUP: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    lead = tl.where(begin > 0, GROUP - begin, 0)
    step = tl.maximum((vocab - lead) // (GROUP * SAMPLES), 1) * GROUP
    v = lead + tl.arange(0, SAMPLES)[:, None] * step + tl.arange(0, GROUP)[None, :]
    v = begin + tl.minimum(v, vocab - 1)
    # A shard may have no columns.
    x_some = tl.load(x + v, mask=v >= begin, other=AWAY).to(tl.float32)
    o_some = tl.load(o + v, mask=v >= begin, other=AWAY).to(tl.float32)
    if DIFFERENCES:
        x_some += o_some
    x_top, o_top, above = tl.reduce((x_some, o_some, o_some - x_some), 1, _level)
    x_top, o_top, above = tl.reduce((x_top, o_top, above), 0, _level)
    return Samples(x_top, o_top, above * (1.0 / (SAMPLES * GROUP)))
