"""What the ranks of a sharded vocabulary must agree on, and how one that raises tells the others.

No rank may raise alone, for the others would wait for it. And what the ranks give must fit, or they would exchange
tensors of different sizes, which gloo answers with an abort and NCCL with a hang. So the ranks first exchange a few
integers (``agree``): the columns of each, and checksums of what must be the same everywhere. A rank that raises sends
-1 in place of its columns (``report_error``).

On a CPU the ranks do so in every call. On a device, reading the answer would wait for it: there it is a group's first
call alone, which needs the answer, the sizes of all shards. A rank that fails later sends NaN, which reaches the loss
of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary
from zlib import crc32

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from tnt_kernels._call import (
    LOGITS_DTYPES,
    ROW_PARTIAL_SUMS,
    ROW_STATISTICS,
    LossCall,
    Shard,
    real_dtype,
)
from tnt_kernels._sharded.collectives import (
    all_gather,
    group_rank,
    group_size,
    process_group,
)


class Columns(NamedTuple):
    """Which part of the whole vocabulary this rank holds."""

    offset: int  # the vocabulary id of its first column
    vocab_size: int  # of the whole vocabulary
    widest: int  # columns of the largest shard


#: Of every group, the sizes that all its ranks have confirmed; under None, those found without being told.
_confirmed: WeakKeyDictionary[Any, dict[tuple[int, ...] | None, tuple[int, ...]]] = (
    WeakKeyDictionary()
)
#: Integers of a call that must be the same on every rank, so that different calls exchange as many.
_FACTS = 33
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
    owner: str,
    dtype: torch.dtype,
    call: LossCall,
    more: Mapping[str, object],
) -> Facts:
    """Argument and number, of all that must be the same on every rank.

    ``dtype`` is that of the argument ``owner``. It decides over that of the rows, so it comes before their checksums.
    """
    rows = call.tensors
    sizes = [None if x is None else tuple(x.shape) for x in (rows.alpha, rows.negative_ids)]
    facts = [
        ("rows", rows.labels.numel()),
        ("the function", _digest(function)),
        (owner + _DTYPE, _number(dtype)),
        ("labels", _checksum(rows.labels)),
        ("weights", _checksum(rows.weights) if rows.weights is not None else -1),
        ("alpha", _checksum(rows.alpha)),
        ("alpha", _digest(sizes[0])),
        ("negative_ids", _checksum(rows.negative_ids)),
        ("negative_ids", _digest(sizes[1])),
        ("normalizer", _checksum(rows.normalizer)),
    ]
    settings = {**call.scalars._asdict(), **more}
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


def raise_if_another_failed(sizes: Sequence[float], rank: int) -> None:
    """Raises if another rank reported an error: it sends a negative size, or NaN."""
    lost = [i for i, size in enumerate(sizes) if not size >= 0]
    if lost and rank not in lost:
        raise RuntimeError(
            f"tnt_loss: rank {lost[0]} of group has raised an error, so there is no loss here either"
        )


def _known(shard: Shard) -> dict[tuple[int, ...] | None, tuple[int, ...]]:
    return _confirmed.setdefault(process_group(shard.group), {})


def _given(shard: Shard) -> tuple[int, ...] | None:
    return None if shard.sizes is None else tuple(shard.sizes)


def _exchanges(shard: Shard, device: torch.device) -> bool:
    """Whether a call begins with the exchange of integers."""
    return device.type == "cpu" or _given(shard) not in _known(shard)


def agree(shard: Shard, vocab: int, device: torch.device, facts: Callable[[], Facts]) -> None:
    """Makes sure that the ranks' calls fit. Every rank gets here, or has raised and called ``report_error``.

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
    raise_if_another_failed(sizes, rank)
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


def columns_of(shard: Shard, vocab: int) -> Columns:
    """Of a rank with ``vocab`` columns, once the ranks have agreed."""
    sizes, rank = _known(shard)[_given(shard)], group_rank(shard.group)
    if sizes[rank] != vocab:
        raise ValueError(
            f"logits: V = {vocab} on rank {rank}, expected {sizes[rank]}, as the shards of group are {list(sizes)}; a "
            "group with several vocabularies needs shard_sizes"
        )
    return Columns(sum(sizes[:rank]), sum(sizes), max(sizes))


# --- a rank that raises ---------------------------------------------------------------------------------------------


def join_as_failed(shard: Shard, logits: Tensor, twice: bool) -> None:
    """Takes part in the collectives of ``tnt_loss`` on the other ranks, with NaN for this one's statistics."""
    n, real = logits.shape[:-1].numel(), real_dtype(logits)
    nan = logits.new_full((n + 1, ROW_STATISTICS), torch.nan, dtype=real)
    all_gather(nan, shard.group)
    if twice and logits.device.type != "cpu":  # the others have not noticed yet
        all_gather(logits.new_full((n, ROW_PARTIAL_SUMS), torch.nan, dtype=real), shard.group)


def report_error(shard: Shard, x: Any, with_statistics: bool = False) -> None:
    """Of a rank that has raised before the ranks agreed: tells the others.

    Where the ranks exchange no integers they are told by their statistics, if ``x`` are the logits of ``tnt_loss``
    (``with_statistics``), and otherwise not.
    """
    is_tensor = isinstance(x, Tensor)
    if is_dynamo_compiling() or (not is_tensor and torch.accelerator.is_available()):
        return
    device = x.device if is_tensor else torch.device("cpu")
    if _exchanges(shard, device):
        message = [-1] * (1 + group_size(shard.group) + _FACTS)
        all_gather(torch.tensor(message, device=device), shard.group)
    elif with_statistics and x.dim() > 0:
        join_as_failed(shard, x, twice=True)
