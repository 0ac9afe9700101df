"""Measures everything and writes ``cpu.json``, from which ``report`` makes the tables and the plot.

``python -m benchmarks.run`` takes some minutes, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from benchmarks import report
from benchmarks.memory import measure_in_process
from benchmarks.problem import QUICK_SIZES, SIZES
from benchmarks.results import assemble

HERE = Path(__file__).parent
MEMORY_CONTENDERS = ("in place", "fresh", "naive", "compiled")


class _Progress:
    """A pytest plugin: one bar in place of dots."""

    def __init__(self, stream: Any) -> None:
        self.bar = tqdm(desc="time", unit="case", file=stream)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.bar.reset(total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.bar.set_postfix_str(nodeid.partition("::")[2])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.bar.update()

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return ("passed", "", "") if report.passed else None

    def pytest_unconfigure(self) -> None:
        self.bar.close()


def measure_times(quick: bool) -> dict[str, Any]:
    """Runs test_cpu.py; returns pytest-benchmark's report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        arguments = [
            str(HERE / "test_cpu.py"),
            "-qq",
            "-p", "no:cacheprovider",
            "-W", "ignore::DeprecationWarning",
            "--benchmark-only",
            "--benchmark-disable-gc",
            "--benchmark-quiet",
            f"--benchmark-json={path}",
            *(["--quick"] if quick else []),
        ]  # fmt: skip
        # pytest captures what is printed while a test runs; the bar must not be.
        with os.fdopen(os.dup(sys.stderr.fileno()), "w") as stream:
            status = pytest.main(arguments, plugins=[_Progress(stream)])
        if status != pytest.ExitCode.OK:
            sys.exit(f"benchmarks: the measurement failed, pytest says {status!r}")
        times: dict[str, Any] = json.loads(path.read_text())
        return times


def measure_memory(quick: bool) -> list[dict[str, Any]]:
    sizes = QUICK_SIZES if quick else SIZES
    jobs = [(contender, size) for size in sizes for contender in MEMORY_CONTENDERS]
    return [measure_in_process(*job) for job in tqdm(jobs, desc="memory", unit="case")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, to see that all runs; the figures mean nothing, and go to build/benchmarks",
    )
    parser.add_argument("--out", type=Path, help=f"folder of the results (default: {report.RESULTS})")
    a = parser.parse_args()
    out: Path = a.out or (report.ROOT / "build" / "benchmarks" if a.quick else report.RESULTS)

    results = assemble(measure_times(a.quick), measure_memory(a.quick), a.quick)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "cpu.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path}")
    if out.resolve() == report.RESULTS.resolve():
        report.write(path)
    else:
        report.write_plot(path)
    print(report.target_table(results))


if __name__ == "__main__":
    main()
