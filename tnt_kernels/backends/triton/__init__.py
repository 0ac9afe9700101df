"""The Triton kernels (``kl.py``, ``stream.py``): NVIDIA, AMD and Intel GPUs, without a build step."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tnt_kernels._call import Kind, RowCall
from tnt_kernels.backends.protocol import check_indices, describe
from tnt_kernels.backends.triton.config import RowConfig, RowKind, left_config, row_config

if TYPE_CHECKING:
    from tnt_kernels.backends.triton.objectives import Factors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SUM_BLOCK = 1024
_LOWEST = torch.finfo(torch.float32).min
_LEFT_PROGRAMS = 512  # for all multiprocessors, and few where nothing is left
_IDS_AT_ONCE = 1024  # of a row, by the program that works on it
_IDS_MARKED = 128  # by a program
_SCALE_PROGRAMS = 2048  # more than are resident at a time, few enough to return at once where there is nothing to do


@functools.cache
def _kernels() -> ModuleType:
    """Imported here, and not above, because importing Triton takes half a second."""
    import tnt_kernels.backends.triton.kernels as kernels

    return kernels


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


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the tensors are on."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    context: AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return context


@functools.cache
def architecture(device: torch.device) -> str:
    """What launch settings depend on, such as sm_90 or gfx942."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def options(config: RowConfig, architecture: str) -> dict[str, int]:
    """Triton's launch options."""
    if architecture.startswith("gfx"):
        return {"num_warps": max(1, config.warps // 2)}  # AMD's large GPUs have 64 lanes
    if architecture.startswith("sm_"):
        # Without a limit of its own, NVIDIA's assembler spills to reach the next occupancy. Others know no such option.
        registers = config.registers or min(255, 65536 // (32 * config.warps))
        return {"num_warps": config.warps, "maxnreg": registers}
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


class _NegativeIds(NamedTuple):
    """Negative ids as the kernels read them: in ascending order, and as a bit for each column."""

    kind: int  # NO_IDS, ROW_IDS or SHARED_IDS of set.py
    ascending: Tensor | None = None  # (N, K) or (K,) int32
    stride: int = 0  # from a row's ids to the next one's
    length: int = 0  # K
    bits: Tensor | None = None  # see _bits

    @property
    def bits_stride(self) -> int:
        return 0 if self.bits is None else self.bits.stride(0)

    @property
    def chunk(self) -> int:
        """How many of a row the program that works on it looks at together."""
        return _chunk(self.length, _IDS_AT_ONCE)


def _negative_ids(call: RowCall) -> _NegativeIds:
    """Ids below -1 become -2, those beyond the vocabulary V: as invalid as before, but sure to fit int32."""
    ids, kernels = call.tensors.negative_ids, _kernels()
    if ids is None or ids.numel() == 0:
        return _NegativeIds(kernels.NO_IDS.value)
    ascending = ids.clamp(-2, call.vocab_size).to(torch.int32).sort(-1).values
    length = ascending.size(-1)
    if ids.dim() == 2:
        bits = _bits(call, ascending, ascending.stride(0))
        return _NegativeIds(kernels.ROW_IDS.value, ascending, ascending.stride(0), length, bits)
    return _NegativeIds(kernels.SHARED_IDS.value, ascending, 0, length, _bits(call, ascending, 0))


def _chunk(length: int, most: int) -> int:
    """A power of two that holds as many ids, or the most that are looked at together."""
    return min(most, max(16, 1 << (length - 1).bit_length()))


def _bits(call: RowCall, ascending: Tensor, stride: int) -> Tensor:
    """A bit for each column, 1 where it is among the ids: (N, bytes) uint8.

    Rows begin anywhere between two boundaries of 16 bytes, from which the kernels count: shared ids have a row of bits
    for each of these places.
    """
    logits, length = call.logits, ascending.size(-1)
    rows, vocab = logits.shape
    group = _group(logits)
    begin, step = logits.data_ptr() // logits.element_size() % group, logits.stride(0) % group
    if stride == 0:
        rows, begin, step = group, 0, 1
    bits = torch.zeros(rows, (vocab + group + 31) // 32, dtype=torch.int32, device=logits.device)
    chunk = _chunk(length, _IDS_MARKED)
    _kernels().mark_kernel[(rows, -(-length // chunk))](
        ascending, stride, length, begin, step, bits, bits.stride(0), vocab, call.vocab_offset, GROUP=group,
        CHUNK=chunk, num_warps=1,
    )  # fmt: skip
    return bits.view(torch.uint8)


def _group(logits: Tensor) -> int:
    """Columns in 16 bytes."""
    return 16 // logits.element_size()


def launch(call: RowCall, config: RowConfig | None = None) -> None:
    """``Backend.launch``. ``config`` replaces what ``row_config`` would choose: a search tries many on one call."""
    logits, t, s = call.logits, call.tensors, call.scalars
    if call.is_first:  # for a simulation on a CPU; a GPU's tensors are not looked at
        check_indices(t.labels, t.weights, t.negative_ids, call.vocab_size, s.ignore_index)
    with _on(logits.device):
        factors = _factors(call)
        row_losses = call.loss
        sums_losses = call.loss is not None and s.reduction != "none"
        if sums_losses:
            row_losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        if len(logits):
            _launch_rows(call, row_losses, factors, config)
        if sums_losses:
            _kernels().sum_kernel[(1,)](
                row_losses, factors.inverse_normalizer, call.loss, len(logits), BLOCK=_SUM_BLOCK
            )


def _inverse_normalizer(call: RowCall) -> Tensor | None:
    """(1,) float32, computed on the device, for which nobody waits; None where nothing is to be divided.

    Statistics are of the logits alone, and a row's coefficients hold the factor already.
    """
    t, s = call.tensors, call.scalars
    if s.reduction != "mean" or call.kind in (Kind.STATISTICS, Kind.BACKWARD):
        return None
    inverse = torch.empty(1, dtype=torch.float32, device=call.logits.device)
    given = t.normalizer is not None or s.normalizer_value is not None
    _kernels().inverse_normalizer_kernel[(1,)](
        t.labels, t.weights, t.normalizer, s.normalizer_value or 0.0, inverse, len(call.logits), s.ignore_index,
        COUNT=not given, BLOCK=_SUM_BLOCK,
    )  # fmt: skip
    return inverse


def _factors(call: RowCall) -> Factors:
    alpha = call.tensors.alpha
    factors: Factors = _kernels().Factors(
        alpha=alpha,
        alpha_stride=0 if alpha is None or alpha.numel() == 1 else alpha.stride(0),
        alpha_value=float(call.scalars.alpha_value),
        inverse_normalizer=_inverse_normalizer(call),
    )
    return factors


def _kind(call: RowCall) -> RowKind:
    """Which kernel serves the call. That of KL rows: what a launch of KLs that is their first reads of the logits."""
    logits, ref_logits, s = call.logits, call.tensors.ref_logits, call.scalars
    if ref_logits is None:
        return "one row"
    if not call.is_first or s.smooths_uniformly or not logits.size(1):
        return "two rows"
    if not all(side.reads_reference for side in s.sides):
        return "two rows"
    return "KL" if _alike(logits, ref_logits) else "two rows"


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether the rows of both begin at as many columns after a boundary, of 16 bytes of ``x``."""
    group = _group(x)
    begins = [rows.data_ptr() // rows.element_size() % group for rows in (x, y)]
    return begins[0] == begins[1] and (len(x) == 1 or (x.stride(0) - y.stride(0)) % group == 0)


def _launch_rows(
    call: RowCall, row_losses: Tensor | None, factors: Factors, config: RowConfig | None
) -> None:
    ids = _negative_ids(call)
    kind, gradient = _kind(call), call.gradient is not None
    columns, itemsize = call.logits.size(1), call.logits.element_size()
    if config is None:
        config = row_config(
            columns, itemsize, kind=kind, gradient=gradient, ids=ids.length > 0 or call.differences,
            architecture=architecture(call.logits.device),
        )  # fmt: skip
    left = None
    if kind == "KL":
        left = _launch_kl(call, ids, row_losses, factors, config)
        config = left_config(columns)
    _launch_stream(call, ids, row_losses, factors, config, left)


def _launch_kl(
    call: RowCall,
    ids: _NegativeIds,
    row_losses: Tensor | None,
    factors: Factors,
    config: RowConfig,
) -> Tensor:
    """Returns, for every row, whether it is left to ``stream_kernel``: (N,) int32."""
    logits, t, s = call.logits, call.tensors, call.scalars
    rows, vocab = logits.shape
    ref_logits, gradient = t.ref_logits, call.gradient
    assert ref_logits is not None
    left = torch.empty(rows, dtype=torch.int32, device=logits.device)
    group = _group(logits)
    even = (
        logits.data_ptr() % 16 == 0
        and (rows == 1 or logits.stride(0) % group == 0)
        and vocab % group == 0
    )
    _kernels().kl_kernel[(rows,)](
        logits, logits.stride(0), ref_logits, ref_logits.stride(0), t.labels, t.weights, factors,
        ids.ascending, ids.stride, ids.length, ids.bits, ids.bits_stride, rows, vocab, call.vocab_offset,
        call.vocab_size, float(s.eps), math.log2(math.e) / s.temperature, 1.0 / s.temperature, s.ignore_index,
        row_losses, call.diagnostics, call.coefficients, gradient, 0 if gradient is None else gradient.stride(0),
        call.upstream, _upstream_stride(call), call.statistics, left,
        rows if even else min(map(_readable, (logits, ref_logits))),
        POSITIVE=s.positive_loss, NEGATIVE=s.negative_loss, KIND=int(call.kind), GRADIENT=gradient is not None,
        BLOCK=config.block, UNROLL=config.unroll, NEAR_KL=_near_kl(logits.dtype), IDS=ids.kind,
        FEW=0 < ids.length <= ids.chunk, CHUNK=ids.chunk, EVEN=even, ALIKE=gradient is None or _alike(logits, gradient),
        DIFFERENCES=call.differences, **options(config, architecture(logits.device)),
    )  # fmt: skip
    return left


def _readable(x: Tensor) -> int:
    """How many rows, from the first one, lie in the tensor's memory with all vectors of 16 bytes that they touch."""
    storage = x.untyped_storage()
    end = x.data_ptr() + ((len(x) - 1) * x.stride(0) + x.size(1)) * x.element_size()
    if x.data_ptr() // 16 * 16 < storage.data_ptr():
        return 0
    if -(-end // 16) * 16 <= storage.data_ptr() + storage.nbytes():
        return len(x)
    return len(x) - 1 if x.stride(0) >= x.size(1) else 0  # rows that overlap may all end there


def _near_kl(dtype: torch.dtype) -> float:
    """Up to which KL the gradient of a forward KL is computed by the form for p next to q.

    The other form, p - q, has a relative error of 1.5e-7/√(2 KL). It is to be a sixteenth of a rounding of ``dtype``,
    or 2e-6, as the short form's own error is 4e-7.
    """
    error = max(2e-6, torch.finfo(dtype).eps / 32)
    return (1.5e-7 / error) ** 2 / 2


def _upstream_stride(call: RowCall) -> int:
    return 0 if call.upstream is None or call.upstream.numel() == 1 else call.upstream.stride(0)


def _launch_stream(
    call: RowCall,
    ids: _NegativeIds,
    row_losses: Tensor | None,
    factors: Factors,
    config: RowConfig,
    left: Tensor | None,
) -> None:
    """Of all rows, or of those that ``kl_kernel`` left."""
    logits, t, s = call.logits, call.tensors, call.scalars
    rows, vocab = logits.shape
    ref_logits, gathered, gradient = t.ref_logits, call.gathered, call.gradient
    _kernels().stream_kernel[(rows if left is None else min(rows, _LEFT_PROGRAMS),)](
        logits, logits.stride(0), ref_logits, 0 if ref_logits is None else ref_logits.stride(0), t.labels, t.weights,
        factors, ids.ascending, ids.stride, ids.length, ids.bits, ids.bits_stride, rows, vocab, call.vocab_offset,
        call.vocab_size, float(s.eps), math.log(s.eps) if s.eps > 0 else -math.inf,
        -math.inf if s.nl_floor is None else max(float(s.nl_floor), _LOWEST),
        math.log2(math.e) / s.temperature, 1.0 / s.temperature, s.ignore_index,
        row_losses, call.diagnostics, call.coefficients, gradient, 0 if gradient is None else gradient.stride(0),
        call.upstream, _upstream_stride(call),
        call.statistics, gathered, 0 if gathered is None else gathered.stride(0),
        0 if gathered is None else gathered.size(0), call.partial_sums, call.total_sums, left,
        POSITIVE=s.positive_loss, NEGATIVE=s.negative_loss, UNIFORM=s.smooths_uniformly, IDS=ids.kind,
        KIND=int(call.kind), GRADIENT=gradient is not None, ALIKE=ref_logits is None or _alike(logits, ref_logits),
        GRADIENT_ALIKE=gradient is None or _alike(logits, gradient), BLOCK=config.block, CHUNK=ids.chunk,
        SHARDS=1 if gathered is None else 1 << (gathered.size(0) - 1).bit_length(), DIFFERENCES=call.differences,
        **options(config, architecture(logits.device)),
    )  # fmt: skip
