"""TNT's loss for a ``transformers.Trainer`` of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from tnt_kernels.functional import tnt_loss
from tnt_kernels.hf.first_batch import say_that_adapters_are_trained
from tnt_kernels.hf.head import distance, logits_of, rounding
from tnt_kernels.hf.models import is_encoder_decoder, learns_prompts, without_virtual_tokens
from tnt_kernels.hf.original import original_of
from tnt_kernels.hf.router import auxiliary_loss
from tnt_kernels.hf.rows import take_rows
from tnt_kernels.losses import TNTLoss

logger = logging.get_logger(__name__)


class _LossFunc:
    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        adapter_reference: str,
        keywords: dict[str, Any],
    ) -> None:
        TNTLoss(**keywords)  # checks the names
        self.keywords = keywords
        self.causal = not is_encoder_decoder(model)
        self.model = model
        self.given = ref_model is not None
        self.original = original_of(model, ref_model, adapter_reference)
        self.inputs: dict[str, Any] = {}
        self.handle = model.register_forward_pre_hook(self._take, with_kwargs=True)
        self.busy = False
        self.looked = False  # whether adapters change something at the start

    def _take(
        self, _: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.busy or not {"weights", "negative_ids"} & {*inputs}:
            return None
        self.inputs = {
            name: x for name, x in inputs.items() if name not in ("labels", "num_items_in_batch")
        }
        rest = {name: x for name, x in inputs.items() if name not in ("weights", "negative_ids")}
        # With a cache, transformers does not tell texts in a row from each other.
        return arguments, {**rest, "use_cache": False}

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        inputs, self.inputs = self.inputs, {}
        try:
            rows = take_rows(batch := {"labels": labels, **inputs}, self.causal)
        except ValueError as error:
            raise ValueError(
                f"{error}; a Trainer of your own drops them unless remove_unused_columns=False"
            ) from None
        logits = logits_of(outputs)
        self.busy = True
        try:
            with self.original.running(self.model) as module:
                ref_logits = logits_of(module.to(logits.device)(**batch, use_cache=False))
        finally:
            self.busy = False
        logits, ref_logits = (
            without_virtual_tokens(self.model, x, rows.labels.size(1)) for x in (logits, ref_logits)
        )
        vocab = min(logits.size(-1), ref_logits.size(-1))
        ref_logits = ref_logits[..., :vocab].to(logits.dtype)
        logits = logits if logits.size(-1) == vocab else logits[..., :vocab]
        if not self.looked:
            self.looked = True
            self._look_at(logits, ref_logits)
        count = num_items_in_batch
        count = None if count is None else torch.as_tensor(count, device=logits.device)
        loss: Tensor = tnt_loss(
            logits, ref_logits, rows.labels, rows.weights, negative_ids=rows.negative_ids, normalizer=count,
            **self.keywords,
        )  # fmt: skip
        auxiliary = auxiliary_loss(self.model, outputs)
        return loss if auxiliary is None else loss + auxiliary.term.to(loss)

    def _look_at(self, logits: Tensor, ref_logits: Tensor) -> None:
        if self.given or learns_prompts(self.model):
            return
        ours, theirs = logits.detach()[:, :8], ref_logits[:, :8]
        found = distance(ours, theirs)
        if found <= rounding(ours, theirs):
            return
        if self.original.without_adapters:
            say_that_adapters_are_trained(found)
        else:
            logger.warning(
                f"model: its logits are {found:.2g} apart, relative to their norm, from those of its reference, "
                "which it was when this function was made: it has been trained since, or dropout is on in it "
                "(tnt_kernels.hf.dropout.disable_dropout)"
            )

    def remove(self) -> None:
        """Takes the hook off the model."""
        self.handle.remove()


def compute_loss_func(
    model: nn.Module,
    ref_model: nn.Module | None = None,
    *,
    adapter_reference: str = "base",
    **keywords: Any,
) -> _LossFunc:
    """``Trainer(..., compute_loss_func=compute_loss_func(model, method="tnff"))``: TNT's loss of that model.

    A ``Trainer`` calls such a function with outputs, labels and a count alone. So this one also hooks onto the model's
    forward: the hook takes ``weights`` and ``negative_ids`` out of what the trainer passes to the model, and keeps the
    other inputs for the original. For that they must reach it: ``TrainingArguments(remove_unused_columns=False)``,
    and ``data_collator=TNTDataCollator(tokenizer, model)``, which also sets the labels such that the trainer's count
    is right. Dropout has to be off in the model, as the original has none
    (:func:`tnt_kernels.hf.dropout.disable_dropout`). A mixture of experts with
    ``output_router_logits=True`` gets its auxiliary loss, which no count divides, as in its own forward. Everything
    else (fused head, logged masses, checks of the model and of a resumed run) is :class:`TNTTrainer`'s.

    Args:
        model: the model that the trainer gets.
        ref_model: the original, as it is, adapters and all. None: a frozen copy made now, or, of a model with adapters,
            what ``adapter_reference`` says.
        adapter_reference: "base", the model without its adapters, or "start", with them as they are now.
        keywords: those of :func:`tnt.tnt_loss`; ``inplace=True`` overwrites ``outputs.logits``.

    Returns:
        The function, for one trainer. Its ``remove()`` takes the hook off.

    Raises:
        ValueError: an unknown ``adapter_reference``; when called, batches without labels or annotations.
    """
    return _LossFunc(model, ref_model, adapter_reference, keywords)
