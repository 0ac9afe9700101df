"""Measures everything and writes ``cpu.json``, from which ``report`` makes the tables and the plot.

``python -m benchmarks.run`` takes some minutes, and wants a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import THREADS, accuracy, linear, report, scale
from benchmarks.results import assemble, linear_part
from benchmarks.sizes import QUICK_SIZES, QUICK_SWEEP, ROWS, SIZES, SWEEP
from tnt_kernels.bench.memory import measure_in_process

TESTS = "benchmarks/test_cpu.py"
LINEAR_TESTS = "benchmarks/test_linear.py"
MEMORY_CONTENDERS = ("in place", "fresh", "naive", "compiled")


def measure_times(
    quick: bool,
    tests: Sequence[str] = (TESTS, LINEAR_TESTS),
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Runs the tests in a process of their own; returns pytest-benchmark's report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        command = [
            sys.executable, "-m", "pytest", *tests,
            "-qq", "-s", "-p", "benchmarks.progress", "-p", "no:cacheprovider",
            "-W", "ignore::DeprecationWarning",
            "--benchmark-only", "--benchmark-disable-gc", "--benchmark-quiet",
            f"--benchmark-json={path}",
            *(["--quick"] if quick else []),
        ]  # fmt: skip
        status = subprocess.run(command, cwd=report.ROOT, env=os.environ | (environment or {}))
        if status.returncode:
            sys.exit(f"benchmarks: the measurement failed, pytest exited with {status.returncode}")
        times: dict[str, Any] = json.loads(path.read_text())
        return times


def measure_huge_pages(quick: bool) -> dict[str, Any]:
    """What allocates, once more, with PyTorch asking for huge pages: one page fault for 512."""
    size = QUICK_SIZES[0] if quick else max(SIZES, key=lambda size: size.bytes)
    names = (
        "test_first_touch[{}-resident]",
        "test_first_touch[{}-new]",
        "test_tnff[{}-fresh]",
        "test_tnff[{}-naive]",
    )
    tests = [f"{TESTS}::{name.format(size)}" for name in names]
    return measure_times(quick, tests, {"THP_MEM_ALLOC_ENABLE": "1"})


def measure_memory(quick: bool) -> list[dict[str, Any]]:
    """Two processes at a time: a peak is a process's own."""
    sizes = QUICK_SIZES if quick else SIZES
    swept = QUICK_SWEEP if quick else SWEEP
    jobs = [(contender, size) for size in sizes for contender in MEMORY_CONTENDERS]
    # Over the tokens; compiled code is compiled for one shape, which takes the most time here.
    jobs += [
        (contender, size)
        for size in swept
        if size.rows in (*ROWS, 8)
        for contender in MEMORY_CONTENDERS
    ]
    return _in_pairs("memory", jobs, lambda job: measure_in_process(*job, THREADS))


def measure_linear_memory(quick: bool) -> list[dict[str, Any]]:
    sizes = (*linear.QUICK_SIZES, *linear.QUICK_SWEEP) if quick else (*linear.SIZES, *linear.SWEEP)
    jobs = [(contender, size) for size in sizes for contender in linear.MEMORY_CONTENDERS]
    return _in_pairs("memory, linear", jobs, lambda job: linear.measure_memory_in_process(*job))


def _in_pairs(
    what: str, jobs: list[Any], call: Callable[[Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(2) as pool:
        return list(tqdm(pool.map(call, jobs), desc=what, unit="case", total=len(jobs)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, to see that all runs; the figures mean nothing, and go to build/benchmarks",
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder of the results (default: {report.RESULTS})"
    )
    parser.add_argument(
        "--only-linear",
        action="store_true",
        help="the fused linear loss alone; the other figures stay as they are in the results",
    )
    a = parser.parse_args()
    out: Path = a.out or (report.ROOT / "build" / "benchmarks" if a.quick else report.RESULTS)

    path = out / "cpu.json"
    if a.only_linear:
        times = measure_times(a.quick, (LINEAR_TESTS,))
        results = {
            **report.load(path),
            "linear": linear_part(times, measure_linear_memory(a.quick)),
        }
    else:
        results = assemble(
            measure_times(a.quick),
            measure_huge_pages(a.quick),
            measure_memory(a.quick),
            a.quick,
            measure_linear_memory(a.quick),
            accuracy.measure(accuracy.QUICK_SIZE if a.quick else accuracy.SIZE),
        )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path}")
    print(report.target_table(results))
    if out.resolve() == report.RESULTS.resolve():
        report.write(path)
        scale.write()
    else:
        report.write_plots(path)


if __name__ == "__main__":
    main()
