"""``linear_tnt_loss(group=)``: output embeddings sharded over gloo processes, against the whole."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import BF16, F16, F32, F64, OBJECTIVES
from ranks import beside, collectives, columns, needs_gloo, run_cases
from torch import Tensor

import tnt_kernels as tnt

pytestmark = needs_gloo
ROWS, HIDDEN, VOCAB = 12, 8, 30


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """Parameters that need a gradient, the rest in order, keywords."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    trained = [normal(ROWS, HIDDEN), normal(VOCAB, HIDDEN), normal(VOCAB)]
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    weights = torch.tensor([1.0, -1.0, -0.3, 0.0]).repeat(3)
    ids = torch.randint(VOCAB, (ROWS, 3), generator=generator)
    ids[::2] = -1
    rest = [normal(ROWS, HIDDEN), normal(VOCAB, HIDDEN), labels, weights]
    return trained, rest, {"negative_ids": ids}


def sizes_of(world: int) -> list[int]:
    return [VOCAB - 2 * (world - 1), *[2] * (world - 1)]


def run(rank: int, sizes: list[int] | None, dtype: torch.dtype, **keywords: Any) -> list[Tensor]:
    """The loss and the gradients of hidden, weight, bias; as they are of the whole."""
    trained, rest, options = inputs(dtype)
    if sizes is not None:
        mine = columns(sizes, rank)
        trained[1:] = [x[mine].clone() for x in trained[1:]]
        rest[1] = rest[1][mine].clone()
        options["group"] = dist.group.WORLD
    hidden, weight, bias = (x.requires_grad_() for x in trained)
    loss = tnt.linear_tnt_loss(
        hidden, weight, *rest, bias=bias, logit_scale=0.5, **options, **keywords
    )
    upstream = torch.linspace(-1, 2, loss.numel()).view(loss.shape) if loss.dim() else None
    loss.backward(upstream)
    gradients = [hidden.grad, weight.grad, bias.grad]
    if sizes is not None:
        gradients[1:] = [beside(x.t().contiguous(), sizes).t() for x in gradients[1:]]
    return [loss.detach(), *gradients]


def agrees(rank: int, world: int) -> None:
    sizes = sizes_of(world)
    for dtype, objective, reduction in itertools.product(
        (F32, BF16, F16), OBJECTIVES[:4], ("mean", "none")
    ):
        options = {"method": objective, "reduction": reduction, "softcap": 20.0, "chunk_size": 5}
        whole, parts = run(rank, None, dtype, **options), run(rank, sizes, dtype, **options)
        tolerance = {F32: 1e-5, BF16: 2e-2, F16: 4e-3}[dtype]
        for a, b in zip(parts, whole, strict=True):
            assert a.dtype == b.dtype
            scale = b.abs().max().item() + 1e-6
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


def counts(rank: int, world: int) -> None:
    """One all-gather a chunk, one all-reduce for the gradient of the hidden states; on a CPU, one for all to agree."""
    sizes = sizes_of(world)
    trained, rest, options = inputs(F32)
    hidden, weight = trained[0].requires_grad_(), trained[1][columns(sizes, rank)].clone()
    rest[1] = rest[1][columns(sizes, rank)]

    def step(chunk_size: int, weight: Tensor) -> None:
        loss = tnt.linear_tnt_loss(
            hidden, weight, *rest, chunk_size=chunk_size, group=dist.group.WORLD, **options
        )
        loss.backward()

    step(9, weight.requires_grad_())
    for chunk_size in (9, 5, 3):
        seen = collectives(partial(step, chunk_size, weight))
        chunks = -(-9 // chunk_size)  # 9 of the 12 rows have a weight
        assert seen == ["all_gather"] * (1 + chunks) + ["all_reduce"]


def default_chunks(rank: int, world: int) -> None:
    """Chunks are the same on all ranks, though their shards differ."""
    from tnt_kernels._linear import sizes

    budget = dict(sizes.CHUNK_BYTES)
    sizes.CHUNK_BYTES["cpu"] = 2000
    try:
        whole, parts = run(rank, None, F32), run(rank, sizes_of(world), F32)
    finally:
        sizes.CHUNK_BYTES.update(budget)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def bad_input(rank: int, world: int) -> None:
    """All ranks raise, before the first chunk, and the next call works."""
    sizes, last = sizes_of(world), rank == world - 1
    trained, rest, options = inputs(F32)
    mine = columns(sizes, rank)
    good = {
        "hidden": trained[0].requires_grad_(), "weight": trained[1][mine], "ref_hidden": rest[0],
        "ref_weight": rest[1][mine], "labels": rest[2], "weights": rest[3], "group": dist.group.WORLD,
        **options,
    }  # fmt: skip

    def raises(error: type[Exception], match: str, **changed: Any) -> None:
        with pytest.raises(error, match=match):
            tnt.linear_tnt_loss(**{**good, **changed})
        assert torch.isfinite(tnt.linear_tnt_loss(**good))

    for error, match, changed in (
        (TypeError, "hidden: list, expected", {"hidden": [1.0]}),
        (TypeError, "weight: dtype", {"weight": good["weight"].double()}),
        (ValueError, "chunk_size is 0", {"chunk_size": 0}),
        (ValueError, "method is", {"method": "no"}),
        (ValueError, "weights: shape", {"weights": rest[3][1:]}),
    ):
        if last:
            raises(error, match, **changed)
        else:
            raises(RuntimeError, f"rank {world - 1} of group has raised")
    raises(ValueError, "row 0 has label 30", labels=rest[2].clone().fill_(VOCAB))
    fewer = {
        name: good[name][: ROWS - last] for name in ("hidden", "ref_hidden", "labels", "weights")
    }
    fewer["negative_ids"] = options["negative_ids"][: ROWS - last]
    raises(ValueError, f"labels: 12 rows on rank 0 and 11 on rank {world - 1} of group", **fewer)
    for name, changed in {
        "weights": {"weights": rest[3] * (1 - last)},
        "chunk_size": {"chunk_size": 3 + last},
        "softcap": {"softcap": 2.0 + last},
        "hidden.requires_grad": {"hidden": trained[0].detach().requires_grad_(not last)},
        "weight.requires_grad": {"weight": trained[1][mine].clone().requires_grad_(not last)},
        "bias.requires_grad": {"bias": trained[2][mine].clone().requires_grad_(not last)},
        "ref_hidden": {}
        if not last
        else {n: good[n][..., 1:] for n in ("ref_hidden", "ref_weight")},
    }.items():
        raises(ValueError, f"{name}: not the same on rank 0 and rank {world - 1}", **changed)
    for name, first, other in (
        ("hidden", F32, F64), ("hidden", BF16, F32), ("ref_hidden", F32, F64), ("ref_hidden", BF16, F32)
    ):  # fmt: skip
        parameters = (name, name.replace("hidden", "weight"))
        changed = {n: good[n].detach().to(other if last else first) for n in parameters}
        match = f"^{name}: dtype {first} on rank 0 and {other} on rank {world - 1} of group"
        raises(ValueError, match, **changed)
        if name == "hidden":
            raises(ValueError, match, **changed, weights=None)
    z = torch.zeros(ROWS, sizes[rank])
    of_logits = {"logits": z, "ref_logits": z, "labels": rest[2], "weights": rest[3], **options}
    call = partial(tnt.tnt_loss, **of_logits, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="the function: not the same"):
        (call if last else partial(tnt.linear_tnt_loss, **good))()


def without_memory(rank: int, world: int) -> None:
    """A rank that finds no room for its buffers or gradients does not leave the others waiting."""
    from tnt_kernels._linear import chunks

    trained, rest, options = inputs(F32)
    mine = columns(sizes_of(world), rank)
    call = partial(
        tnt.linear_tnt_loss, trained[0].requires_grad_(), trained[1][mine].clone().requires_grad_(), rest[0],
        rest[1][mine], *rest[2:], chunk_size=2, group=dist.group.WORLD, **options,
    )  # fmt: skip
    assert torch.isfinite(call())

    def refuse(*_: Any) -> None:
        raise MemoryError("no room")

    gradients, last = chunks.Gradients, rank == world - 1
    chunks.Gradients = refuse if last else gradients
    error, match = (
        (MemoryError, "no room") if last else (RuntimeError, f"rank {world - 1} of group")
    )
    with pytest.raises(error, match=match):
        call()
    chunks.Gradients = gradients
    assert torch.isfinite(call())


def fails_later(rank: int, world: int) -> None:
    """Nor one that fails between two chunks, or behind the last one, where the others have a gradient to share."""
    from tnt_kernels._linear.matmul import Gradients

    last, multiply = rank == world - 1, Gradients._multiply

    def refuse(*_: Any) -> None:
        raise MemoryError("no room")

    for dtype in (F32, BF16):  # multiplied chunk by chunk; all at once, in the end
        trained, rest, options = inputs(dtype)
        mine = columns(sizes_of(world), rank)
        hidden = trained[0].requires_grad_()
        call = partial(
            tnt.linear_tnt_loss, hidden, trained[1][mine].clone().requires_grad_(), rest[0], rest[1][mine],
            *rest[2:], chunk_size=2, group=dist.group.WORLD, **options,
        )  # fmt: skip
        Gradients._multiply = refuse if last else multiply
        if last:
            with pytest.raises(MemoryError, match="no room"):
                call()
        elif dtype == F32:
            with pytest.raises(RuntimeError, match=f"rank {world - 1} of group"):
                call()
        else:
            call().backward()
            assert hidden.grad[rest[3] != 0].isnan().all()
        Gradients._multiply = multiply
        assert torch.isfinite(call())


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_weights(world: int, tmp_path: Path, cpu: str) -> None:
    run_cases(
        world, tmp_path, [agrees, counts, default_chunks, bad_input, without_memory, fails_later]
    )
