"""The operators behind ``linear_tnt_loss``.

``linear_losses`` yields the loss and, where asked, gradients; ``linear_gradients`` computes the chunks once more, for
gradients with an upstream factor for every row. To a compiler each is one call: it could not trace a loop whose length
depends on the data. The work is in ``_linear_chunks``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tnt_kernels import _ops
from tnt_kernels._groups import Facts, Shard, announcing, facts_of, place, settle
from tnt_kernels._linear_chunks import (
    Chunks,
    LinearScalars,
    LinearTensors,
    flatten_rows,
    plan,
)
from tnt_kernels._linear_matmul import held_dtype
from tnt_kernels._ops import RowTensors
from tnt_kernels.backends.call import Scalars, check_indices, real_dtype

_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, "
    "Tensor labels, Tensor? weights, Tensor? alpha, Tensor? negative_ids, Tensor? normalizer"
)
_SCALARS = (
    "float? softcap, float? ref_softcap, float logit_scale, float ref_logit_scale, SymInt vocab_size, "
    f"SymInt? chunk_size, SymInt? max_active_rows, {_ops.SCALARS}, str? group, SymInt[]? shard_sizes"
)
_WANTED = "bool hidden_gradient, bool weight_gradient, bool bias_gradient"
_library = torch.library.Library("tnt_kernels", "FRAGMENT")
for _schema in (
    f"linear_losses({_TENSORS}, {_SCALARS}, bool with_stats, {_WANTED}) -> Tensor[]",
    f"linear_gradients({_TENSORS}, {_SCALARS}, Tensor upstream, {_WANTED}) -> Tensor[]",
):
    _library.define(_schema)

_LAST_TENSOR = len(LinearTensors._fields)
_MIDDLE = _LAST_TENSOR + len(LinearScalars._fields)
_SHARD = _MIDDLE + len(Scalars._fields)
_LAST_SCALAR = _SHARD + len(Shard._fields)


def _split(
    arguments: tuple[Any, ...],
) -> tuple[LinearTensors, LinearScalars, Scalars, Shard | None]:
    shard = arguments[_SHARD:_LAST_SCALAR]
    return (
        LinearTensors._make(arguments[:_LAST_TENSOR]),
        LinearScalars._make(arguments[_LAST_TENSOR:_MIDDLE]),
        Scalars._make(arguments[_MIDDLE:_SHARD]),
        None if shard[0] is None else Shard._make(shard),
    )


def _undisturbed(device: torch.device) -> torch.autocast:
    """The dtypes are settled before the operators are called."""
    return torch.autocast(device.type, enabled=False)


@torch.no_grad()
def _linear_losses(*arguments: Any) -> list[Tensor]:
    """[loss], stats if asked for, then the gradients that are: of hidden, weight and bias.

    The loss is 0-dim, or (...) under "none". Gradients are in their ``held_dtype`` and lack the upstream factor; with
    "none" there are none.
    """
    shaped, linear, s, shard = _split(arguments)
    with_stats, *wanted = arguments[_LAST_SCALAR:]
    shape, t = shaped.labels.shape, flatten_rows(shaped)
    real = real_dtype(t.hidden)
    with _undisturbed(t.hidden.device):
        groups, count = announcing(shard, t.hidden, lambda: plan(t, s, linear.max_active_rows))
        vocab_size = linear.vocab_size
        if shard is not None:
            settle(shard, vocab_size, t.hidden.device, lambda: _facts(t, linear, s, wanted))
            vocab_size = place(shard, vocab_size).vocab_size
        check_indices(t.labels, t.weights, t.negative_ids, vocab_size, s.ignore_index)
        if s.reduction == "mean" and t.normalizer is None and s.normalizer_value is None:
            t = t._replace(normalizer=count.to(real))
        per_row = s.reduction == "none"
        loss = t.hidden.new_zeros(len(t.labels) if per_row else (), dtype=real)
        stats = None
        if with_stats:
            stats = t.hidden.new_full((5, len(t.labels)), torch.nan, dtype=real)
            stats[0] = 0.0
        chunks = Chunks(t, linear, s, groups, wanted, None, shard)
        for index, chunk_loss, chunk_stats in chunks.losses(with_stats):
            if per_row:
                loss.index_copy_(0, index, chunk_loss)
            else:
                loss += chunk_loss
            if stats is not None and chunk_stats is not None:
                stats.index_copy_(1, index, chunk_stats)
        if linear.max_active_rows is not None:
            loss = _nan_beyond(loss, count, linear.max_active_rows)
        outputs = [loss.view(shape) if per_row else loss]
        if stats is not None:
            outputs.append(stats.view(5, *shape))
        return outputs + _gradients(chunks, wanted, shaped)


def _facts(t: LinearTensors, linear: LinearScalars, s: Scalars, wanted: list[bool]) -> Facts:
    """What decides over the ranks' chunks and collectives, and their loss."""
    reference = t.ref_hidden
    inputs = {
        "hidden": t.hidden.size(-1),
        "ref_hidden": None if reference is None else reference.size(-1),
        "ref_hidden.dtype": None if reference is None else reference.dtype,
    }
    settings = {k: v for k, v in linear._asdict().items() if k != "vocab_size"}
    names = (f"{name}.requires_grad" for name in ("hidden", "weight", "bias"))
    more = {**inputs, **settings, **dict(zip(names, wanted, strict=True))}
    rows = RowTensors(None, t.labels, t.weights, t.alpha, t.negative_ids, t.normalizer)
    return facts_of("linear_tnt_loss", "hidden", t.hidden.dtype, rows, s, more)


@torch.no_grad()
def _linear_gradients(*arguments: Any) -> list[Tensor]:
    """The gradients that are asked for, of hidden, weight and bias, under reduction "none"; ``upstream`` is (...)."""
    shaped, linear, s, shard = _split(arguments)
    upstream, *wanted = arguments[_LAST_SCALAR:]
    t = flatten_rows(shaped)
    with _undisturbed(t.hidden.device):
        groups, _ = plan(t, s, linear.max_active_rows)
        chunks = Chunks(t, linear, s, groups, wanted, upstream.reshape(-1), shard)
        for _ in chunks.losses(False):
            pass
        return _gradients(chunks, wanted, shaped)


def _nan_beyond(loss: Tensor, count: Tensor, most: int) -> Tensor:
    """Rows that ``max_active_rows`` leaves out: an error where it can be seen for free, else NaN."""
    if count.device.type == "cpu" and count.item() > most:
        raise ValueError(
            f"max_active_rows is {most}, expected at least {count.item()}, the number of active rows"
        )
    return loss.masked_fill(count > most, torch.nan)


def _gradients(chunks: Chunks, wanted: list[bool], t: LinearTensors) -> list[Tensor]:
    found = chunks.gradients()
    if wanted[0]:
        found[0] = found[0].view(t.hidden.shape)
    return found


def _new_linear_losses(*arguments: Any) -> list[Tensor]:
    t, _, s, _ = _split(arguments)
    with_stats, *wanted = arguments[_LAST_SCALAR:]
    real, shape = real_dtype(t.hidden), t.labels.shape
    outputs = [t.hidden.new_empty(shape if s.reduction == "none" else (), dtype=real)]
    if with_stats:
        outputs.append(t.hidden.new_empty((5, *shape), dtype=real))
    return outputs + _new_gradients(t, wanted)


def _new_linear_gradients(*arguments: Any) -> list[Tensor]:
    return _new_gradients(_split(arguments)[0], arguments[_LAST_SCALAR + 1 :])


def _new_gradients(t: LinearTensors, wanted: tuple[bool, ...] | list[bool]) -> list[Tensor]:
    dtype = held_dtype(t.hidden.dtype)
    return [
        x.new_empty(x.shape, dtype=dtype)
        for x, want in zip(t[:3], wanted, strict=True)
        if want and x is not None
    ]


for _name, _implementation, _fake in (
    ("linear_losses", _linear_losses, _new_linear_losses),
    ("linear_gradients", _linear_gradients, _new_linear_gradients),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tnt_kernels::{_name}", _fake, lib=_library)

linear_losses = torch.ops.tnt_kernels.linear_losses.default
linear_gradients = torch.ops.tnt_kernels.linear_gradients.default
