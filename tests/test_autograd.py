"""Autograd: what backward gives, what ``inplace`` overwrites and when, what raises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    INF,
    NAN,
    OBJECTIVES,
    Batch,
    assert_agrees,
    mixed_batch,
    run,
    truth,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tnt_kernels as tnt
from tnt_kernels.objectives import METHODS, Objective
from tnt_kernels.reference import row_terms

REDUCTIONS = ("mean", "sum", "none")


def written_in_backward(dtype: torch.dtype, reduction: str) -> bool:
    return dtype == F16 or reduction == "none"


def loss_of(logits: Tensor, batch: Batch, backend: str, **keywords: Any) -> Any:
    options = {**batch.options, **keywords}
    arguments = (batch.ref_logits, batch.labels, batch.weights)
    return tnt.tnt_loss(logits, *arguments, backend=backend, **options)


def non_leaf(batch: Batch) -> Tensor:
    """What a model would return."""
    return batch.logits.clone().requires_grad_() * 1


# --- inplace ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inplace_writes_the_gradient_over_the_logits(
    reduction: str, dtype: torch.dtype, backend: str
) -> None:
    for objective in OBJECTIVES:
        batch = mixed_batch(1100, dtype).with_options(method=objective, reduction=reduction)
        fresh = run(batch, backend)
        logits = non_leaf(batch)
        before, version = logits.detach().clone(), logits._version
        loss = loss_of(logits, batch, backend, inplace=True)
        deferred = written_in_backward(dtype, reduction)
        if deferred:
            torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0, equal_nan=True)
            assert logits._version == version
        else:
            assert torch.equal(logits.detach(), fresh.gradient)
            assert logits._version > version
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert logits._version > version
        assert gradient.data_ptr() == logits.data_ptr()
        assert torch.equal(gradient, fresh.gradient)
        assert torch.equal(logits.detach(), fresh.gradient)
        assert torch.equal(loss, fresh.loss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inplace_writes_nothing_where_no_gradient_is_needed(reduction: str, backend: str) -> None:
    for dtype in DTYPES:
        batch = mixed_batch(40, dtype).with_options(reduction=reduction)
        want = run(batch, backend).loss
        plain = batch.logits.clone()
        leaf = batch.logits.clone().requires_grad_()
        wanted = non_leaf(batch)

        def evaluate(x: Tensor, batch: Batch = batch) -> Tensor:
            return loss_of(x, batch, backend, inplace=True)

        results = [(plain, evaluate(plain))]
        with torch.no_grad():
            results += [(x, evaluate(x)) for x in (leaf, wanted)]
        with torch.inference_mode():
            results += [(x, evaluate(x)) for x in (plain, leaf)]
        for x, loss in results:
            torch.testing.assert_close(x.detach(), batch.logits, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(loss, want)
            assert not loss.requires_grad
        assert plain._version == leaf._version == wanted._version == 0


@pytest.mark.parametrize(("dtype", "reduction"), [(F32, "mean"), (F32, "none"), (F16, "mean")])
def test_autograd_refuses_logits_that_are_gone(
    dtype: torch.dtype, reduction: str, backend: str
) -> None:
    """Ops that had saved them raise in backward: no silent corruption."""
    batch = mixed_batch(40, dtype, rows=7).with_options(reduction=reduction)
    logits = non_leaf(batch)
    square = logits.square().sum()  # saved its input
    (square + loss_of(logits, batch, backend).sum()).backward()  # in order, without inplace

    logits = non_leaf(batch)
    square = logits.square().sum()
    loss = loss_of(logits, batch, backend, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square + loss.sum()).backward()

    logits = torch.tanh(batch.logits.clone().requires_grad_())  # saved its output
    loss = loss_of(logits, batch, backend, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()

    logits = non_leaf(batch)
    first = loss_of(logits, batch, backend, inplace=True)
    with torch.no_grad():
        logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


@pytest.mark.parametrize(("dtype", "reduction"), [(F32, "mean"), (F32, "none"), (F16, "sum")])
def test_second_backward_in_place_raises(dtype: torch.dtype, reduction: str, backend: str) -> None:
    batch = mixed_batch(40, dtype).with_options(reduction=reduction)
    logits = non_leaf(batch)
    loss = loss_of(logits, batch, backend, inplace=True).sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    first = first.clone()
    with pytest.raises(RuntimeError, match=r"second backward.*inplace=True"):
        torch.autograd.grad(loss, logits)
    assert torch.equal(logits.detach(), first)


def bad_targets(batch: Batch) -> dict[str, tuple[Tensor, str]]:
    rows, vocab = batch.logits.shape
    z = batch.logits
    leaf = z.clone().requires_grad_()
    wide = torch.zeros(rows, 2 * vocab).requires_grad_() * 1
    return {
        "a leaf": (leaf, "leaf"),
        "a view of a leaf": (leaf.view(rows, vocab), "leaf"),
        "a slice of a leaf": (wide.detach().requires_grad_()[:, :vocab], "leaf"),
        "expanded rows": ((z[:1] * 1).requires_grad_().mul(1).expand(rows, -1), "strides"),
        "overlapping rows": (wide.as_strided((rows, vocab), (vocab - 1, 1)), "strides"),
        "overlapping entries": (wide.as_strided((rows, vocab), (vocab, 0)), "strides"),
        "every second column": (wide[:, ::2], "strides"),
        "columns": ((z.t().contiguous().requires_grad_() * 1).t(), "strides"),
    }


@pytest.mark.parametrize("name", list(bad_targets(mixed_batch(10))))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_refuses(name: str, reduction: str, backend: str) -> None:
    batch = mixed_batch(10).with_options(reduction=reduction)
    logits, message = bad_targets(batch)[name]
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=f"^inplace: .*{message}"):
        loss_of(logits, batch, backend, inplace=True)
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0, equal_nan=True)
    assert logits._version == 0


def test_inplace_refuses_shifted_positions(backend: str) -> None:
    """(B, T - 1, V) of (B, T, V) is not (N, V) without a copy; the last position of one sequence is."""
    hidden = torch.randn(2, 5, 10, requires_grad=True)
    labels = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^inplace: .*shift labels"):
        tnt.tnt_loss(
            (hidden * 1)[:, :-1], torch.randn(2, 4, 10), labels, inplace=True, backend=backend
        )
    one = (hidden * 1)[:1, :-1]
    tnt.tnt_loss(one, torch.randn(1, 4, 10), labels[:1], inplace=True, backend=backend).backward()
    assert (hidden.grad[:1, :-1] != 0).any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_refuses_a_shared_reference(reduction: str, backend: str) -> None:
    labels = torch.tensor([1, 2, 3])
    for shift, together in ((0, True), (1, True), (9, True), (29, True), (30, False), (60, False)):
        buffer = torch.randn(100, requires_grad=True) * 1
        logits = buffer[:30].view(3, 10)
        ref = buffer.detach()[shift : shift + 30].view(3, 10)
        before = buffer.detach().clone()

        def call(logits: Tensor = logits, ref: Tensor = ref) -> Tensor:
            return tnt.tnt_loss(
                logits, ref, labels, reduction=reduction, inplace=True, backend=backend
            ).sum()

        if together:
            with pytest.raises(ValueError, match=r"^inplace: .*ref_logits share"):
                torch.autograd.grad(call(), logits)
            assert torch.equal(buffer.detach(), before)
        else:
            call().backward()
            assert torch.equal(ref, before[shift : shift + 30].view(3, 10))
            assert not torch.equal(buffer.detach()[:30], before[:30])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_accepts_interleaved_rows_of_one_buffer(reduction: str, backend: str) -> None:
    """Policy and reference from one forward pass of both: (N, 2, V) or (N, V + V)."""
    batch = mixed_batch(10).with_options(reduction=reduction)
    want = run(batch, backend)
    for side in (0, 1):
        sides = [batch.logits, batch.ref_logits]
        both = torch.stack(sides[:: 1 - 2 * side], 1).requires_grad_() * 1
        logits, ref = both[:, side], both.detach()[:, 1 - side]
        interleaved = Batch(logits, ref, batch.labels, batch.weights, batch.options)
        loss = loss_of(logits, interleaved, backend, inplace=True)
        (gradient,) = torch.autograd.grad(loss.sum(), both)
        assert torch.equal(gradient[:, side], want.gradient)
        assert torch.equal(logits.detach(), want.gradient)
        assert (gradient[:, 1 - side] == 0).all()
        torch.testing.assert_close(ref, batch.ref_logits, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_inplace_on_a_padded_vocabulary(dtype: torch.dtype, backend: str) -> None:
    """The gradient of the whole buffer: 0 in the padding."""
    batch = mixed_batch(37, dtype)
    want = run(batch, backend).gradient
    padded = torch.nn.functional.pad(batch.logits, (0, 3)).requires_grad_()
    whole = padded * 1
    loss = loss_of(whole[:, :37], batch, backend, inplace=True)
    (gradient,) = torch.autograd.grad(loss, padded)
    assert torch.equal(gradient[:, :37], want)
    assert (gradient[:, 37:] == 0).all()


def test_inplace_with_another_use_of_the_logits(backend: str) -> None:
    """One that saved nothing: both gradients arrive."""
    batch = mixed_batch(10, rows=7)
    want = run(batch, backend).gradient
    leaf = batch.logits.clone().requires_grad_()
    logits = leaf * 1
    total = logits.sum()
    (total + loss_of(logits, batch, backend, inplace=True)).backward()
    torch.testing.assert_close(leaf.grad, want + 1)


# --- upstream gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeated_backward(reduction: str, dtype: torch.dtype, backend: str) -> None:
    """Right every time with a fresh gradient, also after a scale of 0."""
    batch = mixed_batch(40, dtype).with_options(reduction=reduction)
    want = run(batch, backend).gradient
    leaf = batch.logits.clone().requires_grad_()
    loss = loss_of(leaf, batch, backend).sum()
    kept = []
    for scale in (0.0, 1.0, 4.0, 0.5, 1.0):
        (gradient,) = torch.autograd.grad(loss * scale, leaf, retain_graph=True)
        kept.append((gradient, scale))
    (gradient,) = torch.autograd.grad(loss, leaf)
    kept.append((gradient, 1.0))
    for gradient, scale in kept:
        torch.testing.assert_close(
            gradient, want * scale, rtol=2e-3 if dtype == F16 else 1e-6, atol=1e-7
        )
    assert torch.equal(kept[-1][0], want)
    assert (kept[0][0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_scaled_loss(inplace: bool, dtype: torch.dtype, backend: str) -> None:
    """GradScaler, gradient accumulation: (loss * s).backward()."""
    batch = mixed_batch(60, dtype)
    expected = truth(batch)
    for scale in (0.25, 1024.0, -2.0):
        logits = non_leaf(batch)
        loss = loss_of(logits, batch, backend, inplace=inplace)
        (gradient,) = torch.autograd.grad(loss * scale, logits)
        upstream = torch.full(batch.labels.shape, scale)
        result = run(batch, backend)._replace(gradient=gradient)
        assert_agrees(result, expected, batch, upstream=upstream, label=f"scale {scale}")


def test_accumulation_over_two_batches(backend: str) -> None:
    a, b = mixed_batch(30, seed=1), mixed_batch(30, seed=2)
    leaf = torch.zeros(12, 30, requires_grad=True)
    for batch in (a, b):
        (
            loss_of(leaf + batch.logits.nan_to_num(0.0, posinf=0.0), batch, backend, inplace=True)
            / 2
        ).backward()
    want = (run(a, backend).gradient + run(b, backend).gradient) / 2
    torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_of_every_row(inplace: bool, backend: str) -> None:
    """Expanded, strided, scattered by indexing; a row with upstream 0 gets 0, NaN or not."""
    factors = torch.linspace(-1, 2, 12)
    twice = torch.zeros(12)
    twice[1], twice[5] = 1, 2
    uses: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda loss: loss.sum(), torch.ones(12)),
        (lambda loss: (loss * factors).sum(), factors),
        (lambda loss: loss[[1, 5, 5]].sum(), twice),
        (lambda loss: loss.view(3, 4).t()[0].sum(), torch.tensor([1.0, 0, 0, 0] * 3)),
    ]
    for dtype in DTYPES:
        batch = mixed_batch(30, dtype)
        expected = truth(batch)
        batch = batch.with_options(reduction="none", inplace=inplace)
        for use, upstream in uses:
            logits = non_leaf(batch)
            loss = loss_of(logits, batch, backend)
            (gradient,) = torch.autograd.grad(use(loss), logits)
            result = run(batch, backend)._replace(gradient=gradient)
            assert_agrees(result, expected, batch, reduction="none", upstream=upstream)
        broken = non_leaf(batch)
        with torch.no_grad():
            broken[1] = NAN
        (gradient,) = torch.autograd.grad(loss_of(broken, batch, backend)[[0, 2]].sum(), broken)
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_float16_mean_does_not_underflow(inplace: bool, backend: str) -> None:
    """A mean over many rows, with a GradScaler's factor: as good as float16 can hold the product."""
    torch.manual_seed(0)
    rows, vocab, factor, count = 500, 400, 2.0**16, 20_000
    z, r = torch.randn(2, rows, vocab).half()
    batch = Batch(z, r, torch.randint(vocab, (rows,)), torch.ones(rows))
    expected = truth(batch)
    exact = expected.gradient * (factor / count)

    def error(gradient: Tensor) -> float:
        return float((gradient.double() - exact).norm() / exact.norm())

    assert (
        error((exact / factor).half() * factor) > 0.02
    )  # what a gradient without the factor keeps
    logits = non_leaf(batch)
    loss = loss_of(logits, batch, backend, inplace=inplace, normalizer=count)
    (gradient,) = torch.autograd.grad(loss * factor, logits)
    result = run(batch, backend, normalizer=count)._replace(gradient=gradient)
    upstream = torch.full((rows,), factor)
    assert_agrees(result, expected, batch, normalizer=count, upstream=upstream)
    assert error(gradient) < 2.0**-11


# --- derivatives -----------------------------------------------------------------------------------------


def smooth_batch() -> Batch:
    """Float64, no ignored NaN: something finite differences can be taken of."""
    batch = mixed_batch(7, F64, seed=2, rows=10)
    logits, ref = (x.nan_to_num(0.5, posinf=0.5) for x in (batch.logits, batch.ref_logits))
    return Batch(logits, ref, batch.labels, batch.weights, {**batch.options, "temperature": 1.3})


@pytest.mark.parametrize("method", [*METHODS, Objective("none", "negative_likelihood")], ids=str)
def test_gradcheck(method: Any, backend: str) -> None:
    batch = smooth_batch()
    for smoothing, reduction in itertools.product(("negatives", "uniform"), ("mean", "none")):
        keywords = {
            "method": method,
            "smoothing": smoothing,
            "eps": 1e-3,
            "reduction": reduction,
            "alpha": 0.7,
        }

        def loss(x: Tensor, keywords: dict[str, Any] = keywords) -> Tensor:
            return loss_of(x, batch, backend, **keywords)

        leaf = batch.logits.clone().requires_grad_()
        assert torch.autograd.gradcheck(loss, leaf, fast_mode=backend != "cpu")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(reduction: str, backend: str) -> None:
    batch = mixed_batch(10, F64, rows=7).with_options(reduction=reduction)
    leaf = batch.logits.clone().requires_grad_()
    factor = torch.ones((), requires_grad=True)
    for loss, message in (
        (loss_of(leaf, batch, backend).sum(), "does not require grad"),
        (loss_of(leaf, batch, backend).sum() * factor, "once_differentiable"),
    ):
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_models_parameters(dtype: torch.dtype, backend: str) -> None:
    """Gradients through a linear layer: those of the oracle's autograd."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(16, 50).to(dtype)
    hidden = torch.randn(3, 4, 16, dtype=dtype)
    batch = mixed_batch(50, dtype, ids=0)
    labels, weights = batch.labels.view(3, 4), batch.weights.view(3, 4)
    ref = batch.ref_logits.nan_to_num(0.0, posinf=0.0).view(3, 4, 50)
    gradients = []
    for inplace in (False, True):
        layer.zero_grad()
        tnt.tnt_loss(
            layer(hidden), ref, labels, weights, method="tnrf", inplace=inplace, backend=backend
        ).backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    assert all(map(torch.equal, *gradients))
    layer.zero_grad()
    logits = layer(hidden).flatten(0, 1)
    terms = row_terms(
        logits.double(),
        ref.flatten(0, 1).double(),
        batch.labels,
        batch.weights.double(),
        objective=METHODS["tnrf"],
    )
    ((terms.loss * terms.scale).sum() / 10).backward()
    for got, p in zip(gradients[0], layer.parameters(), strict=True):
        error = (got.double() - p.grad.double()).norm() / p.grad.double().norm()
        assert error < (1e-5 if dtype == F32 else 1e-2)


def test_nothing_but_the_logits_gets_a_gradient(backend: str) -> None:
    batch = mixed_batch(30)
    leaf = batch.logits.clone().requires_grad_()
    arguments = {"alpha": torch.tensor(2.0), "normalizer": torch.tensor(3.0), "return_stats": True}
    loss, stats = loss_of(leaf, batch, backend, **arguments)
    loss.backward()
    assert leaf.grad is not None
    tensors = (batch.ref_logits, batch.labels, batch.weights, arguments["alpha"], *stats)
    assert all(not x.requires_grad and x.grad is None for x in tensors)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 3])
def test_the_loss_is_on_the_graph_when_all_rows_are_ignored(
    rows: int, reduction: str, backend: str
) -> None:
    layer = torch.nn.Linear(4, 9)
    logits = layer(torch.randn(rows, 4))
    labels = torch.full((rows,), -100)
    loss = tnt.tnt_loss(logits, torch.randn(rows, 9), labels, reduction=reduction, backend=backend)
    assert loss.requires_grad
    loss.sum().backward()
    assert loss.sum() == 0
    assert (layer.weight.grad == 0).all()


def test_statistics_alone_have_no_gradient(backend: str) -> None:
    batch = mixed_batch(30)
    for reduction in REDUCTIONS:
        leaf = batch.logits.clone().requires_grad_()
        loss, stats = loss_of(leaf, batch, backend, reduction=reduction, return_stats=True)
        assert loss.requires_grad
        for x in stats:
            assert not x.requires_grad
            assert x.grad_fn is None
        with pytest.raises(RuntimeError, match="does not require grad"):
            stats.kl.sum().backward()


# --- contexts ----------------------------------------------------------------------------------------------


def test_autocast(backend: str) -> None:
    """Logits as autocast makes them; the loss stays in float32, and so do float32 logits."""
    torch.manual_seed(0)
    layer, hidden = torch.nn.Linear(8, 30), torch.randn(6, 8)
    labels, weights = torch.arange(6), torch.tensor([1.0, -1, 1, -0.5, 0, 2])
    with torch.autocast("cpu", dtype=BF16):
        logits = layer(hidden)
        ref = logits.detach() + 0.5
        assert logits.dtype == BF16
        loss = tnt.tnt_loss(logits, ref, labels, weights, backend=backend)
        kept = tnt.tnt_loss(logits.float(), ref.float(), labels, weights, backend=backend)
    assert loss.dtype == F32
    outside = tnt.tnt_loss(logits.detach(), ref, labels, weights, backend=backend)
    assert torch.equal(loss, outside)
    assert torch.equal(
        kept, tnt.tnt_loss(logits.detach().float(), ref.float(), labels, weights, backend=backend)
    )
    loss.backward()
    assert layer.weight.grad.dtype == F32
    assert layer.weight.grad.norm() > 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_saved_tensors_may_be_moved_or_recomputed(
    inplace: bool, reduction: str, backend: str
) -> None:
    """Saved-tensor hooks (offloading) and activation checkpointing."""
    batch = mixed_batch(40).with_options(reduction=reduction, inplace=inplace)
    want = run(batch, backend).gradient
    leaf = batch.logits.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        loss = loss_of(leaf * 1, batch, backend).sum()
    loss.backward()
    assert torch.equal(leaf.grad, want)
    leaf.grad = None
    checkpoint(lambda x: loss_of(x * 1, batch, backend).sum(), leaf, use_reentrant=False).backward()
    assert torch.equal(leaf.grad, want)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_and_hooks(backend: str) -> None:
    batch = mixed_batch(40, rows=7)
    want = run(batch, backend).gradient
    logits = non_leaf(batch)
    logits.register_hook(lambda g: g * 2)
    with torch.autograd.detect_anomaly(check_nan=True):
        loss = loss_of(logits, batch, backend)
        (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, want * 2)


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_beyond_the_inputs(reduction: str, dtype: torch.dtype, cpu: str) -> None:
    """The gradient and no more; in place, some bytes a row."""
    rows, vocab = 24, 20_000
    batch = mixed_batch(vocab, dtype, rows=rows).with_options(reduction=reduction)
    size = batch.logits.numel() * batch.logits.element_size()
    for inplace, limit in ((False, size), (True, 0)):
        logits = non_leaf(batch)
        with torch.profiler.profile(
            profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
        ) as profile:
            loss = loss_of(logits, batch, cpu, inplace=inplace, return_stats=True)[0]
            torch.autograd.grad(loss, logits, torch.ones_like(loss))
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
        assert allocated <= limit + 256 * rows + 4096, (inplace, allocated - limit)


# --- the operators -------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Our operators, and what they were called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "tnt_kernels":
            assert not kwargs
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


def test_opcheck(cpu: str) -> None:
    """Schemas, fake tensors and tracing of every operator, on the calls that ``tnt_loss`` makes of it."""
    seen = set()
    for dtype, reduction, inplace, stats in itertools.product(
        (F32, F16), ("mean", "none"), (False, True), (False, True)
    ):
        batch = mixed_batch(9, dtype, rows=4).with_options(
            reduction=reduction, inplace=inplace, return_stats=stats
        )
        batch = batch.with_options(alpha=torch.tensor(2.0)) if stats else batch
        with Recorder() as recorder:
            run(batch, cpu)
        for op, args in recorder.calls:
            if (op, dtype, stats) in seen:
                continue
            seen.add((op, dtype, stats))
            args = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)
            torch.library.opcheck(op, args)
    names = {op.__name__.split(".")[0] for op, *_ in seen}
    assert names == {"row_losses", "row_losses_", "row_gradients", "row_gradients_"}


def test_infinite_upstream_reaches_active_rows_only(backend: str) -> None:
    """What a GradScaler that has overflowed sends, where the gradient is written in backward."""
    for dtype, upstream, reduction in itertools.product((F32, F16), (INF, NAN), ("mean", "none")):
        if not written_in_backward(dtype, reduction):
            continue
        batch = mixed_batch(30, dtype, ids=0).with_options(alpha=0.0, reduction=reduction)
        factor = torch.full(() if reduction == "mean" else (12,), upstream)
        gradient = run(batch, backend, upstream=factor).gradient
        assert not torch.isfinite(gradient[0]).all()
        assert (gradient[[7, 8]] == 0).all()  # rows of weight 0
        assert (gradient[[1, 3]] == 0).all()  # α = 0
