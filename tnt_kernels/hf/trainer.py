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

from tnt_kernels.hf.batch_loss import BatchLoss
from tnt_kernels.hf.collator import TNTDataCollator
from tnt_kernels.hf.config import TNTConfig, check_arguments
from tnt_kernels.hf.dropout import disable_dropout
from tnt_kernels.hf.examples import COLUMNS
from tnt_kernels.hf.first_batch import FirstBatch
from tnt_kernels.hf.forward import Forwards
from tnt_kernels.hf.logged import Logged
from tnt_kernels.hf.models import is_encoder_decoder, set_cache
from tnt_kernels.hf.original import (
    Reference,
    check_resumed,
    original_of,
    shared_vocabulary,
    take_reference,
    write_fingerprint,
)  # fmt: skip
from tnt_kernels.hf.rows import ACTIVE_ROWS, SEVERAL_TEXTS, CountedRows, take_rows
from tnt_kernels.objectives import resolve_method

Inputs = dict[str, Any]


class TNTTrainer(Trainer):
    """Trains a causal or encoder-decoder model towards the minimal targeted update of its original.

    The original is ``ref_model`` if given, as it is, adapters and all; of a model with adapters, its base, without them
    (``adapter_reference="start"``: with them, as they are when the trainer is made); else a frozen copy made when the
    trainer is. Parameters of the base that train beside adapters are copied for it. What the original says of a batch
    is the *reference* that the loss compares with. With ``precomputed_reference``, the data hold it, as hidden states.
    Methods whose losses are no KL have none.

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
    #: What the loss compares with; None until it is taken, and for methods that read none.
    _reference: Reference | None = None
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
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, **keywords
        )
        if getattr(self.model, "config", None) is None:
            raise ValueError(
                f"model: {type(self.model).__name__} without a config, expected a model of transformers"
            )
        self.loss_is_scaled_for_ga = True  # by the count of rows
        self._objective = resolve_method(args.method)
        self._causal = not is_encoder_decoder(self.model)
        if data_collator is None:
            self.data_collator = TNTDataCollator(processing_class, self.model)
        self._prepare(self.model)
        self._check_strategy()
        if self._objective.reads_reference:
            self._reference = take_reference(
                self.model, ref_model, args, self.accelerator, self.is_fsdp_enabled
            )
        self._vocab_size = shared_vocabulary(self.model, self.ref_model, self.processing_class)
        if isinstance(self.data_collator, TNTDataCollator):
            self.data_collator.learn(self.model, self._vocab_size)
        self._forwards = Forwards(self.accelerator)
        self._first_batch = FirstBatch(args, self._forwards, self._causal, self._reference)
        self._logged = Logged(self.accelerator, self._objective, args.alpha)

    @property
    def ref_model(self) -> Any:
        """The original if it is a model of its own; None where it is the one in training, or none is needed."""
        original = None if self._reference is None else self._reference.original
        return None if original is None else original.model

    def _prepare(self, model: nn.Module) -> None:
        """Sets the cache and dropout of a model that will be trained as the arguments say."""
        set_cache(model, self.args.use_cache)
        if self.args.disable_dropout:
            disable_dropout(model)

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
        precomputed = self._reference is not None and self._reference.head is not None
        if precomputed and ref_hidden is None:
            raise ValueError(
                f"batch: no ref_hidden_states among its columns ({', '.join(inputs)}), expected them because of "
                "precomputed_reference; precompute_reference makes them"
            )
        self._first_batch.look(
            model, inputs, ref_hidden, several_texts,
            fresh=self.state.global_step == 0 and not self._expects_trained_adapters,
            sharded=self.is_fsdp_enabled,
        )  # fmt: skip
        normalizer: Any = num_items_in_batch
        if normalizer is not None and self.args.average_tokens_across_devices:
            # DistributedDataParallel averages over what this adds up.
            normalizer = normalizer / (self.accelerator.num_processes // self.get_tp_size())
        keywords: dict[str, Any] = {
            "method": self._objective, "alpha": self.args.alpha, "eps": self.args.eps,
            "smoothing": self.args.smoothing, "nl_floor": self.args.nl_floor, "normalizer": normalizer,
            "temperature": self.args.temperature, "negative_ids": rows.negative_ids, "return_stats": True,
        }  # fmt: skip
        batch_loss = BatchLoss(
            forwards=self._forwards, model=model, own=self._forwards.unwrapped(self.model), inputs=inputs, rows=rows,
            reference=self._reference, vocab_size=self._vocab_size, keywords=keywords,
            micro_batches=getattr(self, "current_gradient_accumulation_steps", 1),
        )  # fmt: skip
        head_math = self._first_batch.head_math
        if head_math is None or return_outputs:
            loss, found = batch_loss.of_logits(self.args.inplace, return_outputs)
        else:
            loss, found = batch_loss.fused(head_math, ref_hidden, active_rows)
        self._logged.add(rows, found, training=loss.requires_grad)
        return (loss, found.outputs) if return_outputs else loss

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
            rows = [take_rows(dict(batch), self._causal) for batch in batch_samples]
            count = torch.stack([x.active().sum() for x in rows]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = cast(Tensor, self.accelerator.gather(count)).sum()
        return cast(Tensor, count / self.get_tp_size())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update({**self._logged.averages(training=True), "loss": logs["loss"]})
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
        self._logged.averages(training=False)  # forgets losses that belong to no evaluation
        output = super().evaluation_loop(*arguments, **keywords)
        found = self._logged.averages(training=False)
        prefix = keywords.get("metric_key_prefix", arguments[4] if len(arguments) > 4 else "eval")
        if output.metrics is not None:
            output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    # --- Data, saving -----------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns = [*(self._signature_columns or ()), *COLUMNS]
            self._signature_columns = list(dict.fromkeys(columns))

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
        self._prepare(model)
        original = None if self._reference is None else self._reference.original
        if self._reference is not None and original is not None and original.model is None:
            # The parameters that it keeps were another model's.
            self._reference.original = original_of(model, None, self.args.adapter_reference)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, **keywords: Any) -> Any:
        if self.model_init is None and not any(x.requires_grad for x in self.model.parameters()):
            raise ValueError(
                "model: none of its parameters requires a gradient, expected some to train (adapters: "
                "PeftModel.from_pretrained(..., is_trainable=True))"
            )
        resumed = resume_from_checkpoint
        folder = get_last_checkpoint(self.args.output_dir) if resumed is True else resumed
        if isinstance(folder, str) and self._reference is not None:
            check_resumed(folder, self._reference.fingerprint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and self._reference is not None:
            write_fingerprint(output_dir or self.args.output_dir, self._reference.fingerprint)
