"""``tnt_loss``: the public function. It checks the arguments; ``_autograd`` and the operators do the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from tnt_kernels import backends
from tnt_kernels._autograd import TNTLossFunction
from tnt_kernels._call import (
    EXPECTED_DTYPES,
    LOGITS_DTYPES,
    LossCall,
    RowTensors,
)
from tnt_kernels._operators import row_losses
from tnt_kernels._rows.checks import (
    are_usual,
    check_constant,
    check_row_tensors,
    refuse_transforms,
)
from tnt_kernels._rows.layout import has_dense_rows
from tnt_kernels._scalars import check_scalars
from tnt_kernels._sharded.agreement import report_error
from tnt_kernels._sharded.collectives import shard_of
from tnt_kernels._sharded.dtensor import is_dtensor, local
from tnt_kernels.objectives import Objective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class RowStats(NamedTuple):
    """Diagnostics of every row: detached tensors of shape (...), float32 (float64 for float64 logits).

    On rows of weight 0, ``loss`` is 0 and the rest NaN. NaN or +inf among a row's policy logits makes all of them NaN,
    among its reference logits, where the loss reads them, ``loss``, ``kl`` and ``ref_negative_mass``.
    """

    loss: Tensor  #: the row's own loss in nats, before weight and alpha
    kl: Tensor  #: the divergence to the row's target; NaN on rows whose loss is not a KL
    negative_mass: Tensor  #: p(S): the policy's probability of the row's negative set
    ref_negative_mass: Tensor  #: q(S): the reference's; NaN on rows that do not read the reference
    entropy: Tensor  #: of the policy, in nats


class RowKeywords(TypedDict, total=False):
    """The keywords of :func:`tnt_loss` and :func:`linear_tnt_loss`, for those who check types."""

    method: str | Objective
    alpha: float | Tensor
    negative_ids: Tensor | None
    eps: float
    smoothing: str
    nl_floor: float | None
    temperature: float
    ignore_index: int
    reduction: str
    normalizer: float | Tensor | None
    group: ProcessGroup | None
    shard_sizes: Sequence[int] | None
    backend: str | None


class _LogitsKeywords(RowKeywords, total=False):
    inplace: bool


@overload
def tnt_loss(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = ...,
    *,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[_LogitsKeywords],
) -> Tensor: ...
@overload
def tnt_loss(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = ...,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[_LogitsKeywords],
) -> tuple[Tensor, RowStats]: ...
def tnt_loss(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
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
    inplace: bool = False,
    return_stats: bool = False,
    group: ProcessGroup | None = None,
    shard_sizes: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """The token-level loss of Targeted Negative Training (Zhang, Ranganath, Tafvizi, TMLR 2024, arXiv 2406.13660).

    A row is one token position. A row with tokens to remove (a negative weight, or ``negative_ids``) is negative and
    pulls the policy towards the reference without those tokens, renormalised; the others hold it where it was. With
    ``inplace=False`` the call allocates one gradient of the logits' size and nothing else of that order; with
    ``inplace=True`` not even that.

    ``logits`` and ``ref_logits`` may be DTensors whose last dimension is sharded over one mesh dimension, and rows over
    others: that replaces ``group``. The other tensors are then DTensors with the placements of the rows, or this rank's
    part of them. Loss and statistics are plain tensors, of this rank's rows: "mean" counts these, unless ``normalizer``
    is given.

    Args:
        logits: (..., V) float32, bfloat16 or float16 (float64 on a CPU): the policy's. Dense rows of any stride are
            read where they are (``logits[..., :V]`` of a padded vocabulary). Not shifted here: shift labels and
            weights, and give the last position weight 0.
        ref_logits: (..., V), same dtype and device: the original model's, without gradient, as ``torch.no_grad`` or
            ``torch.inference_mode`` leaves them (a compiler refuses the latter where backward reads them: under "none"
            and in float16). None if no row's loss is a KL.
        labels: (...) integer, 0 <= label < V: the token at each position.
        weights: (...) real. > 0: keep, the row's loss counts this much. -1: remove the label. Between -1 and 0: leave
            1 + w of its probability. 0: leave the row out; it is not even read. None: all 1.
        method: a key of ``METHODS``, or an ``Objective``.
        alpha: factor on negative rows: a number, or a tensor that broadcasts to (...).
        negative_ids: (..., K) or (K,) (for every row) integer, padded with -1: further tokens to remove.
        eps: floor that the reverse KL's target leaves to removed tokens.
        smoothing: "negatives" (``eps`` on removed tokens alone) or "uniform" (on all tokens and every target, as the
            authors' code does).
        nl_floor: negative likelihood stops pushing a token once its log-probability is below this. None: never.
        temperature: both logits are divided by it; there is no factor T² on the loss.
        ignore_index: rows with this label have weight 0.
        reduction: "mean" over the rows with a non-zero weight, "sum", or "none" (per row, with weight and alpha).
        normalizer: number or 0-dim tensor that "mean" divides by instead of the count. 0 gives loss 0.
        inplace: write the gradient over the logits' storage; their values are gone afterwards ("none" and float16:
            after backward). Nothing is written where no gradient is needed.
        return_stats: also return ``RowStats``.
        group: a process group over which the vocabulary is sharded. Every rank gives its own columns of ``logits`` and
            ``ref_logits``, in rank order, and the same of everything else; labels and ids are those of the whole
            vocabulary. Every rank gets the whole loss and statistics and its own columns' gradient. Forward takes two
            all-gathers (17 numbers a row; one where no row's loss is a KL or NL), backward none. In a group's first
            call (on a CPU, in every call) they also exchange checksums of what must be the same.
        shard_sizes: columns of every rank of ``group``. None: the group's first call asks for them, and they may not
            change.
        backend: "cpu", "cuda", "triton" or "torch"; None: ``$TNT_KERNELS_BACKEND``, else the fastest that serves the
            call.

    Returns:
        The loss, float32 (float64 for float64 logits): 0-dim, or (...) under "none". With ``return_stats``, also
        ``RowStats``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, a missing ``ref_logits``, a label or id out of range (on a CPU; on
            other devices it makes the row's loss NaN), logits that cannot be overwritten under ``inplace``.
        RuntimeError: a requested backend that is not available, or another rank of ``group`` that has raised; a call
            inside ``torch.func.grad`` or ``vmap``.
    """
    if type(logits) is not Tensor and is_dtensor(logits):
        if group is not None or shard_sizes is not None:
            raise ValueError("group: given with logits that are a DTensor, whose mesh says it")
        rows = {"labels": labels, "weights": weights, "alpha": alpha, "negative_ids": negative_ids}
        here = local(logits, ref_logits, {**rows, "normalizer": normalizer})
        logits, ref_logits = here.logits, here.ref_logits
        group, shard_sizes = here.group, here.shard_sizes
        labels, weights, alpha, negative_ids, normalizer = here.rows
    shard = None if group is None and shard_sizes is None else shard_of(group, shard_sizes)
    traced = is_dynamo_compiling()
    try:
        objective, reads_reference, scalars = check_scalars(
            method, alpha, eps, smoothing, nl_floor, temperature, ignore_index, reduction,
            normalizer, traced,
        )  # fmt: skip
        # Of a reference that no loss reads, nothing is looked at.
        reference = ref_logits if reads_reference else None
        if (
            reads_reference is (reference is not None)
            and not traced
            and are_usual(logits, reference, labels, weights, alpha, negative_ids, normalizer)
        ):
            tensors = RowTensors(reference, labels, weights, None, None, None)
        else:
            _check_logits(logits, least=1 if shard is None else 0)
            if reads_reference:
                _check_reference(reference, logits, objective)
            tensors = check_row_tensors(
                "logits", logits, reference, labels, weights, alpha, negative_ids, normalizer
            )
        with_gradient = logits.requires_grad and torch.is_grad_enabled()
        if with_gradient and inplace:
            _check_overwritable(logits)
        name = backends.select(logits, backend, scalars, shard is not None)
    except Exception:
        if shard is not None:
            report_error(shard, logits, with_statistics=True)
        raise
    call = LossCall(tensors, scalars, name, inplace, return_stats, shard)
    if with_gradient:
        outputs = TNTLossFunction.apply(logits, call)  # type: ignore[no-untyped-call]
    else:
        outputs = row_losses.on(logits)(logits, call, False, False)
    if return_stats:
        return outputs[0], RowStats(*outputs[1].unbind())
    loss: Tensor = outputs[0]
    return loss


def _check_logits(logits: Tensor, least: int) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: {type(logits).__name__}, expected a tensor")
    refuse_transforms("logits", logits)
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits: dtype {logits.dtype}, expected {EXPECTED_DTYPES}")
    if logits.dim() == 0 or logits.size(-1) < least:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, expected (..., V) with V >= 1")


def _check_reference(ref_logits: Tensor | None, logits: Tensor, objective: Objective) -> None:
    if ref_logits is None:
        raise ValueError(
            f"ref_logits: None, expected a tensor, because {objective} compares with the reference"
        )
    if not isinstance(ref_logits, Tensor):
        raise TypeError(f"ref_logits: {type(ref_logits).__name__}, expected a tensor")
    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"ref_logits: shape {tuple(ref_logits.shape)}, expected {tuple(logits.shape)}, that of logits"
        )
    if ref_logits.dtype != logits.dtype:
        raise TypeError(
            f"ref_logits: dtype {ref_logits.dtype}, expected {logits.dtype}, that of logits"
        )
    check_constant("ref_logits", ref_logits, logits, "logits")


def _check_overwritable(logits: Tensor) -> None:
    base = logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace: logits are a leaf that requires grad (or a view of one), whose values the gradient would "
            "overwrite; expected the output of a model, or inplace=False"
        )
    if not has_dense_rows(logits):
        raise ValueError(
            f"inplace: logits of shape {tuple(logits.shape)} have strides {logits.stride()}, expected dense rows that "
            "do not overlap and can be seen as (N, V) without a copy; to shift, shift labels and weights"
        )
