"""Peak memory beyond the inputs of one training step.

On a GPU it is the allocator's peak. On a CPU it is the process's resident peak (``VmHWM``, reset through
``/proc/self/clear_refs``) less what was resident just before the step: what PyTorch, the kernels, their threads and the
allocator really took. ``python -m tnt_kernels.bench.memory CONTENDER ROWS VOCAB DTYPE`` measures one step on a CPU in
a process of its own and prints one JSON object; the same reading is first made of an allocation of known size, and
printed with it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tnt_kernels.bench.contenders import make_loss, training_step
from tnt_kernels.bench.problem import Size, make_problem

KNOWN = 64 << 20  # bytes, of the allocation that shows that the reading is right
_CLEAR = Path("/proc/self/clear_refs")


def can_measure(device: torch.device) -> bool:
    return device.type == "cuda" or _CLEAR.exists()


def peak_beyond(call: Callable[[], object], device: torch.device | None = None) -> int:
    """Bytes by which memory rose above its present size during ``call()``.

    Linux adds pages up per CPU and shows the sum to within some 100 KiB.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    gc.collect()
    # Free memory that malloc holds would hide as much of what the call takes.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """A size in bytes from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def measure(contender: str, size: Size) -> dict[str, Any]:
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


def in_process(module: str, *arguments: object, cwd: Path | None = None) -> dict[str, Any]:
    """The JSON object that ``python -m module arguments`` prints last."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True)
    fields: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return fields


def measure_in_process(contender: str, size: Size, threads: int) -> dict[str, Any]:
    """``measure`` in a new process."""
    return in_process("tnt_kernels.bench.memory", contender, *size, "--threads", threads)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tnt_kernels.bench.memory", description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("rows", type=int)
    parser.add_argument("vocab", type=int)
    parser.add_argument("dtype")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads)
    print(json.dumps(measure(a.contender, Size(a.rows, a.vocab, a.dtype))))


if __name__ == "__main__":
    main()
