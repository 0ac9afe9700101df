"""Cases that run on every one of some processes (gloo's, or NCCL's), which are spawned once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import process
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)
needs_nccl = pytest.mark.skipif(
    not dist.is_available() or not dist.is_nccl_available() or torch.cuda.device_count() < 2,
    reason="needs torch.distributed with NCCL, and two GPUs",
)
Case = Callable[[int, int], None]


def _worker(rank: int, world: int, folder: str, cases: Sequence[Case], backend: str) -> None:
    process.prepare()
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    for case in cases:
        torch.manual_seed(0)
        try:
            case(rank, world)
        except Exception as error:
            error.add_note(f"in {case.__name__} on rank {rank} of {world}")
            raise
        dist.barrier()
    dist.destroy_process_group()


def run_cases(world: int, folder: Path, cases: Sequence[Case], backend: str = "gloo") -> None:
    torch.multiprocessing.spawn(_worker, args=(world, str(folder), cases, backend), nprocs=world)


def shard_sizes(vocab: int, world: int) -> list[int]:
    """Unequal, and the last may be empty."""
    first = vocab // world + 1
    sizes = [first] * (world - 1)
    while sum(sizes) > vocab:
        sizes[-1] -= 1
    return [*sizes, vocab - sum(sizes)]


def columns(sizes: Sequence[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def beside(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """All ranks' columns, one after the other."""
    widest = max(sizes)
    padded = torch.nn.functional.pad(x, (0, widest - x.size(-1)))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)


def collectives(step: Callable[[], object]) -> list[str]:
    """The collectives that a step performs."""
    with torch.autograd.profiler.profile() as profile:
        step()
    names = [event.name for event in profile.function_events]
    return [name.removeprefix("gloo:") for name in names if name.startswith("gloo:")]
