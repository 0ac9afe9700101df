"""``linear_tnt_loss`` on parameters that FSDP2 shards: two gloo processes on a CPU against one that has all rows."""

from __future__ import annotations

import copy
from pathlib import Path

import process
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import tnt_kernels as tnt

VOCAB, HIDDEN, ROWS = 37, 8, 12  # VOCAB is odd: shards of different sizes

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.trunk(x))


def loss_of(model: Model, reference: Model, rows: slice, reduction: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, HIDDEN, generator=generator)[rows]
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)[rows]
    weights = torch.tensor([1.0, -1.0, 0.5]).repeat(ROWS // 3)[rows]
    with torch.no_grad():
        ref_hidden = reference(x)
    return tnt.linear_tnt_loss(
        model(x), model.lm_head.weight, ref_hidden, reference.lm_head.weight, labels, weights,
        bias=model.lm_head.bias, ref_bias=reference.lm_head.bias, reduction=reduction,
    ).mean()  # fmt: skip


def models() -> tuple[Model, Model]:
    torch.manual_seed(0)
    return Model(), Model().requires_grad_(False)


def worker(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    process.prepare()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    for reduction in ("mean", "none"):
        whole, whole_reference = models()
        model, reference = copy.deepcopy(whole), copy.deepcopy(whole_reference)
        for sharded in (model, reference):
            for part in (sharded.trunk, sharded.lm_head):
                fully_shard(part, mesh=mesh)
        optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (model, whole)]
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
            loss_of(model, reference, half, reduction).backward()
            loss_of(whole, whole_reference, slice(None), reduction).backward()
            for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
                assert type(a.grad).__name__ == "DTensor", name
                assert a.grad.placements == a.placements
                torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-5, atol=1e-7)
            for optimizer in optimizers:
                optimizer.step()
    dist.destroy_process_group()


def test_sharded_parameters(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
