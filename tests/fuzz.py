"""Seeded random calls of the public functions, judged by ``exact``: the generator, the calls, the comparison.

A call is named by (seed, index) alone: ``fuzz.LogitsCall(seed, index).check(backend)`` is the same call everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import exact
import numpy as np
import pytest
import torch
from exact import DOUBLE, HALF, NAN, REAL, SINGLE, Arithmetic, Array, Outcome, Row, Settings
from oracle import Batch, Result
from torch import Tensor

import tnt_kernels as tnt

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
METHODS = {
    "tnff": ("forward_kl", "forward_kl"),
    "tnrr": ("reverse_kl", "reverse_kl"),
    "tnrf": ("forward_kl", "reverse_kl"),
    "tnfr": ("reverse_kl", "forward_kl"),
    "tnfll": ("log_likelihood", "forward_kl"),
    "tnrll": ("log_likelihood", "reverse_kl"),
    "nl+ll": ("log_likelihood", "negative_likelihood"),
    "ul+ll": ("log_likelihood", "unlikelihood"),
}
POSITIVE = ("forward_kl", "reverse_kl", "log_likelihood", "none")
NEGATIVE = ("forward_kl", "reverse_kl", "unlikelihood", "negative_likelihood", "none")
#: How often a row has a shift of one side, finite masks, -inf, an entry of 1e30, an entry that is NaN or +inf.
SHARES = {"shift": 0.25, "mask": 0.3, "-inf": 0.15, "huge": 0.06, "broken": 0.06}
#: Of a gradient's product with its factor.
UNDERFLOW = {F16: 2.0**-126, BF16: 2.0**-126, F32: 2.0**-126, F64: 2.0**-1022}
FEW_ULPS = 16  # of the products with weight, alpha, normaliser and upstream factor


# --- rows ---------------------------------------------------------------------------------------------------------


class Draw:
    """Random choices."""

    def __init__(self, *name: int) -> None:
        self.rng = np.random.default_rng(name)

    def one(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def some(self, size: int, share: float) -> np.ndarray:
        return self.rng.random(size) < share

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape)


def lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


def masks(dtype: torch.dtype) -> tuple[float, ...]:
    """What people write for "never" into logits of this dtype."""
    wide = () if dtype == F16 else (-1e30, lowest(F32))
    return (lowest(dtype), -1e4, *wide, *((lowest(BF16),) if dtype in (F32, BF16) else ()))


def draw_pair(d: Draw, vocab: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """A row of the policy and one of the reference, float64, to be rounded to ``dtype``."""
    height = d.one((0.1, 1.0, 3.0, 10.0))
    r = height * d.normal(vocab)
    base = d.one(("apart", "near", "near", "equal", "peak", "one hot"))
    if base == "apart":
        z = d.one((0.1, 1.0, 3.0, 10.0)) * d.normal(vocab)
    elif base == "near":
        z = r + 10.0 ** -d.rng.integers(1, 7) * d.normal(vocab)
    else:
        z = r.copy()
    if base == "peak":  # the sides' own, or one in common
        for x in d.one(((z,), (r,), (z, r))):
            x[d.rng.integers(vocab)] = d.one((14.0, 23.0, 60.0, 120.0, 1e4))
        if d.chance(0.3):
            z[d.rng.integers(vocab)] = r[d.rng.integers(vocab)] = 40.0
    elif base == "one hot":
        z, r = (
            np.where(np.arange(vocab) == d.rng.integers(vocab), d.one((1.0, 20.0, 100.0)), 0.0)
            for _ in "zr"
        )
    sides = d.one(((z,), (r,), (z, r)))
    if d.chance(SHARES["shift"]):
        large = (0.7, 30.0, 2.0**10, 2.0**14)
        shift = d.one(large if dtype == F16 else (*large, 2.0**20, 2.0**27, 3e38)) * d.one((1, -1))
        for x in sides:
            x += shift
    if d.chance(SHARES["mask"]):
        value = d.one(masks(dtype))
        where = d.some(vocab, d.one((0.1, 0.5, 0.9)))
        for x in d.one(((z,), (r,), (z, r), (z, r))):
            x[where] = value if d.chance(0.8) else d.one(masks(dtype))
            if d.chance(0.2):
                where = d.some(vocab, 0.5)
    if d.chance(SHARES["-inf"]):
        where = d.some(vocab, d.one((0.1, 0.6)))
        for x in d.one(((z,), (r,), (z, r), (z, r))):
            x[where] = -np.inf
            if d.chance(0.2):
                where = d.some(vocab, 0.3)
    if d.chance(SHARES["huge"]):
        d.one((z, r))[d.rng.integers(vocab)] = d.one((1e30, -1e30, 1e30, 3e4))
    if d.chance(SHARES["broken"]):
        d.one((z, r))[d.rng.integers(vocab)] = d.one((np.nan, np.inf))
    return z, r


def to_dtype(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Rounded; what is finite stays so."""
    info = torch.finfo(dtype)
    return torch.from_numpy(np.where(np.isinf(x), x, np.clip(x, info.min, info.max))).to(dtype)


def widened(x: Tensor) -> Array:
    return x.detach().double().numpy().astype(REAL)


def draw_set(d: Draw, vocab: int, label: int, kind: str, ids: int) -> np.ndarray:
    """``ids`` negative ids of a row, padded with -1."""
    if kind == "all" or kind == "all but one":
        chosen = d.rng.permutation(vocab)[: vocab if kind == "all" else vocab - 1]
    elif kind == "none":
        chosen = np.empty(0, int)
    else:
        chosen = d.rng.integers(vocab, size=d.rng.integers(1, ids + 1))
        if d.chance(0.3):
            chosen[0] = label
        if d.chance(0.2):
            chosen[-1] = chosen[0]
    out = np.full(ids, -1)
    out[: len(chosen)] = chosen[:ids]
    return d.rng.permutation(out)


def draw_weight(d: Draw) -> float:
    return d.one((1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.5, 2.0, -0.3, -0.7, -1e-3, -0.999, -2.5, 0.0))


def draw_options(d: Draw) -> dict[str, Any]:
    """The keywords that the two functions share and that no tensor belongs to."""
    method: Any = d.one((*METHODS, *METHODS, "pair"))
    if method == "pair":
        method = tnt.Objective(d.one(POSITIVE), d.one(NEGATIVE))
    options: dict[str, Any] = {"method": method}
    if d.chance(0.3):
        options["smoothing"] = "uniform"
    if d.chance(0.4):
        options["eps"] = d.one((0.0, 1e-6, 1e-3, 0.1, 1e-12))
    if d.chance(0.3):
        options["nl_floor"] = d.one((-2.0, -5.1, -20.0, -50.3, 1.0))
    if d.chance(0.4):
        options["temperature"] = float(d.one((0.1, 0.5, 0.7, 2.0, 3.3, 10.0)))
    if d.chance(0.4):
        options["alpha"] = d.one((0.3, 2.0, 0.0, -1.5, 1))
    options["reduction"] = d.one(("mean", "sum", "none", "none"))
    if options["reduction"] == "mean" and d.chance(0.3):
        options["normalizer"] = d.one(
            (3, 0.5, torch.tensor(7.0), torch.tensor(2, dtype=torch.int64), 0.0)
        )
    if d.chance(0.1):
        options["ignore_index"] = 1
    return options


def settings_of(options: dict[str, Any]) -> Settings:
    method = options["method"]
    positive, negative = METHODS[method] if isinstance(method, str) else method
    return Settings(
        positive,
        negative,
        float(options.get("eps", 1e-6)),
        options.get("smoothing") == "uniform",
        options.get("nl_floor"),
        float(options.get("temperature", 1.0)),
    )


def arithmetic_of(dtype: torch.dtype) -> Arithmetic:
    return {F32: SINGLE, F64: DOUBLE}.get(dtype, HALF)


# --- what every row must be ---------------------------------------------------------------------------------------


class Expected:
    """Of the rows of a call: outcomes (None: a row left out), and the factor of each."""

    def __init__(
        self,
        z: Array,
        r: Array | None,
        labels: Tensor,
        weights: Tensor | None,
        ids: Tensor | None,
        options: dict[str, Any],
        arithmetic: Arithmetic,
        slack: tuple[Array, Array] | None = None,
        fixed_point: bool = True,
    ) -> None:
        rows, vocab = z.shape
        settings, ignore = settings_of(options), options.get("ignore_index", -100)
        alpha = options.get("alpha", 1.0)
        if isinstance(alpha, Tensor):
            alpha = alpha.double().expand(labels.shape).reshape(-1).tolist()
        else:
            alpha = [float(alpha)] * rows
        label_list = labels.reshape(-1).tolist()
        weight_list = [1.0] * rows if weights is None else weights.reshape(-1).tolist()
        self.arithmetic, self.vocab = arithmetic, vocab
        self.outcomes: list[Outcome | None] = []
        self.factors = np.zeros(rows)
        for i in range(rows):
            if weight_list[i] == 0 or label_list[i] == ignore:
                self.outcomes.append(None)
                continue
            own = (
                ()
                if ids is None
                else ids.reshape(-1, ids.size(-1))[i if ids.dim() > 1 else 0].tolist()
            )
            row = Row(z[i], None if r is None else r[i], label_list[i], weight_list[i], own)
            if slack is not None:
                row = replace(
                    row, slack_z=slack[0][i], slack_r=slack[1][i], fixed_point=fixed_point
                )
            outcome = exact.evaluate(row, settings, arithmetic)
            self.outcomes.append(outcome)
            self.factors[i] = exact.factor_of(outcome, weight_list[i], alpha[i])
        normalizer = options.get("normalizer")
        if options.get("reduction", "mean") != "mean":
            divisor = 1.0
        elif normalizer is None:
            divisor = float(sum(x is not None for x in self.outcomes))
        else:
            divisor = float(normalizer)
        self.factors = self.factors / divisor if divisor else np.zeros(rows)

    @property
    def huge(self) -> float:
        """Losses beyond need only be huge."""
        return self.arithmetic.largest

    def variants(self, i: int) -> Iterator[Outcome]:
        outcome = self.outcomes[i]
        while outcome is not None:
            yield outcome
            outcome = outcome.otherwise


def expected_of(
    z: Tensor,
    r: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    ids: Tensor | None,
    options: dict[str, Any],
) -> Expected:
    """Of logits (N, V) as they are stored."""
    wide_r = None if r is None else widened(r)
    with np.errstate(all="ignore"):
        return Expected(widened(z), wide_r, labels, weights, ids, options, arithmetic_of(z.dtype))


def agrees(got: Array, value: Array, bound: Array) -> np.ndarray:
    same = (got == value) | (np.isnan(got) & np.isnan(value))
    with np.errstate(invalid="ignore"):
        return same | (np.abs(got - value) <= bound)


def number_agrees(got: float, value: Any, bound: Any, huge: float, overflows: bool = False) -> bool:
    if overflows and got == math.inf:
        return True
    if np.isfinite(value) and abs(value) > huge:
        return not math.isnan(got) and abs(got) >= huge / 10 and (got > 0) == (value > 0)
    return bool(agrees(REAL(got), value, bound))


def half_ulp(x: Array, dtype: torch.dtype, truncated: bool) -> Array:
    info = torch.finfo(dtype)
    _, exponent = np.frexp(np.clip(np.abs(x), info.tiny, info.max))
    return np.ldexp(np.full_like(x, info.eps / (2 if truncated else 4)), exponent)


def stored(value: Array, bound: Array, dtype: torch.dtype, truncated: bool) -> tuple[Array, Array]:
    """What is left of a gradient in its dtype."""
    info = torch.finfo(dtype)
    value = np.where(np.isfinite(value), value, NAN)
    if dtype in (F16, BF16):
        bound = bound + half_ulp(np.nan_to_num(value) + bound, dtype, truncated) * (
            (value != 0) | (bound > 0)
        )
    over = np.abs(value) + bound >= info.max * (1 - info.eps)
    return value, np.where(over, np.inf, bound)


# --- calls of tnt_loss --------------------------------------------------------------------------------------------


class Disagreement(AssertionError):
    pass


def assert_none(failures: list[str]) -> None:
    """Of many calls: as many as can be read."""
    if failures:
        shown = "\n".join(failures[:5])
        pytest.fail(f"{len(failures)} calls disagree:\n{shown}", pytrace=False)


def layout(d: Draw, x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(N, V) values as (..., V), maybe in rows of a wider buffer; and that buffer."""
    vocab = x.size(-1)
    left, right = (0, 0) if d.chance(0.5) else (d.one((0, 1, 3, 8)), d.one((0, 1, 5, 64)))
    wide = torch.full((*shape, left + vocab + right), math.nan, dtype=x.dtype, device=x.device)
    view = wide[..., left : left + vocab]
    view.copy_(x.reshape(*shape, vocab))
    return view, wide


class LogitsCall:
    """A call of ``tnt_loss``."""

    dtypes = (F32, F32, BF16, F16, F64)
    vocabularies = (1, 2, 3, 7, 7, 64, 64, 64, 997, 1003, 1024, 1025, 4099)
    most_rows = 6

    def __init__(self, seed: int, index: int) -> None:
        d = self.draw = Draw(seed, index, 0)
        self.name = f"fuzz.{type(self).__name__}({seed}, {index})"
        self.dtype = d.one(self.dtypes)
        self.vocab = vocab = d.one(self.vocabularies)
        if vocab > 900 and d.chance(0.5):
            self.vocab = vocab = d.one((17, 64, 130))
        rows = int(d.rng.integers(1, self.most_rows + 1))
        if vocab > 1000:
            rows = min(rows, 3)
        shape = d.one(
            [s for s in ((rows,), (1, rows), (2, rows // 2), (rows, 1, 1)) if math.prod(s)]
        )
        if rows == 1 and d.chance(0.3):
            shape = ()
        self.shape, rows = shape, math.prod(shape)
        self.options = draw_options(d)
        real = F64 if self.dtype == F64 else F32
        pairs = [draw_pair(d, vocab, self.dtype) for _ in range(rows)]
        z, r = (torch.stack([to_dtype(pair[i], self.dtype) for pair in pairs]) for i in (0, 1))
        labels = d.rng.integers(vocab, size=rows)
        for i in range(rows):
            if d.chance(0.3):  # the likeliest token, of either side
                labels[i] = int(torch.nan_to_num(d.one((z, r))[i].double(), nan=0.0).argmax())
        weights = np.array([draw_weight(d) for _ in range(rows)])
        self.ids = None
        if d.chance(0.5):
            most = vocab + 1 if vocab <= 130 and d.chance(0.3) else int(d.rng.integers(1, 9))
            kinds = ("some", "some", "none", *(("all", "all but one") if most > vocab else ()))
            own = [draw_set(d, vocab, int(labels[i]), d.one(kinds), most) for i in range(rows)]
            ids = torch.from_numpy(np.stack(own)).to(d.one((torch.int64, torch.int32)))
            self.ids = ids[0] if d.chance(0.3) else ids.reshape(*shape, most)
            self.options["negative_ids"] = self.ids
        if d.chance(0.3):
            labels[d.rng.integers(rows)] = self.options.get("ignore_index", -100)
        if isinstance(self.options.get("alpha"), float) and d.chance(0.5):
            alpha = torch.from_numpy(d.normal(rows)).to(real)
            self.options["alpha"] = alpha.reshape(shape) if d.chance(0.7) else alpha[0]
        self.labels = torch.from_numpy(labels).to(d.one((torch.int64, torch.int32))).reshape(shape)
        self.weights = torch.from_numpy(weights).to(real).reshape(shape) if d.chance(0.85) else None
        self.options["return_stats"] = d.chance(0.5)
        self.inplace = d.chance(0.25)
        settings = settings_of(self.options)
        needs = settings.positive in exact.KLS or settings.negative in exact.KLS
        self.r_rows = r if needs or d.chance(0.5) else None
        self.z_rows = z
        self.upstream = None
        if self.options["reduction"] == "none" and d.chance(0.5):
            upstream = d.normal(rows)
            upstream[d.some(rows, 0.2)] = 0.0
            self.upstream = torch.from_numpy(upstream).to(real)

    def expected(self) -> Expected:
        return expected_of(
            self.z_rows, self.r_rows, self.labels, self.weights, self.ids, self.options
        )

    def run(self, backend: str, device: str = "cpu") -> tuple[Tensor, Tensor, Any]:
        """The loss and its gradient, and the statistics if the call asks for them, on the CPU."""

        def put(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        d = Draw(len(self.name), self.vocab)
        logits, wide = layout(d, put(self.z_rows), self.shape)
        ref = None if self.r_rows is None else layout(d, put(self.r_rows), self.shape)[0]
        leaf = logits.detach().requires_grad_()
        options = {name: put(x) for name, x in self.options.items()} | {"backend": backend}
        x = leaf
        if self.inplace:
            x = leaf * 1  # the output of a model
            options["inplace"] = True
        before = wide.clone()
        out = tnt.tnt_loss(x, ref, put(self.labels), put(self.weights), **options)
        loss, stats = out if isinstance(out, tuple) else (out, None)
        upstream = torch.ones_like(loss)
        if self.upstream is not None:
            upstream = put(self.upstream).reshape(self.shape)
        (gradient,) = torch.autograd.grad(loss, x, upstream)
        if not torch.equal(wide.nan_to_num(7.0), before.nan_to_num(7.0)):
            raise Disagreement(f"{self.name}: the logits' buffer was written to")
        if stats is not None:
            stats = tnt.RowStats(*(value.cpu() for value in stats))
        return loss.detach().cpu(), gradient.cpu(), stats

    def check(self, backend: str, *, device: str = "cpu", truncated: bool = False) -> None:
        """Raises ``Disagreement``. ``truncated``: where bfloat16 is stored, its last bits are cut off."""
        expected = self.expected()
        loss, gradient, stats = self.run(backend, device)
        report = Report(f"{self.name}.check({backend!r})", self.describe)
        real = F64 if self.dtype == F64 else F32
        if loss.dtype != real or gradient.dtype != self.dtype:
            report.add(f"dtypes {loss.dtype} and {gradient.dtype}")
        if gradient.shape != (*self.shape, self.vocab):
            report.add(f"gradient of shape {tuple(gradient.shape)}")
        compare_losses(report, expected, loss, stats, self.options["reduction"], self.shape)
        factors = expected.factors
        if self.upstream is not None:
            factors = factors * self.upstream.double().numpy()
        rows = widened(gradient.reshape(-1, self.vocab))
        for i, got in enumerate(rows):
            compare_gradient(report, expected, i, got, factors[i], self.dtype, truncated)
        report.raise_any()

    def describe(self, row: int | None = None) -> str:
        options = {k: v for k, v in self.options.items() if k != "negative_ids"}
        what = f"{self.dtype} V={self.vocab} {self.shape} {options}"
        if self.inplace:
            what += " inplace"
        if row is None:
            return what
        ids = None
        if self.ids is not None:
            ids = self.ids.reshape(-1, self.ids.size(-1))[row if self.ids.dim() > 1 else 0].tolist()
        w = 1.0 if self.weights is None else self.weights.reshape(-1)[row].item()
        what += f"; row {row}: label {self.labels.reshape(-1)[row].item()}, w {w}"
        if ids is not None:
            what += f", ids {ids[:12]}{'...' if len(ids) > 12 else ''}"
        for name, x in (("z", self.z_rows), ("r", self.r_rows)):
            if x is not None and self.vocab <= 8:
                what += f", {name} {x[row].tolist()}"
        return what


class SmallCall(LogitsCall):
    """For kernels that are simulated, an instruction at a time."""

    dtypes = (F32, BF16, F16)
    vocabularies = (1, 2, 3, 7, 17, 64, 130, 200, 803)
    most_rows = 3


class GpuCall(LogitsCall):
    """For kernels that cut a row into pieces: rows of one block, of several, and edges of every length."""

    dtypes = (F32, BF16, BF16, F16)
    vocabularies = (1, 2, 7, 64, 803, 1025, 4099, 8192, 20011, 32000, 50257)


class Report:
    def __init__(self, name: str, describe: Callable[[int | None], str]) -> None:
        self.name, self.describe, self.lines = name, describe, []

    def add(self, what: str, row: int | None = None) -> None:
        self.lines.append(f"  {what}\n    {self.describe(row)}")

    def raise_any(self) -> None:
        if self.lines:
            raise Disagreement("\n".join([self.name, *self.lines[:4]]))


def assert_agrees(result: Result, batch: Batch, label: str) -> None:
    """Of a batch whose losses are not reduced."""
    options, dtype = batch.options | {"reduction": "none"}, batch.logits.dtype
    expected = expected_of(
        batch.logits,
        batch.ref_logits,
        batch.labels,
        batch.weights,
        batch.options.get("negative_ids"),
        options,
    )
    report = Report(label, lambda row: f"row {row} of {options}")
    shape = tuple(batch.labels.shape)
    compare_losses(report, expected, result.loss, result.stats, "none", shape)
    for i, got in enumerate(widened(result.gradient)):
        compare_gradient(report, expected, i, got, expected.factors[i], dtype, False)
    report.raise_any()


STATS = ("loss", "kl", "negative_mass", "ref_negative_mass", "entropy")


def compare_losses(
    report: Report,
    expected: Expected,
    loss: Tensor,
    stats: Any,
    reduction: str,
    shape: tuple[int, ...],
) -> None:
    ulp = 2 * expected.arithmetic.unit
    rows, huge = len(expected.outcomes), expected.huge
    if loss.shape != (shape if reduction == "none" else ()):
        report.add(f"loss of shape {tuple(loss.shape)}")
        return
    per_row = loss.reshape(-1).tolist()
    total, total_bound, clear = REAL(0), REAL(0), True
    for i in range(rows):
        factor, outcomes = expected.factors[i], list(expected.variants(i))
        if factor == 0 or not outcomes:
            if reduction == "none" and per_row[i] != 0:
                report.add(f"loss {per_row[i]}, expected 0", i)
            continue
        products = [(x.loss.value * factor, x.loss.bound * abs(factor)) for x in outcomes]
        products = [(v, b + FEW_ULPS * ulp * abs(v) if np.isfinite(v) else b) for v, b in products]
        over, limit = any(x.overflows for x in outcomes), huge * min(1.0, abs(factor))
        if reduction == "none":
            got = per_row[i] * math.copysign(1, factor)
            agreed = (
                number_agrees(got, v * math.copysign(1, factor), b, limit, over)
                for v, b in products
            )
            if not any(agreed):
                report.add(f"loss {per_row[i]!r}, expected {shown(products)}", i)
        limited = not np.isfinite(products[0][0]) or abs(products[0][0]) < limit
        clear &= len(outcomes) == 1 and limited and not over
        with np.errstate(invalid="ignore"):  # inf - inf
            total += products[0][0]
        total_bound += products[0][1]
        if np.isfinite(products[0][0]):
            total_bound += rows * ulp * abs(products[0][0])
    if reduction != "none" and clear and not number_agrees(per_row[0], total, total_bound, huge):
        report.add(f"loss {per_row[0]!r}, expected {shown([(total, total_bound)])}")
    if stats is None:
        return
    for name in STATS:
        got = getattr(stats, name)
        if got.shape != shape or got.dtype != loss.dtype or got.requires_grad:
            report.add(f"stats.{name}: {got.shape} {got.dtype}")
            continue
        for i, value in enumerate(got.reshape(-1).tolist()):
            outcomes = list(expected.variants(i))
            if not outcomes:
                wanted = [(REAL(0) if name == "loss" else NAN, REAL(0))]
            else:
                wanted = [tuple(getattr(x, name)) for x in outcomes]
            over = any(x.overflows for x in outcomes) and name in ("loss", "kl")
            if not any(number_agrees(value, v, b, huge, over) for v, b in wanted):
                report.add(f"stats.{name} {value!r}, expected {shown(wanted)}", i)
            if name == "kl" and value < 0:
                report.add(f"a KL of {value}", i)


def shown(products: Any) -> str:
    return " or ".join(f"{float(v):.16g} ± {float(b):.2g}" for v, b in products)


def compare_gradient(
    report: Report,
    expected: Expected,
    row: int,
    got: Array,
    factor: float,
    dtype: torch.dtype,
    truncated: bool,
) -> None:
    if factor == 0 or expected.outcomes[row] is None:
        if (got != 0).any():
            report.add("a gradient other than 0", row)
        return
    worst = None
    for outcome in expected.variants(row):
        loss = outcome.loss.value
        absurd = outcome.overflows or (np.isfinite(loss) and abs(loss) > expected.huge)
        if absurd and outcome.kind != "negative_likelihood":
            return
        value, bound = outcome.gradient.value * factor, outcome.gradient.bound * abs(factor)
        rounding = UNDERFLOW[dtype] + FEW_ULPS * 2 * expected.arithmetic.unit * np.abs(value)
        bound = np.where((bound > 0) | (value != 0), bound + rounding, bound)
        value, bound = stored(value, bound, dtype, truncated)
        ok = agrees(got, value, bound)
        if ok.all():
            return
        at = int((~ok).nonzero()[0][0])
        worst = (
            f"gradient: {int((~ok).sum())} of {ok.size} are off, first {at}: got {float(got[at]):.9g}, "
            f"expected {float(value[at]):.9g} ± {float(bound[at]):.2g}"
        )
    assert worst is not None
    report.add(worst, row)


# --- calls of linear_tnt_loss -------------------------------------------------------------------------------------


class LinearCall:
    """A call of ``linear_tnt_loss``: float64 logits of the same inputs, off by what a matmul may round."""

    dtypes = (F32, F32, BF16, F16, F64)
    vocabularies = (1, 2, 3, 7, 31, 64, 130, 513)

    def __init__(self, seed: int, index: int) -> None:
        d = Draw(seed, index, 1)
        self.name = f"fuzz.{type(self).__name__}({seed}, {index})"
        self.dtype, self.vocab = d.one(self.dtypes), d.one(self.vocabularies)
        self.ref_dtype = d.one((self.dtype, self.dtype, self.dtype, F32, BF16))
        rows, dtype, vocab = int(d.rng.integers(1, 9)), self.dtype, self.vocab
        large = d.chance(0.1)  # enough for the matrix units of a CPU
        if large:
            rows, self.vocab = d.one((32, 40)), d.one((67, 130, 259))
            vocab = self.vocab
        self.shape = shape = d.one(
            [s for s in ((rows,), (1, rows), (2, rows // 2)) if math.prod(s)]
        )
        rows = self.rows = math.prod(shape)
        self.options = draw_options(d)
        real = F64 if dtype == F64 else F32
        self.linear: dict[str, Any] = {}
        if d.chance(0.3):
            self.linear["softcap"] = d.one((5.0, 30.0))
        if d.chance(0.3):
            self.linear["ref_softcap"] = d.one((5.0, 30.0))
        if d.chance(0.3):
            self.linear["logit_scale"] = d.one((0.125, 2.0, -0.7))
        if d.chance(0.3):
            self.linear["ref_logit_scale"] = d.one((0.125, 2.0, -0.7))
        padding = d.one((0, 0, 3))
        if padding:
            self.linear["vocab_size"] = vocab
        policy = self._head(d, dtype, padding, large)
        reference = self._head(d, self.ref_dtype, d.one((0, 5)) if padding else 0, large)
        if d.chance(0.5):  # next to p = q
            near = 10.0 ** -d.rng.integers(1, 6)
            reference = tuple(
                None
                if x is None
                else (x.double() + near * x.double() * torch.from_numpy(d.normal(*x.shape))).to(
                    self.ref_dtype
                )
                for x in policy
            )
            if d.chance(0.3):
                reference = tuple(None if x is None else x.to(self.ref_dtype) for x in policy)
            for name in ("softcap", "logit_scale"):
                self.linear.pop(f"ref_{name}", None)
                if name in self.linear:
                    self.linear[f"ref_{name}"] = self.linear[name]
        if d.chance(0.06):
            x = d.one((policy[0], reference[0]))
            x[d.rng.integers(rows), d.rng.integers(x.size(1))] = d.one(
                (math.nan, math.inf, -math.inf)
            )
        self.policy, self.reference = policy, reference
        labels = d.rng.integers(vocab, size=rows)
        if d.chance(0.3):
            labels[d.rng.integers(rows)] = self.options.get("ignore_index", -100)
        self.labels = torch.from_numpy(labels).reshape(shape)
        weights = torch.tensor([draw_weight(d) for _ in range(rows)], dtype=real)
        self.weights = weights.reshape(shape) if d.chance(0.85) else None
        self.ids = None
        if d.chance(0.5):
            most = int(d.rng.integers(1, 6))
            own = [
                draw_set(d, vocab, int(labels[i]) % vocab, d.one(("some", "none")), most)
                for i in range(rows)
            ]
            ids = torch.from_numpy(np.stack(own))
            self.ids = ids[0] if d.chance(0.3) else ids.reshape(*shape, most)
            self.options["negative_ids"] = self.ids
        if isinstance(self.options.get("alpha"), float) and d.chance(0.5):
            alpha = torch.from_numpy(d.normal(rows)).to(real)
            self.options["alpha"] = alpha.reshape(shape) if d.chance(0.7) else alpha[0]
        self.options["return_stats"] = d.chance(0.5)
        if d.chance(0.7):
            self.linear["chunk_size"] = d.one((32, 64)) if large else d.one((1, 2, 3, 64))
        if d.chance(0.2):
            self.linear["max_active_rows"] = d.one((rows, rows + 3))
        self.wanted = [d.chance(0.8), d.chance(0.8), d.chance(0.8)]
        if not any(self.wanted):
            self.wanted[0] = True
        self.upstream = None
        if self.options["reduction"] == "none" and d.chance(0.5):
            self.upstream = torch.from_numpy(d.normal(rows)).to(real)

    def _head(
        self, d: Draw, dtype: torch.dtype, padding: int, large: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        width, height = d.one((1, 3, 8, 33)), d.one((0.3, 1.0, 3.0, 10.0))
        if large:
            width = d.one((32, 64))
        hidden = to_dtype(d.normal(self.rows, width), dtype)
        weight = to_dtype(height * d.normal(self.vocab + padding, width) / math.sqrt(width), dtype)
        if not d.chance(0.5):
            return hidden, weight, None
        bias = d.normal(self.vocab + padding)
        if d.chance(0.4):
            value = d.one((-math.inf, -1e4, -1e4 if dtype == F16 else -1e30))
            bias[d.some(len(bias), d.one((0.1, 0.6)))] = value
        return hidden, weight, to_dtype(bias, dtype)

    def _logits(
        self, head: tuple[Tensor, Tensor, Tensor | None], prefix: str
    ) -> tuple[np.ndarray, ...]:
        """Float64 logits (N, V), how far off they may be, the softcap's derivative, and its error."""
        hidden, weight, bias = head
        dtype, cap = hidden.dtype, self.linear.get(f"{prefix}softcap")
        scale = self.linear.get(f"{prefix}logit_scale", 1.0)
        h, w = hidden.double().numpy(), weight.double().numpy()[: self.vocab]
        b = np.zeros(self.vocab) if bias is None else bias.double().numpy()[: self.vocab]
        unit = DOUBLE.unit if dtype == F64 else SINGLE.unit
        raw = scale * (h @ w.T + b)
        size = abs(scale) * (np.abs(h) @ np.abs(w).T + np.abs(b))
        error = (h.shape[1] + 8) * unit * size
        if dtype in (F16, BF16):
            # once, and once more where product, factor and bias are separate steps
            error = error + torch.finfo(dtype).eps / 2 * (
                np.abs(raw) + size * (bias is not None or scale != 1.0)
            )
            if cap is not None:
                error = error + torch.finfo(dtype).eps / 2 * np.abs(raw)
            error = error + 2.0**-24 * (cap or 1.0)  # float16's subnormal numbers
        error = np.where(np.isfinite(raw), error, 0.0)
        if cap is None:
            return raw, error, np.ones_like(raw), np.zeros_like(raw)
        tanh = np.tanh(raw / cap)
        slope = 1 - tanh * tanh
        steepest = 1 - np.tanh(np.maximum(np.abs(raw) - error, 0) / cap) ** 2
        slope_error = 2 * np.minimum(steepest * error / cap, 1.0) + 8 * unit
        return (
            cap * tanh,
            np.minimum(steepest * error, 2 * cap) + 8 * unit * cap,
            slope,
            slope_error,
        )

    def check(self, backend: str) -> None:
        """Raises ``Disagreement``."""
        settings = settings_of(self.options)
        needs = settings.positive in exact.KLS or settings.negative in exact.KLS
        with np.errstate(all="ignore"):
            z, slack_z, slope, slope_error = self._logits(self.policy, "")
            r, slack_r = self._logits(self.reference, "ref_")[:2]
            arithmetic = DOUBLE if self.dtype == F64 else HALF
            if self.dtype == F64 and self.ref_dtype != F64:
                arithmetic = HALF
            expected = Expected(
                z.astype(REAL), r.astype(REAL), self.labels, self.weights, self.ids, self.options,
                arithmetic._replace(common=arithmetic.delta), (slack_z.astype(REAL), slack_r.astype(REAL)),
                self.dtype == self.ref_dtype,
            )  # fmt: skip
        leaves = [
            None if x is None else x.detach().clone().requires_grad_(want)
            for x, want in zip(self.policy, self.wanted, strict=True)
        ]
        hidden, weight, bias = leaves
        ref_hidden, ref_weight, ref_bias = self.reference if needs else (None, None, None)
        shaped = hidden.reshape(*self.shape, -1)
        keywords = {
            **self.options,
            **self.linear,
            "backend": backend,
            "bias": bias,
            "ref_bias": ref_bias,
        }
        if ref_hidden is not None:
            ref_hidden = ref_hidden.reshape(*self.shape, -1)
        out = tnt.linear_tnt_loss(
            shaped, weight, ref_hidden, ref_weight, self.labels, self.weights, **keywords
        )
        loss, stats = out if isinstance(out, tuple) else (out, None)
        report = Report(f"{self.name}.check({backend!r})", self.describe)
        compare_losses(
            report, expected, loss.detach(), stats, self.options["reduction"], self.shape
        )
        upstream = torch.ones_like(loss)
        if self.upstream is not None:
            upstream = self.upstream.reshape(self.shape)
        if loss.requires_grad:
            loss.backward(upstream)
            with np.errstate(all="ignore"):
                self._compare_gradients(report, expected, leaves, slope, slope_error)
        report.raise_any()

    def _compare_gradients(
        self,
        report: Report,
        expected: Expected,
        leaves: list[Tensor | None],
        slope: np.ndarray,
        slope_error: np.ndarray,
    ) -> None:
        hidden, weight, bias = leaves
        rows, vocab, dtype = self.rows, self.vocab, self.dtype
        unit = DOUBLE.unit if dtype == F64 else SINGLE.unit
        value, bound = np.zeros((rows, vocab)), np.zeros((rows, vocab))
        known = np.ones(rows, bool)  # rows whose gradient is compared
        empty = np.zeros(rows, bool)  # rows without a gradient
        factors = expected.factors
        if self.upstream is not None:
            factors = factors * self.upstream.double().numpy()
        for i, outcome in enumerate(expected.outcomes):
            if outcome is None or factors[i] == 0:
                empty[i] = True
                # 0 · NaN: what a row of factor 0 then adds to the weight's gradient is nobody's promise
                known[i] = outcome is None or bool(torch.isfinite(self.policy[0][i]).all())
                continue
            large = np.isfinite(outcome.loss.value) and abs(outcome.loss.value) > 1e30
            known[i] = outcome.otherwise is None and not large
            value[i] = outcome.gradient.value * factors[i]
            bound[i] = outcome.gradient.bound * abs(factors[i])
        scale = self.linear.get("logit_scale", 1.0)
        rounding = 0.0
        if dtype in (F16, BF16):
            # of the gradient of logits; float16's rows are scaled to a largest entry of 1/2 to 1
            rounding = torch.finfo(dtype).eps / 2
        own = np.abs(value) * FEW_ULPS * 2 * unit + 2.0**-126 * ((bound > 0) | (value != 0))
        bound = bound + own
        slope, slope_error = (np.where(empty[:, None], 0.0, x) for x in (slope, slope_error))
        product = value * slope
        bound = bound * slope + (np.abs(value) + bound) * slope_error
        largest = np.abs(product).max(-1, keepdims=True)
        bound = bound + rounding * (np.abs(product) + bound)
        if dtype == F16:
            bound = bound + 2.0**-23 * largest
        value, bound = scale * product, abs(scale) * bound
        h, w = self.policy[0].double().numpy(), self.policy[1].double().numpy()[:vocab]
        h = np.where(empty[:, None], 0.0, h)

        def compare(
            what: str, got: Tensor, want: np.ndarray, limit: np.ndarray, skip: np.ndarray
        ) -> None:
            want, limit = stored(want.astype(REAL), limit.astype(REAL), dtype, False)
            ok = agrees(widened(got), want, limit) | skip
            if not ok.all():
                at = tuple(int(x) for x in np.argwhere(~ok)[0])
                report.add(
                    f"{what}: {int((~ok).sum())} of {ok.size} are off, first {at}: got {got[at].item():.9g}, "
                    f"expected {float(want[at]):.9g} ± {float(limit[at]):.2g}"
                )

        if hidden is not None and hidden.requires_grad:
            want, sizes = value @ w, np.abs(value) @ np.abs(w)
            limit = bound @ np.abs(w) + (vocab + 8) * unit * sizes
            limit = np.where(empty[:, None], 0.0, limit)
            compare("hidden.grad", hidden.grad.reshape(rows, -1), want, limit, ~known[:, None])
            if (hidden.grad.reshape(rows, -1)[torch.from_numpy(empty & known)] != 0).any():
                report.add("hidden.grad of a row that is left out")
        skip = np.full((vocab, 1), not known.all())
        if weight is not None and weight.requires_grad:
            want, sizes = value.T @ h, np.abs(value).T @ np.abs(h)
            limit = bound.T @ np.abs(h) + ((rows + 8) * unit + rounding) * sizes
            compare("weight.grad", weight.grad[:vocab], want, limit, skip)
            if (weight.grad[vocab:] != 0).any():
                report.add("weight.grad of the padding")
        if bias is not None and bias.requires_grad:
            limit = bound.sum(0) + (rows + 8) * unit * np.abs(value).sum(0)
            compare("bias.grad", bias.grad[:vocab], value.sum(0), limit, skip[:, 0])
            if (bias.grad[vocab:] != 0).any():
                report.add("bias.grad of the padding")

    def describe(self, row: int | None = None) -> str:
        options = {k: v for k, v in self.options.items() if k != "negative_ids"}
        dtypes = f"{self.dtype} (reference {self.ref_dtype})"
        widths = [head[0].size(1) for head in (self.policy, self.reference)]
        what = f"{dtypes} V={self.vocab} {self.shape} H={widths} {options} {self.linear} wanted={self.wanted}"
        return what if row is None else f"{what}; row {row}"
