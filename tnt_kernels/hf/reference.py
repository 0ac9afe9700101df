"""The original model that the update is held against: where it comes from, and how it is recognised."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FINGERPRINT_FILE = "tnt_reference.json"
_SAMPLED = 64  # values of each parameter
#: Beginnings of LoRA's initialisations that take what the adapter starts with out of the base's weights.
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


# --- Adapters -------------------------------------------------------------------------------------


def is_peft(model: Any) -> bool:
    """Whether adapters stand in ``model``: a PEFT model, or one of transformers that adapters were added to."""
    return hasattr(model, "disable_adapter") or bool(
        getattr(model, "_hf_peft_config_loaded", False)
    )


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


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
        return 0  # these stand in the cache, or before the encoder's text
    return int(config.num_virtual_tokens)


def of_the_texts(model: Any, x: Tensor, length: int) -> Tensor:
    """Hidden states or logits (B, T, ...) of texts of ``length`` labels, without those of virtual tokens in front."""
    if x.size(1) == length:
        return x
    extra = virtual_tokens(model)
    if x.size(1) != length + extra:
        raise ValueError(
            f"model: {x.size(1)} positions of output for {length} labels of a text, expected as many"
        )
    return x[:, extra:]


def _adapter_test(model: Any) -> Callable[[str], bool]:
    """Tells the names of parameters that a model reads with its adapters alone."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    kinds = (config.peft_type for config in model.peft_config.values())
    prefixes = [PEFT_TYPE_TO_PREFIX_MAPPING.get(kind) for kind in kinds]
    others = ("modules_to_save.", "trainable_tokens_", "prompt_encoder.")
    marks = [*others, *(prefix for prefix in prefixes if prefix)]
    return lambda name: any(f".{mark}" in f".{name}" for mark in marks)


def _read_and_trained(model: Any, without_adapters: bool) -> list[tuple[str, nn.Parameter]]:
    """The parameters that train, and that the model reads with its adapters, or without them."""
    trained = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
    if not without_adapters:
        return trained
    is_adapter = _adapter_test(model)
    return [(name, x) for name, x in trained if not is_adapter(name)]


@contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    """The adapters are off, and on again afterwards, with what trains as before: PEFT makes all of them train."""
    trained = [(x, x.requires_grad) for x in model.parameters()]
    try:
        if hasattr(model, "disable_adapter"):
            with warnings.catch_warnings():
                # Biases that train with the adapters are put back by ``Original``.
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


# --- The original ---------------------------------------------------------------------------------


@dataclass
class Original:
    """A model that runs as the reference.

    Attributes:
        model: a model of its own, frozen; None: the model in training, without what training changes.
        without_adapters: whether its adapters are off while it runs.
        kept: parameters that training changes and the reference reads, with their values at the start.
    """

    model: Any
    without_adapters: bool = False
    kept: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)

    def _check(self, module: Any) -> None:
        """That nothing trains by now that this reads and has not kept."""
        kept = {id(x) for x, _ in self.kept}
        new = [
            name
            for name, x in _read_and_trained(module, self.without_adapters)
            if id(x) not in kept
        ]
        if new:
            raise ValueError(
                f"model: {len(new)} parameters that its reference reads train, {new[0]} for one, which they did not "
                "when the reference was taken; expected them to require gradients then, or a ref_model"
            )

    @contextmanager
    def running(self, model: Any) -> Iterator[Any]:
        """The model to call in here, as it was: in eval mode, without gradients. ``model``: the one in training."""
        module = model if self.model is None else self.model
        if self.model is None:
            self._check(module)
        training = module.training
        if training:  # eval() and train() visit every module, which a frozen copy is spared
            module.eval()
        try:
            with torch.no_grad(), _values_of(self.kept):
                if self.without_adapters:
                    with _without_adapters(module):
                        yield module
                else:
                    yield module
        finally:
            if training:
                module.train()


def original_of(model: Any, ref_model: Any, adapter_reference: str) -> Original:
    """The reference of ``model``: ``ref_model`` as it is; else itself as it is now, or as its base is.

    Args:
        model: the model that will be trained.
        ref_model: the original if it is another one, which is frozen here; adapters that it has stay on.
        adapter_reference: for a model with adapters and no ``ref_model``: "base" takes the model without them,
            "start" with them as they are now.

    Raises:
        ValueError: a ``ref_model`` that shares parameters with what trains; adapters that are merged, or whose base is
            not the original.
    """
    if ref_model is not None:
        _check_shared(model, ref_model)
        return Original(frozen(ref_model))
    if not is_peft(model):
        return Original(frozen_copy(model))
    base = adapter_reference == "base"
    _check_adapters(model, base)
    kept = [(x, x.detach().clone()) for _, x in _read_and_trained(model, base)]
    return Original(None, base, kept)


def check_adapter_reference(name: str) -> None:
    if name not in ("base", "start"):
        raise ValueError(f"adapter_reference is {name!r}, expected 'base' or 'start'")


def _check_shared(model: Any, ref_model: Any) -> None:
    trained = {id(x) for x in model.parameters() if x.requires_grad}
    shared = sum(id(x) in trained for x in ref_model.parameters())
    if shared:
        raise ValueError(
            f"ref_model: {shared} of its parameters are the model's own, which training changes; expected a model of "
            "its own, or None"
        )


def _check_adapters(model: Any, base: bool) -> None:
    """That the model with its adapters, or without them, is what its user takes it for."""
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ValueError(
            "model: its adapters are merged into the base, where they do not train; expected model.unmerge_adapter(), "
            "or the model that merge_and_unload() gives"
        )
    for name, config in model.peft_config.items():
        start = getattr(config, "init_lora_weights", None)
        if base and isinstance(start, str) and start.lower().startswith(_MOVED):
            raise ValueError(
                f"model: init_lora_weights={start!r} of the adapter {name!r} takes what it starts with out of the "
                "base, so that the model without adapters is not the original; expected adapter_reference='start', "
                "or a ref_model"
            )


def as_it_is(model: Any) -> Original:
    """``model`` itself, adapters and all, as a reference for as long as nothing changes it."""
    return Original(model)


@contextmanager
def _values_of(kept: list[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Those values in the parameters' place. Autograd does not see it: no graph is made in here."""
    now = [x.data for x, _ in kept]
    try:
        for i, (x, value) in enumerate(kept):
            kept[i] = x, value.to(x.device, x.dtype)  # once, where the model has moved since
            x.data = kept[i][1]
        yield
    finally:
        for (x, _), data in zip(kept, now, strict=True):
            x.data = data


def frozen(model: Any) -> Any:
    """``model`` itself, without gradients, dropout or cache."""
    model.requires_grad_(False).eval()
    set_cache(model, False)
    return model


def set_cache(model: Any, used: bool) -> None:
    """Of the text's part, too: with a cache, transformers does not tell texts in a row from each other."""
    config = getattr(model, "config", None)
    if config is not None:
        config.use_cache = used
        if hasattr(config, "get_text_config"):
            config.get_text_config(decoder=True).use_cache = used


def frozen_copy(model: nn.Module) -> Any:
    if any(x.is_meta or x.numel() == 0 for x in model.parameters()):
        raise ValueError(
            "model: some parameters are empty here (sharded at load time, or on the meta device), so that it cannot "
            "be copied as its own reference; give ref_model"
        )
    return frozen(copy.deepcopy(model))


# --- Recognised -----------------------------------------------------------------------------------


def fingerprint(model: nn.Module, without_adapters: bool = False) -> str:
    """Of the values of a sample of every parameter; the same on every device."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    samples: list[Tensor] = []
    is_adapter = _adapter_test(model) if without_adapters else lambda _: False
    for name, x in model.named_parameters():
        if is_adapter(name):
            continue
        for wrapper in ("base_model.model.", "base_layer.", "original_module."):
            name = name.replace(wrapper, "")  # the base of adapters is the model that it was before
        shapes.append((name, tuple(x.shape)))
        flat = x.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        samples.append(flat[::step][:_SAMPLED].to("cpu", torch.float64))
    digest = hashlib.sha256(json.dumps(shapes).encode())
    for sample in samples:
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def write_fingerprint(folder: str, value: str) -> None:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    path.joinpath(FINGERPRINT_FILE).write_text(json.dumps({"reference": value}) + "\n")


def read_fingerprint(folder: str | None) -> str | None:
    path = Path(folder or "", FINGERPRINT_FILE)
    if not folder or not path.is_file():
        return None
    value: str = json.loads(path.read_text())["reference"]
    return value
