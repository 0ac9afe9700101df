"""``TNTTrainer``: a ``transformers.Trainer`` whose loss is TNT's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint
from transformers.utils import logging

from tnt_kernels.functional import RowStats, tnt_loss
from tnt_kernels.hf import reference as originals
from tnt_kernels.hf import rows as row_sums
from tnt_kernels.hf.collator import COLUMNS, TNTDataCollator
from tnt_kernels.hf.config import TNTConfig, check_arguments
from tnt_kernels.hf.dropout import check_deterministic, disable_dropout
from tnt_kernels.hf.head import (
    HeadMath,
    apart,
    detached,
    head_input,
    head_parameters,
    logits_of,
    plain_head,
    probe,
)
from tnt_kernels.hf.router import Auxiliary, auxiliary_loss
from tnt_kernels.hf.rows import ACTIVE_ROWS, CountedRows, Rows, first_tokens, take_rows
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
    Exceptions are the first step, which probes the model's head, batches made elsewhere (``dispatch_batches``), and
    methods of which one side alone is a KL (tnfll, tnrll), whose fused loss reads two counts.

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
    #: False where it is meant that adapters are trained further against their base.
    warns_of_trained_adapters = True
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
        self._probed = self._checked = self._separates_texts = False
        self._wrapper: nn.Module | None = None
        self._inner: nn.Module | None = None
        self._train_sums: Tensor | None = None  # what ``rows.averages`` reads
        self._eval_sums: Tensor | None = None
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, **keywords
        )
        self.loss_is_scaled_for_ga = True  # by the count of rows
        self._objective = resolve_method(args.method)
        self._causal = not getattr(self.model.config, "is_encoder_decoder", False)
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
            self._ref_config = getattr(original, "config", None)
            return value
        if ref_model is not None:
            self._compare_special_tokens(ref_model)
        elif not adapted:
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
        rows = take_rows(inputs, self._causal)
        ref_hidden = inputs.pop("ref_hidden_states", None)
        if self._ref_head is not None and ref_hidden is None:
            raise ValueError(
                f"batch: no ref_hidden_states among its columns ({', '.join(inputs)}), expected them because of "
                "precomputed_reference; precompute_reference makes them"
            )
        self._look_at(model, inputs, ref_hidden)
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
            with self._original.running(self._unwrapped(model)) as module:
                head = cast(nn.Linear, plain_head(module))

                def last_hidden(forward: Callable[..., Any]) -> Tensor:
                    with head_input(head) as kept:
                        forward()
                    return kept[0]

                ref_hidden = self._within_forward(module, inputs, last_hidden)
                # Without gradient at once: behind this, the parameters may have other values.
                ref_weight, ref_bias = detached(head_parameters(head, ref_hidden))
            ref_hidden = self._of_the_texts(ref_hidden, rows)
        if ref_weight is not None:
            assert ref_math is not None
            keywords |= {"ref_softcap": ref_math.softcap, "ref_logit_scale": ref_math.scale}
        kept_stats: list[tuple[RowStats, Auxiliary | None]] = []

        def loss_of_hidden(forward: Callable[..., Any]) -> Tensor:
            own = cast(nn.Linear, plain_head(self._unwrapped(model)))
            with head_input(own) as kept:
                outputs = forward()
            weight, bias = head_parameters(own, kept[0])
            loss, found = linear_tnt_loss(
                self._of_the_texts(kept[0], rows), weight, ref_hidden, ref_weight, rows.labels, rows.weights,
                bias=bias, ref_bias=ref_bias, softcap=math.softcap, logit_scale=math.scale,
                vocab_size=self._vocab_size, **keywords,
            )  # fmt: skip
            auxiliary = auxiliary_loss(self._unwrapped(model), outputs)
            kept_stats.append((found, auxiliary))
            return self._with(auxiliary, cast(Tensor, loss))

        return self._within_forward(model, inputs, loss_of_hidden), *kept_stats[0]

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
            with self._original.running(self._unwrapped(model)) as module:
                ref_logits = self._within_forward(
                    module, inputs, lambda forward: logits_of(forward())[..., vocab]
                )
            ref_logits = self._of_the_texts(ref_logits, rows)
        kept: list[tuple[RowStats, Auxiliary | None, Any]] = []

        def loss_of_logits(forward: Callable[..., Any]) -> Tensor:
            outputs = forward()
            whole = logits_of(outputs)
            logits = self._of_the_texts(whole, rows)
            dense = logits is whole  # or cut where no gradient can be written over it
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
            auxiliary = auxiliary_loss(self._unwrapped(model), outputs)
            kept.append((stats, auxiliary, outputs if return_outputs else None))
            return self._with(auxiliary, cast(Tensor, loss))

        loss = self._within_forward(model, inputs, loss_of_logits)
        return loss, *kept[0]

    def _of_the_texts(self, x: Tensor, rows: Rows) -> Tensor:
        """Hidden states or logits (B, T, ...) without those of the virtual tokens that adapters put in front."""
        length = rows.labels.size(1)
        if x.size(1) == length:
            return x
        extra = originals.virtual_tokens(self.accelerator.unwrap_model(self.model))
        if x.size(1) != length + extra:
            raise ValueError(
                f"model: {x.size(1)} positions of output for {length} labels of a text, expected as many"
            )
        return x[:, extra:]

    def _with(self, auxiliary: Auxiliary | None, loss: Tensor) -> Tensor:
        if auxiliary is None:
            return loss
        steps = getattr(self, "current_gradient_accumulation_steps", 1) if loss.requires_grad else 1
        return loss + auxiliary.term.to(loss.device, loss.dtype) / steps

    def _within_forward(
        self, model: nn.Module, inputs: Inputs, function: Callable[[Callable[[], Any]], Tensor]
    ) -> Tensor:
        """``model(**inputs)``, with ``function(forward)`` in place of the inner model's forward.

        What computes the loss has to run in there: DistributedDataParallel prepares its reduction for the parameters
        that the outputs depend on, FSDP has them gathered in there only, and accelerate casts what comes out.
        """
        module = self._unwrapped(model)
        before = module.__dict__.get("forward")
        forward = _bare_forward(module)

        def restore() -> None:
            module.__dict__.pop("forward", None)
            if before is not None:
                module.__dict__["forward"] = before

        def redirected(*arguments: Any, **keywords: Any) -> Tensor:
            restore()
            with self.accelerator.autocast():
                return function(partial(forward, *arguments, **keywords))

        module.__dict__["forward"] = redirected
        try:
            return cast(Tensor, model(**inputs))
        finally:
            restore()

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        """The model in what makes it distributed. A compiled one stays compiled, whatever that holds."""
        if model is self.ref_model or model is self._inner or hasattr(model, "_orig_mod"):
            return model
        if model is not self._wrapper:  # accelerate looks through all modules
            self._wrapper, self._inner = model, self.accelerator.unwrap_model(model)
        return cast(nn.Module, self._inner)

    # --- The first batch --------------------------------------------------------------------------

    def _look_at(self, model: nn.Module, inputs: Inputs, ref_hidden: Tensor | None) -> None:
        """What is found out, and refused, on the first batch: it takes some forwards more."""
        first = not self._probed
        if first:
            self._probed = True
            self._check_inputs(inputs)
            self._probe(model, inputs)
            self._check_adapters(model, inputs, ref_hidden)
        if not self._checked and model.training and self.args.disable_dropout:
            self._checked = True
            check_deterministic(self._unwrapped(model), lambda: self._said(model, inputs))
        packed = {"position_ids", "cu_seq_lens_q"} & {*inputs}
        # transformers separates texts where there is no mask. Where there is one, to look is to wait for the device.
        if packed and not self._separates_texts and (first or "attention_mask" not in inputs):
            self._separates_texts = self._check_packing(model, inputs)

    def _said(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The last hidden states of a batch, or the logits of a model whose head is not plain."""
        module = self._unwrapped(model)
        module = getattr(module, "_orig_mod", module)  # as it is, not compiled for this
        head = plain_head(module)
        found: list[Tensor] = []

        def run(forward: Callable[..., Any]) -> Tensor:
            if head is None:
                found.append(logits_of(forward()))
            else:
                with head_input(head) as kept:
                    outputs = forward()
                found.append(kept[0] if kept else logits_of(outputs))
            return torch.zeros((), device=self.args.device)

        with torch.no_grad():
            self._within_forward(module, inputs, run)
        return found[0]

    def _check_inputs(self, inputs: Inputs) -> None:
        ignored = {"position_ids", "token_type_ids"} & {*inputs}
        if ignored and self._causal and originals.virtual_tokens(self._unwrapped(self.model)):
            raise ValueError(
                f"batch: holds {' and '.join(sorted(ignored))}, which PEFT ignores for a model with virtual tokens; "
                "expected neither, hence one text in a row, padded on the right"
            )

    def _check_adapters(self, model: nn.Module, inputs: Inputs, ref_hidden: Tensor | None) -> None:
        """Whether adapters that should be fresh are, and whether precomputed hidden states are the reference's."""
        own = self._unwrapped(model)
        if not self._objective.reads_reference or not originals.is_peft(own):
            return
        if self._ref_head is not None:
            original = originals.original_of(own, None, self.args.adapter_reference)
            with original.running(own) as module:
                theirs = self._said(module, inputs)
            assert ref_hidden is not None
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            if ref_hidden.shape[:2] == mask.shape:
                ref_hidden, theirs = (x * mask[..., None].to(x) for x in (ref_hidden, theirs))
            distance, tolerance = apart(theirs, ref_hidden.to(theirs))
            if distance > tolerance:
                raise ValueError(
                    f"ref_hidden_states: {distance:.2g} apart, relative to their norm, from those of this trainer's "
                    f"reference, the model {'without its adapters' if original.without_adapters else 'as it is'}; "
                    "expected them to be precomputed with it (precompute_reference takes a model as it is)"
                )
            return
        assert self._original is not None
        if not self._original.without_adapters or originals.learns_prompts(own):
            return
        if not self.warns_of_trained_adapters:
            return
        with self._original.running(own) as module:
            theirs = self._said(module, inputs)
        with originals.as_it_is(own).running(own) as module:
            distance, tolerance = apart(self._said(module, inputs), theirs)
        if distance > tolerance:
            logger.warning(
                f"model: its adapters change it already (by {distance:.2g} of the norm of what it computes), and its "
                "reference is the model without them, so that training also undoes what they have learnt. "
                "adapter_reference='start' takes the model with them as the reference."
            )

    def _check_packing(self, model: nn.Module, inputs: Inputs) -> bool:
        """Whether a text in a row with others was found, and was seen to be as it is alone."""
        if not self._causal or "input_ids" not in inputs:
            return False
        ids = inputs["input_ids"]
        starts = first_tokens(inputs, ids.shape)
        if starts is None:
            return False
        starts = starts[:, 1:]
        if "attention_mask" in inputs:  # positions of padding say nothing
            there = inputs["attention_mask"] != 0
            starts = starts & there[:, 1:] & there[:, :-1]
        texts = []
        images = _image_tokens(self._unwrapped(model))
        for row, place in starts.nonzero().tolist():
            ends = starts[row, place + 1 :].nonzero()
            end = place + 2 + int(ends[0]) if len(ends) else ids.size(1)
            if not images & {*ids[row, place + 1 : end].tolist()}:
                texts.append((row, place + 1, end))
        if not texts:
            return False
        row, begin, end = max(texts, key=lambda text: text[2] - text[1])
        alone = {
            name: x[min(row, len(x) - 1)][None, begin:end]
            for name, x in inputs.items()
            if isinstance(x, Tensor) and x.dim() == 2 and x.size(1) == ids.size(1)
        }
        for module in (model, self.ref_model):
            if module is None:
                continue
            together, single = (
                self._said(module, inputs)[row, begin:end],
                self._said(module, alone)[0],
            )
            distance, tolerance = apart(together, single)
            if distance > tolerance:
                raise ValueError(
                    "position_ids: several texts in a row, but in "
                    f"{type(originals.base_of(self._unwrapped(module))).__name__} they see each other (hidden states "
                    f"are {distance:.2g} apart, relative to their norm, from those of a text alone); expected no "
                    "attention_mask beside such position_ids, a model that takes them, or one text in a row"
                )
        return True

    def _probe(self, model: nn.Module, inputs: Inputs) -> None:
        """Whether hidden states times head are this model's logits, on the first batch; and its reference's."""
        if not self.args.fused_linear:
            return
        if self.args.torch_compile:
            logger.warning("fused_linear: not with torch_compile; the loss is computed from logits")
            return
        modules = [self._unwrapped(model)]
        if self.ref_model is not None:
            modules.append(self.ref_model)
        found: list[HeadMath | None] = []
        for module in modules:
            head, config = plain_head(module), getattr(module, "config", None)
            if head is None:
                found.append(None)
                continue
            math: list[HeadMath | None] = []

            def run(
                forward: Callable[..., Any],
                head: nn.Linear = head,
                config: Any = config,
                math: Any = math,
            ) -> Tensor:
                math.append(probe(forward, head, config))
                return torch.zeros((), device=self.args.device)

            with torch.no_grad():
                self._within_forward(model if module is modules[0] else module, inputs, run)
            found.append(math[0])
        fits = torch.tensor([all(math is not None for math in found)], device=self.args.device)
        if not bool(self.accelerator.gather(fits.long()).min()):
            logger.warning(
                f"fused_linear: the logits of {type(modules[0]).__name__} (or of its reference) are not those of a "
                "plain linear head, so that the loss is computed from logits; fused_linear=False says so beforehand"
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
        # What one process makes for all others, accelerate cuts into pieces, and can do so to tensors alone.
        if isinstance(collator, TNTDataCollator) and not keywords.get("is_training", False):
            # Evaluation tells examples apart by the rows of a batch.
            self.data_collator = copy.copy(collator)
            self.data_collator.padding_free = False
        if self.args.world_size == 1 or not dispatch:
            self.data_collator = CountedRows(self.data_collator, self._causal)
        try:
            loader: DataLoader[Any] = super()._get_dataloader(dataset, *arguments, **keywords)
            return loader
        finally:
            self.data_collator = collator

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = cast(nn.Module, super().call_model_init(trial))
        if self.args.disable_dropout:
            disable_dropout(model)
        if (
            self._original is not None and self._original.model is None
        ):  # its kept parameters were another model's
            self._original = originals.original_of(model, None, self.args.adapter_reference)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, **keywords: Any) -> Any:
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


def _image_tokens(model: Any) -> set[int]:
    """Ids that stand for what is no text."""
    config = originals.base_of(model).config
    names = [name for name in vars(config) if name.endswith(("_token_id", "_token_index"))]
    kinds = ("image", "video", "audio", "vision")
    ids = [getattr(config, name) for name in names if name.startswith(kinds)]
    return {i for i in ids if isinstance(i, int)}


def _bare_forward(module: nn.Module) -> Callable[..., Any]:
    """``module.forward``, without accelerate's wrapper, which would cast the logits to float32.

    Other forwards that stand in its place, as that of a base whose adapters are disabled, are what is to be called.
    """
    forward: Any = module.forward
    original = getattr(module, "_original_forward", None)
    if original is not None:
        inner, function = forward, getattr(original, "__func__", original)
        while getattr(inner, "__func__", inner) is not function and hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        if getattr(inner, "__func__", inner) is function:
            forward = original
    return cast(Callable[..., Any], forward)


def _vocabulary(model: Any) -> int | None:
    """The number of logits."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    size = getattr(head, "out_features", None)
    if size is None and model is not None and hasattr(model, "config"):
        size = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return size
