"""The measurements on a CPU, one a test. ``benchmarks/results.py`` turns them into ratios.

Minima are what counts, of explicitly many rounds. A step in place overwrites its logits, so these
are restored before every round, outside the time, and before every other measurement that is
compared with it, so that all start from the same caches.
"""

from __future__ import annotations

import math
import resource
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import THREADS
from benchmarks.sizes import DISTANCES, QUICK_SWEEP, SPARSE, SWEEP
from tnt_kernels import _C
from tnt_kernels.bench.contenders import (
    forward,
    make_loss,
    model_output,
    training_step,
)
from tnt_kernels.bench.oracle import check_gradient
from tnt_kernels.bench.problem import Negatives, Problem, Size, floor_bytes, make_problem

Measure = Callable[..., None]


def rounds(contender: str, size: Size) -> int:
    """As many as a run of a few minutes allows: some of these take seconds each."""
    small = size.rows * size.vocab < 50_000_000
    if "naive" in contender:
        return 5 if small else 3
    if contender == "compiled":
        return 7 if small else 4
    return 30 if small else 12


def minor_faults(call: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def measure_step(
    measure: Measure, problem: Problem, contender: str, method: str, negatives: Negatives = "none"
) -> None:
    loss_function = make_loss(contender, method)
    with_gradient = "forward" not in contender

    def call() -> Tensor:
        return (training_step if with_gradient else forward)(loss_function, problem)

    problem.restore()
    if with_gradient:
        check_gradient(call(), problem, method)
    else:
        call()
    problem.restore()
    faults = minor_faults(call)  # after a first call, so that these are every call's
    share = problem.active_share
    measure(
        call,
        setup=problem.restore,
        rounds=rounds(contender, problem.size),
        kind="step",
        contender=contender,
        method=method,
        negatives=negatives,
        active_share=share,
        floor_bytes=floor_bytes(problem.size, method, share, with_gradient),
        minor_faults=faults,
        **problem.size._asdict(),
    )


def is_half(size: Size) -> bool:
    return size.dtype == "float16"


def is_swept(size: Size) -> bool:
    return size in (*SWEEP, *QUICK_SWEEP)


def is_main(size: Size) -> bool:
    return not (is_half(size) or is_swept(size))


def is_first(size: Size) -> bool:
    """The size at which the other methods are compared, for want of time."""
    return is_main(size) and size.dtype == "float32" and size.vocab < 100_000


# --- what the machine can do ---------------------------------------------------------------------


def _halves(x: Tensor) -> list[np.ndarray]:
    return np.array_split(x.numpy().ravel(), THREADS)


@pytest.mark.parametrize("writer", ["torch", "numpy"])
@pytest.mark.parametrize("target", ["over an input", "elsewhere"])
def test_bandwidth(measure: Measure, problem: Problem, writer: str, target: str) -> None:
    """c = a + b over arrays of the logits' size: two reads, one write. The best variant is the floor.

    16-bit logits are added as half as many float32, because only the bytes matter.
    """
    a, b = (x.flatten().view(torch.float32) for x in (problem.logits, problem.ref_logits))
    out = a if target == "over an input" else torch.zeros_like(a)
    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(zip(_halves(a), _halves(b), _halves(out), strict=True))

        def numpy_add() -> None:
            list(pool.map(lambda part: np.add(part[0], part[1], out=part[2]), parts))

        measure(
            numpy_add if writer == "numpy" else lambda: torch.add(a, b, out=out),
            setup=problem.restore,
            rounds=10 if is_swept(problem.size) else 30,
            kind="bandwidth",
            contender=f"{writer}, {target}",
            floor_bytes=3 * problem.size.bytes,
            **problem.size._asdict(),
        )


@pytest.mark.sizes.with_args(lambda size: not is_swept(size))
@pytest.mark.parametrize("memory", ["resident", "new"])
def test_first_touch(measure: Measure, problem: Problem, memory: str) -> None:
    """Writing a gradient's worth of zeros: the difference is what the pages of a new one cost."""
    shape, dtype = problem.logits.shape, problem.logits.dtype
    resident = torch.zeros(shape, dtype=dtype)

    def call() -> Tensor:
        return (resident if memory == "resident" else torch.empty(shape, dtype=dtype)).zero_()

    call()
    faults = minor_faults(call)
    measure(
        call,
        rounds=20,
        kind="first touch",
        contender=memory,
        minor_faults=faults,
        **problem.size._asdict(),
    )


# --- training steps ------------------------------------------------------------------------------


@pytest.mark.sizes.with_args(is_main)
@pytest.mark.parametrize(
    "contender", ["in place", "fresh", "forward", "naive", "naive forward", "compiled"]
)
def test_tnff(measure: Measure, problem: Problem, contender: str) -> None:
    measure_step(measure, problem, contender, "tnff")


@pytest.mark.sizes.with_args(is_main)
@pytest.mark.parametrize("contender", ["in place", "fresh"])
@pytest.mark.parametrize("method", ["tnrf", "ul+ll"])
def test_other_methods(measure: Measure, problem: Problem, method: str, contender: str) -> None:
    measure_step(measure, problem, contender, method)


@pytest.mark.sizes.with_args(is_first)
@pytest.mark.parametrize("contender", ["naive", "compiled"])
@pytest.mark.parametrize("method", ["tnrf", "ul+ll"])
def test_other_methods_peers(
    measure: Measure, problem: Problem, method: str, contender: str
) -> None:
    measure_step(measure, problem, contender, method)


@pytest.mark.sizes.with_args(is_main)
def test_negative_likelihood(measure: Measure, problem: Problem) -> None:
    """With "ul+ll", all losses that read the policy alone."""
    measure_step(measure, problem, "in place", "nl+ll")


@pytest.mark.sizes.with_args(is_half)
@pytest.mark.parametrize("contender", ["in place", "fresh", "naive"])
def test_float16(measure: Measure, problem: Problem, contender: str) -> None:
    measure_step(measure, problem, contender, "tnff")


@pytest.mark.sizes.with_args(is_swept)
@pytest.mark.parametrize("contender", ["in place", "fresh", "naive", "compiled"])
def test_sweep(measure: Measure, problem: Problem, contender: str) -> None:
    """Over the vocabulary and over the rows."""
    measure_step(measure, problem, contender, "tnff")


@pytest.mark.sizes.with_args(is_main)
def test_sparse(measure: Measure, problem: Problem) -> None:
    """One row in ten is active: the others cost their zeros."""
    measure_step(measure, problem.with_active_share(SPARSE), "in place", "tnff")


@pytest.mark.sizes.with_args(is_main)
@pytest.mark.parametrize("negatives", ["64 a row", "4000 shared"])
def test_negatives(measure: Measure, problem: Problem, negatives: Negatives) -> None:
    measure_step(measure, problem.with_negatives(negatives), "in place", "tnff", negatives)


def block_paths(problem: Problem) -> list[float]:
    """Shares of the blocks whose |y| are all below 1, 4 and 16, and of the others (docs/numerics.md), by some rows."""
    rows = 32
    z, r = (x[:rows].float().log_softmax(-1) for x in (problem.original, problem.ref_logits))
    block = 4 * {"avx512": 16, "avx2": 8, "baseline": 4}[_C.selected_instruction_set()]
    y = (z - r).abs()[:, : problem.size.vocab // block * block]
    greatest = y.unflatten(-1, (-1, block)).amax(-1)
    path = torch.bucketize(greatest, torch.tensor([1.0, 4.0, 16.0]), right=True)
    return (path.flatten().bincount(minlength=4) / path.numel()).tolist()


@pytest.mark.sizes.with_args(is_main)
def test_distances(measure: Measure, problem: Problem) -> None:
    """What a step costs as the policy leaves the reference, in place.

    A kernel may treat close pairs of logits otherwise than distant ones. Distances and methods take turns, on the same
    memory, because their ratios are what is asked for.
    """
    size = problem.size
    apart = {
        distance: replace(problem, original=make_problem(size, distance=distance).original)
        for distance in DISTANCES
    }
    losses = {method: make_loss("in place", method) for method in ("tnff", "tnrr")}
    ms = {method: {str(distance): math.inf for distance in DISTANCES} for method in losses}
    for method, loss_function in losses.items():
        for distant in apart.values():
            distant.restore()
            check_gradient(training_step(loss_function, distant), distant, method)

    def turn() -> None:
        for distance, distant in apart.items():
            for method, loss_function in losses.items():
                distant.restore()
                start = time.perf_counter()
                training_step(loss_function, distant)
                taken = (time.perf_counter() - start) * 1e3
                ms[method][str(distance)] = min(ms[method][str(distance)], taken)

    measure(
        turn,
        rounds=rounds("in place", size),
        kind="distances",
        by_distance=ms,
        paths={str(distance): block_paths(distant) for distance, distant in apart.items()},
        floor_bytes=floor_bytes(size, "tnff", 1.0, True),
        **size._asdict(),
    )
    problem.restore()


# --- the cost of a call --------------------------------------------------------------------------


class _Empty(torch.autograd.Function):
    """The least that a loss with a gradient costs in Python."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, logits: Tensor) -> Tensor:
        ctx.shape = logits.shape  # type: ignore[attr-defined]
        return logits.new_empty(())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> Tensor:
        return upstream.new_empty(ctx.shape)  # type: ignore[attr-defined]


def test_overhead(measure: Measure) -> None:
    """Forward and backward of one row of eight: time in which no work of note is done.

    The contenders take turns, because a machine that others use, too, is not equally fast from second to second.
    """
    logits, ref_logits = torch.randn(1, 8), torch.randn(1, 8)
    labels, weights = torch.tensor([3]), torch.tensor([-1.0])
    losses = {name: make_loss(name, "tnff") for name in ("fresh", "in place", "naive")}
    steps: dict[str, Callable[[], object]] = {
        "empty": lambda: _Empty.apply(model_output(logits)).backward(),  # type: ignore[no-untyped-call]
        **{
            name: lambda loss=loss: loss(
                model_output(logits), ref_logits, labels, weights, None
            ).backward()
            for name, loss in losses.items()
        },
    }
    us = dict.fromkeys(steps, math.inf)

    def turn() -> None:
        for name, step in steps.items():
            us[name] = min(us[name], timeit.timeit(step, number=100) * 1e4)

    measure(turn, rounds=200, kind="overhead", us=us, rows=1, vocab=8, dtype="float32")
