"""The Triton kernel of any row and any launch: what ``kl_kernel`` does not serve or leaves.

One program a row, in tiles of ``BLOCK`` columns, which count from the 16-byte boundary before the row. A first pass
sums: a KL as docs/numerics.md has it, with a shift for the whole row, again where the sums do not fit; other rows by
the sums of their streams. ``objectives.py`` makes the loss and a plan from that, and a second pass writes the gradient,
backwards, so that it begins with what the first left in the L2 cache. ``stream_kernel`` of CUDA does the same.

Removed entries and those past the ends of a row are -inf in both rows: they add exactly 0 to every sum.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from tnt_kernels.backends.triton.objectives import (
    FORWARD_KL,
    INF,
    LN_2,
    LOG2_E,
    LOG_LIKELIHOOD,
    NEGATIVE_LIKELIHOOD,
    NONE,
    REVERSE_KL,
    TWO_SINH,
    KlSlice,
    RowSums,
    complete,
    conclude_exp,
    conclude_kl,
    conclude_uniform,
    diagnose,
    least_log_weight,
    log1p,
    log_sum,
    merged_rows,
    merged_slices,
    nothing,
    pack,
    phi_of,
    phi_of_log,
    row_factors,
    set_normalizer,
    slice_of,
    times_upstream,
    two_sum,
    uniform_element,
    unpack,
    with_slice,
)  # fmt: skip
from tnt_kernels.backends.triton.reading import columns_before, gather, row_of, samples
from tnt_kernels.backends.triton.results import (
    BACKWARD,
    FINISH,
    FUSED,
    PARTIAL_SUMS,
    STATISTICS,
    outputs_of,
    save,
    saved_exp,
    saved_kl,
    saved_uniform,
    with_loss,
    write_diagnostics,
    write_partial_sums,
    write_uncomputed,
)
from tnt_kernels.backends.triton.set import (
    NO_IDS,
    ROW_IDS,
    Ids,
    count_ids,
    negative_likelihood_of_set,
    sum_of_set,
)

#: Log2 of what weights are lowered by when they are added up: those of a row times the lowest number are a number, too.
BIAS = tl.constexpr(24.0)
LOWERED = tl.constexpr(2.0**-24)
ATTEMPTS = tl.constexpr(6)
LOOK = tl.constexpr(64)  # rows at a time, for one that was left
H0, H1, H2 = (tl.constexpr(x) for x in TWO_SINH)  # of 2 sinh(y/2)


class Row(NamedTuple):
    """Columns count from the boundary before the row of logits."""

    z: tl.tensor  # pointers
    r: tl.tensor
    origin: tl.tensor  # r where z are differences to it, else None
    gradient: tl.tensor
    begin: tl.tensor  # the row's first column
    end: tl.tensor  # the column past its last
    set_label: tl.tensor  # column of y where it is in the set and not among the ids, else -1
    partial: tl.tensor  # column of a y that is pushed down in part, else -1
    log_kappa: tl.tensor  # of that y, wherever it lies; else 0
    ids: Ids
    set_size: tl.tensor  # of the whole vocabulary
    set_here: tl.tensor
    scale: tl.tensor  # log2(e)/T, of exponents
    inverse_t: tl.tensor  # 1/T, of differences


# ---------------------------------------------------------------------------------------------------------- reading


@triton.jit
def _places(row, BLOCK: tl.constexpr):
    """Of a tile's columns: vectors of 16 bytes of logits."""
    GROUP: tl.constexpr = 128 // row.z.dtype.element_ty.primitive_bitwidth
    return tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _total(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _is_full(row, start, BLOCK: tl.constexpr):
    return (start >= row.begin) & (start + BLOCK <= row.end)


@triton.jit
def _logits(row, start, v, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tile, and what lies there for z; -inf outside the row. Full tiles are read without a mask, by vectors."""
    BOTH: tl.constexpr = PAIR or row.origin is not None
    if _is_full(row, start, BLOCK):
        z = tl.load(row.z + v)
        r = z
        if BOTH:
            r = tl.load(row.r + v)
    else:
        inside = (v >= row.begin) & (v < row.end)
        z = tl.load(row.z + v, mask=inside, other=-INF)
        r = z
        if BOTH:
            r = tl.load(row.r + v, mask=inside, other=-INF)
    z, r = z.to(tl.float32), r.to(tl.float32)
    d = z
    if row.origin is not None:
        z = d + r
    return z, r, d


@triton.jit
def _distance(x, o, d, row, LOSS: tl.constexpr):
    """o - x; differences have all its digits."""
    if row.origin is None:
        return o - x
    return -d if LOSS == REVERSE_KL else d


@triton.jit
def _in_set(row, v, IDS: tl.constexpr):
    hit = v == row.set_label
    if IDS != NO_IDS:
        bits = tl.load(row.ids.bits + v // 8, mask=v < row.end, other=0).to(tl.int32)
        hit = hit | ((bits >> (v % 8) & 1) != 0)
    return hit


@triton.jit
def _kept_logits(
    row, start, v, PAIR: tl.constexpr, HAS_SET: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr
):
    z, r, d = _logits(row, start, v, PAIR, BLOCK)
    if HAS_SET:
        away = _in_set(row, v, IDS) | (v == row.partial)
        z, r = tl.where(away, -INF, z), tl.where(away, -INF, r)
    return z, r, d


# ------------------------------------------------------------------------------------------------------- first pass


class Shift(NamedTuple):
    """Of a KL's first pass: e = 2^((x - x_ref) scale), y = (o - x)/T - (o_ref - x_ref)/T - more."""

    x_zero: tl.tensor  # what x and o, and their references, are read relative to
    o_zero: tl.tensor
    x_ref: tl.tensor
    o_ref: tl.tensor
    more: tl.tensor


@triton.jit
def _shift(x_top, o_top, more, row):
    """Where rows lie further apart, o - x has lost digits that distances to the maxima keep; differences lose none."""
    APART: tl.constexpr = 8.0 if row.z.dtype.element_ty == tl.float32 else 64.0
    numbers = (tl.abs(x_top) < 1e29) & (tl.abs(o_top) < 1e29)
    near = (numbers & (tl.abs(o_top - x_top) <= APART)) | (row.origin is not None)
    x_level, o_level = _finite(x_top), _finite(o_top)
    return Shift(
        tl.where(near, 0.0, x_level), tl.where(near, 0.0, o_level), tl.where(near, x_level, 0.0),
        tl.where(near, o_level, 0.0), more,
    )  # fmt: skip


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < INF, x, 0.0)


@triton.jit
def _kl_sums(
    row, k, LOSS: tl.constexpr, ENTROPY: tl.constexpr, HAS_SET: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """S, A and Φ, and of the policy's weights times their log2; times 2^-BIAS. Any logits."""
    u = _places(row, BLOCK)
    s = tl.zeros(u.shape, tl.float32)
    a, f, h = s, s, s
    distance, lost = two_sum(k.o_ref, -k.x_ref)
    more = k.more + lost * row.inverse_t
    lowered = k.more * LOG2_E + BIAS
    for start in range(0, row.end, BLOCK):
        z, r, d = _kept_logits(row, start, start + u, True, HAS_SET, IDS, BLOCK)
        x, o = r - k.x_zero, z - k.o_zero
        if LOSS == REVERSE_KL:
            x, o = z - k.x_zero, r - k.o_zero
        at, other_at = (x - k.x_ref) * row.scale, (o - k.o_ref) * row.scale
        # Before it is lowered, a weight counts against the lowest number where it is next to nothing.
        weight, p = tl.exp2(at), tl.exp2(other_at - lowered)
        e = weight * LOWERED
        y = tl.fma(_distance(x, o, d, row, LOSS) - distance, row.inverse_t, -more)
        near = tl.abs(y) < 1.0
        f_near = phi_of(y)
        e_y = tl.where(weight == 0.0, 0.0, (weight * y) * LOWERED)
        excess = tl.where(near, e * (f_near + y), p - e)
        s += e
        a += excess
        f += tl.where(near, e * f_near, (p - e) - e_y)
        if ENTROPY:
            if LOSS == REVERSE_KL:
                h += tl.where(e == 0.0, 0.0, e * at)
            else:
                h += tl.where(p == 0.0, 0.0, p * other_at)
    return _total(s), _total(a), _total(f), _total(h)


@triton.jit
def _maxima(row, PAIR: tl.constexpr, HAS_SET: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr):
    u = _places(row, BLOCK)
    z_top = tl.zeros(u.shape, tl.float32) - INF
    r_top = z_top
    for start in range(0, row.end, BLOCK):
        z, r, _ = _kept_logits(row, start, start + u, PAIR, HAS_SET, IDS, BLOCK)
        z_top, r_top = tl.maximum(z_top, z), tl.maximum(r_top, r)
    return tl.max(tl.max(z_top, 1), 0), tl.max(tl.max(r_top, 1), 0)


@triton.jit
def _kl_first_pass(
    row, LOSS: tl.constexpr, ENTROPY: tl.constexpr, HAS_SET: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What a slice of a KL row is reduced to, and what it was read relative to."""
    REVERSE: tl.constexpr = LOSS == REVERSE_KL
    some = samples(row.z, row.r, row.begin, row.end - row.begin, row.origin is not None)
    above = (some.above - (some.o_top - some.x_top)) * row.inverse_t
    x_top, o_top = some.o_top, some.x_top
    above = tl.where(tl.abs(above) < 16.0, -above, 0.0)
    if REVERSE:
        x_top, o_top, above = some.x_top, some.o_top, -above
    first = _shift(x_top, o_top, above, row)
    x_zero, o_zero, more = first.x_zero, first.o_zero, first.more
    x_ref, o_ref = first.x_ref, first.o_ref
    # What a few entries say of levels may come from removed ones.
    at_maxima, by_maxima = False, (x_zero != 0.0) | (o_zero != 0.0)
    attempt, goes_on = 0, True
    s, a, f, h, log_ratio, kl = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    while goes_on:
        if by_maxima:
            z_top, r_top = _maxima(row, True, HAS_SET, IDS, BLOCK)
            x_top, o_top = r_top, z_top
            if REVERSE:
                x_top, o_top = z_top, r_top
            k = _shift(x_top, o_top, 0.0, row)
            x_zero, o_zero, x_ref, o_ref, more = k.x_zero, k.o_zero, k.x_ref, k.o_ref, 0.0
            at_maxima = True
        s, a, f, h = _kl_sums(
            row, Shift(x_zero, o_zero, x_ref, o_ref, more), LOSS, ENTROPY, HAS_SET, IDS, BLOCK
        )
        ratio = a / s
        log_ratio = tl.where(ratio > -0.5, log1p(ratio), tl.log((s + a) / s))
        excess = phi_of_log(ratio, log_ratio)
        kl = f / s - excess
        # Below -3, S + A has lost its digits. Φ/S and φ(L) are good to 2e-6 of their size: where KL is much less than
        # they, L has to be nearer to 0.
        usable = (s > 2.0**-64) & (s < 2.0**16)
        good = (
            usable
            & (s + a < 2.0**36)
            & (log_ratio > -3.0)
            & (f < INF)
            & (excess <= 0.5 * tl.abs(kl))
        )
        if ENTROPY:  # the small difference of large numbers, where a level is far from its maximum
            kept = s if REVERSE else s + a
            level = tl.log(kept) + BIAS * LN_2
            if not REVERSE:
                level += more
            lost = tl.abs(level) * (1.0 + s / kept)
            cancels = (level - (h / kept) * LN_2 < lost * 2.0**-6) | (lost > 22.0)
            good = good & (at_maxima | (cancels == 0))
        hopeful = (s > 0.0) & (s < INF) & (tl.abs(log_ratio) < 1e30) & (f < INF)
        attempt += 1
        by_maxima = at_maxima == 0
        goes_on = (good == 0) & (by_maxima | hopeful) & (attempt < ATTEMPTS)
        if goes_on & (by_maxima == 0):
            more += log_ratio
    broken = ((s < INF) & (tl.abs(a) < INF)) == 0
    other = s + a
    has_base, has_other = s > 0.0, other > 0.0
    # Relative to the references.
    log_base = tl.where(has_base, tl.log(s) + BIAS * LN_2, -INF)
    mean = more - 1.0 - f / s  # of all log-ratios, where the other's sum is nothing
    log_ratio = tl.where(has_base, tl.where(has_other, more + log_ratio, mean), 0.0)
    kl = tl.where(has_base & has_other & ((kl > 0.0) | (kl != kl)), kl, 0.0)
    log_other = tl.where(has_base, log_base + log_ratio, tl.log(other) + BIAS * LN_2 + more)
    log_other = tl.where(has_other, log_other, -INF)
    entropy = 0.0 * log_base
    if ENTROPY:
        kept = s if REVERSE else other
        log_kept = log_base if REVERSE else log_other
        entropy = tl.where(kept > 0.0, log_kept - (h / kept) * LN_2, 0.0)
    if broken:  # whichever row exists has sums all the same
        policy, reference, _ = _streams(row, True, False, ENTROPY, HAS_SET, IDS, BLOCK)
        base, other_sum = reference, policy
        if REVERSE:
            base, other_sum = policy, reference
        x_zero, o_zero, x_ref, o_ref = 0.0, 0.0, base.ref, other_sum.ref
        log_base, log_other, entropy = base.log, other_sum.log, policy.entropy
        log_ratio += float("nan")
        kl += float("nan")
    found = KlSlice(x_zero + x_ref, o_zero + o_ref, log_base, log_other, log_ratio, kl, entropy)
    return found, x_zero, o_zero


@triton.jit
def _stream_sums(
    row, z_level, r_level, PAIR: tl.constexpr, TOTAL: tl.constexpr, HAS_SET: tl.constexpr, IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one stream, the policy's, or of each of two: Σ 2^at; of the policy Σ 2^at at, and Σ (z - level)/T."""
    u = _places(row, BLOCK)
    z_sum = tl.zeros(u.shape, tl.float32)
    moment, r_sum, total = z_sum, z_sum, z_sum
    for start in range(0, row.end, BLOCK):
        v = start + u
        z, r, _ = _kept_logits(row, start, v, PAIR, HAS_SET, IDS, BLOCK)
        at = (z - z_level) * row.scale
        e = tl.exp2(at)
        z_sum += e
        moment += tl.where(e == 0.0, 0.0, e * at)
        if PAIR:
            r_sum += tl.exp2((r - r_level) * row.scale)
        if TOTAL:
            there = (v >= row.begin) & (v < row.end) & (v != row.set_label)
            total += tl.where(there, (z - z_level) * row.inverse_t, 0.0)
    return _total(z_sum), _total(moment), _total(r_sum), _total(total)


@triton.jit
def _is_good(total):
    return (total > 2.0**-20) & (total < 2.0**40)


@triton.jit
def _streams(
    row, PAIR: tl.constexpr, TOTAL: tl.constexpr, ENTROPY: tl.constexpr, HAS_SET: tl.constexpr, IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The logarithms of the sums of the kept entries, and of the policy Σ (z - its ref)/T."""
    DIFFERENCES: tl.constexpr = row.origin is not None
    other = row.r if PAIR or DIFFERENCES else row.z
    some = samples(row.z, other, row.begin, row.end - row.begin, DIFFERENCES)
    z_level, r_level = _finite(some.x_top), _finite(some.o_top)
    z_sum, moment, r_sum, total = 0.0, 0.0, 0.0, 0.0
    at_maxima, goes_on = False, True
    while goes_on:
        z_sum, moment, r_sum, total = _stream_sums(
            row, z_level, r_level, PAIR, TOTAL, HAS_SET, IDS, BLOCK
        )
        good = _is_good(z_sum)
        if PAIR:
            good = good & _is_good(r_sum)
        if ENTROPY:  # the small difference of large numbers, unless the level is the maximum
            good = good & (z_sum < 2.0**10)
        goes_on = (good == 0) & (at_maxima == 0)
        if goes_on:
            z_top, r_top = _maxima(row, PAIR, HAS_SET, IDS, BLOCK)
            z_level, r_level = _finite(z_top), _finite(r_top)
            at_maxima = True
    return log_sum(z_level, z_sum, moment), log_sum(r_level, r_sum, 0.0 * r_sum), total


@triton.jit
def _first_pass(
    row, LOSS: tl.constexpr, UNIFORM: tl.constexpr, ENTROPY: tl.constexpr, HAS_SET: tl.constexpr, IDS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sums of this slice of the vocabulary, and what a KL's logits are read relative to: base, other."""
    KL: tl.constexpr = LOSS == FORWARD_KL or LOSS == REVERSE_KL
    SMOOTH: tl.constexpr = UNIFORM and KL
    vocab = row.end - row.begin
    policy_set, reference_set, label_policy, label_reference = nothing(), nothing(), 0.0, 0.0
    if HAS_SET:
        policy_set = sum_of_set(
            row.z, row.origin, row.begin, vocab, row.set_label, row.ids, row.scale, CHUNK, IDS
        )
        if KL:
            reference_set = sum_of_set(
                row.r, None, row.begin, vocab, row.set_label, row.ids, row.scale, CHUNK, IDS
            )
            is_here = row.partial >= 0
            label_policy = gather(row.z, row.origin, row.partial, is_here, 0.0)
            label_reference = gather(row.r, None, row.partial, is_here, 0.0)
    kept = (vocab - tl.where(row.partial >= 0, 1, 0)).to(tl.float32) - row.set_here
    x_zero, o_zero = 0.0, 0.0
    zero = 0.0 * kept
    policy, reference, total = nothing(), nothing(), zero
    if SMOOTH or not KL:
        TOTAL: tl.constexpr = UNIFORM and LOSS == LOG_LIKELIHOOD
        policy, of_reference, total = _streams(row, KL, TOTAL, ENTROPY, HAS_SET, IDS, BLOCK)
        if KL:
            reference = of_reference
            base, other = (policy, reference) if LOSS == REVERSE_KL else (reference, policy)
            total = tl.where(base.log == -INF, 0.0, other.log - base.log)
    sums = RowSums(
        policy, reference, label_policy, policy_set, reference_set, label_reference, zero, total, kept
    )  # fmt: skip
    if KL and not SMOOTH:
        k, x_zero, o_zero = _kl_first_pass(row, LOSS, ENTROPY, HAS_SET, IDS, BLOCK)
        sums = with_slice(sums, k, LOSS == REVERSE_KL)
    return sums, x_zero, o_zero


# ------------------------------------------------------------------------------------------------------ second pass


@triton.jit
def _kl_gradient(
    row, plan, z, r, d, v, LOSS: tl.constexpr, HAS_SET: tl.constexpr, IDS: tl.constexpr
):
    x, o = r - plan.x_zero, z - plan.o_zero
    if LOSS == REVERSE_KL:
        x, o = z - plan.x_zero, r - plan.o_zero
    at = tl.fma(x - plan.x_ref, row.scale, -plan.c)
    y = tl.fma(_distance(x, o, d, row, LOSS), row.inverse_t, -plan.shift) - plan.rest
    if HAS_SET:
        removed = _in_set(row, v, IDS)
        centred = z - plan.set_max
    if LOSS == REVERSE_KL:
        if HAS_SET:
            at = tl.where(removed, centred * row.scale, at)
        e = tl.exp2(at)
        g = e * tl.fma(y, plan.u1, plan.u0)
        # Against an infinite y the first pass's weight was nothing, or the row would be lost.
        g = tl.where(y == -INF, 0.0, g)
        if HAS_SET:
            own = plan.set_scale * e
            g = tl.where(removed, own * tl.fma(centred, row.inverse_t, plan.set_shift), g)
            e = tl.where(removed, own, e)
        g = tl.where(e == 0.0, 0.0, g)
    else:
        near = tl.abs(y) <= 1.25
        other_at = tl.fma(o - plan.o_ref, row.scale, plan.u1)
        if HAS_SET:
            other_at = tl.where(removed, centred * row.scale, other_at)
        p = tl.exp2(other_at)
        e = plan.u0 * tl.exp2(tl.where(near, tl.fma(y, 0.5 * LOG2_E, at), at))
        square = y * y
        g = tl.where(near, (e * y) * tl.fma(tl.fma(square, H2, H1), square, H0), p - e)
        if HAS_SET:
            g = tl.where(removed, plan.set_scale * p, g)
    if HAS_SET:
        g = tl.where(v == row.partial, plan.partial, g)
    return g


@triton.jit
def _exp_gradient(row, plan, z, v, HAS_SET: tl.constexpr, IDS: tl.constexpr):
    at = (z - plan.ref) * row.scale
    if HAS_SET:
        removed, centred = _in_set(row, v, IDS), z - plan.set_ref
        at = tl.where(removed, centred * row.scale, at)
    e = tl.exp2(at)
    g = tl.fma(plan.kept, e, plan.bias)
    if HAS_SET:
        push = tl.where(centred * row.inverse_t < plan.least, 0.0, plan.push)
        g = tl.where(removed, tl.fma(plan.set, e, push), g)
    return g


@triton.jit
def _uniform_element(
    row,
    plan,
    z,
    r,
    v,
    eps,
    vocab_size,
    LOSS: tl.constexpr,
    HAS_SET: tl.constexpr,
    IDS: tl.constexpr,
):
    centred = z - plan.z_ref
    p = tl.exp2(centred * row.scale) * plan.p_inverse
    q = tl.exp2((r - plan.r_ref) * row.scale) * plan.q_inverse
    if HAS_SET:
        q = tl.where(_in_set(row, v, IDS), 0.0, q)
        q = tl.where(v == row.partial, q * tl.exp(row.log_kappa), q)
    log_p = tl.fma(centred, row.inverse_t, -plan.p_log_sum)
    norm, log_norm = 1.0 / (1.0 + vocab_size * eps), -log1p(vocab_size * eps)
    return uniform_element(p, log_p, q, plan.loss, eps, norm, log_norm, LOSS)


@triton.jit
def _second_pass(
    row, plan, factor, eps, vocab_size, LOSS: tl.constexpr, UNIFORM: tl.constexpr, HAS_SET: tl.constexpr,
    IDS: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WRITE: the gradient times ``factor``. Returns the sum of a loss that takes this pass."""
    KL: tl.constexpr = LOSS == FORWARD_KL or LOSS == REVERSE_KL
    if WRITE:
        # It may lie where the logits do: no warp writes before all have read what they gather of the row.
        tl.debug_barrier()
    u = _places(row, BLOCK)
    losses = tl.zeros(u.shape, tl.float32)
    tiles = tl.cdiv(row.end, BLOCK)
    for i in range(tiles):
        start = (tiles - 1 - i) * BLOCK
        v = start + u
        z, r, d = _logits(row, start, v, KL, BLOCK)
        if KL and UNIFORM:
            element = _uniform_element(row, plan, z, r, v, eps, vocab_size, LOSS, HAS_SET, IDS)
            losses += tl.where((v >= row.begin) & (v < row.end), element.loss, 0.0)
            g = element.gradient
        elif KL:
            g = _kl_gradient(row, plan, z, r, d, v, LOSS, HAS_SET, IDS)
        else:
            g = _exp_gradient(row, plan, z, v, HAS_SET, IDS)
        if WRITE:
            _store(row, start, v, g * factor, BLOCK)
    return _total(losses)


@triton.jit
def _store(row, start, v, g, BLOCK: tl.constexpr):
    stored = g.to(row.gradient.dtype.element_ty)
    if _is_full(row, start, BLOCK):
        tl.store(row.gradient + v, stored, eviction_policy="evict_first")
    else:
        tl.store(row.gradient + v, stored, mask=(v >= row.begin) & (v < row.end))


@triton.jit
def _fill(row, value, BLOCK: tl.constexpr):
    tl.debug_barrier()  # as in a second pass
    u = _places(row, BLOCK)
    for start in range(0, row.end, BLOCK):
        _store(row, start, start + u, tl.zeros(u.shape, tl.float32) + value, BLOCK)


# ------------------------------------------------------------------------------------------------------------ a row


@triton.jit
def _gathered(
    at, stride, shards, inverse_t, LOSS: tl.constexpr, UNIFORM: tl.constexpr, SHARDS: tl.constexpr
):
    """All shards' sums, merged in rank order."""
    shard = tl.arange(0, SHARDS)
    parts = unpack(at + shard.to(tl.int64) * stride, shard < shards)
    sums = merged_rows(parts, inverse_t)
    if (LOSS == FORWARD_KL or LOSS == REVERSE_KL) and not UNIFORM:
        REVERSE: tl.constexpr = LOSS == REVERSE_KL
        sums = with_slice(
            sums, merged_slices(slice_of(parts, REVERSE), inverse_t, REVERSE), REVERSE
        )
    return sums


@triton.jit
def _run(
    row, to, row_factor, factor, vocab_size, eps, log_eps, nl_floor, gathered, gathered_stride, shards, total_sums,
    LOSS: tl.constexpr, NEGATIVE: tl.constexpr, IDS: tl.constexpr, UNIFORM: tl.constexpr, GRADIENT: tl.constexpr,
    KIND: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SHARDS: tl.constexpr,
):  # fmt: skip
    KL: tl.constexpr = LOSS == FORWARD_KL or LOSS == REVERSE_KL
    HAS_SET: tl.constexpr = NEGATIVE or LOSS == LOG_LIKELIHOOD
    SMOOTH: tl.constexpr = UNIFORM and KL
    ENTROPY: tl.constexpr = to.diagnostics is not None
    inverse_t, log_kappa = row.inverse_t, row.log_kappa
    scale = factor
    if KIND != BACKWARD:
        scale = tl.where((row_factor == 0.0) | (LOSS == NONE), 0.0, factor)
    if LOSS == NONE and to.diagnostics is None:
        if GRADIENT:
            _fill(row, 0.0, BLOCK)
        write_uncomputed(to, 0.0, 0.0, KIND)
    elif KIND == BACKWARD:
        if (scale == 0.0) | (scale != scale):
            _fill(row, scale, BLOCK)
        else:
            if SMOOTH:
                plan = saved_uniform(to.coefficients)
            elif KL:
                plan = saved_kl(to.coefficients)
            else:
                plan = saved_exp(to.coefficients)
            _second_pass(
                row, plan, scale, eps, vocab_size, LOSS, UNIFORM, HAS_SET, IDS, True, BLOCK
            )  # fmt: skip
    else:
        x_zero, o_zero = 0.0, 0.0
        if KIND == FUSED or KIND == STATISTICS:
            sums, x_zero, o_zero = _first_pass(
                row, LOSS, UNIFORM, ENTROPY, HAS_SET, IDS, BLOCK, CHUNK
            )
        else:
            sums = _gathered(gathered, gathered_stride, shards, inverse_t, LOSS, UNIFORM, SHARDS)
        if KIND == STATISTICS:
            pack(to.statistics, sums)
        else:
            # ---- what other entries add up to
            total, active = 0.0, 0.0
            if KIND == FINISH:
                if total_sums is not None:
                    total, active = tl.load(total_sums), tl.load(total_sums + 1)
            elif LOSS == NEGATIVE_LIKELIHOOD:
                log_all = set_normalizer(sums, inverse_t)
                total, active = negative_likelihood_of_set(
                    row.z, row.origin, row.begin, row.end - row.begin, row.set_label, row.ids, sums.policy_set.ref,
                    log_all, least_log_weight(nl_floor, log_all), nl_floor, inverse_t, CHUNK, IDS,
                )  # fmt: skip
            if KIND == PARTIAL_SUMS and not SMOOTH:
                write_partial_sums(to, total + 0.0, active + 0.0)
                # A gradient that does not wait for the total is of a loss whose whole set is active.
                active = row.set_size
            # ---- the loss, and what the second pass takes
            if KIND != PARTIAL_SUMS or GRADIENT or SMOOTH:
                if SMOOTH:
                    undefined, plan = conclude_uniform(sums, log_kappa, inverse_t, LOSS)
                    loss = tl.where(undefined, float("nan"), total + 0.0 * log_kappa)
                    lost = undefined
                    if KIND != FINISH:
                        WRITES: tl.constexpr = GRADIENT and LOSS == FORWARD_KL
                        if undefined == 0:
                            loss = _second_pass(
                                row, plan, scale, eps, vocab_size, LOSS, True, HAS_SET, IDS, WRITES, BLOCK
                            )  # fmt: skip
                    if KIND == PARTIAL_SUMS:
                        write_partial_sums(to, tl.where(undefined, 0.0, loss), 0.0)
                    if LOSS == REVERSE_KL:
                        lost = lost | ((loss < INF) == 0)
                    plan = with_loss(plan, loss)
                elif KL:
                    REVERSE: tl.constexpr = LOSS == REVERSE_KL
                    k, label = complete(
                        sums, slice_of(sums, REVERSE), log_kappa, inverse_t, REVERSE, NEGATIVE
                    )
                    if KIND != FUSED:  # the levels of the whole vocabulary
                        at = _shift(k.x_ref, k.o_ref, 0.0, row)
                        x_zero, o_zero = at.x_zero, at.o_zero
                    loss, lost, plan = conclude_kl(
                        with_slice(sums, k, REVERSE), k, label, (x_zero, o_zero), log_kappa, row.partial >= 0, eps,
                        log_eps, row.set_size, inverse_t, LOSS,
                    )  # fmt: skip
                else:
                    loss, lost, plan = conclude_exp(
                        sums, total, active, eps, nl_floor, vocab_size, inverse_t, LOSS, UNIFORM
                    )
                scale = tl.where(lost & (scale != 0.0), float("nan"), scale)
                if GRADIENT:
                    if (scale == 0.0) | (scale != scale):
                        _fill(row, scale, BLOCK)
                    elif not SMOOTH or LOSS == REVERSE_KL or KIND == FINISH:
                        _second_pass(
                            row, plan, scale, eps, vocab_size, LOSS, UNIFORM, HAS_SET, IDS, True, BLOCK
                        )  # fmt: skip
                if KIND != PARTIAL_SUMS:
                    if to.coefficients is not None:
                        save(to.coefficients, plan, scale)
                    if to.diagnostics is not None:
                        kl = loss if KL else loss + float("nan")
                        found = diagnose(sums, log_kappa, inverse_t, KL, NEGATIVE)
                        write_diagnostics(to, loss, kl, found)
                    if to.loss is not None:
                        nothing_asked = (row_factor == 0.0) | (LOSS == NONE)
                        tl.store(to.loss, tl.where(nothing_asked, 0.0, row_factor * loss))


@triton.jit
def _row(
    index, logits, logits_stride, ref_logits, ref_stride, labels, weights, factors, ids, ids_stride, ids_count, bits,
    bits_stride, rows, vocab, vocab_offset, vocab_size, eps, log_eps, nl_floor, scale, inverse_t, ignore_index, losses,
    diagnostics, coefficients, gradient, gradient_stride, upstream, upstream_stride, statistics, gathered,
    gathered_stride, shards, partial_sums, total_sums, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr,
    UNIFORM: tl.constexpr, IDS: tl.constexpr, KIND: tl.constexpr, GRADIENT: tl.constexpr, ALIKE: tl.constexpr,
    GRADIENT_ALIKE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SHARDS: tl.constexpr,
    DIFFERENCES: tl.constexpr,
):  # fmt: skip
    label = tl.load(labels + index)
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + index)
    z_row = logits + index * logits_stride
    begin = columns_before(z_row)
    z_row = tl.multiple_of(z_row - begin, 16)
    r_row, g_row = z_row, z_row
    GROUP: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    if ref_logits is not None:
        r_row = row_of(ref_logits, index, ref_stride, begin, GROUP, ALIKE)
    origin = r_row if DIFFERENCES else None
    if GRADIENT:
        g_row = row_of(gradient, index, gradient_stride, begin, GROUP, GRADIENT_ALIKE)
    id_list, bit_row = labels, labels
    if IDS != NO_IDS:
        id_list = ids + index * ids_stride
        bit_row = bits + (index if IDS == ROW_IDS else begin) * bits_stride
    id_set = Ids(id_list, ids_count, bit_row, vocab_offset)
    to = outputs_of(index, losses, diagnostics, rows, coefficients, statistics, partial_sums)
    of_shards = None if gathered is None else gathered + index * 15
    totals = None if total_sums is None else total_sums + index * 2

    negative = weight < 0.0
    invalid = (label < 0) | (label >= vocab_size)
    set_size, set_here, among = 0.0, 0.0, False
    active = (weight != 0.0) & (label != ignore_index)
    if IDS != NO_IDS:
        last = tl.load(id_list + ids_count - 1)
        negative = negative | (last >= 0)
        invalid = invalid | (tl.load(id_list) < -1) | (last >= vocab_size)
        set_size, set_here, among = count_ids(id_set, vocab, label, CHUNK)
    row_factor, factor = row_factors(factors, index, weight, negative, inverse_t, NEGATIVE)
    if KIND == BACKWARD:  # NaN of an invalid row
        factor = tl.load(to.coefficients + 15)
    factor = times_upstream(factor, upstream, index * upstream_stride)
    end = begin + vocab
    if (active == 0) | invalid:
        value = tl.where(active, float("nan"), 0.0)
        counted = tl.where(row_factor == 0.0, 0.0, value)
        if GRADIENT:
            nobody = Row(
                z_row, r_row, origin, g_row, begin, end, -1, -1, 0.0, id_set, set_size, set_here, scale, inverse_t
            )  # fmt: skip
            _fill(nobody, tl.where(factor == 0.0, 0.0, value), BLOCK)
        write_uncomputed(to, value, counted, KIND)
    else:
        KL: tl.constexpr = NEGATIVE == FORWARD_KL or NEGATIVE == REVERSE_KL
        # One branch for both where it is the same loss: a compiler's time grows with the square of the code.
        SAME: tl.constexpr = KL and POSITIVE == NEGATIVE and (weights is not None or IDS != NO_IDS)
        column = (label - vocab_offset).to(tl.int32)
        here = (column >= 0) & (column < vocab)
        column += begin
        if negative | SAME:
            w = weight + 0.0 * scale
            pushed = (w < 0.0) & (among == 0)
            log_kappa = tl.where(pushed & (w > -1.0) & KL, log1p(tl.maximum(w, -1.0)), 0.0)
            own = pushed & ((w <= -1.0) | (not KL))
            one = tl.where(own, 1.0, 0.0)
            row = Row(
                z_row, r_row, origin, g_row, begin, end, tl.where(own & here, column, -1),
                tl.where((log_kappa != 0.0) & here, column, -1), log_kappa, id_set, set_size + one,
                set_here + tl.where(here, one, 0.0), scale, inverse_t,
            )  # fmt: skip
            _run(
                row, to, row_factor, factor, vocab_size, eps, log_eps, nl_floor, of_shards, gathered_stride, shards,
                totals, NEGATIVE, True, IDS, UNIFORM, GRADIENT, KIND, BLOCK, CHUNK, SHARDS,
            )  # fmt: skip
        elif not SAME:
            own = here & (POSITIVE == LOG_LIKELIHOOD)
            row = Row(
                z_row, r_row, origin, g_row, begin, end, tl.where(own, column, -1), -1, 0.0, id_set, 0.0 * scale,
                tl.where(own, 1.0, 0.0), scale, inverse_t,
            )  # fmt: skip
            _run(
                row, to, row_factor, factor, vocab_size, eps, log_eps, nl_floor, of_shards, gathered_stride, shards,
                totals, POSITIVE, False, NO_IDS, UNIFORM, GRADIENT, KIND, BLOCK, CHUNK, SHARDS,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "logits_stride", "ref_stride", "gradient_stride", "ids_stride", "ids_count", "bits_stride", "rows", "vocab",
        "vocab_offset", "vocab_size", "ignore_index", "upstream_stride", "shards", "gathered_stride",
    ],
    do_not_specialize_on_alignment=["logits", "ref_logits", "gradient"],
)  # fmt: skip
def stream_kernel(
    logits, logits_stride, ref_logits, ref_stride, labels, weights, factors, ids, ids_stride, ids_count, bits,
    bits_stride, rows, vocab, vocab_offset, vocab_size, eps, log_eps, nl_floor, scale, inverse_t, ignore_index, losses,
    diagnostics, coefficients, gradient, gradient_stride, upstream, upstream_stride, statistics, gathered,
    gathered_stride, shards, partial_sums, total_sums, left, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr,
    UNIFORM: tl.constexpr, IDS: tl.constexpr, KIND: tl.constexpr, GRADIENT: tl.constexpr, ALIKE: tl.constexpr,
    GRADIENT_ALIKE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SHARDS: tl.constexpr,
    DIFFERENCES: tl.constexpr,
):  # fmt: skip
    """One row a program. Tensors and scalars are those of _call.py; ``scale`` is log2(e)/T, ``factors`` a ``Factors``.

    ``left``, where it is given, says which rows are wanted: those that ``kl_kernel`` left. A program then looks at
    many rows, of which few are.

    ALIKE, GRADIENT_ALIKE: as many columns after a boundary of 16 bytes as rows of logits begin those of the reference,
    and of the gradient. DIFFERENCES: ``logits`` hold the policy's minus the reference's.
    """
    if left is None:
        _row(
            tl.program_id(0).to(tl.int64), logits, logits_stride, ref_logits, ref_stride, labels, weights, factors, ids,
            ids_stride, ids_count, bits, bits_stride, rows, vocab, vocab_offset, vocab_size, eps, log_eps, nl_floor,
            scale, inverse_t, ignore_index, losses, diagnostics, coefficients, gradient, gradient_stride, upstream,
            upstream_stride, statistics, gathered, gathered_stride, shards, partial_sums, total_sums, POSITIVE,
            NEGATIVE, UNIFORM, IDS, KIND, GRADIENT, ALIKE, GRADIENT_ALIKE, BLOCK, CHUNK, SHARDS, DIFFERENCES,
        )  # fmt: skip
    else:
        program, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
        for first in range(0, rows, step * LOOK):
            some = program + first + tl.arange(0, LOOK) * step
            if tl.max(tl.load(left + some, mask=some < rows, other=0), 0) > 0:
                for i in range(LOOK):
                    index = program + first + i * step
                    if tl.load(left + index, mask=index < rows, other=0) > 0:
                        _row(
                            index, logits, logits_stride, ref_logits, ref_stride, labels, weights, factors, ids,
                            ids_stride, ids_count, bits, bits_stride, rows, vocab, vocab_offset, vocab_size, eps,
                            log_eps, nl_floor, scale, inverse_t, ignore_index, losses, diagnostics, coefficients,
                            gradient, gradient_stride, upstream, upstream_stride, statistics, gathered, gathered_stride,
                            shards, partial_sums, total_sums, POSITIVE, NEGATIVE, UNIFORM, IDS, KIND, GRADIENT, ALIKE,
                            GRADIENT_ALIKE, BLOCK, CHUNK, SHARDS, DIFFERENCES,
                        )  # fmt: skip
