"""What holds whatever the numbers are. Float64 shows identities, float32 shows bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BACKENDS, F32, F64, INF, MISSING, Batch, Result, run
from torch import Tensor

import tnt_kernels as tnt
from tnt_kernels.objectives import METHODS

V = 6
KLS = ("forward_kl", "reverse_kl")

modest = settings(max_examples=40, deadline=None, derandomize=True)

rows = st.lists(st.floats(-30, 30, width=32), min_size=V, max_size=V)
tokens = st.integers(0, V - 1)
weights = st.sampled_from([1.0, 0.25, 3.0, -1.0, -0.5, -0.125, -2.0])
sets = st.lists(st.integers(-1, V - 1), max_size=3)
backends = st.sampled_from([name for name in BACKENDS if name not in MISSING])
kinds = st.sampled_from(KLS)
smoothings = st.sampled_from(["negatives", "uniform"])
temperatures = st.sampled_from([0.5, 1.0, 2.5])


def tensor(x: Any, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(x, dtype=dtype)


def one_row(z: Any, r: Any, y: int, w: float, ids: Any = (), dtype: torch.dtype = F64) -> Batch:
    options = {"negative_ids": torch.tensor([list(ids)], dtype=torch.int64)} if ids else {}
    return Batch(
        tensor([z], dtype), tensor([r], dtype), torch.tensor([y]), tensor([w], dtype), options
    )


def solve(batch: Batch, backend: str, **keywords: Any) -> Result:
    return run(batch, backend, reduction="sum", return_stats=True, **keywords)


def close(a: Tensor, b: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


@modest
@given(z=rows, r=rows, y=tokens, w=weights, ids=sets, kind=kinds, smoothing=smoothings,
       temperature=temperatures, backend=backends, dtype=st.sampled_from([F32, F64]))  # fmt: skip
def test_kl_is_not_negative_and_the_gradient_sums_to_zero(
    z: list[float], r: list[float], y: int, w: float, ids: list[int], kind: str, smoothing: str,
    temperature: float, backend: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    batch = one_row(z, r, y, w, ids, dtype)
    result = solve(
        batch,
        backend,
        method=tnt.Objective(kind, kind),
        smoothing=smoothing,
        temperature=temperature,
    )
    assert (result.stats.kl >= 0).all()
    gradient = result.gradient.double()
    unit = 2.0**-44 if dtype == F64 else 2.0**-20
    assert abs(gradient.sum()) <= unit * (1 + gradient.abs().sum() + abs(result.loss.item()))


@modest
@given(
    z=rows, y=tokens, w=weights, ids=sets, method=st.sampled_from(list(METHODS)), backend=backends
)
def test_the_gradient_of_a_likelihood_sums_to_zero(
    z: list[float], y: int, w: float, ids: list[int], method: str, backend: str
) -> None:
    batch = one_row(z, z[::-1], y, w, ids)
    for name in (method, "ul+ll", "nl+ll"):
        gradient = solve(batch, backend, method=name).gradient
        assert abs(gradient.sum()) <= 1e-13 * max(1.0, gradient.abs().sum())


@modest
@given(z=rows, y=tokens, w=st.floats(0.1, 5), temperature=temperatures, backend=backends,
       dtype=st.sampled_from([torch.bfloat16, torch.float16, F32, F64]))  # fmt: skip
def test_the_fixed_point(
    z: list[float], y: int, w: float, temperature: float, backend: str, dtype: torch.dtype
) -> None:
    """p = q with nothing to remove: loss and gradient are exactly 0."""
    for kind in KLS:
        batch = one_row(z, z, y, w)
        batch = Batch(batch.logits.to(dtype), batch.logits.to(dtype), batch.labels, batch.weights)
        result = solve(batch, backend, method=tnt.Objective(kind, "none"), temperature=temperature)
        assert result.loss == 0
        assert (result.gradient == 0).all()


@modest
@given(z=rows, r=rows, y=tokens, w=weights, ids=sets, method=st.sampled_from(list(METHODS)),
       smoothing=smoothings, shifts=st.tuples(*[st.floats(-100, 100)] * 2), backend=backends)  # fmt: skip
def test_shifts_do_not_matter(
    z: list[float], r: list[float], y: int, w: float, ids: list[int], method: str, smoothing: str,
    shifts: tuple[float, float], backend: str,
) -> None:  # fmt: skip
    a = solve(one_row(z, r, y, w, ids), backend, method=method, smoothing=smoothing)
    moved = [x + shifts[0] for x in z], [x + shifts[1] for x in r]
    b = solve(one_row(*moved, y, w, ids), backend, method=method, smoothing=smoothing)
    close(a.loss, b.loss)
    close(a.gradient, b.gradient)


@modest
@given(z=rows, r=rows, y=tokens, w=weights, ids=sets, method=st.sampled_from(list(METHODS)),
       smoothing=smoothings, order=st.permutations(range(V)), backend=backends)  # fmt: skip
def test_the_order_of_the_vocabulary_does_not_matter(
    z: list[float], r: list[float], y: int, w: float, ids: list[int], method: str, smoothing: str,
    order: list[int], backend: str,
) -> None:  # fmt: skip
    a = solve(one_row(z, r, y, w, ids), backend, method=method, smoothing=smoothing)
    where = [order.index(i) for i in range(V)]
    moved = one_row(
        [z[i] for i in order],
        [r[i] for i in order],
        where[y],
        w,
        [where[i] if i >= 0 else -1 for i in ids],
    )
    b = solve(moved, backend, method=method, smoothing=smoothing)
    close(a.loss, b.loss)
    close(a.gradient[:, order], b.gradient)
    for x, other in zip(a.stats, b.stats, strict=True):
        close(x, other)


@modest
@given(z=rows, r=rows, y=tokens, ids=st.sets(tokens, min_size=1, max_size=3), backend=backends)
def test_removing_tokens_is_minus_infinity_in_the_reference(
    z: list[float], r: list[float], y: int, ids: set[int], backend: str
) -> None:
    """The target is the same, so a forward KL is, however the tokens are named."""
    masked = [-INF if i in ids else x for i, x in enumerate(r)]
    want = solve(one_row(z, masked, y, 1.0), backend)
    close(solve(one_row(z, r, y, 1.0, sorted(ids)), backend).loss, want.loss)
    close(solve(one_row(z, r, y, 1.0, sorted(ids)), backend).gradient, want.gradient)
    first, *rest = sorted(ids)
    pushed = solve(one_row(z, r, first, -1.0, rest), backend)
    close(pushed.gradient, want.gradient)
    # and a reverse KL without floor, once the policy lacks them too
    gone = [-INF if i in ids else x for i, x in enumerate(z)]
    reverse = {"method": "tnrr", "eps": 0.0}
    want = solve(one_row(gone, masked, y, 1.0), backend, **reverse)
    got = solve(one_row(gone, r, y, 1.0, sorted(ids)), backend, **reverse)
    close(got.loss, want.loss)
    close(got.gradient, want.gradient)


@modest
@given(z=rows, r=rows, y=tokens, w=st.floats(-0.999, -0.001), backend=backends)
def test_a_partial_push_scales_the_reference(
    z: list[float], r: list[float], y: int, w: float, backend: str
) -> None:
    """κ_y = 1 + w is log(1 + w) more on the reference's logit."""
    scaled = [x + math.log1p(w) if i == y else x for i, x in enumerate(r)]
    for kind in KLS:
        method = tnt.Objective(kind, kind)
        a = solve(one_row(z, r, y, w), backend, method=method)
        b = solve(one_row(z, scaled, y, 1.0), backend, method=method)
        close(a.loss, b.loss, 1e-8)
        close(a.gradient, b.gradient, 1e-8)


@modest
@given(z=rows, y=tokens, ids=sets, w=weights, backend=backends)
def test_likelihoods_by_their_formulas(
    z: list[float], y: int, ids: list[int], w: float, backend: str
) -> None:
    """UL = -log(1 - p(S)), NL = Σ log p_s, both times |w| where w < 0; LL = -log p_y times w."""
    p = tensor(z).softmax(0)
    negatives = {i for i in ids if i >= 0} | ({y} if w < 0 else set())
    outside = [i for i in range(V) if i not in negatives]
    factor = abs(w) if w < 0 else 1.0
    batch = one_row(z, z, y, w, ids)
    ul, nl = (solve(batch, backend, method=name) for name in ("ul+ll", "nl+ll"))
    if negatives:
        close(ul.loss, -p[outside].sum().log() * factor)
        close(nl.loss, p[sorted(negatives)].log().sum() * factor)
        mass = p[sorted(negatives)].sum()
        close(ul.stats.negative_mass[0], mass)
        hot = torch.zeros(V, dtype=F64).index_fill(0, torch.tensor(sorted(negatives)), 1.0)
        close(nl.gradient[0], (hot - len(negatives) * p) * factor)
        close(ul.gradient[0], torch.where(hot > 0, p, -mass * p / p[outside].sum()) * factor)
    else:
        close(ul.loss, -p[y].log() * w)
        close(nl.loss, -p[y].log() * w)


@modest
@given(z=rows, r=rows, y=tokens, ids=st.sets(tokens, min_size=1, max_size=3), backend=backends)
def test_the_forward_kl_splits_into_what_is_left_and_collateral(
    z: list[float], r: list[float], y: int, ids: set[int], backend: str
) -> None:
    """KL(q*‖p) = -log(1 - p(S)) + KL(q* ‖ p given not S)."""
    whole = solve(one_row(z, r, y, 1.0, sorted(ids)), backend).loss
    left = solve(one_row(z, r, y, 1.0, sorted(ids)), backend, method="ul+ll").loss
    kept = [i for i in range(V) if i not in ids]
    rest = solve(one_row([z[i] for i in kept], [r[i] for i in kept], 0, 1.0), backend).loss
    close(whole, left + rest)


@modest
@given(z=st.lists(rows, min_size=2, max_size=5), method=st.sampled_from(list(METHODS)),
       w=st.lists(weights, min_size=5, max_size=5), backend=backends,
       dtype=st.sampled_from([F32, F64]))  # fmt: skip
def test_a_batch_is_the_sum_of_its_rows(
    z: list[list[float]], method: str, w: list[float], backend: str, dtype: torch.dtype
) -> None:
    n = len(z)
    logits, ref = tensor(z, dtype), tensor(z[::-1], dtype)
    labels = torch.arange(n) % V
    batch = Batch(logits, ref, labels, tensor(w[:n], dtype), {"method": method, "alpha": 0.75})
    single = [
        solve(
            Batch(*(x[i : i + 1] for x in (logits, ref, labels, batch.weights)), batch.options),
            backend,
        )
        for i in range(n)
    ]
    whole = solve(batch, backend)
    unit = 1e-12 if dtype == F64 else 1e-5
    close(whole.loss, torch.stack([x.loss for x in single]).sum(), unit, unit)
    assert torch.equal(whole.gradient, torch.cat([x.gradient for x in single]))
    mean = run(batch, backend)
    close(mean.loss, whole.loss / n, unit, unit)
    close(mean.gradient, whole.gradient / n, unit, unit)
    per_row = run(batch, backend, reduction="none")
    assert torch.equal(per_row.loss, torch.stack([x.loss for x in single]))


@modest
@given(z=st.lists(rows, min_size=3, max_size=3), seed=st.integers(0, 1000),
       method=st.sampled_from(list(METHODS)), backend=backends)  # fmt: skip
def test_runs_agree_to_the_last_bit(
    z: list[list[float]], seed: int, method: str, backend: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(3, V, generator=generator)
    batch = Batch(
        tensor(z, F32), ref, torch.arange(3), tensor([1.0, -1.0, -0.5], F32), {"method": method}
    )
    first, second = (run(batch, backend, return_stats=True) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.gradient, second.gradient)
    for a, b in zip(first.stats, second.stats, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@modest
@given(z=rows, r=rows, y=tokens, w=weights, ids=sets, method=st.sampled_from(list(METHODS)),
       temperature=temperatures, backend=backends)  # fmt: skip
def test_temperature_divides_both_logits(
    z: list[float], r: list[float], y: int, w: float, ids: list[int], method: str,
    temperature: float, backend: str,
) -> None:  # fmt: skip
    """With no factor T² on the loss, and 1/T on the gradient."""
    a = solve(one_row(z, r, y, w, ids), backend, method=method, temperature=temperature)
    cold = [x / temperature for x in z], [x / temperature for x in r]
    b = solve(one_row(*cold, y, w, ids), backend, method=method)
    close(a.loss, b.loss)
    close(a.gradient, b.gradient / temperature)
