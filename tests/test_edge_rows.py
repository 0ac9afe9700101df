"""Rows where naive arithmetic fails: empty, ignored, infinite, huge, broken; and those next to p = q."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import textwrap
from typing import Any

import fuzz
import hard_rows
import pytest
import torch
from oracle import (
    BF16,
    DTYPES,
    F16,
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
    instruction_set,
    instruction_sets,
    mixed_batch,
    rows_where,
    run,
    truth,
)
from torch import Tensor
from torch.nn import functional as F

import tnt_kernels as tnt

KLS = ("forward_kl", "reverse_kl")
SMOOTHINGS = ("negatives", "uniform")


def kl(kind: str) -> tnt.Objective:
    return tnt.Objective(kind, kind)


def check(batch: Batch, label: str = "") -> None:
    """Every implementation: row by row, and the mean of the finite rows, whose gradient is written in forward."""
    expected = truth(batch)
    finite = torch.isfinite(expected.terms.loss)
    some = rows_where(batch, finite)
    expected_of_some = truth(some)
    for backend, name in implementations():
        name = f"{name} {label}"
        result = run(batch, backend, reduction="none", return_stats=True)
        assert_agrees(result, expected, batch, reduction="none", label=name)
        assert_agrees(run(some, backend), expected_of_some, some, label=name)


def rows_of(
    pairs: list[tuple[list[float], list[float], float]], dtype: torch.dtype, label: int = 1
) -> Batch:
    """Rows (policy, reference, weight) that all have one label."""
    z, r, w = (torch.tensor(x, dtype=F64) for x in zip(*pairs, strict=True))
    labels = torch.full((len(pairs),), label)
    return Batch(z.to(dtype), r.to(dtype), labels, w.to(F64 if dtype == F64 else F32))


# --- nothing to do ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(shape: tuple[int, ...], reduction: str, backend: str) -> None:
    for dtype, objective in itertools.product(DTYPES, OBJECTIVES):
        z, labels = torch.empty(*shape, 7, dtype=dtype), torch.empty(shape, dtype=torch.int64)
        for ids in (None, torch.empty(*shape, 2, dtype=torch.int64), torch.tensor([1, 2])):
            batch = Batch(z, z, labels, torch.empty(shape), {"negative_ids": ids})
            for inplace in (False, True):
                result = run(
                    batch.with_options(method=objective),
                    backend,
                    reduction=reduction,
                    inplace=inplace,
                    return_stats=True,
                )
                assert result.loss.shape == (shape if reduction == "none" else ())
                assert (result.loss == 0).all()
                assert result.gradient.shape == z.shape
                assert all(x.shape == shape for x in result.stats)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_ignored(dtype: torch.dtype, backend: str) -> None:
    """Loss 0 on the graph, gradient exactly 0, whatever the rows hold."""
    z = torch.full((4, 9), NAN, dtype=dtype)
    z[1], z[2] = INF, -INF
    for labels, weights in (
        (torch.full((4,), -100), None),
        (torch.full((4,), 10**9), torch.zeros(4)),
        (torch.tensor([0, -100, -100, 8]), torch.tensor([0.0, 1.0, -1.0, -0.0])),
    ):
        for objective, reduction in itertools.product(OBJECTIVES, ("mean", "sum", "none")):
            for inplace in (False, True):
                batch = Batch(z, z, labels, weights, {"method": objective})
                result = run(batch, backend, reduction=reduction, inplace=inplace)
                assert (result.loss == 0).all()
                assert (result.gradient == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_change_nothing(dtype: torch.dtype, backend: str) -> None:
    clean = mixed_batch(60, dtype)
    clean.logits[7:9] = 0
    clean.ref_logits[7:9] = 0
    dirty = mixed_batch(60, dtype)
    assert dirty.logits[7].isnan().all()
    for objective in OBJECTIVES:
        for reduction in ("mean", "none"):
            a, b = (
                run(x.with_options(method=objective), backend, reduction=reduction)
                for x in (clean, dirty)
            )
            assert torch.equal(a.loss, b.loss)
            assert torch.equal(a.gradient, b.gradient)
            assert (b.gradient[7:9] == 0).all()


def test_rows_that_need_no_reference_do_not_read_it(backend: str) -> None:
    """Nor does a row of weight 0 read anything, an id out of range included."""
    batch = mixed_batch(60)
    kinds = (("log_likelihood", "forward_kl"), ("forward_kl", "unlikelihood"), ("none", "none"))
    for positive, negative in kinds:
        objective = tnt.Objective(positive, negative)
        expected = truth(batch.with_options(method=objective))
        ref = batch.ref_logits.clone()
        ids = batch.options["negative_ids"].clone()
        is_negative = (batch.weights < 0) | (ids >= 0).any(-1)
        reads = torch.where(is_negative, negative in KLS, positive in KLS)
        ref[~reads] = NAN
        ids[7:9], labels = 10**12, batch.labels.clone()
        labels[7] = -7
        torn = Batch(batch.logits, ref, labels, batch.weights, {"negative_ids": ids})
        torn = torn.with_options(method=objective)
        result = run(torn, backend, reduction="none", return_stats=True)
        assert_agrees(result, expected, torn, reduction="none")
        assert torch.isfinite(result.gradient).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects memory by mprotect")
def test_memory_that_is_not_needed_is_not_touched(cpu: str) -> None:
    """Rows of weight 0 and references of other losses than KLs, on pages that may not be read."""
    script = """
        import ctypes, mmap
        import torch
        import tnt_kernels as tnt

        V, page = 4096, mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)

        def rows_without_access(closed):
            buffer = mmap.mmap(-1, 4 * 4 * V)
            x = torch.frombuffer(buffer, dtype=torch.float32).view(4, V)
            x.copy_(torch.randn(4, V))
            for row in closed:
                address = ctypes.c_void_p(x[row].data_ptr())
                assert libc.mprotect(address, 4 * V, 0) == 0, ctypes.get_errno()
            return x

        z = rows_without_access([1, 3])
        r = rows_without_access([1, 2, 3])
        labels, weights = torch.tensor([1, 2, 3, -100]), torch.tensor([-1.0, 0.0, 1.0, -1.0])
        ids = torch.tensor([[7, V - 1]] * 2 + [[-1, -1]] * 2)
        for reduction in ("mean", "none"):
            leaf = z.detach().requires_grad_()
            loss, stats = tnt.tnt_loss(
                leaf, r, labels, weights, method="tnfll", reduction=reduction, return_stats=True,
                backend="cpu", negative_ids=ids,
            )
            loss.sum().backward()
            assert torch.isfinite(loss).all()
            assert (leaf.grad[[1, 3]] == 0).all() and (leaf.grad[[0, 2]] != 0).all()
        print("untouched")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "untouched", (done.returncode, done.stderr)


# --- infinities, masks, large logits ------------------------------------------------------------------


def masked_batch(dtype: torch.dtype, value: float, vocab: int, side: str) -> Batch:
    """A third of the entries at ``value``: in the policy, in the reference, or in both."""
    batch = mixed_batch(vocab, dtype, rows=7, seed=3)
    where = torch.rand(7, vocab, generator=torch.Generator().manual_seed(1)) < 0.3
    where[:, -1] = False  # something is left
    for x in {"policy": [batch.logits], "reference": [batch.ref_logits]}.get(
        side, [batch.logits, batch.ref_logits]
    ):
        x[where] = value
    return batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["policy", "reference", "both"])
def test_minus_infinity(side: str, dtype: torch.dtype) -> None:
    for vocab in (11, 2100):
        for smoothing, objective in itertools.product(SMOOTHINGS, OBJECTIVES[:4]):
            batch = masked_batch(dtype, -INF, vocab, side)
            check(batch.with_options(method=objective, smoothing=smoothing), f"{side} {smoothing}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["policy", "reference", "both"])
def test_masks_of_the_lowest_number(side: str, dtype: torch.dtype) -> None:
    """What attention code and logit processors write for "never".

    Where it meets a positive probability the loss is nearly the largest number, or inf: no digits are asked for.
    """
    for objective, smoothing in itertools.product(OBJECTIVES[:4], SMOOTHINGS):
        batch = masked_batch(dtype, torch.finfo(dtype).min, 300, side)
        batch = batch.with_options(method=objective, smoothing=smoothing)
        expected = truth(batch)
        absurd = expected.terms.loss.abs() > 1e30
        for backend, name in implementations():
            loss = run(batch, backend, reduction="none").loss
            assert (loss[absurd].isnan() | (loss[absurd].abs() > 1e29)).all(), name
        if not absurd.all():
            check(rows_where(batch, ~absurd), f"{side} {smoothing}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_known_values(dtype: torch.dtype) -> None:
    """Any finite logit is a logit, one side may be shifted, and one rule says what is broken."""
    for backend, name in implementations():
        for keywords in ({"reduction": "none"}, {"reduction": "sum"}, {"inplace": True}):

            def result(batch: Batch, backend=backend, keywords=keywords) -> Any:
                return run(batch, backend, return_stats=True, **keywords)

            hard_rows.assert_known(result, dtype, f"{name} {keywords}")


def test_a_moment_that_no_float_holds(cpu: str) -> None:
    """The reference alone is masked where p is not small: a loss near the largest number, and a gradient."""
    lowest = torch.finfo(F32).min
    z = torch.zeros(2, 8)
    r = torch.tensor([[0.0, *[lowest] * 5, 0.0, 0.0], [lowest / 10, *[lowest / 9] * 7]])
    batch = Batch(z, r, torch.zeros(2, dtype=torch.int64), None, {"method": kl("reverse_kl")})
    expected = truth(batch)
    for name in instruction_sets():
        with instruction_set(name):
            result = run(batch, cpu, reduction="none")
        torch.testing.assert_close(result.loss.double(), expected.terms.loss, rtol=1e-5, atol=0)
        gradient = result.gradient.double()
        torch.testing.assert_close(gradient, expected.gradient, rtol=1e-5, atol=1e30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [11, 1500])
def test_finite_masks(vocab: int, dtype: torch.dtype) -> None:
    for batch in hard_rows.masks(dtype, vocab):
        check(batch, str(batch.options["method"]))
        assert (run(batch, reduction="none", return_stats=True).stats.kl.nan_to_num(0.0) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [11, 1500])
def test_shifts_of_one_side(vocab: int, dtype: torch.dtype) -> None:
    for batch in hard_rows.shifts(dtype, vocab):
        check(batch, str(batch.options["method"]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rule_for_what_is_broken(dtype: torch.dtype) -> None:
    """Loss, gradient and every statistic, NaN where the oracle has NaN."""
    for batch in hard_rows.broken(dtype, 40):
        check(batch, str(batch.options["method"]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_inside_the_set(dtype: torch.dtype) -> None:
    """Removed tokens that either side, or both, masks already; the row's own label among them."""
    for smoothing, objective in itertools.product(SMOOTHINGS, OBJECTIVES[:4]):
        batch = mixed_batch(1500, dtype, rows=7, seed=5)
        for row, x in enumerate((batch.logits, batch.ref_logits)):
            for i in range(7):
                x[i, batch.options["negative_ids"][i].clamp_min(0)[row::2]] = -INF
        batch.logits[5, batch.labels[5]] = -INF  # pushed down in part
        batch.ref_logits[[1, 6], batch.labels[[1, 6]]] = -INF
        check(batch.with_options(method=objective, smoothing=smoothing), smoothing)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("w", [1.0, -1.0, -0.3])
def test_huge_logits(w: float, dtype: torch.dtype) -> None:
    top = 1e4
    pairs = [
        ([top, 1.0, -top, 0.0, 9.5e3], [-top, 3.0, top, 0.0, 9.5e3], w),
        ([top, -top, top, 0.0, -top], [top, -top, top, 8.0, -top], w),
        ([-top, -top, -top, -top, -top - 64], [-top, -top, -top - 64, -top, -top], w),
        ([top + 64, top, top, top - 64, top], [top, top, top, top, top], w),
        ([0.0, top, 0.0, 0.0, 0.0], [0.0, top, 0.0, 0.0, 0.0], w),
    ]
    for smoothing, objective, temperature in itertools.product(
        SMOOTHINGS, OBJECTIVES[:4], (1.0, 10.0)
    ):
        batch = rows_of(pairs, dtype).with_options(
            method=objective, smoothing=smoothing, temperature=temperature
        )
        check(batch, f"{smoothing} {temperature}")


def uneven_rows(dtype: torch.dtype) -> Batch:
    """Rows of some tiles of 256, whose maximum moves from tile to tile in every way."""
    torch.manual_seed(6)
    vocab, lowest = 4 * 256 + 100, torch.finfo(dtype).min
    tile, ramp = torch.arange(vocab) // 256, torch.linspace(0, 1, vocab, dtype=F64)
    zero = torch.zeros(vocab, dtype=F64)
    shapes = [height * ramp for height in (30.0, 100.0, 300.0, 5e3)]
    shapes += [step * tile.double() for step in (20.0, 39.0, 41.0, 88.0, 200.0, 1e3)]
    shapes += [x.flip(0) for x in shapes]
    shapes += [zero.masked_fill(tile == at, x) for at in (0, 2, 4) for x in (60.0, -60.0, -INF)]
    shapes += [zero.masked_fill(tile < 3, x) for x in (-1e4, lowest, -INF)]
    shapes += [zero.masked_fill(tile > 1, x) for x in (-1e4, lowest, -INF)]
    base = torch.stack(shapes)
    n = len(base)
    z, r = (base + torch.randn(n, vocab) for _ in range(2))
    far = torch.where(tile == torch.arange(n)[:, None] % 5, 1.0, 1e-3)  # close but for one tile
    z[::2] = r[::2] + (far * torch.randn(n, vocab))[::2]
    ids = torch.randint(vocab, (n, 6))
    ids[::3] = -1
    ids[1::3, 0] = z[1::3].argmax(-1)
    labels, weights = torch.randint(vocab, (n,)), torch.tensor([1.0, -1.0, -0.3]).repeat(n)[:n]
    labels[::2] = r[::2].argmax(-1)
    z, r = (torch.where(x == -INF, x, x.clamp_min(lowest)).to(dtype) for x in (z, r))
    return Batch(z, r, labels, weights.to(F64 if dtype == F64 else F32), {"negative_ids": ids})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_uneven_rows(temperature: float, dtype: torch.dtype) -> None:
    batch = uneven_rows(dtype).with_options(temperature=temperature)
    for objective, smoothing in itertools.product(OBJECTIVES[:4], SMOOTHINGS):
        some = batch.with_options(method=objective, smoothing=smoothing)
        sane = truth(some).terms.loss.abs() < 1e30
        check(rows_where(some, sane), smoothing)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_almost_all_mass_on_the_set(smoothing: str, dtype: torch.dtype) -> None:
    """q(S) or p(S), or both, from 1 - 1e-5 to 1: what is left keeps its digits."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 40, generator=generator).tolist()

    def peak(x: list[float], height: float) -> list[float]:
        return [x[0], height, *x[2:]]

    pairs = []
    for height in (14.0, 23.0, 60.0, 120.0):
        for w in (-1.0, -0.75, -3.0, 1.0):
            pairs += [
                (a, peak(b, height), w),
                (peak(a, height), b, w),
                (peak(a, height), peak(b, height), w),
                (peak(a, -height), b, w),
                (peak(a, -height), peak(b, height), w),
            ]
    batch = rows_of(pairs, dtype)
    for objective in OBJECTIVES[:4]:
        check(batch.with_options(method=objective, smoothing=smoothing), smoothing)


def test_what_is_left_of_almost_nothing(backend: str) -> None:
    """q(S) = 1 - 1e-9 in float32: the target is the reference without the token, to float32's digits."""
    torch.manual_seed(0)
    z, r = torch.randn(2, 1, 500)
    r[0, 3] = 27.0
    q = r.double().softmax(-1)
    assert 1e-10 < 1 - q[0, 3] < 2e-9
    result = run(Batch(z, r, torch.tensor([3]), torch.tensor([-1.0])), backend)
    rest = r.double().index_fill(-1, torch.tensor(3), -INF).softmax(-1)
    p = z.double().softmax(-1)
    torch.testing.assert_close(result.gradient.double(), p - rest, rtol=1e-5, atol=1e-9)
    expected = (torch.xlogy(rest, rest) - rest * p.log()).sum()
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-6, atol=0)
    # unlikelihood with p(S) = 1 - 1e-12: -log of the rest
    result = run(Batch(r, r, torch.tensor([3]), torch.tensor([-1.0]), {"method": "ul+ll"}), backend)
    torch.testing.assert_close(result.loss.double(), -(1 - q[0, 3]).log(), rtol=1e-6, atol=0)
    expected = -q * q[0, 3] / (1 - q[0, 3])
    expected[0, 3] = q[0, 3]
    torch.testing.assert_close(result.gradient.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("height", [4.0, 20.0, 45.0, 70.0])
def test_likelihoods_of_a_token_with_nearly_all_the_mass(height: float, cpu: str) -> None:
    """LL where p_y, and UL where p(S), is down to 1 - 1e-27 in float32: what is left keeps its digits."""
    torch.manual_seed(1)
    vocab, y = 5000, 4000
    z = 2 * torch.randn(2, vocab)
    z[:, y] = 10 + height
    x = z.double()
    rest = x.index_fill(-1, torch.tensor(y), -INF)
    odds = x[:, y] - rest.logsumexp(-1)
    share, left = rest.softmax(-1), (-odds).sigmoid()
    exact = torch.stack([share[0] * left[0], -share[1] * odds[1].sigmoid()])
    exact[:, y] = torch.stack([-left[0], odds[1].sigmoid()])
    losses = torch.stack([F.softplus(-odds[0]), F.softplus(odds[1])])
    batch = Batch(z, None, torch.tensor([y, y]), torch.tensor([1.0, -1.0]), {"method": "ul+ll"})
    for name in instruction_sets():
        with instruction_set(name):
            result = run(batch, cpu, reduction="none")
        torch.testing.assert_close(result.loss.double(), losses, rtol=5e-7, atol=0, msg=name)
        torch.testing.assert_close(result.gradient.double(), exact, rtol=2e-6, atol=1e-38)


def test_a_vocabulary_of_one_token(backend: str) -> None:
    """Its logit says nothing, one that is no float when divided by T included."""
    z = torch.tensor([[torch.finfo(F32).min]])
    batch = Batch(z, z, torch.tensor([0]), torch.tensor([1.0]), {"temperature": 0.5})
    for objective, smoothing in itertools.product(OBJECTIVES[:4], SMOOTHINGS):
        result = run(batch.with_options(method=objective, smoothing=smoothing), backend)
        torch.testing.assert_close(result.loss, torch.tensor(0.0))
        torch.testing.assert_close(result.gradient, torch.zeros(1, 1))


@pytest.mark.parametrize("row", list(hard_rows.rare()), ids=lambda row: row.name)
def test_rows_off_the_short_way(row: hard_rows.Rare, cpu: str) -> None:
    for name in instruction_sets():
        with instruction_set(name):
            later = run(row.batch, cpu, reduction="none", return_stats=True)
            at_once = run(row.batch, cpu, reduction="sum", return_stats=True)
        fuzz.assert_agrees(later, row.batch, f"{name}, {row.name}")
        at_once = at_once._replace(loss=at_once.loss.reshape(1))
        fuzz.assert_agrees(at_once, row.batch, f"{name}, {row.name}, gradient at once")


@pytest.mark.parametrize("kind", KLS)
def test_a_pushed_label_beside_a_large_sum(kind: str, cpu: str) -> None:
    """Next to the first entries weights add up to e^64, of which a logarithm has lost what the label adds."""
    generator = torch.Generator().manual_seed(8)
    r = torch.randn(1, 2100, dtype=F64, generator=generator)
    r[0, 2090], r[0, 2080] = 9.0, 6.0
    z = r + 1e-6 * torch.randn(1, 2100, dtype=F64, generator=generator)
    weights = torch.tensor([-0.7], dtype=F64)
    batch = Batch(
        z,
        r,
        torch.tensor([2080]),
        weights,
        {"method": tnt.Objective(kind, kind), "temperature": 0.1},
    )
    result = run(batch, cpu)
    assert result.gradient.abs().sum() > 1e-13
    assert result.gradient.sum().abs() < 1e-18


# --- next to the fixed point ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KLS)
def test_equal_logits_are_a_fixed_point_to_the_last_bit(kind: str, dtype: torch.dtype) -> None:
    """Loss and gradient exactly 0, wherever the two rows lie in memory."""
    torch.manual_seed(2)
    for vocab, temperature in itertools.product((1, 7, 1000, 4099), (1.0, 0.7)):
        z = (4 * torch.randn(8, vocab)).to(dtype)
        z[1] += 1000
        z[2, : vocab // 2] = -INF
        z[3, vocab // 2 + 1 :] = torch.finfo(dtype).min
        elsewhere = torch.zeros(8, vocab + 3, dtype=dtype)[:, 3:]
        elsewhere.copy_(z)
        labels, weights = torch.zeros(8, dtype=torch.int64), torch.linspace(0.5, 3, 8)
        batch = Batch(z, elsewhere, labels, weights, {"method": kl(kind)})
        for (backend, name), reduction, inplace in each_implementation(
            ("sum", "none"), (False, True)
        ):
            result = run(
                batch,
                backend,
                reduction=reduction,
                inplace=inplace,
                temperature=temperature,
                return_stats=True,
            )
            where = (name, vocab, temperature, reduction)
            assert (result.loss == 0).all(), where
            assert (result.gradient == 0).all(), where
            assert (result.stats.kl == 0).all(), where


@pytest.mark.parametrize("kind", KLS)
@pytest.mark.parametrize("w", [1.0, -0.3, -1.0])
def test_gradient_next_to_the_fixed_point(kind: str, w: float) -> None:
    """|z - r| = 1e-4 in float32: within 1e-3 of the gradient, where p - q* would have no digit left.

    A reverse KL with p(S) > 0 is far from its target, so here the policy lacks the removed token.
    """
    torch.manual_seed(3)
    vocab, removed = 32000, 17
    r = 2 * torch.randn(4, vocab)
    r[1] += 50
    step = 1e-4 * torch.randn(4, vocab).sign()
    z = r + step
    labels, weights = torch.full((4,), removed), torch.full((4,), w)
    if w == -1:
        z[:, removed] = -INF
    if w == -0.3:
        z[:, removed] += math.log(0.7)
    batch = Batch(z, r, labels, weights, {"method": kl(kind), "eps": 0.0 if w < 0 else 1e-6})
    expected = truth(batch)
    for (backend, name), reduction in each_implementation(("sum", "none")):
        gradient = run(batch, backend, reduction=reduction).gradient.double()
        exact = expected.gradient * expected.terms.scale[:, None]
        error = (gradient - exact).norm(dim=-1) / exact.norm(dim=-1)
        limit = 1e-2 if backend == "triton" else 1e-3
        assert (error < limit).all(), (name, reduction, error)
        # and token by token, but for those whose own gradient cancels
        large = (
            exact.abs() > 0.2 * 1e-4 * z.double().softmax(-1) * expected.terms.scale.abs()[:, None]
        )
        relative = ((gradient - exact) / exact).abs()[large]
        assert large.sum() > 0.9 * large.numel()
        assert relative.max() < 5 * limit, (name, reduction, relative.max())


@pytest.mark.parametrize("kind", KLS)
@pytest.mark.parametrize("w", [1.0, -1.0])
def test_kl_down_to_a_billionth(kind: str, w: float) -> None:
    """Within 1e-3 of its own size in float32, with a vocabulary of 32000."""
    torch.manual_seed(4)
    vocab, removed = 32000, 17
    r = 3 * torch.randn(6, vocab)
    sizes = torch.tensor([0.3, 0.03, 3e-3, 4e-4, 1e-4, 4.5e-5])
    z = r + sizes[:, None] * torch.randn(6, vocab)
    if w < 0:
        z[:, removed] = -INF
    labels, weights = torch.full((6,), removed), torch.full((6,), w)
    batch = Batch(z, r, labels, weights, {"method": kl(kind), "eps": 0.0})
    exact = truth(batch).terms.loss
    assert exact.min() < 1.5e-9
    for backend, name in implementations():
        for reduction in ("none", "sum"):
            result = run(batch, backend, reduction=reduction, return_stats=True)
            error = ((result.stats.kl - exact) / exact).abs()
            assert (error < 1e-3).all(), (name, error)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_next_to_the_fixed_point_in_half_precision(dtype: torch.dtype) -> None:
    """One entry in a hundred is a unit apart, the others are equal. A large factor on the gradient, as a
    GradScaler has, keeps it from underflowing."""
    torch.manual_seed(5)
    r = (3 * torch.randn(4, 3000)).to(dtype)
    z = r.clone()
    z.view(torch.int16)[:, ::100] += 1
    for kind in KLS:
        batch = Batch(z, r, torch.zeros(4, dtype=torch.int64), None, {"method": kl(kind)})
        expected = truth(batch)
        for backend, name in implementations():
            result = run(batch, backend, reduction="none", upstream=torch.full((4,), 2.0**16))
            error = (result.loss - expected.terms.loss).abs() / expected.terms.loss
            assert (error < 1e-3).all(), (name, error)
            exact = expected.gradient * 2**16
            gradient = result.gradient.double()
            error = (gradient - exact).norm(dim=-1) / exact.norm(dim=-1)
            assert (error < 2**-8).all(), (name, error)


# --- what is undefined or infinite --------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("side", ["policy", "reference"])
def test_a_broken_row_breaks_itself_only(side: str, bad: float, backend: str) -> None:
    for dtype in (F32, BF16):
        whole = mixed_batch(1100, dtype)
        for positive, negative in (
            *zip(POSITIVE[:3], NEGATIVE[:3], strict=True),
            ("none", "negative_likelihood"),
        ):
            options: dict[str, Any] = {"method": tnt.Objective(positive, negative)}
            want = run(whole.with_options(**options), backend, reduction="none")
            for row, column in ((0, 5), (1, 1050), (2, 3), (5, 1023)):
                batch = mixed_batch(1100, dtype).with_options(**options)
                x = batch.logits if side == "policy" else batch.ref_logits
                x[row, column] = bad
                kind = negative if row != 0 else positive
                result = run(batch, backend, reduction="none")
                others = torch.arange(len(batch.labels)) != row
                assert torch.equal(result.loss[others], want.loss[others])
                assert torch.equal(result.gradient[others], want.gradient[others])
                if kind == "none" or (side == "reference" and kind not in KLS):
                    assert torch.equal(result.loss, want.loss)
                else:
                    assert result.loss[row].isnan(), (dtype, kind)
                    assert result.gradient[row].isnan().all(), (dtype, kind)
                    assert run(batch, backend).loss.isnan()


def test_a_broken_entry_of_the_set(backend: str) -> None:
    """NaN on a removed token: the policy's distribution does not exist."""
    for objective in OBJECTIVES[:4]:
        batch = mixed_batch(50, rows=7).with_options(method=objective, reduction="none")
        batch.logits[1, batch.labels[1]] = NAN
        batch.logits[5, batch.labels[5]] = INF
        result = run(batch, backend)
        assert result.loss[[1, 5]].isnan().all()
        assert result.gradient[[1, 5]].isnan().all()
        assert torch.isfinite(result.loss[[0, 2, 3, 4, 6]]).all()


def test_nothing_left() -> None:
    """UL is +inf without a gradient, a KL has no target: NaN. NL is what it always is."""
    z = torch.randn(4, 6)
    everything = torch.arange(6)
    z[3, 2] = -INF
    for objective, smoothing in itertools.product(OBJECTIVES[:4], SMOOTHINGS):
        batch = Batch(z, z, torch.zeros(4, dtype=torch.int64), torch.tensor([1.0, -1, -0.5, 2]))
        batch = batch.with_options(method=objective, smoothing=smoothing, negative_ids=everything)
        expected = truth(batch)
        if objective.negative == "unlikelihood":
            assert (expected.terms.loss == INF).all()
        elif objective.negative in KLS:
            assert expected.terms.loss.isnan().all()
        else:
            assert torch.isfinite(expected.terms.loss[:3]).all()
        if objective.negative != "negative_likelihood":
            assert expected.gradient.isnan().all()
        check(batch, smoothing)


def test_infinite_divergences() -> None:
    """+inf, not NaN; a forward KL keeps its gradient, a reverse KL has none."""
    z = torch.tensor([[0.0, 1.0, 0.5], [0.0, -INF, 0.5], [0.0, 1.0, 0.5]])
    r = torch.tensor([[0.5, -INF, 0.0], [0.5, 1.0, 0.0], [-INF, 0.0, 0.0]])
    labels, weights = torch.tensor([0, 0, 2]), torch.tensor([1.0, 2.0, -0.5])
    for kind, losses in (("reverse_kl", [INF, None, INF]), ("forward_kl", [None, INF, None])):
        batch = Batch(z, r, labels, weights, {"method": kl(kind)})
        expected = truth(batch)
        for i, loss in enumerate(losses):
            assert expected.terms.loss[i] == loss if loss else expected.terms.loss[i] < 10
        assert torch.equal(
            expected.gradient.isnan().all(-1), expected.terms.loss.isinf() & (kind == "reverse_kl")
        )
        check(batch)


def test_likelihoods_at_infinity() -> None:
    z = torch.tensor([[0.0, -INF, 1.0]]).repeat(4, 1)
    weights = torch.tensor([1.0, -1.0, -0.5, -2.0])
    for positive, negative, floor in (
        ("log_likelihood", "unlikelihood", None),
        ("none", "negative_likelihood", None),
        ("none", "negative_likelihood", -3.0),
    ):
        batch = Batch(z, z, torch.ones(4, dtype=torch.int64), weights)
        check(batch.with_options(method=tnt.Objective(positive, negative), nl_floor=floor))


def test_a_policy_without_a_finite_logit(backend: str) -> None:
    z = torch.full((2, 5), -INF)
    for objective in OBJECTIVES[:3]:
        batch = Batch(z, torch.zeros(2, 5), torch.tensor([0, 1]), torch.tensor([1.0, -1.0]))
        result = run(batch.with_options(method=objective), backend, reduction="none")
        assert result.loss.isnan().all(), objective
        assert result.gradient.isnan().all(), objective


def test_a_side_without_a_loss(backend: str) -> None:
    """Its rows count as rows, with loss and gradient 0, broken ones too."""
    batch = mixed_batch(30, ids=0)
    batch.logits[1] = NAN
    whole = batch.with_options(method=tnt.Objective("forward_kl", "none"))
    result = run(whole, backend, return_stats=True)
    positive = (batch.weights > 0) & (batch.labels >= 0)
    alone = run(rows_where(whole, positive), backend, reduction="sum")
    torch.testing.assert_close(result.loss, alone.loss / 10)
    assert (result.gradient[~positive] == 0).all()
    torch.testing.assert_close(result.gradient[positive], alone.gradient / 10)
    assert torch.isfinite(result.stats.entropy[3])


def test_alpha_of_zero_leaves_nothing_of_a_broken_negative_row(backend: str) -> None:
    batch = mixed_batch(30, ids=0).with_options(alpha=0.0)
    batch.logits[1] = NAN
    for reduction in ("mean", "none"):
        result = run(batch, backend, reduction=reduction)
        assert torch.isfinite(result.loss).all()
        assert (result.gradient[batch.weights < 0] == 0).all()
        assert torch.isfinite(result.gradient).all()


def test_a_broken_normalizer_is_not_mistaken_for_none(backend: str) -> None:
    batch = mixed_batch(30)
    assert run(batch, backend, normalizer=torch.tensor(NAN)).loss.isnan()
    assert run(batch, backend, normalizer=torch.tensor(INF)).loss == 0


def tensors(batch: Batch) -> list[Tensor]:
    return [
        x for x in (batch.logits, batch.ref_logits, batch.labels, batch.weights) if x is not None
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_left_alone(dtype: torch.dtype, backend: str) -> None:
    for objective in OBJECTIVES:
        batch = mixed_batch(1100, dtype).with_options(method=objective)
        before = [x.clone() for x in tensors(batch)]
        for reduction in ("mean", "none"):
            run(batch, backend, reduction=reduction, return_stats=True)
            run(batch, backend, reduction=reduction, inplace=True)
        for x, y in zip(tensors(batch), before, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
