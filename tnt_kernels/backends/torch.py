"""Plain PyTorch, on any device: the fallback, slow and generous with memory.

docs/numerics.md derives the formulas and has the names. An entry, a shard and a whole row are all parts of a row, and
one function merges parts into a larger one: entries into a shard, shards into a row, and into that a y with -1 < w < 0.
Everything of a row is (N, 1), everything of its entries (N, V), in the dtype of the arithmetic. Both sides' losses are
computed on all rows and then chosen from: to pick the rows out would wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels._call import Kind, RowCall, active_rows, real_dtype
from tnt_kernels.backends.protocol import check_indices, scale_by_item
from tnt_kernels.objectives import RowLoss


def why_not(logits: Tensor | None) -> str:
    """Why this backend cannot serve these logits: it serves all."""
    return ""


def scale_(gradient: Tensor, scale: Tensor) -> None:
    if gradient.device.type == "cpu":
        scale_by_item(gradient, scale)
    else:
        gradient.mul_(scale)


# --- parts of a row -----------------------------------------------------------------------------------------------

#: Log-ratios beyond are far: e^d and its product with a share are numbers below.
FAR = 32.0


def _gap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a − b, and what rounding took from it, exactly."""
    gap = a - b
    back = gap - a
    return gap, (a - (gap - back)) - (b + back)


def _difference(o: Tensor, x: Tensor, o_ref: Tensor, x_ref: Tensor) -> Tensor:
    """(o − x) − (o_ref − x_ref), (N, parts), with references (N, 1): all digits of it, and 0 where o is x.

    Where a difference of the two sides is infinite, it is taken on each side alone.
    """
    (gap, rest), (ref_gap, ref_rest) = _gap(o, x), _gap(o_ref, x_ref)
    exact = (gap - ref_gap) + (rest - ref_rest)
    return torch.where(exact.isfinite(), exact, (o - o_ref) - (x - x_ref))


def _phi(d: Tensor) -> Tensor:
    """φ(d) = e^d − 1 − d: next to 0 the closed form has no digit left, so its series is summed."""
    last = 19 if d.dtype == torch.float64 else 11
    total = torch.full_like(d, 1 / math.factorial(last))
    for k in reversed(range(2, last)):
        total = torch.add(1 / math.factorial(k), total * d)
    return torch.where(d.abs() < 1, d * d * total, d.expm1() - d)


def _normalised(level: Tensor, log: Tensor) -> Tensor:
    """softmax(level), given the log of its sum, up to rounding: torch.softmax adds up with less care than torch.sum."""
    share = (level - log).exp()
    return share / share.sum(-1, keepdim=True)


class _LogSum(NamedTuple):
    """log Σ e^(x/T) = ref/T + log, of parts of a row, (N, parts) each."""

    ref: Tensor  # near the maximum: finite unless the part is an entry, which is its own reference
    log: Tensor  # -inf where there is nothing
    entropy: Tensor  # of softmax(x/T) within the part

    @staticmethod
    def of(x: Tensor, among: Tensor, log_weight: float | Tensor = 0.0) -> _LogSum:
        """Of entries, those ``among`` alone, with a weight each."""
        nothing = torch.zeros_like(x)
        return _LogSum(x, (nothing + log_weight).masked_fill(~among, -math.inf), nothing)

    def joined(self, other: _LogSum) -> _LogSum:
        return _LogSum(*(torch.cat(x, -1) for x in zip(self, other, strict=True)))

    def relative_to(self, ref: Tensor, t: float) -> Tensor:
        """The logs with another reference."""
        log = self.log + (self.ref - ref) / t
        return log.masked_fill(self.log == -math.inf, -math.inf)

    def merged(self, t: float) -> _LogSum:
        """(N, 1): of all parts."""
        known = self.ref.isfinite() & (self.log != -math.inf)
        # The further column is for rows without parts.
        refs = F.pad(self.ref.masked_fill(~known, -math.inf), (0, 1), value=-math.inf)
        ref = refs.amax(-1, keepdim=True)
        ref = ref.masked_fill(ref == -math.inf, 0.0)
        level = self.relative_to(ref, t)
        log = level.logsumexp(-1, keepdim=True)
        share = _normalised(level, log)
        entropy = (share * (self.entropy - (level - log))).masked_fill(share == 0, 0.0)
        nothing = log == -math.inf
        return _LogSum(ref, log, entropy.sum(-1, keepdim=True).masked_fill(nothing, 0.0))

    def shares(self, x: Tensor, t: float) -> Tensor:
        """(N, V): of the entries ``x`` in a whole, (N, 1)."""
        return ((x - self.ref) / t).exp() * self.log.neg().exp()


def _log_odds(part: _LogSum, rest: _LogSum, t: float) -> Tensor:
    """(N, 1): from the two sums alone, right for shares near 0 and near 1."""
    odds = (part.ref - rest.ref) / t + (part.log - rest.log)
    odds = odds.masked_fill(rest.log == -math.inf, math.inf)
    return odds.masked_fill(part.log == -math.inf, -math.inf)


def _compared(
    base: _LogSum, other: _LogSum, log_ratio: Tensor, kl: Tensor, t: float
) -> tuple[_LogSum, _LogSum, Tensor, Tensor]:
    """The parts of a KL merged: its two sides, ``log_ratio`` and ``kl`` as ``_Statistics`` has them, (N, 1) each."""
    # The slot of the other's own log is rounded, which would show next to p = q.
    both = base.log.isfinite() & other.log.isfinite()
    other = other._replace(log=torch.where(both, base.log + log_ratio, other.log))
    all_base, all_other = base.merged(t), other.merged(t)
    y = log_ratio + _difference(other.ref, base.ref, all_other.ref, all_base.ref) / t
    share = _normalised(base.relative_to(all_base.ref, t), all_base.log)
    other_level = other.relative_to(all_other.ref, t) - all_base.log
    # Rounded to eighths, it is 0 next to p = q, whatever the sums round. Then y is centred by what it leaves of A: next
    # to 0, that is as exact as y. Centred again, Φ is the KL itself, and A is what the centre rounds.
    total = ((all_other.log - all_base.log) * 8).round() / 8
    for _ in range(2):
        d = y - total
        near = (d.abs() < FAR) & (share > 0)
        excess = torch.where(near, share * d.expm1(), (other_level - total).exp() - share)
        more = excess.sum(-1, keepdim=True).log1p()
        total = total + more
    far = excess + (share * (kl - d)).masked_fill(share == 0, 0.0)
    phi = torch.where(near, share * (_phi(d) + kl), far).sum(-1, keepdim=True)
    all_kl = (phi - _phi(more)).clamp_min(0.0)
    no_base, no_other = all_base.log == -math.inf, all_other.log == -math.inf
    total = total.masked_fill(no_other, -math.inf).masked_fill(no_base, 0.0)
    return (
        all_base,
        all_other,
        total,
        all_kl.masked_fill(no_other, math.inf).masked_fill(no_base, 0.0),
    )


class _Statistics(NamedTuple):
    """Of parts of a row, (N, parts) each, in the order in which they travel.

    K: the columns outside the row's set, and in a KL without a y that is pushed down in part.
    """

    policy: _LogSum  # over K
    reference: _LogSum  # over K; its entropy does not travel
    label_policy: Tensor  # z_y of a y that a KL pushes down in part, where this part has it; else 0
    policy_set: _LogSum
    reference_set: _LogSum  # its entropy does not travel
    label_reference: Tensor  # r_y of that y
    #: Of the KL's base against its other within K: +inf where its base meets -inf
    kl: Tensor
    #: log Σ e^(o/T) − log Σ e^(x/T) − (o_ref − x_ref)/T over K, x the base's logits and o the other's: 0 without the
    #: base, -inf without the other alone. Of LL Σ (z − policy.ref)/T over K.
    log_ratio: Tensor
    kept: Tensor  # columns in K

    def packed(self) -> Tensor:
        """(N, ROW_STATISTICS) of one part."""
        return torch.cat(
            (
                *self.policy, *self.reference[:2], self.label_policy, *self.policy_set,
                *self.reference_set[:2], self.label_reference, self.kl, self.log_ratio, self.kept,
            ),
            dim=-1,
        )  # fmt: skip

    @staticmethod
    def unpacked(shards: Tensor) -> _Statistics:
        """Of (S, N, ROW_STATISTICS)."""
        c = [x.t() for x in shards.unbind(-1)]
        nothing = torch.zeros_like(c[0])
        return _Statistics(
            _LogSum(*c[:3]), _LogSum(c[3], c[4], nothing), c[5], _LogSum(*c[6:9]),
            _LogSum(c[9], c[10], nothing), *c[11:],
        )  # fmt: skip

    def merged(self, loss: RowLoss, t: float) -> _Statistics:
        """(N, 1): of all parts."""
        if loss is RowLoss.FORWARD_KL:
            reference, policy, log_ratio, kl = _compared(
                self.reference, self.policy, self.log_ratio, self.kl, t
            )
        elif loss is RowLoss.REVERSE_KL:
            policy, reference, log_ratio, kl = _compared(
                self.policy, self.reference, self.log_ratio, self.kl, t
            )
        else:
            policy, reference = self.policy.merged(t), self.reference.merged(t)
            moved = self.log_ratio + self.kept * ((self.policy.ref - policy.ref) / t)
            log_ratio = moved.masked_fill(self.kept == 0, 0.0).sum(-1, keepdim=True)
            kl = torch.zeros_like(log_ratio)
        return _Statistics(
            policy, reference, self.label_policy.sum(-1, keepdim=True),
            self.policy_set.merged(t), self.reference_set.merged(t),
            self.label_reference.sum(-1, keepdim=True), kl, log_ratio,
            self.kept.sum(-1, keepdim=True),
        )  # fmt: skip


@dataclass(frozen=True)
class _Rows:
    """The inputs of a launch in one form."""

    z: Tensor  # (N, V)
    r: Tensor  # (N, V), zeros if no row's loss reads it
    active: Tensor  # (N, 1) bool: the others have weight 0
    invalid: Tensor  # (N, 1) bool: a label or an id is out of range
    negative_row: Tensor  # (N, 1) bool, whichever shard holds the negatives
    label: Tensor  # (N, V) bool: y
    negative: Tensor  # (N, V) bool: S
    removed: Tensor  # (N, V) bool: S without a y that is pushed down in part
    removed_count: Tensor  # (N, 1), over all shards
    set_count: Tensor  # (N, 1), of S, over all shards
    in_part: Tensor  # (N, 1) bool: y is pushed down in part, whichever shard holds it
    pushed_by: Tensor  # (N, 1): w of that y, else 0
    scale: Tensor  # (N, 1): w, or α (α |w| for NL and UL) on negative rows

    def set_of(self, loss: RowLoss) -> Tensor:
        """What a loss treats apart from the rest."""
        if loss is RowLoss.LOG_LIKELIHOOD:
            return self.label
        return self.removed if loss.reads_reference else self.negative

    def partial(self, loss: RowLoss) -> Tensor:
        """(N, V) bool: a y that a loss pushes down in part."""
        return self.label & self.in_part & loss.reads_reference


def _rows(call: RowCall) -> _Rows:
    t, s, real = call.tensors, call.scalars, real_dtype(call.logits)
    n, vocab = call.logits.shape
    active = active_rows(t.labels, t.weights, s.ignore_index)[:, None]
    w = t.labels.new_ones(n, dtype=real) if t.weights is None else t.weights
    w, labels = w[:, None], t.labels[:, None]
    invalid = active & ((labels < 0) | (labels >= call.vocab_size))
    z = call.logits.detach().to(real).masked_fill(~active, 0.0)
    r = torch.zeros_like(z)
    if t.ref_logits is not None:
        r = t.ref_logits.to(real).masked_fill(~active, 0.0)
        if call.differences:
            z = z + r

    def local(ids: Tensor) -> Tensor:
        """Global ids as columns; a further column takes those of other shards."""
        ids = ids - call.vocab_offset
        return torch.where((ids >= 0) & (ids < vocab), ids, vocab)

    def marked(ids: Tensor) -> Tensor:
        marks = torch.zeros(n, vocab + 1, dtype=torch.bool, device=z.device)
        return marks.scatter_(1, local(ids).expand(n, -1), True)[:, :vocab]

    label = marked(labels)
    pushed = (w < 0) & active
    named, count = torch.zeros_like(label), torch.zeros_like(labels)
    label_named = torch.zeros_like(pushed)
    if t.negative_ids is not None:
        ids = t.negative_ids if t.negative_ids.dim() == 2 else t.negative_ids[None]
        ids = ids.expand(n, -1)
        valid = (ids >= 0) & (ids < call.vocab_size)
        invalid = invalid | (active & (~valid & (ids != -1)).any(-1, keepdim=True))
        named = marked(ids.masked_fill(~valid, call.vocab_offset - 1))
        ordered = ids.masked_fill(~valid, -1).sort(-1).values
        first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
        count = (first & (ordered >= 0)).sum(-1, keepdim=True)
        label_named = (ids == labels).any(-1, keepdim=True)
    in_part = pushed & (w > -1) & ~label_named
    removed = named | (label & pushed & ~in_part)
    extra = pushed & ~label_named
    negative_row = active & ((count > 0) | pushed)
    alpha = w.new_tensor(s.alpha_value) if t.alpha is None else t.alpha[:, None]
    scale = torch.where(negative_row, alpha.expand_as(w), w)
    if s.sides[1].scaled_by_weight:
        scale = torch.where(pushed, scale * w.abs(), scale)
    return _Rows(
        z, r, active, invalid, negative_row, label, named | (label & pushed), removed,
        count + (extra & ~in_part), count + extra, in_part,
        torch.where(in_part, w, 0.0), scale.masked_fill(~active, 0.0),
    )  # fmt: skip


def _chosen(call: RowCall, rows: _Rows, value: Callable[[RowLoss], Tensor]) -> Tensor:
    """Of each row, the value under the loss of its side."""
    positive, negative = call.scalars.sides
    if positive == negative:
        return value(positive)
    return torch.where(rows.negative_row, value(negative), value(positive))


def _statistics(call: RowCall, rows: _Rows, loss: RowLoss) -> _Statistics:
    """(N, 1): of this shard, as one part."""
    z, r, in_set, partial = rows.z, rows.r, rows.set_of(loss), rows.partial(loss)
    kept, nothing = ~(in_set | partial), torch.zeros_like(rows.z)
    entries = _Statistics(
        _LogSum.of(z, kept), _LogSum.of(r, kept), z.masked_fill(~partial, 0.0),
        _LogSum.of(z, in_set), _LogSum.of(r, in_set), r.masked_fill(~partial, 0.0),
        nothing, nothing, kept.to(z),
    )  # fmt: skip
    return entries.merged(loss, call.scalars.temperature)


def _target_of_label(r: Tensor, in_part: Tensor, w: Tensor, t: float) -> _LogSum:
    """(N, 1): r_y + T log κ of a y that is pushed down in part.

    At its target z_y is about that sum, whose rounding would be the whole of their difference: what it loses is the
    log. T log κ takes float64, which not every device has: elsewhere that difference is off by 1e-7.
    """
    wide = torch.float64 if r.device.type in ("cpu", "cuda") else r.dtype
    shift = w.to(wide).log1p() * t
    rounded = shift.to(r.dtype)
    ref, rest = _gap(r, -rounded)
    log = (rest + (shift - rounded).to(r.dtype)) / t
    return _LogSum.of(ref, in_part, log.masked_fill(~log.isfinite(), 0.0))


# --- loss and gradient --------------------------------------------------------------------------------------------


class _Row:
    """A row under one loss, from the statistics of the whole vocabulary, and what its entries then have."""

    def __init__(self, call: RowCall, rows: _Rows, loss: RowLoss, kept: _Statistics) -> None:
        self.rows, self.kind, self.scalars = rows, loss, call.scalars
        self.t = t = call.scalars.temperature
        self.vocab_size = call.vocab_size
        self.eps = call.scalars.eps
        self.uniform = call.scalars.smooths_uniformly
        self.in_set = rows.set_of(loss)
        self.kept = kept  # without a y that is pushed down in part
        in_part = rows.in_part & loss.reads_reference
        self.label_policy = _LogSum.of(kept.label_policy, in_part)
        self.label_reference = _LogSum.of(kept.label_reference, in_part)
        self.label_target = _target_of_label(kept.label_reference, in_part, rows.pushed_by, t)
        sign = 1.0 if loss is RowLoss.REVERSE_KL else -1.0  # of the reference in a log-ratio
        nothing = torch.zeros_like(kept.kl)
        self.s = s = kept._replace(
            policy=kept.policy.joined(self.label_policy),
            reference=kept.reference.joined(self.label_target),
            kl=torch.cat((kept.kl, nothing), -1),
            log_ratio=torch.cat((kept.log_ratio, sign * self.label_target.log), -1),
            kept=torch.cat((kept.kept, nothing), -1),
        ).merged(loss, t)
        self.all = s.policy.joined(s.policy_set).merged(t)
        self.log_odds = _log_odds(s.policy_set, s.policy, t)
        self.log_set_mass = F.logsigmoid(self.log_odds)
        self.log_kept_mass = F.logsigmoid(-self.log_odds)
        # torch.sigmoid is 0 where e^88 would overflow, and p is not.
        self.set_mass, self.kept_mass = self.log_set_mass.exp(), self.log_kept_mass.exp()
        # Of a reverse KL: the removed tokens' mean of log p_R − log ε, and Δ, which counts where both sides have mass.
        self.set_mean = -s.policy_set.entropy - (math.log(self.eps) if self.eps > 0 else -math.inf)
        one_sided = (self.set_mass == 0) | (self.kept_mass == 0)
        self.delta = (s.kl - (self.log_odds + self.set_mean)).masked_fill(one_sided, 0.0)

    @property
    def undefined(self) -> Tensor:
        """(N, 1) bool: a distribution that the loss needs does not exist, or a label or an id lies outside."""
        if self.kind is RowLoss.NONE:
            return torch.zeros_like(self.rows.invalid)
        undefined = self.rows.invalid | ~self.all.log.isfinite()
        if self.kind.reads_reference:
            defined = self.s.reference.log.isfinite() & (self.s.reference_set.log < math.inf)
            undefined = undefined | ~defined
        return undefined

    def lost(self, loss: Tensor) -> Tensor:
        """(N, 1) bool: the gradient of the row is NaN, whichever shard holds the cause."""
        lost = self.undefined | loss.isnan()
        if self.kind in (RowLoss.REVERSE_KL, RowLoss.UNLIKELIHOOD):
            lost = lost | (loss == math.inf)
        return lost

    @cached_property
    def known_loss(self) -> Tensor:
        """(N, 1): the part of the loss that needs no pass over the entries; NaN where there is no loss."""
        s, odds, known = self.s, self.log_odds, torch.zeros_like(self.log_odds)
        if self.kind is RowLoss.LOG_LIKELIHOOD:
            known = -self.log_set_mass
            if self.uniform:
                v = self.vocab_size
                total = s.log_ratio - known
                if v > 1:  # what stays has a reference
                    shift = self.all.log + (self.all.ref - s.policy.ref) / self.t
                    total = total - (v - 1) * shift
                known = (known - self.eps * total) / (1 + v * self.eps)
        elif self.kind is RowLoss.UNLIKELIHOOD:
            known = -self.log_kept_mass
        elif self.kind is RowLoss.FORWARD_KL and not self.uniform:
            known = s.kl - self.log_kept_mass
        elif self.kind is RowLoss.REVERSE_KL and not self.uniform:
            # The removed tokens' mass times the odds is in the entropy: apart from log p(K) it would cancel against it.
            small = torch.minimum(self.set_mass, self.kept_mass)
            entropy = (small * odds.abs()).masked_fill(small == 0, 0.0) - F.logsigmoid(odds.abs())
            known = (self.eps * self.rows.removed_count.to(odds)).log1p() - entropy
            known = known + (self.kept_mass * s.kl).masked_fill(self.kept_mass == 0, 0.0)
            known = known + (self.set_mass * self.set_mean).masked_fill(self.set_mass == 0, 0.0)
        return known.masked_fill(self.undefined, math.nan)

    @cached_property
    def p(self) -> Tensor:
        return self.all.shares(self.rows.z, self.t)

    @cached_property
    def log_p(self) -> Tensor:
        return (self.rows.z - self.all.ref) / self.t - self.all.log

    @cached_property
    def target(self) -> tuple[Tensor, Tensor]:
        """r, with T log κ where y is pushed down in part, and what that sum has lost, divided by T."""
        partial, label = self.rows.partial(self.kind), self.label_target
        return torch.where(partial, label.ref, self.rows.r), torch.where(partial, label.log, 0.0)

    @cached_property
    def q(self) -> Tensor:
        """q*"""
        r, rest = self.target
        return (self.s.reference.shares(r, self.t) * rest.exp()).masked_fill(self.in_set, 0.0)

    @cached_property
    def smoothed(self) -> tuple[Tensor, Tensor]:
        """Uniformly: q̃ and d = log p − log q̃."""
        norm = self.vocab_size * self.eps
        q = self.q + self.eps
        return q / (1 + norm), self.log_p - q.log() + math.log1p(norm)

    @cached_property
    def y(self) -> Tensor:
        """Log-ratios of a KL's other to its base, less (o_ref − x_ref)/T."""
        z, z_ref, r_ref = self.rows.z, self.s.policy.ref, self.s.reference.ref
        r, rest = self.target
        if self.kind is RowLoss.FORWARD_KL:
            return _difference(z, r, z_ref, r_ref) / self.t - rest
        return _difference(r, z, r_ref, z_ref) / self.t + rest

    @cached_property
    def pushed(self) -> Tensor:
        """(N, V) bool: the tokens that negative likelihood still pushes down."""
        floor = self.scalars.nl_floor
        return self.in_set if floor is None else self.in_set & (self.log_p >= floor)

    def partial_sums(self) -> Tensor:
        """(N, ROW_PARTIAL_SUMS): the entries' loss terms, and NL's active tokens."""
        terms, active = torch.zeros_like(self.log_odds), torch.zeros_like(self.log_odds)
        if self.kind.reads_reference and self.uniform:
            p, (q, d) = self.p, self.smoothed
            if self.kind is RowLoss.FORWARD_KL:
                term = torch.where(d.abs() < 1, q * _phi(d), p - q - q * d)
            else:
                term = torch.where(d.abs() < 1, p * _phi(-d), p * d - p + q)
                term = torch.where(p == 0, q, term)
            terms = term.sum(-1, keepdim=True)
        elif self.kind is RowLoss.NEGATIVE_LIKELIHOOD:
            floor, log_p = self.scalars.nl_floor, self.log_p
            clamped = log_p if floor is None else log_p.clamp_min(floor)
            terms = clamped.masked_fill(~self.in_set, 0.0).sum(-1, keepdim=True)
            active = self.pushed.sum(-1, keepdim=True).to(terms)
        return torch.cat((terms, active), dim=-1)

    def gradient(self, loss: Tensor, active: Tensor) -> Tensor:
        """(N, V), of ``loss``, the row's as far as it is known, and NL's ``active`` tokens, both (N, 1)."""
        p, s = self.p, self.s
        if self.kind.reads_reference and self.uniform:
            q, d = self.smoothed
            if self.kind is RowLoss.FORWARD_KL:
                return torch.where(d.abs() < 1, q * d.expm1(), p - q)
            return (p * (d - loss)).masked_fill(p == 0, 0.0)
        if self.kind is RowLoss.FORWARD_KL:
            d = self.y - (s.log_ratio - self.log_kept_mass)
            kept = torch.where(d.abs() < 1, self.q * d.expm1(), p - self.q)
            return torch.where(self.in_set, p, kept)
        if self.kind is RowLoss.REVERSE_KL:
            kept = (s.log_ratio - s.kl + self.set_mass * self.delta) - self.y
            log_p_in_set = (self.rows.z - s.policy_set.ref) / self.t - s.policy_set.log
            removed = log_p_in_set + (s.policy_set.entropy - self.kept_mass * self.delta)
            # The smallest p may be there yet where their mass, as the loss takes it, is none.
            nothing = (p == 0) | (torch.where(self.in_set, self.set_mass, self.kept_mass) == 0)
            return (p * torch.where(self.in_set, removed, kept)).masked_fill(nothing, 0.0)
        if self.kind is RowLoss.LOG_LIKELIHOOD:
            at_label, elsewhere = -self.kept_mass, p
            if self.uniform:  # p − ỹ; at the label as whichever difference keeps its digits
                norm = 1 + self.vocab_size * self.eps
                rest = (self.vocab_size - 1) * self.eps / norm
                at_label = torch.where(p < 0.5, p - (1 + self.eps) / norm, at_label + rest)
                elsewhere = p - self.eps / norm
            return torch.where(self.in_set, at_label, elsewhere)
        if self.kind is RowLoss.UNLIKELIHOOD:
            share = s.policy.shares(self.rows.z, self.t)
            return torch.where(self.in_set, p, -self.set_mass * share)
        if self.kind is RowLoss.NEGATIVE_LIKELIHOOD:
            return self.pushed.to(p.dtype) - active * p
        return torch.zeros_like(p)

    def diagnosis(self, loss: Tensor) -> Tensor:
        """(N, 4): the loss if it is a KL, p(S), q(S), the entropy of p; NaN where the distribution does not exist or is
        not read, and without a policy."""

        def mass(in_set: _LogSum, label: _LogSum, kept: _LogSum) -> Tensor:
            """Of S, with a y that is pushed down in part, and without its κ."""
            in_set = in_set.joined(label).merged(self.t)
            mass = F.logsigmoid(_log_odds(in_set, kept, self.t)).exp()
            mass = mass.masked_fill(~self.rows.negative_row, 0.0)
            return mass.masked_fill(~in_set.joined(kept).merged(self.t).log.isfinite(), math.nan)

        s, kept = self.s, self.kept
        kl = ref_mass = torch.full_like(loss, math.nan)
        if self.kind.reads_reference:
            kl, ref_mass = loss, mass(s.reference_set, self.label_reference, kept.reference)
        policy_mass = mass(s.policy_set, self.label_policy, kept.policy)
        diagnosis = torch.cat((kl, policy_mass, ref_mass, self.all.entropy), dim=-1)
        return diagnosis.masked_fill(~self.all.log.isfinite(), math.nan)


def _inverse_normalizer(call: RowCall) -> Tensor:
    """() real: what a row's loss and gradient are multiplied by, besides its own factor."""
    t, s, real = call.tensors, call.scalars, real_dtype(call.logits)
    one = call.logits.new_ones((), dtype=real)
    if s.reduction != "mean":
        return one
    if t.normalizer is not None:
        normalizer = t.normalizer
    elif s.normalizer_value is not None:
        normalizer = one * s.normalizer_value
    else:
        normalizer = active_rows(t.labels, t.weights, s.ignore_index).sum().to(real)
    return torch.where(normalizer == 0, 0.0, 1.0 / normalizer)


def _row(call: RowCall, rows: _Rows, loss: RowLoss) -> _Row:
    if call.gathered is None:
        return _Row(call, rows, loss, _statistics(call, rows, loss))
    shards = _Statistics.unpacked(call.gathered)
    return _Row(call, rows, loss, shards.merged(loss, call.scalars.temperature))


def launch(call: RowCall) -> None:
    t = call.tensors
    if call.is_first:
        check_indices(
            t.labels, t.weights, t.negative_ids, call.vocab_size, call.scalars.ignore_index
        )
    rows = _rows(call)
    if call.kind is Kind.STATISTICS:
        assert call.statistics is not None
        packed = _chosen(call, rows, lambda kind: _statistics(call, rows, kind).packed())
        call.statistics.copy_(packed.masked_fill(~rows.active, 0.0))
        return
    row = {kind: _row(call, rows, kind) for kind in {*call.scalars.sides}}
    loss = {kind: x.known_loss for kind, x in row.items()}
    active = rows.set_count.to(rows.z)
    sums = call.total_sums
    if sums is None:
        sums = _chosen(call, rows, lambda kind: row[kind].partial_sums())
        sums = sums.masked_fill(~rows.active, 0.0)
    if call.kind is Kind.PARTIAL_SUMS:
        assert call.partial_sums is not None
        call.partial_sums.copy_(sums)
    else:
        loss = {kind: x + sums[:, :1] for kind, x in loss.items()}
        active = sums[:, 1:]

    # A factor of 0 is a loss and a gradient of 0, whatever the row holds.
    none = _chosen(call, rows, lambda kind: torch.full_like(rows.active, kind is RowLoss.NONE))
    factor = (rows.scale * _inverse_normalizer(call)).masked_fill(none, 0.0)
    if call.gradient is not None:
        gradient = _chosen(
            call,
            rows,
            lambda kind: (
                row[kind]
                .gradient(loss[kind], active)
                .masked_fill(row[kind].lost(loss[kind]), math.nan)
            ),
        )
        scale = factor / call.scalars.temperature
        if call.upstream is not None:
            upstream = call.upstream[:, None]
            scale = (scale * upstream).masked_fill((scale == 0) | (upstream == 0), 0.0)
        call.gradient.copy_((gradient * scale).masked_fill(scale == 0, 0.0))
    value = _chosen(call, rows, loss.__getitem__).masked_fill(rows.invalid, math.nan)
    value = value.masked_fill(~rows.active, 0.0)
    if call.loss is not None:
        weighted = (value * factor).masked_fill(factor == 0, 0.0)
        per_row = call.scalars.reduction == "none"
        call.loss.copy_(weighted.view_as(call.loss) if per_row else weighted.sum())
    if call.diagnostics is not None:
        diagnosis = _chosen(call, rows, lambda kind: row[kind].diagnosis(value))
        diagnosis = diagnosis.masked_fill(~rows.active | rows.invalid, math.nan)
        call.diagnostics.copy_(torch.cat((value, diagnosis), -1).t().view_as(call.diagnostics))
