"""``tnt_loss``: the public function. It checks and normalises the arguments; ``_autograd`` and ``_ops`` do the rest."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, NamedTuple, cast, overload

import torch
from torch import Tensor

from tnt_kernels import _ops, backends
from tnt_kernels._autograd import TNTLossFunction
from tnt_kernels.backends.call import Scalars
from tnt_kernels.objectives import Objective, resolve_method

_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")
_SMOOTHINGS = ("negatives", "uniform")


class RowStats(NamedTuple):
    """Diagnostics of every row: detached tensors of shape (...), float32 (float64 for float64 logits).

    On rows of weight 0, ``loss`` is 0 and the rest NaN.
    """

    loss: Tensor  #: the row's own loss in nats, before weight and alpha
    kl: Tensor  #: the divergence to the row's target; NaN on rows whose loss is not a KL
    negative_mass: Tensor  #: p(S): the policy's probability of the row's negative set
    ref_negative_mass: Tensor  #: q(S): the reference's; NaN on rows that do not read the reference
    entropy: Tensor  #: of the policy, in nats


@overload
def tnt_loss(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = ...,
    *,
    method: str | Objective = ...,
    alpha: float | Tensor = ...,
    negative_ids: Tensor | None = ...,
    eps: float = ...,
    smoothing: str = ...,
    nl_floor: float | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    inplace: bool = ...,
    return_stats: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def tnt_loss(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = ...,
    *,
    method: str | Objective = ...,
    alpha: float | Tensor = ...,
    negative_ids: Tensor | None = ...,
    eps: float = ...,
    smoothing: str = ...,
    nl_floor: float | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    inplace: bool = ...,
    return_stats: Literal[True],
    backend: str | None = ...,
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """The token-level loss of Targeted Negative Training (Zhang, Ranganath, Tafvizi, TMLR 2024, arXiv 2406.13660).

    A row is one token position. A row with tokens to remove (a negative weight, or ``negative_ids``) is negative and
    pulls the policy towards the reference without those tokens, renormalised; the others hold it where it was. With
    ``inplace=False`` the call allocates one gradient of the logits' size and nothing else of that order; with
    ``inplace=True`` not even that.

    Args:
        logits: (..., V) float32, bfloat16 or float16 (float64 on a CPU): the policy's. Dense rows of any stride are
            read where they are (``logits[..., :V]`` of a padded vocabulary). Not shifted here: shift labels and
            weights, and give the last position weight 0.
        ref_logits: (..., V), same dtype and device: the original model's, without gradient. None if no row's loss is a
            KL.
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
        backend: "cpu" or "torch"; None: ``$TNT_KERNELS_BACKEND``, else the fastest that serves these tensors.

    Returns:
        The loss, float32 (float64 for float64 logits): 0-dim, or (...) under "none". With ``return_stats``, also
        ``RowStats``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, a missing ``ref_logits``, a label or id out of range (on a CPU; on
            other devices it makes the row's loss NaN), logits that cannot be overwritten under ``inplace``.
        RuntimeError: a requested backend that is not available.
    """
    objective = resolve_method(method)
    _check_logits(logits)
    shape = logits.shape[:-1]
    if objective.reads_reference:
        _check_reference(ref_logits, logits, objective)
    else:
        ref_logits = None
    real = _ops.real_dtype(logits)
    labels = _as_integers("labels", labels, logits, shape)
    if weights is not None:
        weights = _as_real("weights", weights, logits, real)
        if weights.shape != shape:
            raise ValueError(
                f"weights: shape {tuple(weights.shape)}, expected {tuple(shape)}, that of logits without V"
            )
    alpha_value, alpha_rows = 1.0, None
    if isinstance(alpha, Tensor):
        alpha_rows = _broadcast_alpha(_as_real("alpha", alpha, logits, real), shape)
    else:
        alpha_value = _as_number("alpha", alpha)
    if negative_ids is not None:
        negative_ids = _check_negative_ids(negative_ids, logits, shape)
    if smoothing not in _SMOOTHINGS:
        raise ValueError(f"smoothing is {smoothing!r}, expected 'negatives' or 'uniform'")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    normalizer_value, normalizer_tensor = None, None
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(
                f"normalizer: given with reduction={reduction!r}, expected reduction='mean'"
            )
        if isinstance(normalizer, Tensor):
            normalizer_tensor = _as_real("normalizer", normalizer, logits, real)
            if normalizer_tensor.dim() != 0:
                raise ValueError(
                    f"normalizer: shape {tuple(normalizer.shape)}, expected a number or a 0-dim tensor"
                )
        else:
            normalizer_value = _as_number("normalizer", normalizer, least=0.0)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: {type(ignore_index).__name__}, expected an int")

    scalars = Scalars(
        int(objective.positive_loss),
        int(objective.negative_loss),
        alpha_value,
        _as_number("eps", eps, least=0.0),
        smoothing == "uniform",
        None if nl_floor is None else _as_number("nl_floor", nl_floor),
        _as_number("temperature", temperature, above=0.0),
        ignore_index,
        reduction,
        normalizer_value,
        backends.select(logits, backend),
    )
    tensors = _ops.RowTensors(
        ref_logits, labels, weights, alpha_rows, negative_ids, normalizer_tensor
    )
    if logits.requires_grad and torch.is_grad_enabled():
        if inplace:
            _check_overwritable(logits)
        outputs = TNTLossFunction.apply(logits, tensors, scalars, inplace, return_stats)  # type: ignore[no-untyped-call]
        if not return_stats:
            return cast(Tensor, outputs)
    else:
        outputs = _ops.row_losses(logits, *tensors, *scalars, False, return_stats, False)
        if not return_stats:
            return cast(Tensor, outputs[0])
    return outputs[0], RowStats(*outputs[1].unbind())


def _check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: {type(logits).__name__}, expected a tensor")
    if logits.dtype not in _LOGITS_DTYPES:
        raise TypeError(
            f"logits: dtype {logits.dtype}, expected float32, bfloat16, float16, or float64 on a CPU"
        )
    if logits.dim() == 0 or logits.size(-1) == 0:
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
    _check_constant("ref_logits", ref_logits, logits)


def _check_constant(name: str, x: Tensor, logits: Tensor) -> None:
    if x.device != logits.device:
        raise ValueError(f"{name}: on {x.device}, expected {logits.device}, where logits are")
    if x.requires_grad:
        raise ValueError(
            f"{name}: requires grad, expected a tensor without gradient (none flows to it): detach it"
        )


def _as_integers(name: str, x: Tensor, logits: Tensor, shape: torch.Size | None = None) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {type(x).__name__}, expected an integer tensor")
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"{name}: dtype {x.dtype}, expected an integer dtype")
    if shape is not None and x.shape != shape:
        raise ValueError(
            f"{name}: shape {tuple(x.shape)}, expected {tuple(shape)}, that of logits without V"
        )
    if x.device != logits.device:
        raise ValueError(f"{name}: on {x.device}, expected {logits.device}, where logits are")
    return x if x.dtype == torch.int64 else x.to(torch.int64)


def _as_real(name: str, x: Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {type(x).__name__}, expected a real tensor")
    if x.dtype.is_complex:
        raise TypeError(f"{name}: dtype {x.dtype}, expected a real dtype")
    _check_constant(name, x, logits)
    return x if x.dtype == dtype else x.to(dtype)


def _as_number(name: str, x: float, least: float = -math.inf, above: float = -math.inf) -> float:
    if type(x) is not float:
        if isinstance(x, bool) or not isinstance(x, Real):
            raise TypeError(f"{name}: {type(x).__name__}, expected a number")
        x = float(x)
    if not (-math.inf < x < math.inf and x >= least and x > above):  # the compiler can trace these
        bound = (
            f" above {above:g}"
            if above > -math.inf
            else f" of at least {least:g}"
            if least > -math.inf
            else ""
        )
        raise ValueError(f"{name} is {x}, expected a finite number{bound}")
    return x


def _broadcast_alpha(alpha: Tensor, shape: torch.Size) -> Tensor:
    if alpha.dim() == 0 or alpha.shape == shape:
        return alpha
    try:
        return alpha.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"alpha: shape {tuple(alpha.shape)}, expected one that broadcasts to {tuple(shape)}"
        ) from None


def _check_negative_ids(negative_ids: Tensor, logits: Tensor, shape: torch.Size) -> Tensor | None:
    negative_ids = _as_integers("negative_ids", negative_ids, logits)
    if (negative_ids.dim() != 1 and negative_ids.shape[:-1] != shape) or negative_ids.dim() == 0:
        raise ValueError(
            f"negative_ids: shape {tuple(negative_ids.shape)}, expected (K,) or {(*shape, 'K')}".replace(
                "'", ""
            )
        )
    return negative_ids if negative_ids.size(-1) else None


def _check_overwritable(logits: Tensor) -> None:
    base = logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace: logits are a leaf that requires grad (or a view of one), whose values the gradient would "
            "overwrite; expected the output of a model, or inplace=False"
        )
    if not _ops.has_dense_rows(logits):
        raise ValueError(
            f"inplace: logits of shape {tuple(logits.shape)} have strides {logits.stride()}, expected dense rows that "
            "do not overlap and can be seen as (N, V) without a copy; to shift, shift labels and weights"
        )
