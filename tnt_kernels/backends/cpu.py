"""The compiled CPU kernels (``csrc/row_cpu.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from tnt_kernels.backends import native
from tnt_kernels.backends.call import RowCall, describe, scale_by_item

scale_ = scale_by_item


def why_not(logits: Tensor | None) -> str:
    """Why this backend cannot serve these logits, or (None) any; empty where it can."""
    if native.missing or logits is None:
        return native.missing
    return (
        ""
        if logits.device.type == "cpu"
        else f"it takes CPU tensors, logits are {describe(logits)}"
    )


def launch(call: RowCall) -> None:
    assert native.module is not None
    native.module.run_rows(*native.row_arguments(call), torch.get_num_threads())
