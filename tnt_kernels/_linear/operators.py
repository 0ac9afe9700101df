"""The operators behind ``linear_tnt_loss``.

``linear_losses`` yields the loss and, where asked, gradients; ``linear_gradients`` computes the chunks once more, for
gradients with an upstream factor for every row. To a compiler each is one call: it could not trace a loop whose length
depends on the data. The work is in ``_linear.chunks``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tnt_kernels._call import ROW_DIAGNOSTICS, LossCall, real_dtype
from tnt_kernels._linear.chunks import Chunks
from tnt_kernels._linear.matmul import held_dtype
from tnt_kernels._linear.plan import (
    LinearScalars,
    LinearTensors,
    flat_hidden,
    make_plan,
    shares_head,
)
from tnt_kernels._rows.schema import operator
from tnt_kernels._sharded.agreement import Facts, agree, columns_of, facts_of, report_error
from tnt_kernels.backends.protocol import check_indices


class WantedGradients(NamedTuple):
    """Which of the three gradients the caller wants."""

    hidden_gradient: bool
    weight_gradient: bool
    bias_gradient: bool


def _new_gradients(t: LinearTensors, wanted: WantedGradients) -> list[Tensor]:
    dtype = held_dtype(t.hidden.dtype)
    return [
        x.new_empty(x.shape, dtype=dtype)
        for x, want in zip((t.hidden, t.weight, t.bias), wanted, strict=True)
        if want and x is not None
    ]


def _new_linear_losses(
    t: LinearTensors,
    linear: LinearScalars,
    call: LossCall,
    wanted: WantedGradients,
) -> list[Tensor]:
    real, rows = real_dtype(t.hidden), t.hidden.shape[:-1]
    shape = rows if call.scalars.reduction == "none" else ()
    outputs = [t.hidden.new_empty(shape, dtype=real)]
    if call.diagnostics:
        outputs.append(t.hidden.new_empty((ROW_DIAGNOSTICS, *rows), dtype=real))
    return outputs + _new_gradients(t, wanted)


@operator(_new_linear_losses)
@torch.no_grad()
def linear_losses(
    t: LinearTensors,
    linear: LinearScalars,
    call: LossCall,
    wanted: WantedGradients,
) -> list[Tensor]:
    """[loss], diagnostics if asked for, then the gradients that are wanted: of hidden, weight and bias.

    The loss is 0-dim, or (...) under "none". Gradients are in their ``held_dtype`` and lack the upstream factor; with
    "none" there are none.
    """
    shape, t = t.hidden.shape, flat_hidden(t)
    rows, scalars, shard = call.tensors, call.scalars, call.shard
    real, device = real_dtype(t.hidden), t.hidden.device
    with torch.autocast(device.type, enabled=False):  # the dtypes are settled
        vocab_size = linear.vocab_size
        try:
            plan = make_plan(rows, scalars, linear.max_active_rows)
            if linear.rounds_pairs and not shares_head(t, linear):
                raise ValueError(
                    f"logits_dtype is {t.hidden.dtype}, expected None, because policy and reference do not share "
                    "their head: two weights or biases, a softcap, or two scales"
                )
        except Exception:
            if shard is not None:
                report_error(shard, t.hidden)
            raise
        if shard is not None:
            agree(shard, vocab_size, device, lambda: _facts(t, linear, call, wanted))
            vocab_size = columns_of(shard, vocab_size).vocab_size
        check_indices(
            rows.labels, rows.weights, rows.negative_ids, vocab_size, scalars.ignore_index
        )
        inverse = _inverse_normalizer(call, plan.active, real)
        found = Chunks(t, linear, call, plan, wanted, inverse)
        losses, diagnostics = found.losses()
        if scalars.reduction == "none":
            loss = _whole(losses, plan.order, len(rows.labels))
        elif inverse is None:
            loss = losses.sum()
        else:
            loss = (losses.sum() * inverse[0]).masked_fill(inverse[0] == 0, 0.0)
        if linear.max_active_rows is not None:
            loss = _nan_beyond(loss, plan.active, linear.max_active_rows)
        outputs = [loss.view(shape[:-1]) if scalars.reduction == "none" else loss]
        if diagnostics is not None:
            rest = _whole(diagnostics[1:], plan.order, len(rows.labels), torch.nan)
            of_loss = _whole(diagnostics[:1], plan.order, len(rows.labels))
            outputs.append(torch.cat((of_loss, rest)).view(ROW_DIAGNOSTICS, *shape[:-1]))
        return outputs + _gradients(found, wanted, shape)


def _inverse_normalizer(call: LossCall, count: Tensor, real: torch.dtype) -> Tensor | None:
    """(1,), on the device; None where the loss is not divided. 0 where it is divided by 0."""
    s, given = call.scalars, call.tensors.normalizer
    if s.reduction != "mean":
        return None
    if given is None and s.normalizer_value is not None:
        value = 1 / s.normalizer_value if s.normalizer_value else 0.0
        return count.new_full((1,), value, dtype=real)
    divisor = (count if given is None else given).to(real)
    return (1 / divisor).masked_fill(divisor == 0, 0.0).view(1)


def _whole(x: Tensor, index: Tensor | None, rows: int, left_out: float = 0.0) -> Tensor:
    """(..., n) of a plan's rows as (..., N)."""
    if index is None:
        return x
    return x.new_full((*x.shape[:-1], rows), left_out).index_copy_(-1, index, x)


def _facts(
    t: LinearTensors, linear: LinearScalars, call: LossCall, wanted: WantedGradients
) -> Facts:
    """What decides over the ranks' chunks and collectives, and their loss."""
    reference = t.ref_hidden
    inputs = {
        "hidden": t.hidden.size(-1),
        "ref_hidden": None if reference is None else reference.size(-1),
        "ref_hidden.dtype": None if reference is None else reference.dtype,
    }
    settings = {k: v for k, v in linear._asdict().items() if k != "vocab_size"}
    settings["logits_dtype"] = settings.pop("rounds_pairs")
    names = (f"{name}.requires_grad" for name in ("hidden", "weight", "bias"))
    more = {**inputs, **settings, **dict(zip(names, wanted, strict=True))}
    return facts_of("linear_tnt_loss", "hidden", t.hidden.dtype, call, more)


def _new_linear_gradients(
    t: LinearTensors,
    linear: LinearScalars,
    call: LossCall,
    upstream: Tensor,
    wanted: WantedGradients,
) -> list[Tensor]:
    return _new_gradients(t, wanted)


@operator(_new_linear_gradients)
@torch.no_grad()
def linear_gradients(
    t: LinearTensors,
    linear: LinearScalars,
    call: LossCall,
    upstream: Tensor,
    wanted: WantedGradients,
) -> list[Tensor]:
    """The gradients that are wanted, of hidden, weight and bias, under reduction "none"; ``upstream`` is (...)."""
    shape, t = t.hidden.shape, flat_hidden(t)
    with torch.autocast(t.hidden.device.type, enabled=False):
        plan = make_plan(call.tensors, call.scalars, linear.max_active_rows)
        found = Chunks(t, linear, call, plan, wanted, upstream.reshape(-1))
        found.losses()
        return _gradients(found, wanted, shape)


def _nan_beyond(loss: Tensor, count: Tensor, most: int) -> Tensor:
    """Rows that ``max_active_rows`` leaves out: an error where it can be seen for free, else NaN."""
    if count.device.type == "cpu" and count.item() > most:
        raise ValueError(
            f"max_active_rows is {most}, expected at least {count.item()}, the number of active rows"
        )
    return loss.masked_fill(count > most, torch.nan)


def _gradients(chunks: Chunks, wanted: WantedGradients, hidden_shape: torch.Size) -> list[Tensor]:
    found = chunks.gradients()
    if wanted.hidden_gradient:
        found[0] = found[0].view(hidden_shape)
    return found
