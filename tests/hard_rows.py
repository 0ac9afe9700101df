"""Rows on which backends have been wrong: finite masks, one side shifted against the other, logits that are none.

``known`` has their values, worked out by hand. ``masks``, ``shifts`` and ``broken`` are batches for the oracle, and
``rare`` has rows for that of ``exact``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from oracle import (
    BF16,
    F16,
    F32,
    F64,
    INF,
    NAN,
    OBJECTIVES,
    Batch,
    Result,
    mixed_batch,
    rows_where,
    truth,
)
from shards import run_shards
from torch import Tensor

import tnt_kernels as tnt

KLS = ("forward_kl", "reverse_kl")
REAL = {F16: F32, BF16: F32, F32: F32, F64: F64}


class Known(NamedTuple):
    name: str
    batch: Batch  # one row
    loss: float
    gradient: list[float]
    stats: tuple[float, float, float]  # p(S), q(S), the entropy of p


def _row(
    z: list[float],
    r: list[float],
    label: int,
    w: float,
    method: str | tnt.Objective,
    dtype: torch.dtype,
    **options: object,
) -> Batch:
    logits, ref_logits = (torch.tensor([x], dtype=F64).to(dtype) for x in (z, r))
    weights = torch.tensor([w], dtype=REAL[dtype])
    options["method"] = method
    return Batch(logits, ref_logits, torch.tensor([label]), weights, options)


def known(dtype: torch.dtype) -> Iterator[Known]:
    lowest = torch.finfo(dtype).min
    log_eps, log_2 = -math.log(1e-6) + math.log1p(1e-6), math.log(2)
    for mask in (-6e4, lowest) if dtype == F16 else (-1e30, lowest):
        # All of p lies on the removed token, and the others are further down than float32 can tell.
        row = [0.0, mask, mask]
        yield Known(
            f"a mask of {mask:g}, reverse KL",
            _row(row, row, 0, -1.0, "tnrr", dtype),
            log_eps, [0.0, 0.0, 0.0], (1.0, 1.0, 0.0),
        )  # fmt: skip
        depth = -float(torch.tensor(mask, dtype=dtype))
        yield Known(
            f"a mask of {mask:g}, forward KL",
            _row(row, row, 0, -1.0, "tnff", dtype),
            depth - log_2, [1.0, -0.5, -0.5], (1.0, 1.0, 0.0),
        )  # fmt: skip
        yield Known(
            f"all of {mask:g}",
            _row([mask] * 3, [mask] * 3, 0, 1.0, "tnfr", dtype),
            0.0, [0.0, 0.0, 0.0], (0.0, 0.0, math.log(3)),
        )  # fmt: skip
        yield Known(
            f"a padded vocabulary of {mask:g}",
            _row([0.0, 0.0, mask], [0.0, 0.0, mask], 1, -1.0, "tnff", dtype),
            log_2, [-0.5, 0.5, 0.0], (0.5, 0.5, log_2),
        )  # fmt: skip
    p = torch.tensor([0.0, 1.0, -2.0], dtype=F64).softmax(-1)
    entropy = float(-(p * p.log()).sum())
    c = 6e4 if dtype == F16 else 2.0**27
    yield Known(
        "a shifted reference, forward KL",
        _row([0.0, 1.0, -2.0], [c, c, 0.0], 0, 1.0, "tnff", dtype),
        float(-(p[:2].log().sum() / 2) - log_2),
        [float(p[0]) - 0.5, float(p[1]) - 0.5, float(p[2])], (0.0, 0.0, entropy),
    )  # fmt: skip
    c = float(torch.tensor(6e4 if dtype == F16 else 3e38, dtype=dtype))
    loss = float(p[2]) * c - entropy + float(p[0] + p[1]) * log_2 + float(p[2]) * log_2
    yield Known(
        "a shifted reference, reverse KL",
        _row([0.0, 1.0, -2.0], [c, c, 0.0], 0, 1.0, "tnrr", dtype),
        loss,
        [float(p[0] * (p[0].log() + log_2 - loss)), float(p[1] * (p[1].log() + log_2 - loss)),
         float(p[2] * (p[2].log() + log_2 + c - loss))], (0.0, 0.0, entropy),
    )  # fmt: skip
    p = torch.tensor([0.0, 1.0, 2.0], dtype=F64).softmax(-1)
    entropy = float(-(p * p.log()).sum())
    # The lowest number where p is e^-87: its weight is taken before it is summed.
    depth, tail = (-65504.0, -10.0) if dtype == F16 else (torch.finfo(BF16).min, -87.0)
    p4 = torch.tensor([0.0, 0.0, tail, tail], dtype=F64).softmax(-1)
    log_q = torch.tensor([0.0, 0.0, depth, depth], dtype=F64) - log_2
    loss = float((p4 * (p4.log() - log_q)).sum())
    yield Known(
        "a masked reference where p is almost 0, reverse KL",
        _row([0.0, 0.0, tail, tail], [0.0, 0.0, depth, depth], 0, 1.0, "tnrr", dtype),
        loss,
        (p4 * (p4.log() - log_q - loss)).tolist(), (0.0, 0.0, float(-(p4 * p4.log()).sum())),
    )  # fmt: skip
    top, bottom = {F16: (6e4, -65504.0), F64: (1.5e308, lowest)}.get(dtype, (3e38, lowest))
    log_floor = math.log(1e-6)
    yield Known(
        "maxima further apart than the largest number, reverse KL",
        _row([top, top], [bottom, top], 1, -1.0, "tnrr", dtype),
        math.log1p(1e-6) - log_2 - log_floor / 2, [log_floor / 4, -log_floor / 4],
        (0.5, 1.0, log_2),
    )  # fmt: skip
    p2, q = (torch.tensor(x, dtype=F64).softmax(-1) for x in ((0.0, -1.0), (0.0, 1.0, 2.0, 1.0)))
    yield Known(
        "all of p on removed tokens without a floor, reverse KL",
        _row(
            [-INF, -INF, 0.0, -1.0], [0.0, 1.0, 2.0, 1.0], 2, 1.0, "tnrr", dtype,
            eps=0.0, negative_ids=torch.tensor([[2, 3]]),
        ),
        INF, [NAN] * 4, (1.0, float(q[2:].sum()), float(-(p2 * p2.log()).sum())),
    )  # fmt: skip
    for bad, method in itertools.product((NAN, INF), ("tnff", "tnrr")):
        yield Known(
            f"a reference with {bad} at the removed token, {method}",
            _row([0.0, 1.0, 2.0], [bad, 0.0, 1.0], 0, -1.0, method, dtype),
            NAN, [NAN] * 3, (float(p[0]), NAN, entropy),
        )  # fmt: skip


def assert_known(run: Callable[[Batch], Result], dtype: torch.dtype, label: str = "") -> None:
    """``run`` gives loss, gradient and statistics of a batch."""
    for row in known(dtype):
        result, where = run(row.batch), f"{label} {row.name}"
        assert result.stats is not None

        def close(actual: torch.Tensor, expected: object, tolerance: float, where: str) -> None:
            expected = torch.tensor(expected, dtype=F64)
            torch.testing.assert_close(
                actual.double().reshape(expected.shape), expected, rtol=tolerance, atol=1e-6,
                equal_nan=True, msg=lambda text: f"{where}: {text}",
            )  # fmt: skip

        rounding = {F32: 4e-6, F64: 1e-12}.get(dtype, 2 * torch.finfo(dtype).eps)
        close(result.loss, row.loss, 1e-12 if dtype == F64 else 4e-6, where)
        close(result.gradient, row.gradient, rounding, f"{where}, gradient")
        stats = result.stats
        close(stats.kl, row.loss, 4e-6, f"{where}, kl")
        masses = torch.stack((stats.negative_mass, stats.ref_negative_mass, stats.entropy))
        close(masses, row.stats, 4e-6, f"{where}, statistics")


def assert_known_of_shards(
    backend: str,
    dtype: torch.dtype,
    label: str = "",
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
) -> None:
    """The same of logits cut into two shards, and into three of which one is empty."""
    for first in ((1,), (2, 0)):

        def run(batch: Batch, first: tuple[int, ...] = first) -> Result:
            sizes = (*first, batch.logits.size(-1) - sum(first))
            return run_shards(prepare(batch), backend, sizes, reduction="none")

        assert_known(run, dtype, f"{label} {first}")


# --- for the oracle ---------------------------------------------------------------------------------------------------


def masks(dtype: torch.dtype, vocab: int) -> Iterator[Batch]:
    """Finite masks in the policy, in the reference, in both, in both at different tokens; all but two tokens; a third
    of them. Losses of nearly the largest number are left out."""
    lowest = torch.finfo(dtype).min
    generator = torch.Generator().manual_seed(7)
    for mask, share in itertools.product((-6e4 if dtype == F16 else -1e30, lowest), (0.3, 1.0)):
        plain = mixed_batch(vocab, dtype, rows=7, seed=3)
        where = torch.rand(2, 7, vocab, generator=generator) < share
        where[:, :, : vocab // 2 + 2 : vocab // 2 + 1] = False  # something is left
        for policy, reference in ((0, None), (None, 0), (0, 0), (0, 1)):
            z, r = plain.logits.clone(), plain.ref_logits.clone()
            for x, at in ((z, policy), (r, reference)):
                if at is not None:
                    x[where[at]] = mask
            for objective in OBJECTIVES[:4]:
                batch = Batch(z, r, plain.labels, plain.weights, dict(plain.options))
                batch = batch.with_options(method=objective)
                sane = truth(batch).terms.loss.abs() < 1e28
                if sane.any():
                    yield rows_where(batch, sane)


def shifts(dtype: torch.dtype, vocab: int) -> Iterator[Batch]:
    """One side shifted against the other: next to the limit up to which z - r comes first, and by what leaves 16-bit
    logits no digits but the shift's."""
    for shift in (0.7, 15.0, 17.0, -300.0, 2.0**14, -(2.0**20), 2.0**27):
        if dtype == F16 and abs(shift) > 3e4:
            continue
        batch = mixed_batch(vocab, dtype, rows=7, seed=5)
        coarse = batch.ref_logits.double() + shift
        for z, r in ((batch.logits, coarse.to(dtype)), (coarse.to(dtype), batch.logits)):
            for kind in KLS:
                shifted = Batch(z, r, batch.labels, batch.weights, dict(batch.options))
                yield shifted.with_options(method=tnt.Objective(kind, kind))


class Rare(NamedTuple):
    name: str
    batch: Batch  # one row


def rare() -> Iterator[Rare]:
    """Rows that leave the short way: tiles that do not fit the row's shift, a y with -1 < w < 0 far from the others."""
    generator = torch.Generator().manual_seed(8)

    def noise(vocab: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(vocab, dtype=F64, generator=generator)

    def rows(
        name: str, z: Tensor, r: Tensor, y: int, w: float, dtype: torch.dtype, **options: object
    ) -> Iterator[Rare]:
        for kind in KLS:
            batch = _row(z.tolist(), r.tolist(), y, w, tnt.Objective(kind, kind), dtype, **options)
            yield Rare(f"{name}, {kind}", batch)

    # Nothing is known of it from the first entries. Next to 6e4, o - x has two digits behind the point.
    z, r = noise(300), noise(300)
    z[280] = 6e4
    yield from rows("a peak of the policy behind the first entries", z, r, 0, 1.0, F32)
    yield from rows("a peak of the reference behind the first entries", r, z, 0, 1.0, F32)

    # The mean of z - r says nothing. Relative to a maximum of 40, the logits of unlikely tokens would lose digits.
    r = noise(17, 3.0)
    r[3], r[5] = 40.0, -60.0
    z = r + noise(17, 1e-4)
    masked = torch.where(torch.arange(17) == 5, torch.finfo(F32).min, r)
    yield from rows("a mask of the reference next to the target", z, masked, 0, 1.0, F32)
    yield from rows("a mask of the policy next to the target", masked, z, 0, 1.0, F32)

    # On average the rows are next to each other.
    r = noise(64)
    z = (r + 1000).index_fill(0, torch.tensor(7), torch.finfo(F16).min)
    yield from rows("a mask that makes up for a shift", z, r, 0, 1.0, F16)

    # Behind the first tile there is nothing of p, and all of q.
    z, r = torch.zeros(2100, dtype=F64), torch.zeros(2100, dtype=F64)
    z[5], r[2090] = 3e4, 64.0
    yield from rows("a tile without the policy", z, r, 0, 1.0, BF16)
    yield from rows("a tile without the reference", r, z, 0, 1.0, BF16)

    # Behind the first tile p is next to nothing: relative to the peak its logits have no digits, its weights few.
    z = noise(2100)
    r = z.clone()
    z[2090] = 65504.0
    yield from rows("a tile that the policy has left", z, r, 0, -1.0, F16)
    z, r = torch.zeros(2100, dtype=F64), torch.zeros(2100, dtype=F64)
    z[5], r[2090] = 100.0, 20.0
    yield from rows("a tile of the smallest weights", z, r, 0, 1.0, F16)

    # 1/T is rounded, by as much as shows at such a distance.
    z, r = noise(5), noise(5)
    z[1] = 1e4
    for t in (0.7, 10.0):
        yield from rows("a pushed peak of the policy", z, r, 1, -0.3, F32, temperature=t)
        yield from rows("a pushed peak of the reference", r, z, 1, -0.3, F32, temperature=t)
    z[1], r[1] = 1e30, -1e4
    yield from rows("a pushed logit of 1e30", z, r, 1, -1e-3, F32)
    z[1], r[1] = torch.finfo(F64).min, -INF
    yield from rows("a pushed label that neither row has", z, r, 1, -0.7, F64)

    z, r = noise(7), noise(7)
    z[4], r[1] = 1e3, -INF
    yield from rows("no mass where the reference is infinite", z, r, 4, -1.0, F32)

    # A vector's NaN hides the maximum, so that weights come out large: the policy's entropy is there all the same.
    z, r = torch.zeros(67, dtype=F64), torch.zeros(67, dtype=F64)
    r[0] = 8.0
    r[[4, 8, 16]] = NAN
    yield from rows("NaN beside the maximum", z, r, 1, 1.0, F32, temperature=0.1)

    # No sum of the reference, but the policy's, which is small where all that the policy lacks is taken from weights.
    z, r = torch.zeros(1024, dtype=F64), torch.zeros(1024, dtype=F64)
    z[359], r[300] = 20.0, NAN
    yield from rows("NaN in a row without a log-ratio", z, r, 1, 1.0, F32, temperature=2.0)

    # Weights of 2^20: how their exponents are rounded shows in the entropy.
    z = noise(300)
    z[[0, 290, 291]] = torch.tensor([25.0, 39.1, 37.0], dtype=F64)
    r = z + noise(300, 0.1)
    z[295] = -1e4
    yield from rows("a mask beside a maximum behind the first entries", z, r, 1, 1.0, F32)

    # Next to the maxima of the whole row, its first tile has weights of 2^-18.
    z, r = torch.zeros(4099, dtype=F64), torch.zeros(4099, dtype=F64)
    z[1196], r[2522] = 100.0, 20.0
    yield from rows("peaks in tiles of their own", z, r, 0, 1.0, F32)

    # The sum of all e, less that of e (1 - e^y), has lost digits of the second row's.
    z, r = noise(600), noise(600)
    z[52], r[472] = 1e30, 40.0
    yield from rows("a sum of the policy next to one of e^40", z, r, 0, 1.0, F64)

    # Relative to the first entries, weights are so large that some times their log-ratios are no float.
    z = noise(2300)
    z[2100], z[2200] = 5.0, 6.0
    r = z.clone()
    r[[1, 2100]] = -1e30
    for dtype in (F32, BF16):
        yield from rows("masks that have weights", z, r, 3, -1.0, dtype, temperature=0.1)

    # Where log p is below the floor by more than a float holds.
    z = torch.full((64,), -3e38, dtype=F64)
    z[36] = -INF
    batch = _row(z.tolist(), z.tolist(), 36, -0.7, "nl+ll", F32, nl_floor=-2.0, temperature=0.5)
    yield Rare("a label that the policy has not, beside huge logits", batch)


def broken(dtype: torch.dtype, vocab: int) -> Iterator[Batch]:
    """NaN, +inf or a whole row of -inf, on either side, at a kept token, at one of the set, at the label."""
    for side, bad in itertools.product(("logits", "ref_logits"), (NAN, INF, -INF)):
        batch = mixed_batch(vocab, dtype, rows=7, seed=6)
        x = getattr(batch, side)
        if bad == -INF:
            x[:4] = bad
        else:
            ids = batch.options["negative_ids"]
            for row, column in ((0, 2), (1, int(ids[1, 0])), (2, int(batch.labels[2])),
                                (3, int(batch.labels[3])), (5, int(batch.labels[5]))):  # fmt: skip
                x[row, column] = bad
        for objective in OBJECTIVES:
            yield batch.with_options(method=objective)
