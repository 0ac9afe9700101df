"""The objectives of one row in Triton, all in float32: from sums to the loss and to what a second pass takes.

Formulas, names and stages are those of the shared C++ headers: ``row_sums.h`` (sums by their logarithms),
``kl_slices.h`` (slices of a KL row, and how they merge), ``kl_conclusion.h`` (from these to loss and plan),
``objectives.h`` (other losses) and ``row_rules.h``. docs/numerics.md derives them. Where C++ has doubles for a row's
few numbers, differences of levels here come in two parts, and logarithms of ratios that may be 1 from ``log1p``.

A row's numbers are scalars. Those of all shards, which merge, are vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels.objectives import RowLoss

NONE = tl.constexpr(int(RowLoss.NONE))
FORWARD_KL = tl.constexpr(int(RowLoss.FORWARD_KL))
REVERSE_KL = tl.constexpr(int(RowLoss.REVERSE_KL))
LOG_LIKELIHOOD = tl.constexpr(int(RowLoss.LOG_LIKELIHOOD))
UNLIKELIHOOD = tl.constexpr(int(RowLoss.UNLIKELIHOOD))
NEGATIVE_LIKELIHOOD = tl.constexpr(int(RowLoss.NEGATIVE_LIKELIHOOD))

INF = tl.constexpr(float("inf"))
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
#: Stands in for logits that are not there: it weighs nothing, and the difference of two is finite.
AWAY = tl.constexpr(-1e30)
LOWEST = tl.constexpr(-3.4028234663852886e38)
#: 2 sinh(y/2) = y (c₀ + c₁ y² + c₂ y⁴), relative error 4e-7 for |y| <= 1.25: csrc/cuda/kl_math.cuh.
TWO_SINH = tuple(map(float.fromhex, ("0x1.000006p+0", "0x1.554c74p-5", "0x1.14e172p-11")))

# ---------------------------------------------------------------------------------------------- elementary functions


@triton.jit
def log1p(x):
    """log(1 + x), by the atanh series next to 0. Hardware logarithms are good to 2^-22 absolute there, not relative."""
    s = x / (2.0 + x)
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (0.33333334 + s2 * (0.2 + s2 * (0.14285715 + s2 * 0.11111111))))
    return tl.where(tl.abs(x) < 0.25, series, tl.log(1.0 + x))


@triton.jit
def softplus(x):
    """log(1 + e^x), right at both ends: +inf -> +inf, -inf -> 0, NaN -> NaN."""
    return tl.where(x > 0.0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def phi_of(d):
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
def phi_of_log(ratio, log_ratio):
    """φ(L) of L = log1p(ratio)."""
    return tl.where(tl.abs(log_ratio) < 0.5, phi_of(log_ratio), ratio - log_ratio)


@triton.jit
def expm1(d):
    return tl.where(tl.abs(d) < 1.0, phi_of(d) + d, tl.exp(d) - 1.0)


@triton.jit
def two_sum(a, b):
    """a + b, and what rounding took from it (Knuth's)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


@triton.jit
def log_add(a, b):
    """log(e^a + e^b); NaN if one of them is."""
    both = tl.maximum(a, b) + log1p(tl.exp(-tl.abs(a - b)))
    return tl.where(a == -INF, b, tl.where(b == -INF, a, both))


# ----------------------------------------------------------------------------------------------- the factor of a row


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


@triton.jit
def times_upstream(factor, upstream, at):
    """Of a gradient. Where a row does not count, or nobody asks about it, it is 0 whatever the other factor is."""
    if upstream is not None:
        asked = tl.load(upstream + at)
        factor = tl.where((factor == 0.0) | (asked == 0.0), 0.0, factor * asked)
    return factor


# ----------------------------------------------------------------------------------------- sums by their logarithms


class LogSum(NamedTuple):
    """log Σ e^{(x - ref)/T} over some entries, and the entropy of their softmax where somebody asks for it.

    ``ref`` is finite and near their maximum; where there is no entry, or none but -inf, the logarithm is -inf and
    ``ref`` says nothing. NaN: one of them is no number.
    """

    ref: tl.tensor
    log: tl.tensor
    entropy: tl.tensor


@triton.jit
def nothing():
    zero = tl.full([], 0.0, tl.float32)
    return LogSum(zero, zero - INF, zero)


@triton.jit
def log_sum(ref, total, moment):
    """Of Σ 2^at, at = (x - ref) log2(e)/T, and of Σ 2^at at."""
    entropy = tl.where(total > 0.0, tl.log(total) - (moment / total) * LN_2, 0.0)
    return LogSum(ref, tl.log(total), entropy)


@triton.jit
def log_sum_of(logit, log_weight):
    """Of one logit, with a weight."""
    log = tl.where(logit < INF, log_weight, float("nan"))
    here = logit != -INF
    return LogSum(tl.where(here, logit, 0.0), tl.where(here, log, -INF), 0.0 * log_weight)


@triton.jit
def relative_to(s, ref, inverse_t):
    return tl.where(s.log == -INF, -INF, (s.ref - ref) * inverse_t + s.log)


@triton.jit
def _part_of_entropy(log, log_all, entropy):
    share = tl.exp(log - log_all)
    return tl.where(share > 0.0, share * (entropy + (log_all - log)), 0.0)


@triton.jit
def merge(a, b, inverse_t):
    top = tl.maximum(a.ref, b.ref)
    ref = tl.where(a.log == -INF, b.ref, tl.where(b.log == -INF, a.ref, top))
    log_a, log_b = relative_to(a, ref, inverse_t), relative_to(b, ref, inverse_t)
    log = log_add(log_a, log_b)
    entropy = _part_of_entropy(log_a, log, a.entropy) + _part_of_entropy(log_b, log, b.entropy)
    return LogSum(ref, log, entropy)


@triton.jit
def merged_logs(s, inverse_t):
    """Of all shards."""
    known = (s.log == s.log) & (s.log > -INF)
    ref = tl.max(tl.where(known, s.ref, -INF), 0)
    ref = tl.where(ref == -INF, 0.0, ref)
    logs = relative_to(s, ref, inverse_t)
    log = log_of_sum(logs)
    return LogSum(ref, log, tl.sum(_part_of_entropy(logs, log, s.entropy), 0))


@triton.jit
def log_of_sum(logs):
    top = tl.max(tl.where(logs == logs, logs, -INF), 0)
    top = tl.where(tl.abs(top) < INF, top, 0.0)
    return top + tl.log(tl.sum(tl.exp(logs - top), 0))


@triton.jit
def share(part, whole, inverse_t):
    """Of a part in the whole."""
    found = tl.exp(relative_to(part, whole.ref, inverse_t) - whole.log)
    return tl.where(part.log == -INF, 0.0, found)


class RowSums(NamedTuple):
    """What a slice of a row is reduced to: the whole vocabulary, or a part of it.

    Of a KL, base and other are reference and policy if it is forward, policy and reference if it is reverse.
    """

    policy: LogSum  # of what stays, without a y that is pushed down in part
    reference: LogSum
    label_policy: tl.tensor  # z of that y, in the slice that holds it; else 0
    policy_set: LogSum  # of what does not: a KL's removed tokens, S of UL and NL, y of LL
    reference_set: LogSum
    label_reference: tl.tensor
    kl: tl.tensor  # of a KL: of base against other within the slice
    # Of a KL: the logarithm of the ratio of other's sum to the base's, less the distance of their references; of a
    # slice without other, the mean of all log-ratios. Of LL under uniform smoothing Σ (z - policy's ref)/T.
    log_ratio: tl.tensor
    kept: tl.tensor  # number of entries that stay


@triton.jit
def _pack_sum(to, s, ENTROPY: tl.constexpr):
    tl.store(to + 0, s.ref)
    tl.store(to + 1, s.log)
    if ENTROPY:
        tl.store(to + 2, s.entropy)


@triton.jit
def pack(to, s):
    """A shard's sums as they travel: docs/sharded.md."""
    _pack_sum(to, s.policy, True)
    _pack_sum(to + 3, s.reference, False)
    tl.store(to + 5, s.label_policy)
    _pack_sum(to + 6, s.policy_set, True)
    _pack_sum(to + 9, s.reference_set, False)
    tl.store(to + 11, s.label_reference)
    tl.store(to + 12, s.kl)
    tl.store(to + 13, s.log_ratio)
    tl.store(to + 14, s.kept)


@triton.jit
def _unpack_sum(at, here, ENTROPY: tl.constexpr):
    ref = tl.load(at, mask=here, other=0.0)
    log = tl.load(at + 1, mask=here, other=-INF)
    entropy = 0.0 * ref
    if ENTROPY:
        entropy = tl.load(at + 2, mask=here, other=0.0)
    return LogSum(ref, log, entropy)


@triton.jit
def unpack(at, here):
    """Of all shards, ``here`` of which there are: vectors."""
    return RowSums(
        _unpack_sum(at, here, True), _unpack_sum(at + 3, here, False), tl.load(at + 5, mask=here, other=0.0),
        _unpack_sum(at + 6, here, True), _unpack_sum(at + 9, here, False), tl.load(at + 11, mask=here, other=0.0),
        tl.load(at + 12, mask=here, other=0.0), tl.load(at + 13, mask=here, other=0.0),
        tl.load(at + 14, mask=here, other=0.0),
    )  # fmt: skip


@triton.jit
def merged_rows(s, inverse_t):
    """Of all shards: all but what a KL's slices merge by, kl and log_ratio. The latter is LL's total."""
    policy = merged_logs(s.policy, inverse_t)
    moved = s.log_ratio + s.kept * ((s.policy.ref - policy.ref) * inverse_t)
    total = tl.sum(tl.where(s.kept == 0.0, 0.0, moved), 0)
    return RowSums(
        policy, merged_logs(s.reference, inverse_t), tl.sum(s.label_policy, 0), merged_logs(s.policy_set, inverse_t),
        merged_logs(s.reference_set, inverse_t), tl.sum(s.label_reference, 0), 0.0 * total, total, tl.sum(s.kept, 0),
    )  # fmt: skip


@triton.jit
def log_odds(s, inverse_t):
    """log of p(set)/p(outside): right for p(set) near 0 and near 1."""
    odds = relative_to(s.policy_set, s.policy.ref, inverse_t) - s.policy.log
    odds = tl.where(s.policy.log == -INF, INF, odds)
    return tl.where(s.policy_set.log == -INF, -INF, odds)


@triton.jit
def exists(kept, removed):
    some = (kept.log > -INF) | (removed.log > -INF)
    return (kept.log < INF) & (removed.log < INF) & some


@triton.jit
def is_undefined(s, LOSS: tl.constexpr):
    """Where a distribution that the loss needs does not exist, by the rule of csrc/row_sums.h."""
    undefined = exists(s.policy, s.policy_set) == 0
    if LOSS == FORWARD_KL or LOSS == REVERSE_KL:
        undefined = (
            undefined | (exists(s.reference, s.reference_set) == 0) | (s.reference.log == -INF)
        )
    elif LOSS == NONE:
        undefined = s.kept < 0.0
    return undefined


class Diagnosis(NamedTuple):
    """NaN where the distribution that they are of does not exist, or is not read."""

    negative_mass: tl.tensor
    ref_negative_mass: tl.tensor
    entropy: tl.tensor


@triton.jit
def diagnose(s, log_kappa, inverse_t, KL: tl.constexpr, NEGATIVE: tl.constexpr):
    """``log_kappa`` is 0 where no y is pushed down in part."""
    nan = float("nan")
    policy_set, reference_set = s.policy_set, s.reference_set
    mass = tl.full([], 0.0, tl.float32)
    ref_mass = mass
    if NEGATIVE:
        z_label = tl.where(log_kappa == 0.0, -INF, s.label_policy)
        r_label = tl.where(log_kappa == 0.0, -INF, s.label_reference)
        policy_set = merge(policy_set, log_sum_of(z_label, 0.0 * log_kappa), inverse_t)
        reference_set = merge(reference_set, log_sum_of(r_label, 0.0 * log_kappa), inverse_t)
    every = merge(s.policy, policy_set, inverse_t)
    entropy = every.entropy
    if NEGATIVE:
        mass = share(policy_set, every, inverse_t)
    if KL:
        if NEGATIVE:
            ref_mass = share(reference_set, merge(s.reference, reference_set, inverse_t), inverse_t)
        ref_mass = tl.where(exists(s.reference, reference_set), ref_mass, nan)
    else:
        ref_mass += nan
    there = exists(s.policy, policy_set)
    return Diagnosis(
        tl.where(there, mass, nan), tl.where(there, ref_mass, nan), tl.where(there, entropy, nan)
    )


# --------------------------------------------------------------------------------------------- slices of a KL row


class KlSlice(NamedTuple):
    """Part of the kept entries of a KL row, with sums of its own; x and o are the logits of base and other."""

    x_ref: tl.tensor  # near its maxima
    o_ref: tl.tensor
    log_base: tl.tensor  # of its base's sum, relative to x_ref/T
    log_other: tl.tensor  # of the other's, relative to o_ref/T
    log_ratio: tl.tensor  # as RowSums has it
    kl: tl.tensor
    entropy: tl.tensor  # of the policy within the slice


class KlEntry(NamedTuple):
    """A slice as an entry of the row: logarithms of its shares, and its log-ratio less the row's."""

    log_base: tl.tensor
    log_other: tl.tensor
    y: tl.tensor


@triton.jit
def slice_of(s, REVERSE: tl.constexpr):
    """From the sums that shards tell."""
    base, other = s.reference, s.policy
    if REVERSE:
        base, other = s.policy, s.reference
    # Where both exist, the logarithm of their ratio has digits that the other's own has lost.
    both = (base.log != -INF) & (other.log != -INF)
    log_other = tl.where(both, base.log + s.log_ratio, other.log)
    return KlSlice(base.ref, other.ref, base.log, log_other, s.log_ratio, s.kl, s.policy.entropy)


@triton.jit
def with_slice(s, k, REVERSE: tl.constexpr):
    """Sums with what was found of the entries that stay, or what they are with a label that is pushed down in part."""
    base = LogSum(k.x_ref, k.log_base, k.entropy)
    other = LogSum(k.o_ref, k.log_other, k.entropy)
    policy, reference = other, base
    if REVERSE:
        policy, reference = base, other
    return RowSums(
        policy, reference, s.label_policy, s.policy_set, s.reference_set, s.label_reference, k.kl, k.log_ratio, s.kept,
    )  # fmt: skip


@triton.jit
def _moved(log, by):
    return tl.where(log == -INF, -INF, log + by)


@triton.jit
def entry_of(k, row, inverse_t):
    log_base = _moved(k.log_base, (k.x_ref - row.x_ref) * inverse_t) - row.log_base
    log_base = tl.where(k.log_base == -INF, -INF, log_base)
    log_other = _moved(k.log_other, (k.o_ref - row.o_ref) * inverse_t) - row.log_other
    log_other = tl.where(k.log_other == -INF, -INF, log_other)
    # A large log-ratio has lost digits that shares have: of a slice with nearly all the mass, both are 1.
    log_ratio = k.log_ratio + ((k.o_ref - row.o_ref) - (k.x_ref - row.x_ref)) * inverse_t
    by_shares = (k.log_base != -INF) & (k.log_other != -INF) & (tl.abs(log_ratio) > 32.0)
    return KlEntry(
        log_base, log_other, tl.where(by_shares, log_other - log_base, log_ratio - row.log_ratio)
    )


@triton.jit
def merged_slices(k, inverse_t, REVERSE: tl.constexpr):
    """The slices, vectors, as entries of a row of their own: all terms are >= 0. Empty ones have neither log."""
    has_base, has_other = k.log_base != -INF, k.log_other != -INF
    there = has_base | has_other
    # Relative to those that weigh most. They are found relative to any.
    x_any = tl.max(tl.where(there, k.x_ref, LOWEST), 0)
    o_any = tl.max(tl.where(there, k.o_ref, LOWEST), 0)
    base_weight = _moved(k.log_base, (k.x_ref - x_any) * inverse_t)
    other_weight = _moved(k.log_other, (k.o_ref - o_any) * inverse_t)
    top_base = tl.max(tl.where(base_weight == base_weight, base_weight, -INF), 0)
    top_other = tl.max(tl.where(other_weight == other_weight, other_weight, -INF), 0)
    x_ref = tl.max(tl.where(base_weight == top_base, k.x_ref, LOWEST), 0)
    o_ref = tl.max(tl.where(other_weight == top_other, k.o_ref, LOWEST), 0)
    x_ref = tl.where(top_base > -INF, x_ref, x_any)
    o_ref = tl.where(top_other > -INF, o_ref, o_any)
    logs_base = _moved(k.log_base, (k.x_ref - x_ref) * inverse_t)
    logs_other = _moved(k.log_other, (k.o_ref - o_ref) * inverse_t)
    log_base, log_other = log_of_sum(logs_base), log_of_sum(logs_other)
    log_ratios = k.log_ratio + ((k.o_ref - o_ref) - (k.x_ref - x_ref)) * inverse_t
    lacks_other = (log_base != -INF) & (log_other == -INF)
    shares = tl.exp(logs_base - log_base)
    mean = tl.sum(tl.where(has_base, shares * log_ratios, 0.0), 0)
    # Next to that of the slice that weighs most, where all have both. Of large sums, logarithms have lost digits.
    top_ratio = tl.max(tl.where(base_weight == top_base, log_ratios, -INF), 0)
    rise = tl.where(has_base & has_other, shares * expm1(log_ratios - top_ratio), float("nan"))
    rise = tl.sum(tl.where(there, rise, 0.0), 0)
    log_ratio = tl.where(tl.abs(rise) < 0.5, top_ratio + log1p(rise), log_other - log_base)
    log_ratio = tl.where(lacks_other, mean, log_ratio)
    zero = 0.0 * log_ratio
    row = KlSlice(x_ref, o_ref, log_base, log_other, log_ratio, zero, zero)
    entry = entry_of(k, row, inverse_t)
    share, other_share = tl.exp(entry.log_base), tl.exp(entry.log_other)
    # Unless y is next to 0, share φ(y) is other's share - share - share y: the first two add up apart, to about 0.
    is_close = (share != 0.0) & (other_share != 0.0) & (tl.abs(entry.y) < 1.0)
    far = tl.where(lacks_other, 0.0, tl.where(share == 0.0, 0.0, share * (k.kl - entry.y)))
    terms = tl.where(is_close, share * (phi_of(entry.y) + k.kl), far)
    masses = tl.where(is_close, 0.0, other_share - share)
    masses = tl.where(lacks_other, 0.0, tl.sum(tl.where(there, masses, 0.0), 0))
    kl = tl.sum(tl.where(there, terms, 0.0), 0) + masses
    log_share = entry.log_base if REVERSE else entry.log_other
    of_policy = tl.exp(log_share)
    entropy = tl.sum(tl.where(of_policy > 0.0, of_policy * (k.entropy - log_share), 0.0), 0)
    return KlSlice(
        x_ref, o_ref, log_base, log_other, log_ratio, tl.where(kl < 0.0, 0.0, kl), entropy
    )


@triton.jit
def slice_of_label(s, log_kappa, inverse_t, REVERSE: tl.constexpr):
    """Of a y that is pushed down in part."""
    x, o = s.label_reference, s.label_policy
    of_x, of_o = log_kappa, 0.0 * log_kappa
    if REVERSE:
        x, o = o, x
        of_x, of_o = of_o, of_x
    x_ref = tl.where(tl.abs(x) < INF, x, 0.0)
    o_ref = tl.where(tl.abs(o) < INF, o, 0.0)
    log_base = (x - x_ref) * inverse_t + of_x
    log_other = (o - o_ref) * inverse_t + of_o
    log_base = tl.where(x == -INF, -INF, log_base)
    log_other = tl.where(o == -INF, -INF, log_other)
    lacks_other = log_other == -INF
    kl = tl.where(lacks_other & (log_base != -INF), INF, 0.0)
    log_ratio = tl.where(lacks_other, -INF, of_o - of_x)
    return KlSlice(x_ref, o_ref, log_base, log_other, log_ratio, kl, 0.0 * kl)


@triton.jit
def _pair(a, b):
    return tl.where(tl.arange(0, 2) == 0, a, b)


@triton.jit
def complete(s, k, log_kappa, inverse_t, REVERSE: tl.constexpr, NEGATIVE: tl.constexpr):
    """Puts a label that is pushed down in part to the entries that stay; and what it is among them."""
    x_ref, o_ref, log_base, log_other = k.x_ref, k.o_ref, k.log_base, k.log_other
    log_ratio, kl, entropy = k.log_ratio, k.kl, k.entropy
    at_base, at_other, y = tl.full([], -INF, tl.float32), tl.full([], -INF, tl.float32), 0.0
    if NEGATIVE:
        if log_kappa != 0.0:
            own = slice_of_label(s, log_kappa, inverse_t, REVERSE)
            both = KlSlice(
                _pair(k.x_ref, own.x_ref), _pair(k.o_ref, own.o_ref), _pair(k.log_base, own.log_base),
                _pair(k.log_other, own.log_other), _pair(k.log_ratio, own.log_ratio), _pair(k.kl, own.kl),
                _pair(k.entropy, own.entropy),
            )  # fmt: skip
            row = merged_slices(both, inverse_t, REVERSE)
            x_ref, o_ref, log_base, log_other = row.x_ref, row.o_ref, row.log_base, row.log_other
            log_ratio, kl, entropy = row.log_ratio, row.kl, row.entropy
            entry = entry_of(own, row, inverse_t)
            at_base, at_other, y = entry.log_base, entry.log_other, entry.y
    infinite = (log_base != -INF) & (log_other == -INF)
    kl = tl.where(infinite, INF, kl)
    log_ratio = tl.where(infinite, -INF, log_ratio)
    row = KlSlice(x_ref, o_ref, log_base, log_other, log_ratio, kl, entropy)
    return row, KlEntry(at_base, at_other, y)


# ------------------------------------------------------------------------- from sums to the loss, and to a plan


class KlPlan(NamedTuple):
    """What the second pass of a KL row takes, for a factor of 1."""

    x_zero: tl.tensor  # what logits are read relative to
    o_zero: tl.tensor
    x_ref: tl.tensor  # base weights are 2^((x - x_ref) scale - c)
    c: tl.tensor
    o_ref: tl.tensor
    shift: tl.tensor  # of y, log p - log q* or the like, in two parts
    rest: tl.tensor
    u0: tl.tensor  # forward: 1/S and log2 of p's weights; reverse: what e and e y are multiplied by
    u1: tl.tensor
    # Of removed entries: t = (z - set_max)/T, gradient set_scale e^t (t + set_shift), forward without the bracket.
    set_max: tl.tensor
    set_scale: tl.tensor
    set_shift: tl.tensor
    partial: tl.tensor  # the gradient of a y with -1 < w < 0


class ExpPlan(NamedTuple):
    """Of a loss that reads the policy alone, for a factor of 1: kept 2^((z - ref) scale) + bias outside the set."""

    ref: tl.tensor
    kept: tl.tensor
    bias: tl.tensor
    set_ref: tl.tensor  # in the set, of t = (z - set_ref)/T: set e^t, and push unless t < least
    set: tl.tensor
    push: tl.tensor
    least: tl.tensor


class UniformPlan(NamedTuple):
    """Of a KL under uniform smoothing: p = e^{(z - z_ref)/T} p_inverse, log p = (z - z_ref)/T - p_log_sum."""

    z_ref: tl.tensor
    p_inverse: tl.tensor
    p_log_sum: tl.tensor
    r_ref: tl.tensor  # q* = e^{(r - r_ref)/T} q_inverse of what is not removed
    q_inverse: tl.tensor
    loss: tl.tensor


@triton.jit
def masses_of(odds):
    """p(K) and p(R) = 1 - p(K), each with all its digits, and the entropy of that choice."""
    distance = tl.abs(odds)
    ratio = tl.exp(-distance)
    small = ratio / (1.0 + ratio)
    kept = tl.where(odds > 0.0, small, 1.0 - small)
    removed = tl.where(odds > 0.0, 1.0 - small, small)
    return kept, removed, log1p(ratio) + tl.where(small > 0.0, small * distance, 0.0)


@triton.jit
def conclude_kl(
    s, k, label, zeros, log_kappa, has_label, eps, log_eps, removed_count, inverse_t, LOSS: tl.constexpr,
):  # fmt: skip
    """The loss, whether the gradient is NaN, and the plan.

    ``s``: all sums, the label with them; ``k`` and ``label``: as ``complete`` has them; ``zeros``: what the logits of
    base and other are read relative to.
    """
    REVERSE: tl.constexpr = LOSS == REVERSE_KL
    x_zero, o_zero = zeros
    odds = log_odds(s, inverse_t)
    removes = s.policy_set.log != -INF
    mass_kept, mass_removed, entropy = masses_of(odds)
    pushed = softplus(odds)
    undefined = is_undefined(s, LOSS)
    x_ref, o_ref = k.x_ref - x_zero, k.o_ref - o_zero
    # The largest weights' exponents are next to 0, and weights add up to about 4.
    c = tl.where(tl.abs(k.log_base) < 1e9, tl.floor(k.log_base * LOG2_E) - 2.0, 0.0)
    total = tl.exp2(tl.fma(k.log_base, LOG2_E, -c))
    # The distance of the references, o_ref - x_ref, in two parts: by it and by the log-ratio, y is centred.
    distance, lost = two_sum(o_ref, -x_ref)
    apart = tl.fma(
        distance, inverse_t, 0.0
    )  # a product, which no compiler fuses with the sum below
    apart_rest = tl.fma(distance, inverse_t, -apart) + lost * inverse_t
    set_max = tl.where(removes, s.policy_set.ref, 0.0)
    set_scale = tl.where(removes, mass_removed * tl.exp(-s.policy_set.log), 0.0)
    set_shift, partial = 0.0 * c, 0.0 * c
    if REVERSE:
        log_norm = log1p(eps * removed_count)
        loss = k.kl + log_norm
        extra = 0.0 * loss
        if removes:
            delta = k.kl - (odds - s.policy_set.entropy - log_eps)  # D_K - D_R
            # p(R) times the log-odds is in the entropy: apart from log p(K) it would cancel against it.
            loss = log_norm - entropy
            loss += tl.where(mass_kept > 0.0, mass_kept * k.kl, 0.0)
            loss -= tl.where(
                mass_removed > 0.0, mass_removed * (s.policy_set.entropy + log_eps), 0.0
            )
            extra = tl.where((mass_removed > 0.0) & (mass_kept > 0.0), mass_removed * delta, 0.0)
            set_shift = s.policy_set.entropy - s.policy_set.log
            set_shift -= tl.where(mass_kept > 0.0, mass_kept * delta, 0.0)
        h = tl.where(mass_kept > 0.0, mass_kept / total, 0.0)
        up = k.log_ratio
        u0, u1 = tl.where(h > 0.0, h * (extra - k.kl), 0.0), -h
        lost_row = undefined | ((tl.abs(loss) < INF) == 0)
        # p (log p - log q̃ - loss)
        p = tl.exp(label.log_base - pushed)
        partial = tl.where(p == 0.0, 0.0, p * (log_norm - pushed - label.y - loss))
    else:
        loss = k.kl + pushed
        # Of the policy's whole sum: the logarithm, and that of its ratio to the base's sum. Where K has next to none
        # of p, terms of theirs would be large.
        log_policy, up = k.log_other + pushed, k.log_ratio + pushed
        crowded = odds > 40.0
        by_set = relative_to(s.policy_set, k.o_ref, inverse_t) + softplus(-odds)
        log_policy = tl.where(crowded, by_set, log_policy)
        up = tl.where(crowded, by_set - k.log_base, up)
        u0, u1 = 1.0 / total, -(log_policy * LOG2_E)
        lost_row = undefined
        q, d = tl.exp(label.log_base), label.y - pushed
        partial = tl.where(tl.abs(d) < 1.0, q * expm1(d), tl.exp(label.log_other - pushed) - q)
    up = tl.minimum(tl.maximum(up, -4e37), 4e37)
    shift, rest = two_sum(apart, up)
    rest = tl.where(tl.abs(apart) < 1e30, rest + apart_rest, 0.0)
    partial = tl.where(has_label & (lost_row == 0), partial, 0.0)
    loss = tl.where(undefined, float("nan"), loss)
    return loss, lost_row, KlPlan(
        x_zero, o_zero, x_ref, c, o_ref, shift, rest, u0, u1, set_max, set_scale, set_shift, partial,
    )  # fmt: skip


@triton.jit
def set_normalizer(s, inverse_t):
    """log p of an entry of the set = (z - the set's ref)/T - this."""
    return relative_to(merge(s.policy, s.policy_set, inverse_t), s.policy_set.ref, inverse_t)


@triton.jit
def least_log_weight(floor, normalizer):
    """That of the least log p that is pushed down; a number, as one below any floor is -inf where logits are huge."""
    floor = tl.full([], 0.0, tl.float32) + floor
    least = floor + normalizer
    return tl.where((floor > -INF) & (least < LOWEST), LOWEST, least)


@triton.jit
def conclude_exp(
    s, part, active, eps, nl_floor, vocab_size, inverse_t, LOSS: tl.constexpr, UNIFORM: tl.constexpr
):
    """Of LL, UL and NL, or of no loss; ``part`` and ``active``: of NL, what its set's entries add up to."""
    odds = log_odds(s, inverse_t)  # of y of LL, S of the others
    kept, removed, _ = masses_of(odds)
    zero = 0.0 * s.kept
    loss, on_kept, bias, on_set, push, least = zero, zero, zero, zero, zero, zero - INF
    if LOSS == LOG_LIKELIHOOD:  # -log p_y; p - [v = y], which at y is -p(K)
        loss = softplus(-odds)
        on_kept, push = kept, -kept
        if UNIFORM:  # the cross-entropy against ([v = y] + ε)/(1 + V ε)
            norm = 1.0 / (1.0 + vocab_size * eps)
            others = vocab_size - 1.0
            log_all = relative_to(merge(s.policy, s.policy_set, inverse_t), s.policy.ref, inverse_t)
            log_p_total = s.log_ratio - tl.where(others > 0.0, others * log_all, 0.0) - loss
            loss = (loss - eps * log_p_total) * norm
            bias = zero - eps * norm
            push += others * eps * norm
    elif LOSS == UNLIKELIHOOD:  # -log p(K); p_v in S, -p(S) p_K(v) on K
        loss = softplus(odds)
        on_kept, on_set = -removed, removed
    elif (
        LOSS == NEGATIVE_LIKELIHOOD
    ):  # Σ max(log p_s, floor); Σ ([v = s] - p_v) over those above the floor
        loss = zero + part
        on_kept, on_set, push = -active * kept, -active * removed, zero + 1.0
        least = least_log_weight(nl_floor, set_normalizer(s, inverse_t))
    on_kept = tl.where(s.policy.log == -INF, 0.0, on_kept * tl.exp(-s.policy.log))
    on_set = tl.where(s.policy_set.log == -INF, 0.0, on_set * tl.exp(-s.policy_set.log))
    undefined = is_undefined(s, LOSS)
    lost = undefined
    if LOSS == UNLIKELIHOOD:
        lost = lost | (loss == INF)
    plan = ExpPlan(s.policy.ref, on_kept, bias, s.policy_set.ref, on_set, push, least)
    return tl.where(undefined, float("nan"), loss), lost, plan


@triton.jit
def conclude_uniform(s, log_kappa, inverse_t, LOSS: tl.constexpr):
    """Whether the row is undefined, and the plan but for its loss."""
    here = tl.where(log_kappa == 0.0, -INF, s.label_policy)
    policy = merge(s.policy, log_sum_of(here, 0.0 * log_kappa), inverse_t)
    here = tl.where(log_kappa == 0.0, -INF, s.label_reference)
    reference = merge(s.reference, log_sum_of(here, log_kappa), inverse_t)
    every = merge(policy, s.policy_set, inverse_t)
    whole = RowSums(
        policy, reference, s.label_policy, s.policy_set, s.reference_set, s.label_reference, s.kl, s.log_ratio, s.kept,
    )  # fmt: skip
    plan = UniformPlan(
        every.ref,
        tl.exp(-every.log),
        every.log,
        reference.ref,
        tl.exp(-reference.log),
        0.0 * log_kappa,
    )
    return is_undefined(whole, LOSS), plan


# ------------------------------------------------------------------------------ entries of a KL, uniformly smoothed


class Element(NamedTuple):
    loss: tl.tensor
    gradient: tl.tensor


@triton.jit
def uniform_element(p, log_p, q, loss, eps, norm, log_norm, LOSS: tl.constexpr):
    """Of a KL to (q* + ε)/(1 + V ε), d = log p - log q̃. Any d, ±inf and NaN (0 against 0) too."""
    smoothed = q + eps
    target, d = smoothed * norm, log_p - (tl.log(smoothed) + log_norm)
    near = tl.abs(d) < 1.0
    if LOSS == REVERSE_KL:  # p φ(-d); p (d - KL)
        far = tl.where(p == 0.0, target, p * d + (target - p))
        return Element(tl.where(near, p * phi_of(-d), far), tl.where(p == 0.0, 0.0, p * (d - loss)))
    # q̃ φ(d); p - q̃
    far = tl.where(target == 0.0, p, (p - target) - target * d)
    f = phi_of(d)
    return Element(tl.where(near, target * f, far), tl.where(near, target * (f + d), p - target))
