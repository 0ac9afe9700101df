"""Process groups over which a vocabulary is sharded: their collectives, and what their ranks must agree on.

Collectives are those that PyTorch compiles to (``_c10d_functional``): they take a group by its name.

A rank must not raise alone, for the others would wait for it, and what the ranks give must fit, or they would exchange
tensors of different sizes, which gloo answers with an abort and NCCL with a hang. So the ranks first exchange a few
integers (``settle``): the columns of each, -1 from one that raises, and checksums of what must be the same everywhere.
On a CPU at every call. On a device, where reading the answer would wait for it, at a group's first call, whose answer,
the sizes of all shards, is needed; what fails later shows as NaN in the loss of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary
from zlib import crc32

import torch
from torch import Tensor

from tnt_kernels._checks import LOGITS_DTYPES
from tnt_kernels._ops import RowTensors
from tnt_kernels.backends.call import ROW_PARTS, ROW_STATISTICS, Scalars, real_dtype

_T = TypeVar("_T")


class Shard(NamedTuple):
    """Of a vocabulary; the operators take these after ``Scalars``."""

    group: str  # the process group's name
    sizes: (
        list[int] | None
    )  # columns of every rank, in rank order; None: asked once for every group


class Place(NamedTuple):
    """Of this rank's shard."""

    offset: int
    vocab_size: int
    widest: int  # columns of the largest shard


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


def _process_group(name: str) -> Any:
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def group_rank(name: str) -> int:
    rank: int = _process_group(name).rank()
    return rank


def group_size(name: str) -> int:
    size: int = _process_group(name).size()
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


# --- what the ranks must agree on -----------------------------------------------------------------------------------

#: Of every group, the sizes that all its ranks have confirmed; under None, those found without being told.
_confirmed: WeakKeyDictionary[Any, dict[tuple[int, ...] | None, tuple[int, ...]]] = (
    WeakKeyDictionary()
)
#: Integers of a call that must be the same on every rank, so that different calls exchange as many.
_FACTS = 32
_ARGUMENTS = {
    "positive_loss": "method", "negative_loss": "method", "alpha_value": "alpha", "uniform_smoothing": "smoothing",
    "normalizer_value": "normalizer",
}  # fmt: skip
Facts = list[tuple[str, int]]
_DTYPE = ".dtype"  # ends the name of a fact whose number says which


def _digest(value: object) -> int:
    return crc32(repr(value).encode())


def _number(value: object) -> int:
    return LOGITS_DTYPES.index(value) if isinstance(value, torch.dtype) else _digest(value)


def _checksum(x: Tensor | None) -> int:
    """Of the values and their order; 0 on a device, which would have to be waited for."""
    if x is None or x.device.type != "cpu":
        return 0
    bits = x.reshape(-1).contiguous()
    if x.is_floating_point():
        bits = bits.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    return int((bits * torch.arange(1, len(bits) + 1)).sum())


def facts_of(
    function: str,
    of: str,
    dtype: torch.dtype,
    rows: RowTensors,
    scalars: Scalars,
    more: Mapping[str, object],
) -> Facts:
    """Argument and number, of all that must be the same on every rank.

    ``dtype`` is that of the argument ``of``. It decides over that of ``rows``, so it comes before their checksums.
    """
    sizes = [None if x is None else tuple(x.shape) for x in (rows.alpha, rows.negative_ids)]
    facts = [
        ("rows", rows.labels.numel()),
        ("the function", _digest(function)),
        (of + _DTYPE, _number(dtype)),
        ("labels", _checksum(rows.labels)),
        ("weights", _checksum(rows.weights) if rows.weights is not None else -1),
        ("alpha", _checksum(rows.alpha)),
        ("alpha", _digest(sizes[0])),
        ("negative_ids", _checksum(rows.negative_ids)),
        ("negative_ids", _digest(sizes[1])),
        ("normalizer", _checksum(rows.normalizer)),
    ]
    settings = {**scalars._asdict(), **more}
    del settings["backend"]  # backends understand each other
    facts += [(_ARGUMENTS.get(name, name), _number(value)) for name, value in settings.items()]
    assert len(facts) <= _FACTS
    return facts + [("", 0)] * (_FACTS - len(facts))


def _mismatch(name: str, first: int, other: int, rank: int) -> str:
    if name == "rows":
        return (
            f"labels: {first} rows on rank 0 and {other} on rank {rank} of group, expected the same rows on "
            "every rank"
        )
    if name.endswith(_DTYPE):
        return (
            f"{name.removesuffix(_DTYPE)}: dtype {LOGITS_DTYPES[first]} on rank 0 and {LOGITS_DTYPES[other]} on rank "
            f"{rank} of group, expected the same on every rank"
        )
    return (
        f"{name}: not the same on rank 0 and rank {rank} of group, expected the same on every rank"
    )


def raise_for_others(sizes: Sequence[float], rank: int) -> None:
    """For ranks that have raised, which say so by a size that none has."""
    lost = [i for i, size in enumerate(sizes) if not size >= 0]
    if lost and rank not in lost:
        raise RuntimeError(
            f"tnt_loss: rank {lost[0]} of group has raised an error, so there is no loss here either"
        )


def _known(shard: Shard) -> dict[tuple[int, ...] | None, tuple[int, ...]]:
    return _confirmed.setdefault(_process_group(shard.group), {})


def _given(shard: Shard) -> tuple[int, ...] | None:
    return None if shard.sizes is None else tuple(shard.sizes)


def _exchanges(shard: Shard, device: torch.device) -> bool:
    """Whether a call begins with the exchange of integers."""
    return device.type == "cpu" or _given(shard) not in _known(shard)


def settle(shard: Shard, vocab: int, device: torch.device, facts: Callable[[], Facts]) -> None:
    """Makes sure that the ranks' calls fit. All of them get here, unless a rank has called ``announcing``.

    Raises:
        RuntimeError: another rank has raised.
        ValueError: the same on every rank: they do not fit.
    """
    if not _exchanges(shard, device):
        return
    given, rank, count = _given(shard), group_rank(shard.group), group_size(shard.group)
    names, numbers = zip(*facts(), strict=True)
    message = [vocab, *(given or [-1] * count), *numbers]
    answers = all_gather(torch.tensor(message, device=device), shard.group).tolist()
    sizes = [answer[0] for answer in answers]
    raise_for_others(sizes, rank)
    for i, answer in enumerate(answers):
        for name, mine, other in zip(
            names, answers[0][1 + count :], answer[1 + count :], strict=True
        ):
            if mine != other:
                raise ValueError(_mismatch(name, mine, other, i))
    for i, (_, *rest) in enumerate(answers):
        told = rest[:count]
        if told not in (sizes, [-1] * count) or (told == sizes) != (given is not None):
            raise ValueError(
                f"shard_sizes: {told if told[0] >= 0 else None} on rank {i} and "
                f"{None if given is None else list(given)} on rank {rank}, expected {sizes}, the columns that the "
                "ranks have, or None, on every rank"
            )
    confirmed = _known(shard).setdefault(given, tuple(sizes))
    if list(confirmed) != sizes:
        raise ValueError(
            f"logits: V = {sizes} on the ranks of group, expected {list(confirmed)}, as in its first call; a group "
            "with several vocabularies needs shard_sizes"
        )


def place(shard: Shard, vocab: int) -> Place:
    """Where this rank's ``vocab`` columns lie, once that is settled."""
    sizes, rank = _known(shard)[_given(shard)], group_rank(shard.group)
    if sizes[rank] != vocab:
        raise ValueError(
            f"logits: V = {vocab} on rank {rank}, expected {sizes[rank]}, as the shards of group are {list(sizes)}; a "
            "group with several vocabularies needs shard_sizes"
        )
    return Place(sum(sizes[:rank]), sum(sizes), max(sizes))


# --- a rank that raises ---------------------------------------------------------------------------------------------


def join_as_failed(shard: Shard, logits: Tensor, twice: bool) -> None:
    """Takes part in the collectives of ``tnt_loss`` on the other ranks, with NaN for this one's statistics."""
    n, real = logits.shape[:-1].numel(), real_dtype(logits)
    nan = logits.new_full((n + 1, ROW_STATISTICS), torch.nan, dtype=real)
    all_gather(nan, shard.group)
    if twice and logits.device.type != "cpu":  # the others have not noticed yet
        all_gather(logits.new_full((n, ROW_PARTS), torch.nan, dtype=real), shard.group)


def announcing(
    shard: Shard | None, x: Any, prepare: Callable[[], _T], with_statistics: bool = False
) -> _T:
    """``prepare()``, before the ranks settle; the others get to know its errors.

    Not where they exchange no integers, unless ``x`` are the logits of ``tnt_loss`` (``with_statistics``).
    """
    if shard is None or torch.compiler.is_compiling():
        return prepare()
    try:
        return prepare()
    except Exception:
        is_tensor = isinstance(x, Tensor)
        if is_tensor or not torch.accelerator.is_available():
            device = x.device if is_tensor else torch.device("cpu")
            if _exchanges(shard, device):
                message = [-1] * (1 + group_size(shard.group) + _FACTS)
                all_gather(torch.tensor(message, device=device), shard.group)
            elif with_statistics and x.dim() > 0:
                join_as_failed(shard, x, twice=True)
        raise
