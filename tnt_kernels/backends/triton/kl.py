"""The Triton kernel of the usual KL rows: each logit is read once for the loss, with one exponential or two a pair.

docs/numerics.md derives the mathematics, names and steps are those of ``csrc/cuda/kl_math.cuh``. x is the base row's
logit (forward KL(q*‖p): the reference's, reverse KL(p‖q̃): the policy's), o the other's. To base 2:

    e = 2^(x scale - c)    y = (o - x) scale - a    φ(y) = 2^y - 1 - y ln 2
    S = Σ e    M = Σ e y ln 2    Φ = Σ e φ(y)    A = Σ e (2^y - 1) = M + Φ
    L = log1p(A/S)    KL(base‖other) over the kept entries = Φ/S - φ(L)

so p = q gives exactly 0. One program works on one row. The first pass asks nothing of a pair: what it cannot do shows
in the sums. Rows whose sums are not fit, and those that are broken or infinite, are flagged for ``stream_kernel``,
which runs over them afterwards.

Columns count from the 16-byte boundary before the row, so that full tiles are loaded by vectors at any address. Logits
of 16 bits are loaded as words of two columns: the sums of both share a register.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from tnt_kernels.backends.triton.objectives import (
    AWAY,
    FORWARD_KL,
    INF,
    LN_2,
    LOG2_E,
    REVERSE_KL,
    TWO_SINH,
    KlEntry,
    KlSlice,
    RowSums,
    conclude_kl,
    diagnose,
    log1p,
    masses_of,
    nothing,
    pack,
    phi_of,
    phi_of_log,
    row_factors,
    softplus,
    times_upstream,
    two_sum,
    with_slice,
)
from tnt_kernels.backends.triton.reading import Samples, columns_before, gather, row_of, samples
from tnt_kernels.backends.triton.results import (
    FUSED,
    STATISTICS,
    outputs_of,
    save,
    write_diagnostics,
    write_uncomputed,
)
from tnt_kernels.backends.triton.set import NO_IDS, ROW_IDS, Ids, some_columns, sum_of_set

#: The weight of the reference level in the first pass is 2^48. Where e^y overflows to infinity beside a weight that is
#: flushed to 0, their product is NaN; below that, what flushing loses is at most 2^-46 of the reference's weight.
BIAS = tl.constexpr(48.0)
UNBIAS = tl.constexpr(2.0**-48)
#: Levels are whole numbers of powers of two, so that the bias is added without rounding. Larger ones are not served.
HIGHEST_LEVEL = tl.constexpr(2.0**22)
#: Removed logits below are not served: beyond a mask of -1e30, and exponents times factors are numbers yet.
LOWEST_REMOVED = tl.constexpr(-1e31)

# φ(y)/y² for |y| < 1/4, relative error 5e-6: coefficients of csrc/cuda/kl_math.cuh (of Y = 2y) for y in units of log 2.
_MIDDLE = ("0x1.ffffd2p-4", "0x1.55557cp-6", "0x1.560b70p-9", "0x1.1133b0p-12")
_TWO_LN_2 = 2 * 0.6931471805599453
M0, M1, M2, M3 = (
    tl.constexpr(float.fromhex(x) * _TWO_LN_2 ** (k + 2)) for k, x in enumerate(_MIDDLE)
)
MIDDLE = tl.constexpr(0.25 * 1.4426950408889634)
# Of 2 sinh(y/2), y in units of log 2.
H0, H1, H2 = (tl.constexpr(x * 0.6931471805599453 ** (2 * k + 1)) for k, x in enumerate(TWO_SINH))
NEAR = tl.constexpr(1.25 * 1.4426950408889634)

# How a second pass computes the gradient.
DIRECT = tl.constexpr(0)  # forward: p - q*, an exponential each
SINH = tl.constexpr(1)  # forward, next to p = q: by one exponential of the mean of log p and log q*
REVERSE = tl.constexpr(2)  # reverse: one exponential

# What the sums of a first pass say.
GOOD = tl.constexpr(0)
LEFT = tl.constexpr(1)  # to the other kernel
AGAIN = tl.constexpr(2)  # with another shift

ATTEMPTS = tl.constexpr(3)
GATHER = tl.constexpr(32)  # tiles at a time


class Line(NamedTuple):
    """A row of logits, from the boundary before it."""

    elements: tl.tensor  # pointers
    words: tl.tensor
    origin: tl.tensor  # the elements that these are differences to; None where they are logits


class Row(NamedTuple):
    x: Line
    o: Line
    gradient: tl.tensor  # pointer
    begin: tl.tensor  # the row's first column
    end: tl.tensor  # the column past its last
    label: tl.tensor  # column of y where it is pushed down and not among the ids, else -1
    log_kappa: tl.tensor  # of that y where it lies here; 0 where it is removed
    x_label: tl.tensor  # its logits
    o_label: tl.tensor
    ids: Ids
    samples: Samples
    scale: tl.tensor  # log2(e)/T
    inverse_t: tl.tensor


class Tiles(NamedTuple):
    """The full ones go from ``first`` to ``whole``, those that the row does not fill from ``edge`` by ``step``.

    The latter are tile 0, where the row begins after its boundary, and the one at ``whole``, where it ends early.
    """

    first: tl.tensor
    whole: tl.tensor
    edge: tl.tensor
    step: tl.tensor


class Shift(NamedTuple):
    c: tl.tensor  # a whole number: the base's level in units of log 2
    a: tl.tensor  # how far o lies above x, in the same units
    x_ref: tl.tensor  # the base's level
    distance: tl.tensor  # from it to the other's


class Sums(NamedTuple):
    s: tl.tensor  # S
    m: tl.tensor  # M / ln 2
    phi: tl.tensor  # Φ
    h: tl.tensor  # of the policy's weights times their log2, where somebody asks for the entropy
    a: tl.tensor  # A
    log_ratio: tl.tensor  # L
    kl: tl.tensor  # over the kept entries


class Set(NamedTuple):
    """The policy's removed entries. Their weights are 2^at, at = log2 p relative to the row's level, as in its sums."""

    sum: tl.tensor  # of the weights
    moment: tl.tensor  # Σ 2^at at
    count: tl.tensor


class Gradient(NamedTuple):
    """The coefficients of a second pass; see ``_gradient``."""

    c: tl.tensor
    a: tl.tensor
    h: tl.tensor
    k0: tl.tensor
    k1: tl.tensor
    shift: tl.tensor
    s0: tl.tensor
    s1: tl.tensor


# ---------------------------------------------------------------------------------------------------------- reading


@triton.jit
def _line(at, before, origin):
    GROUP: tl.constexpr = 128 // at.dtype.element_ty.primitive_bitwidth
    elements = at - before
    words = elements
    if GROUP == 8:
        words = elements.to(tl.pointer_type(tl.int32), bitcast=True)
    return Line(tl.multiple_of(elements, 16), tl.multiple_of(words, 16), origin)


@triton.jit
def _tiles(begin, end, BLOCK: tl.constexpr):
    whole = end // BLOCK * BLOCK
    late = begin > 0
    return Tiles(
        tl.where(late, BLOCK, 0), whole, tl.where(late, 0, whole), tl.maximum(whole, BLOCK)
    )


@triton.jit
def _low(w, ELEMENT: tl.constexpr):
    """The first column of words of two."""
    if ELEMENT == tl.bfloat16:
        return (w << 16).to(tl.float32, bitcast=True)
    return w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _high(w, ELEMENT: tl.constexpr):
    if ELEMENT == tl.bfloat16:
        return (w & -65536).to(tl.float32, bitcast=True)
    return (w >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _some_words(at, row, start, u):
    """Words of a tile that the row does not fill: whole vectors, whose columns outside the row are for the caller."""
    PAIRS: tl.constexpr = 32 // row.x.elements.dtype.element_ty.primitive_bitwidth
    vectors = (row.end + 4 * PAIRS - 1) // (4 * PAIRS)
    # In words, and known to the compiler as whole vectors.
    return tl.load(at + start // PAIRS + u, mask=start // PAIRS + u < vectors * 4, other=0)


@triton.jit
def _logits(x, o, row):
    """x and o, of what lies in memory."""
    if row.x.origin is not None:
        return x + o, o
    if row.o.origin is not None:
        return x, o + x
    return x, o


@triton.jit
def _distance(x, o, row):
    """o - x, of what lies in memory: differences have all its digits."""
    if row.x.origin is not None:
        return -x
    if row.o.origin is not None:
        return o
    return o - x


@triton.jit
def _counted(x, counts, line):
    """What lies in memory of columns that count; others weigh nothing: where logits are away, differences are 0."""
    if line.origin is not None:
        return tl.where(counts, x, 0.0)
    return tl.where(counts, x, AWAY)


@triton.jit
def _inside(x, line, v, row):
    return _counted(x, (v >= row.begin) & (v < row.end), line)


@triton.jit
def _kept(row, v, IDS: tl.constexpr):
    """What lies in memory for both logits of columns; those outside the row, and the removed ones, weigh nothing."""
    kept = (v >= row.begin) & (v < row.end) & (v != row.label)
    if IDS != NO_IDS:
        bits = tl.load(row.ids.bits + v // 8, mask=kept, other=0).to(tl.int32) >> (v % 8)
        kept = kept & ((bits & 1) == 0)
    x = tl.load(row.x.elements + v, mask=kept, other=0.0).to(tl.float32)
    o = tl.load(row.o.elements + v, mask=kept, other=0.0).to(tl.float32)
    return _counted(x, kept, row.x), _counted(o, kept, row.o)  # float16 does not hold AWAY


@triton.jit
def _places(COUNT: tl.constexpr, VECTOR: tl.constexpr, IDS: tl.constexpr):
    """Numbers of a tile's columns or words; with ids in rows of a vector each, whose bits are in one byte."""
    if IDS != NO_IDS:
        places = tl.arange(0, COUNT // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    else:
        places = tl.arange(0, COUNT)
    return places


@triton.jit
def _bits(row, start, EDGE: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr):
    """Of a tile's columns, so shifted that each word's first column has bit 0."""
    if IDS != NO_IDS:
        PAIRS: tl.constexpr = 32 // row.x.elements.dtype.element_ty.primitive_bitwidth
        v = start + tl.arange(0, BLOCK // (4 * PAIRS)) * (4 * PAIRS)
        if EDGE:
            some = tl.load(row.ids.bits + v // 8, mask=v < row.end, other=0).to(tl.int32)
        else:
            some = tl.load(row.ids.bits + v // 8).to(tl.int32)
        if PAIRS == 1:
            some = some >> (v % 8)
        bits = some[:, None] >> (tl.arange(0, 4) * PAIRS)[None, :]
    else:
        bits = 0
    return bits


# ------------------------------------------------------------------------------------------------------- first pass


@triton.jit
def _add(
    x, o, bits, s, m, f, h, row, shift, LOSS: tl.constexpr, ENTROPY: tl.constexpr, IDS: tl.constexpr
):
    """Adds pairs to S, M and Φ. No pair is asked what it is like: what overflows makes a sum infinite or NaN."""
    base, _ = _logits(x, o, row)
    e = tl.exp2(tl.fma(base, row.scale, -shift.c))
    if IDS != NO_IDS:
        e = tl.where((bits & 1) != 0, 0.0, e)
    y = tl.fma(_distance(x, o, row), row.scale, -shift.a)
    power = tl.exp2(y)
    if ENTROPY:  # a logarithm of -inf has no weight
        at = tl.fma(base, row.scale, -(shift.c + BIAS))
        if LOSS == REVERSE_KL:
            h = tl.fma(e, tl.maximum(at, -256.0), h)
        else:
            h = tl.fma(e * power, tl.maximum(at + y, -256.0), h)
    return s + e, tl.fma(e, y, m), tl.fma(e, _phi(y, power), f), h


@triton.jit
def _phi(y, power):
    """φ of y in units of log 2, to 5e-6; ``power`` is 2^y."""
    p = tl.fma(y, M3, M2)
    p = tl.fma(p, y, M1)
    p = tl.fma(p, y, M0)
    return tl.where(tl.abs(y) < MIDDLE, (p * y) * y, tl.fma(y, -LN_2, power - 1.0))


@triton.jit
def _label(row, shift, LOSS: tl.constexpr):
    """Of a y that is pushed down in part: log2 of its base weight and of the other's, and its y."""
    of_x, of_o = row.log_kappa * LOG2_E, 0.0 * row.log_kappa
    if LOSS == REVERSE_KL:
        of_x, of_o = of_o, of_x
    at = tl.fma(row.x_label, row.scale, -shift.c) + of_x
    y = tl.fma(row.o_label - row.x_label, row.scale, -shift.a) + (of_o - of_x)
    return at, y


@triton.jit
def _plus(s0, m0, f0, s1, m1, f1):
    return s0 + s1, m0 + m1, f0 + f1


@triton.jit
def _shift(x_top, o_top, mean, row):
    """``mean``: how far o lies above x on average, which is nearer to L than the distance of the maxima."""
    x_top = tl.where(tl.abs(x_top) < 1e29, x_top, 0.0)
    o_top = tl.where(tl.abs(o_top) < 1e29, o_top, 0.0)
    distance = o_top - x_top
    a = tl.where(tl.abs(mean - distance) * row.inverse_t < 16.0, mean, distance)
    return Shift(tl.floor(x_top * row.scale), a * row.scale, x_top, distance)


@triton.jit
def _shift_of_maxima(row, BLOCK: tl.constexpr, IDS: tl.constexpr):
    x_top = tl.full([BLOCK], AWAY, tl.float32)
    o_top = x_top
    for start in range(0, row.end, BLOCK):
        x, o = _kept(row, start + tl.arange(0, BLOCK), IDS)
        x, o = _logits(x, o, row)
        x_top, o_top = tl.maximum(x_top, x), tl.maximum(o_top, o)
    x, o = tl.max(x_top, 0), tl.max(o_top, 0)
    return _shift(x, o, o - x, row)


@triton.jit
def _without_label(
    row, s, m, f, h, shift, LOSS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr
):  # fmt: skip
    """The sums without the label. Its lane has summed a column of every tile: they are summed anew."""
    PAIRS: tl.constexpr = 32 // row.x.elements.dtype.element_ty.primitive_bitwidth
    lane = row.label % BLOCK // PAIRS
    hit = _places(BLOCK // PAIRS, 4, IDS) == lane
    s, m, f, h = (
        tl.where(hit, 0.0, s),
        tl.where(hit, 0.0, m),
        tl.where(hit, 0.0, f),
        tl.where(hit, 0.0, h),
    )
    t = tl.zeros([GATHER], tl.float32)
    n, g, k = t, t, t
    for start in range(0, row.end, GATHER * BLOCK):
        for i in tl.static_range(PAIRS):
            x, o = _kept(row, start + tl.arange(0, GATHER) * BLOCK + (lane * PAIRS + i), IDS)
            t, n, g, k = _add(x, o, 0, t, n, g, k, row, shift, LOSS, ENTROPY, NO_IDS)
    return s, m, f, h, t, n, g, k


@triton.jit
def _add_words(
    x, o, start, s, m, f, h, row, shift, LOSS: tl.constexpr, ENTROPY: tl.constexpr, EDGE: tl.constexpr,
    BLOCK: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """A tile's pairs, where it is an edge without those outside the row."""
    ELEMENT: tl.constexpr = row.x.elements.dtype.element_ty
    PAIRS: tl.constexpr = 32 // ELEMENT.primitive_bitwidth
    bits = _bits(row, start, EDGE, BLOCK, IDS)
    v = start + _places(BLOCK // PAIRS, 4, IDS) * PAIRS
    x0, o0 = x, o
    if PAIRS == 2:
        x0, o0 = _low(x, ELEMENT), _low(o, ELEMENT)
    if EDGE:
        x0, o0 = _inside(x0, row.x, v, row), _inside(o0, row.o, v, row)
    s, m, f, h = _add(x0, o0, bits, s, m, f, h, row, shift, LOSS, ENTROPY, IDS)
    if PAIRS == 2:
        x1, o1 = _high(x, ELEMENT), _high(o, ELEMENT)
        if EDGE:
            x1, o1 = _inside(x1, row.x, v + 1, row), _inside(o1, row.o, v + 1, row)
        s, m, f, h = _add(x1, o1, bits >> 1, s, m, f, h, row, shift, LOSS, ENTROPY, IDS)
    return s, m, f, h


@triton.jit
def _first_pass(
    row, shift, LOSS: tl.constexpr, ENTROPY: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = 32 // row.x.elements.dtype.element_ty.primitive_bitwidth
    u = _places(BLOCK // PAIRS, 4, IDS)
    tiles = _tiles(row.begin, row.end, BLOCK)
    biased = Shift(shift.c - BIAS, shift.a, shift.x_ref, shift.distance)
    s = tl.zeros(u.shape, tl.float32)
    m, f, h = s, s, s
    for start in tl.range(tiles.first, tiles.whole, BLOCK, num_stages=1, loop_unroll_factor=UNROLL):
        at = start // PAIRS
        x, o = tl.load(row.x.words + at + u), tl.load(row.o.words + at + u)
        s, m, f, h = _add_words(
            x, o, start, s, m, f, h, row, biased, LOSS, ENTROPY, False, BLOCK, IDS
        )
    for start in range(tiles.edge, row.end, tiles.step):
        x, o = _some_words(row.x.words, row, start, u), _some_words(row.o.words, row, start, u)
        s, m, f, h = _add_words(
            x, o, start, s, m, f, h, row, biased, LOSS, ENTROPY, True, BLOCK, IDS
        )
    t, n, g, k = 0.0, 0.0, 0.0, 0.0
    if row.label >= 0:
        s, m, f, h, ts, ns, gs, ks = _without_label(
            row, s, m, f, h, biased, LOSS, ENTROPY, BLOCK, IDS
        )
        t, n, g = tl.reduce((ts, ns, gs), 0, _plus)
        if ENTROPY:
            k = tl.sum(ks, 0)
        if WHOLE:  # of shards, it travels by itself
            if row.log_kappa != 0.0:
                at, y = _label(row, biased, LOSS)
                e = tl.exp2(at)
                t, n, g = t + e, tl.fma(e, y, n), tl.fma(e, _phi(y, tl.exp2(y)), g)
    if ENTROPY:
        if IDS != NO_IDS:
            h = tl.sum(h, 1)
        k += tl.sum(h, 0)
    if IDS != NO_IDS:
        s, m, f = tl.reduce((s, m, f), 1, _plus)
    s, m, f = tl.reduce((s, m, f), 0, _plus)
    return _sums((s + t) * UNBIAS, (m + n) * UNBIAS, (f + g) * UNBIAS, k * UNBIAS)


@triton.jit
def _sums(s, m, phi, h):
    a = tl.fma(m, LN_2, phi)
    ratio = a / s
    log_ratio = log1p(ratio)
    return Sums(s, m, phi, h, a, log_ratio, phi / s - phi_of_log(ratio, log_ratio))


@triton.jit
def _verdict(
    sums, shift, attempt, LOSS: tl.constexpr, ENTROPY: tl.constexpr, ELEMENT: tl.constexpr
):
    """GOOD, LEFT or AGAIN, and whether it takes the row's maxima."""
    usable = (sums.s > 2.0**-40) & (sums.s < 2.0**52)
    finite = (
        usable
        & (sums.s + sums.a < 2.0**52)
        & (sums.phi < float("inf"))
        & (tl.abs(sums.log_ratio) < 100.0)
    )
    # o - x is rounded to 2^-24 of the distance of the levels, where logits have that many digits: KL is off by this
    # over √(KL/2), which is to be less than 2e-6.
    apart = tl.abs(shift.distance)
    near = apart <= 64.0
    if ELEMENT == tl.float32:
        near = near & ((apart <= 1.0) | (sums.kl > 0.0018 * apart * apart))
    fit = finite & near
    if ENTROPY:  # the small difference of large numbers, where a level is far from its maximum
        kept = sums.s if LOSS == REVERSE_KL else sums.s + sums.a
        level = tl.log2(kept)
        lost = tl.abs(level) * (1.0 + sums.s / kept)
        cancels = (level - sums.h / kept < lost * 2.0**-6) | (lost > 32.0)
        fit = fit & ((attempt > 0) | (cancels == 0))
    # Below -3, S + A has lost its digits, as it has where A is the small difference of large numbers.
    exact = (sums.log_ratio > -3.0) & (tl.abs(sums.m) + sums.phi < 32.0 * (sums.s + sums.a))
    # Φ/S and φ(L) are good to 2e-6 of their size: where KL is much less than they, L has to be nearer to 0.
    excess = sums.phi / sums.s - sums.kl
    good = fit & exact & (excess <= 0.5 * tl.abs(sums.kl))
    by_maxima = (attempt == 0) & (fit == 0)
    hopeless = usable & ((sums.phi < float("inf")) == 0)
    hopeless = hopeless | (attempt == ATTEMPTS - 1) | ((attempt > 0) & (fit == 0))
    verdict = tl.where(good, GOOD, tl.where(hopeless, LEFT, AGAIN))
    return verdict, by_maxima


@triton.jit
def _fit_sums(
    row, LOSS: tl.constexpr, ENTROPY: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    IDS: tl.constexpr,
):  # fmt: skip
    """First passes until the sums are fit for use, or until the row is given up."""
    ELEMENT: tl.constexpr = row.x.elements.dtype.element_ty
    shift = _shift(row.samples.x_top, row.samples.o_top, row.samples.above, row)
    c, a, x_ref, distance = shift.c, shift.a, shift.x_ref, shift.distance
    s, m, phi, h, total, log_ratio, kl = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    attempt, verdict = 0, AGAIN + 0
    while verdict == AGAIN:
        sums = _first_pass(
            row, Shift(c, a, x_ref, distance), LOSS, ENTROPY, WHOLE, BLOCK, UNROLL, IDS
        )
        s, m, phi, h, total = sums.s, sums.m, sums.phi, sums.h, sums.a
        log_ratio, kl = sums.log_ratio, sums.kl
        verdict, by_maxima = _verdict(
            sums, Shift(c, a, x_ref, distance), attempt, LOSS, ENTROPY, ELEMENT
        )
        if verdict == AGAIN:
            if by_maxima:
                shift = _shift_of_maxima(row, BLOCK, IDS)
                c, a, x_ref, distance = shift.c, shift.a, shift.x_ref, shift.distance
            else:
                a += log_ratio * LOG2_E
        attempt += 1
    # What rounding leaves of 0.
    kl = tl.where(kl > 0.0, kl, 0.0)
    good = (verdict == GOOD) & (tl.abs(c) < HIGHEST_LEVEL)
    return Shift(c, a, x_ref, distance), Sums(s, m, phi, h, total, log_ratio, kl), good


# ----------------------------------------------------------------------------------------------------- coefficients


class Odds(NamedTuple):
    """p(R) and p(K) = 1 - p(R), each with all its digits; the entropy of that choice, in nats."""

    log_kept: tl.tensor
    kept: tl.tensor
    removed: tl.tensor
    entropy: tl.tensor


@triton.jit
def _odds(log_odds):
    kept, removed, entropy = masses_of(log_odds)
    return Odds(-softplus(log_odds), kept, removed, entropy)


@triton.jit
def _forward(sums, shift, level, lost, removed, factor):
    """Of KL(q*‖p) = KL over the kept entries - log p(K): the loss, and the coefficients of its gradient."""
    log_kept, kept = 0.0, 1.0
    if removed.sum > 0.0:
        odds = _odds(tl.log(removed.sum / (sums.s + sums.a)) - lost * LN_2)
        log_kept, kept = odds.log_kept, odds.kept
    h = factor / sums.s
    k1 = kept * tl.exp2(-lost) / (1.0 + sums.a / sums.s)
    # The gradient of a removed entry is factor p_s.
    return sums.kl - log_kept, Gradient(
        shift.c, shift.a + (sums.log_ratio - log_kept) * LOG2_E, -h, h, -k1, level, h * k1, 0.0 * h
    )  # fmt: skip


@triton.jit
def _reverse(sums, shift, removed, factor, eps, scale, FOLDED: tl.constexpr):
    """Of KL(p‖q̃) = p(K) KL + log(1 + ε n) - H(p(R)) - p(R) (H_R + log ε), H_R the entropy of p within R.

    The gradient takes the difference of the means within K and R, Δ = KL - o + H_R + log ε, o the log-odds of R.
    FOLDED: y's multiplication is folded into the next one, which is fine for logits of 16 bits.
    """
    kept, extra, loss = 1.0, 0.0, sums.kl
    s0, s1 = 0.0, 0.0
    if removed.count > 0.0:
        norm = log1p(eps * removed.count)
        loss = sums.kl + norm
        if removed.sum > 0.0:
            log_eps = tl.log(eps)
            log_sum = tl.log(removed.sum)
            log_odds = tl.log(removed.sum / sums.s)
            odds = _odds(log_odds)
            mean = removed.moment / removed.sum * LN_2 - log_sum  # of log p_R within R, -H_R
            delta = sums.kl - (log_odds + mean - log_eps)
            kept = odds.kept
            extra = tl.where(odds.removed > 0.0, odds.removed * delta, 0.0)
            # p(R) times the log-odds is in the entropy: apart from log p(K) it would cancel against it.
            loss = tl.fma(kept, sums.kl, (norm - odds.entropy) + odds.removed * (mean - log_eps))
            # factor p_s (log p_R(s) + H_R - p(K) Δ)
            s1 = factor * odds.removed / removed.sum
            s0 = -s1 * (mean + kept * delta + log_sum)
            s1 *= LN_2
    h = factor * kept / sums.s
    k1 = -h * LN_2
    k0 = h * tl.fma(sums.m / sums.s, LN_2, extra)
    shift_a = shift.a
    if FOLDED:
        k0 = tl.fma(-k1, shift.a, k0)
        k1 *= scale
        shift_a = 0.0 * shift_a
    return loss, Gradient(shift.c, shift_a, h, k0, k1, shift.c, s0, s1)


# ------------------------------------------------------------------------------------------------------ second pass


@triton.jit
def _gradient(x, o, bits, g, row, FORM: tl.constexpr, FOLDED: tl.constexpr, IDS: tl.constexpr):
    scale = row.scale
    d = _distance(x, o, row)
    x, o = _logits(x, o, row)
    at = tl.fma(x, scale, -g.c)
    e = tl.exp2(at)
    if FORM == REVERSE:
        # factor p (M/S - y + p(R) Δ)
        if FOLDED:
            k = tl.fma(d, g.k1, g.k0)
        else:
            k = tl.fma(tl.fma(d, scale, -g.a), g.k1, g.k0)
        if IDS != NO_IDS:
            k = tl.where((bits & 1) != 0, tl.fma(at, g.s1, g.s0), k)
        return e * k
    if IDS != NO_IDS:  # whose q* is 0
        e = tl.where((bits & 1) != 0, 0.0, e)
    # factor (p - q*), as -h (e - p'): both factors are negated here, or each pair would negate one.
    other_at = tl.fma(o, scale, -g.shift)
    if (
        row.o.origin is not None
    ):  # without the rounding of their sum, next to which p - q* may be small
        other_at = tl.fma(d, scale, tl.fma(x, scale, -g.shift))
    direct = tl.fma(tl.exp2(other_at), g.k1, e) * g.h
    if FORM == DIRECT:
        return direct
    y = tl.fma(d, scale, -g.a)  # log p - log q*
    square = y * y
    mean = tl.exp2(tl.fma(y, 0.5, at))
    near = (mean * y) * tl.fma(tl.fma(square, g.k0 * H2, g.k0 * H1), square, g.k0 * H0)
    fits = tl.abs(y) < NEAR
    if IDS != NO_IDS:
        fits = fits & ((bits & 1) == 0)
    return tl.where(fits, near, direct)


@triton.jit
def _gradients(
    x, o, start, row, g, shape, FORM: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr
):  # fmt: skip
    """A tile's, as they are stored."""
    ELEMENT: tl.constexpr = row.x.elements.dtype.element_ty
    bits = _bits(row, start, EDGE, BLOCK, IDS)
    if ELEMENT == tl.float32:
        d = _gradient(x, o, bits, g, row, FORM, False, IDS)
    else:
        x0, o0, x1, o1 = _low(x, ELEMENT), _low(o, ELEMENT), _high(x, ELEMENT), _high(o, ELEMENT)
        d0 = _gradient(x0, o0, bits, g, row, FORM, True, IDS)
        d1 = _gradient(x1, o1, bits >> 1, g, row, FORM, True, IDS)
        d = tl.join(d0, d1).reshape(shape)
    return d.to(row.gradient.dtype.element_ty)


@triton.jit
def _second_pass(
    row,
    g,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    IDS: tl.constexpr,
):
    """Writes the gradient, backwards: it begins with what the first pass left in the L2 cache, and evicts it."""
    PAIRS: tl.constexpr = 32 // row.x.elements.dtype.element_ty.primitive_bitwidth
    u = _places(BLOCK // PAIRS, 4, IDS)
    v = _places(BLOCK, 4 * PAIRS, IDS)
    tiles = _tiles(row.begin, row.end, BLOCK)
    for start in range(tiles.edge, row.end, tiles.step):
        x, o = _some_words(row.x.words, row, start, u), _some_words(row.o.words, row, start, u)
        d = _gradients(x, o, start, row, g, v.shape, FORM, True, BLOCK, IDS)
        inside = start + v < row.end
        if not EVEN:
            inside = inside & (start + v >= row.begin)
        tl.store(row.gradient + start + v, d, mask=inside)
    for i in tl.range(tiles.first, tiles.whole, BLOCK, num_stages=1, loop_unroll_factor=UNROLL):
        start = tiles.whole - BLOCK + tiles.first - i
        x = tl.load(row.x.words + start // PAIRS + u, eviction_policy="evict_first")
        o = tl.load(row.o.words + start // PAIRS + u, eviction_policy="evict_first")
        d = _gradients(x, o, start, row, g, v.shape, FORM, False, BLOCK, IDS)
        tl.store(row.gradient + start + v, d, eviction_policy="evict_first")


@triton.jit
def _zero(gradient, begin, end, BLOCK: tl.constexpr):
    v = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], gradient.dtype.element_ty)
    tiles = _tiles(begin, end, BLOCK)
    for start in range(tiles.edge, end, tiles.step):
        inside = (start + v >= begin) & (start + v < end)
        tl.store(gradient + start + v, zeros, mask=inside)
    for start in range(tiles.first, tiles.whole, BLOCK):
        tl.store(gradient + start + v, zeros, eviction_policy="evict_first")


# ---------------------------------------------------------------------------------------------------------- the set


@triton.jit
def _removed(row, at, level, LOSS: tl.constexpr, CHUNK: tl.constexpr, IDS: tl.constexpr):
    """The set's sums, and whether a logit of it, in either row, is none. ``at``: of the label."""
    has_label = (row.label >= 0) & (row.log_kappa == 0.0)
    weight = tl.where(has_label, tl.exp2(at), 0.0)
    total, moment = weight, tl.where(weight == 0.0, 0.0, weight * at)
    number = tl.where(has_label, 1.0, 0.0)
    broken = has_label & (((row.x_label < INF) & (row.o_label < INF)) == 0)
    if IDS != NO_IDS:
        totals = tl.zeros([CHUNK], tl.float32)
        moments = totals
        numbers = totals
        worst = totals
        for start in range(0, row.ids.count, CHUNK):
            v, here = some_columns(row.ids, row.end - row.begin, start, CHUNK)
            v += row.begin
            x = gather(row.x.elements, row.x.origin, v, here, AWAY)
            o = gather(row.o.elements, row.o.origin, v, here, AWAY)
            z = x if LOSS == REVERSE_KL else o
            exponents = tl.fma(z, row.scale, -level)
            weights = tl.where(here, tl.exp2(exponents), 0.0)
            totals += weights
            moments += tl.where(weights == 0.0, 0.0, weights * exponents)
            numbers += tl.where(here, 1.0, 0.0)
            # An infinite exponent of the policy, times its weight of 0, would be NaN in the second pass.
            fine = (x < INF) & (o < INF) & (z > LOWEST_REMOVED)
            worst += tl.where(here & (fine == 0), 1.0, 0.0)
        total += tl.sum(totals, 0)
        moment += tl.sum(moments, 0)
        number += tl.sum(numbers, 0)
        broken = broken | (tl.sum(worst, 0) > 0.0)
    return Set(total, moment, number), broken


# ------------------------------------------------------------------------------------- for others than this launch


@triton.jit
def _row_sums(
    row,
    sums,
    shift,
    removed,
    LOSS: tl.constexpr,
    ENTROPY: tl.constexpr,
    CHUNK: tl.constexpr,
    IDS: tl.constexpr,
):
    """What the row is reduced to, by its logarithms."""
    REVERSE: tl.constexpr = LOSS == REVERSE_KL
    other = sums.s + sums.a
    # The references are the levels: c and a are theirs but for what rounding took.
    x_ref = shift.x_ref
    o_ref = x_ref + shift.distance
    log_base = tl.log(sums.s) + tl.fma(-x_ref, row.scale, shift.c) * LN_2
    log_ratio = sums.log_ratio + tl.fma(-shift.distance, row.scale, shift.a) * LN_2
    log_other = log_base + log_ratio
    entropy = 0.0 * log_base
    if ENTROPY:
        kept = sums.s if REVERSE else other
        entropy = (tl.log2(kept) - sums.h / kept) * LN_2
    vocab = row.end - row.begin
    in_part = row.log_kappa != 0.0
    set_label = tl.where(in_part, -1, row.label)
    of_x = sum_of_set(
        row.x.elements, row.x.origin, row.begin, vocab, set_label, row.ids, row.scale, CHUNK, IDS
    )
    of_o = sum_of_set(
        row.o.elements, row.o.origin, row.begin, vocab, set_label, row.ids, row.scale, CHUNK, IDS
    )
    here = in_part & (row.label >= 0)
    x_label, o_label = tl.where(here, row.x_label, 0.0), tl.where(here, row.o_label, 0.0)
    kept = vocab.to(tl.float32) - removed.count - tl.where(here, 1.0, 0.0)
    k = KlSlice(x_ref, o_ref, log_base, log_other, log_ratio, sums.kl, entropy)
    if REVERSE:
        found = RowSums(
            nothing(), nothing(), x_label, of_x, of_o, o_label, sums.kl, log_ratio, kept
        )
    else:
        found = RowSums(
            nothing(), nothing(), o_label, of_o, of_x, x_label, sums.kl, log_ratio, kept
        )
    return with_slice(found, k, REVERSE), k


@triton.jit
def _label_entry(row, sums, shift, LOSS: tl.constexpr):
    """A y that is pushed down in part among the entries that stay."""
    at, y = _label(row, shift, LOSS)
    log_base = at * LN_2 - tl.log(sums.s)
    return KlEntry(log_base, log_base + y * LN_2 - sums.log_ratio, y * LN_2 - sums.log_ratio)


@triton.jit
def _gradient_of_label(row, shift, at, g, LOSS: tl.constexpr, FOLDED: tl.constexpr):
    """``at``: log2 of its policy's weight, relative to its level."""
    weight = tl.exp2(at)
    own = tl.where(weight == 0.0, 0.0, weight * tl.fma(at, g.s1, g.s0))  # of a removed one
    if row.log_kappa != 0.0:
        e_at, y = _label(row, shift, LOSS)
        e = tl.exp2(e_at)
        if LOSS == REVERSE_KL:
            k1 = g.k1 / row.scale if FOLDED else g.k1
            k0 = tl.fma(k1, shift.a, g.k0) if FOLDED else g.k0
            own = tl.where(e == 0.0, 0.0, e * tl.fma(y, k1, k0))
        else:
            d = (y - (g.a - shift.a)) * LN_2
            own = tl.where(
                tl.abs(d) < 1.0, g.k0 * e * (phi_of(d) + d), tl.fma(weight, g.k1, e) * g.h
            )
    return own


# ------------------------------------------------------------------------------------------------------------ a row


@triton.jit
def _run(
    row, to, row_factor, factor, eps, LOSS: tl.constexpr, KIND: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, NEAR_KL: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    IDS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Returns whether the row, given as a reverse KL's, is left to the other kernel."""
    ENTROPY: tl.constexpr = to.diagnostics is not None
    TOLD: tl.constexpr = ENTROPY or to.coefficients is not None or to.statistics is not None
    FOLDED: tl.constexpr = row.x.elements.dtype.element_ty != tl.float32
    if LOSS == FORWARD_KL:
        some = Samples(row.samples.o_top, row.samples.x_top, -row.samples.above)
        row = Row(
            row.o, row.x, row.gradient, row.begin, row.end, row.label, row.log_kappa, row.o_label, row.x_label,
            row.ids, some, row.scale, row.inverse_t,
        )  # fmt: skip
    shift, sums, good = _fit_sums(row, LOSS, ENTROPY, KIND == FUSED, BLOCK, UNROLL, IDS)
    # log2 of the policy's weights, relative to its sum's, is z scale - level, less what rounding took from the level.
    level, z_label = shift.c, row.x_label
    if LOSS == FORWARD_KL:
        level, lost = two_sum(shift.c, shift.a)
        z_label = row.o_label
    at = tl.fma(z_label, row.scale, -level)
    removed, broken = _removed(row, at, level, LOSS, CHUNK, IDS)
    good = good & (broken == 0) & (removed.sum < 2.0**100)
    if LOSS == REVERSE_KL:
        good = good & ((removed.count == 0.0) | (eps > 1e-30))
        loss, g = _reverse(sums, shift, removed, factor, eps, row.scale, FOLDED)
    else:
        loss, g = _forward(sums, shift, level, lost, removed, factor)
    if good:
        if TOLD:
            found, k = _row_sums(row, sums, shift, removed, LOSS, ENTROPY, CHUNK, IDS)
            if to.coefficients is not None:
                label = _label_entry(row, sums, shift, LOSS)
                in_part = (row.label >= 0) & (row.log_kappa != 0.0)
                loss, _, plan = conclude_kl(
                    found, k, label, (0.0, 0.0), row.log_kappa, in_part, eps, tl.log(eps), removed.count,
                    row.inverse_t, LOSS,
                )  # fmt: skip
                save(to.coefficients, plan, factor)
            if KIND == STATISTICS:
                pack(to.statistics, found)
            elif ENTROPY:
                write_diagnostics(
                    to, loss, loss, diagnose(found, 0.0 * loss, row.inverse_t, True, True)
                )
        if to.loss is not None:
            tl.store(to.loss, row_factor * loss)
        if GRADIENT:
            # A few removed entries are written behind the others, by numbers that are kept until then.
            MASKS: tl.constexpr = NO_IDS if FEW else IDS
            if FEW:
                v, here = some_columns(row.ids, row.end - row.begin, 0, CHUNK)
                few = row.begin + v
                z_line = row.x if LOSS == REVERSE_KL else row.o
                z = gather(z_line.elements, z_line.origin, few, here, 0.0)
                few_at = tl.fma(z, row.scale, -level)
                few_gradients = tl.exp2(few_at) * tl.fma(few_at, g.s1, g.s0)
            # It may lie where the logits do: no warp writes before all have read what is not their own.
            tl.debug_barrier()
            if LOSS == REVERSE_KL:
                _second_pass(row, g, REVERSE, BLOCK, UNROLL, EVEN, MASKS)
            elif loss < NEAR_KL:
                _second_pass(row, g, SINH, BLOCK, 1, EVEN, MASKS)
            else:
                _second_pass(row, g, DIRECT, BLOCK, UNROLL, EVEN, MASKS)
            if FEW:
                tl.debug_barrier()
                stored = few_gradients.to(row.gradient.dtype.element_ty)
                tl.store(row.gradient + few, stored, mask=here)
            if row.label >= 0:
                own = _gradient_of_label(row, shift, at, g, LOSS, FOLDED)
                tl.debug_barrier()
                tl.store(row.gradient + row.label, own.to(row.gradient.dtype.element_ty))
    return good == 0


@triton.jit(
    do_not_specialize=[
        "logits_stride", "ref_stride", "gradient_stride", "upstream_stride", "vocab", "ignore_index", "ids_stride",
        "ids_count", "bits_stride", "readable", "rows", "vocab_offset", "vocab_size",
    ],
    do_not_specialize_on_alignment=["logits", "ref_logits", "gradient"],
)  # fmt: skip
def kl_kernel(
    logits, logits_stride, ref_logits, ref_stride, labels, weights, factors, ids, ids_stride, ids_count, bits,
    bits_stride, rows, vocab, vocab_offset, vocab_size, eps, scale, inverse_t, ignore_index, losses, diagnostics,
    coefficients, gradient, gradient_stride, upstream, upstream_stride, statistics, left, readable,
    POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr, KIND: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr, NEAR_KL: tl.constexpr, IDS: tl.constexpr, FEW: tl.constexpr, CHUNK: tl.constexpr,
    EVEN: tl.constexpr, ALIKE: tl.constexpr, DIFFERENCES: tl.constexpr,
):  # fmt: skip
    """One row a program, ``factors`` a ``Factors``; ``left`` becomes 1 where it is left to ``stream_kernel``, else 0.

    So are those whose vectors do not lie in the tensors' memory: ``readable`` says how many rows are before them.

    FEW: a row's ids fit into one chunk. EVEN: all rows begin and end at boundaries of 16 bytes. ALIKE: as many columns
    after one as rows of logits begin those of the gradient. DIFFERENCES: ``logits`` hold the policy's minus the
    reference's.
    """
    index = tl.program_id(0).to(tl.int64)
    z_row = logits + index * logits_stride
    r_row = ref_logits + index * ref_stride
    GROUP: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    # Also where it is known to be 0: the compiler loses what it is told of a pointer that nothing was added to.
    begin = columns_before(z_row)
    r = _line(r_row, begin, None)
    z = _line(z_row, begin, r.elements if DIFFERENCES else None)
    g_row = z.elements
    if GRADIENT:
        g_row = row_of(gradient, index, gradient_stride, begin, GROUP, ALIKE)
    # All that needs no other answer first is asked for at once.
    label = tl.load(labels + index)
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + index)
    negative = weight < 0.0
    valid = (label >= 0) & (label < vocab_size)
    id_row, bit_row = labels, labels
    if IDS != NO_IDS:
        id_row = ids + index * ids_stride
        bit_row = bits + (index if IDS == ROW_IDS else begin) * bits_stride
        last = tl.load(id_row + ids_count - 1)
        negative = negative | (last >= 0)
        valid = valid & (tl.load(id_row) >= -1) & (last < vocab_size)
    row_factor, factor = row_factors(factors, index, weight, negative, inverse_t, NEGATIVE)
    factor = times_upstream(factor, upstream, index * upstream_stride)
    some = samples(z.elements, r.elements, begin, vocab, DIFFERENCES)
    end = begin + vocab
    if EVEN:
        end = tl.multiple_of(end, GROUP)
    to = outputs_of(index, losses, diagnostics, rows, coefficients, statistics, None)
    gives_up = False
    if index >= readable:
        gives_up = True
    elif (weight == 0.0) | (label == ignore_index):
        if GRADIENT:
            _zero(g_row, begin, end, BLOCK)
        write_uncomputed(to, 0.0, 0.0, KIND)
    else:
        w = weight + 0.0 * scale
        column = label - vocab_offset
        pushed = (w < 0.0) & (column >= 0) & (column < vocab)
        column = begin + tl.where(pushed, column, 0).to(tl.int32)
        if IDS != NO_IDS:
            pushed = pushed & (
                (tl.load(bit_row + column // 8).to(tl.int32) >> (column % 8) & 1) == 0
            )
        log_kappa = tl.where(pushed & (w > -1.0), log1p(tl.maximum(w, -1.0)), 0.0)
        served = valid & ((log_kappa != 0.0) | (w <= -1.0) | (pushed == 0))
        if KIND == FUSED:
            if diagnostics is not None:
                served = served & (log_kappa == 0.0)
            served = served & (tl.abs(factor) > 1e-30) & (tl.abs(factor) < 1e30)
        gives_up = served == 0
        if served:
            z_label = gather(z.elements, z.origin, column, pushed, 0.0)
            r_label = gather(r.elements, r.origin, column, pushed, 0.0)
            column = tl.where(pushed, column, -1)
            row = Row(
                z, r, g_row, begin, end, column, log_kappa, z_label, r_label,
                Ids(id_row, ids_count, bit_row, vocab_offset), some, scale, inverse_t,
            )  # fmt: skip
            if negative & (POSITIVE != NEGATIVE):
                gives_up = _run(
                    row, to, row_factor, factor, eps, NEGATIVE, KIND, GRADIENT, BLOCK, UNROLL, NEAR_KL, CHUNK, EVEN,
                    IDS, FEW,
                )  # fmt: skip
            else:
                gives_up = _run(
                    row, to, row_factor, factor, eps, POSITIVE, KIND, GRADIENT, BLOCK, UNROLL, NEAR_KL, CHUNK, EVEN,
                    IDS, FEW,
                )  # fmt: skip
    tl.store(left + index, gives_up.to(tl.int32))
