"""A search for the Triton kernels' fastest launch settings on this GPU: ``python -m tnt_kernels.tuning --out FILE``.

Launches use what it found where ``TNT_KERNELS_TUNING`` names that file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

import tnt_kernels.backends.triton as triton
from tnt_kernels._call import Kind, RowCall, RowTensors
from tnt_kernels._scalars import Scalars
from tnt_kernels.backends.triton.config import RowConfig, RowKind, measured_config, table_key
from tnt_kernels.objectives import METHODS

_TILES = [(warps * columns, warps) for warps in (4, 8, 16, 32) for columns in (128, 256, 512)]
CANDIDATES: dict[RowKind, tuple[RowConfig, ...]] = {
    "KL": tuple(
        RowConfig(*tile, unroll, registers)
        for tile in _TILES
        for unroll in (1, 2)
        for registers in (0, 64, 40)
    ),
    "one row": tuple(RowConfig(*tile) for tile in _TILES),
}


def example(
    vocab: int, dtype: torch.dtype, pair: bool, gradient: bool, rows: int, device: str
) -> RowCall:
    """The mean loss of rows of which an eighth is negative: KLs (``pair``), or LL and UL. Its gradient is in place."""
    z, r = (torch.randn(rows, vocab, device=device, dtype=dtype) for _ in range(2))
    labels = torch.zeros(rows, device=device, dtype=torch.int64)
    weights = torch.where(torch.arange(rows, device=device) % 8 == 0, -1.0, 1.0)
    objective = METHODS["tnff" if pair else "ul+ll"]
    return RowCall(
        Kind.FUSED,
        z,
        RowTensors(r if pair else None, labels, weights, None, None, None),
        Scalars(objective.positive_loss, objective.negative_loss),
        vocab_offset=0,
        vocab_size=vocab,
        loss=torch.empty((), device=device),
        gradient=z if gradient else None,
    )  # fmt: skip


def search(
    vocab: int,
    dtype: torch.dtype,
    pair: bool,
    gradient: bool,
    rows: int = 4096,
    device: str = "cuda",
) -> dict[str, RowConfig]:
    """An entry of the table: the fastest of ``CANDIDATES`` for loss and gradient in place, or for the loss alone."""
    from triton.testing import do_bench  # not above: --help is for machines without Triton, too

    kind: RowKind = "KL" if pair else "one row"
    call = example(vocab, dtype, pair, gradient, rows, device)
    times: dict[RowConfig, float] = {
        config: do_bench(lambda config=config: triton.launch(call, config), return_mode="median")
        for config in CANDIDATES[kind]
    }
    best = min(times, key=times.__getitem__)
    itemsize = call.logits.element_size()
    usual = measured_config(vocab, itemsize, kind=kind, gradient=gradient, ids=False)
    print(
        f"V = {vocab}, {dtype}: {best}, {times[best]:.3f} ms; {usual}, {times.get(usual, math.nan):.3f} ms"
    )
    architecture = triton.architecture(call.logits.device)
    key = table_key(
        vocab, itemsize, kind=kind, gradient=gradient, ids=False, architecture=architecture
    )
    return {key: best}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tnt_kernels.tuning", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the table; existing entries stay")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 65536, 128256, 262144])
    arguments = parser.parse_args(argv)
    table = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for vocab in arguments.vocab:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for pair, gradient in itertools.product((True, False), repeat=2):
                table.update(search(vocab, dtype, pair, gradient))
                arguments.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
