"""Time on any device: minima and medians of single calls, caches flushed on a GPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from tnt_kernels.bench.problem import Problem

#: Written between two calls on a GPU, so that none finds its inputs in the L2 cache: several times the largest.
_FLUSH_BYTES = 256 << 20


class Timing(NamedTuple):
    ms_min: float
    ms_median: float
    rounds: int


def time_calls(
    call: Callable[[], object],
    device: torch.device,
    *,
    setup: Callable[[], object] | None = None,
    seconds: float = 1.0,
    least: int = 3,
    most: int = 100,
) -> Timing:
    """Times ``call()`` as often as ``seconds`` allow, ``setup()`` not counted, after one call that is not.

    On a GPU the time is between two events on the current stream, so that of a launch is in it only as far as the
    device has to wait for it.
    """
    timer = _GpuTimer(device) if device.type == "cuda" else _CpuTimer()
    end = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        times: list[float] = []
        for i in range(most + 1):
            if setup is not None:
                setup()
            ms = timer.time(call)
            if i:  # the first warms up
                times.append(ms)
            if len(times) >= least and time.perf_counter() > end:
                break
    finally:
        if collecting:
            gc.enable()
    return Timing(min(times), statistics.median(times), len(times))


class _CpuTimer:
    def time(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()  # drops the result: what a call allocates it also frees, within the time
        return (time.perf_counter() - start) * 1e3


class _GpuTimer:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, call: Callable[[], object]) -> float:
        self.flush.zero_()  # the device is busy with it while the host launches what follows
        self.start.record()
        call()
        self.end.record()
        torch.cuda.synchronize(self.device)
        return float(self.start.elapsed_time(self.end))


class Bandwidth(NamedTuple):
    variant: str
    gb_per_s: float
    timing: Timing


def bandwidths(problem: Problem, seconds: float = 0.5) -> list[Bandwidth]:
    """Copy and triad over arrays of the logits' size: what any kernel is measured against.

    The triad is c = a + b, two reads and one write, as a training step's, over an input or elsewhere. 16-bit logits are
    taken as half as many float32, because only the bytes matter.
    """
    a, b = (
        x.view(-1)[: x.numel() // 2 * 2].view(torch.float32)
        for x in (problem.logits, problem.ref_logits)
    )
    c = torch.zeros_like(a)
    n = a.numel() * a.element_size()
    kinds: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: c.copy_(b)),
        "triad over an input": (3, lambda: torch.add(a, b, out=a)),
        "triad elsewhere": (3, lambda: torch.add(a, b, out=c)),
    }
    found = []
    for variant, (moved, call) in kinds.items():
        timing = time_calls(call, a.device, setup=problem.restore, seconds=seconds)
        found.append(Bandwidth(variant, moved * n / timing.ms_min / 1e6, timing))
    problem.restore()
    return found
