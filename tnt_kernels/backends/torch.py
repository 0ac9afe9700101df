"""Plain PyTorch, on any device: the fallback, slow and generous with memory.

The names are those of csrc/statistics.h and csrc/objectives.h. A whole row is the one shard of its vocabulary.
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

STATISTICS_LAYOUT = 2


def why_not(logits: Tensor | None) -> str:
    """Why this backend cannot serve these logits: it serves all."""
    return ""


def scale_(gradient: Tensor, scale: Tensor) -> None:
    if gradient.device.type == "cpu":
        scale_by_item(gradient, scale)
    else:
        gradient.mul_(scale)


#: Rows whose maxima are this close to each other are compared by z − r.
CLOSE = 1.0


def _difference(z: Tensor, r: Tensor, z_max: Tensor, r_max: Tensor) -> Tensor:
    """(z − z_max) − (r − r_max), (N, V), with the maxima (N, 1).

    z − r is exact next to p = q. Where one row is shifted against the other it has lost the digits that the differences
    to the maxima keep.
    """
    gap = z_max - r_max
    return torch.where(gap.abs() <= CLOSE, (z - r) - gap, (z - z_max) - (r - r_max))


def _phi(d: Tensor) -> Tensor:
    """φ(d) = e^d − 1 − d for |d| < 1: next to 0 the closed form has no digit left, so its series is summed."""
    last = 19 if d.dtype == torch.float64 else 11
    total = torch.full_like(d, 1 / math.factorial(last))
    for k in reversed(range(2, last)):
        total = torch.add(1 / math.factorial(k), total * d)
    return d * d * total


class _ExpSum(NamedTuple):
    """Σ e^((x − max)/T) and its moment Σ e^((x − max)/T) (x − max)/T, each (N, 1).

    Where the sum is 0 there is no entry, or none but -inf, and the maximum says nothing.
    """

    max: Tensor
    sum: Tensor
    moment: Tensor

    def merged(self, other: _ExpSum, inverse_t: float) -> _ExpSum:
        top = torch.maximum(
            torch.where(self.sum == 0, other.max, self.max),
            torch.where(other.sum == 0, self.max, other.max),
        )
        total, moment = torch.zeros_like(top), torch.zeros_like(top)
        for part in (self, other):
            shift = (part.max - top) * inverse_t
            scale = shift.exp().masked_fill(part.sum == 0, 0.0)
            total = total + scale * part.sum
            moment = moment + (scale * (part.moment + part.sum * shift)).masked_fill(
                scale == 0, 0.0
            )
        return _ExpSum(top, total, moment)


def _share(part: _ExpSum, whole: _ExpSum, inverse_t: float) -> Tensor:
    """Of a part in the whole."""
    found = part.sum * ((part.max - whole.max) * inverse_t).exp() / whole.sum
    return found.masked_fill((part.sum == 0) & (whole.sum > 0), 0.0)


def _moved(z_from: Tensor, z_to: Tensor, r_from: Tensor, r_to: Tensor) -> Tensor:
    """What z − r loses when its maxima move: 0 where both move alike."""
    close = ((z_from - r_from).abs() <= CLOSE) & ((z_to - r_to).abs() <= CLOSE)
    far = (z_from - z_to) - (r_from - r_to)
    return torch.where(close, (z_from - r_from) - (z_to - r_to), far)


class _Statistics(NamedTuple):
    """A slice's, unpacked."""

    policy: _ExpSum
    reference: _ExpSum
    policy_set: _ExpSum
    reference_set: _ExpSum
    kl_moment: Tensor
    policy_total: Tensor
    kept: Tensor
    label_policy: Tensor
    label_reference: Tensor

    def packed(self) -> Tensor:
        return torch.cat(
            (
                *self.policy, *self.reference[:2], self.label_policy, *self.policy_set,
                *self.reference_set[:2], self.label_reference, self.kl_moment,
                self.policy_total, self.kept,
            ),
            dim=-1,
        )  # fmt: skip

    @staticmethod
    def unpacked(x: Tensor) -> _Statistics:
        c = x.split(1, dim=-1)
        nothing = torch.zeros_like(c[0])
        return _Statistics(
            _ExpSum(*c[:3]), _ExpSum(c[3], c[4], nothing), _ExpSum(*c[6:9]),
            _ExpSum(c[9], c[10], nothing), c[12], c[13], c[14], c[5], c[11],
        )  # fmt: skip

    def merged(self, other: _Statistics, inverse_t: float) -> _Statistics:
        policy = self.policy.merged(other.policy, inverse_t)
        reference = self.reference.merged(other.reference, inverse_t)
        moment, total = torch.zeros_like(policy.sum), torch.zeros_like(policy.sum)
        for part in (self, other):
            shift = (part.policy.max - policy.max) * inverse_t
            scale = shift.exp()
            x = _moved(part.policy.max, policy.max, part.reference.max, reference.max)
            # In this order: where the reference is masked by the lowest number, x alone is almost too large.
            added = scale * part.kl_moment + scale * part.policy.sum * x * inverse_t
            nothing = (part.policy.sum == 0) | (scale == 0)
            moment = moment + added.masked_fill(nothing, 0.0)
            added = part.policy_total + part.kept * shift
            total = total + added.masked_fill(part.kept == 0, 0.0)
        return _Statistics(
            policy,
            reference,
            self.policy_set.merged(other.policy_set, inverse_t),
            self.reference_set.merged(other.reference_set, inverse_t),
            moment,
            total,
            self.kept + other.kept,
            self.label_policy + other.label_policy,
            self.label_reference + other.label_reference,
        )


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
    log_kappa: Tensor  # (N, 1), of that y, else 0
    scale: Tensor  # (N, 1): w, or α (α |w| for NL and UL) on negative rows

    def set_of(self, loss: RowLoss) -> Tensor:
        """What a loss treats apart from the rest."""
        if loss is RowLoss.LOG_LIKELIHOOD:
            return self.label
        return self.removed if loss.reads_reference else self.negative


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
        torch.where(in_part, w, 0.0).log1p(), scale.masked_fill(~active, 0.0),
    )  # fmt: skip


def _chosen(call: RowCall, rows: _Rows, value: Callable[[RowLoss], Tensor]) -> Tensor:
    """Of each row, the value under the loss of its side."""
    positive, negative = call.scalars.sides
    if positive == negative:
        return value(positive)
    return torch.where(rows.negative_row, value(negative), value(positive))


# --- statistics ---------------------------------------------------------------------------------------------------


def _exp_sum(x: Tensor, keep: Tensor, inverse_t: float, factor: Tensor | None = None) -> _ExpSum:
    x = x.masked_fill(~keep, -math.inf)
    # also the maximum of no entry, or of -inf alone
    least = x.new_full((len(x), 1), torch.finfo(x.dtype).min)
    top = torch.cat((least, x), -1).amax(-1, keepdim=True)
    centred = (x - top) * inverse_t
    weight = centred.exp() if factor is None else centred.exp() * factor
    moment = (weight * centred).masked_fill(weight == 0, 0.0)
    return _ExpSum(top, weight.sum(-1, keepdim=True), moment.sum(-1, keepdim=True))


def _statistics(call: RowCall, rows: _Rows, loss: RowLoss) -> Tensor:
    z, r, inverse_t = rows.z, rows.r, 1 / call.scalars.temperature
    in_set = rows.set_of(loss)
    partial = rows.label & rows.in_part
    log_kappa = torch.where(partial, rows.log_kappa, 0.0)
    policy = _exp_sum(z, ~in_set, inverse_t)
    reference = _exp_sum(r, ~in_set, inverse_t, log_kappa.exp())
    weight = ((z - policy.max) * inverse_t).exp().masked_fill(in_set, 0.0)
    moment = weight * (_difference(z, r, policy.max, reference.max) * inverse_t - log_kappa)
    total = ((z - policy.max) * inverse_t).masked_fill(in_set, 0.0)

    def of_label(x: Tensor) -> Tensor:
        return x.masked_fill(~partial, 0.0).sum(-1, keepdim=True)

    return _Statistics(
        policy,
        reference,
        _exp_sum(z, in_set, inverse_t),
        _exp_sum(r, in_set, inverse_t),
        moment.masked_fill(weight == 0, 0.0).sum(-1, keepdim=True),
        total.sum(-1, keepdim=True),
        (~in_set).sum(-1, keepdim=True).to(z.dtype),
        of_label(z),
        of_label(r),
    ).packed()


# --- coefficients, loss and gradient of the entries ---------------------------------------------------------------


class _Row:
    """A row's coefficients under one loss, from all shards' statistics, and what its entries then have."""

    def __init__(self, call: RowCall, rows: _Rows, loss: RowLoss, s: _Statistics) -> None:
        self.rows, self.kind, self.scalars, self.s = rows, loss, call.scalars, s
        self.t = t = 1 / call.scalars.temperature
        self.vocab_size = call.vocab_size
        self.eps = call.scalars.eps
        self.uniform = call.scalars.uniform_smoothing and self.eps > 0
        self.all = s.policy.merged(s.policy_set, t)
        self.no_policy = ~(self.all.sum > 0)
        self.no_reference = ~(s.reference.sum + s.reference_set.sum > 0)
        self.log_sum = self.all.sum.log()
        self.kept_max = torch.where(s.policy.sum == 0, self.all.max, s.policy.max)
        self.kept_inverse = ((self.kept_max - self.all.max) * t).exp() / self.all.sum
        self.mass = _share(s.policy_set, self.all, t)
        odds = (s.policy_set.max - s.policy.max) * t + (s.policy_set.sum / s.policy.sum).log()
        odds = torch.where(s.policy.sum == 0, math.inf, odds)
        self.log_odds = torch.where(s.policy_set.sum == 0, -math.inf, odds)
        self.in_set = rows.set_of(loss)
        # Where no kept entry has any p, d is -inf whatever is added to it.
        self.offset = (s.reference.sum / s.policy.sum).log() + F.logsigmoid(-self.log_odds)
        self.offset = self.offset.masked_fill(s.policy.sum == 0, 0.0)
        n = rows.removed_count.to(self.log_sum.dtype)
        reverse = loss is RowLoss.REVERSE_KL and not self.uniform
        self.log_norm = (self.eps * n).log1p() if reverse else torch.zeros_like(self.offset)
        log_eps = math.log(self.eps) if self.eps > 0 else -math.inf
        self.set_offset = self.log_norm - log_eps - self.log_sum
        # d − KL = (d − M) + p(other group) (M − M of the other group), M the mean of d over a group
        self.kept_mean = (s.kl_moment / s.policy.sum).masked_fill(s.policy.sum == 0, 0.0)
        set_mean = s.policy_set.moment / s.policy_set.sum + (s.policy_set.max - self.all.max) * t
        excess = self.kept_mean + self.offset + self.log_norm - (set_mean + self.set_offset)
        kept = s.policy.sum * self.kept_inverse
        self.set_centre = set_mean + (kept * excess).masked_fill(kept == 0, 0.0)
        none = (self.mass == 0) | (kept == 0)
        self.kl_centre = self.kept_mean - (self.mass * excess).masked_fill(none, 0.0)
        if self.eps == 0:
            self.kl_centre = self.kl_centre.masked_fill(self.mass > 0, math.inf)  # as is the loss

    @property
    def undefined(self) -> Tensor:
        """(N, 1) bool: a distribution that the loss needs does not exist, or a label or an id lies outside."""
        if self.kind is RowLoss.NONE:
            return torch.zeros_like(self.no_policy)
        undefined = self.no_policy | self.rows.invalid
        if self.kind.reads_reference:
            undefined = undefined | self.no_reference | (self.s.reference.sum == 0)
        return undefined

    def lost(self, loss: Tensor) -> Tensor:
        """(N, 1) bool: the gradient of the row is NaN, whichever shard holds the cause."""
        lost = self.undefined | loss.isnan()
        if self.kind is RowLoss.REVERSE_KL:
            lost = lost | (loss == math.inf)
            if not self.uniform:
                lost = lost | ~self.kl_centre.isfinite()
        if self.kind is RowLoss.UNLIKELIHOOD:
            lost = lost | (loss == math.inf)
        return lost & (self.kind is not RowLoss.NONE)

    @property
    def known_loss(self) -> Tensor:
        """(N, 1): the part of the loss that needs no pass over the entries; NaN where there is no loss."""
        s, known = self.s, torch.zeros_like(self.mass)
        if self.kind is RowLoss.LOG_LIKELIHOOD:
            known = -F.logsigmoid(self.log_odds)
            if self.uniform:
                v = self.vocab_size
                shift = self.log_sum + (self.all.max - self.kept_max) * self.t
                total = s.policy_total - (v - 1) * shift - known
                known = (known - self.eps * total) / (1 + v * self.eps)
        elif self.kind is RowLoss.UNLIKELIHOOD:
            known = -F.logsigmoid(-self.log_odds)
        elif self.kind is RowLoss.FORWARD_KL and not self.uniform:
            known = self.mass
        return known.masked_fill(self.undefined, math.nan)

    @cached_property
    def relative(self) -> Tensor:
        return (self.rows.z - self.all.max) * self.t

    @cached_property
    def p(self) -> Tensor:
        return self.relative.exp() / self.all.sum

    @cached_property
    def log_p(self) -> Tensor:
        return self.relative - self.log_sum

    @cached_property
    def target(self) -> tuple[Tensor, Tensor, Tensor]:
        """q̃, d = log p − log q̃ and, of the kept entries of an unsmoothed reverse KL, d − offset."""
        rows, s = self.rows, self.s
        partial = rows.label & rows.in_part
        log_kappa = torch.where(partial, rows.log_kappa, 0.0)
        q = ((rows.r - s.reference.max) * self.t + log_kappa).exp() / s.reference.sum
        q = q.masked_fill(self.in_set, 0.0)
        if self.uniform:
            v = self.vocab_size
            d = self.log_p - (q + self.eps).log() + math.log1p(v * self.eps)
            return (q + self.eps) / (1 + v * self.eps), d, d
        x = _difference(rows.z, rows.r, s.policy.max, s.reference.max) * self.t - log_kappa
        d = x + self.offset + self.log_norm
        if self.kind is RowLoss.REVERSE_KL:
            norm = self.log_norm.exp()
            d = torch.where(self.in_set, self.relative + self.set_offset, d)
            q = torch.where(self.in_set, self.eps / norm, q / norm)
        return q, d, x

    @cached_property
    def pushed(self) -> Tensor:
        """(N, V) bool: the tokens that negative likelihood still pushes down."""
        floor = self.scalars.nl_floor
        return self.in_set if floor is None else self.in_set & (self.log_p >= floor)

    def partial_sums(self) -> Tensor:
        """(N, ROW_PARTIAL_SUMS): the entries' loss terms, and NL's active tokens."""
        p, terms, active = self.p, torch.zeros_like(self.mass), torch.zeros_like(self.mass)
        if self.kind.reads_reference:
            q, d, _ = self.target
            near = d.abs() < 1
            if self.kind is RowLoss.FORWARD_KL:
                term = torch.where(near, q * _phi(d), p - q - q * d)
                term = torch.where(q == 0, p, term)
                if not self.uniform:  # the removed tokens' p is in the known part
                    term = term.masked_fill(self.in_set, 0.0)
            else:
                term = torch.where(near, p * _phi(-d), p * d - p + q)
                term = torch.where(p == 0, q, term)
            terms = term.sum(-1, keepdim=True)
        elif self.kind is RowLoss.NEGATIVE_LIKELIHOOD:
            floor, log_p = self.scalars.nl_floor, self.log_p
            clamped = log_p if floor is None else log_p.clamp_min(floor)
            terms = clamped.masked_fill(~self.in_set, 0.0).sum(-1, keepdim=True)
            active = self.pushed.sum(-1, keepdim=True).to(p.dtype)
        return torch.cat((terms, active), dim=-1)

    def gradient(self, loss: Tensor, active: Tensor) -> Tensor:
        """(N, V), of ``loss``, the row's as far as it is known, and NL's ``active`` tokens, both (N, 1)."""
        p = self.p
        if self.kind.reads_reference:
            q, d, x = self.target
            if self.kind is RowLoss.FORWARD_KL:
                gradient = torch.where((d.abs() < 1) & (q > 0), q * d.expm1(), p - q)
                return gradient if self.uniform else torch.where(self.in_set, p, gradient)
            centred = d - loss
            if not self.uniform:
                kept, removed = x - self.kl_centre, self.relative - self.set_centre
                centred = torch.where(self.in_set, removed, kept)
            return (p * centred).masked_fill(p == 0, 0.0)
        if self.kind is RowLoss.LOG_LIKELIHOOD:
            at_label, elsewhere = -self.s.policy.sum * self.kept_inverse, p
            if self.uniform:  # p − ỹ; at the label as whichever difference keeps its digits
                norm = 1 + self.vocab_size * self.eps
                rest = (self.vocab_size - 1) * self.eps / norm
                at_label = torch.where(p < 0.5, p - (1 + self.eps) / norm, at_label + rest)
                elsewhere = p - self.eps / norm
            return torch.where(self.in_set, at_label, elsewhere)
        if self.kind is RowLoss.UNLIKELIHOOD:
            share = ((self.rows.z - self.s.policy.max) * self.t).exp() / self.s.policy.sum
            return torch.where(self.in_set, p, -self.mass * share)
        if self.kind is RowLoss.NEGATIVE_LIKELIHOOD:
            return self.pushed.to(p.dtype) - active * p
        return torch.zeros_like(p)


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


def _merged(call: RowCall, rows: _Rows) -> _Statistics:
    """Of the whole vocabulary."""
    if call.gathered is None:
        return _Statistics.unpacked(_chosen(call, rows, lambda kind: _statistics(call, rows, kind)))
    merged = _Statistics.unpacked(call.gathered[0])
    for shard in call.gathered[1:]:
        merged = merged.merged(_Statistics.unpacked(shard), 1 / call.scalars.temperature)
    return merged


def launch(call: RowCall) -> None:
    t = call.tensors
    if call.is_first:
        check_indices(
            t.labels, t.weights, t.negative_ids, call.vocab_size, call.scalars.ignore_index
        )
    rows = _rows(call)
    if call.kind is Kind.STATISTICS:
        assert call.statistics is not None
        packed = _chosen(call, rows, lambda kind: _statistics(call, rows, kind))
        call.statistics.copy_(packed.masked_fill(~rows.active, 0.0))
        return
    statistics = _merged(call, rows)
    row = {kind: _Row(call, rows, kind, statistics) for kind in {*call.scalars.sides}}
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
        diagnosis = _chosen(call, rows, lambda kind: _diagnosis(row[kind], value))
        diagnosis = diagnosis.masked_fill(~rows.active | rows.invalid, math.nan)
        call.diagnostics.copy_(torch.cat((value, diagnosis), -1).t().view_as(call.diagnostics))


def _diagnosis(row: _Row, loss: Tensor) -> Tensor:
    """(N, 4): the loss if it is a KL, p(S), q(S), the entropy of p; NaN where the distribution does not exist or is not
    read, and without a policy."""
    rows, s, t = row.rows, row.s, row.t
    entropy = row.log_sum - row.all.moment / row.all.sum
    in_part = rows.in_part & row.kind.reads_reference
    of_label = ((s.label_policy - row.all.max) * t).exp() / row.all.sum
    mass = row.mass + of_label.masked_fill(~in_part, 0.0)
    mass = mass.masked_fill(~rows.negative_row, 0.0)
    kl, ref_mass = torch.full_like(mass, math.nan), torch.full_like(mass, math.nan)
    if row.kind.reads_reference:
        # q itself: without κ on a y that is pushed down in part
        out = ~in_part | (s.label_reference == -math.inf)
        at, nothing = s.label_reference.masked_fill(out, 0.0), torch.zeros_like(mass)
        label = _ExpSum(at, (~out).to(at), nothing)
        removed = _ExpSum(at, (-rows.log_kappa.expm1()).masked_fill(out, 0.0), nothing)
        inside = s.reference_set.merged(label, t)
        whole = s.reference.merged(s.reference_set, t).merged(removed, t)
        ref_mass = _share(inside, whole, t)
        ref_mass = ref_mass.masked_fill(~rows.negative_row, 0.0)
        kl, ref_mass = loss, ref_mass.masked_fill(row.no_reference, math.nan)
    return torch.cat((kl, mass, ref_mass, entropy), dim=-1).masked_fill(row.no_policy, math.nan)
