"""Logits cut over the vocabulary: statistics, parts and finish of every backend against the whole."""

from __future__ import annotations

import itertools

import hard_rows
import pytest
import torch
from oracle import (
    DTYPES,
    F32,
    F64,
    INF,
    NAN,
    NEGATIVE,
    OBJECTIVES,
    POSITIVE,
    Batch,
    assert_agrees,
    each_implementation,
    implementations,
    mixed_batch,
    negative_rows,
    rows_where,
    truth,
)
from shards import assert_rounds_its_gradient, cuts, run_shards
from test_edge_rows import masked_batch, uneven_rows

import tnt_kernels as tnt

SMOOTHINGS = ("negatives", "uniform")


def check(batch: Batch, label: str = "", every_cut: bool = True, with_stats: bool = True) -> None:
    """All implementations, with the gradient as soon as it is known and with one that waits for backward."""
    expected = truth(batch)
    upstream = torch.linspace(-1, 2, len(batch.labels))
    upstream = upstream.to(F64 if batch.logits.dtype == F64 else F32)
    some = list(cuts(batch.logits.size(-1)))
    for (backend, name), sizes in each_implementation(some if every_cut else some[-1:]):
        for reduction, per_row in (("mean", None), ("none", upstream)):
            if reduction == "mean" and not expected.terms.loss.isfinite().all():
                continue  # its gradients would be lost in a sum that is not finite
            result = run_shards(
                batch, backend, sizes, reduction=reduction, upstream=per_row, with_stats=with_stats
            )
            where = f"{name} {reduction} {sizes} {label} {batch.options.get('method')}"
            assert_agrees(
                result, expected, batch, reduction=reduction, upstream=per_row, label=where
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 17, 2500])
def test_every_loss(vocab: int, dtype: torch.dtype) -> None:
    for smoothing, objective in itertools.product(SMOOTHINGS, OBJECTIVES):
        batch = mixed_batch(vocab, dtype).with_options(smoothing=smoothing, method=objective)
        check(batch, smoothing, every_cut=vocab > 2)


def test_every_pair_of_losses() -> None:
    batch = mixed_batch(100)
    negative = negative_rows(batch)
    known = {o: truth(batch.with_options(method=o)) for o in OBJECTIVES}
    by_positive = {o.positive: known[o] for o in OBJECTIVES}
    by_negative = {o.negative: known[o] for o in OBJECTIVES}
    for positive, negative_loss in itertools.product(POSITIVE, NEGATIVE):
        pair = batch.with_options(method=tnt.Objective(positive, negative_loss))
        expected = by_negative[negative_loss].where(negative, by_positive[positive])
        for backend, name in implementations():
            result = run_shards(pair, backend, (30, 70))
            assert_agrees(result, expected, pair, label=f"{name} {pair.options['method']}")


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": -2.5},
        {"alpha": torch.linspace(0, 2, 12)},
        {"temperature": 0.5, "smoothing": "uniform"},
        {"temperature": 3.0, "eps": 0.1},
        {"eps": 0.0},
        {"nl_floor": -4.0},
        {"nl_floor": -4.0, "temperature": 2.0},
        {"negative_ids": torch.tensor([3, 60, 99, 60, -1])},
        {"normalizer": 3.0},
        {"normalizer": 0.0},
    ],
    ids=str,
)
def test_keywords(options: dict) -> None:
    batch = mixed_batch(100)
    for objective in OBJECTIVES[:4]:
        some = batch.with_options(**options, method=objective)
        normalizer = some.options.pop("normalizer", None)
        expected = truth(some)
        whole = some if normalizer is None else some.with_options(normalizer=normalizer)
        for backend, name in implementations():
            result = run_shards(whole, backend, (40, 0, 60))
            assert_agrees(
                result, expected, some, normalizer=normalizer, label=f"{name} {objective}"
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_uneven_rows(dtype: torch.dtype) -> None:
    """The maximum in any shard, by any distance; shards that hold nothing but -inf."""
    batch = uneven_rows(dtype)
    for objective, smoothing in itertools.product(OBJECTIVES[:4], SMOOTHINGS):
        some = batch.with_options(method=objective, smoothing=smoothing)
        sane = truth(some).terms.loss.abs() < 1e30
        check(rows_where(some, sane), smoothing, every_cut=False)


@pytest.mark.parametrize("side", ["policy", "reference", "both"])
def test_minus_infinity(side: str) -> None:
    for smoothing, objective in itertools.product(SMOOTHINGS, OBJECTIVES[:4]):
        for vocab in (11, 2100):
            batch = masked_batch(F32, -INF, vocab, side)
            check(batch.with_options(method=objective, smoothing=smoothing), f"{side} {smoothing}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_known_values(dtype: torch.dtype) -> None:
    for backend, name in implementations():
        hard_rows.assert_known_of_shards(backend, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_masks_shifts_and_broken_rows(dtype: torch.dtype) -> None:
    for batches in (hard_rows.masks, hard_rows.shifts, hard_rows.broken):
        for batch in batches(dtype, 40):
            check(batch, batches.__name__, every_cut=False)


def test_what_one_shard_breaks_is_broken_in_all() -> None:
    """NaN, +inf, an infinite reverse KL, nothing left outside the set."""
    z, r = torch.randn(6, 9), torch.randn(6, 9)
    z[0, 1], r[1, 8], z[2, 3] = NAN, NAN, INF
    r[3, 0] = -INF  # reverse KL: +inf
    z[4, 5] = -INF  # forward KL: +inf
    labels, weights = torch.zeros(6, dtype=torch.int64), torch.tensor([1.0, -1, 1, 1, 1, -1])
    ids = torch.full((6, 9), -1)
    ids[5] = torch.arange(9)
    for objective, smoothing in itertools.product(OBJECTIVES[:4], SMOOTHINGS):
        batch = Batch(z, r, labels, weights, {"negative_ids": ids, "smoothing": smoothing})
        check(batch.with_options(method=objective), smoothing, with_stats=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_equal_logits_are_a_fixed_point_to_the_last_bit(kind: str, dtype: torch.dtype) -> None:
    z = (4 * torch.randn(8, 4099)).to(dtype)
    z[1] += 1000
    z[2, :2000] = -INF
    z[3, 3000:] = torch.finfo(dtype).min
    weights = torch.linspace(0.5, 3, 8)
    batch = Batch(z, z.clone(), torch.zeros(8, dtype=torch.int64), weights)
    batch = batch.with_options(method=tnt.Objective(kind, kind), temperature=0.7)
    for (backend, name), reduction, sizes in each_implementation(("sum", "none"), cuts(4099)):
        result = run_shards(batch, backend, sizes, reduction=reduction)
        assert (result.loss == 0).all(), (name, sizes)
        assert (result.gradient == 0).all(), (name, sizes)


def test_close_to_the_fixed_point(cpu: str) -> None:
    """A KL of 1e-9, to 1e-3 of its size."""
    torch.manual_seed(4)
    r = 3 * torch.randn(6, 32000)
    sizes = torch.tensor([0.3, 0.03, 3e-3, 4e-4, 1e-4, 4.5e-5])
    z = r + sizes[:, None] * torch.randn(6, 32000)
    for kind in ("forward_kl", "reverse_kl"):
        batch = Batch(z, r, torch.zeros(6, dtype=torch.int64), None)
        batch = batch.with_options(method=tnt.Objective(kind, kind))
        expected = truth(batch)
        exact = expected.terms.loss
        for backend in (cpu, "torch"):
            result = run_shards(batch, backend, (10000, 22000), reduction="none")
            assert ((result.loss - exact) / exact).abs().max() < 1e-3
            error = (result.gradient - expected.gradient).norm(dim=-1)
            error /= expected.gradient.norm(dim=-1)
            assert error[sizes >= 1e-4].max() < 1e-3


def test_backends_understand_each_other(cpu: str) -> None:
    """What travels means the same everywhere."""
    upstream = torch.linspace(-1, 2, 12)
    for objective, smoothing in itertools.product(OBJECTIVES[:4], SMOOTHINGS):
        batch = mixed_batch(300).with_options(method=objective, smoothing=smoothing, nl_floor=-5.0)
        expected = truth(batch)
        for backends in ((cpu, "torch"), ("torch", cpu)):
            result = run_shards(batch, backends, (100, 200), reduction="none", upstream=upstream)
            assert_agrees(result, expected, batch, reduction="none", upstream=upstream)


@pytest.mark.parametrize("vocab", [1, 17, 2051])
def test_a_gradient_in_bfloat16_of_float32_logits(vocab: int, backend: str) -> None:
    """What ``linear_tnt_loss`` has where matmuls keep float32."""
    for objective, smoothing in itertools.product(OBJECTIVES, ("negatives", "uniform")):
        options = {"method": objective, "smoothing": smoothing}
        assert_rounds_its_gradient(mixed_batch(vocab).with_options(**options), backend)
