"""The Triton kernels (``triton_kernels.py``): NVIDIA, AMD and Intel GPUs, without a build step."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tnt_kernels.backends import tuning
from tnt_kernels.backends.call import RowCall, check_indices, describe

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FACTOR_BLOCK = 1024
_SCALE_PROGRAMS = 2048  # more than are resident at a time, few enough to return at once where there is nothing to do


@functools.cache
def _kernels() -> ModuleType:
    """Here, and not above, because importing Triton takes half a second."""
    from tnt_kernels.backends import triton_kernels

    return triton_kernels


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def why_not(logits: Tensor | None) -> str:
    """Why this backend cannot serve these logits, or (None) any; empty where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if logits is None:
        if _interpreted() or torch.cuda.is_available() or torch.xpu.is_available():
            return ""
        return "there is no GPU"
    if logits.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, logits are {describe(logits)}"
    if logits.device.type == "cpu" and not _interpreted():
        return f"it takes GPU tensors, logits are {describe(logits)} (TRITON_INTERPRET=1 simulates a GPU)"
    if logits.device.type not in ("cpu", "cuda", "xpu"):
        return f"it takes tensors of NVIDIA, AMD and Intel GPUs, logits are {describe(logits)}"
    return ""


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, whatever device the tensors are on."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


@functools.cache
def architecture(device: torch.device) -> str:
    """What launch settings depend on, such as sm_90 or gfx942."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def options(config: tuning.RowConfig, architecture: str) -> dict[str, int]:
    """Triton's launch options."""
    if architecture.startswith("gfx"):
        return {"num_warps": max(1, config.warps // 2)}  # AMD's large GPUs have 64 lanes
    if architecture.startswith("sm_"):
        # Without a limit of its own, NVIDIA's assembler spills to reach the next occupancy. Others know no such option.
        return {"num_warps": config.warps, "maxnreg": min(255, 65536 // (32 * config.warps))}
    return {"num_warps": config.warps}


def scale_(gradient: Tensor, scale: Tensor) -> None:
    """Multiplies in place on the device, which returns at once where the factor is 1."""
    rows = gradient.view(-1, gradient.size(-1)) if gradient.dim() != 2 else gradient
    if rows.numel() == 0:
        return
    with _on(gradient.device):
        _kernels().scale_kernel[(min(_SCALE_PROGRAMS, rows.size(0) * 64),)](
            rows, rows.stride(0), scale, rows.size(0), rows.size(1), BLOCK=4096, num_warps=8
        )


class _Ids:
    """Negative ids as the kernels want them: ascending, so that a tile finds its own; a shared list as a map as well.

    Numbers beyond the vocabulary become -2 and V: they stay out of range, and fit 32 bits.
    """

    def __init__(self, ids: Tensor | None, vocab_size: int) -> None:
        kernels = _kernels()
        self.kind, self.stride, self.count = kernels.NO_IDS.value, 0, 0
        self.sorted: Tensor | None = None
        self.map: Tensor | None = None
        if ids is None or ids.numel() == 0:
            return
        narrow = ids.clamp(-2, vocab_size).to(torch.int32)
        self.sorted = narrow.sort(-1).values
        self.count = ids.size(-1)
        if ids.dim() == 2:
            self.kind, self.stride = kernels.ROW_IDS.value, self.sorted.stride(0)
            return
        self.kind = kernels.SHARED_IDS.value
        # The column past the vocabulary takes what is out of range.
        self.map = torch.zeros(vocab_size + 1, dtype=torch.int8, device=ids.device)
        self.map.scatter_(0, torch.where(narrow < 0, vocab_size, narrow).long(), 1)


def launch(call: RowCall) -> None:
    logits, s = call.logits, call.scalars
    if call.is_first:  # simulated on a CPU
        check_indices(call.labels, call.weights, call.negative_ids, call.vocab_size, s.ignore_index)
    rows, vocab = logits.shape
    kernels = _kernels()

    def real(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    reduced = call.loss is not None and s.reduction != "none"
    kind = (
        kernels.STATISTICS if call.statistics is not None
        else kernels.PARTS if call.parts is not None
        else kernels.FINISH if call.gathered is not None
        else kernels.BACKWARD if call.upstream is not None
        else kernels.FUSED
    )  # fmt: skip
    with _on(logits.device):
        factors = None
        # Statistics need no factor, and a gradient from coefficients has it in them.
        if s.reduction == "mean" and kind not in (kernels.STATISTICS, kernels.BACKWARD):
            factors = real(1)
            given = call.normalizer is not None or s.normalizer_value is not None
            kernels.factor_kernel[(1,)](
                call.labels, call.weights, call.normalizer, s.normalizer_value or 0.0, factors, rows, s.ignore_index,
                COUNT=not given, BLOCK=_FACTOR_BLOCK,
            )  # fmt: skip
        losses = real(rows) if reduced else call.loss
        if rows:
            ids = _Ids(call.negative_ids, call.vocab_size)
            target = architecture(logits.device)
            pair = call.ref_logits is not None
            gradient = call.gradient is not None
            config = tuning.row_config(
                vocab, logits.element_size(), pair, gradient, ids.count > 0, target
            )
            uniform = s.uniform_smoothing and s.eps > 0
            gathered = call.gathered
            kernels.row_kernel[(rows,)](
                logits, logits.stride(0), call.ref_logits, 0 if call.ref_logits is None else call.ref_logits.stride(0),
                call.labels, call.weights, call.alpha,
                0 if call.alpha is None or call.alpha.numel() == 1 else call.alpha.stride(0), float(s.alpha_value),
                ids.sorted, ids.stride, ids.count, ids.map, factors, rows, vocab, call.vocab_offset, call.vocab_size,
                float(s.eps), -math.inf if s.nl_floor is None else float(s.nl_floor),
                math.log2(math.e) / s.temperature, 1.0 / s.temperature, s.ignore_index, losses, call.stats,
                call.coefficients, call.gradient, 0 if call.gradient is None else call.gradient.stride(0),
                call.upstream, 0 if call.upstream is None or call.upstream.numel() == 1 else call.upstream.stride(0),
                call.statistics, gathered, 0 if gathered is None else gathered.stride(0),
                0 if gathered is None else gathered.size(0), call.parts, call.totals,
                POSITIVE=s.positive_loss, NEGATIVE=s.negative_loss, UNIFORM=uniform, IDS=ids.kind, CALL=kind.value,
                GRADIENT=gradient, BLOCK=config.block, STAGES=config.stages,
                SHARDS=1 if gathered is None else 1 << (gathered.size(0) - 1).bit_length(),
                **options(config, target),
            )  # fmt: skip
        if reduced:
            kernels.sum_kernel[(1,)](losses, factors, call.loss, rows, BLOCK=_FACTOR_BLOCK)
