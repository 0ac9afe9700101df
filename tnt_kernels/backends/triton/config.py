"""Launch settings of the Triton kernels: the measured ones, each with its reason, and the user's own table of others.

Nothing is searched at run time. ``TNT_KERNELS_TUNING`` may name a table that ``python -m tnt_kernels.tuning`` wrote on
the same kind of GPU.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Literal, NamedTuple


class RowConfig(NamedTuple):
    block: int  # columns of a tile
    warps: int  # of 32 lanes
    unroll: int = 1  # of kl_kernel: tiles a turn of a loop
    registers: int = 0  # for a lane, on NVIDIA's GPUs; 0: as many as leave room for one program


#: What is launched: ``kl_kernel``, or ``stream_kernel`` for the policy's logits alone, or for both rows of logits.
RowKind = Literal["KL", "one row", "two rows"]

# Measured in bfloat16, kl_kernel on an H200; benchmarks/CUDA_NOTES.md has the figures. Those of stream_kernel are what
# suited the kernel that it replaced, on an H100.

# Of stream_kernel. Eight columns a lane are 16 bytes of a 16-bit row: one load instruction for z and one for r.

#: (the most bytes of a row of logits, warps, columns a lane). Narrow rows are read fastest when many are in flight,
#: hence few warps each. The second pass hits the L2 cache while the rows in flight fit into it, so wide rows get many.
WITH_GRADIENT = ((8 << 10, 4, 8), (80 << 10, 8, 8))
#: Without a gradient there is only the first pass, for which many rows in flight are best up to greater widths.
FORWARD_ALONE = ((128 << 10, 4, 8),)
#: (warps, columns a lane) of rows with more bytes.
WIDEST = 16, 8
#: Sixteen columns a lane leave fewer rows in flight, but the registers of all that is asked of two rows would spill.
WIDEST_ONE_ROW = 16, 16
#: Of the rows that kl_kernel left: the search for them takes registers, too.
LEFT = 8, 8

# Of kl_kernel. A tile has 16 bytes of either row for each lane. 64 registers leave room for two programs of 16 warps or
# four of 8, 40 for three of 16.

#: (the most bytes of a row of logits, warps, tiles a turn, registers)
KL_WITH_GRADIENT = ((8 << 10, 4, 1, 0), (math.inf, 16, 2, 64))
#: That 128 KiB divide them is a guess: rows of 64 KiB are fastest one way, rows of 256 KiB the other.
KL_FORWARD_ALONE = ((8 << 10, 4, 1, 0), (128 << 10, 8, 1, 64), (math.inf, 16, 1, 40))
#: Where registers are limited, rows with ids get as many, or they would spill in the loops over tiles. So would
#: differences, which have the settings of rows with ids.
KL_REGISTERS_WITH_IDS = 64


def table_key(
    vocab: int, itemsize: int, *, kind: RowKind, gradient: bool, ids: bool, architecture: str
) -> str:
    """Under which the table of ``TNT_KERNELS_TUNING`` has the settings of such rows; see ``row_config``."""
    what = f"{kind}{'' if gradient else ' forward'}{' ids' if ids else ''}"
    return f"{architecture} {itemsize} bytes {what} {1 << (vocab - 1).bit_length()}"


@functools.cache
def _table(path: str) -> dict[str, RowConfig]:
    return {key: RowConfig(*value) for key, value in json.loads(Path(path).read_text()).items()}


def measured_config(
    vocab: int, itemsize: int, *, kind: RowKind, gradient: bool, ids: bool
) -> RowConfig:
    unroll, registers = 1, 0
    if kind == "KL":
        kl_limits = KL_WITH_GRADIENT if gradient else KL_FORWARD_ALONE
        warps, unroll, registers = next(x for limit, *x in kl_limits if vocab * itemsize <= limit)
        columns = 16 // itemsize
        if ids and registers:
            registers = KL_REGISTERS_WITH_IDS
    else:
        limits = WITH_GRADIENT if gradient else FORWARD_ALONE
        widest = WIDEST_ONE_ROW if gradient and kind == "one row" and not ids else WIDEST
        warps, columns = next((x for limit, *x in limits if vocab * itemsize <= limit), widest)
    return _sized(vocab, warps, columns, unroll, registers)


def left_config(vocab: int) -> RowConfig:
    """Of the launch for the rows that ``kl_kernel`` left."""
    return _sized(vocab, *LEFT)


def _sized(vocab: int, warps: int, columns: int, unroll: int = 1, registers: int = 0) -> RowConfig:
    block = warps * 32 * columns
    while block // 2 >= max(vocab, warps * 32):  # a tile need not be wider than the row
        block //= 2
    return RowConfig(block, warps, unroll, registers)


def row_config(
    vocab: int, itemsize: int, *, kind: RowKind, gradient: bool, ids: bool, architecture: str
) -> RowConfig:
    """The settings for rows of ``vocab`` columns of ``itemsize`` bytes: the table's, else the measured ones.

    Args:
        kind: the kernel, and what it reads.
        gradient: it is written.
        ids: there are negative ids, or the logits are differences to the reference's.
        architecture: of the GPU, as ``tnt_kernels.backends.triton.architecture`` names it.
    """
    path = os.environ.get("TNT_KERNELS_TUNING")
    if path:
        key = table_key(
            vocab, itemsize, kind=kind, gradient=gradient, ids=ids, architecture=architecture
        )
        found = _table(path).get(key)
        if found:
            return found
    return measured_config(vocab, itemsize, kind=kind, gradient=gradient, ids=ids)
