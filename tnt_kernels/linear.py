"""``linear_tnt_loss``: from hidden states to the loss. The logits exist a chunk of rows at a time, never as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor

from tnt_kernels import backends
from tnt_kernels._autograd import LinearTNTLossFunction
from tnt_kernels._call import EXPECTED_DTYPES, LOGITS_DTYPES, LossCall, real_dtype
from tnt_kernels._linear.operators import WantedGradients, linear_losses
from tnt_kernels._linear.plan import LinearScalars, LinearTensors, is_same
from tnt_kernels._rows.checks import (
    check_constant,
    check_row_tensors,
    refuse_transforms,
)
from tnt_kernels._scalars import as_number, check_scalars
from tnt_kernels._sharded.agreement import report_error
from tnt_kernels._sharded.collectives import shard_of
from tnt_kernels.functional import RowKeywords, RowStats
from tnt_kernels.objectives import Objective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

_Head = tuple[Tensor, Tensor, Tensor | None]  # hidden states, weight and bias of one model


class _LinearKeywords(RowKeywords, total=False):
    bias: Tensor | None
    ref_bias: Tensor | None
    softcap: float | None
    ref_softcap: float | None
    logit_scale: float
    ref_logit_scale: float
    vocab_size: int | None
    chunk_size: int | None
    max_active_rows: int | None
    logits_dtype: torch.dtype | None


@overload
def linear_tnt_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = ...,
    *,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[_LinearKeywords],
) -> Tensor: ...
@overload
def linear_tnt_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = ...,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[_LinearKeywords],
) -> tuple[Tensor, RowStats]: ...
def linear_tnt_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    max_active_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    method: str | Objective = "tnff",
    alpha: float | Tensor = 1.0,
    negative_ids: Tensor | None = None,
    eps: float = 1e-6,
    smoothing: str = "negatives",
    nl_floor: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`tnt_loss` of ``softcap(logit_scale * (hidden @ weight.T + bias))``, without ever holding these logits.

    Rows of weight 0 are not multiplied, and rows whose loss needs no reference not with ``ref_weight``. The gradients
    of ``hidden``, ``weight`` and ``bias`` are computed in forward, chunk by chunk, each only if it is required; under
    reduction="none", where every row has its own upstream factor, in backward, which computes the chunks once more.
    Logits are float32 (float64 for float64 hidden states), and so are the arithmetic on them and the sums of gradients;
    what is rounded to 16-bit parameters' dtype is the gradient of the logits, once, and the results. (Gradients of
    float16 parameters stay float32 until backward, lest they underflow before a GradScaler's factor.) ``F.linear``
    rounds logits, which next to p = q is most of a gradient's error. On a CPU, on AMD's GPUs and before torch 2.8,
    whose libraries have no matmul from 16 bits to float32, this takes a float32 matmul.

    Where policy and reference share the head (``ref_weight`` is ``weight`` in memory, as with LoRA or a frozen head;
    the same for the biases, the same scale, no softcap), the difference of the hidden states is multiplied, which
    yields that of the logits with all its digits, however close the models are.

    Memory, beyond the arguments and their gradients: 64 MiB on a CPU, and elsewhere 1 GiB and as much as ``weight``
    has, for the logits of ``chunk_size`` rows and, with 16-bit parameters, for the gradients of logits that wait,
    rounded, for a common matmul; where a bfloat16 weight needs a gradient, 4 bytes an entry for its float32 sum, or for
    the gradients of all rows' logits, if they fit into both: then one matmul sums them up; where rows are left out,
    both models' hidden states of the others; and where the head is shared, the difference of the hidden states.

    With a ``group``, ``weight``, ``ref_weight`` and the biases hold this rank's rows of the vocabulary, in rank order,
    at least one; the hidden states and everything else are the same on every rank. A chunk takes two small all-gathers,
    and the gradient of ``hidden``, which every rank gets as a whole, one all-reduce in float32. On a GPU, after a
    group's first call, a rank whose arguments are wrong cannot tell the others.

    Follows autocast. Parameters that are DTensors (FSDP2) are gathered, and their gradient is averaged over the mesh.

    Args:
        hidden: (..., H) float32, bfloat16 or float16 (float64 on a CPU): the policy's last hidden states.
        weight: (V, H), the same dtype: its output embedding, ``lm_head.weight``.
        ref_hidden: (..., H_ref) of any of these dtypes: the original model's, without gradient; None if no row's loss
            is a KL.
        ref_weight: (V, H_ref), the dtype of ``ref_hidden``, without gradient: may share ``weight``'s memory. None as
            ``ref_hidden``.
        labels: (...) integer, 0 <= label < V. Not shifted here.
        weights: (...) real, as in :func:`tnt_loss`.
        bias: (V,), the dtype of ``hidden``.
        ref_bias: (V,), the dtype of ``ref_hidden``, without gradient.
        softcap: logits are capped to ``softcap * tanh(logits / softcap)``. None: not.
        ref_softcap: the same of the reference.
        logit_scale: factor on logits, before softcap (Cohere; Granite: 1 / ``logits_scaling``; T5: ``d_model**-0.5``).
        ref_logit_scale: the same of the reference.
        vocab_size: V, if the parameters are padded to more rows. None: as many as ``weight`` has.
        chunk_size: rows whose logits exist at once. None: as many as fit into the memory stated above. A row's loss
            does not depend on it; gradients do by the rounding of a float32 sum, and, of 16 bits, of their result.
        max_active_rows: how many rows can have a non-zero weight. Given, this many rows are computed, all with their
            reference, and a GPU is never waited for; with more active rows the loss is NaN (on a CPU an error). None:
            just the active ones, whose number is read from the device, once, before anything is multiplied.
        logits_dtype: None, or ``torch.bfloat16`` for bfloat16 hidden states and a shared head: hold the reference's
            logits, and the policy's differences to them, in 16 bits. That is half the memory traffic between the
            matmuls, and on a CPU a fast matmul in place of a slow one, for an error of the gradient of 1 to 2 % in
            place of 0.3 %, at any distance of the models: that of rounding the reference's logits, here of some 10, to
            bfloat16. (Logits of rows whose loss is no KL are rounded, too.)
        method, alpha, negative_ids, eps, smoothing, nl_floor, temperature, ignore_index, reduction, normalizer,
            return_stats, group, shard_sizes, backend: as in :func:`tnt_loss`. ``temperature`` divides softcap's result.

    Returns:
        The loss, float32 (float64 for float64 hidden states): 0-dim, or (...) under "none". With ``return_stats``, also
        ``RowStats``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, a wrong device or value, a missing reference or one that requires grad, a
            ``logits_dtype`` without a shared head, a label or id out of range (on a CPU; on other devices it makes the
            row's loss NaN).
        RuntimeError: a requested backend that is not available, or another rank of ``group`` that has raised.
    """
    shard = shard_of(group, shard_sizes)
    try:
        objective, _, scalars = check_scalars(
            method, alpha, eps, smoothing, nl_floor, temperature, ignore_index, reduction,
            normalizer, torch.compiler.is_compiling(),
        )  # fmt: skip
        tensors = _check_heads(
            objective, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, vocab_size
        )
        states = tensors.hidden
        linear = LinearScalars(
            None if softcap is None else as_number("softcap", softcap, above=0.0),
            None if ref_softcap is None else as_number("ref_softcap", ref_softcap, above=0.0),
            as_number("logit_scale", logit_scale),
            as_number("ref_logit_scale", ref_logit_scale),
            tensors.weight.size(0) if vocab_size is None else vocab_size,
            None if chunk_size is None else _as_count("chunk_size", chunk_size),
            None if max_active_rows is None else _as_count("max_active_rows", max_active_rows),
            _rounds_pairs(logits_dtype, states.dtype, objective),
        )
        rows = check_row_tensors(
            "hidden", states, None, labels, weights, alpha, negative_ids, normalizer
        )
        rounds = linear.rounds_pairs
        dtype = states.dtype if rounds else real_dtype(states)
        chunk = states.new_empty((0, linear.vocab_size), dtype=dtype)
        name = backends.select(chunk, backend, scalars, shard is not None, differences=rounds)
    except Exception:
        if shard is not None:
            report_error(shard, hidden)
        raise
    call = LossCall(rows, scalars, name, False, return_stats, shard)
    policy = (tensors.hidden, tensors.weight, tensors.bias)
    wanted = WantedGradients(*(x is not None and x.requires_grad for x in policy))
    if any(wanted) and torch.is_grad_enabled():
        reference = (tensors.ref_hidden, tensors.ref_weight, tensors.ref_bias)
        outputs = LinearTNTLossFunction.apply(  # type: ignore[no-untyped-call]
            *policy, reference, linear, call, wanted
        )
    else:
        none = WantedGradients(False, False, False)
        outputs = linear_losses(tensors, linear, call, none)
    if return_stats:
        return outputs[0], RowStats(*outputs[1].unbind())
    return cast(Tensor, outputs[0])


def _check_heads(
    objective: Objective,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    vocab_size: int | None,
) -> LinearTensors:
    policy = _as_linear("", hidden, weight, bias)
    states, embedding, _ = policy
    reference: tuple[Tensor | None, ...] = (None, None, None)
    if objective.reads_reference:
        # What both models share is gathered and cast once, and then still shared.
        if _is_one(ref_weight, weight):
            ref_weight = embedding.detach()
        if _is_one(ref_bias, bias) and policy[2] is not None:
            ref_bias = policy[2].detach()
        reference = _as_reference(
            objective, states, embedding, ref_hidden, ref_weight, ref_bias, vocab_size is None
        )
        for name, x in zip(("ref_hidden", "ref_weight", "ref_bias"), reference, strict=True):
            if x is not None:
                check_constant(name, x, states, "hidden")
    tensors = LinearTensors(*policy, *reference)
    vocab = embedding.size(0) if vocab_size is None else _as_count("vocab_size", vocab_size)
    for name, x in (("weight", embedding), ("ref_weight", tensors.ref_weight)):
        if x is not None and x.size(0) < vocab:
            raise ValueError(
                f"vocab_size is {vocab}, expected at most {x.size(0)}, the number of rows of {name}"
            )
    return tensors


def _as_linear(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Head:
    """Checks one model's tensors, gathers them, casts them to autocast's dtype."""
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if not isinstance(x, Tensor) and (x is not None or name != "bias"):
            raise TypeError(f"{prefix}{name}: {type(x).__name__}, expected a tensor")
    refuse_transforms(f"{prefix}hidden", hidden)
    refuse_transforms(f"{prefix}weight", weight)
    if hidden.dim() == 0 or hidden.size(-1) == 0:
        raise ValueError(
            f"{prefix}hidden: shape {tuple(hidden.shape)}, expected (..., H) with H >= 1"
        )
    if weight.dim() != 2 or weight.size(1) != hidden.size(-1) or weight.size(0) == 0:
        raise ValueError(
            f"{prefix}weight: shape {tuple(weight.shape)}, expected (V, {hidden.size(-1)}), "
            f"because {prefix}hidden is {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias: shape {tuple(bias.shape)}, expected ({weight.size(0)},), "
            f"because {prefix}weight is {tuple(weight.shape)}"
        )
    device = hidden.device.type
    hidden, weight = _prepared(hidden, device), _prepared(weight, device)
    bias = None if bias is None else _prepared(bias, device)
    if hidden.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{prefix}hidden: dtype {hidden.dtype}, expected {EXPECTED_DTYPES}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{prefix}{name}: dtype {x.dtype}, expected {hidden.dtype}, that of {prefix}hidden"
            )
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{prefix}{name}: on {x.device}, expected {hidden.device}, where {prefix}hidden is"
            )
    return hidden, weight, bias


def _as_reference(
    objective: Objective,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    same_vocab: bool,
) -> _Head:
    for name, x in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight)):
        if x is None:
            raise ValueError(
                f"{name}: None, expected a tensor, because {objective} compares with the reference"
            )
    assert ref_hidden is not None
    assert ref_weight is not None
    ref_hidden, ref_weight, ref_bias = _as_linear("ref_", ref_hidden, ref_weight, ref_bias)
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden: shape {tuple(ref_hidden.shape)}, expected {(*hidden.shape[:-1], ref_hidden.size(-1))}, "
            f"because hidden is {tuple(hidden.shape)}"
        )
    if same_vocab and ref_weight.size(0) != weight.size(0):
        raise ValueError(
            f"ref_weight: shape {tuple(ref_weight.shape)}, expected {(weight.size(0), ref_weight.size(1))}, because "
            f"weight is {tuple(weight.shape)}; if they are padded differently, give vocab_size"
        )
    return ref_hidden, ref_weight, ref_bias


def _is_one(reference: Tensor | None, x: Tensor | None) -> bool:
    """Whether they are the same in memory; False where one needs a gradient, or a compiler traces."""
    if not isinstance(reference, Tensor) or not isinstance(x, Tensor) or reference.requires_grad:
        return False
    refuse_transforms("ref_weight", reference)
    if torch.compiler.is_compiling() or reference.shape != x.shape:
        return False
    locals_ = (y.to_local() if hasattr(y, "to_local") else y for y in (reference, x))
    return is_same(*locals_)


def _prepared(x: Tensor, device: str) -> Tensor:
    """What ``F.linear`` would multiply."""
    if hasattr(x, "full_tensor"):
        x = _gathered(x)
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return x


def _gathered(x: Any) -> Tensor:
    """A DTensor as a whole. Every rank has rows of its own, so that the gradients are averaged, as FSDP does."""
    from torch.distributed.tensor import Partial

    whole: Tensor = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)
    if whole.requires_grad:
        ranks = x.device_mesh.size()
        whole.register_hook(lambda gradient: gradient / ranks)
    return whole


def _rounds_pairs(
    logits_dtype: torch.dtype | None, dtype: torch.dtype, objective: Objective
) -> bool:
    if logits_dtype is None:
        return False
    if not isinstance(logits_dtype, torch.dtype):
        raise TypeError(
            f"logits_dtype: {type(logits_dtype).__name__}, expected torch.bfloat16 or None"
        )
    if logits_dtype != torch.bfloat16 or dtype != torch.bfloat16 or not objective.reads_reference:
        raise ValueError(
            f"logits_dtype is {logits_dtype} with hidden of {dtype} and {objective}, expected None, or "
            "torch.bfloat16 with hidden of torch.bfloat16 and a loss that reads the reference"
        )
    return True


def _as_count(name: str, x: int) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name}: {type(x).__name__}, expected an int")
    if x < 1:
        raise ValueError(f"{name} is {x}, expected at least 1")
    return x
