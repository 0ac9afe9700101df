"""``TNTTrainer``: a ``transformers.Trainer`` whose loss is TNT's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint
from transformers.utils import logging

from tnt_kernels.functional import RowStats, tnt_loss
from tnt_kernels.hf import first_batch
from tnt_kernels.hf import reference as originals
from tnt_kernels.hf import rows as row_sums
from tnt_kernels.hf.collator import TNTDataCollator
from tnt_kernels.hf.config import TNTConfig, check_arguments
from tnt_kernels.hf.dropout import check_deterministic, disable_dropout
from tnt_kernels.hf.examples import COLUMNS
from tnt_kernels.hf.forward import Forward, Forwards
from tnt_kernels.hf.head import (
    HeadMath,
    detached,
    head_input,
    head_parameters,
    logits_of,
    plain_head,
)
from tnt_kernels.hf.router import Auxiliary, auxiliary_loss
from tnt_kernels.hf.rows import ACTIVE_ROWS, SEVERAL_TEXTS, CountedRows, Rows, take_rows
from tnt_kernels.linear import linear_tnt_loss
from tnt_kernels.objectives import resolve_method

logger = logging.get_logger(__name__)
Inputs = dict[str, Any]


class TNTTrainer(Trainer):
    """Trains a causal or encoder-decoder model towards the minimal targeted update of its original.

    The original, the *reference*, is ``ref_model`` if given, as it is, adapters and all; of a model with adapters, its
    base, without them (``adapter_reference="start"``: with them, as they are when the trainer is made); with
    ``precomputed_reference``, hidden states that the data hold; else a frozen copy made when the trainer is. Methods
    whose losses are no KL have none. Parameters of the base that train beside adapters are copied for it.

    The loss is a mean over rows with a label and a weight other than 0, over all micro-batches of a step (and all
    devices, with ``average_tokens_across_devices``). Logged beside it: ``negative_mass`` and ``ref_negative_mass``,
    what model and reference give to unwanted tokens where there are some; ``positive_kl``, the divergence from the
    reference elsewhere; ``negative_share`` of the rows; ``active_rows``, how many there were; ``aux_loss`` of a mixture
    of experts with ``output_router_logits=True``, which is added with the model's own factor, as its forward does (the
    mean over the micro-batches of a step).

    The first batch shows whether the model is one that can be trained so: two forwards of it have to agree once dropout
    is off, and texts packed into one row must not see each other.

    A step asks the device for nothing: batches hold how many rows count (``active_rows``), which their loader adds.
    Exceptions are the first step, which looks at the model, batches made elsewhere (``dispatch_batches``), and methods
    of which one side alone is a KL (tnfll, tnrll), whose fused loss reads two counts.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class: as of ``Trainer``. The collator is a
            :class:`TNTDataCollator` if not given. A collator of your own yields ``labels`` and ``weights`` or
            ``negative_ids``, in line with the tokens (they are shifted here for causal models), and for
            encoder-decoder models ``decoder_input_ids``.
        ref_model: the original model.
        keywords: the others of ``Trainer``.

    Raises:
        TypeError, ValueError: arguments that are wrong, or that do not go together.
    """

    args: TNTConfig
    data_collator: Callable[[list[Any]], Any]
    #: Set by ``refine`` from the second round on, when adapters are meant to have been trained.
    _expects_trained_adapters = False
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: Any = None,
        args: TNTConfig | None = None,
        data_collator: Callable[[list[Any]], Inputs] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        ref_model: nn.Module | None = None,
        **keywords: Any,
    ) -> None:
        args = TNTConfig(output_dir="tmp_trainer") if args is None else args
        check_arguments(args, model, ref_model, keywords)
        self._original: originals.Original | None = None
        self._head_math: tuple[HeadMath, HeadMath | None] | None = None
        self._head_probed = self._training_seen = self._packing_seen = False
        self._train_sums: Tensor | None = None  # what ``rows.averages`` reads
        self._eval_sums: Tensor | None = None
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, **keywords
        )
        self._forwards = Forwards(self.accelerator)
        if getattr(self.model, "config", None) is None:
            raise ValueError(
                f"model: {type(self.model).__name__} without a config, expected a model of transformers"
            )
        self.loss_is_scaled_for_ga = True  # by the count of rows
        self._objective = resolve_method(args.method)
        self._causal = not originals.is_encoder_decoder(self.model)
        if data_collator is None:
            self.data_collator = TNTDataCollator(processing_class, self.model)
        originals.set_cache(self.model, args.use_cache)
        if args.disable_dropout:
            disable_dropout(self.model)
        self._check_strategy()
        self._fingerprint = self._take_reference(ref_model)
        self._vocab_size = self._shared_vocabulary()
        if isinstance(self.data_collator, TNTDataCollator):
            self.data_collator.learn(self.model, self._vocab_size)

    # --- The reference ----------------------------------------------------------------------------

    @property
    def ref_model(self) -> Any:
        """The model that is the reference; None where it is the one in training, or none is needed."""
        return None if self._original is None else self._original.model

    def _take_reference(self, ref_model: nn.Module | None) -> str | None:
        """Sets ``_original`` or, for precomputed hidden states, ``_ref_head``. Returns the fingerprint."""
        self._ref_head: nn.Linear | None = None
        self._precomputed_by: originals.Original | None = (
            None  # if it is still there to compare with
        )
        if not self._objective.reads_reference:
            return None
        original = self.model if ref_model is None else ref_model
        adapted = ref_model is None and originals.is_peft(self.model)
        base = adapted and self.args.adapter_reference == "base"
        value = originals.fingerprint(original, without_adapters=base)
        if self.args.precomputed_reference:
            head = plain_head(original)
            if head is None or not self.args.fused_linear:
                raise ValueError(
                    "precomputed_reference: hidden states of a model whose head is not a plain linear layer (or "
                    "fused_linear=False), expected one, and fused_linear=True"
                )
            self._ref_head = cast(nn.Linear, originals.frozen_copy(head)).to(self.args.device)
            if adapted:
                self._precomputed_by = originals.original_of(
                    self.model, None, self.args.adapter_reference
                )
            return value
        if ref_model is not None:
            self._compare_special_tokens(ref_model)
        elif not adapted or base:
            folder = getattr(self.model, "name_or_path", None)
            if originals.read_fingerprint(folder) not in (None, value):
                logger.warning(
                    f"model: loaded from {folder}, where a trainer saved an updated model; the update now becomes its "
                    "own reference. To go on with the original one, give it as ref_model."
                )
        self._original = originals.original_of(self.model, ref_model, self.args.adapter_reference)
        if self._original.kept and self.is_fsdp_enabled:
            raise ValueError(
                f"model: {len(self._original.kept)} of the parameters that its reference reads train, which FSDP "
                "shards; expected a ref_model, or adapters alone that train"
            )
        if self.ref_model is not None:
            if self.is_fsdp_enabled:
                from accelerate.utils import fsdp2_prepare_model

                self._original.model = fsdp2_prepare_model(self.accelerator, self.ref_model)
            elif getattr(self.ref_model, "hf_device_map", None) is None:
                self.ref_model.to(self.args.device)
        return value

    def _compare_special_tokens(self, ref_model: Any) -> None:
        own, other = self.model.config, getattr(ref_model, "config", None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = [getattr(x, name, None) for x in (own, other)]
            if None not in ids and ids[0] != ids[1]:
                logger.warning(
                    f"ref_model: its {name} is {ids[1]}, the model's {ids[0]}: right if both have the same "
                    "tokens, wrong if their tokenizers differ"
                )

    def _check_strategy(self) -> None:
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("fsdp_config: FSDP 1, expected fsdp_version 2")
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise ValueError(
                "parallelism_config: sequences are split over devices, expected whole ones"
            )
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError("deepspeed: ZeRO-3, expected a stage up to 2, or FSDP 2")

    def _shared_vocabulary(self) -> int | None:
        """The number of logits that model and reference have in common: padding of vocabularies may differ."""
        sizes = [x for x in (_vocabulary(self.model), _vocabulary(self.ref_model)) if x is not None]
        if not sizes:
            return None
        known = len(self.processing_class) if hasattr(self.processing_class, "get_vocab") else None
        if known is not None and min(sizes) < known:
            raise ValueError(
                f"model and reference have vocabularies of {' and '.join(map(str, sizes))}, expected at least the "
                f"{known} tokens of processing_class"
            )
        if known is None and len({*sizes}) > 1:
            logger.warning(
                f"model and reference have vocabularies of {' and '.join(map(str, sizes))}: right if one is padded, "
                "wrong if their tokenizers differ"
            )
        return min(sizes)

    # --- The loss ---------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        active_rows = inputs.pop(ACTIVE_ROWS, None)
        several_texts = inputs.pop(SEVERAL_TEXTS, None)
        rows = take_rows(inputs, self._causal)
        ref_hidden = inputs.pop("ref_hidden_states", None)
        if self._ref_head is not None and ref_hidden is None:
            raise ValueError(
                f"batch: no ref_hidden_states among its columns ({', '.join(inputs)}), expected them because of "
                "precomputed_reference; precompute_reference makes them"
            )
        self._look_at(model, inputs, ref_hidden, several_texts)
        normalizer: Any = num_items_in_batch
        if normalizer is not None and self.args.average_tokens_across_devices:
            # DistributedDataParallel averages over what this adds up.
            normalizer = normalizer / (self.accelerator.num_processes // self.get_tp_size())
        keywords: dict[str, Any] = {
            "method": self._objective, "alpha": self.args.alpha, "eps": self.args.eps,
            "smoothing": self.args.smoothing, "nl_floor": self.args.nl_floor, "normalizer": normalizer,
            "temperature": self.args.temperature, "negative_ids": rows.negative_ids, "return_stats": True,
        }  # fmt: skip
        if self._head_math is not None and not return_outputs:
            sides = self._objective.positive_loss, self._objective.negative_loss
            if active_rows is not None and len({side.reads_reference for side in sides}) == 1:
                # No device is asked how many there are. Where one side alone reads the reference it is, as that costs
                # less than to multiply the other side's rows with the reference's head too.
                keywords["max_active_rows"] = max(1, active_rows)
            loss, stats, auxiliary = self._fused_loss(model, inputs, rows, ref_hidden, keywords)
            outputs = None
        else:
            loss, stats, auxiliary, outputs = self._loss_of_logits(
                model, inputs, rows, keywords, return_outputs
            )
        with torch.no_grad():
            found = row_sums.sums(rows, stats, self._objective, self.args.alpha)
            self._add(found, auxiliary, torch.is_grad_enabled() or loss.requires_grad)
        return (loss, outputs) if return_outputs else loss

    def _fused_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        rows: Rows,
        ref_hidden: Tensor | None,
        keywords: dict[str, Any],
    ) -> tuple[Tensor, RowStats, Auxiliary | None]:
        assert self._head_math is not None
        math, ref_math = self._head_math
        ref_weight = ref_bias = None
        if self._ref_head is not None:
            assert ref_hidden is not None
            ref_hidden = ref_hidden.to(self._ref_head.weight.dtype)
            ref_weight, ref_bias = detached(head_parameters(self._ref_head, ref_hidden))
        elif self._original is not None:
            with self._original.running(self._forwards.unwrapped(model)) as module:
                head = cast(nn.Linear, plain_head(module))

                def last_hidden(forward: Forward) -> Tensor:
                    with head_input(head) as kept:
                        forward()
                    return kept[0]

                ref_hidden = self._forwards.within(module, inputs, last_hidden)
                # Without gradient at once: behind this, the parameters may have other values.
                ref_weight, ref_bias = detached(head_parameters(head, ref_hidden))
            ref_hidden = self._of_the_texts(ref_hidden, rows)
        if ref_weight is not None:
            assert ref_math is not None
            keywords |= {"ref_softcap": ref_math.softcap, "ref_logit_scale": ref_math.scale}
        kept_stats: list[tuple[RowStats, Auxiliary | None]] = []

        def loss_of_hidden(forward: Forward) -> Tensor:
            own = cast(nn.Linear, plain_head(self._forwards.unwrapped(model)))
            with head_input(own) as kept:
                outputs = forward()
            weight, bias = head_parameters(own, kept[0])
            loss, found = linear_tnt_loss(
                self._of_the_texts(kept[0], rows), weight, ref_hidden, ref_weight, rows.labels, rows.weights,
                bias=bias, ref_bias=ref_bias, softcap=math.softcap, logit_scale=math.scale,
                vocab_size=self._vocab_size, **keywords,
            )  # fmt: skip
            auxiliary = auxiliary_loss(self._forwards.unwrapped(model), outputs)
            kept_stats.append((found, auxiliary))
            return self._with(auxiliary, cast(Tensor, loss))

        return self._forwards.within(model, inputs, loss_of_hidden), *kept_stats[0]

    def _loss_of_logits(
        self,
        model: nn.Module,
        inputs: Inputs,
        rows: Rows,
        keywords: dict[str, Any],
        return_outputs: bool,
    ) -> tuple[Tensor, RowStats, Auxiliary | None, Any]:
        vocab = slice(self._vocab_size)
        ref_logits: Tensor | None = None
        if self._objective.reads_reference:
            if self._ref_head is not None:
                raise ValueError(
                    "precomputed_reference: logits are asked for, but there are hidden states alone; expected no "
                    "compute_metrics and no predict, and a head that fused_linear can serve"
                )
            assert self._original is not None
            with self._original.running(self._forwards.unwrapped(model)) as module:
                ref_logits = self._forwards.within(
                    module, inputs, lambda forward: logits_of(forward())[..., vocab]
                )
            ref_logits = self._of_the_texts(ref_logits, rows)
        kept: list[tuple[RowStats, Auxiliary | None, Any]] = []

        def loss_of_logits(forward: Forward) -> Tensor:
            outputs = forward()
            whole = logits_of(outputs)
            logits = self._of_the_texts(whole, rows)
            dense = logits is whole  # or cut where no gradient can be written over it
            if return_outputs and not dense:
                outputs["logits"] = logits
            logits = logits if logits.size(-1) == self._vocab_size else logits[..., vocab]
            loss, stats = tnt_loss(
                logits,
                None if ref_logits is None else ref_logits.to(logits.dtype),
                rows.labels,
                rows.weights,
                inplace=self.args.inplace
                and dense
                and not return_outputs
                and logits.grad_fn is not None,
                **keywords,
            )
            auxiliary = auxiliary_loss(self._forwards.unwrapped(model), outputs)
            kept.append((stats, auxiliary, outputs if return_outputs else None))
            return self._with(auxiliary, cast(Tensor, loss))

        loss = self._forwards.within(model, inputs, loss_of_logits)
        return loss, *kept[0]

    def _of_the_texts(self, x: Tensor, rows: Rows) -> Tensor:
        own = self._forwards.unwrapped(self.model)
        return originals.of_the_texts(own, x, rows.labels.size(1))

    def _with(self, auxiliary: Auxiliary | None, loss: Tensor) -> Tensor:
        if auxiliary is None:
            return loss
        steps = getattr(self, "current_gradient_accumulation_steps", 1) if loss.requires_grad else 1
        return loss + auxiliary.term.to(loss.device, loss.dtype) / steps

    # --- The first batch --------------------------------------------------------------------------

    def _look_at(
        self,
        model: nn.Module,
        inputs: Inputs,
        ref_hidden: Tensor | None,
        several_texts: bool | None,
    ) -> None:
        """What is found out, and refused, on the first batch: the first of all, and the first in training.

        Args:
            model, inputs, ref_hidden: what a loss is asked of.
            several_texts: whether a row of the batch holds several. None: its loader does not say so.
        """
        first = model.training and not self._training_seen
        packed = several_texts and not self._packing_seen and not self.is_fsdp_enabled
        if self._head_probed and not first and not packed:
            return
        own = self._forwards.unwrapped(model)
        models = [model] if self.ref_model is None else [model, self.ref_model]
        if not self._head_probed:
            self._head_probed = True
            first_batch.check_inputs(own, inputs)
            self._probe(models, inputs)
            if self._precomputed_by is not None and ref_hidden is not None:
                first_batch.check_precomputed(
                    self._forwards, own, self._precomputed_by, ref_hidden, inputs
                )
        if first:
            self._training_seen = True
            if self.args.disable_dropout:
                check_deterministic(
                    own, lambda: self._forwards.said(model, inputs), self._forwards.everywhere
                )
            resumed = self.state.global_step > 0
            if self._original is not None and not resumed and not self._expects_trained_adapters:
                first_batch.warn_of_trained_adapters(self._forwards, own, self._original, inputs)
        # FSDP runs a forward in all processes at once, and so at the first batch alone.
        if self._causal and (first or packed):
            together = first and self.is_fsdp_enabled
            self._packing_seen |= first_batch.check_packing(
                self._forwards, models, inputs, together
            )

    def _probe(self, models: Sequence[nn.Module], inputs: Inputs) -> None:
        """Sets ``_head_math`` if hidden states times head are the logits of the model, and of its reference."""
        if not self.args.fused_linear:
            return
        if self.args.torch_compile:
            logger.warning("fused_linear: not with torch_compile; the loss is computed from logits")
            return
        found = [first_batch.probe_head(self._forwards, module, inputs) for module in models]
        if not self._forwards.everywhere(all(math is not None for math in found)):
            name = type(self._forwards.unwrapped(models[0])).__name__
            logger.warning(
                f"fused_linear: the logits of {name} (or of its reference) are not those of a plain linear head, so "
                "that the loss is computed from logits; fused_linear=False says so beforehand"
            )
            return
        own, other = found[0], found[-1]
        assert own is not None
        self._head_math = own, other

    # --- Counts, logs, evaluation -----------------------------------------------------------------

    def _get_num_items_in_batch(
        self, batch_samples: Sequence[Inputs], device: torch.device
    ) -> Tensor | None:
        """The rows of a step: those with a label and a weight other than 0."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        if all(ACTIVE_ROWS in batch for batch in batch_samples):
            total = sum(batch[ACTIVE_ROWS] for batch in batch_samples)
            count = torch.full((), total, device=device)
        else:
            counts = [
                take_rows(dict(batch), self._causal).active().sum() for batch in batch_samples
            ]
            count = torch.stack(counts).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = cast(Tensor, self.accelerator.gather(count)).sum()
        return cast(Tensor, count / self.get_tp_size())

    def _add(self, found: Tensor, auxiliary: Auxiliary | None, training: bool) -> None:
        """Adds up the rows' sums, and the auxiliary losses and how many of them there are."""
        more = found.new_zeros(2)
        if auxiliary is not None:
            more = torch.stack((auxiliary.loss.detach().to(found), found.new_ones(())))
        if training:
            found = torch.cat((found.sum(dim=0), more))
            self._train_sums = found if self._train_sums is None else self._train_sums + found
        else:
            found = self.accelerator.gather_for_metrics(found)  # without repeated examples
            found = torch.cat((found.sum(dim=0), self.accelerator.reduce(more)))
            self._eval_sums = found if self._eval_sums is None else self._eval_sums + found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._train_sums is not None:
            found = row_sums.averages(self.accelerator.reduce(self._train_sums), self._objective)
            found.pop("rows_loss")
            logs.update(found)
            self._train_sums = None
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Inputs,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        if not prediction_loss_only:
            step = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return cast(tuple[Tensor | None, Any, Any], step)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> EvalLoopOutput:
        self._eval_sums = None
        output = super().evaluation_loop(*arguments, **keywords)
        if self._eval_sums is not None and output.metrics is not None:
            prefix = keywords.get(
                "metric_key_prefix", arguments[4] if len(arguments) > 4 else "eval"
            )
            found = row_sums.averages(self._eval_sums, self._objective)
            output.metrics[f"{prefix}_loss"] = found.pop("rows_loss")  # over rows, not over batches
            output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        self._eval_sums = None
        return output

    # --- Data, saving -----------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = list(
                dict.fromkeys([*(self._signature_columns or ()), *COLUMNS])
            )

    def _get_dataloader(self, dataset: Any, *arguments: Any, **keywords: Any) -> DataLoader[Any]:
        collator, dispatch = self.data_collator, self.args.accelerator_config.dispatch_batches
        if dispatch is None:
            dispatch = isinstance(dataset, IterableDataset)
        if isinstance(collator, TNTDataCollator) and not keywords.get("is_training", False):
            # Evaluation tells examples apart by the rows of a batch.
            self.data_collator = copy.copy(collator)
            self.data_collator.padding_free = False
        # What one process makes for all others, accelerate cuts into pieces, and can do so to tensors alone.
        if self.args.world_size == 1 or not dispatch:
            self.data_collator = CountedRows(self.data_collator, self._causal)
        try:
            loader: DataLoader[Any] = super()._get_dataloader(dataset, *arguments, **keywords)
            return loader
        finally:
            self.data_collator = collator

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = cast(nn.Module, super().call_model_init(trial))
        originals.set_cache(model, self.args.use_cache)
        if self.args.disable_dropout:
            disable_dropout(model)
        if self._original is not None and self._original.model is None:
            # The parameters that it keeps were another model's.
            self._original = originals.original_of(model, None, self.args.adapter_reference)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, **keywords: Any) -> Any:
        if self.model_init is None and not any(x.requires_grad for x in self.model.parameters()):
            raise ValueError(
                "model: none of its parameters requires a gradient, expected some to train (adapters: "
                "PeftModel.from_pretrained(..., is_trainable=True))"
            )
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if isinstance(folder, str) and self._fingerprint is not None:
            stored = originals.read_fingerprint(folder)
            if stored is None:
                logger.warning(
                    f"{folder} says nothing of its reference, which is not checked therefore"
                )
            elif stored != self._fingerprint:
                raise ValueError(
                    f"resume_from_checkpoint: the run in {folder} had another reference than this trainer has; "
                    "expected the same original: give it as ref_model, or as the model that the trainer starts from"
                )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and self._fingerprint is not None:
            originals.write_fingerprint(output_dir or self.args.output_dir, self._fingerprint)


def _vocabulary(model: Any) -> int | None:
    """The number of logits."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    head = getattr(
        head, "original_module", head
    )  # PEFT's copy of a tied one says the sizes of the embedding
    size = getattr(head, "out_features", None)
    if size is None and model is not None and hasattr(model, "config"):
        size = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return size
