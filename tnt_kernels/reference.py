"""The losses in plain PyTorch: the oracle of the tests, which shares no line with a backend.

Targeted Negative Training (arXiv 2406.13660), one row, that is one token position, at a time; z and
r are the policy's and the reference's logits, p and q their distributions, S a row's negative set,
R the part of it that is removed altogether (κ = 0), q* the target and q̃ the smoothed target. Each
loss stands next to its gradient. Nothing synchronises with the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels.objectives import Objective, RowLoss

if TYPE_CHECKING:
    from typing_extensions import Required, Unpack

_INF, _NAN = math.inf, math.nan
SCALED_BY_WEIGHT = (RowLoss.UNLIKELIHOOD, RowLoss.NEGATIVE_LIKELIHOOD)


class RowTerms(NamedTuple):
    """What every row contributes; each ``(N,)``, in the dtype of the computation.

    ``loss`` carries the gradient with respect to the logits, the rest is detached.
    """

    loss: Tensor  #: the row's own loss, before weight and alpha; 0 on rows of weight 0
    scale: Tensor  #: the factor c: w, or α (α|w| for NL and UL) on negative rows
    kl: Tensor  #: the loss where it is a KL, else NaN
    negative_mass: Tensor  #: p(S), a partly pushed-down label included
    ref_negative_mass: Tensor  #: q(S), NaN on rows whose loss is not a KL
    entropy: Tensor  #: of p


def _log_sum_exp(
    x: Tensor, temperature: float, keep: Tensor | None = None, log_factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """m = max x and log Σ f e^((x − m)/T) over ``keep``, both (N, 1); 0 and −inf if it is empty.

    They stay apart because their sum loses digits where |m| is large.
    """
    if keep is not None:
        x = x.masked_fill(~keep, -_INF)
    m = x.amax(-1, keepdim=True)
    m = m.masked_fill(m == -_INF, 0.0)
    exponent = (x - m) / temperature
    if log_factor is not None:
        exponent = exponent + log_factor
    return m, exponent.exp().sum(-1, keepdim=True).log()


#: Rows whose maxima are this close to each other are compared by z − r.
CLOSE = 1.0


def difference(z: Tensor, r: Tensor, z_max: Tensor, r_max: Tensor) -> Tensor:
    """(z − z_max) − (r − r_max), (N, V).

    z − r is exact next to p = q; where one row is shifted against the other it has lost the digits
    that the differences to the maxima, (N, 1), keep.
    """
    close = (z_max - r_max).abs() <= CLOSE
    centre = torch.where(close, z_max - r_max, 0.0)
    return (z - z_max.masked_fill(close, 0.0)) - (r - r_max.masked_fill(close, 0.0)) - centre


@dataclass(frozen=True)
class _Rows:
    """All rows' inputs in one form. Rows that cannot be computed hold zeros, masked at last."""

    z: Tensor  # (N, V) policy logits
    r: Tensor  # (N, V) reference logits, zeros if no row's loss reads them
    label: Tensor  # (N, 1) int64, in [0, V)
    negative: Tensor  # (N, V) bool, S
    removed: Tensor  # (N, V) bool, R
    log_kappa: Tensor  # (N, V), -inf in R
    scale: Tensor  # (N,)
    objective: Objective
    active: Tensor  # (N,) bool, the rest are rows of weight 0
    invalid: Tensor  # (N,) bool, active but a label or an id is out of range
    z_broken: Tensor  # (N,) bool, the policy's distribution does not exist
    r_broken: Tensor  # (N,) bool, the reference's distribution does not exist
    eps: float
    uniform: bool
    nl_floor: float | None
    temperature: float

    @cached_property
    def log_p(self) -> Tensor:
        m, log_sum = _log_sum_exp(self.z, self.temperature)
        return (self.z - m) / self.temperature - log_sum

    @cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @cached_property
    def negative_rows(self) -> Tensor:
        return self.negative.any(-1)

    @cached_property
    def reads_reference(self) -> Tensor:
        """(N,) bool: rows whose loss is a KL."""
        sides = (self.objective.positive_loss, self.objective.negative_loss)
        positive, negative = (self.active & side.reads_reference for side in sides)
        return torch.where(self.negative_rows, negative, positive)

    @cached_property
    def undefined(self) -> Tensor:
        """(N,) bool: rows whose loss and gradient are NaN whatever the formula says."""
        no_target = ((self.r == -_INF) | self.removed).all(-1)
        sides = (self.objective.positive_loss, self.objective.negative_loss)
        positive, negative = (self.z_broken & (side is not RowLoss.NONE) for side in sides)
        broken = torch.where(self.negative_rows, negative, positive)
        return self.invalid | broken | (self.reads_reference & (self.r_broken | no_target))

    def target(self, eps: float) -> tuple[Tensor, Tensor]:
        """The smoothed target q̃ and d = log p − log q̃, both (N, V); ``eps = 0`` gives q*.

        d starts from the difference of the logits, so that it keeps its digits where p is close to
        q and is exactly 0 where both rows hold the same values. It means nothing where p = q̃ = 0.
        """
        t = self.temperature
        m_r, log_sum_r = _log_sum_exp(self.r, t, ~self.removed, self.log_kappa)
        q = ((self.r - m_r) / t + self.log_kappa - log_sum_r).exp().masked_fill(self.removed, 0.0)
        if self.uniform:
            v = q.shape[-1]
            return (q + eps) / (1 + v * eps), self.log_p - (q + eps).log() + math.log1p(v * eps)
        m_z, log_sum_z = _log_sum_exp(self.z, t)
        log_norm = torch.log1p(eps * self.removed.sum(-1, keepdim=True).to(q.dtype))
        d = difference(self.z, self.r, m_z, m_r) / t - (log_sum_z - log_sum_r) - self.log_kappa
        log_eps = math.log(eps) if eps > 0 else -_INF
        d = torch.where(self.removed, self.log_p - log_eps, d) + log_norm
        return torch.where(self.removed, eps, q) / log_norm.exp(), d


def phi(d: Tensor) -> Tensor:
    """φ(d) = e^d − 1 − d for |d| < 1 by its series: next to 0 the closed form has no digit left."""
    last = 19 if d.dtype == torch.float64 else 11
    s = torch.full_like(d, 1 / math.factorial(last))
    for k in range(last - 1, 1, -1):
        s = s * d + 1 / math.factorial(k)
    return s * d * d


def _forward_kl(rows: _Rows) -> Tensor:
    """KL(q*‖p) = Σ q* φ(d) + p(R), the Bregman form: all terms are ≥ 0; those with q* = 0 are p."""
    p = rows.p
    q, d = rows.target(rows.eps if rows.uniform else 0.0)
    term = torch.where(d.abs() < 1, q * phi(d), p - q - q * d)
    return torch.where(q == 0, p, term).sum(-1)


def _forward_kl_gradient(rows: _Rows) -> Tensor:
    """p − q*, which is q* (e^d − 1)."""
    q, d = rows.target(rows.eps if rows.uniform else 0.0)
    return torch.where((d.abs() < 1) & (q > 0), q * d.expm1(), rows.p - q)


def _reverse_kl(rows: _Rows) -> Tensor:
    """KL(p‖q̃) = Σ p φ(−d); terms with p = 0 are q̃."""
    p = rows.p
    q, d = rows.target(rows.eps)
    term = torch.where(d.abs() < 1, p * phi(-d), p * d - p + q)
    return torch.where(p == 0, q, term).sum(-1)


def _reverse_kl_gradient(rows: _Rows) -> Tensor:
    """p (d − ℓ) with ℓ = E_p d.

    Taken directly, d − ℓ is a difference of near-equal numbers where p(R) → 1 and where d is nearly
    constant on the tokens that stay. With M the mean of d over a token's own group (R or the rest),
    M' and P' the other group's mean and mass, d − ℓ = (d − M) + P' (M − M').
    """
    p = rows.p
    _, d = rows.target(rows.eps)
    d = d.masked_fill(p == 0, 0.0)
    p_removed = p.masked_fill(~rows.removed, 0.0)
    p_kept = p.masked_fill(rows.removed, 0.0)
    mass_removed, mass_kept = p_removed.sum(-1, keepdim=True), p_kept.sum(-1, keepdim=True)
    # means relative to d at one token: where all d are equal, or there is but one, they are exact
    anchor_removed = d.gather(-1, p_removed.argmax(-1, keepdim=True))
    anchor_kept = d.gather(-1, p_kept.argmax(-1, keepdim=True))
    from_removed, from_kept = d - anchor_removed, d - anchor_kept
    tiny = torch.finfo(p.dtype).tiny
    mean_removed = (p_removed * from_removed).sum(-1, keepdim=True) / mass_removed.clamp_min(tiny)
    mean_kept = (p_kept * from_kept).sum(-1, keepdim=True) / mass_kept.clamp_min(tiny)
    gap = (mean_kept - mean_removed) + (anchor_kept - anchor_removed)
    centred = torch.where(
        rows.removed,
        (from_removed - mean_removed) - mass_kept * gap,
        (from_kept - mean_kept) + mass_removed * gap,
    )
    return (p * centred).masked_fill((d == _INF).any(-1, keepdim=True), _NAN)


def _log_odds(rows: _Rows, inside: Tensor) -> Tensor:
    """log p(inside) / p(outside), (N,): −inf if nothing is inside, +inf if nothing is outside."""
    m_in, log_in = _log_sum_exp(rows.z, rows.temperature, inside)
    m_out, log_out = _log_sum_exp(rows.z, rows.temperature, ~inside)
    odds = (m_in - m_out) / rows.temperature + (log_in - log_out)
    odds = odds.masked_fill(log_out == -_INF, _INF).masked_fill(log_in == -_INF, -_INF)
    return odds.squeeze(-1)


def _log_likelihood(rows: _Rows) -> Tensor:
    """−log p_y as softplus(lse of the rest − z_y), right as p_y → 1.

    Under uniform smoothing the cross-entropy −Σ ỹ log p, ỹ = ([v = y] + ε) / (1 + V ε).
    """
    is_label = torch.zeros_like(rows.z, dtype=torch.bool).scatter(-1, rows.label, True)
    loss = -F.logsigmoid(_log_odds(rows, is_label))
    if rows.uniform:
        loss = (loss - rows.eps * rows.log_p.sum(-1)) / (1 + rows.z.shape[-1] * rows.eps)
    return loss


def _log_likelihood_gradient(rows: _Rows) -> Tensor:
    """p − [v = y], which at y is −p(v ≠ y); p − ỹ under uniform smoothing."""
    if rows.uniform:
        norm = 1 + rows.z.shape[-1] * rows.eps
        one_hot = torch.zeros_like(rows.p).scatter(-1, rows.label, 1.0)
        return rows.p - (one_hot + rows.eps) / norm
    rest = rows.p.scatter(-1, rows.label, 0.0)
    return rest.scatter(-1, rows.label, -rest.sum(-1, keepdim=True))


def _unlikelihood(rows: _Rows) -> Tensor:
    """−log(1 − p(S)) as softplus(lse over S − lse over the rest)."""
    return -F.logsigmoid(-_log_odds(rows, rows.negative))


def _unlikelihood_gradient(rows: _Rows) -> Tensor:
    """p inside S, −p(S) e^(z − lse over the rest) outside; NaN if nothing is outside."""
    mass = rows.p.masked_fill(~rows.negative, 0.0).sum(-1, keepdim=True)
    m, log_sum = _log_sum_exp(rows.z, rows.temperature, ~rows.negative)
    outside = -mass * ((rows.z - m) / rows.temperature - log_sum).exp()
    return torch.where(rows.negative, rows.p, outside).masked_fill(log_sum == -_INF, _NAN)


def _negative_likelihood(rows: _Rows) -> Tensor:
    """Σ_{s∈S} max(log p_s, nl_floor)."""
    log_p = rows.log_p if rows.nl_floor is None else rows.log_p.clamp_min(rows.nl_floor)
    return log_p.masked_fill(~rows.negative, 0.0).sum(-1)


def _negative_likelihood_gradient(rows: _Rows) -> Tensor:
    """Σ_s ([v = s] − p_v) over the s in S that are not below the floor."""
    pushed = rows.negative
    if rows.nl_floor is not None:
        pushed = pushed & (rows.log_p >= rows.nl_floor)
    indicator = pushed.to(rows.p.dtype)
    return indicator - indicator.sum(-1, keepdim=True) * rows.p


def _none(rows: _Rows) -> Tensor:
    return rows.z.new_zeros(rows.z.shape[0])


def _none_gradient(rows: _Rows) -> Tensor:
    return torch.zeros_like(rows.z)


_LOSSES: dict[RowLoss, tuple[Callable[[_Rows], Tensor], Callable[[_Rows], Tensor]]] = {
    RowLoss.NONE: (_none, _none_gradient),
    RowLoss.FORWARD_KL: (_forward_kl, _forward_kl_gradient),
    RowLoss.REVERSE_KL: (_reverse_kl, _reverse_kl_gradient),
    RowLoss.LOG_LIKELIHOOD: (_log_likelihood, _log_likelihood_gradient),
    RowLoss.UNLIKELIHOOD: (_unlikelihood, _unlikelihood_gradient),
    RowLoss.NEGATIVE_LIKELIHOOD: (_negative_likelihood, _negative_likelihood_gradient),
}


def _losses(rows: _Rows) -> Tensor:
    kinds = (rows.objective.positive_loss, rows.objective.negative_loss)
    # both sides on all rows: to pick the rows out would wait for the device
    value = {kind: _LOSSES[kind][0](rows) for kind in set(kinds)}
    loss = torch.where(rows.negative_rows, value[kinds[1]], value[kinds[0]])
    return loss.masked_fill(rows.undefined, _NAN).masked_fill(~rows.active, 0.0)


def _gradients(rows: _Rows) -> Tensor:
    kinds = (rows.objective.positive_loss, rows.objective.negative_loss)
    value = {kind: _LOSSES[kind][1](rows) for kind in set(kinds)}
    gradient = torch.where(rows.negative_rows[:, None], value[kinds[1]], value[kinds[0]])
    gradient = gradient / rows.temperature
    return gradient.masked_fill(rows.undefined[:, None], _NAN).masked_fill(~rows.active[:, None], 0)


class _RowLoss(torch.autograd.Function):
    """Closed-form gradients: more exact than autograd's, and with fewer (N, V) tensors kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: _Rows) -> Tensor:
        ctx.rows, ctx.dtype = rows, logits.dtype
        return _losses(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        rows: _Rows = ctx.rows
        gradient = _gradients(rows) * upstream[:, None]
        # an infinite or NaN upstream must not reach a row of weight 0
        return gradient.masked_fill(~rows.active[:, None], 0.0).to(ctx.dtype), None


def _mark(ids: Tensor, valid: Tensor, vocabulary: int) -> Tensor:
    """(M, K) ids to an (M, V) bool set; ids that are not valid go to a column that is cut off."""
    marks = torch.zeros(ids.shape[0], vocabulary + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(-1, torch.where(valid, ids, vocabulary), True)[:, :vocabulary]


def _broken(x: Tensor) -> Tensor:
    """(N,) bool: rows of logits without a softmax: NaN, +inf, or nothing but -inf."""
    return (x.isnan() | (x == _INF)).any(-1) | (x == -_INF).all(-1)


class Settings(TypedDict, total=False):
    """What the losses of rows depend on beside their tensors."""

    objective: Required[Objective]  #: the losses of positive and of negative rows
    alpha: float | Tensor  #: factor on negative rows, a float or (N,)
    negative_ids: Tensor | None  #: (N, K) or (K,) integer, padded with -1: further tokens to remove
    eps: float  #: smoothing of the target
    #: "negatives" (ε for the removed tokens, in the reverse KL) or "uniform" (ε for all tokens, in
    #: both KLs and in LL)
    smoothing: str
    nl_floor: float | None  #: lower limit of negative likelihood's ``log p_s``
    temperature: float  #: divides both logits
    ignore_index: int  #: label of rows to leave out


@torch.no_grad()
def _prepare(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    *,
    objective: Objective,
    alpha: float | Tensor = 1.0,
    negative_ids: Tensor | None = None,
    eps: float = 1e-6,
    smoothing: str = "negatives",
    nl_floor: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> _Rows:
    dtype = logits.dtype if logits.dtype in (torch.float32, torch.float64) else torch.float32
    vocabulary = logits.shape[-1]
    labels = labels.long()
    w = torch.ones_like(labels, dtype=dtype) if weights is None else weights.to(dtype)
    active = (w != 0) & (labels != ignore_index)
    invalid = active & ((labels < 0) | (labels >= vocabulary))
    label = labels.masked_fill(~active | invalid, 0)[:, None]
    w = w.masked_fill(~active, 1.0)

    z = logits.to(dtype)
    z_broken = active & _broken(z)
    z = z.masked_fill((z_broken | ~active)[:, None], 0.0)
    if not objective.reads_reference:
        r, r_broken = torch.zeros_like(z), torch.zeros_like(active)
    elif ref_logits is None:
        raise ValueError(f"ref_logits is None, but {objective} may read it")
    else:
        r = ref_logits.to(dtype)
        r_broken = active & _broken(r)
        r = r.masked_fill((r_broken | ~active)[:, None], 0.0)

    pushed = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, label, (w < 0)[:, None])
    removed = pushed & (w <= -1)[:, None]
    if negative_ids is not None:
        ids = negative_ids.long()
        ids = ids if ids.dim() == 2 else ids[None]
        valid = (ids >= 0) & (ids < vocabulary)
        invalid = invalid | (active & (~valid & (ids != -1)).any(-1))
        removed = removed | _mark(ids, valid, vocabulary)
    log_kappa = torch.where(pushed, w[:, None].log1p(), 0.0).masked_fill(removed, -_INF)

    negative = pushed | removed
    scale = torch.as_tensor(alpha, dtype=dtype, device=z.device).detach().expand_as(w)
    if objective.negative_loss in SCALED_BY_WEIGHT:
        scale = torch.where(w < 0, scale * w.abs(), scale)
    scale = torch.where(negative.any(-1), scale, w).masked_fill(~active, 0.0)
    return _Rows(
        z, r, label, negative, removed, log_kappa, scale, objective, active, invalid, z_broken,
        r_broken, eps, smoothing == "uniform" and eps > 0, nl_floor, temperature,
    )  # fmt: skip


def row_terms(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = None,
    **settings: Unpack[Settings],
) -> RowTerms:
    """Losses and statistics of all rows; the batch loss is ``(loss * scale).sum() / normalizer``.

    Computes in float64 for float64 logits, else in float32. Rows whose weight is 0 or whose label
    is ``ignore_index`` have loss, scale and gradient 0 and NaN statistics, whatever they hold. A
    label or an id out of range makes its row NaN.

    Args:
        logits: (N, V) real, the policy's. ``loss`` is differentiable with respect to them.
        ref_logits: (N, V) real, the reference's, a constant; None if the objective reads none.
        labels: (N,) integer.
        weights: (N,) real; None: all 1.
        settings: those of :class:`Settings`.

    Raises:
        ValueError: ``ref_logits`` is None and the objective may read it.
    """
    rows = _prepare(logits, ref_logits, labels, weights, **settings)
    loss: Tensor = _RowLoss.apply(logits, rows)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        none = ~rows.active | rows.invalid | rows.z_broken
        p = rows.p
        no_ref = none | rows.r_broken | ~rows.reads_reference
        m, log_sum = _log_sum_exp(rows.r, rows.temperature)
        q = ((rows.r - m) / rows.temperature - log_sum).exp()
        return RowTerms(
            loss=loss,
            scale=rows.scale,
            kl=loss.detach().masked_fill(~rows.reads_reference, _NAN),
            negative_mass=p.masked_fill(~rows.negative, 0.0).sum(-1).masked_fill(none, _NAN),
            ref_negative_mass=q.masked_fill(~rows.negative, 0.0).sum(-1).masked_fill(no_ref, _NAN),
            entropy=-(p * rows.log_p).masked_fill(p == 0, 0.0).sum(-1).masked_fill(none, _NAN),
        )


def row_gradients(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = None,
    **settings: Unpack[Settings],
) -> Tensor:
    """∂ loss_row / ∂ logits_row by the closed formulas: (N, V), in the dtype of the computation.

    Takes the arguments of :func:`row_terms`. The 1/temperature is in it, ``RowTerms.scale`` is not.
    Exactly 0 on rows of weight 0; every row sums to 0 up to rounding.
    """
    rows = _prepare(logits, ref_logits, labels, weights, **settings)
    with torch.no_grad():
        return _gradients(rows)
