"""Rows next to their target, where training starts and where it ends: errors are measured by what is left there.

The truth is computed here in NumPy's extended precision, from the inputs as a backend gets them; a test compares it
with ``exact``. With d = log p - log q* on the tokens that stay and rms its root mean square under q* (under p for the
reverse KL), a backend passes where

 - every entry of the gradient is within GRADIENT (|g_v| + q_v rms / T) and half a unit in the last place of its dtype.
   On a removed token the reverse gradient is p_s (log p_s - log eps - ...), a difference of numbers that are not small,
   so that GRADIENT p_s comes on top there;
 - a loss is within LOSS of itself and a unit in its last place;
 - the entries of the gradient cancel as those of the exact one do after rounding, three times over. Luck may make that
   sum 0, so one standard deviation of independent roundings is allowed beside it, and OFFSET (sum |g_v| + rms / T), for
   a sum of float32 that d depends on has an error, too.

*What float32 cannot tell.* z - r is a float where the two are close, and then every digit of d can be had. It must be
rounded where a row is shifted, z = r + c + noise, or where a target has moved, and the noise loses that much. Then
d may be off by as much as that, and on average by less (AVERAGE), since most of these differences are floats still:

    |c| <= 1     2^-24 |z_v - r_v|          z - r, which is no float where |r_v| is small
    beyond       2^-19                      (z - z_ref) - (r - r_ref), half a unit of each, for differences of up to 32
    -1 < w < 0   2^-24 (|r_y| + 1), at y    r_y + T log(1 + w)

At c = 5, the worst entry of a row at a distance of 1e-3 has three digits, and at 1e-6 none.

The numbers come from a simulation of the one-read form in float32, every operation rounded: 64 partial sums a row, or
64 a tile of 1024 entries, and references from the row's first 512 entries. It keeps all of these bounds. Its losses are
wrong by up to 1.9e-6, mostly because it rounds exponents of up to 20.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import exact
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from oracle import (
    BF16,
    F16,
    F32,
    F64,
    INF,
    Batch,
    Result,
    half_ulp,
    identical,
    implementations,
    rows_where,
    run,
)
from shards import run_shards
from torch import Tensor

import tnt_kernels as tnt

Numbers = NDArray[np.float64]

DTYPES = {"float32": F32, "bfloat16": BF16, "float16": F16}
#: Standard deviation of z - r before rounding. The last makes KLs of 5e-13 in float32, and less in 16 bits.
DISTANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SHIFTS = (0.0, 0.3, 5.0, 100.0)

GRADIENT = 1e-5
LOSS = 2e-6
#: The same where one token has almost all of p: Φ/S - φ(L) may be a ninth of Φ/S before references are replaced.
PEAKED = 9 * LOSS
#: The same where p(S) > 0: its odds are a difference of log-sum-exps of up to 20.
ODDS = 4e-6
OFFSET = 2e-6
#: How far d is off on average, by the shift: thrice what the simulation's losses show.
AVERAGE = {0.0: 0.0, 0.3: 2.0**-30, 5.0: 2.0**-26, 100.0: 2.0**-26}

#: Backends whose shards are compared, too.
SHARDED = ("cpu", "torch")


def places(distance: float, shift: float) -> tuple[tuple[int, float], ...]:
    """Vocabularies and temperatures."""
    if shift:
        return (1000, 1.0), (4099, 0.7)
    return (1000, 1.0), (1000, 0.7), (32003, (1.0, 0.7)[DISTANCES.index(distance) % 2])


# --- rows -------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    name: str
    z: Tensor  # (V,) float64, of values that the dtype holds
    r: Tensor
    label: int
    weight: float
    ids: list[int]
    loss_error: float


def rows_at(
    distance: float, shift: float, dtype: torch.dtype, vocab: int, t: float
) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(vocab)

    def normal() -> Tensor:
        return torch.randn(vocab, dtype=F64, generator=generator)

    def pair(r: Tensor, gone: list[int], moved: dict[int, float]) -> tuple[Tensor, Tensor]:
        """z and r, rounded: z lacks some tokens, and has moved away from r elsewhere."""
        r = r.to(dtype)
        z = r.double() + shift + distance * normal()
        for token, step in moved.items():
            z[token] += step
        z[gone] = -INF
        z = z.to(dtype)
        size = r.double().abs()
        size[gone] = INF
        # Where the noise was rounded away, three entries are one unit apart, and of the smallest units.
        if (z[size < INF] != r[size < INF]).sum() < 3:
            z.view(torch.int16)[size.argsort()[:3]] += 1
        return z.double(), r.double()

    def row(
        name: str, *, weight: float = 1.0, ids: int = 0, top: bool = False, moved: float = 0.0
    ) -> Row:
        """By its name, the policy has lost the removed tokens or still has them."""
        r = 3 * t * normal()  # as flat at every temperature
        # What is removed is likely, as generated tokens are.
        order = r.argsort(descending=True)
        label = int(order[0 if top else vocab // 20])
        tokens = order[vocab // 10 : vocab // 2 : vocab // 20][:ids].tolist()
        if name == "one likely token":
            r[2 * vocab // 3] = r.div(t).logsumexp(0) * t + t * math.log(20.0)
        if name == "masks":
            r[vocab // 3 : vocab // 2] = -INF
            r[vocab // 2 : vocab // 2 + 50] = -1e30 if dtype != F16 else -65504.0
        gone = [label] * (weight == -1) + tokens if "without" in name else []
        error = PEAKED if name == "one likely token" else LOSS if "with " not in name else ODDS
        z, r = pair(r, gone, {label: moved})
        return Row(name, z, r, label, weight, tokens, error)

    yield row("plain")
    yield row("one likely token")
    yield row("masks")
    yield row("w = -1, without the label", weight=-1.0)
    yield row("w = -1, with the label", weight=-1.0)
    yield row("w = -1, with the likeliest label", weight=-1.0, top=True)
    yield row("ids, without them", ids=8)
    yield row("ids, with them", ids=8)
    yield row("w = -0.5, at the target", weight=-0.5, moved=t * math.log(0.5))
    yield row("w = -0.5, at the reference", weight=-0.5)
    yield row("w = -0.5 and ids, with them", weight=-0.5, ids=8)


# --- the truth, and the bounds ----------------------------------------------------------------------------------------


class Truth(NamedTuple):
    loss: float
    gradient: Numbers  # (V,)


class Target(NamedTuple):
    """A row's distributions, in extended precision; 0 where the logits are masked."""

    removed: NDArray[np.bool_]
    pushed: bool  # the label keeps 1 + w of its probability
    p: exact.Array
    q: exact.Array  # q*
    log_p: exact.Array
    log_q: exact.Array


def target_of(row: Row, t: float) -> Target:
    def log_softmax(x: exact.Array) -> exact.Array:
        x = x - x.max()
        return x - np.log(np.exp(x).sum())

    z, r = (x.numpy().astype(exact.REAL) / t for x in (row.z, row.r))
    removed = np.zeros(len(r), bool)
    removed[row.ids] = True
    removed[row.label] |= row.weight == -1
    pushed = -1 < row.weight < 0 and not removed[row.label]
    if pushed:
        r[row.label] += np.log1p(exact.REAL(row.weight))
    r[removed] = -INF
    log_p, log_q = log_softmax(z), log_softmax(r)
    return Target(removed, pushed, np.exp(log_p), np.exp(log_q), log_p, log_q)


def difference(log_p: exact.Array, log_q: exact.Array) -> exact.Array:
    """0 where one of them is -inf."""
    both = (log_p > -INF) & (log_q > -INF)
    return np.where(both, log_p, 0) - np.where(both, log_q, 0)


def phi(d: exact.Array, expm1: exact.Array) -> exact.Array:
    """e^d - 1 - d, by its series next to 0."""
    series = d * d * (0.5 + d * (exact.REAL(1) / 6 + d * (exact.REAL(1) / 24 + d / 120)))
    return np.where(np.abs(d) < 1e-3, series, expm1 - d)


def forward(x: Target, t: float) -> Truth:
    d = difference(x.log_p, x.log_q)
    expm1 = np.expm1(d)
    loss = (x.q * phi(d, expm1)).sum() + x.p[x.removed].sum()
    gradient = np.where(x.removed, x.p, x.q * expm1) / t
    return Truth(float(loss), gradient.astype(float))


def reverse(x: Target, t: float, eps: float = 1e-6) -> Truth:
    log_norm = np.log1p(exact.REAL(eps) * x.removed.sum())
    log_q = np.where(x.removed, np.log(exact.REAL(eps)), x.log_q) - log_norm
    d = difference(x.log_p, log_q)
    loss = np.where(x.log_p > -INF, x.p * phi(-d, np.expm1(-d)), np.exp(log_q)).sum()
    gradient = x.p * (d - (x.p * d).sum()) / t
    return Truth(float(loss), gradient.astype(float))


TRUTHS = {"tnff": forward, "tnrr": reverse}


class Bounds(NamedTuple):
    """Of a row, with its factor."""

    truth: Truth
    loss: float
    gradient: Tensor  # (V,) float64
    sum: float


def bounds_of(
    row: Row, x: Target, truth: Truth, method: str, dtype: torch.dtype, shift: float, t: float
) -> tuple[Bounds, float]:
    """And the factor: a power of two that lifts the gradient to where float16 has all of its digits."""
    mass = x.q if method == "tnff" else x.p
    d = difference(x.log_p, x.log_q)
    rms = np.sqrt((mass * d * d).sum())

    lost = np.zeros(len(d))  # of d T
    if shift > 1:
        lost += 2.0**-19
    elif shift > 0:
        z, r = row.z.numpy(), row.r.numpy()
        lost += 2.0**-24 * np.where(x.removed, 0, np.abs(difference(z, r)))
    if x.pushed:
        lost[row.label] += 2.0**-24 * (abs(float(row.r[row.label])) + 1)
    average = AVERAGE[shift] + mass[row.label] * lost[row.label] * x.pushed

    size = np.abs(truth.gradient) + mass * (rms / t)
    if method == "tnrr":
        size += x.removed * x.p / t
    of_gradient = GRADIENT * size + mass * (lost + average) / t**2
    # What d has lost is in a KL to first and to second order.
    of_loss = row.loss_error * truth.loss + rms * average / t + (average / t) ** 2
    of_sum = OFFSET * (np.abs(truth.gradient).sum() + rms / t)

    factor = 2.0 ** (8 - math.frexp(np.abs(truth.gradient).max())[1])
    loss, gradient = truth.loss * factor, torch.from_numpy(truth.gradient * factor)
    ulp = 2 * half_ulp(torch.tensor(loss, dtype=F64), F32)
    rounding = half_ulp(gradient, dtype)
    rounded = gradient.to(dtype).double().sum().abs()
    # Entries rounded independently have a sum of this standard deviation: without it, luck could demand 0.
    by_chance = (rounding.square().sum() / 3).sqrt()
    bounds = Bounds(
        Truth(loss, gradient.numpy()),
        float(factor * of_loss + ulp),
        factor * torch.from_numpy(of_gradient.astype(float)) + rounding,
        float(factor * of_sum + 3 * rounded + by_chance),
    )
    return bounds, factor


class Case(NamedTuple):
    method: str
    rows: list[Row]
    batch: Batch
    bounds: list[Bounds]
    factors: list[float]


def cases_at(
    dtype: torch.dtype, distance: float, shift: float, vocab: int, t: float
) -> Iterator[Case]:
    """The same rows for each method."""
    rows = list(rows_at(distance, shift, dtype, vocab, t))
    targets = [target_of(row, t) for row in rows]
    ids = torch.full((len(rows), 10), -1)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.int64)
        ids[i, -1] = ids[i, 0]  # twice
    z, r = (torch.stack(x).to(dtype) for x in ([row.z for row in rows], [row.r for row in rows]))
    labels = torch.tensor([row.label for row in rows])
    for method, truth_of in TRUTHS.items():
        found = [
            bounds_of(row, x, truth_of(x, t), method, dtype, shift, t)
            for row, x in zip(rows, targets, strict=True)
        ]
        bounds, factors = [b for b, _ in found], [f for _, f in found]
        weights = [
            row.weight if row.weight < 0 else f for row, (_, f) in zip(rows, found, strict=True)
        ]
        options = {
            "method": method,
            "temperature": t,
            "negative_ids": ids,
            "alpha": torch.tensor(factors),
        }
        batch = Batch(z, r, labels, torch.tensor(weights), options)
        yield Case(method, rows, batch, bounds, factors)


# --- what is measured -------------------------------------------------------------------------------------------------

WHAT = ("gradient", "loss", "sum")


class Worst(NamedTuple):
    times: float  # the bound
    where: str


def errors_of(loss: float, gradient: Tensor, bounds: Bounds) -> dict[str, float]:
    """As multiples of their bounds."""
    gradient = gradient.double()
    error = (gradient - torch.from_numpy(bounds.truth.gradient)).abs() / bounds.gradient
    return {
        "gradient": float(error.nan_to_num(INF).max()),
        "loss": abs(loss - bounds.truth.loss) / bounds.loss if loss == loss else INF,
        "sum": float(gradient.sum().abs().nan_to_num(INF)) / bounds.sum,
    }


def worst_of(case: Case, result: Result, where: str) -> dict[str, Worst]:
    assert result.stats is not None
    losses = result.stats.kl.double() * torch.tensor(case.factors, dtype=F64)
    found = dict.fromkeys(WHAT, Worst(-1.0, ""))
    for row, bounds, loss, gradient in zip(
        case.rows, case.bounds, losses.tolist(), result.gradient, strict=True
    ):
        for what, times in errors_of(loss, gradient, bounds).items():
            if times > found[what].times:
                found[what] = Worst(times, f"{row.name}, {where}")
    return found


def results(batch: Batch) -> Iterator[tuple[str, str, Result]]:
    """Of each backend: its name, what else is to be known, and what it makes of a batch."""
    for backend, name in implementations():
        # "torch" has but one way.
        for reduction in ("none", "sum") if backend == "cpu" else ("none",):
            result = run(batch, backend, reduction=reduction, return_stats=True)
            yield backend, f"{name}, {reduction}", result
        if backend in SHARDED:
            vocab = batch.logits.size(-1)
            sizes = (vocab // 3, vocab // 2, vocab - vocab // 3 - vocab // 2)
            yield backend, f"{name}, shards", run_shards(batch, backend, sizes, reduction="none")


@functools.cache
def measured(dtype_name: str, shift: float) -> dict[tuple[str, ...], dict[float, Worst]]:
    """The worst at each distance, by what it is, method and backend."""
    found: dict[tuple[str, ...], dict[float, Worst]] = defaultdict(dict)
    dtype = DTYPES[dtype_name]
    for distance in DISTANCES:
        for vocab, t in places(distance, shift):
            for case in cases_at(dtype, distance, shift, vocab, t):
                for backend, name, result in results(case.batch):
                    where = f"V = {vocab}, T = {t}, {name}"
                    for what, worst in worst_of(case, result, where).items():
                        known = found[what, case.method, backend]
                        if distance not in known or worst.times > known[distance].times:
                            known[distance] = worst
    return found


@pytest.mark.parametrize("method", TRUTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("what", WHAT)
def test_close_rows(what: str, shift: float, dtype: str, method: str, backend: str) -> None:
    worst = measured(dtype, shift)[what, method, backend]
    failed = [
        f"{distance:.0e}: {w.times:.3g} times the bound at {w.where}"
        for distance, w in worst.items()
        if not w.times <= 1
    ]
    assert not failed, "\n".join([f"{what} at a distance of", *failed])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("method", TRUTHS)
def test_the_truth_is_that_of_the_other_oracle(method: str, dtype: torch.dtype) -> None:
    """To 1e-9, 1e-4 from the target: two ways to the same numbers."""
    kl = {"tnff": "forward_kl", "tnrr": "reverse_kl"}[method]
    settings = exact.Settings(kl, kl, temperature=0.7)
    for row in rows_at(1e-4, 0.0, dtype, 1000, 0.7):
        z, r = (x.numpy().astype(exact.REAL) for x in (row.z, row.r))
        outcome = exact.evaluate(exact.Row(z, r, row.label, row.weight, row.ids), settings)
        found = TRUTHS[method](target_of(row, 0.7), 0.7)
        assert found.loss == pytest.approx(float(outcome.loss.value), rel=1e-9), row.name
        largest = np.abs(found.gradient).max()
        error = np.abs(found.gradient - outcome.gradient.value.astype(float)).max()
        assert error < 1e-9 * largest, row.name


# --- where nothing is left --------------------------------------------------------------------------------------------


def equal_rows(dtype: torch.dtype, vocab: int) -> Tensor:
    """Masks, finite ones included, and logits as large as they come."""
    torch.manual_seed(vocab)
    x = (4 * torch.randn(10, vocab)).to(dtype)
    half, last = x[:, : vocab // 2], x[:, vocab // 2 + 1 :]
    half[0] = -INF
    last[1] = -INF
    half[2] = max(-1e30, torch.finfo(dtype).min)
    last[3] = torch.finfo(dtype).min
    half[4], last[4] = torch.finfo(dtype).min, -INF
    x[5] = torch.finfo(dtype).min
    x[6] += 1000
    x[7] *= 1000
    x[8] *= torch.finfo(dtype).max / 64
    x[8, -1] = torch.finfo(dtype).max
    return x


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("method", TRUTHS)
def test_equal_rows_have_a_loss_and_a_gradient_of_exactly_zero(
    method: str, dtype: torch.dtype
) -> None:
    for vocab, t in itertools.product((1, 7, 64, 1000, 32003), (1.0, 0.7)):
        z = equal_rows(dtype, vocab)
        weights = torch.linspace(0.5, 3, len(z))
        labels = torch.zeros(len(z), dtype=torch.int64)
        batch = Batch(z, z.clone(), labels, weights, {"method": method, "temperature": t})
        for _, name, result in results(batch):
            assert result.stats is not None
            for x in (result.loss, result.gradient, result.stats.kl):
                assert (x == 0).all(), (name, vocab, t, (x != 0).nonzero()[:3].tolist())


# --- one loss, however it is asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", TRUTHS)
def test_a_row_s_loss_has_the_same_bits_in_every_call(method: str, dtype: str, cpu: str) -> None:
    """With the gradient in the same launch or later, in place or not, without one, with statistics, alone or not."""
    for vocab, distance in ((1000, 1e-3), (32003, 1.0)):
        case = next(
            c for c in cases_at(DTYPES[dtype], distance, 0.0, vocab, 1.0) if c.method == method
        )
        batch, factors = case.batch, torch.tensor(case.factors)
        alone = [rows_where(batch, torch.tensor([i])) for i in range(len(factors))]
        alone = [b.with_options(alpha=b.options["alpha"][i]) for i, b in enumerate(alone)]
        with torch.no_grad():
            arguments = (batch.logits, batch.ref_logits, batch.labels, batch.weights)
            forward_only = tnt.tnt_loss(*arguments, **batch.options, reduction="none", backend=cpu)
        deferred = run(batch, cpu, reduction="none", return_stats=True)
        fused = run(batch, cpu, reduction="sum", return_stats=True)
        assert deferred.stats is not None
        assert fused.stats is not None
        losses = {
            "deferred": run(batch, cpu, reduction="none").loss,
            "deferred, in place": run(batch, cpu, reduction="none", inplace=True).loss,
            "deferred, with statistics": deferred.loss,
            "its statistics": deferred.stats.loss * factors,
            "the fused call's": fused.stats.loss * factors,
            "fused, alone": torch.stack([run(b, cpu, reduction="sum").loss for b in alone]),
            "fused, alone, in place": torch.stack(
                [run(b, cpu, reduction="sum", inplace=True).loss for b in alone]
            ),
        }
        for name, found in losses.items():
            differing = (found != forward_only).nonzero().flatten().tolist()
            assert identical(found, forward_only), (
                f"{name}: other bits than forward alone for {[case.rows[i].name for i in differing]}, V = {vocab}"
            )
