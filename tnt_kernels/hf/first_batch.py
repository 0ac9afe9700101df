"""What a model and its first batches show, and what is refused because of it. Each check takes some forwards more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from tnt_kernels.hf.config import TNTConfig
from tnt_kernels.hf.dropout import check_deterministic
from tnt_kernels.hf.forward import Forwards
from tnt_kernels.hf.head import HeadMath, distance, plain_head, probe, rounding
from tnt_kernels.hf.models import base_of, learns_prompts, virtual_tokens
from tnt_kernels.hf.original import Original, Reference
from tnt_kernels.hf.rows import later_texts

logger = logging.get_logger(__name__)
#: How far apart, relative to their norm, hidden states are at most because of other lengths of rows and sums in another
#: order; texts that see each other are farther.
_OTHER_SUMS, _OTHER_SUMS_16_BIT = 0.01, 0.1
Inputs = dict[str, Any]


class FirstBatch:
    """Looks at the models on the first batch of all, the first in training, and the first with packed texts."""

    def __init__(
        self, args: TNTConfig, forwards: Forwards, causal: bool, reference: Reference | None
    ) -> None:
        self.args, self.forwards, self.causal, self.reference = args, forwards, causal, reference
        #: Set where hidden states times head are the logits of the model and of its original: what is behind the heads.
        self.head_math: tuple[HeadMath, HeadMath] | None = None
        #: Whether texts packed into one row were seen not to see each other.
        self.packing_seen = False
        self._seen = self._training_seen = False

    def look(
        self, model: nn.Module, inputs: Inputs, ref_hidden: Tensor | None, several_texts: bool | None, *,
        fresh: bool, sharded: bool,
    ) -> None:  # fmt: skip
        """Sets ``head_math``; raises or warns if the model cannot be trained as it is meant to be.

        Args:
            model, inputs, ref_hidden: what a loss is asked of.
            several_texts: whether a row of the batch holds several. None: its loader does not say so.
            fresh: whether adapters are meant not to have learnt anything yet.
            sharded: whether FSDP shards the models, so that a forward has to run in all processes at once.
        """
        first = model.training and not self._training_seen
        packed = several_texts and not self.packing_seen and not sharded
        if self._seen and not first and not packed:
            return
        own, reference = self.forwards.unwrapped(model), self.reference
        original = None if reference is None else reference.original
        precomputed = reference is not None and reference.head is not None
        models = [model]
        if original is not None and original.model is not None:
            models.append(original.model)
        if not self._seen:
            self._seen = True
            _check_inputs(own, inputs)
            self.head_math = self._probe(models, inputs)
            if precomputed and original is not None and ref_hidden is not None:
                self._check_precomputed(own, original, ref_hidden, inputs)
        if first:
            self._training_seen = True
            if self.args.disable_dropout:
                check_deterministic(
                    own, lambda: self.forwards.said(model, inputs), self.forwards.everywhere
                )
            if fresh and original is not None and not precomputed:
                self._check_fresh(own, original, inputs)
        if self.causal and (first or packed):
            self.packing_seen |= self._check_packing(models, inputs, together=first and sharded)

    def _probe(self, models: list[nn.Module], inputs: Inputs) -> tuple[HeadMath, HeadMath] | None:
        if not self.args.fused_linear:
            return None
        if self.args.torch_compile:
            logger.warning("fused_linear: not with torch_compile; the loss is computed from logits")
            return None
        found = [self._probe_head(model, inputs) for model in models]
        known = [math for math in found if math is not None]
        if self.forwards.everywhere(len(known) == len(found)):
            return known[0], known[-1]
        name = type(self.forwards.unwrapped(models[0])).__name__
        logger.warning(
            f"fused_linear: the logits of {name} (or of its reference) are not those of a plain linear head, so "
            "that the loss is computed from logits; fused_linear=False says so beforehand"
        )
        return None

    def _probe_head(self, model: nn.Module, inputs: Inputs) -> HeadMath | None:
        module = self.forwards.unwrapped(model)
        head, config = plain_head(module), getattr(module, "config", None)
        if head is None:
            return None
        return self.forwards.look(model, inputs, lambda forward: probe(forward, head, config))

    def _check_precomputed(
        self, model: nn.Module, original: Original, ref_hidden: Tensor, inputs: Inputs
    ) -> None:
        """Raises if precomputed hidden states are not what the original computes."""
        with original.running(model) as module:
            theirs = self.forwards.said(module, inputs)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == ref_hidden.shape[:2]:
            ref_hidden, theirs = (x * mask[..., None].to(x) for x in (ref_hidden, theirs))
        found = distance(theirs, ref_hidden.to(theirs))
        if found > self._other_sums(theirs):
            raise ValueError(
                f"ref_hidden_states: {found:.2g} apart, relative to their norm, from those of this trainer's "
                f"reference, the model {'without its adapters' if original.without_adapters else 'as it is'}; expected "
                "them to be precomputed with it (precompute_reference takes a model as it is)"
            )

    def _check_fresh(self, model: nn.Module, original: Original, inputs: Inputs) -> None:
        """Warns if adapters that should be fresh change the model already, while its original is without them."""
        if not original.without_adapters or learns_prompts(model):
            return
        with original.running(model) as module:
            theirs = self.forwards.said(module, inputs)
        with Original(model).running(model) as module:
            ours = self.forwards.said(module, inputs)
        found = distance(ours, theirs)
        if found > rounding(ours, theirs):
            say_that_adapters_are_trained(found)

    def _check_packing(self, models: list[nn.Module], inputs: Inputs, together: bool) -> bool:
        """Raises if texts in one row see each other, and returns whether there was a row with several.

        A run of one of them alone shows it. If all processes ask ``together``, those without such a row run the same
        forwards, as FSDP gathers parameters in all of them at once.
        """
        ids = inputs.get("input_ids")
        texts = [] if ids is None else _later_texts(self.forwards.unwrapped(models[0]), ids, inputs)
        none = not texts
        if ids is None or (self.forwards.everywhere(none) if together else none):
            return False
        texts = texts or [(0, 0, ids.size(1))]
        row, begin, end = max(texts, key=lambda text: text[2] - text[1])
        alone = {
            name: x[min(row, len(x) - 1)][None, begin:end]  # positions may be one row for all
            for name, x in inputs.items()
            if isinstance(x, Tensor) and x.dim() == 2 and x.size(1) == ids.size(1)
        }
        for model in models:
            single = self.forwards.said(model, alone)[0]
            found = distance(self.forwards.said(model, inputs)[row, begin:end], single)
            if found > self._other_sums(single):
                raise ValueError(
                    "position_ids: several texts in a row, but in "
                    f"{type(base_of(self.forwards.unwrapped(model))).__name__} they see each other (hidden states are "
                    f"{found:.2g} apart, relative to their norm, from those of a text alone); expected no "
                    "attention_mask beside such position_ids, a model that takes them, or one text in a row"
                )
        return True

    def _other_sums(self, x: Tensor) -> float:
        narrow = x.dtype in (torch.float16, torch.bfloat16)
        mixed = self.forwards.accelerator.mixed_precision not in (None, "no")
        return _OTHER_SUMS_16_BIT if narrow or mixed else _OTHER_SUMS


def say_that_adapters_are_trained(change: float) -> None:
    logger.warning(
        f"model: its adapters change it already, by {change:.2g} of the norm of what it computes, and its reference "
        "is the model without them, so that training also undoes what they have learnt. adapter_reference='start' "
        "takes the model with them as the reference."
    )


def _check_inputs(model: nn.Module, inputs: Inputs) -> None:
    """Raises if PEFT would ignore inputs."""
    ignored = {"position_ids", "token_type_ids"} & {*inputs}
    if ignored and virtual_tokens(model):
        raise ValueError(
            f"batch: holds {' and '.join(sorted(ignored))}, which PEFT ignores for a model with virtual tokens; "
            "expected neither, hence one text in a row, padded on the right"
        )


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


def _image_tokens(model: Any) -> set[int]:
    """Ids that stand for what is no text."""
    config = base_of(model).config
    names = [name for name in vars(config) if name.endswith(("_token_id", "_token_index"))]
    kinds = ("image", "video", "audio", "vision")
    ids = [getattr(config, name) for name in names if name.startswith(kinds)]
    return {i for i in ids if isinstance(i, int)}
