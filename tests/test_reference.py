"""The oracle against three truths: the authors' numbers, naive autograd, 60-digit decimals."""

from __future__ import annotations

import decimal
import itertools
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tnt_kernels.objectives import METHODS, Objective
from tnt_kernels.reference import row_gradients, row_terms

POSITIVE = ("forward_kl", "reverse_kl", "log_likelihood", "none")
NEGATIVE = ("forward_kl", "reverse_kl", "unlikelihood", "negative_likelihood", "none")
INF, NAN = math.inf, math.nan
F64 = torch.float64


def rows(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def both(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return row_terms(*args, **kwargs).loss, row_gradients(*args, **kwargs)


def kl_of(loss: str) -> Objective:
    return Objective(loss, loss)


# --- the authors' numbers ------------------------------------------------------------------------

GOLDEN = np.load(Path(__file__).parent / "golden" / "t5patches.npz")


@pytest.mark.parametrize("case", ["0", "1", "2"])
@pytest.mark.parametrize("name", ["NL", "UL", "TNFF", "TNRR", "TNRF", "TNFLL", "TNRLL"])
def test_golden(case: str, name: str) -> None:
    def get(key: str) -> Tensor:
        return torch.from_numpy(np.asarray(GOLDEN[f"{case}/{key}"]))

    logits, ref = (get(key).flatten(0, 1) for key in ("logits", "ref_logits"))
    labels, weights = (get(key).flatten() for key in ("labels", "weights"))
    method = METHODS[{"NL": "nl+ll", "UL": "ul+ll"}.get(name, name.lower())]
    eps = 1e-6 if name in ("TNRR", "TNRF", "TNRLL") else 0.0
    options: dict[str, Any] = {
        "objective": method,
        "alpha": float(get("alpha")),
        "eps": eps,
        "smoothing": "uniform" if eps else "negatives",
    }
    terms = row_terms(logits, ref, labels, weights, **options)
    gradient = row_gradients(logits, ref, labels, weights, **options)

    # theirs is the cross-entropy where ours is a forward KL: they differ by the target's entropy
    q = ref.softmax(-1)
    q = q.scatter(-1, labels[:, None], q.gather(-1, labels[:, None]) * (weights >= 0)[:, None])
    q = (q / q.sum(-1, keepdim=True) + eps) / (1 + q.shape[-1] * eps)
    side = [method.negative if w < 0 else method.positive for w in weights.tolist()]
    is_forward = torch.tensor([s == "forward_kl" for s in side]) & (weights != 0)
    loss = terms.loss + torch.where(is_forward, -torch.xlogy(q, q).sum(-1), 0.0)

    expected = get(f"{name}/loss").flatten()
    torch.testing.assert_close(loss * terms.scale, expected, rtol=1e-12, atol=1e-12)
    expected = get(f"{name}/grad").flatten(0, 1)
    torch.testing.assert_close(gradient * terms.scale[:, None], expected, rtol=1e-12, atol=1e-12)


# --- naive PyTorch, written from the table of formulas --------------------------------------------


def naive_loss(
    z: Tensor, r: Tensor, y: int, w: float, ids: list[int], objective: Objective, **o: Any
) -> Tensor:
    """One row's loss as the table of formulas says it, without a thought for digits."""
    size, eps, uniform = z.shape[0], o["eps"], o["smoothing"] == "uniform"
    removed = {i for i in ids if i >= 0} | ({y} if w <= -1 else set())
    negative = removed | ({y} if w < 0 else set())
    log_p = (z / o["temperature"]).log_softmax(0)
    p = log_p.exp()
    s, gone = sorted(negative), sorted(removed)
    kappa = torch.ones(size, dtype=F64)
    if w < 0:
        kappa[y] = max(0.0, 1 + w)
    kappa[gone] = 0
    target = kappa * (r / o["temperature"]).softmax(0)
    target = target / target.sum()
    smooth = target
    if uniform:
        smooth = target = (target + eps) / (1 + size * eps)
    elif gone:
        smooth = target.clone()
        smooth[gone] = eps
        smooth = smooth / (1 + eps * len(gone))
    kind = objective.negative if negative else objective.positive
    if kind == "forward_kl":
        return (torch.xlogy(target, target) - target * log_p).sum()
    if kind == "reverse_kl":
        return (p * (log_p - smooth.log())).sum()
    if kind == "log_likelihood":
        one_hot = torch.nn.functional.one_hot(torch.tensor(y), size).to(F64)
        if uniform:
            one_hot = (one_hot + eps) / (1 + size * eps)
        return -(one_hot * log_p).sum()
    if kind == "unlikelihood":
        return -(1 - p[s].sum()).log()
    if kind == "negative_likelihood":
        floor = o["nl_floor"]
        return (log_p[s] if floor is None else log_p[s].clamp_min(floor)).sum()
    return 0 * z.sum()


WEIGHTS = [1.0, 2.5, -1.0, -0.4, -3.0, 0.5, -0.4, -1.0, 0.0]
IDS = [[-1, -1, -1]] * 5 + [[3, -1, 3], [6, 0, -1], [-1, 5, 2], [1, 2, 3]]
LABELS = [0, 4, 2, 6, 1, 5, 6, 5, 3]  # row 6: its partly pushed-down label is among its ids


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    z, r = (2 * torch.randn(len(WEIGHTS), 7, dtype=F64) for _ in range(2))
    return z, r, torch.tensor(LABELS), torch.tensor(WEIGHTS, dtype=F64), torch.tensor(IDS)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize(("smoothing", "eps"), [("negatives", 1e-6), ("uniform", 1e-2)])
@pytest.mark.parametrize(("positive", "negative"), [*itertools.product(POSITIVE, NEGATIVE)])
def test_every_pair_against_naive_autograd(
    positive: str, negative: str, smoothing: str, eps: float, temperature: float
) -> None:
    z, r, labels, weights, ids = batch()
    objective = Objective(positive, negative)
    for floor in (None, -2.0) if negative == "negative_likelihood" else (None,):
        options: dict[str, Any] = {
            "objective": objective,
            "eps": eps,
            "smoothing": smoothing,
            "temperature": temperature,
            "nl_floor": floor,
        }
        leaf = z.clone().requires_grad_()
        naive = [
            naive_loss(leaf[i], r[i], LABELS[i], WEIGHTS[i], IDS[i], **options)
            for i in range(len(WEIGHTS))
        ]
        expected = torch.stack(naive) * (weights != 0)
        (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)

        loss, gradient = both(z, r, labels, weights, negative_ids=ids, **options)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradient, expected_grad, rtol=1e-11, atol=1e-14)
        assert gradient.sum(-1).abs().max() < 1e-14

        leaf = z.clone().requires_grad_()
        upstream = torch.linspace(-1, 2, len(WEIGHTS), dtype=F64)
        terms = row_terms(leaf, r, labels, weights, negative_ids=ids, **options)
        (through,) = torch.autograd.grad((terms.loss * upstream).sum(), leaf)
        assert torch.equal(through, gradient * upstream[:, None])


def test_gradcheck() -> None:
    z, r, labels, weights, ids = batch()
    z.requires_grad_()
    for method in ("tnfr", "tnrf", "ul+ll", "nl+ll"):
        for smoothing in ("negatives", "uniform"):

            def loss(x: Tensor, method: str = method, smoothing: str = smoothing) -> Tensor:
                options: dict[str, Any] = {"objective": METHODS[method], "smoothing": smoothing}
                return row_terms(x, r, labels, weights, negative_ids=ids, **options).loss

            assert torch.autograd.gradcheck(loss, z, fast_mode=True)


def test_scale() -> None:
    """w on positive rows, α on negative ones (α |w| for NL and UL where w < 0), 0 if left out."""
    weights = rows(2.0, -0.5, 3.0, 0.0, 1.5, -2.0)
    labels = torch.tensor([0, 1, 2, 0, -100, 1])
    ids = torch.tensor([[-1], [-1], [0], [1], [1], [0]])
    z, alpha = torch.zeros(6, 4, dtype=F64), rows(10.0, 20.0, 30.0, 40.0, 50.0, 60.0)
    for name, expected in {
        "tnff": [2.0, 20.0, 30.0, 0.0, 0.0, 60.0],
        "ul+ll": [2.0, 10.0, 30.0, 0.0, 0.0, 120.0],
        "nl+ll": [2.0, 10.0, 30.0, 0.0, 0.0, 120.0],
    }.items():
        terms = row_terms(
            z, z, labels, weights, objective=METHODS[name], alpha=alpha, negative_ids=ids
        )
        assert terms.scale.tolist() == expected
    terms = row_terms(z, z, labels, weights, objective=METHODS["tnff"], alpha=7.0)
    assert terms.scale.tolist() == [2.0, 7.0, 3.0, 0.0, 0.0, 7.0]


def test_statistics() -> None:
    z, r, labels, weights, ids = batch()
    terms = row_terms(z, r, labels, weights, objective=METHODS["tnrll"], negative_ids=ids)
    p, q = z.softmax(-1), r.softmax(-1)
    for i, (y, w, row_ids) in enumerate(zip(LABELS, WEIGHTS, IDS, strict=True)):
        s = sorted({v for v in row_ids if v >= 0} | ({y} if w < 0 else set()))
        if w == 0:
            assert terms.loss[i] == 0
            assert terms.scale[i] == 0
            assert all(math.isnan(float(x[i])) for x in terms[2:])
            continue
        torch.testing.assert_close(terms.negative_mass[i], p[i, s].sum())
        torch.testing.assert_close(terms.entropy[i], -(p[i] * p[i].log()).sum())
        if s:
            assert terms.kl[i] == terms.loss[i]
            torch.testing.assert_close(terms.ref_negative_mass[i], q[i, s].sum())
        else:  # a row of LL reads no reference
            assert terms.kl[i].isnan()
            assert terms.ref_negative_mass[i].isnan()


# --- hard rows, against decimals ------------------------------------------------------------------


def exact(
    z: list[float], r: list[float], y: int, w: float, kind: str, uniform: bool, eps: float
) -> tuple[float, list[float], list[float]]:
    """Loss, gradient and each gradient element's size of terms, in 60 digits."""
    with decimal.localcontext() as context:
        context.prec = 60

        def softmax(x: list[float], kappa: list[Decimal]) -> list[Decimal]:
            top = Decimal(max(a for a, k in zip(x, kappa, strict=True) if k))
            e = [k * (Decimal(a) - top).exp() for a, k in zip(x, kappa, strict=True)]
            return [a / sum(e) for a in e]

        size, tiny = len(z), Decimal(eps)
        kappa = [Decimal(1)] * size
        if w < 0:
            kappa[y] = max(Decimal(0), 1 + Decimal(w))
        p = softmax(z, [Decimal(1)] * size)
        hot = [Decimal(int(v == y)) for v in range(size)]
        if kind == "unlikelihood":
            rest = 1 - p[y]
            g = [p[v] if v == y else -p[y] * p[v] / rest for v in range(size)]
            return float(-rest.ln()), [float(x) for x in g], [float(abs(x)) for x in g]
        if kind == "negative_likelihood":
            g = [hot[v] - p[v] for v in range(size)]
            return float(p[y].ln()), [float(x) for x in g], [1.0] * size
        if kind == "log_likelihood":
            t = [(h + tiny) / (1 + size * tiny) for h in hot] if uniform else hot
            g = [p[v] - t[v] for v in range(size)]
            loss = -sum((t[v] * p[v].ln() for v in range(size) if t[v]), Decimal(0))
            # under uniform smoothing, p_y less a number close to 1
            sizes = [max(a, b) if uniform else abs(x) for a, b, x in zip(p, t, g, strict=True)]
            return float(loss), [float(x) for x in g], [float(x) for x in sizes]
        q = softmax(r, kappa)
        n = sum(k == 0 for k in kappa)
        if uniform:
            q = [(a + tiny) / (1 + size * tiny) for a in q]
        elif kind == "reverse_kl" and n:
            q = [(a if k else tiny) / (1 + tiny * n) for a, k in zip(q, kappa, strict=True)]
        if kind == "forward_kl":
            loss = sum((b * (b / a).ln() for a, b in zip(p, q, strict=True) if b), Decimal(0))
            g = [a - b for a, b in zip(p, q, strict=True)]
            return (
                float(loss),
                [float(x) for x in g],
                [float(max(a, b)) for a, b in zip(p, q, strict=True)],
            )
        d = [(a / b).ln() for a, b in zip(p, q, strict=True)]
        loss = sum((a * x for a, x in zip(p, d, strict=True)), Decimal(0))
        g = [a * (x - loss) for a, x in zip(p, d, strict=True)]
        sizes = [
            a * sum((b * abs(x - u) for b, u in zip(p, d, strict=True)), Decimal(0))
            for a, x in zip(p, d, strict=True)
        ]
        if uniform:  # d is no difference of logits, so its digits are those of log p
            sizes = [a * max(abs(b.ln()) for b in p) for a in p]
        return float(loss), [float(x) for x in g], [float(x) for x in sizes]


def hard_rows() -> dict[str, tuple[list[float], list[float], float]]:
    """Name: (policy, reference, weight), the label being token 1."""
    torch.manual_seed(1)
    a, b = torch.randn(2, 9, dtype=F64).tolist()
    near = [[x + h * y for x, y in zip(a, b, strict=True)] for h in (1e-4, 1e-8, 1e-12)]

    def peak(x: list[float], height: float) -> list[float]:
        return [x[0], height, *x[2:]]

    return {
        "ordinary": (a, b, -1.0),
        "q(S) = 1 - 1e-9": (a, peak(b, 23.0), -1.0),
        "q(S) = 1 - 1e-25": (a, peak(b, 60.0), -1.0),
        "p(S) = 1 - 1e-3": (peak(a, 9.3), b, -1.0),
        "p(S) = 1 - 1e-4": (peak(a, 11.9), b, -1.0),
        "p(S) = 1 - 1e-5": (peak(a, 14.1), b, -1.0),
        "p(S) = 1 - 1e-9": (peak(a, 23.0), b, -1.0),
        "p(S) = 1 - 1e-25": (peak(a, 60.0), b, -1.0),
        "p(S) and q(S) near 1": (peak(a, 45.0), peak(a, 45.0), -1.0),
        "p(S) near 1, q(S) near 1, partly": (peak(a, 40.0), peak(b, 40.0), -0.75),
        "p(S) = 1e-25": (peak(a, -60.0), b, -1.0),
        "p(S) = 1e-25, p near q": (peak(a, -60.0), peak(near[0], 1.0), -1.0),
        "p_y near 1": (peak(a, 40.0), b, 1.0),
        "p_y = 1e-9": (peak(a, -18.0), b, 1.0),
        "p = q negative": (a, a, -1.0),
        "|z - r| = 1e-4": (near[0], a, 1.0),
        "|z - r| = 1e-8": (near[1], a, 1.0),
        "|z - r| = 1e-12": (near[2], a, 1.0),
        "|z - r| = 1e-4, negative": (near[0], a, -1.0),
        "logits of 1e4, close": ([x + 1e4 for x in near[0]], [x + 1e4 for x in a], 1.0),
        "logits of 1e4, spread": ([1e4, -1e4, 9.99e3, 0.0], [-1e4, 9.99e3, 9.995e3, 0.0], 1.0),
        "logits of 1e4, spread, negative": ([1e4, 9.999e3, -1e4], [1e4, -1e4, 9.998e3], -1.0),
        "logits of 1e8": ([1e8, 1e8 - 1, 1e8 - 3], [1e8, 1e8 - 2, 1e8 - 1], 1.0),
        "logits of 1e8, negative": ([1e8, 1e8 - 1, 1e8 - 3], [1e8, 1e8 - 2, 1e8 - 1], -1.0),
        "partly": (a, b, -0.25),
        "barely left": (a, peak(b, 30.0), -1.0 + 2**-40),
        "V = 2": ([0.5, -1.0], [3.0, 2.0], 1.0),
        "V = 2, negative": ([0.5, -1.0], [3.0, 2.0], -1.0),
    }


@pytest.mark.parametrize("uniform", [False, True], ids=["negatives", "uniform"])
@pytest.mark.parametrize("name", [*hard_rows()])
def test_hard_rows_against_decimals(name: str, uniform: bool) -> None:
    z, r, w = hard_rows()[name]
    kinds = NEGATIVE[:4] if w < 0 else POSITIVE[:3]
    for kind in kinds:
        objective = Objective(negative=kind) if w < 0 else Objective(positive=kind)
        loss, gradient = both(
            rows(z),
            rows(r),
            torch.tensor([1]),
            rows(w),
            objective=objective,
            smoothing="uniform" if uniform else "negatives",
        )
        expected, expected_grad, size = exact(z, r, 1, w, kind, uniform, 1e-6)
        # NL, and cross-entropy with a smoothed label, have the digits of log p, few near 0
        absolute = 1e-15 if kind == "negative_likelihood" or uniform else 1e-30
        assert loss.item() == pytest.approx(expected, rel=1e-11, abs=absolute), kind
        error = (gradient[0] - rows(expected_grad)[0]).abs()
        scale = torch.tensor(size, dtype=F64)
        # a log p of size 1000 is rounded to 1e-13, a relative error of p
        span = max(max(x) - min(x) for x in (z, r))
        digits = 1e-14 * max(1.0, span / 10)
        assert (error <= digits * scale + 1e-300).all(), (kind, error / scale)
        assert abs(gradient.sum()) <= 1e-15 * max(1.0, abs(gradient).max().item()), kind


def test_forward_gradient_next_to_the_fixed_point() -> None:
    """Where p and q are small as well as close, p - q has fewer digits than q* (e^d - 1)."""
    z = [0.3, -300.1, -100.2, -50.3]
    r = [x + 1e-6 * x for x in z]
    _, expected, size = exact(z, r, 0, 1.0, "forward_kl", False, 0.0)
    gradient = row_gradients(rows(z), rows(r), torch.tensor([0]), objective=METHODS["tnff"])
    assert ((gradient - rows(expected)).abs() <= 4e-16 * rows(size)).all()


def test_reverse_gradient_where_all_mass_is_on_several_removed_tokens() -> None:
    """The removed tokens' gradient is as small as the rest's, though p and d are not small there."""
    height = torch.linspace(20, 60, 30, dtype=F64)
    z = rows([0.3, -1.0, 0.2, 0.9, 0.0, 1.1, 0.0]).expand(30, 7).clone()
    z[:, :3] = height[:, None]
    z[:, 3] = height
    gradient = row_gradients(
        z,
        z * 0.5,
        torch.zeros(30, dtype=torch.int64),
        objective=METHODS["tnrr"],
        negative_ids=torch.tensor([0, 1, 2, 3, 4]),
    )
    kept, removed = gradient[:, 5:].sum(-1), gradient[:, :5].sum(-1)
    assert (kept < 0).all()
    torch.testing.assert_close(removed, -kept, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient[:, 3], gradient[:, 0], rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_equal_logits_are_a_fixed_point_to_the_last_bit(
    kind: str, temperature: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    z = 5 * torch.randn(6, 1001).to(dtype)
    z[1] += 1e4
    z[2, ::3] = -INF
    r = z.t().contiguous().t()  # the same values in another memory layout
    options: dict[str, Any] = {"objective": kl_of(kind), "temperature": temperature}
    loss, gradient = both(z, r, torch.arange(6), **options)
    assert (loss == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_removing_tokens_is_minus_infinity_in_the_reference(kind: str) -> None:
    """With p(S) = 0 too: smoothing of the reverse target has then no part but its norm."""
    z, r, *_ = batch()
    ids = torch.tensor([2, 5])
    z[:, ids] = -INF
    masked = r.index_fill(-1, ids, -INF)
    labels, options = torch.zeros(len(z), dtype=torch.int64), {"objective": kl_of(kind)}
    removed = both(z, r, labels, negative_ids=ids, eps=0.0, **options)
    for got, expected in zip(removed, both(z, masked, labels, **options), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


# --- infinities, NaN, rows left out ---------------------------------------------------------------


def test_infinite_forward_kl_keeps_its_gradient() -> None:
    z, r, y = rows([0.0, 1.0, -INF]), rows([0.5, 0.0, 1.0]), torch.tensor([0])
    for smoothing in ("negatives", "uniform"):
        loss, gradient = both(z, r, y, objective=kl_of("forward_kl"), smoothing=smoothing)
        q = r.softmax(-1)
        if smoothing == "uniform":
            q = (q + 1e-6) / (1 + 3e-6)
        assert loss.item() == INF
        torch.testing.assert_close(gradient, z.softmax(-1) - q)


def test_infinite_reverse_kl_has_no_gradient() -> None:
    z, r, y = rows([0.0, 1.0, 0.0]), rows([0.5, 0.0, -INF]), torch.tensor([0])
    loss, gradient = both(z, r, y, objective=kl_of("reverse_kl"))
    assert loss.item() == INF
    assert gradient.isnan().all()
    # finite once the masked token is removed, or smoothed
    loss, gradient = both(z, r, y, objective=kl_of("reverse_kl"), negative_ids=torch.tensor([[2]]))
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    loss, gradient = both(z, r, y, objective=kl_of("reverse_kl"), smoothing="uniform")
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    # the other tokens' gradient is not -inf
    ref = rows([0.5, 0.0, 0.0, -INF])
    loss, gradient = both(
        rows([0.0, 1.0, 0.0, 0.0]), ref, y, rows(-1.0)[:1], objective=kl_of("reverse_kl")
    )
    assert loss.item() == INF
    assert gradient.isnan().all()
    # without a floor a removed token that has mass is infinitely bad
    loss, gradient = both(z, z, y, rows(-1.0)[:1], objective=kl_of("reverse_kl"), eps=0.0)
    assert loss.item() == INF
    assert gradient.isnan().all()


@pytest.mark.parametrize("smoothing", ["negatives", "uniform"])
@pytest.mark.parametrize("w", [1.0, -1.0])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_zero_against_zero_is_zero(kind: str, w: float, smoothing: str) -> None:
    """Tokens that both rows mask leave the row as it would be without them."""
    z, r = rows([0.3, -INF, 1.0, 0.2, -INF]), rows([0.1, -INF, 0.0, 2.0, 1.0])
    r[0, 4] = -INF
    options: dict[str, Any] = {
        "objective": kl_of(kind),
        "smoothing": smoothing,
        "eps": 1e-3 if smoothing == "negatives" else 0.0,
    }
    y, weight, kept = torch.tensor([0]), rows(w).reshape(1), [0, 2, 3]
    loss, gradient = both(z, r, y, weight, **options)
    expected, expected_grad = both(z[:, kept], r[:, kept], y, weight, **options)
    torch.testing.assert_close(loss, expected)
    if not (w < 0 and kind == "reverse_kl" and smoothing == "uniform"):  # that one is infinite
        torch.testing.assert_close(gradient[:, kept], expected_grad)
        assert (gradient[:, [1, 4]] == 0).all()


def test_reverse_kl_counts_the_target_where_p_is_zero() -> None:
    z, r = rows([0.0, -INF, 0.0]), rows([0.0, 0.5, 0.0])
    loss, gradient = both(z, r, torch.tensor([1]), objective=kl_of("reverse_kl"))
    assert loss.item() == pytest.approx(-math.log(2) - math.log(1 / (2 + math.exp(0.5))))
    assert gradient.abs().max() < 1e-15
    # p(R) = 0: the floor of the removed token is all that is left
    loss, _ = both(z, z, torch.tensor([1]), rows(-1.0)[:1], objective=kl_of("reverse_kl"), eps=0.1)
    assert loss.item() == pytest.approx(math.log(1.1))


def test_likelihoods_at_infinity() -> None:
    z, y = rows([0.0, -INF, 1.0]), torch.tensor([1])
    loss, gradient = both(z, None, y, objective=Objective("log_likelihood", "none"))
    assert loss.item() == INF
    torch.testing.assert_close(gradient, z.softmax(-1) - rows([0.0, 1.0, 0.0]))
    down = rows(-1.0)[:1]
    loss, gradient = both(z, None, y, down, objective=METHODS["ul+ll"])
    assert loss.item() == 0
    assert (gradient == 0).all()
    loss, gradient = both(z, None, y, down, objective=METHODS["nl+ll"])
    assert loss.item() == -INF
    torch.testing.assert_close(gradient, rows([0.0, 1.0, 0.0]) - z.softmax(-1))
    loss, gradient = both(z, None, y, down, objective=METHODS["nl+ll"], nl_floor=-3.0)
    assert loss.item() == -3
    assert (gradient == 0).all()


def test_nothing_left() -> None:
    """UL: +inf without a gradient. A KL has no target: NaN. NL is what it always is."""
    z, y, ids = rows([0.0, 1.0]), torch.tensor([0]), torch.tensor([[0, 1]])
    loss, gradient = both(z, None, y, objective=METHODS["ul+ll"], negative_ids=ids)
    assert loss.item() == INF
    assert gradient.isnan().all()
    for kind in ("forward_kl", "reverse_kl"):
        for smoothing in ("negatives", "uniform"):
            terms = row_terms(z, z, y, objective=kl_of(kind), negative_ids=ids, smoothing=smoothing)
            assert terms.loss.isnan().all()
            assert terms.kl.isnan().all()
            assert terms.negative_mass.item() == pytest.approx(1)
            assert terms.ref_negative_mass.item() == pytest.approx(1)
            gradient = row_gradients(
                z, z, y, objective=kl_of(kind), negative_ids=ids, smoothing=smoothing
            )
            assert gradient.isnan().all()
        # nothing outside S but masked tokens; what is left of y is then the whole target
        masked = rows([0.0, -INF])
        loss, _ = both(z, masked, y, rows(-1.0)[:1], objective=kl_of(kind))
        assert loss.isnan().all()
        loss, _ = both(masked, masked, y, rows(-0.5)[:1], objective=kl_of(kind))
        assert loss.item() == 0
    loss, gradient = both(z, None, y, objective=METHODS["nl+ll"], negative_ids=ids)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


def test_one_token_vocabulary() -> None:
    z, r, y = rows([3.0]), rows([-1.0]), torch.tensor([0])
    for kind in POSITIVE:
        loss, gradient = both(z, r, y, objective=Objective(positive=kind))
        assert loss.item() == 0
        assert gradient.item() == 0
    down = rows(-1.0)[:1]
    for kind, expected in zip(NEGATIVE, (NAN, NAN, INF, 0.0, 0.0), strict=True):
        loss, _ = both(z, r, y, down, objective=Objective(negative=kind))
        assert loss.item() == pytest.approx(expected, nan_ok=True)
    loss, gradient = both(z, r, y, rows(-0.5)[:1], objective=METHODS["tnff"])
    assert loss.item() == 0
    assert gradient.item() == 0


@pytest.mark.parametrize("bad", [NAN, INF])
def test_broken_logits_break_their_row_only(bad: float) -> None:
    z, r, labels, weights, ids = batch()
    for positive, negative in itertools.product(POSITIVE, NEGATIVE):
        options: dict[str, Any] = {
            "objective": Objective(positive, negative),
            "negative_ids": ids,
        }
        whole = both(z, r, labels, weights, **options)
        for i, w in enumerate(WEIGHTS):
            is_negative = w < 0 or IDS[i] != [-1, -1, -1]
            kind = negative if is_negative else positive
            for broken_is_ref in (False, True):
                logits, ref = z.clone(), r.clone()
                (ref if broken_is_ref else logits)[i, 3] = bad
                if w == 0:
                    ref[i], logits[i] = bad, bad
                broken = not broken_is_ref or kind.endswith("kl")
                leaf = logits.requires_grad_()
                terms = row_terms(leaf, ref, labels, weights, **options)
                gradient = row_gradients(leaf, ref, labels, weights, **options)
                (through,) = torch.autograd.grad((terms.loss * terms.scale).sum(), leaf)
                others = torch.arange(len(WEIGHTS)) != i
                assert torch.equal(terms.loss[others], whole[0][others])
                assert torch.equal(gradient[others], whole[1][others])
                assert torch.isfinite(through[others]).all()
                if w == 0 or kind == "none":
                    assert terms.loss[i] == 0
                    assert (gradient[i] == 0).all()
                    assert (through[i] == 0).all()
                elif broken:
                    assert terms.loss[i].isnan()
                    assert gradient[i].isnan().all()
                    assert through[i].isnan().all()
                else:
                    assert terms.loss[i] == whole[0][i]
                assert (terms.scale[i] == 0) == (w == 0)


@pytest.mark.parametrize("upstream", [NAN, INF])
def test_upstream_does_not_reach_rows_left_out(upstream: float) -> None:
    z, r, labels, weights, _ = batch()
    z.requires_grad_()
    loss = row_terms(z, r, labels, weights, objective=METHODS["tnff"]).loss
    (gradient,) = torch.autograd.grad((loss * upstream).sum(), z)
    assert (gradient[weights == 0] == 0).all()


def test_policy_without_any_finite_logit_is_nan() -> None:
    z, y = rows([-INF, -INF]), torch.tensor([0])
    for kind in POSITIVE[:3]:
        loss, gradient = both(z, torch.zeros_like(z), y, objective=Objective(positive=kind))
        assert loss.isnan().all()
        assert gradient.isnan().all()


def test_side_none_still_measures() -> None:
    z, r, labels, weights, ids = batch()
    terms = row_terms(
        z, None, labels, weights, objective=Objective("none", "none"), negative_ids=ids
    )
    full = row_terms(z, r, labels, weights, objective=METHODS["tnff"], negative_ids=ids)
    assert (terms.loss == 0).all()
    for name in ("scale", "negative_mass", "entropy"):
        torch.testing.assert_close(
            getattr(terms, name), getattr(full, name), rtol=0, atol=0, equal_nan=True
        )
    assert terms.kl.isnan().all()
    assert terms.ref_negative_mass.isnan().all()


def test_out_of_range_labels_and_ids_break_their_row_only() -> None:
    z, r, *_ = batch()
    labels = torch.tensor([0, 7, -1, -100, 7, 1, 1, 1, 1])
    weights = rows(1.0, 1.0, -1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0)
    ids = torch.tensor([[-1, 2]] * 5 + [[7, 2], [-2, 2], [10**12, -1], [7, -5]])
    bad = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
    for name in METHODS:
        terms = row_terms(z, r, labels, weights, objective=METHODS[name], negative_ids=ids)
        gradient = row_gradients(z, r, labels, weights, objective=METHODS[name], negative_ids=ids)
        assert torch.equal(terms.loss.isnan(), bad)
        assert torch.equal(gradient.isnan().all(-1), bad)
        assert torch.isfinite(gradient[~bad]).all()
        assert (terms.loss[[3, 4, 8]] == 0).all()
        assert (gradient[[3, 4, 8]] == 0).all()
    # a shared list that is out of range concerns all rows that count
    loss, _ = both(
        z, r, labels * 0, weights, objective=METHODS["tnff"], negative_ids=torch.tensor([7])
    )
    assert torch.equal(loss.isnan(), weights != 0)


def test_negative_ids_are_a_set_however_they_are_given() -> None:
    z, r, labels, weights, _ = batch()
    for name in METHODS:
        options: dict[str, Any] = {"objective": METHODS[name]}
        want = both(z, r, labels, weights, negative_ids=torch.tensor([3, 5]), **options)
        for ids in (
            torch.tensor([[5, 3]] * len(z)),
            torch.tensor([[5, -1, 3, 3, -1, 5]] * len(z), dtype=torch.int32),
            torch.tensor([-1, 5, 3, 3]),
        ):
            got = both(z, r, labels, weights, negative_ids=ids, **options)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        none = both(z, r, labels, weights, **options)
        for ids in (torch.full((3,), -1), torch.empty(len(z), 0, dtype=torch.int64)):
            got = both(z, r, labels, weights, negative_ids=ids, **options)
            assert all(torch.equal(a, b) for a, b in zip(got, none, strict=True))


def test_weights_below_minus_one_act_as_minus_one_in_a_target() -> None:
    z, r, labels, *_ = batch()
    for name in ("tnff", "tnrr", "ul+ll", "nl+ll"):
        one, three = (
            both(z, r, labels, torch.full((len(z),), w), objective=METHODS[name])
            for w in (-1.0, -3.0)
        )
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_no_rows() -> None:
    z = torch.empty(0, 5, dtype=F64, requires_grad=True)
    labels = torch.empty(0, dtype=torch.int64)
    for name in METHODS:
        terms = row_terms(z, z.detach(), labels, objective=METHODS[name])
        assert all(t.shape == (0,) for t in terms)
        terms.loss.sum().backward()
        assert row_gradients(z, z, labels, objective=METHODS[name]).shape == (0, 5)


def test_missing_reference_is_an_error_only_if_it_may_be_read() -> None:
    z, labels = torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="ref_logits is None"):
        row_terms(z, None, labels, objective=METHODS["tnfll"])
    assert torch.isfinite(row_terms(z, None, labels, objective=METHODS["ul+ll"]).loss).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_computes_in_float32(dtype: torch.dtype) -> None:
    z, r, labels, weights, ids = batch()
    z, r = z.to(dtype), r.to(dtype)
    for name in METHODS:
        options: dict[str, Any] = {"objective": METHODS[name], "negative_ids": ids}
        leaf = z.clone().requires_grad_()
        terms = row_terms(leaf, r, labels, weights, **options)
        assert {t.dtype for t in terms} == {torch.float32}
        assert [t.requires_grad for t in terms] == [True] + [False] * 5
        exact_loss, exact_grad = both(z.double(), r.double(), labels, weights, **options)
        torch.testing.assert_close(terms.loss.double(), exact_loss, rtol=2e-6, atol=1e-6)
        gradient = row_gradients(z, r, labels, weights, **options)
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), exact_grad, rtol=1e-5, atol=1e-6)
        (through,) = torch.autograd.grad(terms.loss.sum(), leaf)
        assert torch.equal(through, gradient.to(dtype))


def test_strided_logits_and_no_write_to_inputs() -> None:
    z, r, labels, weights, ids = batch()
    wide = torch.full((len(z), 12), NAN, dtype=F64)
    wide[:, :7] = z
    options: dict[str, Any] = {"objective": METHODS["tnrr"], "negative_ids": ids}
    want = both(z, r, labels, weights, **options)
    got = both(wide[:, :7], r.t().contiguous().t(), labels, weights, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(wide[:, :7], z)


# --- properties -----------------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-40, 40), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    z=LOGITS,
    r=LOGITS,
    w=st.sampled_from([1.0, -0.3, -1.0]),
    kind=st.sampled_from(["forward_kl", "reverse_kl"]),
    smoothing=st.sampled_from(["negatives", "uniform"]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    order=st.permutations(range(4)),
)
def test_kl_properties(
    z: list[float],
    r: list[float],
    w: float,
    kind: str,
    smoothing: str,
    temperature: float,
    order: list[int],
) -> None:
    """KL ≥ 0; the gradient sums to 0; the vocabulary's order and shifts do not matter."""
    options: dict[str, Any] = {
        "objective": kl_of(kind),
        "smoothing": smoothing,
        "temperature": temperature,
    }
    a, b, weight = rows(z), rows(r), rows(w).reshape(1)
    loss, gradient = both(a, b, torch.tensor([2]), weight, **options)
    assert loss.item() >= 0
    assert abs(gradient.sum().item()) <= 1e-14 * max(1.0, gradient.abs().max().item())
    other, other_grad = both(
        a[:, order] + 8.0, b[:, order] - 16.0, torch.tensor([order.index(2)]), weight, **options
    )
    torch.testing.assert_close(other, loss, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(other_grad, gradient[:, order], rtol=1e-9, atol=1e-13)
