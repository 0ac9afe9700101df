"""The original model that the update is held against: where it comes from, and how it is recognised."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FINGERPRINT_FILE = "tnt_reference.json"
_SAMPLED = 64  # values of each parameter


def is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def frozen(model: Any) -> Any:
    """``model`` itself, without gradients, dropout or cache."""
    model.requires_grad_(False).eval()
    if getattr(model, "config", None) is not None:
        model.config.use_cache = False
    return model


def frozen_copy(model: nn.Module) -> Any:
    if any(x.is_meta or x.numel() == 0 for x in model.parameters()):
        raise ValueError(
            "model: some parameters are empty here (sharded at load time, or on the meta device), so that it cannot "
            "be copied as its own reference; give ref_model"
        )
    return frozen(copy.deepcopy(model))


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """The model as it was: in eval mode, its adapters disabled, without gradients."""
    training = model.training
    if training:  # each way visits every module, which a frozen copy does not need at every step
        model.eval()
    try:
        with torch.no_grad(), model.disable_adapter() if is_peft(model) else nullcontext():
            yield
    finally:
        if training:
            model.train()


def disable_dropout(model: nn.Module) -> None:
    """Dropout of probability 0, as layers and as the numbers that attention keeps."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)


def fingerprint(model: nn.Module) -> str:
    """Of the values of a sample of every parameter; the same on every device. Adapters do not count."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", None) if is_peft(model) else None
    shapes: list[tuple[str, tuple[int, ...]]] = []
    samples: list[Tensor] = []
    for name, x in model.named_parameters():
        if prefix is not None and (prefix in name or ".modules_to_save." in name):
            continue
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
