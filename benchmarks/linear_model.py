"""How long a step of ``linear_tnt_loss`` takes on a GPU that is not here, as a multiple of its matmuls.

A matmul takes its arithmetic or its bytes, whichever takes longer; the loss between them its bytes at a share of the
memory's bandwidth. The model has no launches, no gaps and no partly filled waves. ``python -m benchmarks.linear_model``
prints the table that stands in CUDA_NOTES.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
import torch

from benchmarks.linear import LinearSize
from benchmarks.row_model import H100, H200, Device
from tnt_kernels._linear import chunks

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

    sizes: chunks.Sizes
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


def floor(size: LinearSize) -> float:
    """Microseconds of the arithmetic alone."""
    return 8.0 * size.rows * size.hidden * size.vocab / FLOPS


def step_of(size: LinearSize) -> Step:
    """As the library takes it on a GPU with 16-bit parameters, heads apart, both gradients wanted."""
    with torch.device("meta"):
        hidden = torch.empty(size.rows, size.hidden, dtype=torch.bfloat16)
        weight = torch.empty(size.vocab, size.hidden, dtype=torch.bfloat16)
        index = torch.empty(size.rows, dtype=torch.int64)
    t = chunks.LinearTensors(hidden, weight, None, hidden, weight, None)
    scalars = chunks.LinearScalars(None, None, 1.0, 1.0, size.vocab, None, None)
    layout = chunks._Layout({"logits": torch.float32, "ref_logits": torch.float32}, True, True)
    group = chunks.RowGroup(index, True, True)
    sizes = chunks.sizes_of(t, scalars, [group], (True, True, False), size.vocab, layout)
    return Step(sizes, 8, 14)


def table() -> pd.DataFrame:
    found = []
    for width, vocab in SHAPES:
        for rows in ROWS:
            size = LinearSize(rows, width, vocab, "bfloat16")
            step = step_of(size)
            record = {
                "shape": f"{rows} × {width} × {vocab}",
                "rows of a chunk": step.sizes.chunk,
                "of a gradient's matmul": rows if step.sizes.one_matmul else step.sizes.waiting,
                "matmuls, ms": floor(size) / 1000,
            }
            for device in (H100, H200):
                ms = predicted(size, step, device, LOSS_SHARE[device]) / 1000
                record[f"{device.name}, ms"] = ms
                record[f"{device.name}, times its matmuls"] = 1000 * ms / floor(size)
            found.append(record)
    return pd.DataFrame(found)


if __name__ == "__main__":
    print(table().to_markdown(index=False, floatfmt=".3g"))
