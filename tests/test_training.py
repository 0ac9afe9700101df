"""The loss where models are trained at scale: a compiled transformer, DDP, FSDP2, activation checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import columns, needs_gloo, run_cases
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import tnt_kernels as tnt

VOCAB, WIDTH = 33, 16


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.transpose(1, 2).flatten(2)
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(1))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def transformer(checkpointed: bool = False) -> Transformer:
    torch.manual_seed(0)
    return Transformer(checkpointed)


def batch(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the original model's logits, weights; the last position of a row has none."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, length), generator=generator)
    ref_logits = torch.randn(rows, length, VOCAB, generator=generator)
    weights = torch.tensor([1.0, -1.0, 0.5, -0.3]).repeat(length)[:length].expand(rows, -1).clone()
    weights[:, -1] = 0
    return tokens, ref_logits, weights


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor, Tensor], **keywords: Any) -> Tensor:
    tokens, ref_logits, weights = data
    return tnt.tnt_loss(model(tokens), ref_logits, tokens.roll(-1, 1), weights, **keywords)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_step_of_a_transformer(checkpointed: bool, cpu: str) -> None:
    """One graph, by aot_autograd and Inductor, and the same one for other batch sizes and lengths."""
    model, eager = transformer(checkpointed), transformer()
    keywords: dict[str, Any] = {"method": "tnrf", "inplace": True}
    counter = CompileCounterWithBackend("aot_eager" if checkpointed else "inductor")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(*data: Tensor) -> Tensor:
        return loss_of(model, data, **keywords)

    compiled = set()
    for seed, (rows, length) in enumerate(((2, 9), (3, 9), (4, 24))):
        data = batch(rows, length, seed)
        for module, loss in ((model, step(*data)), (eager, loss_of(eager, data, **keywords))):
            module.zero_grad()
            loss.backward()
        compiled.add(counter.frame_count)
        for a, b in zip(gradients(model), gradients(eager), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(compiled) == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing_around_the_loss(reduction: str, backend: str) -> None:
    """Forward runs twice, and the loss with it; only what does not overwrite its input may be recomputed."""
    model, data = transformer(), batch(2, 9, 0)

    def loss() -> Tensor:
        return loss_of(model, data, reduction=reduction, backend=backend).sum()

    loss().backward()
    want = gradients(model)
    model.zero_grad()
    checkpoint(loss, use_reentrant=False).backward()
    for a, b in zip(gradients(model), want, strict=True):
        torch.testing.assert_close(a, b)


def test_function_transforms_raise(backend: str) -> None:
    """Not supported, and said so: a loss whose rows are a batch needs neither."""
    z, labels = torch.randn(3, VOCAB), torch.tensor([1, 2, 3])
    weight, hidden = torch.randn(VOCAB, 4), torch.randn(3, 4)

    def loss(z: Tensor) -> Tensor:
        return tnt.tnt_loss(z, torch.zeros_like(z), labels, backend=backend)

    def linear(hidden: Tensor) -> Tensor:
        return tnt.linear_tnt_loss(
            hidden, weight, torch.zeros(3, 4), weight, labels, backend=backend
        )

    for f, x in ((loss, z), (linear, hidden)):
        with pytest.raises(RuntimeError, match=r"torch\.func\.grad or vmap"):
            torch.func.grad(f)(x)
        with pytest.raises(RuntimeError, match=r"torch\.func\.grad or vmap"):
            torch.vmap(f)(torch.stack((x, x)))


# --- several ----------------------------------------------------------------------------------------------------------


def data_parallel(rank: int, world: int) -> None:
    """DDP and FSDP2, with activation checkpointing: the gradients of one process that has all the rows."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    whole = transformer()
    data = batch(2 * world, 8, 1)
    mine = tuple(x[2 * rank : 2 * rank + 2] for x in data)
    for keywords in ({}, {"reduction": "none"}, {"inplace": True, "method": "tnrr"}):
        whole.zero_grad()
        loss_of(whole, data, **keywords).mean().backward()
        parallel = DistributedDataParallel(transformer())
        loss_of(parallel, mine, **keywords).mean().backward()
        sharded = transformer(checkpointed=True)
        for part in (*sharded.blocks, sharded):
            fully_shard(part, mesh=dist.init_device_mesh("cpu", (world,)))
        loss_of(sharded, mine, **keywords).mean().backward()
        sharded_gradients = [p.grad.full_tensor() for p in sharded.parameters()]
        for a, b, c in zip(gradients(whole), gradients(parallel), sharded_gradients, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-6)


def compiled_shards(rank: int, world: int) -> None:
    """One graph with ``group=``, also for other numbers of rows."""
    torch.compiler.reset()
    sizes = [VOCAB - 2 * (world - 1), *[2] * (world - 1)]
    mine = columns(sizes, rank)
    model = transformer()
    model.head = nn.Linear(WIDTH, VOCAB, bias=False)
    model.head.weight = nn.Parameter(model.head.weight.detach()[mine].clone())
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    for keywords in ({}, {"reduction": "none", "method": "tnrf"}):

        def loss(
            module: nn.Module, data: tuple[Tensor, ...], keywords: dict[str, Any] = keywords
        ) -> Tensor:
            tokens, ref_logits, weights = data
            group = dist.group.WORLD
            return loss_of(
                module, (tokens, ref_logits[..., mine], weights), group=group, **keywords
            )

        compiled, counts = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True), set()
        for seed, shape in enumerate(((2, 9), (3, 6))):
            data = batch(*shape, seed)
            for module, value in ((model, compiled(model, data)), (eager, loss(eager, data))):
                module.zero_grad()
                value.mean().backward()
            counts.add(counter.frame_count)
            for a, b in zip(gradients(model), gradients(eager), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert len(counts) == 1


@needs_gloo
def test_data_parallel_and_compiled_shards(tmp_path: Path, cpu: str) -> None:
    run_cases(2, tmp_path, [data_parallel, compiled_shards])
