from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import process
import pytest
from oracle import BACKENDS, INTERPRETED, MISSING

import tnt_kernels.backends.triton as triton
from tnt_kernels.backends.triton.config import RowConfig


def pytest_configure() -> None:
    process.prepare()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the compilers say that the GPU kernels take."""
    reports = terminalreporter.stats.get("passed", [])
    lines = [value for r in reports for name, value in r.user_properties if name == "resources"]
    if lines:
        terminalreporter.section("registers, stack, spills and shared memory of the GPU kernels")
        for line in sorted(lines):
            terminalreporter.write_line(line)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param in MISSING:
        pytest.skip(MISSING[request.param])
    return request.param


@pytest.fixture
def cpu() -> str:
    """The compiled kernels, for what the other backend does not promise."""
    if INTERPRETED:
        pytest.skip("this process runs the Triton kernels")
    if "cpu" in MISSING:
        pytest.skip(MISSING["cpu"])
    return "cpu"


@pytest.fixture(autouse=INTERPRETED)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a row at a small V, and a ragged one: simulated instructions take microseconds each."""

    def small(vocab: int, *_: int, **__: object) -> RowConfig:
        return RowConfig(128 if vocab < 2000 else 1024, 4)

    monkeypatch.setattr(triton, "row_config", small)
    monkeypatch.setattr(triton, "left_config", small)


@pytest.fixture(autouse=INTERPRETED)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused multiply-add rounds once, as on a GPU; the simulator's rounds the product, too."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(
        self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle
    ) -> TensorHandle:
        exact = np.float64(x.data) * np.float64(y.data) + np.float64(z.data)
        return TensorHandle(np.asarray(exact).astype(x.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)


@pytest.fixture
def said() -> Iterator[Callable[[], list[str]]]:
    """What the library warns of."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("tnt_kernels")
    logger.addHandler(handler)
    yield lambda: [record.getMessage() for record in records]
    logger.removeHandler(handler)
