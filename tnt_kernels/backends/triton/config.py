"""Launch settings of the Triton kernels: the measured ones, each with its reason, and the user's own table of others.

Nothing is searched at run time. ``TNT_KERNELS_TUNING`` may name a table that ``python -m tnt_kernels.tuning`` wrote on
the same kind of GPU.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple


class RowConfig(NamedTuple):
    block: int  # columns of a tile
    warps: int  # of 32 lanes
    stages: int  # depth of the software pipeline of the loops' loads; of KL rows, tiles a turn of a loop
    registers: int = (
        0  # a lane may have, on NVIDIA's GPUs; 0: as many as leave room for one program
    )


# Measured on an H100, in bfloat16 with both logits read; benchmarks/CUDA_NOTES.md has the figures. Eight columns a lane
# are 16 bytes of a 16-bit row: one load instruction for z and one for r.

#: (the most bytes of a row of logits, warps, columns a lane). Narrow rows are read fastest when many are in flight,
#: hence few warps each. The second pass hits the L2 cache while the rows in flight fit into it, so wide rows get many.
WITH_GRADIENT = ((8 << 10, 4, 8), (80 << 10, 8, 8))
#: Without a gradient there is only the first pass, for which many rows in flight are best up to greater widths.
FORWARD_ALONE = ((128 << 10, 4, 8),)
#: (warps, columns a lane) of rows with more bytes.
WIDEST = 16, 8
#: Sixteen columns a lane leave fewer rows in flight. With ids, or for the loss alone, their registers would spill.
WIDEST_WITHOUT_IDS = 16, 16


def table_key(
    vocab: int, itemsize: int, *, pair: bool, gradient: bool, ids: bool, architecture: str
) -> str:
    """Under which the table of ``TNT_KERNELS_TUNING`` has the settings of such rows; see ``row_config``."""
    kind = f"{'KL' if pair else 'one row'}{'' if gradient else ' forward'}{' ids' if ids else ''}"
    return f"{architecture} {itemsize} bytes {kind} {1 << (vocab - 1).bit_length()}"


@functools.cache
def _table(path: str) -> dict[str, RowConfig]:
    return {key: RowConfig(*value) for key, value in json.loads(Path(path).read_text()).items()}


def measured_config(vocab: int, itemsize: int, *, gradient: bool, ids: bool) -> RowConfig:
    limits = WITH_GRADIENT if gradient else FORWARD_ALONE
    widest = WIDEST_WITHOUT_IDS if gradient and not ids else WIDEST
    warps, columns = next((x for limit, *x in limits if vocab * itemsize <= limit), widest)
    block = warps * 32 * columns
    while block // 2 >= max(vocab, warps * 32):  # a tile need not be wider than the row
        block //= 2
    return RowConfig(block, warps, 1)


def row_config(
    vocab: int, itemsize: int, *, pair: bool, gradient: bool, ids: bool, architecture: str
) -> RowConfig:
    """The settings for rows of ``vocab`` columns of ``itemsize`` bytes: the table's, else the measured ones.

    Args:
        pair: the reference's logits are read too.
        gradient: it is written.
        ids: there are negative ids.
        architecture: of the GPU, as ``tnt_kernels.backends.triton.architecture`` names it.
    """
    path = os.environ.get("TNT_KERNELS_TUNING")
    if path:
        key = table_key(
            vocab, itemsize, pair=pair, gradient=gradient, ids=ids, architecture=architecture
        )
        found = _table(path).get(key)
        if found:
            return found
    return measured_config(vocab, itemsize, gradient=gradient, ids=ids)
