"""The compiled CUDA kernels (``csrc/cuda/entry_points.cu``), for NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

import tnt_kernels.backends.native as native
from tnt_kernels import _build_info
from tnt_kernels._call import LOGITS_DTYPES, RowCall
from tnt_kernels._scalars import Scalars
from tnt_kernels.backends.protocol import describe
from tnt_kernels.objectives import RowLoss

_T = TypeVar("_T")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: A row's set is a bit per column in shared memory, of which the smallest devices have 99 KiB a block.
_MAX_VOCAB = 2**19
_CAPABILITY = (8, 0)
_CLUSTERS = (9, 0)  # the capability of what ``kl_kernel`` needs

module = native.module
_missing = native.missing
if module is not None and not hasattr(module, "run_rows_cuda"):
    _missing = _build_info.load().cuda_missing or "tnt_kernels._C was built without CUDA"


def _constant(function: Callable[[int], _T]) -> Callable[[int], _T]:
    """A compiler that traces a call takes the function's answer as it is.

    ``torch.compiler.assume_constant_result``, without the import of the compiler. It looks through ``functools.cache``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _why_not_device(index: int) -> str:
    return _reason(index)


@_constant
def _warn_of_failure(index: int) -> None:
    _warn_once(index)


@_constant
def _has_clusters(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= _CLUSTERS


@functools.cache
def _reason(index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    if capability < _CAPABILITY:
        return f"it needs compute capability 8.0 or later, cuda:{index} has {'.'.join(map(str, capability))}"
    return _failure(index)


@functools.cache
def _warn_once(index: int) -> None:
    if torch.cuda.get_device_capability(index) >= _CAPABILITY and (reason := _failure(index)):
        warnings.warn(
            f"tnt_kernels: the CUDA kernels are built, but fail on cuda:{index} ({reason}); "
            "taking the next backend",
            stacklevel=2,
        )


@functools.cache
def _failure(index: int) -> str:
    """Asks the kernels' own CUDA runtime, once a device: the driver may be too old for it."""
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
    return _unsuited(logits) or _why_not_device(_device(logits))


def warn_of_failure(logits: Tensor) -> None:
    """Says, once a device, why logits that this backend should serve go to another one."""
    if not (_missing or _unsuited(logits)):
        _warn_of_failure(_device(logits))


def reads_once(logits: Tensor, scalars: Scalars, sharded: bool, differences: bool) -> bool:
    """Whether ``kl_kernel`` computes such calls, gradient included: csrc/cuda/rows.cuh, ``is_kl_call``."""
    positive, negative = scalars.sides
    # Gradients of float16 wait for backward, and so do those of a loss a row.
    waits = logits.dtype == torch.float16 or scalars.reduction == "none"
    has_no_room = differences and logits.dtype.itemsize == 2
    return (
        not (sharded or waits or has_no_room or scalars.uniform_smoothing)
        and (positive.reads_reference or positive is RowLoss.LOG_LIKELIHOOD)
        and (negative.reads_reference or negative is RowLoss.UNLIKELIHOOD)
        and _has_clusters(_device(logits))
    )


class Plan(NamedTuple):
    """How ``kl_kernel`` computes rows of a vocabulary on a device: csrc/cuda/rows.cuh, ``choose_kl``."""

    blocks: int  #: of a row; 0 where rows are read twice by another kernel
    threads: int  #: of a block
    shared_bytes: int  #: of a block
    rows: int  #: at a time on the device, as its driver counts


def plan(dtype: torch.dtype, vocab: int, pair: bool, device: int) -> Plan:
    """``pair``: the loss reads the reference, too. Asks the driver, and launches nothing."""
    assert module is not None
    return Plan(*module.plan_cuda(LOGITS_DTYPES.index(dtype), vocab, pair, device))


def _unsuited(logits: Tensor) -> str:
    """Why these logits are not for any GPU of this backend."""
    if logits.device.type != "cuda" or torch.version.hip is not None:
        return f"it takes tensors on an NVIDIA GPU, logits are {describe(logits)}"
    if logits.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, logits are {describe(logits)}"
    if logits.size(-1) > _MAX_VOCAB:
        return f"it takes up to {_MAX_VOCAB} columns, logits have {logits.size(-1)}"
    return ""


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
