"""The Triton kernels: one program a row, the row in tiles of ``BLOCK`` columns.

A row takes two passes, as on a CPU (``csrc/cpu/rows.cpp``). The first reads z and r and sums exponentials, the
second walks the vocabulary backwards, so that it begins with what the first left in the L2 cache, recomputes p and q*,
adds up the loss in Bregman form and stores the gradient past the cache. Without a gradient the first pass yields the
loss too. A lane always sums the same columns, for z and r alike: p = q gives exactly 0.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from tnt_kernels._call import Kind
from tnt_kernels.backends.triton.kl import kl_kernel as kl_kernel
from tnt_kernels.backends.triton.kl import mark_kernel as mark_kernel
from tnt_kernels.backends.triton.row_math import (
    FORWARD_KL,
    LOG_LIKELIHOOD,
    NEGATIVE_LIKELIHOOD,
    NO_IDS,
    NONE,
    NOTHING,
    REVERSE_KL,
    ROW_IDS,
    SHARED_IDS,
    UNLIKELIHOOD,
    Coefficients,
    ExpSum,
    Statistics,
    _log1p,
    _log_ratio,
    _moved,
    _phi,
    _softplus,
    _some_ids,
    coefficients,
    difference_of,
    empty_sum,
    forward_kl_element,
    has_policy,
    has_reference,
    log_odds,
    merge,
    reverse_kl_element,
    row_factors,
    share,
)  # fmt: skip
from tnt_kernels.backends.triton.row_math import Factors as Factors

# What a launch does.
FUSED = tl.constexpr(int(Kind.FUSED))
BACKWARD = tl.constexpr(int(Kind.BACKWARD))
STATISTICS = tl.constexpr(int(Kind.STATISTICS))
PARTIAL_SUMS = tl.constexpr(int(Kind.PARTIAL_SUMS))
FINISH = tl.constexpr(int(Kind.FINISH))

GATHER = tl.constexpr(64)  # ids at a time
LOOK = tl.constexpr(64)  # rows at a time, for one that was left


class Row(NamedTuple):
    z: tl.tensor  # pointers to the row
    r: tl.tensor
    gradient: tl.tensor
    vocab: tl.tensor  # columns here
    offset: tl.tensor  # vocabulary id of column 0
    set_label: tl.tensor  # column of y where it is in the set and not among the ids, else -1
    partial: tl.tensor  # column of y where it stays in part, else -1
    log_kappa: tl.tensor  # of that y
    ids: tl.tensor  # ascending, with duplicates, -1 and numbers past the vocabulary
    count: tl.tensor
    id_map: tl.tensor  # (vocabulary) int8, 1 for the shared ids
    scale: tl.tensor  # log2(e) / T, of exponents
    inverse_t: tl.tensor  # 1 / T, of differences


@triton.jit
def _first_removed(row, BACKWARDS: tl.constexpr):
    """Where in the list of ids a walk over the columns begins."""
    if BACKWARDS:
        return row.count - 1
    return row.count * 0


@triton.jit
def _removed(
    row, v, start, position, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr, IDS: tl.constexpr
):
    """Which of the columns are in the set, and where in the list the next tile goes on."""
    hit = v == row.set_label
    if IDS == SHARED_IDS:
        hit = hit | (tl.load(row.id_map + row.offset + v, mask=v < row.vocab, other=0) != 0)
    if IDS == ROW_IDS:
        # One comparison per column and id of the tile: K times BLOCK in all, whatever V is.
        if BACKWARDS:
            column = tl.load(row.ids + position, mask=position >= 0, other=-1) - row.offset
            while (position >= 0) & (column >= start):
                hit = hit | (v == column)
                position -= 1
                column = tl.load(row.ids + position, mask=position >= 0, other=-1) - row.offset
        else:
            column = tl.load(row.ids + position, mask=position < row.count, other=0) - row.offset
            while (position < row.count) & (column < start + BLOCK):
                hit = hit | (v == column)
                position += 1
                column = (
                    tl.load(row.ids + position, mask=position < row.count, other=0) - row.offset
                )
    return hit, position


# ------------------------------------------------------------------------------------------------- the first pass


class Sums(NamedTuple):
    statistics: Statistics
    loss: (
        tl.tensor
    )  # Σ of the KL's elements over the kept entries, by the estimate of the log-ratio below
    log_error: tl.tensor  # what that estimate lacks
    good: tl.tensor  # neither overflow nor underflow, and a good estimate


@triton.jit
def _top(x):
    """The maximum, or 0 where there is nothing. That of +inf stays: its exponential is to be NaN."""
    top = tl.max(x, 0)
    return tl.where(top == NOTHING, 0.0, top)


@triton.jit
def _maxima(
    row, limit, PAIR: tl.constexpr, HAS_SET: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of the kept entries among the first ``limit`` columns; 0 where there is none."""
    z_top = tl.full([BLOCK], NOTHING, tl.float32)
    r_top = tl.full([BLOCK], NOTHING, tl.float32)
    position = _first_removed(row, False)
    for start in range(0, limit, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < row.vocab
        z = tl.load(row.z + v, mask=inside, other=NOTHING).to(tl.float32)
        if HAS_SET:
            removed, position = _removed(row, v, start, position, BLOCK, False, IDS)
            z = tl.where(removed, NOTHING, z)
        z_top = tl.maximum(z_top, z)
        if PAIR:
            r = tl.load(row.r + v, mask=inside, other=NOTHING).to(tl.float32)
            if HAS_SET:
                r = tl.where(removed, NOTHING, r)
            r_top = tl.maximum(r_top, r)
    return _top(z_top), _top(r_top)


@triton.jit
def _sums(
    row, z_max, r_max, log_ratio, limit, LOSS: tl.constexpr, PAIR: tl.constexpr, WITH_LOSS: tl.constexpr,
    ENTROPY: tl.constexpr, MOMENT: tl.constexpr, TOTAL: tl.constexpr, HAS_SET: tl.constexpr, IDS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums over the kept entries of the first ``limit`` columns, relative to maxima that need only be near.

    WITH_LOSS is MATH's one-read KL: elements of the loss with log p - log q* estimated as x_v - ``log_ratio``, whose
    error the sum of their gradients tells.
    """
    zeros = tl.zeros([BLOCK], tl.float32)
    z_sum, r_sum, moment, z_moment, total, loss, excess = (
        zeros,
        zeros,
        zeros,
        zeros,
        zeros,
        zeros,
        zeros,
    )
    difference = difference_of(z_max, r_max)
    ratio = tl.exp(-log_ratio)
    position = _first_removed(row, False)
    for start in tl.range(0, limit, BLOCK, num_stages=STAGES):
        v = start + tl.arange(0, BLOCK)
        inside = v < row.vocab
        z = tl.load(row.z + v, mask=inside, other=NOTHING).to(tl.float32)
        if TOTAL:
            total += tl.where(inside & (v != row.set_label), (z - z_max) * row.inverse_t, 0.0)
        if HAS_SET:
            removed, position = _removed(row, v, start, position, BLOCK, False, IDS)
            z = tl.where(removed, NOTHING, z)
        p = tl.exp2((z - z_max) * row.scale)
        z_sum += p
        if ENTROPY:
            z_moment += tl.where(p == 0.0, 0.0, p * ((z - z_max) * row.inverse_t))
        if PAIR:
            r = tl.load(row.r + v, mask=inside, other=NOTHING).to(tl.float32)
            if HAS_SET:
                r = tl.where(removed, NOTHING, r)
            q = tl.exp2((r - r_max) * row.scale)
            x = (z - difference.z_ref) - (r - difference.r_ref) - difference.centre
            x *= row.inverse_t
            if HAS_SET:
                left = v == row.partial
                q = tl.where(left, q * tl.exp(row.log_kappa), q)
                x = tl.where(left, x - row.log_kappa, x)
            r_sum += q
            if MOMENT:
                moment += tl.where(p == 0.0, 0.0, p * x)
            if WITH_LOSS:
                d = x - log_ratio
                if LOSS == REVERSE_KL:
                    element = reverse_kl_element(p * ratio, q, d, d)
                    loss += element.loss
                    element = forward_kl_element(p * ratio, q, d)
                else:
                    element = forward_kl_element(p * ratio, q, d)
                    loss += element.loss
                excess += element.gradient
    z_total = tl.sum(z_sum, 0)
    policy = ExpSum(z_max, z_total, tl.sum(z_moment, 0))
    good = (z_total > 1e-10) & (z_total < 1e30)
    kl_moment, log_error, loss_sum = 0.0 * z_total, 0.0 * z_total, 0.0 * z_total
    reference = empty_sum()
    if PAIR:
        r_total = tl.sum(r_sum, 0)
        reference = ExpSum(r_max, r_total, 0.0 * r_max)
        good = good & (r_total > 1e-10) & (r_total < 1e30)
        kl_moment = tl.sum(moment, 0) - z_total * (difference.excess * row.inverse_t)
        if WITH_LOSS:
            log_error = _log1p(tl.sum(excess, 0) / r_total)
            loss_sum = tl.sum(loss, 0)
            good = good & (tl.abs(log_error) < 0.5)
    statistics = Statistics(
        policy, reference, empty_sum(), empty_sum(), kl_moment, tl.sum(total, 0)
    )
    return Sums(statistics, loss_sum, log_error, good)


# --------------------------------------------------------------------------------------------------------- the set


@triton.jit
def _set_chunk(row, at):
    """Some of the ids: their columns, which of them count, as no duplicates, and which of those lie here."""
    ids, counts = _some_ids(row.ids, row.count, at, GATHER)
    columns = ids - row.offset
    return columns, counts, counts & (columns >= 0) & (columns < row.vocab)


@triton.jit
def _set_sum(row, x_row, IDS: tl.constexpr):
    """Over the set's entries of z or r, gathered: the first pass has just read them."""
    own = tl.load(x_row + row.set_label, mask=row.set_label >= 0, other=NOTHING).to(tl.float32)
    top = own
    if IDS != NO_IDS:
        for at in range(0, row.count, GATHER):
            columns, _, here = _set_chunk(row, at)
            x = tl.load(x_row + columns, mask=here, other=NOTHING).to(tl.float32)
            top = tl.maximum(top, tl.max(x, 0))
    top = tl.where(top == NOTHING, 0.0, top)
    total = tl.where(row.set_label >= 0, tl.exp2((own - top) * row.scale), 0.0)
    moment = tl.where(total == 0.0, 0.0, total * ((own - top) * row.inverse_t))
    if IDS != NO_IDS:
        for at in range(0, row.count, GATHER):
            columns, _, here = _set_chunk(row, at)
            x = tl.load(x_row + columns, mask=here, other=NOTHING).to(tl.float32) - top
            weight = tl.exp2(x * row.scale)
            total += tl.sum(weight, 0)
            moment += tl.sum(tl.where(weight == 0.0, 0.0, weight * (x * row.inverse_t)), 0)
    return ExpSum(top, total, moment)


@triton.jit
def _set_loss(row, c, nl_floor, LOSS: tl.constexpr, IDS: tl.constexpr):
    """Over the set's entries: the reverse KL's elements, or NL's Σ max(log p_s, floor); and NL's active tokens."""
    own = tl.load(row.z + row.set_label, mask=row.set_label >= 0, other=NOTHING).to(tl.float32)
    loss, active = _set_elements(own, row.set_label >= 0, row, c, nl_floor, LOSS)
    if IDS != NO_IDS:
        for at in range(0, row.count, GATHER):
            columns, _, here = _set_chunk(row, at)
            z = tl.load(row.z + columns, mask=here, other=NOTHING).to(tl.float32)
            losses, actives = _set_elements(z, here, row, c, nl_floor, LOSS)
            loss += tl.sum(losses, 0)
            active += tl.sum(actives, 0)
    return loss, active


@triton.jit
def _set_elements(z, here, row, c, nl_floor, LOSS: tl.constexpr):
    log_weight = (z - c.policy_max) * row.inverse_t
    if LOSS == REVERSE_KL:
        p = tl.exp2((z - c.policy_max) * row.scale) * c.policy_inverse
        loss = reverse_kl_element(p, c.set_value, log_weight + c.set_offset, 0.0 * p).loss
        pushed = here
    else:
        at_rest = log_weight < nl_floor + c.policy_log_sum
        pushed = here & (at_rest == 0)
        loss = tl.where(at_rest, nl_floor, log_weight - c.policy_log_sum)
    return tl.where(here, loss, 0.0), tl.where(pushed, 1.0, 0.0)


# ------------------------------------------------------------------------------------------------ the second pass


@triton.jit
def _second_pass(
    row, c, scale, eps, nl_floor, vocab_size, LOSS: tl.constexpr, UNIFORM: tl.constexpr, HAS_SET: tl.constexpr,
    IDS: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient times ``scale``; returns Σ of the KL's elements."""
    if WRITE:
        # The gradient may lie where the logits do: no warp writes before all have read what they gather of the row.
        tl.debug_barrier()
    losses = tl.zeros([BLOCK], tl.float32)
    difference = difference_of(c.kept_max, c.reference_max)
    position = _first_removed(row, True)
    tiles = tl.cdiv(row.vocab, BLOCK)
    for k in tl.range(0, tiles, num_stages=STAGES):
        start = (tiles - 1 - k) * BLOCK
        v = start + tl.arange(0, BLOCK)
        inside = v < row.vocab
        z = tl.load(row.z + v, mask=inside, other=NOTHING, eviction_policy="evict_first").to(
            tl.float32
        )
        if HAS_SET:
            removed, position = _removed(row, v, start, position, BLOCK, True, IDS)
        if LOSS == FORWARD_KL or LOSS == REVERSE_KL:
            r = tl.load(row.r + v, mask=inside, other=NOTHING, eviction_policy="evict_first").to(
                tl.float32
            )
            if HAS_SET:
                r = tl.where(removed, NOTHING, r)
            log_weight = (z - c.policy_max) * row.inverse_t
            p = tl.exp2((z - c.policy_max) * row.scale) * c.policy_inverse
            q = tl.exp2((r - c.reference_max) * row.scale) * c.reference_inverse
            x = (z - difference.z_ref) - (r - difference.r_ref) - difference.centre
            x *= row.inverse_t
            if HAS_SET:
                left = v == row.partial
                q = tl.where(left, q * tl.exp(row.log_kappa), q)
                x = tl.where(left, x - row.log_kappa, x)
            d = x + c.offset
            excess = x - c.kl_centre
            if UNIFORM:  # the target is (q* + eps) / (1 + V eps) everywhere
                norm = 1.0 / (1.0 + vocab_size * eps)
                d = (log_weight - c.policy_log_sum) - (tl.log(q + eps) - _log1p(vocab_size * eps))
                q = (q + eps) * norm
                excess = d - c.loss
            elif HAS_SET and LOSS == REVERSE_KL:
                q = tl.where(removed, c.set_value, q)
                d = tl.where(removed, log_weight + c.set_offset, d)
                excess = tl.where(removed, log_weight - c.set_centre, excess)
            if LOSS == REVERSE_KL:
                element = reverse_kl_element(p, q, d, excess)
            else:
                element = forward_kl_element(p, q, d)
            gradient = element.gradient
            loss = element.loss
            if HAS_SET and LOSS == FORWARD_KL and not UNIFORM:  # Σ p_s is in the coefficients' loss
                gradient = tl.where(removed, p, gradient)
                loss = tl.where(removed, 0.0, loss)
            losses += tl.where(inside, loss, 0.0)
        else:
            gradient = c.weight * tl.exp2((z - c.kept_max) * row.scale) + c.bias
            if LOSS == LOG_LIKELIHOOD:
                gradient = tl.where(removed, c.set_value, gradient)
            elif HAS_SET:
                inner = tl.exp2((z - c.policy_max) * row.scale) * c.policy_inverse  # UL: p_s
                if LOSS == NEGATIVE_LIKELIHOOD:
                    pushed = (z - c.policy_max) * row.inverse_t >= nl_floor + c.policy_log_sum
                    inner = tl.where(pushed, 1.0, 0.0) - c.set_value * inner
                gradient = tl.where(removed, inner, gradient)
        if WRITE:
            stored = (gradient * scale).to(row.gradient.dtype.element_ty)
            tl.store(row.gradient + v, stored, mask=inside, eviction_policy="evict_first")
    return tl.sum(losses, 0)


@triton.jit
def _fill(row, value, BLOCK: tl.constexpr):
    for start in range(0, row.vocab, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.zeros([BLOCK], tl.float32) + value
        x = x.to(row.gradient.dtype.element_ty)
        tl.store(row.gradient + v, x, mask=v < row.vocab, eviction_policy="evict_first")


# -------------------------------------------------------------------------------------------------- a row's numbers


@triton.jit
def _local_statistics(
    row, LOSS: tl.constexpr, PAIR: tl.constexpr, WITH_LOSS: tl.constexpr, ENTROPY: tl.constexpr,
    UNIFORM: tl.constexpr, HAS_SET: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first pass, and WITH_LOSS the KL over the kept entries, both renormalised.

    Maxima (and the log-ratio of the sums) are guessed from the first tile. Where they turn out to be far off, which
    takes a tile of -inf or logits 60 nats above its own, all of the row is read for them, and the pass is repeated.
    """
    MOMENT: tl.constexpr = LOSS == REVERSE_KL and not UNIFORM
    TOTAL: tl.constexpr = LOSS == LOG_LIKELIHOOD and UNIFORM
    z_max, z_sum, z_moment, r_max, r_sum = 0.0, 0.0, 0.0, 0.0, 0.0
    kl_moment, total, kl = 0.0, 0.0, 0.0
    look = tl.minimum(row.vocab, BLOCK)
    again = row.vocab > 0
    while again:
        z_max, r_max = _maxima(row, look, PAIR, HAS_SET, IDS, BLOCK)
        log_ratio = 0.0
        if WITH_LOSS:
            guess = _sums(
                row, z_max, r_max, log_ratio, look, LOSS, PAIR, False, False, False, False, HAS_SET, IDS, BLOCK, STAGES,
            ).statistics  # fmt: skip
            log_ratio = _log_ratio(guess.policy.sum, guess.reference.sum)
            log_ratio = tl.where(tl.abs(log_ratio) < 80.0, log_ratio, 0.0)
        sums = _sums(
            row, z_max, r_max, log_ratio, row.vocab, LOSS, PAIR, WITH_LOSS, ENTROPY, MOMENT, TOTAL, HAS_SET, IDS,
            BLOCK, STAGES,
        )  # fmt: skip
        s = sums.statistics
        z_sum, z_moment, r_sum = s.policy.sum, s.policy.moment, s.reference.sum
        kl_moment, total = s.kl_moment, s.policy_total
        if WITH_LOSS:
            # There is no estimate to correct where no kept entry has any p.
            log_error = tl.where(tl.abs(sums.log_error) < 1.0, sums.log_error, 0.0)
            if LOSS == REVERSE_KL:
                kl = sums.loss / (z_sum * tl.exp(-log_ratio)) - _phi(-log_error)
            else:
                kl = sums.loss / r_sum - _phi(log_error)
            kl = tl.where(kl < 0.0, 0.0, kl)
        again = (look < row.vocab) & (sums.good == 0)
        look = row.vocab
    policy, reference = ExpSum(z_max, z_sum, z_moment), empty_sum()
    policy_set, reference_set = empty_sum(), empty_sum()
    if HAS_SET:
        policy_set = _set_sum(row, row.z, IDS)
    if PAIR:
        reference = ExpSum(r_max, r_sum, 0.0)
        if HAS_SET:
            reference_set = _set_sum(
                row, row.r, IDS
            )  # for its diagnostics, and because NaN in there counts
    return Statistics(policy, reference, policy_set, reference_set, kl_moment, total), kl


@triton.jit
def _merged_sum(at, distance, slot, inside, scale, inverse_t):
    """An ExpSum of all shards."""
    top = tl.load(at + distance + slot, mask=inside, other=NOTHING)
    total = tl.load(at + distance + slot + 1, mask=inside, other=0.0)
    moment = tl.load(at + distance + slot + 2, mask=inside, other=0.0)
    merged = tl.max(tl.where(total == 0.0, NOTHING, top), 0)
    merged = tl.where(merged == NOTHING, 0.0, merged)
    factor = tl.where(total == 0.0, 0.0, tl.exp2((top - merged) * scale))
    moment = tl.where(factor == 0.0, 0.0, factor * (moment + total * ((top - merged) * inverse_t)))
    return ExpSum(merged, tl.sum(factor * total, 0), tl.sum(moment, 0)), top, total, factor


@triton.jit
def _gathered_statistics(gathered, stride, shards, scale, inverse_t, SHARDS: tl.constexpr):
    """All shards' statistics in rank order, merged; and z_y, r_y of a y that stays in part."""
    shard = tl.arange(0, SHARDS)
    inside = shard < shards
    distance = shard.to(tl.int64) * stride
    policy, top, total, factor = _merged_sum(gathered, distance, 0, inside, scale, inverse_t)
    reference, r_top, _, _ = _merged_sum(gathered, distance, 3, inside, scale, 0.0)
    policy_set, _, _, _ = _merged_sum(gathered, distance, 6, inside, scale, inverse_t)
    reference_set, _, _, _ = _merged_sum(gathered, distance, 9, inside, scale, 0.0)
    moments = tl.load(gathered + distance + 12, mask=inside, other=0.0)
    # In this order: where the reference is masked by the lowest number, x alone is almost too large.
    x = _moved(top, policy.max, r_top, reference.max)
    moved = factor * moments + factor * total * x * inverse_t
    moments = tl.where(factor == 0.0, 0.0, moved)
    kept = tl.load(gathered + distance + 14, mask=inside, other=0.0)
    totals = tl.load(gathered + distance + 13, mask=inside, other=0.0)
    totals = tl.where(kept == 0.0, 0.0, totals + kept * ((top - policy.max) * inverse_t))
    z_label = tl.sum(tl.load(gathered + distance + 5, mask=inside, other=0.0), 0)
    r_label = tl.sum(tl.load(gathered + distance + 11, mask=inside, other=0.0), 0)
    reference = ExpSum(reference.max, reference.sum, 0.0)
    reference_set = ExpSum(reference_set.max, reference_set.sum, 0.0)
    merged = Statistics(
        policy, reference, policy_set, reference_set, tl.sum(moments, 0), tl.sum(totals, 0)
    )
    return merged, z_label, r_label


@triton.jit
def _pack(to, s, z_label, r_label, kept):
    """A shard's statistics as they travel: layout 1 of docs/sharded.md."""
    tl.store(to + 0, s.policy.max)
    tl.store(to + 1, s.policy.sum)
    tl.store(to + 2, s.policy.moment)
    tl.store(to + 3, s.reference.max)
    tl.store(to + 4, s.reference.sum)
    tl.store(to + 5, z_label)
    tl.store(to + 6, s.policy_set.max)
    tl.store(to + 7, s.policy_set.sum)
    tl.store(to + 8, s.policy_set.moment)
    tl.store(to + 9, s.reference_set.max)
    tl.store(to + 10, s.reference_set.sum)
    tl.store(to + 11, r_label)
    tl.store(to + 12, s.kl_moment)
    tl.store(to + 13, s.policy_total)
    tl.store(to + 14, kept)


@triton.jit
def _known(c, loss, active, scale, LOSS: tl.constexpr):
    """The coefficients with what came later: the loss, NL's active tokens, the factor on the gradient."""
    weight, set_value = c.weight, c.set_value
    if LOSS == NEGATIVE_LIKELIHOOD:
        weight, set_value = c.weight * active, active
    return Coefficients(
        c.policy_max, c.policy_inverse, c.policy_log_sum, c.reference_max, c.reference_inverse, c.offset,
        c.kl_centre, c.set_offset, c.set_centre, set_value, c.kept_max, weight, c.bias, loss, scale,
    )  # fmt: skip


@triton.jit
def _save(to, c):
    tl.store(to + 0, c.policy_max)
    tl.store(to + 1, c.policy_inverse)
    tl.store(to + 2, c.policy_log_sum)
    tl.store(to + 3, c.reference_max)
    tl.store(to + 4, c.reference_inverse)
    tl.store(to + 5, c.offset)
    tl.store(to + 6, c.kl_centre)
    tl.store(to + 7, c.set_offset)
    tl.store(to + 8, c.set_centre)
    tl.store(to + 9, c.set_value)
    tl.store(to + 10, c.kept_max)
    tl.store(to + 11, c.weight)
    tl.store(to + 12, c.bias)
    tl.store(to + 13, c.loss)
    tl.store(to + 14, c.scale)


@triton.jit
def _saved(at):
    return Coefficients(
        tl.load(at + 0), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
        tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9), tl.load(at + 10), tl.load(at + 11),
        tl.load(at + 12), tl.load(at + 13), tl.load(at + 14),
    )  # fmt: skip


@triton.jit
def _diagnose(
    diagnostics,
    rows,
    index,
    row,
    s,
    c,
    loss,
    z_label,
    r_label,
    invalid,
    partial,
    PAIR: tl.constexpr,
    NEGATIVE: tl.constexpr,
):
    """RowStats: loss, kl, negative mass, reference's negative mass, entropy."""
    nan = float("nan")
    every = merge(s.policy, s.policy_set, row.scale, row.inverse_t)
    entropy = c.policy_log_sum - every.moment / every.sum
    mass = tl.full([], 0.0, tl.float32)
    ref_mass, kl = mass + nan, mass + nan
    if NEGATIVE:
        mass = share(s.policy_set, every, row.scale)
    if PAIR:
        kl, ref_mass = loss, mass * 0.0
        if NEGATIVE:  # q itself: without κ on a y that stays in part
            at_label = ExpSum(r_label, tl.where(partial & (r_label > -float("inf")), 1.0, 0.0), 0.0)
            without = ExpSum(r_label, at_label.sum * -(tl.exp(row.log_kappa) - 1.0), 0.0)
            label_mass = tl.exp2((z_label - c.policy_max) * row.scale) * c.policy_inverse
            mass += tl.where(partial, label_mass, 0.0)
            marked = merge(s.reference_set, at_label, row.scale, 0.0)
            everything = merge(
                merge(s.reference, s.reference_set, row.scale, 0.0), without, row.scale, 0.0
            )
            ref_mass = share(marked, everything, row.scale)
        ref_mass = tl.where(has_reference(s), ref_mass, nan)
    none = invalid | (has_policy(s) == 0)
    at = diagnostics + index
    tl.store(at, loss)
    tl.store(at + rows, tl.where(none, nan, kl))
    tl.store(at + 2 * rows, tl.where(none, nan, mass))
    tl.store(at + 3 * rows, tl.where(none, nan, ref_mass))
    tl.store(at + 4 * rows, tl.where(none, nan, entropy))


# ------------------------------------------------------------------------------------------------------------ a row


@triton.jit
def _run(
    row, index, rows, row_factor, scale, set_size, ids_here, invalid, vocab_size, eps, nl_floor, losses, diagnostics,
    saved, upstream, upstream_stride, statistics, gathered, gathered_stride, shards, partial_sums, total_sums,
    LOSS: tl.constexpr, NEGATIVE: tl.constexpr, IDS: tl.constexpr, UNIFORM: tl.constexpr, GRADIENT: tl.constexpr,
    KIND: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, SHARDS: tl.constexpr,
):  # fmt: skip
    PAIR: tl.constexpr = LOSS == FORWARD_KL or LOSS == REVERSE_KL
    HAS_SET: tl.constexpr = NEGATIVE or LOSS == LOG_LIKELIHOOD
    ENTROPY: tl.constexpr = diagnostics is not None
    SMOOTH: tl.constexpr = UNIFORM and PAIR
    ONE_READ: tl.constexpr = KIND == FUSED and PAIR and not GRADIENT and not UNIFORM
    nothing = row_factor == 0.0
    if LOSS == NONE:
        nothing = row_factor == row_factor
    scale = tl.where(nothing, 0.0, scale)
    partial = row.log_kappa < 0.0

    if KIND == BACKWARD:
        c = _saved(saved + index * 16)
        asked = tl.load(upstream + index * upstream_stride)
        # A row that does not count or that nobody asks about is 0, whatever the other factor is.
        scale = tl.where((c.scale == 0.0) | (asked == 0.0), 0.0, c.scale * asked)
        if (scale == 0.0) | (scale != scale):
            _fill(row, scale, BLOCK)
        else:
            _second_pass(
                row,
                c,
                scale,
                eps,
                nl_floor,
                vocab_size,
                LOSS,
                UNIFORM,
                HAS_SET,
                IDS,
                True,
                BLOCK,
                STAGES,
            )
    elif LOSS == NONE and diagnostics is None:
        if losses is not None:
            tl.store(losses + index, tl.where(invalid, float("nan"), 0.0))
        if partial_sums is not None:
            tl.store(partial_sums + index * 2, tl.where(invalid, float("nan"), 0.0))
            tl.store(partial_sums + index * 2 + 1, 0.0)
        if GRADIENT:
            _fill(row, tl.where(invalid, float("nan"), 0.0), BLOCK)
        if saved is not None:
            tl.store(saved + index * 16 + 14, 0.0)
    else:
        z_label, r_label = 0.0, 0.0
        if KIND == PARTIAL_SUMS or KIND == FINISH:
            s, z_label, r_label = _gathered_statistics(
                gathered + index * 15, gathered_stride, shards, row.scale, row.inverse_t, SHARDS
            )
            kl = 0.0
        else:
            s, kl = _local_statistics(
                row, LOSS, PAIR, ONE_READ, ENTROPY, UNIFORM, HAS_SET, IDS, BLOCK, STAGES
            )
            if PAIR and NEGATIVE:
                z_label = tl.load(row.z + row.partial, mask=row.partial >= 0, other=0.0).to(
                    tl.float32
                )
                r_label = tl.load(row.r + row.partial, mask=row.partial >= 0, other=0.0).to(
                    tl.float32
                )
        if KIND == STATISTICS:
            here = ids_here
            if HAS_SET:
                here += tl.where(row.set_label >= 0, 1.0, 0.0)
            _pack(statistics + index * 15, s, z_label, r_label, row.vocab - here)
        else:
            c = coefficients(s, row.scale, row.inverse_t, eps, set_size, vocab_size, LOSS, UNIFORM)
            loss, active, part = c.loss, set_size, 0.0
            # ---- the rest of the loss, and the gradient where nothing is missing
            if KIND == FINISH:
                if total_sums is not None:
                    loss += tl.load(total_sums + index * 2)
                    active = tl.load(total_sums + index * 2 + 1)
                if upstream is not None:
                    asked = tl.load(upstream + index * upstream_stride)
                    scale = tl.where((scale == 0.0) | (asked == 0.0), 0.0, scale * asked)
            elif LOSS == NEGATIVE_LIKELIHOOD:
                part, active = _set_loss(row, c, nl_floor, LOSS, IDS)
                loss += part
                if (
                    KIND == PARTIAL_SUMS and GRADIENT
                ):  # there is no floor: all are active, those of other shards too
                    active = set_size
            c = _known(c, loss, active, scale, LOSS)
            if SMOOTH and LOSS == REVERSE_KL:  # its gradient needs the loss first
                if KIND != FINISH:
                    part = _second_pass(
                        row,
                        c,
                        scale,
                        eps,
                        nl_floor,
                        vocab_size,
                        LOSS,
                        UNIFORM,
                        HAS_SET,
                        IDS,
                        False,
                        BLOCK,
                        STAGES,
                    )
                    loss += part
                    c = _known(c, loss, active, scale, LOSS)
                if GRADIENT and KIND != PARTIAL_SUMS:
                    _second_pass(
                        row,
                        c,
                        scale,
                        eps,
                        nl_floor,
                        vocab_size,
                        LOSS,
                        UNIFORM,
                        HAS_SET,
                        IDS,
                        True,
                        BLOCK,
                        STAGES,
                    )
            elif ONE_READ:  # the KL over the kept entries, and what the set adds; 0 · c.loss is NaN without a target
                odds = log_odds(s, row.inverse_t)
                if LOSS == FORWARD_KL:
                    loss = kl + _softplus(odds) + 0.0 * c.loss
                else:
                    log_norm = _log1p(eps * set_size)
                    kept, target = tl.exp(-_softplus(odds)), tl.exp(-log_norm)
                    element = reverse_kl_element(kept, target, log_norm - _softplus(odds), 0.0)
                    loss = element.loss + tl.where(kept == 0.0, 0.0, kept * kl) + 0.0 * c.loss
                    if NEGATIVE:
                        loss += _set_loss(row, c, nl_floor, LOSS, IDS)[0]
                c = _known(c, loss, active, scale, LOSS)
            elif (PAIR and KIND != FINISH) or GRADIENT:
                more = _second_pass(
                    row,
                    c,
                    scale,
                    eps,
                    nl_floor,
                    vocab_size,
                    LOSS,
                    UNIFORM,
                    HAS_SET,
                    IDS,
                    GRADIENT,
                    BLOCK,
                    STAGES,
                )
                if PAIR and KIND != FINISH:
                    part = more
                    loss += more
            loss = tl.where(invalid, float("nan"), loss)
            # ---- where the loss is undefined, or infinite without a finite gradient, the whole row is NaN
            lost = loss != loss
            if LOSS == REVERSE_KL or LOSS == UNLIKELIHOOD:
                lost = lost | (loss == float("inf"))
            if LOSS == REVERSE_KL and not UNIFORM:
                lost = lost | (tl.abs(c.kl_centre) == float("inf")) | (c.kl_centre != c.kl_centre)
            if KIND == PARTIAL_SUMS:
                tl.store(partial_sums + index * 2, tl.where(invalid, float("nan"), part))
                tl.store(partial_sums + index * 2 + 1, active)
            if GRADIENT:
                if lost | (scale == 0.0):
                    _fill(row, tl.where(scale == 0.0, 0.0, float("nan")), BLOCK)
            if saved is not None:
                _save(
                    saved + index * 16,
                    _known(
                        c, loss, 1.0, tl.where(lost & (scale != 0.0), float("nan"), scale), NONE
                    ),
                )
            if losses is not None:
                tl.store(losses + index, tl.where(nothing & (invalid == 0), 0.0, row_factor * loss))
            if diagnostics is not None:
                if KIND == FUSED or KIND == FINISH:
                    _diagnose(
                        diagnostics,
                        rows,
                        index,
                        row,
                        s,
                        c,
                        loss,
                        z_label,
                        r_label,
                        invalid,
                        partial,
                        PAIR,
                        NEGATIVE,
                    )


@triton.jit
def _row(
    index, logits, logits_stride, ref_logits, ref_stride, labels, weights, factors, ids, ids_stride, ids_count, id_map,
    rows, vocab, vocab_offset, vocab_size, eps, nl_floor, scale, inverse_t, ignore_index, losses, diagnostics, saved,
    gradient, gradient_stride, upstream, upstream_stride, statistics, gathered, gathered_stride, shards, partial_sums,
    total_sums, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr, UNIFORM: tl.constexpr, IDS: tl.constexpr,
    KIND: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, SHARDS: tl.constexpr,
):  # fmt: skip
    label = tl.load(labels + index)
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + index)
    g_row = logits
    if GRADIENT:
        g_row = gradient + index * gradient_stride
    z_row = logits + index * logits_stride
    r_row = z_row
    if ref_logits is not None:
        r_row = ref_logits + index * ref_stride
    id_row = labels
    if IDS != NO_IDS:
        id_row = ids + index * ids_stride
    maps = labels
    if IDS == SHARED_IDS:
        maps = id_map

    if (weight == 0.0) | (label == ignore_index):
        if GRADIENT:
            nothing = Row(
                z_row, r_row, g_row, vocab, 0, 0, 0, 0.0, id_row, 0, maps, scale, inverse_t
            )
            _fill(nothing, 0.0, BLOCK)
        if losses is not None:
            tl.store(losses + index, 0.0)
        if saved is not None:
            if KIND != BACKWARD:
                tl.store(saved + index * 16 + 14, 0.0)
        if partial_sums is not None:
            tl.store(partial_sums + index * 2, 0.0)
            tl.store(partial_sums + index * 2 + 1, 0.0)
        if diagnostics is not None:
            if KIND == FUSED or KIND == FINISH:
                tl.store(diagnostics + index, 0.0)
                for k in tl.static_range(1, 5):
                    tl.store(diagnostics + index + k * rows, float("nan"))
    else:
        negative = weight < 0.0
        invalid = (label < 0) | (label >= vocab_size)
        set_size, ids_here, among = 0.0, 0.0, False
        if IDS != NO_IDS:
            last = tl.load(id_row + ids_count - 1)
            negative = negative | (last >= 0)
            invalid = invalid | (tl.load(id_row) < -1) | (last >= vocab_size)
            found = 0
            everything = Row(
                z_row, r_row, g_row, vocab, 0, 0, 0, 0.0, id_row, ids_count, maps, scale, inverse_t
            )
            for at in range(0, ids_count, GATHER):
                columns, counts, _ = _set_chunk(everything, at)
                set_size += tl.sum(tl.where(counts, 1.0, 0.0), 0)
                inside = (columns >= vocab_offset) & (columns < vocab_offset + vocab)
                ids_here += tl.sum(tl.where(counts & inside, 1.0, 0.0), 0)
                found = tl.maximum(found, tl.max(tl.where(counts & (columns == label), 1, 0), 0))
            among = found != 0
        column = (tl.where(invalid, 0, label) - vocab_offset).to(tl.int32)
        here = (column >= 0) & (column < vocab)
        pushed = (weight < 0.0) & (among == 0)
        row_factor, factor = row_factors(factors, index, weight, negative, inverse_t, NEGATIVE)
        if negative:
            KL: tl.constexpr = NEGATIVE == FORWARD_KL or NEGATIVE == REVERSE_KL
            in_part = pushed & (weight > -1.0) & KL
            own = pushed & (in_part == 0)
            row = Row(
                z_row, r_row, g_row, vocab, vocab_offset, tl.where(own & here, column, -1),
                tl.where(in_part & here, column, -1), tl.where(in_part, _log1p(weight + 0.0), 0.0), id_row, ids_count,
                maps, scale, inverse_t,
            )  # fmt: skip
            _run(
                row, index, rows, row_factor, factor, set_size + tl.where(own, 1.0, 0.0), ids_here, invalid,
                vocab_size, eps, nl_floor, losses, diagnostics, saved, upstream, upstream_stride, statistics, gathered,
                gathered_stride, shards, partial_sums, total_sums, NEGATIVE, True, IDS, UNIFORM, GRADIENT, KIND, BLOCK,
                STAGES, SHARDS,
            )  # fmt: skip
        else:
            own = here & (POSITIVE == LOG_LIKELIHOOD)
            row = Row(
                z_row, r_row, g_row, vocab, vocab_offset, tl.where(own, column, -1), -1, 0.0, id_row, 0, maps, scale,
                inverse_t,
            )  # fmt: skip
            _run(
                row, index, rows, row_factor, factor, 0.0 * scale, 0.0 * scale, invalid, vocab_size, eps, nl_floor,
                losses, diagnostics, saved, upstream, upstream_stride, statistics, gathered, gathered_stride, shards,
                partial_sums, total_sums, POSITIVE, False, NO_IDS, UNIFORM, GRADIENT, KIND, BLOCK, STAGES, SHARDS,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "rows",
        "ids_stride",
        "ids_count",
        "ignore_index",
        "upstream_stride",
        "shards",
    ]
)
def row_kernel(
    logits, logits_stride, ref_logits, ref_stride, labels, weights, factors, ids, ids_stride, ids_count, id_map, rows,
    vocab, vocab_offset, vocab_size, eps, nl_floor, scale, inverse_t, ignore_index, losses, diagnostics, saved,
    gradient, gradient_stride, upstream, upstream_stride, statistics, gathered, gathered_stride, shards, partial_sums,
    total_sums, left, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr, UNIFORM: tl.constexpr, IDS: tl.constexpr,
    KIND: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, SHARDS: tl.constexpr,
):  # fmt: skip
    """One row a program. Tensors and scalars are those of _call.py; ``scale`` is log2(e)/T, ``factors`` a ``Factors``.

    ``left``, where it is given, says which rows are wanted: those that ``kl_kernel`` left. A program then looks at
    many rows, of which few are.
    """
    if left is None:
        _row(
            tl.program_id(0).to(tl.int64),
            logits, logits_stride, ref_logits, ref_stride, labels, weights, factors, ids, ids_stride, ids_count,
            id_map, rows, vocab, vocab_offset, vocab_size, eps, nl_floor, scale, inverse_t, ignore_index, losses,
            diagnostics, saved, gradient, gradient_stride, upstream, upstream_stride, statistics, gathered,
            gathered_stride, shards, partial_sums, total_sums, POSITIVE, NEGATIVE, UNIFORM, IDS, KIND, GRADIENT, BLOCK,
            STAGES, SHARDS,
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
                            index,
                            logits, logits_stride, ref_logits, ref_stride, labels, weights, factors, ids, ids_stride,
                            ids_count, id_map, rows, vocab, vocab_offset, vocab_size, eps, nl_floor, scale, inverse_t,
                            ignore_index, losses, diagnostics, saved, gradient, gradient_stride, upstream,
                            upstream_stride, statistics, gathered, gathered_stride, shards, partial_sums, total_sums,
                            POSITIVE, NEGATIVE, UNIFORM, IDS, KIND, GRADIENT, BLOCK, STAGES, SHARDS,
                        )  # fmt: skip


# -------------------------------------------------------------------------------------------------- around the rows


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def inverse_normalizer_kernel(
    labels,
    weights,
    normalizer,
    normalizer_value,
    out,
    rows,
    ignore_index,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 / normaliser, 0 for a normaliser of 0; COUNT: of the number of rows with a non-zero weight."""
    if COUNT:
        counts = tl.zeros([BLOCK], tl.int32)
        for start in range(0, rows, BLOCK):
            i = start + tl.arange(0, BLOCK)
            active = (i < rows) & (tl.load(labels + i, mask=i < rows, other=0) != ignore_index)
            if weights is not None:
                active = active & (tl.load(weights + i, mask=i < rows, other=0.0) != 0.0)
            counts += active.to(tl.int32)
        value = tl.sum(counts, 0).to(tl.float32)
    elif normalizer is not None:
        value = tl.load(normalizer)
    else:
        value = normalizer_value + 0.0
    tl.store(out, tl.where(value == 0.0, 0.0, 1.0 / value))


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(losses, inverse_normalizer, out, rows, BLOCK: tl.constexpr):
    """Σ losses / normaliser, always in the same order."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(losses + i, mask=i < rows, other=0.0)
    factor = 1.0
    if inverse_normalizer is not None:
        factor = tl.load(inverse_normalizer)
    tl.store(out, tl.where(factor == 0.0, 0.0, tl.sum(total, 0) * factor))


@triton.jit(do_not_specialize=["rows"])
def scale_kernel(gradient, stride, factor, rows, vocab, BLOCK: tl.constexpr):
    """Multiplies in place, unless the factor is 1: then it does not even look."""
    by = tl.load(factor)
    if by != 1.0:
        tiles = tl.cdiv(vocab, BLOCK)
        for k in range(tl.program_id(0), tiles.to(tl.int64) * rows, tl.num_programs(0)):
            v = (k % tiles).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
            at = gradient + (k // tiles) * stride + v
            x = tl.load(at, mask=v < vocab).to(tl.float32) * by
            tl.store(at, x.to(gradient.dtype.element_ty), mask=v < vocab)
