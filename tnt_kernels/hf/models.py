"""What there is to know of a model of transformers or PEFT: its kind, its vocabulary, its adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def set_cache(model: Any, used: bool) -> None:
    """Sets ``use_cache``, that of the text's part too: with a cache, transformers does not tell packed texts apart."""
    config = getattr(model, "config", None)
    if config is not None:
        config.use_cache = used
        if hasattr(config, "get_text_config"):
            config.get_text_config(decoder=True).use_cache = used


def vocabulary(model: Any) -> int | None:
    """The number of logits; None if it is not known."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    # Where weights are tied, PEFT's copy of the head says the sizes of the embedding.
    head = getattr(head, "original_module", head)
    size = getattr(head, "out_features", None)
    if size is None and model is not None and hasattr(model, "config"):
        size = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return size


# --- Adapters -------------------------------------------------------------------------------------


def is_peft(model: Any) -> bool:
    """Whether ``model`` has adapters: a PEFT model, or one of transformers that adapters were added to."""
    added = getattr(model, "_hf_peft_config_loaded", False)
    return bool(added) or hasattr(model, "disable_adapter")


def base_of(model: Any) -> Any:
    """The model of transformers within a PEFT model, whose forward the adapters change."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def learns_prompts(model: Any) -> bool:
    """Whether a PEFT model puts embeddings or keys and values of its own in front of every text."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def virtual_tokens(model: Any) -> int:
    """How many embeddings of its own a PEFT model puts in front of every text of a causal model."""
    if not learns_prompts(model):
        return 0
    config = model.active_peft_config
    if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE") or is_encoder_decoder(model):
        return 0  # they stand in the cache, or in front of the encoder's text
    return int(config.num_virtual_tokens)


def without_virtual_tokens(model: Any, x: Tensor, length: int) -> Tensor:
    """Hidden states or logits (B, T, ...) at the ``length`` labels of each text alone."""
    if x.size(1) == length:
        return x
    extra = virtual_tokens(model)
    if x.size(1) != length + extra:
        raise ValueError(
            f"model: {x.size(1)} positions of output for {length} labels of a text, expected as many"
        )
    return x[:, extra:]


def adapter_test(model: Any) -> Callable[[str], bool]:
    """A function that tells whether a parameter of that name is read only while the adapters are on."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    kinds = (config.peft_type for config in model.peft_config.values())
    prefixes = [PEFT_TYPE_TO_PREFIX_MAPPING.get(kind) for kind in kinds]
    others = ("modules_to_save.", "trainable_tokens_", "prompt_encoder.")
    marks = [*others, *(prefix for prefix in prefixes if prefix)]
    return lambda name: any(f".{mark}" in f".{name}" for mark in marks)


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Switches the adapters off for a while. What trains is the same afterwards: PEFT would make all of them train."""
    trained = [(x, x.requires_grad) for x in model.parameters()]
    try:
        if hasattr(model, "disable_adapter"):
            with warnings.catch_warnings():
                # PEFT warns of biases that train with the adapters; ``Original`` puts these back.
                warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")
                with model.disable_adapter():
                    yield
        else:
            from peft.tuners.tuners_utils import BaseTunerLayer
            from peft.utils.other import AuxiliaryTrainingWrapper

            # Not ``model.enable_adapters()``, which leaves modules_to_save disabled.
            kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
            enabled = [
                x for x in model.modules() if isinstance(x, kinds) and not x.disable_adapters
            ]
            for layer in enabled:
                layer.enable_adapters(False)
            try:
                yield
            finally:
                for layer in enabled:
                    layer.enable_adapters(True)
    finally:
        for x, flag in trained:
            if x.requires_grad != flag:
                x.requires_grad_(flag)
