"""Where rows lie in memory: whether a gradient can be written over them."""

from __future__ import annotations

from torch import Tensor


def has_dense_rows(x: Tensor) -> bool:
    """Whether (..., V) can be seen as (N, V) with dense, disjoint rows, without a copy."""
    if x.is_contiguous() or x.numel() == 0:
        return True
    if x.size(-1) > 1 and x.stride(-1) != 1:
        return False
    inner = None  # stride of the innermost row dimension, then what the next one out must have
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride < x.size(-1) if inner is None else stride != inner:
            return False
        inner = stride * size
    return True


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two (N, V) tensors with dense rows share memory. Rows that interleave do not."""
    if a.numel() == 0:
        return False
    span_a, span_b = ((x.size(0) - 1) * x.stride(0) + x.size(1) for x in (a, b))
    distance = (b.data_ptr() - a.data_ptr()) // a.element_size()
    if distance >= span_a or -distance >= span_b:
        return False
    pitch, columns = a.stride(0), a.size(1)
    interleaved = (
        a.size(0) > 1 and pitch == b.stride(0) and columns <= distance % pitch <= pitch - columns
    )
    return not interleaved


def check_no_overlap(rows: Tensor, ref_rows: Tensor | None) -> None:
    """Of (N, V) logits that the gradient is to be written over.

    Raises:
        ValueError: the reference shares their memory.
    """
    if ref_rows is not None and _overlap(rows, ref_rows):
        raise ValueError(
            "inplace: logits and ref_logits share memory, expected separate storage "
            "(the gradient would be written over the reference)"
        )
