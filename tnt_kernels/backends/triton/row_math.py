"""The mathematics of one row in Triton, all in float32. Formulas, names and stages are those of ``csrc/objectives.h``.

    1. row statistics    a maximum and sums relative to it, over any slice of the vocabulary; mergeable
    2. row coefficients  statistics and the row's scalars -> the few numbers that loss and gradient need
    3. row elements      loss and gradient of vocabulary entries, side by side under their formula

A float32 row needs more care than one in C++, which has doubles for its scalars: logarithms of ratios that may be 1
come from ``_log1p``, and the log of the kept mass is always -softplus of the log-odds of the set.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels.objectives import RowLoss

# Stands in for logits of removed tokens and past the end of a row: a token without probability.
NOTHING = tl.constexpr(-float("inf"))
CLOSE = tl.constexpr(1.0)

NONE = tl.constexpr(int(RowLoss.NONE))
FORWARD_KL = tl.constexpr(int(RowLoss.FORWARD_KL))
REVERSE_KL = tl.constexpr(int(RowLoss.REVERSE_KL))
LOG_LIKELIHOOD = tl.constexpr(int(RowLoss.LOG_LIKELIHOOD))
UNLIKELIHOOD = tl.constexpr(int(RowLoss.UNLIKELIHOOD))
NEGATIVE_LIKELIHOOD = tl.constexpr(int(RowLoss.NEGATIVE_LIKELIHOOD))

# How negative ids come.
NO_IDS = tl.constexpr(0)
ROW_IDS = tl.constexpr(1)  # ascending in every row
SHARED_IDS = tl.constexpr(2)  # one ascending list


@triton.jit
def _some_ids(ids, count, at, SOME: tl.constexpr):
    """Of a row's ascending ids, and which of them count: no padding, no duplicates."""
    k = at + tl.arange(0, SOME)
    some = tl.load(ids + k, mask=k < count, other=-1)
    before = tl.load(ids + k - 1, mask=(k > 0) & (k < count), other=-1)
    return some, (some >= 0) & (some != before)


@triton.jit
def _log1p(x):
    """log(1 + x), by the atanh series next to 0. Hardware logarithms are good to 2^-22 absolute there, not relative."""
    s = x / (2.0 + x)
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (0.33333334 + s2 * (0.2 + s2 * (0.14285715 + s2 * 0.11111111))))
    return tl.where(tl.abs(x) < 0.25, series, tl.log(1.0 + x))


@triton.jit
def _log_ratio(a, b):
    """log(a / b), exactly 0 where a and b are the same number."""
    return tl.where(tl.abs(a - b) < 0.25 * b, _log1p((a - b) / b), tl.log(a) - tl.log(b))


@triton.jit
def _softplus(x):
    """log(1 + e^x), right at both ends: +inf -> +inf, -inf -> 0, NaN -> NaN."""
    return tl.where(x > 0.0, x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _phi(d):
    """φ(d) = e^d - 1 - d for |d| <= 1: d² times a polynomial of least relative error (1.7e-7) on that interval."""
    y = 2.4891523e-05
    y = y * d + 0.00020324344
    y = y * d + 0.0013892363
    y = y * d + 0.0083309449
    y = y * d + 0.041666478
    y = y * d + 0.16666695
    y = y * d + 0.5
    return y * d * d


@triton.jit
def _two_sum(a, b):
    """a + b, and what rounding took from it (Knuth's)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


# ------------------------------------------------------------------------------------------- the factor of a row


class Factors(NamedTuple):
    """What rows' losses and gradients are multiplied by, as the host passes it to every kernel of rows."""

    alpha: tl.tensor | Tensor | None  # pointer to the rows' α; None: they share alpha_value
    alpha_stride: tl.tensor | int
    alpha_value: tl.tensor | float
    inverse_normalizer: tl.tensor | Tensor | None  # pointer to one number; None: it is 1


@triton.jit
def row_factors(factors, index, weight, negative, inverse_t, NEGATIVE: tl.constexpr):
    """The factor c of the loss, w or α, which the normaliser is yet to divide; and that of ∂ loss/∂z, where it has."""
    alpha = factors.alpha_value + 0.0
    if factors.alpha is not None:
        alpha = tl.load(factors.alpha + index * factors.alpha_stride)
    if NEGATIVE == UNLIKELIHOOD or NEGATIVE == NEGATIVE_LIKELIHOOD:  # their formulas do not hold w
        alpha *= tl.where(weight < 0.0, -weight, 1.0)
    of_loss = tl.where(negative, alpha, weight)
    of_gradient = of_loss * inverse_t
    if factors.inverse_normalizer is not None:
        of_gradient *= tl.load(factors.inverse_normalizer)
    return of_loss, of_gradient


# ------------------------------------------------------------------------------ the difference of two rows' logits


class Difference(NamedTuple):
    """x_v = (z_v - z_ref) - (r_v - r_ref) - centre is (z_v - z_max) - (r_v - r_max) + excess.

    Next to p = q, z - r is exact, and the difference of two differences to a maximum is not. Where one row is shifted
    against the other, z - r has lost digits that those differences keep. So the maxima decide, once a row.
    """

    z_ref: tl.tensor
    r_ref: tl.tensor
    centre: tl.tensor
    excess: tl.tensor  # what rounding took from the centre


@triton.jit
def difference_of(z_max, r_max):
    distance, lost = _two_sum(z_max, -r_max)
    close = tl.abs(distance) <= CLOSE
    return Difference(
        tl.where(close, 0.0, z_max), tl.where(close, 0.0, r_max), tl.where(close, distance, 0.0),
        tl.where(close, lost, 0.0),
    )  # fmt: skip


@triton.jit
def _moved(z_from, z_to, r_from, r_to):
    """What z - r loses when its maxima move: 0 where both move alike."""
    farthest = tl.maximum(tl.abs(z_from - r_from), tl.abs(z_to - r_to))
    apart = (z_from - z_to) - (r_from - r_to)
    return tl.where(farthest <= CLOSE, (z_from - r_from) - (z_to - r_to), apart)


# ---------------------------------------------------------------------------------------------- 1. row statistics


class ExpSum(NamedTuple):
    """Σ e^{(x - max)/T}, and optionally Σ e^{(x - max)/T} (x - max)/T.

    ``max`` is near the maximum, and finite. It says nothing where the sum is 0: there is no entry, or none but -inf.
    """

    max: tl.tensor
    sum: tl.tensor
    moment: tl.tensor


class Statistics(NamedTuple):
    policy: ExpSum  # z over the kept entries (for LL, UL, NL: those outside the set)
    reference: ExpSum  # r over the same entries, with κ
    policy_set: ExpSum  # z over the set
    reference_set: ExpSum  # r over the set (diagnostics only)
    # Σ e^{(z - max)/T} (((z - max) - (r - reference's max))/T - log κ), over the kept entries
    kl_moment: tl.tensor
    policy_total: tl.tensor  # Σ (z - max)/T over the kept entries, for uniformly smoothed LL


@triton.jit
def _shifted(x, shift, factor):
    """A moment after its maximum moved. One that is infinite but weighs nothing is nothing."""
    return tl.where(factor == 0.0, 0.0, factor * (x + shift))


@triton.jit
def merge(a, b, scale, inverse_t):
    top = tl.maximum(a.max, b.max)
    shift_a, shift_b = a.max - top, b.max - top
    factor_a = tl.where(a.sum == 0.0, 0.0, tl.exp2(shift_a * scale))
    factor_b = tl.where(b.sum == 0.0, 0.0, tl.exp2(shift_b * scale))
    # An empty side must not bring its maximum along: it could push the other's sum below what a float holds.
    top = tl.where(a.sum == 0.0, b.max, tl.where(b.sum == 0.0, a.max, top))
    factor_a = tl.where(b.sum == 0.0, 1.0, factor_a)
    factor_b = tl.where(a.sum == 0.0, 1.0, factor_b)
    shift_a = tl.where(b.sum == 0.0, 0.0, shift_a)
    shift_b = tl.where(a.sum == 0.0, 0.0, shift_b)
    total = factor_a * a.sum + factor_b * b.sum
    moment = _shifted(a.moment, a.sum * shift_a * inverse_t, factor_a) + _shifted(
        b.moment, b.sum * shift_b * inverse_t, factor_b
    )
    return ExpSum(top, total, moment)


@triton.jit
def share(part, whole, scale):
    """Of a part in the whole."""
    found = part.sum * tl.exp2((part.max - whole.max) * scale) / whole.sum
    return tl.where((part.sum == 0.0) & (whole.sum > 0.0), 0.0, found)


@triton.jit
def empty_sum():
    zero = tl.full([], 0.0, tl.float32)
    return ExpSum(zero, zero, zero)


@triton.jit
def has_policy(s):
    return s.policy.sum + s.policy_set.sum > 0.0


@triton.jit
def has_reference(s):
    return s.reference.sum + s.reference_set.sum > 0.0


@triton.jit
def is_undefined(s, LOSS: tl.constexpr):
    """The rule of csrc/row_rules.h: where a distribution that the loss needs does not exist."""
    undefined = has_policy(s) == 0
    if LOSS == FORWARD_KL or LOSS == REVERSE_KL:
        undefined = undefined | (has_reference(s) == 0) | (s.reference.sum == 0.0)
    return undefined


# -------------------------------------------------------------------------------------------- 2. row coefficients


class Coefficients(NamedTuple):
    """p_v = 2^((z_v - policy_max) scale) policy_inverse, q*_v likewise; d_v = x_v/T + offset, x_v by
    ``difference_of(kept_max, reference_max)``.

    LL, UL and NL outside the set: gradient = weight 2^((z_v - kept_max) scale) + bias.
    """

    policy_max: tl.tensor
    policy_inverse: tl.tensor
    policy_log_sum: tl.tensor
    reference_max: tl.tensor
    reference_inverse: tl.tensor
    offset: tl.tensor
    kl_centre: tl.tensor  # reverse KL: gradient p_v (d_v - offset - kl_centre)
    set_offset: tl.tensor  # reverse KL, removed tokens: d_s = (z_s - policy_max)/T + set_offset,
    set_centre: tl.tensor  # gradient p_s ((z_s - policy_max)/T - set_centre)
    set_value: (
        tl.tensor
    )  # reverse KL: q̃ of a removed token; LL: the gradient of y; NL: the number of active tokens
    kept_max: tl.tensor
    weight: tl.tensor
    bias: tl.tensor
    loss: tl.tensor  # the part of the loss that needs no second pass
    scale: tl.tensor  # factor on the gradient


@triton.jit
def log_odds(s, inverse_t):
    """Of the set against the rest: right for p(S) near 0 and near 1."""
    odds = (s.policy_set.max - s.policy.max) * inverse_t
    odds += tl.log(s.policy_set.sum) - tl.log(s.policy.sum)
    odds = tl.where(s.policy.sum == 0.0, float("inf"), odds)
    return tl.where(s.policy_set.sum == 0.0, -float("inf"), odds)


@triton.jit
def coefficients(
    s, scale, inverse_t, eps, removed_count, vocab_size, LOSS: tl.constexpr, UNIFORM: tl.constexpr
):
    zero = tl.full([], 0.0, tl.float32)
    every = merge(s.policy, s.policy_set, scale, inverse_t)
    kept_max = tl.where(s.policy.sum == 0.0, every.max, s.policy.max)
    shift = tl.exp2((kept_max - every.max) * scale)
    kept_inverse = shift / every.sum  # p_v = 2^((z_v - kept max) scale) * this
    removed = share(s.policy_set, every, scale)
    log_sum = tl.log(every.sum)
    odds = log_odds(s, inverse_t)
    q_inverse, offset, kl_centre, set_offset, set_centre = zero, zero, zero, zero, zero
    set_value, weight, bias = zero, zero, zero
    loss = zero
    if LOSS != NONE:
        loss = tl.where(is_undefined(s, LOSS), float("nan"), zero)
    if LOSS == LOG_LIKELIHOOD:  # -log p_y = softplus(-log odds of y)
        log_p_label = -_softplus(-odds)
        loss -= log_p_label
        weight = kept_inverse
        set_value = -s.policy.sum * kept_inverse  # p_y - 1 without the subtraction
        if UNIFORM:  # cross-entropy against the one-hot label, smoothed
            norm = 1.0 / (1.0 + vocab_size * eps)
            log_p = (
                s.policy_total
                - (vocab_size - 1) * (log_sum + (every.max - kept_max) * inverse_t)
                + log_p_label
            )
            loss = (loss - eps * log_p) * norm
            bias = -eps * norm
            set_value += (vocab_size - 1) * eps * norm
    elif LOSS == UNLIKELIHOOD:  # -log(1 - p(S)); outside S the gradient is -p(S) p_v / (1 - p(S))
        loss += _softplus(odds)
        weight = -removed / s.policy.sum
    elif (
        LOSS == NEGATIVE_LIKELIHOOD
    ):  # outside S the gradient is -n p_v; n and the loss come from the set
        weight = -kept_inverse
    elif LOSS == FORWARD_KL or LOSS == REVERSE_KL:
        q_inverse = 1.0 / s.reference.sum
        # log Σ_r - log Σ_z and log P(kept). Where no kept entry has any p, d is -inf whatever is added to it.
        excess = difference_of(s.policy.max, s.reference.max).excess * inverse_t
        offset = _log_ratio(s.reference.sum, s.policy.sum) - excess - _softplus(odds)
        offset = tl.where(s.policy.sum == 0.0, 0.0, offset)
        if LOSS == REVERSE_KL and not UNIFORM:
            log_norm = _log1p(eps * removed_count)
            set_value = eps / (1.0 + eps * removed_count)
            q_inverse /= 1.0 + eps * removed_count
            offset += log_norm
            set_offset = log_norm - tl.log(eps) - log_sum
            # d - KL = (d - M) + p(other group) (M - M of the other group), M the mean of d over the entry's own group.
            kl_centre = tl.where(s.policy.sum == 0.0, 0.0, s.kl_moment / s.policy.sum + excess)
            if removed > 0.0:
                kept = s.policy.sum * kept_inverse
                set_centre = (
                    s.policy_set.moment / s.policy_set.sum
                    + (s.policy_set.max - every.max) * inverse_t
                )
                gap = kl_centre + offset - (set_centre + set_offset)
                set_centre += tl.where(kept > 0.0, kept * gap, 0.0)
                kl_centre -= tl.where(kept > 0.0, removed * gap, 0.0)
                kl_centre = tl.where(eps == 0.0, float("inf"), kl_centre)  # as is the loss
        elif LOSS == FORWARD_KL and not UNIFORM:
            loss += removed  # q* is 0 there, so each of them gives p_s
    return Coefficients(
        every.max, 1.0 / every.sum, log_sum, s.reference.max, q_inverse, offset, kl_centre,
        set_offset, set_centre, set_value, kept_max, weight, bias, loss, zero,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- 3. row elements


class Element(NamedTuple):
    loss: tl.tensor
    gradient: tl.tensor


@triton.jit
def forward_kl_element(p, q, d):
    """KL(q*‖p): q* φ(d), d = log p - log q*; gradient p - q* = q* (e^d - 1). Any d, ±inf and NaN (0 against 0) too."""
    near = tl.abs(d) < 1.0
    phi = _phi(d)
    difference = p - q
    loss = tl.where(q == 0.0, p, difference - q * d)
    return Element(tl.where(near, q * phi, loss), tl.where(near, q * (phi + d), difference))


@triton.jit
def reverse_kl_element(p, q, d, excess):
    """KL(p‖q̃): p φ(-d), d = log p - log q̃; gradient p (d - KL), with d - KL given as ``excess``."""
    near = tl.abs(d) < 1.0
    loss = tl.where(p == 0.0, q, p * d - (p - q))
    return Element(tl.where(near, p * _phi(-d), loss), tl.where(p == 0.0, 0.0, p * excess))
