"""A model's output head: its input, its parameters, and what the model does to the logits behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: How far, relative to the norm of the logits, head and model may be apart: some roundings of the dtype.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_PROBED_ROWS = 8
_AMPLIFIED = 30.0  # so that a softcap shows even if a fresh model's logits are small


class HeadMath(NamedTuple):
    """logits = softcap(scale * (hidden @ weight.T + bias))"""

    scale: float
    softcap: float | None


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The output embedding, if it is a linear layer with an ordinary weight."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        return None
    whole = head.weight.shape == (head.out_features, head.in_features)
    return head if whole else None


@contextmanager
def head_input(head: nn.Module, rows: int = 0) -> Iterator[list[Tensor]]:
    """Keeps what is given to the head; the head itself gets the first ``rows`` positions only.

    So the model's own forward runs as it is, to the end, and makes no logits. With ``rows`` they are given to it
    twice, the second time amplified.
    """
    kept: list[Tensor] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        kept.append(hidden)
        first = hidden[..., :rows, :]
        if rows:
            first = torch.cat((first, _AMPLIFIED * first), dim=-2)
        return (first, *arguments[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield kept
    finally:
        handle.remove()


def distance(a: Tensor, b: Tensor) -> float:
    """How far ``a`` is from ``b``, relative to the norm of ``b``; NaN counts as 0."""
    a, b = a.nan_to_num(), b.nan_to_num()
    apart, norm = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (a - b, b))
    return float(apart / norm.clamp(min=1e-30))


def rounding(a: Tensor, b: Tensor) -> float:
    """How far rounding takes two results of one arithmetic apart at most, relative to their norm."""
    return max(_TOLERANCES[a.dtype], _TOLERANCES[b.dtype])


def probe(forward: Callable[[], Any], head: nn.Linear, config: Any) -> HeadMath | None:
    """What the model does behind its head, found by comparing with its own logits of a few rows; None if unknown.

    To be called within the model's forward, without gradients.
    """
    with head_input(head, _PROBED_ROWS) as kept:
        outputs = forward()
    if len(kept) != 1 or kept[0].dim() != 3:
        return None  # the head is not called, or more than once
    first = kept[0][:, :_PROBED_ROWS]
    rows = torch.cat((first, _AMPLIFIED * first), dim=1)
    logits = logits_of(outputs)
    weight, bias = head_parameters(head, rows)
    if logits.shape != (*rows.shape[:2], weight.size(0)):
        return None
    raw = F.linear(rows, weight, bias)  # in the dtype of the model, or autocast's
    tolerance = rounding(raw, logits)
    raw, own = raw.float(), logits.float()
    norm = (own - own.mean(dim=-1, keepdim=True)).norm(dim=(0, 2))
    for math in _candidates(config):
        capped = raw * math.scale
        if math.softcap is not None:
            capped = math.softcap * torch.tanh(capped / math.softcap)
        rest = capped - own
        rest = (rest - rest.mean(dim=-1, keepdim=True)).norm(dim=(0, 2))
        if bool((rest <= tolerance * norm).all()):
            return math
    return None


def head_parameters(head: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias: gathered where FSDP shards them, in the dtype of ``hidden`` unless autocast sees to that, and
    without gradient, wherever they are used, if none is asked for here."""

    def whole(x: Any) -> Tensor:
        x = x.full_tensor() if hasattr(x, "full_tensor") and not x.requires_grad else x
        casts = torch.is_autocast_enabled(hidden.device.type) or hasattr(x, "full_tensor")
        x = x if casts else x.to(hidden.dtype)
        return cast(Tensor, x if torch.is_grad_enabled() else x.detach())

    return whole(head.weight), None if head.bias is None else whole(head.bias)


def logits_of(outputs: Any) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return cast(Tensor, logits)


def _candidates(config: Any) -> list[HeadMath]:
    """What configurations say about logits; the names are those of transformers 5.23."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    softcap = getattr(config, "final_logit_softcapping", None)
    softcaps = [None] if softcap is None else [float(softcap), None]
    scales = [1.0]
    for name in ("logit_scale", "lm_head_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value not in (0, 1):
            # Granite divides by its logits_scaling, others multiply with theirs.
            scales = [float(value), *([1 / value] if name == "logits_scaling" else []), *scales]
    return [HeadMath(scale, cap) for scale, cap in product(scales, softcaps)]
