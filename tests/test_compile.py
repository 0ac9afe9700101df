"""torch.compile(fullgraph=True) of a training step: the eager numbers, and no recompilation for new data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import BF16, F16, F32
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import tnt_kernels as tnt

VOCAB, HIDDEN = 40, 8

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model(dtype: torch.dtype = F32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, VOCAB).to(dtype)


def data(rows: int = 6, dtype: torch.dtype = F32, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(rows, HIDDEN, generator=generator).to(dtype),
        "ref_logits": torch.randn(rows, VOCAB, generator=generator).to(dtype),
        "labels": torch.randint(VOCAB, (rows,), generator=generator),
        "weights": torch.tensor([1.0, -1.0, -0.3, 0.0, 2.0, 1.0]).repeat(-(-rows // 6))[:rows],
    }


def step(layer: nn.Module, backend: str, **keywords: Any) -> Callable[..., tuple[Any, Tensor]]:
    """A forward and backward pass: what the loss returns and the gradient of the weights."""

    def loss(
        hidden: Tensor, ref_logits: Tensor, labels: Tensor, weights: Tensor, **more: Any
    ) -> Any:
        arguments = (layer(hidden), ref_logits, labels, weights)
        return tnt.tnt_loss(*arguments, backend=backend, **keywords, **more)

    return loss


def train(loss: Callable[..., Any], layer: nn.Linear, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """Loss, statistics if any, gradients of the parameters; the loss scaled as gradient accumulation would."""
    layer.zero_grad()
    out = loss(**batch)
    value, stats = out if isinstance(out, tuple) else (out, ())
    (value.sum() * 0.5).backward()
    return value.detach(), *stats, *(p.grad.clone() for p in layer.parameters())


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "inplace": {"inplace": True},
    "none": {"reduction": "none"},
    "none inplace": {"reduction": "none", "inplace": True},
    "sum": {"reduction": "sum", "method": "tnrf", "smoothing": "uniform"},
    "stats": {"return_stats": True, "method": "tnfll"},
    "stats inplace": {"return_stats": True, "inplace": True},
    "likelihoods": {"method": "ul+ll", "nl_floor": -3.0, "temperature": 1.5},
    "ids": {"negative_ids": torch.tensor([3, 5, -1]), "method": "tnrr"},
}


@pytest.mark.parametrize(
    ("name", "dtype", "backend"),
    [
        *((name, F32, "cpu") for name in CASES),
        ("default", BF16, "cpu"),
        *((name, F16, "cpu") for name in ("default", "inplace", "stats inplace")),
        *((name, F32, "torch") for name in ("default", "none inplace", "ids")),
    ],
    indirect=["backend"],
)
def test_a_traced_step_is_the_eager_one(name: str, dtype: torch.dtype, backend: str) -> None:
    layer, batch = model(dtype), data(dtype=dtype)
    loss = step(layer, backend, **CASES[name])
    want = train(loss, layer, batch)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    tolerance = 1e-6 if dtype == F32 else 1e-2
    for _ in range(2):
        got = train(compiled, layer, batch)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["default", "inplace", "none"])
def test_inductor(name: str, cpu: str) -> None:
    """With what the compiler makes of the model around the loss."""
    layer, batch = model(), data()
    loss = step(layer, cpu, **CASES[name])
    want = train(loss, layer, batch)
    compiled = torch.compile(loss, fullgraph=True)
    for _ in range(2):
        for a, b in zip(train(compiled, layer, batch), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keywords", [{}, {"inplace": True}, {"reduction": "none"}], ids=str)
def test_new_data_does_not_recompile(keywords: dict[str, Any], cpu: str) -> None:
    """Tensors of other values; from the second number of rows on, any number of them."""
    layer = model()
    loss = step(layer, cpu, **keywords)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    extra = {
        "alpha": torch.tensor(1.0),
        "negative_ids": torch.tensor([1, -1]),
    }
    if not keywords.get("reduction"):
        extra["normalizer"] = torch.tensor(5.0)
    for seed in range(4):
        batch = {**data(seed=seed), **extra}
        train(compiled, layer, batch)
        extra = {name: x + 1 for name, x in extra.items()}
    assert counter.frame_count == 1
    for rows in (7, 9, 12, 23, 600):
        batch = {**data(rows, seed=rows), **extra}
        for a, b in zip(train(compiled, layer, batch), train(loss, layer, batch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("name", "values"),
    [("alpha", (1.0, 0.5, 0.25)), ("normalizer", (3, 5, 7)), ("temperature", (1.0, 0.5, 2.0))],
)
def test_plain_numbers_may_change(name: str, values: tuple[float, ...], cpu: str) -> None:
    """A schedule of α, a count of tokens: the compiler makes them symbolic from the second on."""
    layer, batch = model(), data()
    loss = step(layer, cpu)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for value in values:
        arguments = {**batch, name: value}
        got, want = train(compiled, layer, arguments), train(loss, layer, arguments)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Error detected in")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("saved", ["by its producer", "by another user"])
def test_no_silent_corruption(saved: str, reduction: str, cpu: str) -> None:
    """Logits that another op has saved for its own backward: an error, as without the compiler."""
    layer, batch = model(), data()

    def loss(hidden: Tensor, *rest: Tensor) -> Tensor:
        logits = layer(hidden)
        other = logits.new_zeros(())
        if saved == "by its producer":
            logits = torch.exp(logits)
        else:
            other = logits.square().sum()
        value = tnt.tnt_loss(logits, *rest, reduction=reduction, inplace=True, backend=cpu)
        return value.sum() + other

    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            function(*batch.values()).backward()


def test_evaluation(backend: str) -> None:
    """Without gradient nothing is written, inplace or not."""
    batch = data()
    logits = torch.randn(6, VOCAB)
    before = logits.clone()
    arguments = (batch["ref_logits"], batch["labels"], batch["weights"])
    want = tnt.tnt_loss(logits, *arguments, backend=backend)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(logits: Tensor) -> Tensor:
        return tnt.tnt_loss(logits, *arguments, inplace=True, backend=backend)

    assert torch.equal(loss(logits), want)
    with torch.no_grad():
        assert torch.equal(loss(logits.requires_grad_()), want)
    assert torch.equal(logits.detach(), before)


def test_module_in_a_compiled_model(cpu: str) -> None:
    """As a submodule of the model that returns its loss."""

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model()
            self.loss = tnt.TNTLoss(method="tnrf", alpha=0.5, inplace=True, backend=cpu)

        def forward(self, hidden: Tensor, *rest: Tensor) -> Tensor:
            return self.loss(self.layer(hidden).view(2, 3, -1), *rest)

    batch = data()
    rest = [
        batch["ref_logits"].view(2, 3, -1),
        batch["labels"].view(2, 3),
        batch["weights"].view(2, 3),
    ]
    results = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager", fullgraph=True)):
        trained = Trained()
        optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
        compiled = wrap(trained)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = compiled(batch["hidden"], *rest)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append(torch.stack(losses))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert results[0][2] < results[0][0]
