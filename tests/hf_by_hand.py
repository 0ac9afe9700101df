"""The loss written by hand: float64, one unpadded text and one position at a time, plain PyTorch, no collator.

A text is a mapping: ``input_ids`` (T,) int64, ``labels`` (T,), ``weights`` (T,), perhaps ``negative_ids`` (T, K) padded
with -1, perhaps ``pixel_values``; an encoder-decoder's labels, weights and negative ids speak of its decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Text = Mapping[str, Tensor]
#: The losses of a method's negative and of its positive positions.
SIDES = {
    "tnff": ("forward", "forward"), "tnrf": ("reverse", "forward"), "tnrll": ("reverse", "likelihood"),
    "ul+ll": ("unlikelihood", "likelihood"),
}  # fmt: skip


def position_loss(
    z: Tensor, r: Tensor | None, label: int, weight: float, ids: set[int], method: str,
    alpha: float, eps: float,
) -> Tensor:  # fmt: skip
    """Of logits ``z`` (V,) and the reference's ``r``, times weight or alpha; ``ids`` are the unwanted tokens.

    A label of negative weight is unwanted too; the target keeps 1 + weight of its probability.
    """
    removed, unwanted = set(ids), set(ids)
    if weight < 0:
        unwanted.add(label)
        removed |= {label} if weight <= -1 else set()
    kind = SIDES[method][0 if unwanted else 1]
    factor = alpha if unwanted else weight
    log_p = z.log_softmax(dim=-1)
    if kind == "likelihood":
        return -factor * log_p[label]
    if kind == "unlikelihood":
        factor *= abs(weight) if weight < 0 else 1.0
        return -factor * (1 - log_p[sorted(unwanted)].exp().sum()).log()
    assert r is not None
    q = r.softmax(dim=-1)
    if weight < 0:
        q[label] *= 1 + max(weight, -1.0)
    q[sorted(removed)] = 0
    q = q / q.sum()
    if kind == "forward":
        kept = q > 0
        return factor * (q[kept] * (q[kept].log() - log_p[kept])).sum()
    q[sorted(removed)] = eps
    q = q / (1 + eps * len(removed))
    return factor * (log_p.exp() * (log_p - q.log())).sum()


def outputs_of(model: nn.Module, text: Text) -> Any:
    """The model's own forward on one text alone, without any mask."""
    inputs = {"input_ids": text["input_ids"][None]}
    if "pixel_values" in text:
        inputs["pixel_values"] = text["pixel_values"][None].double()
    config: Any = model.config
    if config.is_encoder_decoder:
        labels = text["labels"]
        # mBART's decoder starts with the last token, that of the language; T5's with a token of its own.
        first = labels[-1:] if config.model_type == "mbart" else labels.new_zeros(1)
        inputs["decoder_input_ids"] = torch.cat((first, labels[:-1]))[None]
    return model(**inputs)


def logits_of(outputs: Any, text: Text, causal: bool) -> Tensor:
    """(T, V): row t predicts label t (causal: t + 1). Virtual tokens stand in front and are cut off."""
    logits: Tensor = outputs.logits[0, -len(text["labels"]) :]
    return logits[:-1] if causal else logits


def load_balancing(router_logits: Sequence[Tensor], chosen: int) -> Tensor:
    """Switch Transformers' (4) to (6) over the (N, E) router logits of all layers together."""
    logits = torch.cat(list(router_logits))
    probabilities = logits.softmax(dim=-1)
    picked = torch.zeros_like(probabilities)
    picked.scatter_(1, probabilities.topk(chosen, dim=-1).indices, 1.0)
    return logits.size(1) * (picked.mean(dim=0) * probabilities.mean(dim=0)).sum()


def loss(
    model: nn.Module, original: nn.Module, texts: Sequence[Text], method: str, alpha: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Mean over the positions of weight other than 0 that something predicts, and the experts' load balancing.

    Gradients flow into ``model``, which runs as it is: without dropout in eval mode.
    """
    config: Any = model.config
    causal = not config.is_encoder_decoder
    total, count, routed = torch.zeros((), dtype=torch.float64), 0, []
    for text in texts:
        outputs = outputs_of(model, text)
        with torch.no_grad():
            other = logits_of(outputs_of(original, text), text, causal)
        logits, shift = logits_of(outputs, text, causal), int(causal)
        for t, (z, r) in enumerate(zip(logits, other, strict=True)):
            label, weight = int(text["labels"][t + shift]), float(text["weights"][t + shift])
            if weight == 0:
                continue
            ids = set(text["negative_ids"][t + shift].tolist()) if "negative_ids" in text else set()
            total = total + position_loss(z, r, label, weight, ids - {-1}, method, alpha, eps)
            count += 1
        if getattr(config, "output_router_logits", False):
            routed += outputs.router_logits
    if routed:
        auxiliary = load_balancing(routed, config.num_experts_per_tok)
        return total / count + config.router_aux_loss_coef * auxiliary
    return total / count
