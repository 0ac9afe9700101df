"""How many rows of ``linear_tnt_loss`` exist as logits at once, and in which dtypes: what its budget holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tnt_kernels._call import real_dtype
from tnt_kernels._linear.matmul import held_dtype, keeps_float32, padded
from tnt_kernels._linear.plan import LinearScalars, LinearTensors

#: What a call's buffers may take. Every chunk reads all of the weight, and every matmul of gradients reads and writes
#: all of the weight's: at V = 32000 and H = 512, 170 float32 rows at a time take a CPU some 15 % longer than 500.
CHUNK_BYTES = {"cpu": 64 << 20}
#: And as much again as the weight has: a GPU reads it in the time of some 300 rows' arithmetic, however wide it is.
CHUNK_BYTES_ELSEWHERE = 1 << 30
#: An eighth of them is left to matmuls: to a CPU's copies of their operands (some 10 MiB), and to the parts of a weight
#: or of its gradient that are on their way from 16 bits to float32 or back.
_MATMUL_SHARE = 8
#: Rows of a tile of a GPU's matmuls: chunks of 683 rows would cost as much as 768.
_TILE_ROWS = 128


def budget(hidden: Tensor, widest: int) -> int:
    """Bytes. ``widest`` is V, of the largest shard: all ranks have chunks of the same rows."""
    kind = hidden.device.type
    if kind in CHUNK_BYTES:
        return CHUNK_BYTES[kind]
    return CHUNK_BYTES_ELSEWHERE + widest * hidden.size(-1) * hidden.element_size()


def part_bytes(hidden: Tensor, widest: int) -> int:
    """For what is on its way from one dtype to another."""
    return budget(hidden, widest) // _MATMUL_SHARE


class Layout(NamedTuple):
    """Of a chunk."""

    #: By "logits" (of the policy, or their differences to the reference's), "ref_logits" and "tanh" (of softcap).
    #: Without "logits": they are where their gradient waits.
    buffers: dict[str, torch.dtype]
    differences: bool  # whether both heads are one, and the policy's logits are held as differences
    waits: bool  # the gradient of logits is to be rounded to 16 bits, and then waits for a matmul of many rows
    gradient_in_slot: bool  # the loss writes it where it waits


def make_layout(
    t: LinearTensors,
    linear: LinearScalars,
    reads_reference: bool,
    shares: bool,
    wanted: Sequence[bool],
) -> Layout:
    """A pair of logits is ``real``, as 16 bits would round away what they differ by; or, where both heads are one and
    it is asked for, 16 bits of the reference's and 16 bits of the difference.
    """
    hidden, real, device = t.hidden, real_dtype(t.hidden), t.hidden.device.type
    waits = (wanted[0] or wanted[1]) and hidden.dtype != real
    capped = linear.softcap is not None
    # Something is yet to happen to the gradient when the loss has written it. (On a CPU, PyTorch would copy a 16-bit
    # one to sum it up for the bias.)
    sums_bias = wanted[2] and not keeps_float32(device)
    changes = any(wanted) and (capped or held_dtype(hidden.dtype) != hidden.dtype or sums_bias)
    names = ["logits"] + ["ref_logits"] * reads_reference
    differences = reads_reference and shares
    if linear.rounds_pairs:
        buffers = dict.fromkeys(names, hidden.dtype)
        if waits:
            del buffers["logits"]
        return Layout(buffers, differences, waits, waits)
    if capped and any(wanted):
        names.append("tanh")
    return Layout(dict.fromkeys(names, real), differences, waits, waits and not changes)


class Sizes(NamedTuple):
    """In rows."""

    chunk: int  # whose logits exist at once
    waiting: int  # whose gradients wait for a matmul at most, 0 where none does
    one_matmul: bool  # all of them fit


def sizes_of(
    t: LinearTensors,
    linear: LinearScalars,
    rows: int,
    wanted: Sequence[bool],
    widest: int,
    layout: Layout,
) -> Sizes:
    """What the budget holds.

    The float32 sum of a 16-bit weight's gradient takes as much as the gradients of 2 H rows of logits. Where those of
    all rows fit into the budget and the place of that sum, they wait for one matmul, and there is no sum.
    """
    hidden, real = t.hidden, real_dtype(t.hidden)
    width, bytes_ = hidden.size(1), hidden.element_size()
    available = budget(hidden, widest) - part_bytes(hidden, widest)
    row = padded(widest) * sum(dtype.itemsize for dtype in layout.buffers.values())
    waiting_row = padded(widest) * bytes_ + width * real.itemsize  # multiplied back, in float32

    def chunk(available: int, row: int = row) -> int:
        most, tile = max(1, linear.chunk_size or available // max(1, row)), 1
        if linear.chunk_size is None and hidden.device.type != "cpu" and most >= _TILE_ROWS:
            tile = _TILE_ROWS
        most -= most % tile
        even = -(-rows // max(1, -(-rows // most)))
        return max(1, min(rows, -(-even // tile) * tile))

    if not layout.waits:
        return Sizes(chunk(available), 0, False)
    if not wanted[1]:  # a row's gradient has nothing to gain from other rows
        found = chunk(available, row + waiting_row)
        return Sizes(found, found, False)
    sum_bytes = widest * width * real.itemsize if held_dtype(hidden.dtype) != real else 0
    left, half = available + sum_bytes - rows * waiting_row, chunk(available // 2)
    if left >= half * row:
        return Sizes(chunk(min(left, available)), rows, True)
    chunks = (available - half * row) // (half * waiting_row)
    return Sizes(half, half * max(1, chunks), False)
