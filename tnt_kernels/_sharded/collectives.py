"""Process groups and their collectives.

The collectives are those that PyTorch compiles to (``_c10d_functional``): they take a group by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnt_kernels._call import Shard


def shard_of(group: Any, sizes: Sequence[int] | None) -> Shard | None:
    """None for a group of one, which needs no collective.

    Raises:
        TypeError: not a process group, or sizes that are not integers.
        ValueError: sizes that do not fit the group.
    """
    if group is None:
        if sizes is not None:
            raise ValueError("shard_sizes: given without group, expected both or neither")
        return None
    if not torch.distributed.is_available() or not isinstance(
        group, torch.distributed.ProcessGroup
    ):
        raise TypeError(f"group: {type(group).__name__}, expected a torch.distributed.ProcessGroup")
    count = group.size()
    if sizes is not None:
        sizes = list(sizes)
        for size in sizes:
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"shard_sizes: {type(size).__name__} in it, expected integers")
        if len(sizes) != count or min(sizes) < 0:
            raise ValueError(
                f"shard_sizes is {sizes}, expected {count} sizes, one of every rank of group"
            )
    return None if count == 1 else Shard(group.group_name, sizes)


def process_group(name: str) -> Any:
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def group_rank(name: str) -> int:
    rank: int = process_group(name).rank()
    return rank


def group_size(name: str) -> int:
    size: int = process_group(name).size()
    return size


def all_gather(x: Tensor, group: str) -> Tensor:
    """(S, *x.shape): every rank's x, which is contiguous."""
    size = group_size(group)
    functional = torch.ops._c10d_functional
    out: Tensor = functional.wait_tensor(functional.all_gather_into_tensor(x, size, group))
    return out.view(size, *x.shape)


def all_reduce_(x: Tensor, group: str) -> None:
    functional = torch.ops._c10d_functional
    functional.wait_tensor(functional.all_reduce_(x, "sum", group))
