"""TNT's loss for a ``transformers.Trainer`` of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tnt_kernels.functional import tnt_loss
from tnt_kernels.hf import reference as originals
from tnt_kernels.hf.head import logits_of
from tnt_kernels.hf.rows import take_rows
from tnt_kernels.losses import TNTLoss


class _LossFunc:
    def __init__(
        self, model: nn.Module, ref_model: nn.Module | None, keywords: dict[str, Any]
    ) -> None:
        TNTLoss(**keywords)  # checks the names
        self.keywords = keywords
        self.causal = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.model = model
        if ref_model is None and not originals.is_peft(model):
            ref_model = originals.frozen_copy(model)
        self.ref_model = None if ref_model is None else originals.frozen(ref_model)
        self.inputs: dict[str, Any] = {}
        self.handle = model.register_forward_pre_hook(self._take, with_kwargs=True)
        self.busy = False

    def _take(
        self, _: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.busy:
            return None
        self.inputs = {
            name: x for name, x in inputs.items() if name not in ("labels", "num_items_in_batch")
        }
        rest = {name: x for name, x in inputs.items() if name not in ("weights", "negative_ids")}
        return arguments, rest

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
        module = self.model if self.ref_model is None else self.ref_model
        self.busy = True
        try:
            with originals.as_reference(module):
                ref_logits = logits_of(module.to(logits.device)(**batch, use_cache=False))
        finally:
            self.busy = False
        vocab = min(logits.size(-1), ref_logits.size(-1))
        loss: Tensor = tnt_loss(
            logits if logits.size(-1) == vocab else logits[..., :vocab],
            ref_logits[..., :vocab].to(logits.dtype),
            rows.labels,
            rows.weights,
            negative_ids=rows.negative_ids,
            normalizer=torch.as_tensor(num_items_in_batch, device=logits.device)
            if num_items_in_batch is not None
            else None,
            **self.keywords,
        )
        return loss

    def remove(self) -> None:
        """Takes the hook off the model."""
        self.handle.remove()


def compute_loss_func(
    model: nn.Module, ref_model: nn.Module | None = None, **keywords: Any
) -> _LossFunc:
    """``Trainer(..., compute_loss_func=compute_loss_func(model, method="tnff"))``: TNT's loss of that model.

    A ``Trainer`` calls such a function with outputs, labels and a count alone. So this one also hooks onto the model's
    forward: the hook takes ``weights`` and ``negative_ids`` out of what the trainer passes to the model, and keeps the
    other inputs for the reference. For that they must reach it: ``TrainingArguments(remove_unused_columns=False)``,
    and ``data_collator=TNTDataCollator(...)``, which also sets the labels such that the trainer's count is right.
    Everything else (fused head, logged masses, checks of a resumed run) is :class:`TNTTrainer`'s.

    Args:
        model: the model that the trainer gets.
        ref_model: the original. None: a frozen copy made now, or the model without its adapters (PEFT).
        keywords: those of :func:`tnt.tnt_loss`; ``inplace=True`` overwrites ``outputs.logits``.

    Returns:
        The function, for one trainer. Its ``remove()`` takes the hook off.
    """
    return _LossFunc(model, ref_model, keywords)
