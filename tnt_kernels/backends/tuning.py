"""Launch settings of the Triton kernels, each with its reason; and a search for those who ask for it.

Nothing is searched at run time. ``TNT_KERNELS_TUNING`` may name a table that ``python -m tnt_kernels.backends.tuning``
wrote on the same kind of GPU. The settings below come from the compiler's reports; on a GPU they are not measured yet.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch


class RowConfig(NamedTuple):
    block: int  # columns of a tile
    warps: int  # of 32 lanes
    stages: int  # depth of the software pipeline of the loops' loads


#: A lane holds eight columns: 16 bytes of a 16-bit row, one load instruction for z and one for r. With more, the sums,
#: kept per lane so that no loop has a barrier, would take registers that a second block on the multiprocessor needs.
COLUMNS_PER_LANE = 8

#: (up to this vocabulary, warps). The second pass hits the L2 cache as far as the rows in flight fit it, so wide rows
#: get many warps each, and few are in flight: one of 16 warps on each of 132 multiprocessors are 68 MB at V = 128256 in
#: bfloat16, four of 4 warps would be four times that. Small rows need the parallelism of many.
WARPS = ((4096, 4), (16384, 8))
WIDEST = 16

#: What the search tries.
CANDIDATES = tuple(
    RowConfig(block, warps, stages)
    for warps in (4, 8, 16, 32)
    for block in (warps * 128, warps * 256, warps * 512)
    for stages in (1, 2, 3)
)


def _key(vocab: int, itemsize: int, pair: bool, architecture: str) -> str:
    return f"{architecture} {itemsize} bytes {'KL' if pair else 'one row'} {1 << (vocab - 1).bit_length()}"


@functools.cache
def _table(path: str) -> dict[str, RowConfig]:
    return {key: RowConfig(*value) for key, value in json.loads(Path(path).read_text()).items()}


def row_config(vocab: int, itemsize: int, pair: bool, architecture: str) -> RowConfig:
    """For rows of ``vocab`` columns of ``itemsize`` bytes; ``pair``: some loss reads the reference too."""
    path = os.environ.get("TNT_KERNELS_TUNING")
    found = _table(path).get(_key(vocab, itemsize, pair, architecture)) if path else None
    if found:
        return found
    warps = next((warps for limit, warps in WARPS if vocab <= limit), WIDEST)
    block = warps * 32 * COLUMNS_PER_LANE
    while block // 2 >= max(vocab, warps * 32):  # a tile need not be wider than the row
        block //= 2
    return RowConfig(block, warps, 1)


def search(vocab: int, dtype: torch.dtype, pair: bool, rows: int = 4096) -> dict[str, RowConfig]:
    """The fastest of ``CANDIDATES`` for loss and gradient in place, on the current GPU."""
    from triton.testing import do_bench

    from tnt_kernels.backends import BACKENDS
    from tnt_kernels.functional import tnt_loss

    global row_config
    kept = row_config
    z, r = (torch.randn(rows, vocab, device="cuda", dtype=dtype) for _ in range(2))
    labels = torch.zeros(rows, device="cuda", dtype=torch.int64)
    weights = torch.where(torch.arange(rows, device="cuda") % 8 == 0, -1.0, 1.0)
    logits = z.requires_grad_() * 1
    times = {}
    for config in CANDIDATES:
        row_config = lambda *_, config=config: config  # noqa: E731
        times[config] = do_bench(
            lambda: tnt_loss(
                logits,
                r,
                labels,
                weights,
                method="tnff" if pair else "ul+ll",
                inplace=True,
                backend="triton",
            ),
            return_mode="median",
        )
    row_config = kept
    best = min(times, key=times.__getitem__)
    print(
        f"V = {vocab}, {dtype}: {best}, {times[best]:.3f} ms; {kept(vocab, z.element_size(), pair, '')}"
    )
    return {_key(vocab, z.element_size(), pair, BACKENDS["triton"].architecture(z.device)): best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the table; existing entries stay")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 65536, 128256, 262144])
    arguments = parser.parse_args()
    table = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for vocab in arguments.vocab:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for pair in (True, False):
                table.update(search(vocab, dtype, pair))
                arguments.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
