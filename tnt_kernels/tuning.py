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

#: (warps, tiles a turn, registers) of ``kl_kernel``: with room for several programs a multiprocessor, or for one.
_KL = (4, 1, 0), (8, 1, 64), (8, 2, 64), (16, 1, 40), (16, 1, 64), (16, 2, 64), (32, 1, 64)
#: (warps, vectors of 16 bytes a lane) of ``stream_kernel``.
_STREAM = (4, 1), (8, 1), (16, 1), (16, 2), (32, 1)
#: A setting is for the size of a logit: these stand for all. Every candidate is compiled once for each, with a gradient
#: and without, which takes most of a search's time.
DTYPES = torch.bfloat16, torch.float32


def candidates(kind: RowKind, dtype: torch.dtype) -> tuple[RowConfig, ...]:
    lane = 16 // dtype.itemsize
    if kind == "KL":
        return tuple(RowConfig(32 * warps * lane, warps, *more) for warps, *more in _KL)
    return tuple(RowConfig(32 * warps * lane * vectors, warps) for warps, vectors in _STREAM)


def time_of(call: RowCall, config: RowConfig) -> float:
    """In ms; infinite where this GPU cannot launch it."""
    from triton.errors import TritonError
    from triton.testing import do_bench  # not above: --help is for machines without Triton, too

    try:
        time: float = do_bench(lambda: triton.launch(call, config), return_mode="median")
    except TritonError as error:  # too many registers, or too much shared memory
        print(f"{config}: {error}")
        time = math.inf
    return time


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
    """An entry of the table: the fastest candidate for loss and gradient in place, or for the loss alone."""
    kind: RowKind = "KL" if pair else "one row"
    call = example(vocab, dtype, pair, gradient, rows, device)
    times = {config: time_of(call, config) for config in candidates(kind, dtype)}
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
        for dtype in DTYPES:
            for pair, gradient in itertools.product((True, False), repeat=2):
                table.update(search(vocab, dtype, pair, gradient))
                arguments.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
