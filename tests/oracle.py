"""The oracle: what ``tnt_loss`` must return for a batch, and how far from it a backend may be.

The truth is ``tnt_kernels.reference`` in float64 on the same, already rounded, inputs. With g the
exact gradient of a row's loss ℓ (before weight, α and normaliser), δ = 2^-18 (64 roundings of
float32; 2^-40 for float64 logits) and g32 the same formulas computed in float32, a backend's
gradient passes element by element where

    |error_v| <= E s_v,  s_v = |g_v| + (p_v (1 + |ℓ|) + q_v) / T,  E = max_u |g32_u - g_u| / s_u + δ.

s_v is the size of the terms that g_v is made of (p, q*, [v = y], p ℓ), so a tail token of tiny
probability is held to its own few digits and not to the row's largest entry, while E is the worst
of the whole row, so that no backend has to match a lucky element of the float32 reference.

A row's loss passes within |ℓ32 - ℓ| + δ |ℓ| + δ² (a KL is of second order next to 0, hence δ²);
under uniform smoothing, where no Bregman form starts from the difference of the logits, within
δ √(2 |ℓ|) more, which is what a relative error δ of the probabilities does to a KL; a negative
likelihood within δ more, as log p has few digits where p is near 1.

Both are multiplied by the row's factor. A gradient stored in bfloat16 or float16 may differ by half
a unit in the last place of that dtype more. Infinities and NaN must be where the truth has them.
Accuracy next to p = q, which a tolerance on p and q says little about, has tests of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tnt_kernels as tnt
from tnt_kernels import backends
from tnt_kernels.objectives import resolve_method
from tnt_kernels.reference import RowTerms, row_gradients, row_terms

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
POSITIVE = ("forward_kl", "reverse_kl", "log_likelihood", "none")
NEGATIVE = ("forward_kl", "reverse_kl", "unlikelihood", "negative_likelihood", "none")
#: Together they hold every loss of both sides.
OBJECTIVES = tuple(map(tnt.Objective, (*POSITIVE, "none"), NEGATIVE))
#: In a process of their own (TRITON_INTERPRET=1) the same tests run the Triton kernels, simulated on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
BACKENDS = ("triton",) if INTERPRETED else ("cpu", "torch")
DTYPES = (F32, BF16, F16) if INTERPRETED else (F32, BF16, F16, F64)
MISSING = {name: reason for name, reason in backends.availability().items() if reason}
INF, NAN = math.inf, math.nan


# --- batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """The tensors of a call, and those of its keywords that say what a row's loss is."""

    logits: Tensor
    ref_logits: Tensor | None
    labels: Tensor
    weights: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Batch:
        return replace(self, options={**self.options, **options})


class Tagged(Tensor):
    """A subclass that changes nothing."""


def on_gpu(batch: Batch) -> Batch:
    def move(x: object) -> object:
        return x.cuda() if isinstance(x, Tensor) else x

    options = {name: move(value) for name, value in batch.options.items()}
    tensors = (batch.logits, batch.ref_logits, batch.labels, batch.weights)
    return Batch(*map(move, tensors), options)  # type: ignore[arg-type]


def on_cpu(result: Result) -> Result:
    stats = None if result.stats is None else tnt.RowStats(*(x.cpu() for x in result.stats))
    return Result(result.loss.cpu(), result.gradient.cpu(), stats)


def rows_where(batch: Batch, rows: Tensor) -> Batch:
    options = dict(batch.options)
    ids = options.get("negative_ids")
    if ids is not None and ids.dim() > 1:
        options["negative_ids"] = ids[rows]
    tensors = (batch.logits, batch.ref_logits, batch.labels, batch.weights)
    return Batch(*(None if x is None else x[rows] for x in tensors), options)


WEIGHTS = (1.0, -1.0, 0.5, -0.3, 2.0, -0.7, -2.0, 0.0, 1.0, -1.0, -0.3, 1.0)


def mixed_batch(
    vocab: int, dtype: torch.dtype = F32, *, rows: int = len(WEIGHTS), ids: int = 5, seed: int = 0
) -> Batch:
    """Rows of every kind: ``ids`` negatives a row (0: none), padded, duplicated, unsorted, some with the label.

    A third of the rows is close to the reference; row 7 has weight 0 and row 8 label -100: they hold NaN and inf.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def integers(*shape: int) -> Tensor:
        return torch.randint(vocab, shape, generator=generator)

    z, r = 3 * normal(rows, vocab), 3 * normal(rows, vocab)
    r[::3] = z[::3] + 0.01 * normal(*r[::3].shape)
    labels, weights = integers(rows), torch.tensor(WEIGHTS).repeat(-(-rows // len(WEIGHTS)))[:rows]
    if rows > 8:
        labels[8] = -100
        z[7], r[7], z[8], r[8] = NAN, INF, INF, NAN
    options: dict[str, Any] = {}
    if ids:
        negative_ids = integers(rows, ids)
        negative_ids[:, ids // 2] = -1
        negative_ids[:, -1] = negative_ids[:, 0]
        negative_ids[::4] = -1  # rows 0, 4, 8, ...: no negatives but a pushed label
        negative_ids[-2:, 0] = labels[-2:]
        options["negative_ids"] = negative_ids
    real = F64 if dtype == F64 else F32
    return Batch(z.to(dtype), r.to(dtype), labels, weights.to(real), options)


# --- the truth ----------------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """Of every row, in float64: ``terms`` and ``gradient`` without the row's factor ``terms.scale``."""

    terms: RowTerms
    gradient: Tensor  # (N, V)
    tolerance: RowTerms  # of terms
    gradient_tolerance: Tensor  # (N, V)

    def where(self, rows: Tensor, other: Truth) -> Truth:
        """Some rows of this one, the others of another."""

        def pick(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *(1,) * (a.dim() - 1)), a, b)

        return Truth(
            RowTerms(*map(pick, self.terms, other.terms)),
            pick(self.gradient, other.gradient),
            RowTerms(*map(pick, self.tolerance, other.tolerance)),
            pick(self.gradient_tolerance, other.gradient_tolerance),
        )


def flat(batch: Batch) -> Batch:
    """The same with rows (N, V)."""
    vocab, shape, options = batch.logits.size(-1), batch.labels.shape, dict(batch.options)
    if isinstance(options.get("alpha"), Tensor):
        options["alpha"] = options["alpha"].expand(shape).reshape(-1)
    ids = options.get("negative_ids")
    if ids is not None and ids.dim() > 1:
        options["negative_ids"] = ids.flatten(0, -2)
    return Batch(
        batch.logits.detach().reshape(-1, vocab),
        None if batch.ref_logits is None else batch.ref_logits.reshape(-1, vocab),
        batch.labels.reshape(-1),
        None if batch.weights is None else batch.weights.reshape(-1),
        options,
    )


def _reference(batch: Batch, dtype: torch.dtype) -> tuple[RowTerms, Tensor]:
    options = dict(batch.options)
    options["objective"] = resolve_method(options.pop("method", "tnff"))
    logits = batch.logits.to(dtype)
    ref_logits = None if batch.ref_logits is None else batch.ref_logits.to(dtype)
    weights = None if batch.weights is None else batch.weights.to(dtype)
    if isinstance(options.get("alpha"), Tensor):
        options["alpha"] = options["alpha"].to(dtype)
    arguments = (logits, ref_logits, batch.labels, weights)
    terms = row_terms(*arguments, **options)
    gradient = row_gradients(*arguments, **options)
    return RowTerms(*(x.double() for x in terms)), gradient.double()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| where both are finite, else 0."""
    return (a - b).abs().nan_to_num(0.0, posinf=0.0)


def truth(batch: Batch) -> Truth:
    exact = batch.logits.dtype == F64
    batch = flat(batch)
    terms, gradient = _reference(batch, F64)
    terms32, gradient32 = (terms, gradient) if exact else _reference(batch, F32)
    delta = 2.0 ** (-40 if exact else -18)
    temperature = batch.options.get("temperature", 1.0)

    def softmax(x: Tensor) -> Tensor:
        return (x.double() / temperature).softmax(-1).nan_to_num(0.0)

    loss = terms.loss.abs().nan_to_num(0.0, posinf=0.0)
    size = softmax(batch.logits) * (1 + loss[:, None])
    if batch.ref_logits is not None:
        size += softmax(batch.ref_logits)
    size = gradient.abs().nan_to_num(0.0) + size / temperature
    worst = (_distance(gradient32, gradient) / size.clamp_min(2.0**-126)).amax(-1, keepdim=True)
    gradient_tolerance = (worst + delta) * size + 2.0**-100  # underflow

    tolerance = [
        _distance(a, b) + delta * b.abs().nan_to_num(0.0, posinf=0.0) + delta**2
        for a, b in zip(terms32, terms, strict=True)
    ]
    bounds = RowTerms(*tolerance)
    if batch.options.get("smoothing") == "uniform":
        extra = delta * (2 * loss).sqrt()
        bounds = bounds._replace(loss=bounds.loss + extra, kl=bounds.kl + extra)
    # where p is near 1, log p has few digits
    bounds = bounds._replace(entropy=bounds.entropy + delta)
    if resolve_method(batch.options.get("method", "tnff")).negative == "negative_likelihood":
        bounds = bounds._replace(loss=bounds.loss + delta * negative_rows(batch))
    return Truth(terms, gradient, bounds, gradient_tolerance)


# --- a call, and the comparison -----------------------------------------------------------------------------------


class Result(NamedTuple):
    loss: Tensor
    gradient: Tensor
    stats: tnt.RowStats | None


def run(
    batch: Batch, backend: str | None = None, *, upstream: Tensor | None = None, **keywords: Any
) -> Result:
    """``tnt_loss`` and its gradient, with the logits' strides as they are; their values stay."""
    options = {**batch.options, **keywords, "backend": backend}
    leaf = batch.logits.detach().requires_grad_()
    logits = leaf * 1 if options.get("inplace") else leaf
    out = tnt.tnt_loss(logits, batch.ref_logits, batch.labels, batch.weights, **options)
    loss, stats = out if isinstance(out, tuple) else (out, None)
    if upstream is None:
        upstream = torch.ones_like(loss)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    return Result(loss.detach(), gradient, stats)


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of ``dtype`` at x, subnormals included (all of it where bf16 is truncated)."""
    info = torch.finfo(dtype)
    if INTERPRETED and dtype == BF16:
        return 2 * torch.ldexp(
            torch.full_like(x, info.eps / 4), torch.frexp(x.abs().clamp(info.tiny, info.max))[1]
        )
    _, exponent = torch.frexp(x.abs().clamp(info.tiny, info.max))
    return torch.ldexp(torch.full_like(x, info.eps / 4), exponent)


def identical(a: Any, b: Any) -> bool:
    """To the last bit, NaN included."""
    if isinstance(a, Tensor):
        return (
            a.dtype == b.dtype
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
        )
    return a is b is None or all(itertools.starmap(identical, zip(a, b, strict=True)))


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> None:
    __tracebackhide__ = True
    actual = actual.detach().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    ok = same | ((actual - expected).abs() <= tolerance)
    if ok.all():
        return
    at = tuple((~ok).nonzero()[0].tolist())
    raise AssertionError(
        f"{what}: {int((~ok).sum())} of {ok.numel()} are off, first {at}: got {actual[at].item():.9g}, expected "
        f"{expected[at].item():.9g}, tolerance {tolerance[at].item():.3g}"
    )


def negative_rows(batch: Batch) -> Tensor:
    batch = flat(batch)
    negative = torch.zeros(batch.labels.shape, dtype=torch.bool)
    if batch.weights is not None:
        negative |= batch.weights < 0
    ids = batch.options.get("negative_ids")
    return negative if ids is None else negative | (ids >= 0).any(-1)


def active_rows(batch: Batch) -> Tensor:
    active = batch.labels.reshape(-1) != batch.options.get("ignore_index", -100)
    return active if batch.weights is None else active & (batch.weights.reshape(-1) != 0)


def assert_agrees(
    result: Result,
    expected: Truth,
    batch: Batch,
    *,
    reduction: str = "mean",
    normalizer: float | None = None,
    upstream: Tensor | None = None,
    label: str = "",
) -> None:
    """``upstream`` is what the gradient was asked with: per row, or a power of two (else it is rounded too)."""
    dtype, rows = batch.logits.dtype, batch.labels.shape
    terms, bounds = expected.terms, expected.tolerance
    if normalizer is None:
        normalizer = float(active_rows(batch).sum()) if reduction == "mean" else 1.0
    factor = terms.scale / normalizer if normalizer else torch.zeros_like(terms.scale)
    nothing = factor == 0  # loss and gradient 0, whatever the row holds
    losses = (terms.loss * factor).masked_fill(nothing, 0.0)
    loss_bound = bounds.loss * factor.abs()
    assert result.loss.dtype == (F64 if dtype == F64 else F32), label
    if reduction == "none":
        assert result.loss.shape == rows, label
        assert_within(result.loss.reshape(-1), losses, loss_bound, f"{label} loss")
    else:
        assert result.loss.shape == (), label
        bound = (
            loss_bound.sum()
            + torch.finfo(result.loss.dtype).eps * losses.abs().nan_to_num(0.0).sum()
        )
        assert_within(result.loss, losses.sum(), bound, f"{label} loss")

    if upstream is not None:
        factor = factor * upstream.reshape(-1).double()
        nothing = factor == 0
    assert result.gradient.dtype == dtype, label
    assert result.gradient.shape == batch.logits.shape, label
    gradient = (expected.gradient * factor[:, None]).masked_fill(nothing[:, None], 0.0)
    bound = (expected.gradient_tolerance * factor.abs()[:, None]).masked_fill(nothing[:, None], 0.0)
    if dtype in (F16, BF16):
        bound = bound + half_ulp(gradient.nan_to_num(0.0).abs() + bound, dtype)
    bound = bound + 2.0**-126 * (bound > 0)  # the product with the factor may underflow
    assert_within(result.gradient.reshape(gradient.shape), gradient, bound, f"{label} gradient")

    if result.stats is not None:
        assert not (result.stats.kl < 0).any(), label
        for name in tnt.RowStats._fields:
            got = getattr(result.stats, name)
            assert got.shape == rows, (label, name)
            assert got.dtype == result.loss.dtype, (label, name)
            assert not got.requires_grad, (label, name)
            assert_within(
                got.reshape(-1), getattr(terms, name), getattr(bounds, name), f"{label} {name}"
            )


# --- backends and instruction sets --------------------------------------------------------------------------------


def instruction_sets() -> list[str]:
    if "cpu" in MISSING or INTERPRETED:
        return []
    from tnt_kernels import _C

    return list(_C.instruction_sets())


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    from tnt_kernels import _C

    before = _C.selected_instruction_set()
    _C.select_instruction_set(name)
    try:
        yield
    finally:
        _C.select_instruction_set(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def implementations() -> Iterator[tuple[str, str]]:
    """(backend, label) of all there are here; while one of "cpu" is out, its instruction set is selected."""
    for name in instruction_sets():
        with instruction_set(name):
            yield "cpu", f"cpu/{name}"
    yield BACKENDS[-1], BACKENDS[-1]


def each_implementation(*others: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """As ``product(implementations(), *others)``, which would take all of them, and select none, before it begins."""
    options = list(itertools.product(*others))
    for implementation in implementations():
        for option in options:
            yield implementation, *option
