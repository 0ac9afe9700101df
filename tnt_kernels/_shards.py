"""Logits whose vocabulary is sharded over a process group: a loss from three launches and two small all-gathers.

Each operator holds its collectives, so that to a compiler it is one call. Collectives are those that PyTorch compiles
to (``_c10d_functional``): they take a group by its name. What travels is summed or merged in rank order, by the same
instructions everywhere, so that all ranks have the same loss to the last bit and p = q stays exactly 0.

A rank must not raise alone, for the others would wait for it. What it has to tell them takes no collective of its own:
the packed statistics end in a header row with the shard's size, NaN from a rank that raises. On a CPU every rank reads
the headers; on a device, where reading would wait for it, the NaNs reach the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tnt_kernels import _ops
from tnt_kernels._ops import SCALARS, TENSORS, RowTensors
from tnt_kernels.backends.call import (
    ROW_PARTS,
    ROW_STATISTICS,
    Scalars,
    gradient_needs_totals,
    loss_needs_totals,
    real_dtype,
)

_T = TypeVar("_T")
_SHARD = "str group, SymInt[]? shard_sizes"
_library = torch.library.Library("tnt_kernels", "FRAGMENT")
for _schema in (
    f"sharded_losses(Tensor logits, {TENSORS}, {SCALARS}, {_SHARD}, bool with_gradient, bool with_stats, "
    "bool with_statistics) -> Tensor[]",
    f"sharded_losses_(Tensor(a!) logits, {TENSORS}, {SCALARS}, {_SHARD}, bool with_stats) "
    "-> (Tensor loss, Tensor stats)",
    f"sharded_gradients(Tensor logits, {TENSORS}, {SCALARS}, {_SHARD}, Tensor gathered, Tensor totals, "
    "Tensor upstream) -> Tensor",
    f"sharded_gradients_(Tensor(a!) logits, {TENSORS}, {SCALARS}, {_SHARD}, Tensor gathered, Tensor totals, "
    "Tensor upstream) -> ()",
):
    _library.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))


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


# --- what the ranks must agree on -----------------------------------------------------------------------------------

#: Of every group, the sizes that all its ranks have confirmed; under None, those found without being told.
_confirmed: WeakKeyDictionary[Any, dict[tuple[int, ...] | None, tuple[int, ...]]] = (
    WeakKeyDictionary()
)


def _process_group(name: str) -> Any:
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def all_gather(x: Tensor, group: str) -> Tensor:
    """(S, *x.shape): every rank's x, which is contiguous."""
    size = _process_group(group).size()
    functional = torch.ops._c10d_functional
    out: Tensor = functional.wait_tensor(functional.all_gather_into_tensor(x, size, group))
    return out.view(size, *x.shape)


def all_reduce_(x: Tensor, group: str) -> None:
    functional = torch.ops._c10d_functional
    functional.wait_tensor(functional.all_reduce_(x, "sum", group))


def _raise_for(sizes: Sequence[float], rank: int) -> None:
    """For ranks that have raised, which say so by a size that none has."""
    lost = [i for i, size in enumerate(sizes) if not size >= 0]
    if lost and rank not in lost:
        raise RuntimeError(
            f"tnt_loss: rank {lost[0]} of group has raised an error, so there is no loss here either"
        )


def confirm(shard: Shard, vocab: int, device: torch.device) -> tuple[int, ...]:
    """The columns of all ranks. A group's first call asks for them, and waits for the answer; errors are everyone's."""
    group = _process_group(shard.group)
    known = _confirmed.setdefault(group, {})
    given = None if shard.sizes is None else tuple(shard.sizes)
    if given not in known:
        rank, count = group.rank(), group.size()
        mine = torch.tensor([vocab, *(given or [-1] * count)], device=device)
        answers = all_gather(mine, shard.group).tolist()
        sizes = [answer[0] for answer in answers]
        _raise_for(sizes, rank)
        for i, (_, *told) in enumerate(answers):
            if told not in (sizes, [-1] * count) or (told == sizes) != (given is not None):
                raise ValueError(
                    f"shard_sizes: {told if told[0] >= 0 else None} on rank {i} and "
                    f"{None if given is None else list(given)} on rank {rank}, expected {sizes}, the columns that the "
                    "ranks have, or None, on every rank"
                )
        known[given] = tuple(sizes)
    return known[given]


def place(shard: Shard, vocab: int, device: torch.device) -> Place:
    """Where this rank's ``vocab`` columns lie."""
    sizes = confirm(shard, vocab, device)
    rank = _process_group(shard.group).rank()
    if sizes[rank] != vocab:
        raise ValueError(
            f"logits: V = {vocab} on rank {rank}, expected {sizes[rank]}, as the shards of group are {list(sizes)}; a "
            "group with several vocabularies needs shard_sizes"
        )
    return Place(sum(sizes[:rank]), sum(sizes), max(sizes))


def announce_failure(shard: Shard, logits: Any, twice: bool) -> None:
    """Takes part in the collectives of the other ranks, to tell them that this one raises.

    Not possible for logits that do not say how many rows there are.
    """
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        return
    given = None if shard.sizes is None else tuple(shard.sizes)
    if given not in _confirmed.setdefault(_process_group(shard.group), {}):
        count = _process_group(shard.group).size()
        all_gather(torch.full((1 + count,), -1, device=logits.device), shard.group)
        return
    n, real = logits.shape[:-1].numel(), real_dtype(logits)
    nan = logits.new_full((n + 1, ROW_STATISTICS), torch.nan, dtype=real)
    all_gather(nan, shard.group)
    if twice and logits.device.type != "cpu":  # the others have not noticed yet
        all_gather(logits.new_full((n, ROW_PARTS), torch.nan, dtype=real), shard.group)


def announcing(
    shard: Shard | None, logits: Any, prepare: Callable[[], _T], twice: bool = True
) -> _T:
    """``prepare()``, whose errors the other ranks get to know; ``twice`` if theirs is a loss of two collectives."""
    if shard is None or torch.compiler.is_compiling():
        return prepare()
    try:
        return prepare()
    except Exception:
        announce_failure(shard, logits, twice)
        raise


# --- the operators --------------------------------------------------------------------------------------------------

_SHARD_AT = _ops.LAST_SCALAR
_REST_AT = _SHARD_AT + len(Shard._fields)


def _split(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], Scalars, Shard]:
    return (
        arguments[: _ops.LAST_TENSOR],
        Scalars._make(arguments[_ops.LAST_TENSOR : _ops.LAST_SCALAR]),
        Shard._make(arguments[_SHARD_AT:_REST_AT]),
    )


def _launch(
    logits: Tensor, arguments: tuple[Any, ...], where: Place, **outputs: Tensor | None
) -> None:
    tensors, scalars, _ = _split(arguments)
    _ops.launch(
        logits,
        tensors,
        scalars,
        vocab_offset=where.offset,
        vocab_size=where.vocab_size,
        **outputs,
    )


def _compute(
    logits: Tensor,
    arguments: tuple[Any, ...],
    loss: Tensor,
    stats: Tensor | None,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Writes what is given; returns all shards' statistics, each with its header row, and the totals."""
    _, scalars, shard = _split(arguments)
    n, vocab, device = arguments[1].numel(), logits.size(-1), logits.device
    packed = logits.new_empty((n + 1, ROW_STATISTICS), dtype=real_dtype(logits))
    parts = packed.new_empty((n, ROW_PARTS))
    confirm(shard, vocab, device)

    def first() -> Place:
        where = place(shard, vocab, device)
        if gradient is logits:
            _ops.check_apart(logits, arguments[0])
        _launch(logits, arguments, where, statistics=packed[:n], stats=stats)
        return where

    where = announcing(shard, logits, first, loss_needs_totals(scalars))
    packed[n] = vocab
    gathered = all_gather(packed, shard.group)
    if device.type == "cpu":
        _raise_for(gathered[:, n, 0].tolist(), _process_group(shard.group).rank())
    rows, late = gathered[:, :n], gradient_needs_totals(scalars)
    now, later = (None, gradient) if late else (gradient, None)
    totals = torch.zeros_like(parts)
    if loss_needs_totals(scalars) or now is not None:
        _launch(logits, arguments, where, gathered=rows, parts=parts, gradient=now)
    if loss_needs_totals(scalars):
        for part in all_gather(parts, shard.group):
            totals += part
    outputs = {"loss": loss, "stats": stats, "gradient": later}
    _launch(logits, arguments, where, gathered=rows, totals=totals, **outputs)
    return gathered, totals


def _new_losses(logits: Tensor, *arguments: Any) -> list[Tensor]:
    *_, with_statistics = arguments
    outputs = _ops.new_row_losses(logits, *arguments[:_SHARD_AT], *arguments[_REST_AT:-1], False)
    if with_statistics:  # for tracing alone: their size is that of the group
        dtype, n = real_dtype(logits), arguments[1].numel()
        shards = _process_group(arguments[_SHARD_AT]).size()
        outputs.append(logits.new_empty((shards, n + 1, ROW_STATISTICS), dtype=dtype))
        outputs.append(logits.new_empty((n, ROW_PARTS), dtype=dtype))
    return outputs


def _losses(logits: Tensor, *arguments: Any) -> list[Tensor]:
    """[loss], then what was asked for of [gradient, stats, statistics of all shards and totals]."""
    with_gradient, with_stats, with_statistics = arguments[_REST_AT:]
    outputs = _ops.new_row_losses(logits, *arguments[:_SHARD_AT], with_gradient, with_stats, False)
    stats = outputs[-1] if with_stats else None
    kept = _compute(logits, arguments, outputs[0], stats, outputs[1] if with_gradient else None)
    return [*outputs, *kept] if with_statistics else outputs


def _new_losses_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _ops.new_row_losses_(logits, *arguments[:_SHARD_AT], *arguments[_REST_AT:])


def _losses_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss and stats (empty unless asked for); the gradient lies where the logits were."""
    loss, stats = _new_losses_(logits, *arguments)
    _compute(logits, arguments, loss, stats if arguments[_REST_AT] else None, logits)
    return loss, stats


def _write_gradient(logits: Tensor, arguments: tuple[Any, ...], gradient: Tensor) -> None:
    _, _, shard = _split(arguments)
    gathered, totals, upstream = arguments[_REST_AT:]
    outputs = {"totals": totals, "gradient": gradient, "upstream": upstream}
    where = place(shard, logits.size(-1), logits.device)
    _launch(logits, arguments, where, gathered=gathered[:, : len(totals)], **outputs)


def _gradients(logits: Tensor, *arguments: Any) -> Tensor:
    gradient = _ops.new_gradient(logits)
    _write_gradient(logits, arguments, gradient)
    return gradient


def _gradients_(logits: Tensor, *arguments: Any) -> None:
    _write_gradient(logits, arguments, logits)


for _name, _implementation, _fake in (
    ("sharded_losses", _losses, _new_losses),
    ("sharded_losses_", _losses_, _new_losses_),
    ("sharded_gradients", _gradients, lambda logits, *_: _ops.new_gradient(logits)),
    ("sharded_gradients_", _gradients_, lambda *_: None),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tnt_kernels::{_name}", _fake, lib=_library)

sharded_losses = torch.ops.tnt_kernels.sharded_losses.default
sharded_losses_ = torch.ops.tnt_kernels.sharded_losses_.default
sharded_gradients = torch.ops.tnt_kernels.sharded_gradients.default
sharded_gradients_ = torch.ops.tnt_kernels.sharded_gradients_.default


def losses(
    logits: Tensor, tensors: RowTensors, scalars: Scalars, shard: Shard | None, *wanted: bool
) -> Any:
    """``row_losses``, of logits that are a shard or whole."""
    if shard is None:
        return _ops.row_losses(logits, *tensors, *scalars, *wanted)
    return sharded_losses(logits, *tensors, *scalars, *shard, *wanted)


def losses_(
    logits: Tensor, tensors: RowTensors, scalars: Scalars, shard: Shard | None, with_stats: bool
) -> Any:
    """``row_losses_``, of logits that are a shard or whole."""
    if shard is None:
        return _ops.row_losses_(logits, *tensors, *scalars, with_stats)
    return sharded_losses_(logits, *tensors, *scalars, *shard, with_stats)


def gradients(
    logits: Tensor, tensors: RowTensors, scalars: Scalars, shard: Shard | None, *rest: Tensor
) -> Any:
    """``row_gradients``; ``rest`` is what its forward kept, and the upstream factor."""
    if shard is None:
        return _ops.row_gradients(logits, *tensors, *scalars, *rest)
    return sharded_gradients(logits, *tensors, *scalars, *shard, *rest)


def gradients_(
    logits: Tensor, tensors: RowTensors, scalars: Scalars, shard: Shard | None, *rest: Tensor
) -> None:
    """``row_gradients_``; ``rest`` as for ``gradients``."""
    if shard is None:
        _ops.row_gradients_(logits, *tensors, *scalars, *rest)
    else:
        sharded_gradients_(logits, *tensors, *scalars, *shard, *rest)
