"""The loss of a batch, within the forwards of the models: from hidden states and heads, or from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from tnt_kernels.functional import RowStats, tnt_loss
from tnt_kernels.hf.forward import Forward, Forwards
from tnt_kernels.hf.head import HeadMath, head_input, head_parameters, logits_of, plain_head
from tnt_kernels.hf.models import without_virtual_tokens
from tnt_kernels.hf.original import Reference
from tnt_kernels.hf.router import Auxiliary, auxiliary_loss
from tnt_kernels.hf.rows import Rows
from tnt_kernels.linear import linear_tnt_loss
from tnt_kernels.objectives import Objective


class Outcome(NamedTuple):
    stats: RowStats
    auxiliary: Auxiliary | None
    outputs: Any  # the model's, if they are asked for


@dataclass
class BatchLoss:
    """A batch, and all that its loss depends on."""

    forwards: Forwards
    model: nn.Module  # the one in training, as it is called: distributed, compiled
    own: nn.Module  # the same, neither distributed nor compiled
    inputs: dict[str, Any]
    rows: Rows
    reference: Reference | None  # None: the method reads none
    vocab_size: int | None
    keywords: dict[str, Any]  # of either loss
    micro_batches: int  # of the training step; the auxiliary loss is their mean

    def fused(
        self, head_math: tuple[HeadMath, HeadMath], ref_hidden: Tensor | None, active_rows: int | None
    ) -> tuple[Tensor, Outcome]:  # fmt: skip
        """From hidden states to the loss, without logits. The data may hold ``ref_hidden``, and how many rows count."""
        keywords, (math, ref_math) = dict(self.keywords), head_math
        objective: Objective = keywords["method"]
        sides = objective.positive_loss, objective.negative_loss
        if active_rows is not None and len({side.reads_reference for side in sides}) == 1:
            # So that no device is asked. Where one side alone reads the reference, it is asked all the same, as that
            # costs less than to multiply the other side's rows with the reference's head too.
            keywords["max_active_rows"] = max(1, active_rows)
        ref_weight = ref_bias = None
        if self.reference is not None:
            ref_hidden, ref_weight, ref_bias = self._ref_hidden(self.reference, ref_hidden)
            keywords |= {"ref_softcap": ref_math.softcap, "ref_logit_scale": ref_math.scale}

        def loss_of_hidden(forward: Forward) -> tuple[Tensor, Outcome]:
            head = cast(nn.Linear, plain_head(self.forwards.unwrapped(self.model)))
            with head_input(head) as kept:
                outputs = forward()
            weight, bias = head_parameters(head, kept[0])
            found = linear_tnt_loss(
                self._at_labels(kept[0]), weight, ref_hidden, ref_weight, self.rows.labels, self.rows.weights,
                bias=bias, ref_bias=ref_bias, softcap=math.softcap, logit_scale=math.scale,
                vocab_size=self.vocab_size, **keywords,
            )  # fmt: skip
            return self._with_auxiliary(found, outputs, keep_outputs=False)

        return self.forwards.within(self.model, self.inputs, loss_of_hidden)

    def of_logits(self, inplace: bool, keep_outputs: bool) -> tuple[Tensor, Outcome]:
        """From logits to the loss, whose gradient may be written over them (``inplace``) unless outputs are kept."""
        ref_logits = None if self.reference is None else self._ref_logits(self.reference)

        def loss_of_logits(forward: Forward) -> tuple[Tensor, Outcome]:
            outputs = forward()
            whole = logits_of(outputs)
            logits = self._at_labels(whole)
            dense = logits is whole  # else a view, over which no gradient can be written
            if keep_outputs and not dense:
                outputs["logits"] = logits
            if logits.size(-1) != self.vocab_size:
                logits = logits[..., : self.vocab_size]
            found = tnt_loss(
                logits, None if ref_logits is None else ref_logits.to(logits.dtype), self.rows.labels,
                self.rows.weights, **self.keywords,
                inplace=inplace and dense and not keep_outputs and logits.grad_fn is not None,
            )  # fmt: skip
            return self._with_auxiliary(found, outputs, keep_outputs)

        return self.forwards.within(self.model, self.inputs, loss_of_logits)

    def _ref_hidden(
        self, reference: Reference, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The reference's last hidden states (``hidden`` if it is precomputed), and its head's weight and bias."""
        if reference.head is not None:
            assert hidden is not None
            hidden = hidden.to(reference.head.weight.dtype)
            return hidden, *head_parameters(reference.head, hidden)
        assert reference.original is not None
        with reference.original.running(self.forwards.unwrapped(self.model)) as module:
            head = cast(nn.Linear, plain_head(module))

            def last_hidden(forward: Forward) -> tuple[Tensor, None]:
                with head_input(head) as kept:
                    forward()
                return kept[0], None

            hidden, _ = self.forwards.within(module, self.inputs, last_hidden)
            # Taken in here, as the parameters may have other values outside.
            parameters = head_parameters(head, hidden)
        return self._at_labels(hidden), *parameters

    def _ref_logits(self, reference: Reference) -> Tensor:
        if reference.head is not None:
            raise ValueError(
                "precomputed_reference: logits are asked for, but there are hidden states alone; expected no "
                "compute_metrics and no predict, and a head that fused_linear can serve"
            )
        assert reference.original is not None

        def logits(forward: Forward) -> tuple[Tensor, None]:
            return logits_of(forward())[..., : self.vocab_size], None

        with reference.original.running(self.forwards.unwrapped(self.model)) as module:
            return self._at_labels(self.forwards.within(module, self.inputs, logits)[0])

    def _at_labels(self, x: Tensor) -> Tensor:
        return without_virtual_tokens(self.own, x, self.rows.labels.size(1))

    def _with_auxiliary(
        self, found: tuple[Tensor, RowStats], outputs: Any, keep_outputs: bool
    ) -> tuple[Tensor, Outcome]:
        loss, stats = found
        auxiliary = auxiliary_loss(self.forwards.unwrapped(self.model), outputs)
        if auxiliary is not None:
            parts = self.micro_batches if loss.requires_grad else 1
            loss = loss + auxiliary.term.to(loss.device, loss.dtype) / parts
        return loss, Outcome(stats, auxiliary, outputs if keep_outputs else None)
