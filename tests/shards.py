"""Launches of a backend: those of a vocabulary cut into shards within one process, without a collective, and those
whose gradient has another dtype than the logits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from oracle import BF16, F16, F32, Batch, Result, identical
from torch import Tensor

import tnt_kernels as tnt
from tnt_kernels._call import (
    ROW_COEFFICIENTS,
    ROW_DIAGNOSTICS,
    ROW_PARTIAL_SUMS,
    ROW_STATISTICS,
    Kind,
    LossCall,
    RowCall,
    real_dtype,
)
from tnt_kernels._operators import new_losses, write_rows
from tnt_kernels._rows.checks import check_row_tensors
from tnt_kernels._scalars import check_scalars
from tnt_kernels.backends import BACKENDS


def cuts(vocab: int) -> Iterator[tuple[int, ...]]:
    """1, 2 and 3 shards of unequal sizes, empty ones included."""
    yield (vocab,)
    yield (vocab // 3, vocab - vocab // 3)
    first, second = (vocab + 1) // 2, vocab // 5
    yield (first, second, vocab - first - second)


def prepared(batch: Batch, backend: str, reduction: str) -> LossCall:
    options = {"method": "tnff", **batch.options}
    method = options.pop("method")
    known = {
        "alpha": 1.0, "negative_ids": None, "eps": 1e-6, "smoothing": "negatives", "nl_floor": None,
        "temperature": 1.0, "ignore_index": -100, "normalizer": None, **options,
    }  # fmt: skip
    tensors = check_row_tensors(
        "logits", batch.logits, batch.ref_logits, batch.labels, batch.weights,
        known["alpha"], known["negative_ids"], known["normalizer"],
    )  # fmt: skip
    *_, scalars = check_scalars(
        method, known["alpha"], known["eps"], known["smoothing"], known["nl_floor"],
        known["temperature"], known["ignore_index"], reduction, known["normalizer"], False,
    )  # fmt: skip
    return LossCall(tensors, scalars, backend, False, False, None)


def losses_into(
    gradient: Tensor | None, logits: Tensor, call: LossCall
) -> tuple[Tensor, Tensor | None]:
    """Loss and diagnostics of (N, V) logits; the gradient, if one is given, in its own dtype."""
    loss, diagnostics = new_losses(logits, call)
    write_rows(logits, call, loss, diagnostics, gradient)
    return loss, diagnostics


def launched(
    backend: str,
    batch: Batch,
    *,
    reduction: str,
    upstream: Tensor | None = None,
    inplace: bool = False,
    later: bool = False,
    stats: bool = False,
    gradient_dtype: torch.dtype | None = None,
    differences: bool = False,
) -> Result:
    """Of (N, V) logits, or with ``differences`` of these to the reference, by one launch; with a ``later`` gradient by
    two."""
    x, call, rows = batch.logits, prepared(batch, backend, reduction), len(batch.labels)
    real = real_dtype(x)
    loss = x.new_empty(rows if reduction == "none" else (), dtype=real)
    diagnostics = x.new_empty((ROW_DIAGNOSTICS, rows), dtype=real) if stats else None
    coefficients = x.new_empty((rows, ROW_COEFFICIENTS), dtype=real) if later else None
    gradient = x if inplace else x.new_empty(x.shape, dtype=gradient_dtype or x.dtype)
    first = RowCall(
        Kind.FUSED, x, call.tensors, call.scalars, 0, x.size(1), loss, diagnostics, coefficients,
        differences=differences,
    )  # fmt: skip
    last = first._replace(gradient=gradient, upstream=upstream)
    if later:
        BACKENDS[backend].launch(first)
        last = last._replace(kind=Kind.BACKWARD, loss=None, diagnostics=None)
    BACKENDS[backend].launch(last)
    return Result(loss, gradient, None if diagnostics is None else tnt.RowStats(*diagnostics))


def assert_rounds_its_gradient(batch: Batch, backend: str, rounding: float = 0.0) -> None:
    """Float32 logits, a bfloat16 gradient at any alignment: the one in float32, rounded, by each of the launches.

    ``rounding``: what a simulator that truncates may be off by, relative.
    """
    z, vocab = batch.logits, batch.logits.size(-1)
    assert z.dtype == F32
    call = prepared(batch, backend, "sum")
    exact = torch.empty_like(z)
    loss, _ = losses_into(exact, z, call)

    def check(got: Tensor, want: Tensor) -> None:
        assert got.dtype == BF16
        if rounding:
            torch.testing.assert_close(got.float(), want, rtol=rounding, atol=0, equal_nan=True)
        else:
            assert identical(got, want.to(BF16))

    for offset in (0, 1, 4):
        wide = torch.full((len(z), vocab + 8 - vocab % 4), 7.0, dtype=BF16, device=z.device)
        before, view = wide.clone(), wide[:, offset : offset + vocab]
        again, _ = losses_into(view, z, call)
        assert identical(again, loss)
        check(view, exact)
        view.copy_(before[:, offset : offset + vocab])
        assert torch.equal(wide, before)
    sizes = list(cuts(vocab))[-1]
    want, got = (run_shards(batch, backend, sizes, gradient_dtype=dtype) for dtype in (F32, BF16))
    check(got.gradient, want.gradient)


def run_shards(
    batch: Batch,
    backend: str | Sequence[str],
    sizes: Sequence[int],
    *,
    reduction: str = "mean",
    upstream: Tensor | None = None,
    with_stats: bool = True,
    gradient_dtype: torch.dtype | None = None,
    differences: bool = False,
) -> Result:
    """As ``oracle.run``; the gradients of the shards side by side. Each shard may have a backend of its own.

    ``differences``: to the reference, as ``RowCall`` has them.
    """
    names = [backend] * len(sizes) if isinstance(backend, str) else backend
    z, vocab, n = batch.logits, batch.logits.size(-1), len(batch.labels)
    real = real_dtype(z)
    tensors, scalars, *_ = prepared(batch, names[0], reduction)
    launchers, shards = [BACKENDS[name].launch for name in names], len(sizes)
    # a row more than there are: blocks at a distance, as the header of a real collective leaves them
    gathered = z.new_full((shards, n + 1, ROW_STATISTICS), torch.nan, dtype=real)
    partial_sums = z.new_full((shards, n, ROW_PARTIAL_SUMS), torch.nan, dtype=real)
    gradient, loss = (
        torch.empty_like(z, dtype=gradient_dtype),
        z.new_empty((n,) if reduction == "none" else (), dtype=real),
    )
    diagnostics = z.new_empty((ROW_DIAGNOSTICS, n), dtype=real) if with_stats else None
    offsets = list(itertools.accumulate(sizes, initial=0))[:-1]
    deferred = reduction == "none" or z.dtype == F16
    late = deferred or scalars.gradient_needs_totals

    def calls(kind: Kind) -> Iterator[tuple[int, RowCall]]:
        for shard, (at, size) in enumerate(zip(offsets, sizes, strict=True)):
            ref = None if tensors.ref_logits is None else tensors.ref_logits[:, at : at + size]
            mine = tensors._replace(ref_logits=ref)
            call = RowCall(kind, z[:, at : at + size], mine, scalars, at, vocab)
            yield shard, call._replace(differences=differences)

    for shard, call in calls(Kind.STATISTICS):
        launchers[shard](call._replace(statistics=gathered[shard, :n], diagnostics=diagnostics))
    view = gathered[:, :n]
    for shard, call in calls(Kind.PARTIAL_SUMS):
        mine = gradient[:, call.vocab_offset : call.vocab_offset + call.logits.size(1)]
        call = call._replace(gathered=view, partial_sums=partial_sums[shard])
        launchers[shard](call if late else call._replace(gradient=mine, upstream=upstream))
    total_sums = partial_sums.sum(0)
    results = []
    for shard, call in calls(Kind.FINISH):
        mine = gradient[:, call.vocab_offset : call.vocab_offset + call.logits.size(1)]
        call = call._replace(gathered=view, total_sums=total_sums)
        last = call._replace(loss=loss, diagnostics=diagnostics)
        if late and not deferred:
            last = last._replace(gradient=mine, upstream=upstream)
        launchers[shard](last)
        results.append((loss.clone(), None if diagnostics is None else diagnostics.clone()))
        if deferred:
            up = z.new_ones(1, dtype=real) if upstream is None else upstream.reshape(-1)
            launchers[shard](call._replace(gradient=mine, upstream=up))
    for other, other_rows in results[1:] if len(set(names)) == 1 else ():  # every rank alike
        torch.testing.assert_close(other, results[0][0], rtol=0, atol=0, equal_nan=True)
        if diagnostics is not None:
            torch.testing.assert_close(other_rows, results[0][1], rtol=0, atol=0, equal_nan=True)
    stats = None if diagnostics is None else tnt.RowStats(*diagnostics.unbind())
    return Result(loss, gradient, stats)
