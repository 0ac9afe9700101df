"""The Triton kernels that launches take: those of rows, and around them normaliser, sum and upstream factor."""

from __future__ import annotations

import triton
import triton.language as tl

from tnt_kernels.backends.triton.kl import kl_kernel as kl_kernel
from tnt_kernels.backends.triton.objectives import Factors as Factors
from tnt_kernels.backends.triton.set import NO_IDS as NO_IDS
from tnt_kernels.backends.triton.set import ROW_IDS as ROW_IDS
from tnt_kernels.backends.triton.set import SHARED_IDS as SHARED_IDS
from tnt_kernels.backends.triton.set import mark_kernel as mark_kernel
from tnt_kernels.backends.triton.stream import stream_kernel as stream_kernel


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def inverse_normalizer_kernel(
    labels,
    weights,
    normalizer,
    normalizer_value,
    out,
    rows,
    ignore_index,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 / normaliser, 0 for a normaliser of 0; COUNT: of the number of rows with a non-zero weight."""
    if COUNT:
        counts = tl.zeros([BLOCK], tl.int32)
        for start in range(0, rows, BLOCK):
            i = start + tl.arange(0, BLOCK)
            active = (i < rows) & (tl.load(labels + i, mask=i < rows, other=0) != ignore_index)
            if weights is not None:
                active = active & (tl.load(weights + i, mask=i < rows, other=0.0) != 0.0)
            counts += active.to(tl.int32)
        value = tl.sum(counts, 0).to(tl.float32)
    elif normalizer is not None:
        value = tl.load(normalizer)
    else:
        value = normalizer_value + 0.0
    tl.store(out, tl.where(value == 0.0, 0.0, 1.0 / value))


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(losses, inverse_normalizer, out, rows, BLOCK: tl.constexpr):
    """Σ losses / normaliser, always in the same order."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(losses + i, mask=i < rows, other=0.0)
    factor = 1.0
    if inverse_normalizer is not None:
        factor = tl.load(inverse_normalizer)
    tl.store(out, tl.where(factor == 0.0, 0.0, tl.sum(total, 0) * factor))


@triton.jit(do_not_specialize=["rows"])
def scale_kernel(gradient, stride, factor, rows, vocab, BLOCK: tl.constexpr):
    """Multiplies in place, unless the factor is 1: then it does not even look."""
    by = tl.load(factor)
    if by != 1.0:
        tiles = tl.cdiv(vocab, BLOCK)
        for k in range(tl.program_id(0), tiles.to(tl.int64) * rows, tl.num_programs(0)):
            v = (k % tiles).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
            at = gradient + (k // tiles) * stride + v
            x = tl.load(at, mask=v < vocab).to(tl.float32) * by
            tl.store(at, x.to(gradient.dtype.element_ty), mask=v < vocab)
