"""What a model and its first batches show, and what is refused because of it. Each check takes some forwards more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from tnt_kernels.hf.forward import Forwards
from tnt_kernels.hf.head import HeadMath, distance, plain_head, probe, rounding
from tnt_kernels.hf.reference import (
    Original,
    as_it_is,
    base_of,
    learns_prompts,
    virtual_tokens,
)
from tnt_kernels.hf.rows import later_texts

logger = logging.get_logger(__name__)
#: How far apart, relative to their norm, hidden states are at most because of other lengths of rows and sums in another
#: order; texts that see each other are farther.
_OTHER_SUMS, _OTHER_SUMS_16_BIT = 0.01, 0.1
Inputs = dict[str, Any]


def probe_head(forwards: Forwards, model: nn.Module, inputs: Inputs) -> HeadMath | None:
    """What the model does to hidden states times its head, so that they are its logits; None if that is not known."""
    module = forwards.unwrapped(model)
    head = plain_head(module)
    if head is None:
        return None
    config = getattr(module, "config", None)
    return forwards.look(model, inputs, lambda forward: probe(forward, head, config))


def check_inputs(model: nn.Module, inputs: Inputs) -> None:
    """That PEFT does not ignore inputs."""
    ignored = {"position_ids", "token_type_ids"} & {*inputs}
    if ignored and virtual_tokens(model):
        raise ValueError(
            f"batch: holds {' and '.join(sorted(ignored))}, which PEFT ignores for a model with virtual tokens; "
            "expected neither, hence one text in a row, padded on the right"
        )


def check_precomputed(
    forwards: Forwards, model: nn.Module, original: Original, ref_hidden: Tensor, inputs: Inputs
) -> None:
    """That precomputed hidden states are those of the reference."""
    with original.running(model) as module:
        theirs = forwards.said(module, inputs)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == ref_hidden.shape[:2]:
        ref_hidden, theirs = (x * mask[..., None].to(x) for x in (ref_hidden, theirs))
    found = distance(theirs, ref_hidden.to(theirs))
    if found > _other_sums(forwards, theirs):
        raise ValueError(
            f"ref_hidden_states: {found:.2g} apart, relative to their norm, from those of this trainer's "
            f"reference, the model {'without its adapters' if original.without_adapters else 'as it is'}; expected "
            "them to be precomputed with it (precompute_reference takes a model as it is)"
        )


def warn_of_trained_adapters(
    forwards: Forwards, model: nn.Module, original: Original, inputs: Inputs
) -> None:
    """Says so where adapters that should be fresh are not, as the reference is the model without them."""
    if not original.without_adapters or learns_prompts(model):
        return
    with original.running(model) as module:
        theirs = forwards.said(module, inputs)
    with as_it_is(model).running(model) as module:
        ours = forwards.said(module, inputs)
    found = distance(ours, theirs)
    if found > rounding(ours, theirs):
        say_that_adapters_are_trained(found)


def say_that_adapters_are_trained(change: float) -> None:
    logger.warning(
        f"model: its adapters change it already, by {change:.2g} of the norm of what it computes, and its reference "
        "is the model without them, so that training also undoes what they have learnt. adapter_reference='start' "
        "takes the model with them as the reference."
    )


def check_packing(
    forwards: Forwards, models: Sequence[nn.Module], inputs: Inputs, together: bool
) -> bool:
    """That texts in one row do not see each other: one of them is run alone.

    Args:
        forwards, models, inputs: runs the models on a batch.
        together: every process asks at the same time. Then those without such a row run the same forwards, as FSDP
            gathers parameters in all of them at once.

    Returns:
        Whether there was a row with more than one.
    """
    ids = inputs.get("input_ids")
    texts = [] if ids is None else _later_texts(forwards.unwrapped(models[0]), ids, inputs)
    none = not texts
    if ids is None or (forwards.everywhere(none) if together else none):
        return False
    texts = texts or [(0, 0, ids.size(1))]
    row, begin, end = max(texts, key=lambda text: text[2] - text[1])
    alone = {
        name: x[min(row, len(x) - 1)][None, begin:end]  # positions may be one row for all
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.dim() == 2 and x.size(1) == ids.size(1)
    }
    for model in models:
        single = forwards.said(model, alone)[0]
        found = distance(forwards.said(model, inputs)[row, begin:end], single)
        if found > _other_sums(forwards, single):
            raise ValueError(
                "position_ids: several texts in a row, but in "
                f"{type(base_of(forwards.unwrapped(model))).__name__} they see each other (hidden states are "
                f"{found:.2g} apart, relative to their norm, from those of a text alone); expected no "
                "attention_mask beside such position_ids, a model that takes them, or one text in a row"
            )
    return True


def _later_texts(model: Any, ids: Tensor, inputs: Inputs) -> list[tuple[int, int, int]]:
    """The row, begin and end of texts behind others, which hold no images."""
    later = later_texts(inputs, ids.shape)
    if later is None:
        return []
    texts, images = [], _image_tokens(model)
    for row, place in later.nonzero().tolist():
        ends = later[row, place + 1 :].nonzero()
        end = place + 2 + int(ends[0]) if len(ends) else ids.size(1)
        if not images & {*ids[row, place + 1 : end].tolist()}:
            texts.append((row, place + 1, end))
    return texts


def _other_sums(forwards: Forwards, x: Tensor) -> float:
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    mixed = forwards.accelerator.mixed_precision not in (None, "no")
    return _OTHER_SUMS_16_BIT if narrow or mixed else _OTHER_SUMS


def _image_tokens(model: Any) -> set[int]:
    """Ids that stand for what is no text."""
    config = base_of(model).config
    names = [name for name in vars(config) if name.endswith(("_token_id", "_token_index"))]
    kinds = ("image", "video", "audio", "vision")
    ids = [getattr(config, name) for name in names if name.startswith(kinds)]
    return {i for i in ids if isinstance(i, int)}
