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


def check_no_overlap(a: Tensor, b: Tensor | None) -> None:
    """Of (N, V) logits ``a`` that the gradient is to be written over, and their reference. Rows may interleave.

    Raises:
        ValueError: they share memory.
    """
    if b is None:
        return
    distance = b.data_ptr() - a.data_ptr()
    first = a if distance >= 0 else b
    distance = abs(distance)
    if (
        distance >= first.nbytes and first.is_contiguous()
    ):  # sooner known than the rest: 1 µs of a small call
        return
    (rows, columns), pitch = first.shape, first.stride(0)
    distance //= a.element_size()
    if distance >= (rows - 1) * pitch + columns or first.numel() == 0:
        return
    interleaved = (
        rows > 1 and a.stride(0) == b.stride(0) and columns <= distance % pitch <= pitch - columns
    )
    if not interleaved:
        raise ValueError(
            "inplace: logits and ref_logits share memory, expected separate storage "
            "(the gradient would be written over the reference)"
        )
