"""Peak memory beyond the inputs of one training step, in a process of its own.

``python -m benchmarks.memory CONTENDER ROWS VOCAB DTYPE`` prints one JSON object. The figure is the
process's resident peak (``VmHWM``, reset through ``/proc/self/clear_refs``) less what was resident
just before the step: what PyTorch, the kernels, their threads and the allocator really took. The
same reading is first made of an allocation of known size, and printed with it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import THREADS
from benchmarks.contenders import make_loss, training_step
from benchmarks.problem import Size, make_problem

KNOWN = 64 << 20  # bytes, of the allocation that shows that the reading is right


def _status(field: str) -> int:
    """A size in bytes from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def peak_beyond(call: Callable[[], object]) -> int:
    """Bytes by which the resident memory rose above its present size during ``call()``.

    The kernel adds pages up per CPU and shows the sum to within some 100 KiB.
    """
    gc.collect()
    # Free memory that malloc holds would hide as much of what the call takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def measure(contender: str, size: Size) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    loss_function = make_loss(contender, "tnff")

    # A first call loads code and starts threads. Where that compiles for one shape, it is this one.
    small = size if contender == "compiled" else size._replace(rows=2)
    training_step(loss_function, make_problem(small))

    problem = make_problem(size)
    known = peak_beyond(lambda: torch.empty(KNOWN, dtype=torch.uint8).fill_(1))
    peak = peak_beyond(lambda: training_step(loss_function, problem))
    return {
        "contender": contender,
        **size._asdict(),
        "bytes_beyond_inputs": peak,
        "gradient_bytes": size.bytes,
        "known_bytes": KNOWN,
        "known_bytes_measured": known,
    }


def measure_in_process(contender: str, size: Size) -> dict[str, Any]:
    """``measure`` in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", contender, *map(str, size)]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    fields: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return fields


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("rows", type=int)
    parser.add_argument("vocab", type=int)
    parser.add_argument("dtype")
    a = parser.parse_args()
    print(json.dumps(measure(a.contender, Size(a.rows, a.vocab, a.dtype))))


if __name__ == "__main__":
    main()
