"""Checks of the arguments that all losses share: what came and what was expected, before anything is written.

``of`` names the argument whose rows the others must fit: "logits" (..., V), or "hidden" (..., H).
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from tnt_kernels import backends
from tnt_kernels._ops import RowTensors
from tnt_kernels.backends.call import Scalars, real_dtype
from tnt_kernels.objectives import Objective

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")
_SMOOTHINGS = ("negatives", "uniform")
_WITHOUT = {"logits": "logits without V", "hidden": "hidden without H"}
_WHERE = {"logits": "where logits are", "hidden": "where hidden is"}


def row_arguments(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    objective: Objective,
    alpha: float | Tensor,
    negative_ids: Tensor | None,
    eps: float,
    smoothing: str,
    nl_floor: float | None,
    temperature: float,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
    backend: str | None,
    shape: torch.Size,
    of: str,
) -> tuple[RowTensors, Scalars]:
    """The tensors and scalars of the operators, for rows of shape (...).

    ``logits`` and ``ref_logits`` are checked already; of ``logits``, only device and dtype count here.
    """
    real = real_dtype(logits)
    labels = _as_integers("labels", labels, logits, of, shape)
    if weights is not None:
        weights = _as_real("weights", weights, logits, real, of)
        if weights.shape != shape:
            raise ValueError(
                f"weights: shape {tuple(weights.shape)}, expected {tuple(shape)}, that of {_WITHOUT[of]}"
            )
    alpha_value, alpha_rows = 1.0, None
    if isinstance(alpha, Tensor):
        alpha_rows = _broadcast_alpha(_as_real("alpha", alpha, logits, real, of), shape)
    else:
        alpha_value = as_number("alpha", alpha)
    if negative_ids is not None:
        negative_ids = _check_negative_ids(negative_ids, logits, shape, of)
    if smoothing not in _SMOOTHINGS:
        raise ValueError(f"smoothing is {smoothing!r}, expected 'negatives' or 'uniform'")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    normalizer_value, normalizer_tensor = None, None
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(
                f"normalizer: given with reduction={reduction!r}, expected reduction='mean'"
            )
        if isinstance(normalizer, Tensor):
            normalizer_tensor = _as_real("normalizer", normalizer, logits, real, of)
            if normalizer_tensor.dim() != 0:
                raise ValueError(
                    f"normalizer: shape {tuple(normalizer.shape)}, expected a number or a 0-dim tensor"
                )
        else:
            normalizer_value = as_number("normalizer", normalizer, least=0.0)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: {type(ignore_index).__name__}, expected an int")

    scalars = Scalars(
        int(objective.positive_loss),
        int(objective.negative_loss),
        alpha_value,
        as_number("eps", eps, least=0.0),
        smoothing == "uniform",
        None if nl_floor is None else as_number("nl_floor", nl_floor),
        as_number("temperature", temperature, above=0.0),
        ignore_index,
        reduction,
        normalizer_value,
        backends.select(logits, backend),
    )
    tensors = RowTensors(ref_logits, labels, weights, alpha_rows, negative_ids, normalizer_tensor)
    return tensors, scalars


def refuse_transforms(name: str, x: Tensor) -> None:
    """``torch.func.grad`` and ``vmap`` would reach kernels that take memory, not wrapped tensors."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise RuntimeError(
            f"{name}: inside torch.func.grad or vmap, which the losses do not support; expected a plain tensor and "
            "loss.backward() or torch.autograd.grad (the rows of a call are a batch already)"
        )


def check_constant(name: str, x: Tensor, logits: Tensor, of: str) -> None:
    if x.device != logits.device:
        raise ValueError(f"{name}: on {x.device}, expected {logits.device}, {_WHERE[of]}")
    if x.requires_grad:
        raise ValueError(
            f"{name}: requires grad, expected a tensor without gradient (none flows to it): detach it"
        )


def _as_integers(
    name: str, x: Tensor, logits: Tensor, of: str, shape: torch.Size | None = None
) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {type(x).__name__}, expected an integer tensor")
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"{name}: dtype {x.dtype}, expected an integer dtype")
    if shape is not None and x.shape != shape:
        raise ValueError(
            f"{name}: shape {tuple(x.shape)}, expected {tuple(shape)}, that of {_WITHOUT[of]}"
        )
    if x.device != logits.device:
        raise ValueError(f"{name}: on {x.device}, expected {logits.device}, {_WHERE[of]}")
    return x if x.dtype == torch.int64 else x.to(torch.int64)


def _as_real(name: str, x: Tensor, logits: Tensor, dtype: torch.dtype, of: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {type(x).__name__}, expected a real tensor")
    if x.dtype.is_complex:
        raise TypeError(f"{name}: dtype {x.dtype}, expected a real dtype")
    check_constant(name, x, logits, of)
    return x if x.dtype == dtype else x.to(dtype)


def as_number(name: str, x: float, least: float = -math.inf, above: float = -math.inf) -> float:
    if type(x) is not float:
        if isinstance(x, bool) or not isinstance(x, Real):
            raise TypeError(f"{name}: {type(x).__name__}, expected a number")
        x = float(x)
    if not (-math.inf < x < math.inf and x >= least and x > above):  # the compiler can trace these
        bound = (
            f" above {above:g}"
            if above > -math.inf
            else f" of at least {least:g}"
            if least > -math.inf
            else ""
        )
        raise ValueError(f"{name} is {x}, expected a finite number{bound}")
    return x


def _broadcast_alpha(alpha: Tensor, shape: torch.Size) -> Tensor:
    if alpha.dim() == 0 or alpha.shape == shape:
        return alpha
    try:
        return alpha.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"alpha: shape {tuple(alpha.shape)}, expected one that broadcasts to {tuple(shape)}"
        ) from None


def _check_negative_ids(
    negative_ids: Tensor, logits: Tensor, shape: torch.Size, of: str
) -> Tensor | None:
    negative_ids = _as_integers("negative_ids", negative_ids, logits, of)
    if (negative_ids.dim() != 1 and negative_ids.shape[:-1] != shape) or negative_ids.dim() == 0:
        raise ValueError(
            f"negative_ids: shape {tuple(negative_ids.shape)}, expected (K,) or {(*shape, 'K')}".replace(
                "'", ""
            )
        )
    return negative_ids if negative_ids.size(-1) else None
