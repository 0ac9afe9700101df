"""The compiled CUDA kernels (``csrc/row_cuda.cu``), for NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

import functools
import math
import warnings
from types import ModuleType

import torch
from torch import Tensor

from tnt_kernels import _build_info
from tnt_kernels.backends.call import RowCall, describe

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
#: A row's set is a bit per column in shared memory, of which the smallest devices have 99 KiB a block.
_MAX_VOCAB = 2**19

native: ModuleType | None
try:
    from tnt_kernels import _C
except ImportError as error:
    native, _missing = None, _build_info.load().native_missing or str(error)
else:
    native, _missing = _C, ""
    if not hasattr(_C, "run_rows_cuda"):
        _missing = _build_info.load().cuda_missing or "tnt_kernels._C was built without CUDA"


@functools.cache
def _why_not_device(index: int) -> str:
    """Asks the kernels' own CUDA runtime, once a device; a driver that is too old for it is said once."""
    assert native is not None
    reason = str(native.why_not_cuda(index))
    if reason:
        warnings.warn(
            f"tnt_kernels: the CUDA kernels cannot use cuda:{index} ({reason}); using the next backend",
            stacklevel=2,
        )
    return reason


def why_not(logits: Tensor | None) -> str:
    """Why this backend cannot serve these logits, or (None) any; empty where it can."""
    if _missing:
        return _missing
    if logits is None:
        return "" if torch.cuda.is_available() else "no NVIDIA GPU that this torch can use"
    if logits.device.type != "cuda" or torch.version.hip is not None:
        return f"it takes tensors on an NVIDIA GPU, logits are {describe(logits)}"
    if logits.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, logits are {describe(logits)}"
    if logits.size(-1) > _MAX_VOCAB:
        return f"it takes up to {_MAX_VOCAB} columns, logits have {logits.size(-1)}"
    return _why_not_device(_device(logits))


def _device(x: Tensor) -> int:
    return torch.cuda.current_device() if x.device.index is None else x.device.index


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def scale_(gradient: Tensor, scale: Tensor) -> None:
    """Multiplies in place; the kernel returns at once where the number is 1, and nobody waits for it."""
    if gradient.numel() == 0:
        return
    if (
        gradient.dtype not in _DTYPES
        or scale.dtype != torch.float32
        or not gradient.is_contiguous()
    ):
        gradient.mul_(scale)
        return
    assert native is not None
    columns = gradient.numel()
    native.scale_rows_cuda(
        _DTYPES[gradient.dtype],
        gradient.data_ptr(),
        1,
        columns,
        columns,
        scale.data_ptr(),
        _device(gradient),
        _stream(gradient),
    )


def launch(call: RowCall) -> None:
    assert native is not None
    if call.statistics is not None or call.gathered is not None:
        raise RuntimeError(
            'backend="cuda" does not serve a sharded vocabulary yet, expected "triton" or "torch"'
        )
    logits, ref_logits, alpha, ids = call.logits, call.ref_logits, call.alpha, call.negative_ids
    gradient, upstream, s = call.gradient, call.upstream, call.scalars
    rows, vocab = logits.shape
    # 1 / normaliser, and the rows' losses until they are summed
    workspace = torch.empty(1 + rows, dtype=torch.float64, device=logits.device)
    native.run_rows_cuda(
        _DTYPES[logits.dtype],
        rows,
        vocab,
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
        s.normalizer_value is not None,
        0.0 if s.normalizer_value is None else s.normalizer_value,
        _address(call.loss),
        _address(call.stats),
        _address(call.coefficients),
        _address(gradient),
        0 if gradient is None else gradient.stride(0),
        _address(upstream),
        0 if upstream is None or upstream.numel() == 1 else upstream.stride(0),
        _device(logits),
        _stream(logits),
        _address(call.normalizer),
        workspace.data_ptr(),
    )
