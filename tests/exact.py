"""A second oracle, which shares no code with the library: one row at a time, in extended precision, with numpy alone.

It follows the tables of definitions, not the formulas that kernels use: log-softmaxes by ``np.longdouble`` (64 bits of
mantissa, and exponents to 10^4932, so that no difference of logits overflows), their difference, and sums of it. Where
a probability is exactly 0 (a logit of -inf) is decided from the logits, never from what has underflowed.

What is undefined or infinite: any finite logit is a logit. NaN or +inf that the row's loss reads (the policy always,
the reference where the loss is a KL; on removed tokens too), a policy of nothing but -inf and a row without a target
make loss and gradient NaN. Infinite divergences are +inf; of them, reverse KL and unlikelihood have no gradient.

Every value comes with a bound: how far from it arithmetic with unit roundoff u may be that computes it well. The rules:
 - a probability has a relative error of δ (64 roundings) and of a few u times its logit's distance from the maximum;
   one below ``Arithmetic.lost`` may be 0;
 - d = log p - log q has an error of a few u times the numbers that must be subtracted after the better choice of
   (z - r) - (m_z - m_r) and (z - m_z) - (r - m_r), and one that is common to the row, of the log-sum-exps: δ, or less
   next to p = q, down to ``Arithmetic.common``;
 - these errors go through the formulas to first order: a forward gradient on a token that stays, q (e^d - 1), is wrong
   by p times the error of d, or by what p and q are wrong by, whichever is less; a KL, as a sum of terms that are not
   negative, by the error of its terms, and in second order by the common error;
 - ``slack`` says how far off the logits themselves may be, where they come from a matmul.

A row whose divergence is infinite on account of tokens of next to no probability (below ``Arithmetic.lost``) may be
what it is without them: ``Outcome.otherwise``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.longdouble]
REAL = np.longdouble
INF, NAN = REAL(np.inf), REAL(np.nan)
KLS = ("forward_kl", "reverse_kl")
#: Roundings on the way to one number.
FEW = 4


class Arithmetic(NamedTuple):
    """What a backend computes with."""

    unit: float  # relative error of one rounding
    delta: float  # of a sum, or an elementary function of one: 64 of them
    largest: float  # number, but for a few powers of two
    lost: float  # a probability below this may be 0: a sum's largest term may be 2^40 below 1, or 2^100 above
    near: float  # where the maxima are no further apart, (z - r) - (m_z - m_r) may be taken
    common: float  # next to p = q, the difference of log-sum-exps is as good as this


SINGLE = Arithmetic(2.0**-24, 2.0**-18, 1e37, 2.0**-86, 1.0, 2.0**-20)
#: Of 16-bit logits, whose differences are exact over a wider range.
HALF = SINGLE._replace(near=64.0)
#: Its exponentials are a library's, so that no loop has vector registers, in which sums would be split.
DOUBLE = Arithmetic(2.0**-53, 2.0**-40, 1e305, 2.0**-900, 1.0, 2.0**-46)


@dataclass(frozen=True)
class Settings:
    """The keywords that say what a row's loss is."""

    positive: str = "forward_kl"
    negative: str = "forward_kl"
    eps: float = 1e-6
    uniform: bool = False
    nl_floor: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Row:
    """One row of weight other than 0."""

    z: Array  # (V,)
    r: Array | None  # (V,)
    label: int
    weight: float = 1.0
    ids: Sequence[int] = ()  # padded with -1
    slack_z: Array | None = None  # (V,)
    slack_r: Array | None = None  # (V,)
    fixed_point: bool = True  # logits that are equal here are so in the backend


class Bounded(NamedTuple):
    value: REAL | Array
    bound: REAL | Array


@dataclass(frozen=True)
class Outcome:
    """Before weight and alpha."""

    kind: str
    negative: bool
    loss: Bounded
    gradient: Bounded  # (V,)
    kl: Bounded
    negative_mass: Bounded
    ref_negative_mass: Bounded
    entropy: Bounded
    #: A part of the loss is a product with a number that has no place in the arithmetic: it may be +inf.
    overflows: bool = False
    otherwise: Outcome | None = None


NOTHING = Bounded(NAN, REAL(0))


def times(a: Array | REAL, b: Array | REAL) -> Array:
    """Where 0 times anything is 0."""
    a, b = np.broadcast_arrays(a, b)
    return np.where((a == 0) | (b == 0), REAL(0), a * b)


def phi(d: Array) -> Array:
    """e^d - 1 - d for |d| <= 1."""
    return np.where(
        np.abs(d) < 1e-3, d * d * (0.5 + d / 6 + d * d / 24 + d**3 / 120), np.expm1(d) - d
    )


class _Softmax:
    """Of x / T over some tokens, times factors κ: p is 0 elsewhere."""

    def __init__(self, x: Array, keep: NDArray[np.bool_], t: float, log_kappa: Array | None = None):
        self.possible = keep & (x > -INF)
        self.m = x[self.possible].max() if self.possible.any() else REAL(0)
        #: How far below the maximum, 0 where impossible.
        self.depth = np.where(self.possible, self.m - np.where(self.possible, x, self.m), REAL(0))
        exponent = np.where(self.possible, -self.depth / t, -INF)
        if log_kappa is not None:
            exponent = np.where(self.possible, exponent + log_kappa, -INF)
        total = np.exp(exponent).sum()
        self.lse = np.log(total) if self.possible.any() else -INF
        self.log = np.where(self.possible, exponent - self.lse, -INF)
        self.p = np.exp(self.log)
        self.depth = self.depth / t

    def relative(self, a: Arithmetic, slack: Array) -> Array:
        """Relative error of p. ``slack``: of log p, by the logits."""
        mean = times(self.p, slack).sum()
        of_logits = np.expm1(np.minimum(slack + mean, 40.0))
        return a.delta + FEW * a.unit * (self.depth + 32.0) + of_logits


class _Computation:
    def __init__(self, row: Row, s: Settings, a: Arithmetic) -> None:
        self.row, self.s, self.a, self.t = row, s, a, s.temperature
        self.z = row.z.astype(REAL)
        size = self.size = len(self.z)
        ids = np.unique([i for i in row.ids if i >= 0]).astype(int)
        self.S = np.zeros(size, bool)
        self.S[ids] = True
        self.R = self.S.copy()
        self.log_kappa = np.zeros(size, REAL)
        if row.weight < 0:
            self.S[row.label] = True
            if row.weight <= -1:
                self.R[row.label] = True
            elif not self.R[row.label]:
                self.log_kappa[row.label] = np.log1p(REAL(row.weight))
        self.K = ~self.R
        self.negative = bool(self.S.any())
        self.kind = s.negative if self.negative else s.positive
        self.reads = self.kind in KLS
        self.smoothed = s.uniform and s.eps > 0
        zero = np.zeros(size, REAL)
        self.slack_z = zero if row.slack_z is None else row.slack_z.astype(REAL) / self.t
        self.slack_r = zero if row.slack_r is None else row.slack_r.astype(REAL) / self.t
        if self.reads:
            assert row.r is not None
            self.r = row.r.astype(REAL)

    # --- the whole row --------------------------------------------------------------------------------------------

    def outcome(self) -> Outcome:
        kind, zeros = self.kind, np.zeros(self.size, REAL)
        undefined = Bounded(np.full(self.size, NAN), zeros)
        nothing = Bounded(REAL(0), REAL(0)), Bounded(zeros, zeros)
        if _broken(self.z):
            loss, gradient = nothing if kind == "none" else (NOTHING, undefined)
            return Outcome(kind, self.negative, loss, gradient, NOTHING, NOTHING, NOTHING, NOTHING)
        everything = np.ones(self.size, bool)
        self.p = _Softmax(self.z, everything, self.t)
        self.rel_p = self.p.relative(self.a, self.slack_z)
        #: Absolute error of p.
        self.err_p = times(self.p.p, self.rel_p) + np.minimum(self.p.p, self.a.lost)
        otherwise, ref_mass, self.overflows = None, NOTHING, False
        if self.reads and _broken(self.r):
            loss, gradient = NOTHING, undefined
        elif self.reads:
            q = _Softmax(self.r, everything, self.t)
            ref_mass = self._mass(q, self.slack_r)
            if not (self.K & (self.r > -INF)).any():
                loss, gradient = NOTHING, undefined
            else:
                self.q = _Softmax(self.r, self.K, self.t, self.log_kappa)
                self.rel_q = self.q.relative(self.a, self.slack_r)
                forward = kind == "forward_kl"
                if self.smoothed:
                    loss, gradient = self._smoothed(forward)
                else:
                    loss, gradient = self._forward() if forward else self._reverse()
                    otherwise = self._without_what_may_be_lost(forward, loss)
        elif kind == "none":
            loss, gradient = nothing
        else:
            loss, gradient = getattr(self, f"_{kind}")()
        gradient = Bounded(gradient.value / self.t, gradient.bound / self.t)
        kl = loss if self.reads else NOTHING
        mass, entropy = self._mass(self.p, self.slack_z), self._entropy()
        return Outcome(
            kind,
            self.negative,
            loss,
            gradient,
            kl,
            mass,
            ref_mass,
            entropy,
            self.overflows,
            otherwise,
        )

    def _note_overflow(self, weights: Array, d: Array) -> None:
        self.overflows |= bool(times(weights, np.abs(d) > self.a.largest).any())

    def _without_what_may_be_lost(self, forward: bool, loss: Bounded) -> Outcome | None:
        if loss.value != INF:
            return None
        if forward:
            guilty = self.q.possible & ~self.p.possible
            lost = self.q.p[guilty].sum() < self.a.lost
            row = replace(self.row, r=np.where(guilty, -INF, self.r))
        else:
            impossible = ~self.q.possible & self.K if self.s.eps > 0 else ~self.q.possible
            guilty = self.p.possible & impossible
            lost = self.p.p[guilty].sum() < self.a.lost
            row = replace(self.row, z=np.where(guilty, -INF, self.z))
        return _Computation(row, self.s, self.a).outcome() if lost else None

    def _mass(self, p: _Softmax, slack: Array) -> Bounded:
        """Of S: p(S) = σ(o), whose error is p(S) (1 - p(S)) times that of o."""
        inside, outside = p.p[self.S].sum(), p.p[~self.S].sum()
        gap = np.expm1(min(self._gap(p, self.S, slack), REAL(40)))
        bound = times(inside * outside, gap) + self.a.delta * inside
        return Bounded(inside, bound + min(inside, REAL(self.a.lost)))

    def _gap(self, p: _Softmax, some: NDArray[np.bool_], slack: Array) -> REAL:
        """The error of lse over some tokens minus lse over the rest."""
        sides, error = (some & p.possible, ~some & p.possible), REAL(self.a.delta)
        if not all(side.any() for side in sides):
            return REAL(0)
        depth = [p.depth[side].min() for side in sides]
        error += FEW * self.a.unit * (max(depth) + 32.0)
        for side in sides:
            # the error of a log-sum-exp is a mean over its tokens
            inside = np.exp(-(p.depth[side] - p.depth[side].min()))
            error += (inside * slack[side]).sum() / inside.sum()
        return error

    def _entropy(self) -> Bounded:
        p, log = self.p.p, np.where(self.p.p > 0, self.p.log, REAL(0))
        value = -times(p, log).sum()
        own = FEW * self.a.unit * self.p.depth + 2 * self.slack_z
        bound = (
            2 * self.a.delta * (1 + value) + times(p, own + np.abs(log) * 2 * self.slack_z).sum()
        )
        return Bounded(value, bound + times(p, np.abs(log + value) * self.slack_z).sum())

    # --- KLs ------------------------------------------------------------------------------------------------------

    def _distance(self, p: _Softmax) -> tuple[Array, Array]:
        """d = log p - log q on the tokens that stay, where both are possible (0 elsewhere), and its own error."""
        both = p.possible & self.q.possible
        d = np.where(both, p.log, 0) - np.where(both, self.q.log, 0)
        z, r = np.where(both, self.z, 0), np.where(both, self.r, 0)
        between = abs(p.m - self.q.m)
        rounding = np.where(both, np.abs(z - r) + between, 0) / self.t
        if between > self.a.near:
            rounding = np.minimum(rounding, p.depth + self.q.depth)
        rounding = rounding + np.abs(d) + np.abs(self.log_kappa)
        return d, FEW * self.a.unit * rounding + self.slack_z + self.slack_r

    def _divergence(
        self,
        base: _Softmax,
        other: _Softmax,
        rel_base: Array,
        rel_other: Array,
        d: Array,
        err: Array,
        slack_other: Array,
    ) -> tuple[REAL, REAL, REAL]:
        """KL(base || other) over the tokens that stay, its bound, and the error that log-sum-exps have in common.

        d = log other - log base, 0 where one of them is impossible. +inf is not dealt with here.

        A log-sum-exp is off by the mean of its own logits' slack, under its own softmax.
        """
        b, o = base.p, other.p
        self._note_overflow(b, d)
        near = (np.abs(d) < 1) & base.possible & other.possible
        small = np.where(near, d, 0)
        term = np.where(near, b * phi(small), o - b - times(b, d))
        term = np.where(base.possible, term, o)
        kl = term.sum()
        by_difference = times(np.abs(o - b) + times(b + o, err), err) + times(
            np.abs(term), rel_base
        )
        apart = times(o, rel_other) + times(b, err + (np.abs(d) + 1) * rel_base)
        bound = np.minimum(by_difference, apart).sum()
        bound += times(np.minimum(b, self.a.lost), np.abs(d)).sum()
        mean = times(b, err - slack_other).sum() + times(o, slack_other).sum()
        unlike = np.abs(b - o).sum() + 4 * np.sqrt(abs(kl))  # of second order if the parts are
        common = min(self.a.delta, self.a.common + self.a.delta * unlike) + mean
        return kl, bound + common * min(common, REAL(1)) + self.a.delta * abs(kl), common

    def _forward(self) -> tuple[Bounded, Bounded]:
        a, p, q = self.a, self.p, self.q
        kept = _Softmax(self.z, self.K, self.t)
        in_k, in_r = p.p[self.K].sum(), p.p[self.R].sum()
        gap = self._gap(p, self.R, self.slack_z)
        d, err = self._distance(kept)
        rel_kept = kept.relative(a, self.slack_z)
        kl, bound, common = self._divergence(q, kept, self.rel_q, rel_kept, d, err, self.slack_z)
        # -log p(K), of a relative error where it is small
        rest = -np.log(in_k) if in_r < 0.5 else self._log_of_rest()
        if in_r < 0.5:
            rest = -np.log1p(-in_r)
        bound += times(in_r, gap) + a.delta * abs(rest)
        if (q.possible & ~p.possible).any():
            loss = Bounded(INF, REAL(0))
        elif self._same():
            loss = Bounded(REAL(0), REAL(0))
        else:
            loss = Bounded(kl + rest, bound + a.delta**2)
        # the gradient, on the tokens that stay by the difference or apart, whichever is better
        whole = np.where(p.possible & q.possible, d + self._log_kept(), 0)
        near = (np.abs(whole) < 1) & p.possible & q.possible
        gradient = np.where(near, q.p * np.expm1(np.where(near, whole, 0)), p.p - q.p)
        by_difference = times(p.p, err + common + times(in_r, gap)) + times(
            np.abs(gradient), self.rel_q
        )
        by_difference = np.where(p.possible & q.possible, by_difference, INF)
        apart = times(p.p, self.rel_p) + times(q.p, self.rel_q)
        bound = np.minimum(by_difference, apart) + np.minimum(p.p + q.p, a.lost)
        bound = np.where(self.R, self.err_p, bound + p.p * REAL(2.0**-58))
        if self._same():
            bound = np.zeros(self.size, REAL)
        return loss, Bounded(gradient, bound)

    def _log_kept(self) -> REAL:
        """log p(K)."""
        in_r = self.p.p[self.R].sum()
        return np.log1p(-in_r) if in_r < 0.5 else -self._log_of_rest()

    def _log_of_rest(self) -> REAL:
        """-log p(K) where p(K) may have underflowed."""
        kept = self.p.log[self.K]
        top = kept.max() if len(kept) else -INF
        return INF if top == -INF else -(top + np.log(np.exp(kept - top).sum()))

    def _same(self) -> bool:
        """p = q is a fixed point to the last bit."""
        equal = self.row.fixed_point and bool(np.array_equal(self.z, self.r))
        return equal and not self.negative

    def _reverse(self) -> tuple[Bounded, Bounded]:
        a, p, q, eps = self.a, self.p, self.q, REAL(self.s.eps)
        n = int(self.R.sum())
        log_norm = np.log1p(eps * n)
        infinite = (p.possible & self.K & ~q.possible).any()
        infinite |= eps == 0 and (p.possible & self.R).any()
        if infinite:
            return Bounded(INF, REAL(0)), Bounded(
                np.full(self.size, NAN), np.zeros(self.size, REAL)
            )
        log_eps = np.log(eps) if eps > 0 else REAL(0)
        log_q = np.where(self.R, log_eps, np.where(q.possible, q.log, 0)) - log_norm
        q_tilde = np.where(self.R, eps, q.p) / np.exp(log_norm)
        d = np.where(p.possible, np.where(p.possible, p.log, 0) - log_q, 0)
        near = np.abs(d) < 1
        term = np.where(near, times(p.p, phi(np.where(near, -d, 0))), times(p.p, d) - p.p + q_tilde)
        loss = np.where(p.possible, term, q_tilde).sum()
        # relative to the likeliest token, or the rest of a row that one token has would have no digit
        top = int(p.p.argmax())
        centred = np.where(p.possible, d - d[top], 0)
        gradient = times(p.p, centred - times(p.p, centred).sum())

        # bounds: of the two groups' own divergences, and of their balance
        kept, gone = _Softmax(self.z, self.K, self.t), _Softmax(self.z, self.R, self.t)
        in_k, in_r = p.p[self.K].sum(), p.p[self.R].sum()
        own, err = self._distance(kept)
        rel_kept = kept.relative(a, self.slack_z)
        kl, bound_kl, common = (
            self._divergence(kept, q, rel_kept, self.rel_q, -own, err, self.slack_r)
            if kept.possible.any()
            else (REAL(0),) * 3
        )
        log_gone = np.where(gone.p > 0, gone.log, 0)
        entropy = -times(gone.p, log_gone).sum()
        err_gone = FEW * a.unit * gone.depth + 2 * self.slack_z
        err_entropy = a.delta * entropy + times(gone.p, err_gone).sum()
        gap = self._gap(p, self.R, self.slack_z)
        log_k, log_r = (_log_sum(p.log[some]) for some in (self.K, self.R))
        odds = log_r - log_k if np.isfinite(log_r) and np.isfinite(log_k) else REAL(0)
        delta = kl - odds + entropy + log_eps if n else REAL(0)
        err_delta = REAL(0)
        if n:
            err_delta = a.delta * (abs(kl) + abs(odds) + abs(entropy) + abs(log_eps))
            err_delta += bound_kl + gap + err_entropy
        sizes = times(in_k, np.abs(log_k)) + times(in_r, np.abs(log_r) + abs(log_eps))
        bound = times(in_k, bound_kl) + times(min(in_k, REAL(a.lost)), abs(kl))
        bound += times(in_k * in_r, abs(delta) * gap) + times(in_r, err_entropy)
        bound += a.delta * (sizes + log_norm + abs(loss)) + a.delta**2
        mean = times(kept.p, err + a.delta * np.abs(own)).sum()
        mean += times(np.minimum(kept.p, a.lost), np.abs(own)).sum()
        of_kept = times(p.p, err + common + mean + times(in_r, err_delta))
        of_gone = times(p.p, err_gone + a.delta * (np.abs(log_gone) + entropy) + err_entropy)
        of_gone = of_gone if n > 1 else np.zeros(self.size, REAL)
        of_gone = of_gone + times(p.p, times(in_k, err_delta))
        tiny = np.minimum(p.p, a.lost) * (1 + np.abs(centred) + abs(loss))
        bounds = np.where(self.R, of_gone, of_kept) + times(np.abs(gradient), self.rel_p) + tiny
        bounds = bounds + p.p * REAL(2.0**-58) * (
            np.abs(centred) + times(p.p, np.abs(centred)).sum()
        )
        if self._same():
            return (
                Bounded(REAL(0), REAL(0)),
                Bounded(np.zeros(self.size, REAL), np.zeros(self.size, REAL)),
            )
        return Bounded(loss, bound), Bounded(gradient, bounds)

    def _smoothed(self, forward: bool) -> tuple[Bounded, Bounded]:
        """The target (q* + ε) / (1 + V ε), on all tokens."""
        a, p, eps = self.a, self.p, REAL(self.s.eps)
        norm = 1 + self.size * eps
        target = (self.q.p + eps) / norm
        d = np.where(p.possible, np.where(p.possible, p.log, 0) - np.log(target), 0)
        share = self.q.p / (self.q.p + eps)
        rel_target = a.delta + times(share, self.rel_q)
        err = a.delta + FEW * a.unit * (p.depth + np.abs(d)) + times(share, self.rel_q)
        err = err + self.slack_z + times(p.p, self.slack_z).sum()
        self._note_overflow(target if forward else p.p, d)
        near = (np.abs(d) < 1) & p.possible
        small = np.where(near, d, 0)
        if forward:
            term = np.where(near, target * phi(small), p.p - target - target * d)
            loss = INF if not p.possible.all() else term.sum()
            apart = self.err_p + target * (err + (np.abs(d) + 1) * rel_target)
            gradient = p.p - target
            bounds = self.err_p + target * rel_target
        else:
            term = np.where(near, p.p * phi(-small), times(p.p, d) - p.p + target)
            term = np.where(p.possible, term, target)
            loss = term.sum()
            apart = target * rel_target + times(p.p, err + (np.abs(d) + 1) * self.rel_p)
            top = int(p.p.argmax())
            centred = np.where(p.possible, d - d[top], 0)
            gradient = times(p.p, centred - times(p.p, centred).sum())
            mean = times(p.p, err + a.delta * np.abs(d)).sum()
            bounds = times(p.p, err + a.delta * np.abs(d) + mean) + times(
                np.abs(gradient), self.rel_p
            )
            bounds = bounds + np.minimum(p.p, a.lost) * (1 + np.abs(d) + abs(loss))
        if not np.isfinite(loss):
            return Bounded(loss, REAL(0)), Bounded(gradient, bounds)
        by_difference = times(np.abs(p.p - target) + times(p.p + target, err), err)
        by_difference += times(np.abs(term), rel_target if forward else self.rel_p)
        bound = np.minimum(by_difference, apart).sum() + a.delta * abs(loss)
        bound += times(np.minimum(p.p, a.lost), np.abs(d)).sum()
        return Bounded(loss, bound), Bounded(gradient, bounds)

    # --- likelihoods ----------------------------------------------------------------------------------------------

    def _log_likelihood(self) -> tuple[Bounded, Bounded]:
        a, p, y = self.a, self.p, self.row.label
        eps = REAL(self.s.eps if self.smoothed else 0)
        norm = 1 + self.size * eps
        label = np.zeros(self.size, bool)
        label[y] = True
        target = (label + eps) / norm
        rest = p.p[~label].sum()
        loss = -np.log1p(-rest) if rest < 0.5 else -p.log[y]
        bound = times(rest, self._gap(p, label, self.slack_z)) + a.delta * abs(loss) + a.delta**2
        if self.smoothed:
            loss = (loss - eps * p.log.sum()) / norm
            self._note_overflow(target, p.depth)
            own = FEW * a.unit * p.depth + a.delta + self.slack_z + times(p.p, self.slack_z).sum()
            bound = (bound + eps * own.sum()) / norm + a.delta * abs(loss)
        gradient = p.p - target
        if not self.smoothed:
            gradient[y] = -rest
        bound = bound if np.isfinite(loss) else REAL(0)
        # without smoothing, of the sizes p_y and 1: their difference is the rest, which has its digits
        sizes = target if self.smoothed else target * (p.p[y] + rest)
        return Bounded(loss, bound), Bounded(gradient, self.err_p + a.delta * sizes)

    def _unlikelihood(self) -> tuple[Bounded, Bounded]:
        a, p = self.a, self.p
        mass = p.p[self.S].sum()
        outside = _Softmax(self.z, ~self.S, self.t)
        if not outside.possible.any():
            return Bounded(INF, REAL(0)), Bounded(
                np.full(self.size, NAN), np.zeros(self.size, REAL)
            )
        loss = -np.log1p(-mass) if mass < 0.5 else -_log_sum(p.log[~self.S])
        gap = self._gap(p, self.S, self.slack_z)
        bound = times(mass, gap) + a.delta * loss + min(mass, REAL(a.lost))
        gradient = np.where(self.S, p.p, -mass * outside.p)
        relative = outside.relative(a, self.slack_z) + a.delta + times(p.p[~self.S].sum(), gap)
        tiny = np.minimum(np.abs(gradient), a.lost)
        bounds = np.where(self.S, self.err_p, times(np.abs(gradient), relative) + 2 * tiny)
        return Bounded(loss, bound), Bounded(gradient, bounds)

    def _negative_likelihood(self) -> tuple[Bounded, Bounded]:
        a, p, floor = self.a, self.p, self.s.nl_floor
        log = p.log[self.S]
        finite = np.where(np.isfinite(log), log, 0)
        own = a.delta * (1 + np.abs(finite)) + FEW * a.unit * p.depth[self.S]
        own = own + self.slack_z[self.S] + times(p.p, self.slack_z).sum()
        pushed, unsure = self.S.copy(), np.zeros(self.size, bool)
        if floor is not None:
            own = np.where(log < floor - own, 0, own)
            pushed[self.S] = log >= floor
            unsure[self.S] = np.abs(log - floor) <= own
            log = np.maximum(log, floor)
        loss = log.sum()
        bound = own.sum() + a.delta * np.abs(np.where(np.isfinite(log), log, 0)).sum()
        n = int(pushed.sum())
        bounds = (n + unsure.sum()) * self.err_p + a.delta * pushed * p.p
        # which side of the floor a token is on decides over all of the row
        bounds = bounds + unsure * (1 + a.delta) + unsure.sum() * p.p
        return (
            Bounded(loss, bound if np.isfinite(loss) else REAL(0)),
            Bounded(pushed - n * p.p, bounds),
        )


def _log_sum(x: Array) -> REAL:
    if not len(x) or x.max() == -INF:
        return -INF
    return x.max() + np.log(np.exp(x - x.max()).sum())


def _broken(x: Array) -> bool:
    return bool(np.isnan(x).any() or (x == INF).any() or (x == -INF).all())


def evaluate(row: Row, settings: Settings, arithmetic: Arithmetic = DOUBLE) -> Outcome:
    """A row of weight other than 0."""
    with np.errstate(all="ignore"):
        return _Computation(row, settings, arithmetic).outcome()


def factor_of(outcome: Outcome, weight: float, alpha: float) -> float:
    """c: what the row's loss is multiplied by, before the normaliser."""
    if not outcome.negative:
        return weight
    scaled = outcome.kind in ("unlikelihood", "negative_likelihood") and weight < 0
    return alpha * abs(weight) if scaled else alpha
