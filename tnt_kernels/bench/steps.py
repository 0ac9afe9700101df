"""One contender on one problem: checked, then timed, then its memory measured; one record of plain data."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnt_kernels.backends import BACKENDS
from tnt_kernels.bench.contenders import Loss, forward, make_loss, training_step
from tnt_kernels.bench.measure import time_calls
from tnt_kernels.bench.memory import can_measure, peak_beyond
from tnt_kernels.bench.oracle import TOLERANCE, Truth, expected, gradient_error
from tnt_kernels.bench.problem import Problem, floor_bytes

#: A gradient this far off its row's largest entry is of another loss. What computes in 16 bits is held to no more.
ANY_TOLERANCE = 0.5


class Step(NamedTuple):
    """Who computes what, and what it is held to."""

    contender: str
    method: str
    loss: Loss
    backend: str | None = None
    tolerance: float | None = None  # None: that of the logits' dtype
    truth: Truth | None = None  # None: that of the method
    work: str = ""  # where it is other work than the method's: "plain KL", on all rows

    @property
    def with_gradient(self) -> bool:
        return "forward" not in self.contender


def library_backends(logits: Tensor) -> list[str]:
    """The backends that serve these logits, fastest first; plain PyTorch only where there is no other."""
    serving = [name for name, backend in BACKENDS.items() if not backend.why_not(logits)]
    return serving[:-1] if len(serving) > 1 else serving


def library_step(contender: str, method: str, backend: str | None = None) -> Step:
    """A step of ``contenders.CONTENDERS``."""
    tolerance = ANY_TOLERANCE if contender == "naive, narrow" else None
    return Step(contender, method, make_loss(contender, method, backend), backend, tolerance)


def measure_step(
    step: Step,
    problem: Problem,
    gb_per_s: float,
    seconds: float = 1.0,
    negatives: str = "none",
) -> dict[str, Any]:
    """The record of one step. Where it cannot run, or is wrong, ``failed`` says why and there is no time."""
    share = problem.active_share
    record: dict[str, Any] = {
        "contender": step.contender,
        "backend": step.backend,
        "method": step.method,
        "work": step.work,
        "negatives": negatives,
        "active_share": round(share, 4),
        **problem.size._asdict(),
    }
    try:
        _measure(step, problem, gb_per_s, seconds, share, record)
    except Exception as error:  # whatever a peer may raise: out of memory, a compiler's, its own
        lines = str(error).strip().splitlines() or [""]
        record["failed"] = f"{type(error).__name__}: {lines[0][:200]}"
    if problem.logits.is_cuda:
        torch.cuda.empty_cache()
    return record


def _measure(
    step: Step,
    problem: Problem,
    gb_per_s: float,
    seconds: float,
    share: float,
    record: dict[str, Any],
) -> None:
    device = problem.logits.device
    call = partial(training_step if step.with_gradient else forward, step.loss, problem)
    problem.restore()
    if step.with_gradient:
        truth = step.truth or (lambda problem, rows: expected(problem, step.method, rows))
        error = gradient_error(call(), problem, truth)
        allowed = TOLERANCE[problem.logits.dtype] if step.tolerance is None else step.tolerance
        record["gradient_error"] = error
        if not error <= allowed:
            raise ValueError(
                f"wrong gradient, off by {error:.3g} of its largest entry, allowed {allowed:.3g}"
            )
    else:
        call()
    problem.restore()
    if can_measure(device):
        record["bytes_beyond_inputs"] = peak_beyond(call, device)
    timing = time_calls(call, device, setup=problem.restore, seconds=seconds)
    floor_ms = floor_bytes(problem.size, step.method, share, step.with_gradient) / gb_per_s / 1e6
    record |= {
        **timing._asdict(),
        "floor_ms": floor_ms,
        "fraction_of_floor": floor_ms / timing.ms_min,
    }
