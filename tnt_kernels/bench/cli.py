"""``python -m tnt_kernels bench``: the library against what people write, on this machine, in two minutes."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tnt_kernels
from tnt_kernels.bench.measure import bandwidths
from tnt_kernels.bench.problem import Problem, Size, make_problem
from tnt_kernels.bench.steps import Step, library_backends, library_step, measure_step

MIB = 1 << 20
#: (size, methods), most important first: what the time does not suffice for is left out from the end.
CPU_CASES = (
    (Size(256, 32000, "float32"), ("tnff", "tnrf", "ul+ll")),
    (Size(256, 128256, "bfloat16"), ("tnff",)),
    (Size(256, 32000, "bfloat16"), ("tnff",)),
    (Size(256, 128256, "float32"), ("tnff",)),
)
GPU_CASES = (
    (Size(4096, 128256, "bfloat16"), ("tnff", "tnrf", "ul+ll")),
    (Size(4096, 32000, "bfloat16"), ("tnff",)),
    (Size(4096, 128256, "float32"), ("tnff",)),
    (Size(4096, 262144, "bfloat16"), ("tnff",)),
)
TINY_CASES = (
    (Size(16, 2000, "float32"), ("tnff", "ul+ll")),
    (Size(16, 2000, "bfloat16"), ("tnff",)),
)
#: Of one contender. Compiling takes as long again and again, so it is tried on the first method of a size.
SECONDS = 1.5


def steps(problem: Problem, method: str, first: bool) -> Iterator[Step]:
    for backend in library_backends(problem.logits):
        for contender in ("in place", "fresh"):
            yield library_step(contender, method, backend)
    yield library_step("naive", method)
    if first:
        yield library_step("compiled", method)


def fitting(size: Size, device: torch.device) -> Size:
    """With fewer rows where the naive loss's ten float32 copies would not fit into a GPU's free memory."""
    if device.type != "cuda":
        return size
    free, _ = torch.cuda.mem_get_info(device)
    return size._replace(rows=max(1, min(size.rows, free // (12 * 4 * size.vocab))))


def verdict(record: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """A step of the library against the fastest of the others that ran."""
    if "failed" in record:
        return str(record["failed"])
    if record["backend"] is None:
        return ""
    ran = [x for x in others if "ms_min" in x]
    if not ran:
        return "nothing to compare with"
    best = min(ran, key=lambda x: x["ms_min"])
    ratio = best["ms_min"] / record["ms_min"]
    if ratio >= 1.05:
        text = f"{ratio:.1f}x as fast as {best['contender']}"
    elif ratio > 1 / 1.05:
        text = f"as fast as {best['contender']}"
    else:
        text = f"SLOWER than {best['contender']}: {ratio:.2f}x"
    mine, least = record.get("bytes_beyond_inputs"), [x.get("bytes_beyond_inputs") for x in ran]
    if mine is None or None in least:
        return text
    smallest = min(x for x in least if x is not None)
    return f"{text}, {'less' if mine <= smallest else 'MORE'} memory"


HEAD = f"{'':<22}{'ms':>9}{'of floor':>10}{'naive/this':>12}{'MiB':>9}{'error':>9}  verdict"


def line(record: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    name = record["contender"]
    name = f"tnt_loss, {name}" if record["backend"] else name
    naive = next((x for x in records if x["contender"] == "naive" and "ms_min" in x), None)

    def cell(key: str, form: str, scale: float = 1.0) -> str:
        value = record.get(key)
        return "-" if value is None else format(value * scale, form)

    ratio = f"{naive['ms_min'] / record['ms_min']:.1f}" if naive and "ms_min" in record else "-"
    others = [x for x in records if x["backend"] is None]
    return (
        f"{name:<22}{cell('ms_min', '.3g'):>9}{cell('fraction_of_floor', '.3f'):>10}{ratio:>12}"
        f"{cell('bytes_beyond_inputs', '.1f', 1 / MIB):>9}{cell('gradient_error', '.0e'):>9}"
        f"  {verdict(record, others)}"
    ).rstrip()


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and date, as every results file has them."""
    try:
        from tnt_kernels import _C

        native: dict[str, str | None] = {
            "instruction_set": _C.selected_instruction_set(),
            "compiler": _C.compiler,
        }
    except ImportError:
        native = {"instruction_set": None, "compiler": None}
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processor": platform.processor() or platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton,
            "tnt_kernels": tnt_kernels.__version__,
            **native,
        },
    }


def measure_all(
    cases: Sequence[tuple[Size, Sequence[str]]],
    device: torch.device,
    budget: float,
    seconds: float,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Every case that the budget, in seconds, allows; ``show`` is given the table a line at a time."""
    end = time.monotonic() + budget
    records: list[dict[str, Any]] = []
    left_out: list[str] = []
    found: list[dict[str, Any]] = []
    for size, methods in cases:
        if time.monotonic() > end:
            left_out.append(str(size))
            continue
        size = fitting(size, device)
        torch._dynamo.reset()  # what was compiled for other shapes
        problem = make_problem(size, device)
        speeds = bandwidths(problem, seconds / 5)
        best = max(speeds, key=lambda b: b.gb_per_s)
        found += [{**size._asdict(), "variant": b.variant, "gb_per_s": b.gb_per_s} for b in speeds]
        for i, method in enumerate(methods):
            name = f"{method}, {size.rows} rows, V = {size.vocab}, {size.dtype}"
            if time.monotonic() > end:
                left_out.append(name)
                continue
            show(f"\n{name}; {best.variant}: {best.gb_per_s:.3g} GB/s\n{HEAD}")
            here = [
                measure_step(step, problem, best.gb_per_s, seconds)
                for step in steps(problem, method, i == 0)
            ]
            records += here
            for record in here:
                show(line(record, here))
    return {**environment(device), "bandwidth": found, "cases": records, "left_out": left_out}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tnt-kernels bench", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument(
        "--seconds", type=float, default=100.0, help="start nothing new after (default: 100)"
    )
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    a = parser.parse_args(argv)
    cases = TINY_CASES if a.tiny else GPU_CASES if a.device.type == "cuda" else CPU_CASES
    print(
        f"Loss and gradient of tnt_kernels {tnt_kernels.__version__} against plain PyTorch in float32 (naive) and "
        f"torch.compile of it; torch {torch.__version__}, {torch.get_num_threads()} threads.\n"
        "ms: the fastest call. of floor: what the bytes that must move would take, at the best copy or triad here,\n"
        "over that. MiB: peak memory beyond the inputs. error: the gradient's, against float64, of a row's largest."
    )
    results = measure_all(cases, a.device, a.seconds, 0.02 if a.tiny else SECONDS, print)
    for name in results["left_out"]:
        print(f"left out, the time is over: {name}")
    if a.out:
        a.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(r["backend"] and "failed" in r for r in results["cases"]))
