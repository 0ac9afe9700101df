"""How long a step of ``linear_tnt_loss`` takes on a GPU that is not here, as a multiple of its matmuls.

A matmul takes its arithmetic or its bytes, whichever takes longer; the loss between them its bytes at a share of the
memory's bandwidth. The model has no launches, no gaps and no partly filled waves. ``python -m benchmarks.linear_model``
prints the table that stands in CUDA_NOTES.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
import torch

from benchmarks.linear import Chunking, LinearProblem, LinearSize, chunkings
from benchmarks.row_model import H100, H200, Device
from tnt_kernels._linear.plan import LinearScalars, LinearTensors
from tnt_kernels._linear.sizes import Sizes, make_layout, sizes_of

#: Of a matmul of 16-bit matrices, in flop a microsecond: what large ones reached on an H200.
FLOPS = 700e6
#: Of the memory's bandwidth, by the loss: what the kernels are predicted to reach at V = 128256, the lower end
#: (benchmarks/gpu_summary.py).
LOSS_SHARE = {H100: 0.74, H200: 0.65}
#: Llama 3, Gemma 2, Qwen 2.5 and GPT-2.
SHAPES = ((4096, 128256), (2304, 262144), (3584, 152064), (768, 50257))
ROWS = (1024, 8192, 32768)


class Step(NamedTuple):
    """What is launched for a step, in rows and bytes."""

    sizes: Sizes
    pair_bytes: int  # both logits of a column, between the matmuls
    hidden_bytes: int  # of an entry of the hidden states' gradient, beside its matmul


def _matmul(device: Device, flop: float, bytes_: float) -> float:
    """Microseconds."""
    return max(flop / FLOPS, bytes_ / device.bandwidth)


def _parts(total: int, most: int) -> Iterator[int]:
    for begin in range(0, total, most):
        yield min(most, total - begin)


def predicted(size: LinearSize, step: Step, device: Device, loss_share: float) -> float:
    """Microseconds of a step with the gradients of hidden states and weight, all in 16 bits, all rows active."""
    rows, width, vocab, _ = size
    entries, found = float(width) * vocab, 0.0
    for n in _parts(rows, step.sizes.chunk):
        bytes_ = 2 * entries + n * (vocab * step.pair_bytes / 2 + 2 * width)
        found += 2 * _matmul(device, 2 * n * entries, bytes_)
        found += n * vocab * (step.pair_bytes + 2) / (device.bandwidth * loss_share)
    batches = list(_parts(rows, rows if step.sizes.one_matmul else max(1, step.sizes.waiting)))
    for i, n in enumerate(batches):
        operands = 2 * n * (vocab + width)
        found += _matmul(device, 2 * n * entries, operands + 2 * entries)
        # The weight's gradient: one matmul writes it, several read and write a float32 sum.
        total = 2 * entries if len(batches) == 1 else (4 + 4 * (i > 0)) * entries
        found += _matmul(device, 2 * n * entries, operands + total)
    if len(batches) > 1:
        found += 6 * entries / device.bandwidth  # the sum is cast
    return found + rows * width * step.hidden_bytes / device.bandwidth


def floor(size: LinearSize, device: Device) -> float:
    """Microseconds of the matmuls alone, their logits in 16 bits, by the fastest of the benchmark's chunkings."""
    rows, width, vocab, _ = size
    entries = float(width) * vocab

    def of(chunking: Chunking) -> float:
        found = 0.0
        for i, n in enumerate(_parts(rows, chunking.policy)):
            for part in (n, *_parts(n, chunking.reference)):
                found += _matmul(device, 2 * part * entries, 2 * (entries + part * (vocab + width)))
            operands, total = 2 * n * (vocab + width), (2 + 2 * (i > 0)) * entries
            found += _matmul(device, 2 * n * entries, operands + 2 * entries)
            found += _matmul(device, 2 * n * entries, operands + total)
        return found

    return min(map(of, chunkings(_problem(size))))


def _problem(size: LinearSize) -> LinearProblem:
    """16-bit tensors without memory, all rows active."""
    with torch.device("meta"):
        hidden = torch.empty(size.rows, size.hidden, dtype=torch.bfloat16)
        weight = torch.empty(size.vocab, size.hidden, dtype=torch.bfloat16)
        labels = torch.empty(size.rows, dtype=torch.int64)
    return LinearProblem(hidden, weight, hidden, weight, labels, torch.ones(size.rows))


def step_of(size: LinearSize, rounds_pairs: bool = False) -> Step:
    """As the library takes it on a GPU with 16-bit parameters, both gradients wanted. ``rounds_pairs``: of a shared
    head, with a ``logits_dtype`` of 16 bits.
    """
    p = _problem(size)
    t = LinearTensors(p.hidden, p.weight, None, p.ref_hidden, p.ref_weight, None)
    scalars = LinearScalars(None, None, 1.0, 1.0, size.vocab, None, None, rounds_pairs)
    wanted = (True, True, False)
    layout = make_layout(t, scalars, True, rounds_pairs, wanted)
    sizes = sizes_of(t, scalars, size.rows, wanted, size.vocab, layout)
    return Step(sizes, 4 if rounds_pairs else 8, 2)


def arithmetic(size: LinearSize) -> float:
    """Microseconds of the matmuls' arithmetic."""
    return 8.0 * size.rows * size.hidden * size.vocab / FLOPS


def table() -> pd.DataFrame:
    """Multiples of the matmuls, for float32 pairs of logits and, of a shared head, for 16-bit ones."""
    found = []
    for width, vocab in SHAPES:
        for rows in ROWS:
            size = LinearSize(rows, width, vocab, "bfloat16")
            steps = {"float32": step_of(size), "16 bits": step_of(size, rounds_pairs=True)}
            chunks = ", ".join(str(step.sizes.chunk) for step in steps.values())
            record: dict[str, Any] = {
                "tokens × H × V": f"{rows} × {width} × {vocab}", "rows of a chunk": chunks,
            }  # fmt: skip
            for device in (H100, H200):
                matmuls = floor(size, device)
                record[f"{device.name}: matmuls, ms"] = f"{matmuls / 1000:.3g}"
                for name, step in steps.items():
                    us = predicted(size, step, device, LOSS_SHARE[device])
                    record[f"{device.name}, {name}"] = f"{us / matmuls:.2f}"
            found.append({**record, "outcome": ""})
    return pd.DataFrame(found)


if __name__ == "__main__":
    print(table().to_markdown(index=False, disable_numparse=True))
