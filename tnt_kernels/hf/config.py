"""``TNTConfig``: the arguments of ``TNTTrainer``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from tnt_kernels.hf.models import is_encoder_decoder
from tnt_kernels.objectives import resolve_method


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TNTConfig(TrainingArguments):
    """``TrainingArguments`` and how the loss is made; the loss's arguments are explained in :func:`tnt.tnt_loss`.

    NaN losses are logged as they are: ``logging_nan_inf_filter`` is False here.
    """

    method: str = _option(
        "tnff",
        "tnff, tnrr, tnrf, tnfr, tnfll, tnrll, nl+ll or ul+ll: negative side, positive side.",
    )
    alpha: float = _option(1.0, "Factor on negative rows.")
    eps: float = _option(1e-6, "Floor that a reverse KL's target leaves to removed tokens.")
    smoothing: str = _option(
        "negatives", "Where eps goes: negatives, or uniform as in the authors' code."
    )
    nl_floor: float | None = _option(None, "Negative likelihood stops below this log-probability.")
    temperature: float = _option(1.0, "Both logits are divided by it.")
    fused_linear: bool = _option(
        True,
        "Go from hidden states to the loss without logits, where a check at the start finds that the model "
        "allows it. With torch_compile, the loss is computed from logits.",
    )
    inplace: bool = _option(
        True,
        "Where there are logits, write their gradient over them. False for a model whose last operation "
        "needs its own result in backward (autograd says so).",
    )
    disable_dropout: bool = _option(
        True, "No dropout in the model: the target is what it says without."
    )
    adapter_reference: str = _option(
        "base",
        "What computes the reference of a model with adapters where no ref_model is given: base, the model "
        "without them, or start, the model with them as they are when the trainer is made.",
    )
    precomputed_reference: bool = _option(
        False, "The data hold the reference's hidden states (see precompute_reference)."
    )
    logging_nan_inf_filter: bool = _option(False, "Hide NaN and infinite losses in the logs.")

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_method(self.method)
        if self.smoothing not in ("negatives", "uniform"):
            raise ValueError(f"smoothing is {self.smoothing!r}, expected 'negatives' or 'uniform'")
        check_adapter_reference(self.adapter_reference)
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, expected a number above 0")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, expected 0: TNT's target is the reference"
            )


def check_adapter_reference(name: str) -> None:
    if name not in ("base", "start"):
        raise ValueError(f"adapter_reference is {name!r}, expected 'base' or 'start'")


def check_arguments(args: Any, model: Any, ref_model: Any, keywords: dict[str, Any]) -> None:
    """Errors for arguments of ``TNTTrainer`` that are wrong, or that do not go together."""
    if not isinstance(args, TNTConfig):
        raise TypeError(f"args: {type(args).__name__}, expected a TNTConfig")
    if keywords.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func: given, expected none: the loss is TNT's")
    if args.n_gpu > 1:
        raise ValueError(
            f"args: {args.n_gpu} GPUs in one process (DataParallel), expected one process for each: start with "
            "torchrun or accelerate launch"
        )
    if ref_model is not None and ref_model is model:
        raise ValueError(
            "ref_model: is model itself, which training changes; expected another one, or None for a frozen copy"
        )
    flags = [is_encoder_decoder(x) for x in (model, ref_model) if x is not None]
    if len({*flags}) > 1:
        raise ValueError(
            "ref_model: one of model and ref_model is an encoder-decoder, expected both or none"
        )
