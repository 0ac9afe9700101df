"""Checks of the tensors that all losses share: what came and what was expected, before anything is written.

``owner`` names the argument whose rows the others must fit: "logits" (..., V), or "hidden" (..., H).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

import tnt_kernels.backends.native as native
from tnt_kernels._call import RowTensors, as_rows, real_dtype

_WITHOUT = {"logits": "logits without V", "hidden": "hidden without H"}
_WHERE = {"logits": "where logits are", "hidden": "where hidden is"}


def are_usual(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    alpha: float | Tensor,
    negative_ids: Tensor | None,
    normalizer: float | Tensor | None,
) -> bool:
    """Whether these pass all checks as they are: rows (N, V) on a CPU, of the dtypes that most calls have.

    It is one look in place of many, for calls in which nothing takes time but Python. False says nothing: the full
    checks then decide. The compiled module has the look; without it, the answer is False.
    """
    return False


if native.module is not None:
    are_usual = native.module.are_usual


def check_row_tensors(
    owner: str,
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    alpha: float | Tensor,
    negative_ids: Tensor | None,
    normalizer: float | Tensor | None,
) -> RowTensors:
    """The tensors of a call, with rows (...) as (N,).

    ``logits``, which may be hidden states, and ``ref_logits`` are checked already.
    """
    real, shape = real_dtype(logits), logits.shape[:-1]
    labels = _as_integers("labels", labels, logits, owner, shape)
    if weights is not None:
        weights = _as_real("weights", weights, logits, real, owner)
        if weights.shape != shape:
            raise ValueError(
                f"weights: shape {tuple(weights.shape)}, expected {tuple(shape)}, that of {_WITHOUT[owner]}"
            )
    alpha_rows = None
    if isinstance(alpha, Tensor):
        alpha_rows = _broadcast_alpha(_as_real("alpha", alpha, logits, real, owner), shape)
    if negative_ids is not None:
        negative_ids = _check_negative_ids(negative_ids, logits, shape, owner)
    divisor = None
    if isinstance(normalizer, Tensor):
        divisor = _as_real("normalizer", normalizer, logits, real, owner)
        if divisor.dim() != 0:
            raise ValueError(
                f"normalizer: shape {tuple(normalizer.shape)}, expected a number or a 0-dim tensor"
            )
    return RowTensors(
        None if ref_logits is None else as_rows(ref_logits),
        _flat(labels),
        None if weights is None else _flat(weights),
        alpha_rows,
        negative_ids,
        divisor,
    )


def refuse_transforms(name: str, x: Tensor) -> None:
    """``torch.func.grad`` and ``vmap`` would reach kernels that take memory, not wrapped tensors."""
    if not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(x):
        raise RuntimeError(
            f"{name}: inside torch.func.grad or vmap, which the losses do not support; expected a plain tensor and "
            "loss.backward() or torch.autograd.grad (the rows of a call are a batch already)"
        )


def check_constant(name: str, x: Tensor, logits: Tensor, owner: str) -> None:
    if x.device != logits.device:
        raise ValueError(f"{name}: on {x.device}, expected {logits.device}, {_WHERE[owner]}")
    if x.requires_grad:
        raise ValueError(
            f"{name}: requires grad, expected a tensor without gradient (none flows to it): detach it"
        )


def _as_integers(
    name: str, x: Tensor, logits: Tensor, owner: str, shape: torch.Size | None = None
) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {type(x).__name__}, expected an integer tensor")
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"{name}: dtype {x.dtype}, expected an integer dtype")
    if shape is not None and x.shape != shape:
        raise ValueError(
            f"{name}: shape {tuple(x.shape)}, expected {tuple(shape)}, that of {_WITHOUT[owner]}"
        )
    if x.device != logits.device:
        raise ValueError(f"{name}: on {x.device}, expected {logits.device}, {_WHERE[owner]}")
    return x if x.dtype == torch.int64 else x.to(torch.int64)


def _as_real(name: str, x: Tensor, logits: Tensor, dtype: torch.dtype, owner: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {type(x).__name__}, expected a real tensor")
    if x.dtype.is_complex:
        raise TypeError(f"{name}: dtype {x.dtype}, expected a real dtype")
    check_constant(name, x, logits, owner)
    return x if x.dtype == dtype else x.to(dtype)


def _broadcast_alpha(alpha: Tensor, shape: torch.Size) -> Tensor:
    try:
        return (alpha if alpha.dim() == 0 else alpha.expand(shape)).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"alpha: shape {tuple(alpha.shape)}, expected one that broadcasts to {tuple(shape)}"
        ) from None


def _check_negative_ids(
    negative_ids: Tensor, logits: Tensor, shape: torch.Size, owner: str
) -> Tensor | None:
    negative_ids = _as_integers("negative_ids", negative_ids, logits, owner)
    if (negative_ids.dim() != 1 and negative_ids.shape[:-1] != shape) or negative_ids.dim() == 0:
        raise ValueError(
            f"negative_ids: shape {tuple(negative_ids.shape)}, expected (K,) or {(*shape, 'K')}".replace(
                "'", ""
            )
        )
    if negative_ids.size(-1) == 0:
        return None
    return (negative_ids if negative_ids.dim() == 1 else negative_ids.flatten(0, -2)).contiguous()


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 1 and x.is_contiguous() else x.reshape(-1).contiguous()
