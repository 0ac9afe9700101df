"""The second oracle against what was worked out by hand, by 250-digit arithmetic, and by the authors' own code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import exact
import numpy as np
import pytest
from exact import DOUBLE, INF, NAN, REAL, SINGLE, Outcome, Row, Settings

FILE = Path(__file__).parent / "golden" / "t5patches.npz"
LOWEST = float(np.finfo(np.float32).min)
FORWARD, REVERSE = Settings(), Settings("reverse_kl", "reverse_kl")


def row(
    z: list[float], r: list[float] | None = None, label: int = 0, w: float = 1.0, **more: Any
) -> Row:
    return Row(np.array(z, REAL), None if r is None else np.array(r, REAL), label, w, **more)


def of(settings: Settings, *arguments: Any, **more: Any) -> Outcome:
    return exact.evaluate(row(*arguments, **more), settings)


def loss(settings: Settings, *arguments: Any, **more: Any) -> float:
    return float(of(settings, *arguments, **more).loss.value)


# --- by hand ------------------------------------------------------------------------------------------------------


def test_two_tokens() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4)."""
    z, r = [0.0, 0.0], [0.0, math.log(3)]
    half, quarter = math.log(2), 0.25
    assert loss(FORWARD, z, r) == pytest.approx(
        quarter * math.log(quarter) + 0.75 * math.log(0.75) + half
    )
    assert loss(REVERSE, z, r) == pytest.approx(-half - math.log(quarter * 0.75) / 2)
    assert of(FORWARD, z, r).gradient.value.tolist() == pytest.approx([0.25, -0.25])
    # token 0 removed: q* = (0, 1)
    pushed = of(FORWARD, z, r, 0, -1.0)
    assert float(pushed.loss.value) == pytest.approx(half)
    assert pushed.gradient.value.tolist() == pytest.approx([0.5, -0.5])
    assert float(pushed.negative_mass.value) == pytest.approx(0.5)
    assert float(pushed.ref_negative_mass.value) == pytest.approx(0.25)
    assert float(pushed.entropy.value) == pytest.approx(half)
    # half of it left: q* = (1/8, 3/4) / (7/8) = (1/7, 6/7)
    part = of(FORWARD, z, r, 0, -0.5)
    assert part.gradient.value.tolist() == pytest.approx([0.5 - 1 / 7, 0.5 - 6 / 7])
    # ... but for one that is among the ids as well
    both = of(FORWARD, z, r, 0, -0.5, ids=(-1, 0, 0))
    assert both.gradient.value.tolist() == pytest.approx([0.5, -0.5])
    # q~ = (ε, 1) / (1 + ε)
    eps = 1e-6
    want = -half - 0.5 * math.log(eps) + math.log1p(eps)
    assert loss(REVERSE, z, r, 0, -1.0) == pytest.approx(want)
    likelihood = Settings("log_likelihood", "unlikelihood")
    assert loss(likelihood, z) == pytest.approx(half)
    assert of(likelihood, z).gradient.value.tolist() == pytest.approx([-0.5, 0.5])
    assert of(likelihood, z, None, 0, -2.0).gradient.value.tolist() == pytest.approx([0.5, -0.5])
    likelihood = Settings("none", "negative_likelihood")
    assert loss(likelihood, z, None, 0, -2.0) == pytest.approx(-half)
    assert of(likelihood, z, None, 0, -2.0).gradient.value.tolist() == pytest.approx([0.5, -0.5])
    floor = Settings("none", "negative_likelihood", nl_floor=-0.5)
    assert loss(floor, z, None, 0, -2.0) == -0.5
    assert not of(floor, z, None, 0, -2.0).gradient.value.any()


@pytest.mark.parametrize("low", [-1e30, LOWEST])
def test_finite_masks_are_logits(low: float) -> None:
    """All mass on the removed token of two equal rows: the floor ε alone says how bad that is."""
    x = [0.0, low, low]
    outcome = of(REVERSE, x, x, 0, -1.0)
    assert float(outcome.loss.value) == pytest.approx(math.log1p(1e-6) - math.log(1e-6), rel=1e-12)
    assert float(outcome.loss.value) == pytest.approx(13.8155, abs=1e-4)
    assert float(np.abs(outcome.gradient.value).max()) == 0
    assert loss(FORWARD, x, x, 0, -1.0) == pytest.approx(-low)


def test_equal_rows_of_the_lowest_number() -> None:
    x = [float(np.finfo(np.float64).min)] * 3
    for settings in (FORWARD, REVERSE):
        outcome = of(settings, x, x)
        assert outcome.loss == (0, 0)
        assert not outcome.gradient.value.any()


@pytest.mark.parametrize("c", [0.0, 2.0**27, 3e38])
def test_shifts_of_one_side(c: float) -> None:
    z, r = [0.0, 1.0, -2.0], [c, c, 0.0]
    assert of(REVERSE, z, r).loss.value >= 0
    if c:
        assert loss(FORWARD, z, r) == pytest.approx(0.15587, abs=1e-5)
    if c == 3e38:
        p = math.exp(-2) / (1 + math.e + math.exp(-2))
        assert loss(REVERSE, z, r) == pytest.approx(p * c)


# --- what is undefined or infinite --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF])
def test_broken_rows(bad: float) -> None:
    z, r = [0.0, 1.0, 2.0], [bad, 0.0, 1.0]
    for settings in (FORWARD, REVERSE):
        for w in (1.0, -1.0):  # on a removed token too
            outcome = of(settings, z, r, 0, w)
            assert np.isnan(
                [outcome.loss.value, outcome.kl.value, outcome.ref_negative_mass.value]
            ).all()
            assert np.isnan(outcome.gradient.value).all()
            assert np.isfinite([outcome.negative_mass.value, outcome.entropy.value]).all()
            outcome = of(settings, r, z, 0, w)
            assert np.isnan(outcome.gradient.value).all()
            for value in (
                outcome.loss,
                outcome.kl,
                outcome.negative_mass,
                outcome.ref_negative_mass,
            ):
                assert np.isnan(value.value)
    outcome = of(Settings("none", "none"), r, r)
    assert outcome.loss.value == 0
    assert not outcome.gradient.value.any()
    assert np.isnan(outcome.entropy.value)
    likelihood = of(Settings("log_likelihood", "unlikelihood"), z, r, 0, -1.0)
    assert np.isfinite(likelihood.loss.value)
    assert np.isnan([likelihood.kl.value, likelihood.ref_negative_mass.value]).all()


def test_slack_of_a_peak_moves_all_of_its_row() -> None:
    """A likely token of the policy is off, where the reference has another."""
    z, r, slack = [0.0, 8.0, 1.0], [8.0, 0.0, 1.0], [0.0, 0.1, 0.0]
    near = of(FORWARD, z, r, slack_z=np.array(slack, REAL), slack_r=np.zeros(3, REAL))
    moved = of(FORWARD, [0.0, 8.1, 1.0], r)
    error = np.abs(moved.gradient.value - near.gradient.value)
    assert (error <= near.gradient.bound).all()


def test_infinite_divergences() -> None:
    low = -math.inf
    forward = of(FORWARD, [low, 0.0, 1.0], [0.0, 0.0, 0.0])
    assert forward.loss.value == INF
    assert forward.gradient.value[0] == pytest.approx(-1 / 3)
    reverse = of(REVERSE, [0.0, 0.0, 1.0], [low, 0.0, 0.0])
    assert reverse.loss.value == INF
    assert np.isnan(reverse.gradient.value).all()
    assert np.isfinite(loss(REVERSE, [low, 0.0, 1.0], [low, 0.0, 0.0]))
    assert np.isfinite(loss(REVERSE, [low, 0.0, 1.0], [0.0, 0.0, 0.0]))
    assert np.isfinite(loss(FORWARD, [0.0, 0.0, 1.0], [low, 0.0, 0.0]))
    assert (
        loss(Settings("reverse_kl", "reverse_kl", eps=0.0), [0.0, 1.0], [0.0, 1.0], 0, -1.0) == INF
    )
    everything = of(Settings("none", "unlikelihood"), [0.0, 1.0], None, 0, 1.0, ids=(1, 0))
    assert everything.loss.value == INF
    assert np.isnan(everything.gradient.value).all()
    assert everything.negative_mass.value == 1
    nothing_left = of(FORWARD, [0.0, 1.0], [0.0, low], 0, -1.0)
    assert np.isnan(nothing_left.loss.value)
    assert nothing_left.ref_negative_mass.value == 1
    # of next to no probability: infinite, or what is left
    outcome = of(REVERSE, [0.0, 0.0, -1e30], [0.0, 0.0, low])
    assert outcome.loss.value == INF
    assert outcome.otherwise is not None
    assert outcome.otherwise.loss.value == 0


# --- by 250 digits -------------------------------------------------------------------------------------------------


def many_digits(z: Any, r: Any, settings: Settings, some: Row) -> tuple[Any, list[Any]]:
    """Loss and gradient by the definitions, the gradient as a difference quotient."""
    mp = pytest.importorskip("mpmath").mp
    t, size = mp.mpf(settings.temperature), len(z)
    ids = {i for i in some.ids if i >= 0}
    removed = ids | ({some.label} if some.weight <= -1 else set())
    negative = ids | ({some.label} if some.weight < 0 else set())
    kappa = [mp.mpf(v not in removed) for v in range(size)]
    if -1 < some.weight < 0 and some.label not in removed:
        kappa[some.label] = 1 + mp.mpf(some.weight)
    kind, eps = settings.negative if negative else settings.positive, mp.mpf(settings.eps)

    def softmax(x: list[Any]) -> list[Any]:
        powers = [mp.exp(v / t) for v in x]
        return [v / sum(powers) for v in powers]

    def value(x: list[Any]) -> Any:
        p = softmax(x)
        if kind in exact.KLS:
            q = [k * v for k, v in zip(kappa, softmax([mp.mpf(float(v)) for v in r]), strict=True)]
            q = [v / sum(q) for v in q]
            if settings.uniform:
                q = [(v + eps) / (1 + size * eps) for v in q]
            elif kind == "reverse_kl":
                q = [
                    (eps if k == 0 else v) / (1 + eps * len(removed))
                    for v, k in zip(q, kappa, strict=True)
                ]
            if kind == "forward_kl":
                return sum(b * mp.log(b / a) for a, b in zip(p, q, strict=True) if b > 0)
            return sum(a * mp.log(a / b) for a, b in zip(p, q, strict=True))
        if kind == "log_likelihood":
            if not settings.uniform:
                return -mp.log(p[some.label])
            target = [(eps + (v == some.label)) / (1 + size * eps) for v in range(size)]
            return -sum(a * mp.log(b) for a, b in zip(target, p, strict=True))
        if kind == "unlikelihood":
            return -mp.log(1 - sum(p[v] for v in negative))
        logs = [mp.log(p[v]) for v in negative]
        return sum(x if settings.nl_floor is None else max(x, settings.nl_floor) for x in logs)

    x = [mp.mpf(float(v)) for v in z]
    step = mp.mpf(10) ** -30
    quotients = []
    for v in range(size):
        up, down = ([*x[:v], x[v] + s, *x[v + 1 :]] for s in (step, -step))
        quotients.append((value(up) - value(down)) / (2 * step))
    return value(x), quotients


PAIRS = (
    ([0.3, -1.2, 2.0, 0.0, 1.1], [1.0, 0.5, -0.5, 0.2, 0.1]),
    ([0.3, -1.2, 2.0, 0.0, 1.1], [0.3 + 1e-6, -1.2, 2.0 - 1e-6, 0.0, 1.1]),
    ([40.0, -1.0, 0.5, 0.0, 2.0], [0.1, 0.2, 60.0, 0.4, 0.5]),
    ([0.1, 0.2, 0.3, 60.0, 0.5], [60.0, 0.2, 1.3, 0.4, 0.5]),
    ([1e6, 1e6 - 3, 1e6 + 1, 1e6, 1e6], [0.25, -3.0, 1.0, 0.0, 0.0]),
)


@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
def test_many_digits(pair: tuple[list[float], list[float]]) -> None:
    mpmath = pytest.importorskip("mpmath")
    kinds = [("forward_kl",) * 2, ("reverse_kl",) * 2, ("log_likelihood", "unlikelihood")]
    kinds += [("none", "negative_likelihood")]
    rows = [
        (1.0, ()),
        (-1.0, ()),
        (-0.3, ()),
        (-0.3, (3, 1)),
        (2.0, (0, 3, -1, 4)),
        (-1.0, (3, 0, 3)),
    ]
    with mpmath.workdps(250):
        for positive, negative in kinds:
            for uniform, t in ((False, 1.0), (True, 0.7), (False, 0.25)):
                settings = Settings(positive, negative, 1e-6, uniform, None, t)
                for w, ids in rows:
                    some = row(*pair, 2, w, ids=ids)
                    outcome = exact.evaluate(some, settings)
                    if outcome.kind == "none":
                        continue
                    value, gradient = many_digits(*pair, settings, some)
                    where = (outcome.kind, uniform, t, w, ids)
                    assert abs(float(outcome.loss.value) - value) <= 1e-14 * abs(value) + 1e-24, (
                        where
                    )
                    for got, want in zip(outcome.gradient.value, gradient, strict=True):
                        assert abs(mpmath.mpf(str(got)) - want) <= 1e-12 * abs(want) + 1e-18, where


# --- the authors' numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NL", "UL", "TNFF", "TNRR", "TNRF", "TNFLL", "TNRLL"])
def test_golden(name: str) -> None:
    """Gradients, and losses where theirs are divergences: their forward KL is a cross-entropy."""
    sides = {"F": "forward_kl", "R": "reverse_kl", "LL": "log_likelihood"}
    positive, negative = {
        "NL": ("log_likelihood", "negative_likelihood"),
        "UL": ("log_likelihood", "unlikelihood"),
    }.get(name) or (sides[name[3:]], sides[name[2]])
    smoothed = name in ("TNRR", "TNRF", "TNRLL")
    settings = Settings(positive, negative, 1e-6 if smoothed else 0.0, smoothed)
    with np.load(FILE) as file:
        arrays = {key: np.asarray(file[key]) for key in file.files}
    for case in "012":
        z, r, labels, weights, alpha, losses, gradients = (
            arrays[f"{case}/{key}"]
            for key in (
                "logits",
                "ref_logits",
                "labels",
                "weights",
                "alpha",
                f"{name}/loss",
                f"{name}/grad",
            )
        )
        for at in np.ndindex(labels.shape):
            if weights[at] == 0:
                continue
            w, some = float(weights[at]), row(z[at], r[at], int(labels[at]), float(weights[at]))
            outcome = exact.evaluate(some, settings)
            factor = exact.factor_of(outcome, w, float(alpha))
            want = gradients[at].astype(REAL)
            assert (
                np.abs(outcome.gradient.value * factor - want).max() <= 1e-11
            )  # theirs, of 1 - p(S)
            if outcome.kind != "forward_kl":
                assert abs(outcome.loss.value * factor - losses[at]) <= 1e-12 * (
                    1 + abs(losses[at])
                )


# --- the bounds ---------------------------------------------------------------------------------------------------


def test_bounds_are_tight() -> None:
    """Far below what a lost entry or a wrong sign would do."""
    rng = np.random.default_rng(0)
    for settings in (FORWARD, REVERSE, Settings("log_likelihood", "unlikelihood")):
        for noise in (1.0, 1e-3):
            for w in (1.0, -1.0, -0.3):
                r = rng.standard_normal(50).astype(np.float32)
                z = (r + noise * rng.standard_normal(50)).astype(np.float32)
                outcome = exact.evaluate(row(z, r, 3, w), settings, SINGLE)
                size = np.abs(outcome.gradient.value)
                assert np.median(outcome.gradient.bound / size) < (1e-4 if noise == 1.0 else 1e-2)
                assert outcome.loss.bound < 1e-4 * abs(outcome.loss.value) + 1e-9
                finer = exact.evaluate(row(z, r, 3, w), settings, DOUBLE)
                assert np.array_equal(finer.gradient.value, outcome.gradient.value)
                assert (finer.gradient.bound < 1e-3 * outcome.gradient.bound).all()


def test_wrong_values_are_out_of_bounds() -> None:
    """What float32 kernels have answered where masks competed with logits, and where a shift ate the digits."""
    low = [0.0, -1e30, -1e30]
    shifted = [0.0, 1.0, -2.0], [2.0**27, 2.0**27, 0.0]
    for settings, some, wrong in (
        (REVERSE, row(low, low, 0, -1.0), 14.3155),
        (FORWARD, row(*shifted), 0.20998),
    ):
        value, bound = exact.evaluate(some, settings, SINGLE).loss
        assert abs(value - wrong) > 100 * bound
