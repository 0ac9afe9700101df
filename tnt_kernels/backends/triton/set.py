"""A row's removed ids: a bit for each column, which passes over the row look at, and a list, which is gathered."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from tnt_kernels.backends.triton.objectives import INF, LogSum, log_sum
from tnt_kernels.backends.triton.reading import gather

# How ids come.
NO_IDS = tl.constexpr(0)
ROW_IDS = tl.constexpr(1)  # a list a row
SHARED_IDS = tl.constexpr(2)  # one list


class Ids(NamedTuple):
    """Of a row, in ascending order, with duplicates, with -1 and with numbers beyond the vocabulary."""

    list: tl.tensor  # pointer
    count: tl.tensor
    bits: tl.tensor  # pointer to bytes: a bit for every column, 1 where it is among the ids
    offset: tl.tensor  # vocabulary id of column 0


@triton.jit(do_not_specialize=["count", "ids_stride", "begin", "step", "bits_stride", "offset"])
def mark_kernel(
    ids, ids_stride, count, begin, step, bits, bits_stride, vocab, offset, GROUP: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Sets the bits of ids, those of columns counted from the boundary before a row, as passes over it count them.

    A program marks some ids of a row, whose first column is begin + row step, modulo a vector's GROUP. ``offset`` is
    the id of that column.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    some = tl.load(ids + row * ids_stride + k, mask=k < count, other=-1) - offset
    v = some + ((begin + row * step) % GROUP).to(tl.int32)
    inside = (some >= 0) & (some < vocab)
    tl.atomic_or(bits + row * bits_stride + v // 32, 1 << (v % 32), mask=inside, sem="relaxed")


@triton.jit
def some_ids(ids, count, at, SOME: tl.constexpr):
    """Of a row's ascending ids, and which of them count: no padding, no duplicates."""
    k = at + tl.arange(0, SOME)
    some = tl.load(ids + k, mask=k < count, other=-1)
    before = tl.load(ids + k - 1, mask=(k > 0) & (k < count), other=-1)
    return some, (some >= 0) & (some != before)


@triton.jit
def some_columns(ids, vocab, at, SOME: tl.constexpr):
    """Of these, the columns of those that lie here, and which do."""
    some, counts = some_ids(ids.list, ids.count, at, SOME)
    v = some - ids.offset
    return v, counts & (v >= 0) & (v < vocab)


@triton.jit
def count_ids(ids, vocab, label, CHUNK: tl.constexpr):
    """How many there are, and of these here; and whether the label, of the whole vocabulary, is among them."""
    all_counts = tl.zeros([CHUNK], tl.float32)
    counts_here = all_counts
    hits = tl.zeros([CHUNK], tl.int32)
    for start in range(0, ids.count, CHUNK):
        some, counts = some_ids(ids.list, ids.count, start, CHUNK)
        v = some - ids.offset
        all_counts += tl.where(counts, 1.0, 0.0)
        counts_here += tl.where(counts & (v >= 0) & (v < vocab), 1.0, 0.0)
        hits = hits | tl.where(counts & (some == label), 1, 0)
    return tl.sum(all_counts, 0), tl.sum(counts_here, 0), tl.max(hits, 0) != 0


@triton.jit
def sum_of_set(
    elements, origin, begin, vocab, label, ids, scale, CHUNK: tl.constexpr, IDS: tl.constexpr
):
    """Of a row's removed entries, which are given as ``gather`` takes them; ``label`` is one of them or -1."""
    has_label = label >= 0
    own = gather(elements, origin, label, has_label, -INF)
    top = own
    worst = tl.where(has_label & ((own < INF) == 0), 1.0, 0.0)
    if IDS != NO_IDS:
        tops = tl.zeros([CHUNK], tl.float32) - INF
        worsts = tl.zeros([CHUNK], tl.float32)
        for start in range(0, ids.count, CHUNK):
            x, here = _gathered(elements, origin, begin, vocab, ids, start, CHUNK)
            tops = tl.maximum(tops, x)
            worsts += tl.where(here & ((x < INF) == 0), 1.0, 0.0)
        top = tl.maximum(top, tl.max(tops, 0))
        worst += tl.sum(worsts, 0)
    top = tl.where(tl.abs(top) < INF, top, 0.0)
    at = (own - top) * scale
    total = tl.where(has_label, tl.exp2(at), 0.0)
    moment = tl.where(total == 0.0, 0.0, total * at)
    if IDS != NO_IDS:
        totals = tl.zeros([CHUNK], tl.float32)
        moments = totals
        for start in range(0, ids.count, CHUNK):
            x, here = _gathered(elements, origin, begin, vocab, ids, start, CHUNK)
            ats = (x - top) * scale
            weights = tl.exp2(ats)
            totals += weights
            moments += tl.where(weights == 0.0, 0.0, weights * ats)
        total += tl.sum(totals, 0)
        moment += tl.sum(moments, 0)
    found = log_sum(top, total, moment)
    return LogSum(top, tl.where(worst > 0.0, float("nan"), found.log), found.entropy)


@triton.jit
def _gathered(elements, origin, begin, vocab, ids, start, CHUNK: tl.constexpr):
    """Some of the set's logits: -inf where there is none, or none here."""
    v, here = some_columns(ids, vocab, start, CHUNK)
    if origin is not None:
        origin += begin
    return gather(elements + begin, origin, v, here, -INF), here


@triton.jit
def negative_likelihood_of_set(
    elements, origin, begin, vocab, label, ids, ref, log_all, least, floor, inverse_t, CHUNK: tl.constexpr,
    IDS: tl.constexpr,
):  # fmt: skip
    """Σ max(log p_s, floor), and how many are not below it."""
    own = gather(elements, origin, label, label >= 0, -INF)
    loss, active = _negative_likelihood(own, label >= 0, ref, log_all, least, floor, inverse_t)
    if IDS != NO_IDS:
        losses = tl.zeros([CHUNK], tl.float32)
        actives = losses
        for start in range(0, ids.count, CHUNK):
            z, here = _gathered(elements, origin, begin, vocab, ids, start, CHUNK)
            some, pushed = _negative_likelihood(z, here, ref, log_all, least, floor, inverse_t)
            losses += some
            actives += pushed
        loss += tl.sum(losses, 0)
        active += tl.sum(actives, 0)
    return loss, active


@triton.jit
def _negative_likelihood(z, here, ref, log_all, least, floor, inverse_t):
    log_weight = (z - ref) * inverse_t
    at_rest = log_weight < least
    log_p = tl.where(log_weight == -INF, log_weight, log_weight - log_all)
    loss = tl.where(at_rest, floor, log_p)
    return tl.where(here, loss, 0.0), tl.where(here & (at_rest == 0), 1.0, 0.0)
