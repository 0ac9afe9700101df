"""The compiled CPU kernels (``csrc/cpu/rows.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

import tnt_kernels.backends.native as native
from tnt_kernels._call import RowCall
from tnt_kernels.backends.protocol import describe, scale_by_item

scale_ = scale_by_item


def why_not(logits: Tensor | None) -> str:
    """Why this backend cannot serve these logits, or (None) any; empty where it can."""
    if native.missing or logits is None or logits.is_cpu:
        return native.missing
    return f"it takes CPU tensors, logits are {describe(logits)}"


def launch(call: RowCall) -> None:
    assert native.module is not None
    native.module.run_rows(call, torch.get_num_threads())
