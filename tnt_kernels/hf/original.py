"""The original model: where it comes from, how it runs, what reference is taken of it, and how it is recognised."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

from tnt_kernels.hf.config import TNTConfig, check_adapter_reference
from tnt_kernels.hf.head import plain_head
from tnt_kernels.hf.models import adapter_test, adapters_off, is_peft, set_cache, vocabulary

logger = logging.get_logger(__name__)
FINGERPRINT_FILE = "tnt_reference.json"
_SAMPLED = 64  # values of each parameter
#: Beginnings of LoRA's initialisations that take what the adapter starts with out of the base's weights.
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass
class Original:
    """The model that the reference is computed with.

    Attributes:
        model: a model of its own, which nothing changes while it is needed. None: it is the model in training, without
            what training changes.
        without_adapters: whether its adapters are off while it runs.
        kept: parameters that training changes and the original reads, with their values at the start.
    """

    model: Any
    without_adapters: bool = False
    kept: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)

    @contextmanager
    def running(self, model: Any) -> Iterator[Any]:
        """The module to call, as it was: in eval mode, without gradients. ``model`` is the one in training."""
        module = model if self.model is None else self.model
        if self.model is None:
            self._check_kept(module)
        training = module.training
        if training:  # eval() and train() visit every module, which a frozen copy is spared
            module.eval()
        try:
            adapters = adapters_off(module) if self.without_adapters else nullcontext()
            with torch.no_grad(), _values_of(self.kept), adapters:
                yield module
        finally:
            if training:
                module.train()

    def _check_kept(self, module: Any) -> None:
        """Raises if a parameter trains now that the original reads and whose value it has not kept."""
        kept = {id(x) for x, _ in self.kept}
        read = _read_and_trained(module, self.without_adapters)
        new = [name for name, x in read if id(x) not in kept]
        if new:
            raise ValueError(
                f"model: {len(new)} parameters that its reference reads train, {new[0]} for one, which they did not "
                "when the reference was taken; expected them to require gradients then, or a ref_model"
            )


def original_of(model: Any, ref_model: Any, adapter_reference: str) -> Original:
    """The original of ``model``: ``ref_model`` as it is, adapters and all, frozen here; else ``model`` as it is now.

    Adapters of ``model`` are off for the "base" of ``adapter_reference``, and on, as they are now, for "start".

    Raises:
        ValueError: an unknown ``adapter_reference``; a ``ref_model`` that shares parameters with what trains; adapters
            that are merged, or whose base is not the original.
    """
    check_adapter_reference(adapter_reference)
    if ref_model is not None:
        _check_shared(model, ref_model)
        return Original(_frozen(ref_model))
    if not is_peft(model):
        return Original(frozen_copy(model))
    base = adapter_reference == "base"
    _check_adapters(model, base)
    kept = [(x, x.detach().clone()) for _, x in _read_and_trained(model, base)]
    return Original(None, base, kept)


def _check_shared(model: Any, ref_model: Any) -> None:
    trained = {id(x) for x in model.parameters() if x.requires_grad}
    shared = sum(id(x) in trained for x in ref_model.parameters())
    if shared:
        raise ValueError(
            f"ref_model: {shared} of its parameters are the model's own, which training changes; expected a model of "
            "its own, or None"
        )


def _check_adapters(model: Any, base: bool) -> None:
    """Raises if the model with its adapters, or without them, is not what its user takes it for."""
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


def _read_and_trained(model: Any, without_adapters: bool) -> list[tuple[str, nn.Parameter]]:
    """The parameters that train, and that the model reads with its adapters, or without them."""
    is_adapter = adapter_test(model) if without_adapters else lambda _: False
    trained = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
    return [(name, x) for name, x in trained if not is_adapter(name)]


@contextmanager
def _values_of(kept: list[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Puts the kept values in the parameters' place. Autograd need not see it, as no graph is made in here."""
    now = [x.data for x, _ in kept]
    try:
        for i, (x, value) in enumerate(kept):
            kept[i] = x, value.to(x.device, x.dtype)  # moved once, where the model has moved since
            x.data = kept[i][1]
        yield
    finally:
        for (x, _), data in zip(kept, now, strict=True):
            x.data = data


def _frozen(model: Any) -> Any:
    """``model`` itself, without gradients, dropout or cache."""
    model.requires_grad_(False).eval()
    set_cache(model, False)
    return model


def frozen_copy(model: nn.Module) -> Any:
    if any(x.is_meta or x.numel() == 0 for x in model.parameters()):
        raise ValueError(
            "model: some parameters are empty here (sharded at load time, or on the meta device), so that it cannot "
            "be copied as its own reference; give ref_model"
        )
    return _frozen(copy.deepcopy(model))


# --- The reference -------------------------------------------------------------------------------


@dataclass
class Reference:
    """Where the reference's logits, or its hidden states and head, come from."""

    fingerprint: str  # of the original
    #: Computes them. Of a precomputed reference, it checks the data's hidden states, and is None if it is not at hand.
    original: Original | None
    #: Of a precomputed reference, a frozen copy of the original's; else None.
    head: nn.Linear | None = None


def take_reference(
    model: Any, ref_model: Any, args: TNTConfig, accelerator: Any, sharded: bool
) -> Reference:
    """The reference of ``model`` as it is now, on the device that it trains on; ``sharded``: by FSDP."""
    adapted = ref_model is None and is_peft(model)
    base = adapted and args.adapter_reference == "base"
    given = model if ref_model is None else ref_model
    value = fingerprint(given, without_adapters=base)
    if args.precomputed_reference:
        head = plain_head(given)
        if head is None or not args.fused_linear:
            raise ValueError(
                "precomputed_reference: hidden states of a model whose head is not a plain linear layer (or "
                "fused_linear=False), expected one, and fused_linear=True"
            )
        head = cast(nn.Linear, frozen_copy(head)).to(args.device)
        original = original_of(model, None, args.adapter_reference) if adapted else None
        return Reference(value, original, head)
    if ref_model is not None:
        _compare_special_tokens(model, ref_model)
    elif not adapted or base:
        folder = getattr(model, "name_or_path", None)
        if read_fingerprint(folder) not in (None, value):
            logger.warning(
                f"model: loaded from {folder}, where a trainer saved an updated model; the update now becomes its "
                "own reference. To go on with the original one, give it as ref_model."
            )
    original = original_of(model, ref_model, args.adapter_reference)
    if original.kept and sharded:
        raise ValueError(
            f"model: {len(original.kept)} of the parameters that its reference reads train, which FSDP "
            "shards; expected a ref_model, or adapters alone that train"
        )
    if original.model is not None:
        if sharded:
            from accelerate.utils import fsdp2_prepare_model

            original.model = fsdp2_prepare_model(accelerator, original.model)
        elif getattr(original.model, "hf_device_map", None) is None:
            original.model.to(args.device)
    return Reference(value, original)


def _compare_special_tokens(model: Any, ref_model: Any) -> None:
    own, other = model.config, getattr(ref_model, "config", None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = [getattr(x, name, None) for x in (own, other)]
        if None not in ids and ids[0] != ids[1]:
            logger.warning(
                f"ref_model: its {name} is {ids[1]}, the model's {ids[0]}: right if both have the same "
                "tokens, wrong if their tokenizers differ"
            )


def shared_vocabulary(model: Any, ref_model: Any, tokenizer: Any) -> int | None:
    """The number of logits that model and reference have in common: padding of vocabularies may differ."""
    sizes = [x for x in (vocabulary(model), vocabulary(ref_model)) if x is not None]
    if not sizes:
        return None
    known = len(tokenizer) if hasattr(tokenizer, "get_vocab") else None
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


# --- Recognised -----------------------------------------------------------------------------------


def fingerprint(model: nn.Module, without_adapters: bool = False) -> str:
    """A hash of a sample of every parameter's values; the same on every device."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    samples: list[Tensor] = []
    is_adapter = adapter_test(model) if without_adapters else lambda _: False
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


def check_resumed(folder: str, value: str) -> None:
    """Raises if the run in ``folder`` had an original of another fingerprint than ``value``."""
    stored = read_fingerprint(folder)
    if stored is None:
        logger.warning(f"{folder} says nothing of its reference, which is not checked therefore")
    elif stored != value:
        raise ValueError(
            f"resume_from_checkpoint: the run in {folder} had another reference than this trainer has; "
            "expected the same original: give it as ref_model, or as the model that the trainer starts from"
        )
