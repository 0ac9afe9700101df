"""Launch settings of the Triton kernels, each with its reason; and a search for those who ask for it.

Nothing is searched at run time. ``TNT_KERNELS_TUNING`` may name a table that ``python -m tnt_kernels.backends.tuning``
wrote on the same kind of GPU. The settings below were measured on an H100, in bfloat16 with both logits read:
benchmarks/CUDA_NOTES.md has the figures.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch


class RowConfig(NamedTuple):
    block: int  # columns of a tile
    warps: int  # of 32 lanes
    stages: int  # depth of the software pipeline of the loops' loads


#: (up to so many bytes of a row of logits, warps, columns a lane), with a gradient and without. Eight columns are 16
#: bytes of a 16-bit row: one load instruction for z and one for r. Narrow rows need the parallelism of many, and so
#: does the first pass alone. The second pass hits the L2 cache as far as the rows in flight fit it, so wide rows get
#: many warps.
WITH_GRADIENT = ((8 << 10, 4, 8), (80 << 10, 8, 8))
FORWARD_ALONE = ((128 << 10, 4, 8),)
WIDEST = 16, 8
#: More columns a lane leave fewer rows in flight, but with ids, or for the loss alone, their registers would spill.
WIDEST_WITHOUT_IDS = 16, 16

#: What the search tries.
CANDIDATES = tuple(
    RowConfig(block, warps, stages)
    for warps in (4, 8, 16, 32)
    for block in (warps * 128, warps * 256, warps * 512)
    for stages in (1, 2, 3)
)


def _key(
    vocab: int, itemsize: int, pair: bool, gradient: bool, ids: bool, architecture: str
) -> str:
    kind = f"{'KL' if pair else 'one row'}{'' if gradient else ' forward'}{' ids' if ids else ''}"
    return f"{architecture} {itemsize} bytes {kind} {1 << (vocab - 1).bit_length()}"


@functools.cache
def _table(path: str) -> dict[str, RowConfig]:
    return {key: RowConfig(*value) for key, value in json.loads(Path(path).read_text()).items()}


def row_config(
    vocab: int, itemsize: int, pair: bool, gradient: bool, ids: bool, architecture: str
) -> RowConfig:
    """For rows of ``vocab`` columns of ``itemsize`` bytes.

    Args:
        pair: some loss reads the reference too.
        gradient: it is written.
        ids: there are negative ids.
    """
    path = os.environ.get("TNT_KERNELS_TUNING")
    key = _key(vocab, itemsize, pair, gradient, ids, architecture)
    found = _table(path).get(key) if path else None
    if found:
        return found
    limits = WITH_GRADIENT if gradient else FORWARD_ALONE
    widest = WIDEST_WITHOUT_IDS if gradient and not ids else WIDEST
    warps, columns = next((x for limit, *x in limits if vocab * itemsize <= limit), widest)
    block = warps * 32 * columns
    while block // 2 >= max(vocab, warps * 32):  # a tile need not be wider than the row
        block //= 2
    return RowConfig(block, warps, 1)


def search(
    vocab: int, dtype: torch.dtype, pair: bool, gradient: bool, rows: int = 4096
) -> dict[str, RowConfig]:
    """The fastest of ``CANDIDATES`` for loss and gradient in place, or the loss alone, on the current GPU."""
    from triton.testing import do_bench

    from tnt_kernels.backends import BACKENDS
    from tnt_kernels.functional import tnt_loss

    global row_config
    kept = row_config
    z, r = (torch.randn(rows, vocab, device="cuda", dtype=dtype) for _ in range(2))
    labels = torch.zeros(rows, device="cuda", dtype=torch.int64)
    weights = torch.where(torch.arange(rows, device="cuda") % 8 == 0, -1.0, 1.0)
    logits = z.requires_grad_() * 1
    method = "tnff" if pair else "ul+ll"

    def call() -> None:
        with torch.set_grad_enabled(gradient):
            tnt_loss(logits, r, labels, weights, method=method, inplace=gradient, backend="triton")

    times = {}
    for config in CANDIDATES:
        row_config = lambda *_, config=config: config  # noqa: E731
        times[config] = do_bench(call, return_mode="median")
    row_config = kept
    best = min(times, key=times.__getitem__)
    usual = kept(vocab, z.element_size(), pair, gradient, False, "")
    print(
        f"V = {vocab}, {dtype}: {best}, {times[best]:.3f} ms; {usual}, {times.get(usual, math.nan):.3f} ms"
    )
    architecture = BACKENDS["triton"].architecture(z.device)
    return {_key(vocab, z.element_size(), pair, gradient, False, architecture): best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the table; existing entries stay")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 65536, 128256, 262144])
    arguments = parser.parse_args()
    table = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for vocab in arguments.vocab:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for pair, gradient in itertools.product((True, False), repeat=2):
                table.update(search(vocab, dtype, pair, gradient))
                arguments.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
