"""The compiled module ``tnt_kernels._C``, and a call as its functions take it: for the CPU and the CUDA backend."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from tnt_kernels import _build_info
from tnt_kernels.backends.call import RowCall

_INTERFACE = 5  # of csrc/bind.cpp
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}


def _load() -> tuple[ModuleType | None, str]:
    """The module, or None and why there is none."""
    try:
        from tnt_kernels import _C
    except ImportError as error:
        return None, _build_info.load().native_missing or str(error)
    if _C.INTERFACE != _INTERFACE:
        return None, (
            f"tnt_kernels._C is stale: it has interface {_C.INTERFACE}, this package expects {_INTERFACE}; "
            "install tnt_kernels again"
        )
    return _C, ""


module, missing = _load()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def row_arguments(call: RowCall) -> tuple[int | float, ...]:
    """The arguments of csrc/bind_rows.h: addresses, 0 for what is absent; sizes and strides in elements."""
    logits, ref_logits, alpha, ids = call.logits, call.ref_logits, call.alpha, call.negative_ids
    gradient, upstream, gathered, s = call.gradient, call.upstream, call.gathered, call.scalars
    rows, vocab = logits.shape
    return (
        DTYPES[logits.dtype],
        rows,
        vocab,
        call.vocab_offset,
        call.vocab_size,
        logits.data_ptr(),
        logits.stride(0),
        _address(ref_logits),
        0 if ref_logits is None else ref_logits.stride(0),
        call.labels.data_ptr(),
        _address(call.weights),
        _address(alpha),
        0 if alpha is None or alpha.numel() == 1 else alpha.stride(0),
        s.alpha_value,
        _address(ids),
        ids.size(-1) if ids is not None and ids.dim() == 2 else 0,
        0 if ids is None else ids.size(-1),
        s.positive_loss,
        s.negative_loss,
        s.uniform_smoothing,
        s.eps,
        -math.inf if s.nl_floor is None else s.nl_floor,
        s.temperature,
        s.ignore_index,
        _REDUCTIONS[s.reduction],
        _address(call.normalizer),
        s.normalizer_value is not None,
        0.0 if s.normalizer_value is None else s.normalizer_value,
        _address(call.statistics),
        _address(gathered),
        0 if gathered is None else gathered.stride(0),
        0 if gathered is None else gathered.size(0),
        _address(call.parts),
        _address(call.totals),
        _address(call.loss),
        _address(call.stats),
        _address(call.coefficients),
        _address(gradient),
        0 if gradient is None else gradient.stride(0),
        DTYPES[logits.dtype if gradient is None else gradient.dtype],
        _address(upstream),
        0 if upstream is None or upstream.numel() == 1 else upstream.stride(0),
    )
