"""The compiled CUDA kernels (``csrc/row_cuda.cu``), for NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import tnt_kernels.backends.native as native
from tnt_kernels import _build_info
from tnt_kernels._call import LOGITS_DTYPES, RowCall
from tnt_kernels.backends.protocol import describe

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: A row's set is a bit per column in shared memory, of which the smallest devices have 99 KiB a block.
_MAX_VOCAB = 2**19
_CAPABILITY = (8, 0)

module = native.module
_missing = native.missing
if module is not None and not hasattr(module, "run_rows_cuda"):
    _missing = _build_info.load().cuda_missing or "tnt_kernels._C was built without CUDA"


def _constant(function: Callable[[int], str]) -> Callable[[int], str]:
    """A compiler that traces a call takes the function's answer as it is.

    ``torch.compiler.assume_constant_result``, without the import of the compiler. It looks through ``functools.cache``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _why_not_device(index: int) -> str:
    return _reason(index)


@functools.cache
def _reason(index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    if capability < _CAPABILITY:
        return f"it needs compute capability 8.0 or later, cuda:{index} has {'.'.join(map(str, capability))}"
    # The kernels' own CUDA runtime is asked, once a device: the driver may be too old for it.
    assert module is not None
    return str(module.why_not_cuda(index))


def why_not(logits: Tensor | None) -> str:
    """Why this backend cannot serve these logits, or (None) any; empty where it can."""
    if _missing:
        return _missing
    if logits is None:
        if torch.version.hip is not None or not torch.cuda.is_available():
            return "no NVIDIA GPU that this torch can use"
        reasons = [_why_not_device(index) for index in range(torch.cuda.device_count())]
        return "" if "" in reasons else reasons[0]
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
    return int(torch.cuda.current_stream(x.device).cuda_stream)


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
    assert module is not None
    dtype, columns = LOGITS_DTYPES.index(gradient.dtype), gradient.numel()
    row, place = (gradient.data_ptr(), 1, columns, columns), (_device(gradient), _stream(gradient))
    module.scale_rows_cuda(dtype, *row, scale.data_ptr(), *place)


def launch(call: RowCall) -> None:
    assert module is not None
    logits = call.logits
    # 1 / normaliser, the rows' losses until they are summed, the rows that one kernel leaves to another
    rows = logits.size(0)
    workspace = torch.empty(2 + rows + rows // 2, dtype=torch.float64, device=logits.device)
    module.run_rows_cuda(call, _device(logits), _stream(logits), workspace.data_ptr())
