"""The measurements of ``linear_tnt_loss`` on a CPU, one a test, into the same report as ``test_cpu.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.linear import (
    CONTENDERS,
    QUICK_SIZES,
    QUICK_SWEEP,
    SIZES,
    SPARSE,
    SWEEP,
    SWEEP_CONTENDERS,
    Floor,
    LinearProblem,
    check,
    make_problem,
    make_step,
    posed,
)

Measure = Callable[..., None]


@pytest.fixture(scope="module", params=range(len(SIZES)), ids=[size.dtype for size in SIZES])
def linear_problem(request: pytest.FixtureRequest) -> LinearProblem:
    sizes = QUICK_SIZES if request.config.getoption("--quick") else SIZES
    return make_problem(sizes[request.param])


def measure_step(measure: Measure, p: LinearProblem, contender: str, share: float) -> None:
    step = make_step(contender)
    gradients = step(p)
    chunking = str(step.chunking(p)) if isinstance(step, Floor) else ""
    if contender != "floor":
        check(gradients, posed(p, contender))
    del gradients
    measure(
        lambda: step(p),
        rounds=5 if len(p.labels) < 10_000 else 3,
        kind="linear",
        contender=contender,
        active_share=share,
        rows=len(p.labels),
        hidden=p.weight.size(1),
        vocab=p.weight.size(0),
        dtype=str(p.weight.dtype).removeprefix("torch."),
        chunking=chunking,
    )


@pytest.mark.parametrize("contender", CONTENDERS)
def test_linear(measure: Measure, linear_problem: LinearProblem, contender: str) -> None:
    if contender == "pairs" and linear_problem.weight.dtype != torch.bfloat16:
        pytest.skip("of bfloat16 alone")
    measure_step(measure, linear_problem, contender, 1.0)


@pytest.mark.parametrize("contender", ["floor", "fused"])
def test_linear_sparse(measure: Measure, linear_problem: LinearProblem, contender: str) -> None:
    """One row in four is active."""
    measure_step(measure, linear_problem.with_active_share(SPARSE), contender, SPARSE)


@pytest.mark.parametrize("contender", SWEEP_CONTENDERS)
@pytest.mark.parametrize("index", range(len(SWEEP)))
def test_linear_sweep(
    request: pytest.FixtureRequest, measure: Measure, index: int, contender: str
) -> None:
    """Over the tokens of a batch, at a smaller head."""
    sizes = QUICK_SWEEP if request.config.getoption("--quick") else SWEEP
    if index >= len(sizes):
        pytest.skip("a quick run")
    measure_step(measure, make_problem(sizes[index]), contender, 1.0)
