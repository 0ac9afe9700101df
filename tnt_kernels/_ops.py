"""The operators that PyTorch knows: schemas, shapes for tracing, and the way to a backend's launcher.

``row_losses`` yields loss and gradient of a batch in one call, ``row_losses_`` writes that gradient over the logits.
``row_gradients`` and ``row_gradients_`` write the gradient later, from what ``row_losses`` kept of every row, with the
upstream factor folded in. Rows are (...); the four take the same tensors and scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnt_kernels.backends import BACKENDS
from tnt_kernels.backends.call import ROW_COEFFICIENTS, RowCall, Scalars, real_dtype

TENSORS = (
    "Tensor? ref_logits, Tensor labels, Tensor? weights, Tensor? alpha, Tensor? negative_ids, "
    "Tensor? normalizer"
)
SCALARS = (
    "int positive_loss, int negative_loss, float alpha_value, float eps, bool uniform_smoothing, "
    "float? nl_floor, float temperature, int ignore_index, str reduction, float? normalizer_value, "
    "str backend"
)
_library = torch.library.Library("tnt_kernels", "DEF")
for _schema in (
    f"row_losses(Tensor logits, {TENSORS}, {SCALARS}, bool with_gradient, bool with_stats, "
    "bool with_coefficients) -> Tensor[]",
    f"row_losses_(Tensor(a!) logits, {TENSORS}, {SCALARS}, bool with_stats) -> (Tensor loss, Tensor stats)",
    f"row_gradients(Tensor logits, {TENSORS}, {SCALARS}, Tensor coefficients, Tensor upstream) -> Tensor",
    f"row_gradients_(Tensor(a!) logits, {TENSORS}, {SCALARS}, Tensor coefficients, Tensor upstream) -> ()",
):
    _library.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))


class RowTensors(NamedTuple):
    """The tensors beside the logits; every operator takes them in this order."""

    ref_logits: Tensor | None  # (..., V)
    labels: Tensor  # (...) int64
    weights: Tensor | None  # (...) real
    alpha: Tensor | None  # (...) real, or None: Scalars.alpha_value
    negative_ids: Tensor | None  # (..., K) or (K,) int64
    normalizer: Tensor | None  # () real, or None: Scalars.normalizer_value


def as_rows(x: Tensor) -> Tensor:
    """(..., V) as (N, V) with dense rows: a view wherever one exists, else a copy."""
    if x.dim() != 2:
        x = x.reshape(x.shape[:-1].numel(), x.size(-1))
    return x if x.stride(1) == 1 or x.size(1) <= 1 else x.contiguous()


def has_dense_rows(x: Tensor) -> bool:
    """Whether (..., V) can be seen as (N, V) with dense, disjoint rows, without a copy."""
    if x.numel() == 0:
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
    if a.numel() == 0 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
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


def check_apart(logits: Tensor, ref_logits: Tensor | None) -> None:
    """Of logits that are to be overwritten."""
    if ref_logits is not None and _overlap(as_rows(logits), as_rows(ref_logits)):
        raise ValueError(
            "inplace: logits and ref_logits share memory, expected separate storage "
            "(the gradient would be written over the reference)"
        )


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 1 and x.is_contiguous() else x.reshape(-1).contiguous()


def launch(
    logits: Tensor,
    tensors: tuple[Tensor | None, ...],
    scalars: tuple[Any, ...],
    *,
    loss: Tensor | None = None,
    stats: Tensor | None = None,
    coefficients: Tensor | None = None,
    gradient: Tensor | None = None,
    upstream: Tensor | None = None,
    vocab_offset: int = 0,
    vocab_size: int | None = None,
    statistics: Tensor | None = None,
    gathered: Tensor | None = None,
    parts: Tensor | None = None,
    totals: Tensor | None = None,
) -> None:
    """A backend's launch (``RowCall``) for rows (...)."""
    ref_logits, labels, weights, alpha, negative_ids, normalizer = tensors
    assert labels is not None
    rows = as_rows(logits)
    if ref_logits is not None:
        ref_logits = as_rows(ref_logits)
    if gradient is logits:
        check_apart(rows, ref_logits)
        gradient = rows
    elif gradient is not None:
        gradient = as_rows(gradient)
    if negative_ids is not None:
        ids_shape = (-1, negative_ids.size(-1)) if negative_ids.dim() > 1 else (-1,)
        negative_ids = negative_ids.reshape(ids_shape).contiguous()
    settings = Scalars._make(scalars)
    call = RowCall(
        rows,
        ref_logits,
        _flat(labels),
        None if weights is None else _flat(weights),
        None if alpha is None else alpha.reshape(-1),
        negative_ids,
        normalizer,
        settings,
        loss,
        stats,
        coefficients,
        gradient,
        None if upstream is None else upstream.reshape(-1),
        vocab_offset,
        rows.size(1) if vocab_size is None else vocab_size,
        statistics,
        gathered,
        parts,
        totals,
    )
    BACKENDS[settings.backend].launch(call)


LAST_TENSOR = len(RowTensors._fields)
LAST_SCALAR = LAST_TENSOR + len(Scalars._fields)
_REDUCTION = LAST_TENSOR + Scalars._fields.index("reduction")


def _new_loss(logits: Tensor, arguments: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    return logits.new_empty(
        arguments[1].shape if arguments[_REDUCTION] == "none" else (), dtype=dtype
    )


def _new_stats(logits: Tensor, arguments: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    return logits.new_empty((5, *arguments[1].shape), dtype=dtype)


def new_gradient(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def new_row_losses(logits: Tensor, *arguments: Any) -> list[Tensor]:
    with_gradient, with_stats, with_coefficients = arguments[LAST_SCALAR:]
    dtype = real_dtype(logits)
    outputs = [_new_loss(logits, arguments, dtype)]
    if with_gradient:
        outputs.append(new_gradient(logits))
    if with_stats:
        outputs.append(_new_stats(logits, arguments, dtype))
    if with_coefficients:
        outputs.append(logits.new_empty((arguments[1].numel(), ROW_COEFFICIENTS), dtype=dtype))
    return outputs


def _row_losses(logits: Tensor, *arguments: Any) -> list[Tensor]:
    """[loss], then what was asked for of [gradient, stats, coefficients]."""
    with_gradient, with_stats, with_coefficients = arguments[LAST_SCALAR:]
    outputs = new_row_losses(logits, *arguments)
    launch(
        logits,
        arguments[:LAST_TENSOR],
        arguments[LAST_TENSOR:LAST_SCALAR],
        loss=outputs[0],
        stats=outputs[1 + with_gradient] if with_stats else None,
        coefficients=outputs[-1] if with_coefficients else None,
        gradient=outputs[1] if with_gradient else None,
    )
    return outputs


def new_row_losses_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    dtype = real_dtype(logits)
    with_stats = arguments[LAST_SCALAR]
    stats = _new_stats(logits, arguments, dtype) if with_stats else logits.new_empty(0, dtype=dtype)
    return _new_loss(logits, arguments, dtype), stats


def _row_losses_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss and stats (empty unless asked for); the gradient lies where the logits were."""
    return row_losses_into(logits, logits, *arguments)


def row_losses_into(gradient: Tensor, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """As ``row_losses_``, with the gradient elsewhere, perhaps in bfloat16. No operator, as one calls it."""
    loss, stats = new_row_losses_(logits, *arguments)
    tensors, scalars = arguments[:LAST_TENSOR], arguments[LAST_TENSOR:LAST_SCALAR]
    launch(
        logits,
        tensors,
        scalars,
        loss=loss,
        stats=stats if arguments[LAST_SCALAR] else None,
        gradient=gradient,
    )
    return loss, stats


def _new_row_gradients(logits: Tensor, *_: Any) -> Tensor:
    return new_gradient(logits)


def _row_gradients(logits: Tensor, *arguments: Any) -> Tensor:
    coefficients, upstream = arguments[LAST_SCALAR:]
    gradient = new_gradient(logits)
    tensors, scalars = arguments[:LAST_TENSOR], arguments[LAST_TENSOR:LAST_SCALAR]
    outputs = {"gradient": gradient, "upstream": upstream}
    launch(logits, tensors, scalars, coefficients=coefficients, **outputs)
    return gradient


def _row_gradients_(logits: Tensor, *arguments: Any) -> None:
    coefficients, upstream = arguments[LAST_SCALAR:]
    tensors, scalars = arguments[:LAST_TENSOR], arguments[LAST_TENSOR:LAST_SCALAR]
    outputs = {"gradient": logits, "upstream": upstream}
    launch(logits, tensors, scalars, coefficients=coefficients, **outputs)


for _name, _implementation, _fake in (
    ("row_losses", _row_losses, new_row_losses),
    ("row_losses_", _row_losses_, new_row_losses_),
    ("row_gradients", _row_gradients, _new_row_gradients),
    ("row_gradients_", _row_gradients_, lambda *_: None),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tnt_kernels::{_name}", _fake, lib=_library)


def _entry(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, or its implementation where nobody would see the difference.

    The way through PyTorch's dispatcher and back into Python takes 20 µs of a forward and backward call. It is needed
    when a compiler traces, a mode watches, or the logits are no plain tensor.
    """
    operator = getattr(torch.ops.tnt_kernels, name).default

    def call(logits: Tensor, *arguments: Any) -> Any:
        if (
            type(logits) is Tensor
            and not torch.compiler.is_compiling()
            and torch._C._len_torch_dispatch_stack() == 0
        ):
            return implementation(logits, *arguments)
        return operator(logits, *arguments)

    return call


row_losses = _entry("row_losses", _row_losses)
row_losses_ = _entry("row_losses_", _row_losses_)
row_gradients = _entry("row_gradients", _row_gradients)
row_gradients_ = _entry("row_gradients_", _row_gradients_)
