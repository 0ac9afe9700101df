"""Fixtures of the measurements: one pair of logits in memory at a time, checked before they are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import THREADS
from benchmarks.sizes import HALF, QUICK_HALF, QUICK_SIZES, QUICK_SWEEP, SIZES, SWEEP
from tnt_kernels.bench.problem import Problem, Size, make_problem


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes, few rounds: does it run?")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``problem`` comes in all sizes, or in those that ``@pytest.mark.sizes`` picks from them."""
    if "problem" not in metafunc.fixturenames:
        return
    quick = metafunc.config.getoption("--quick")
    sizes = (*QUICK_SIZES, QUICK_HALF, *QUICK_SWEEP) if quick else (*SIZES, HALF, *SWEEP)
    marker = metafunc.definition.get_closest_marker("sizes")
    wanted: Callable[[Size], bool] = marker.args[0] if marker else lambda size: True
    # The scope makes pytest group the tests by size, so that each problem is made once.
    metafunc.parametrize(
        "problem", [s for s in sizes if wanted(s)], ids=str, indirect=True, scope="session"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sizes(predicate): the sizes that a measurement is made at")
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def problem(request: pytest.FixtureRequest) -> Problem:
    torch._dynamo.reset()  # what was compiled for other shapes
    return make_problem(request.param)


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Callable[..., None]:
    """``measure(call, rounds=, setup=, **case)``: times ``call()`` and files it under ``case``."""
    quick = request.config.getoption("--quick")

    def run(
        call: Callable[[], object],
        *,
        rounds: int,
        setup: Callable[[], None] | None = None,
        iterations: int = 1,
        **case: Any,
    ) -> None:
        benchmark.extra_info.update(case)

        def timed() -> None:
            call()  # drops the result: what a call allocates it also frees, within the time

        benchmark.pedantic(  # type: ignore[no-untyped-call]
            timed,
            setup=setup,
            rounds=min(rounds, 2) if quick else rounds,
            warmup_rounds=0 if rounds < 10 else 2,  # the slow ones have been called before
            iterations=min(iterations, 10) if quick else iterations,
        )

    return run
