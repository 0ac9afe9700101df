"""Fused kernels for Targeted Negative Training: ``import tnt_kernels as tnt``; start at ``tnt.tnt_loss``."""

from typing import Any

from tnt_kernels._version import __version__
from tnt_kernels.annotate import (
    NegativePhrases,
    negative_ids_from_phrases,
    weights_from_blocklist,
    weights_from_correction,
    weights_from_spans,
)
from tnt_kernels.functional import RowStats, tnt_loss
from tnt_kernels.linear import linear_tnt_loss
from tnt_kernels.losses import LinearTNTLoss, TNTLoss
from tnt_kernels.objectives import METHODS, Objective

__all__ = [
    "METHODS",
    "LinearTNTLoss",
    "NegativePhrases",
    "Objective",
    "RowStats",
    "TNTLoss",
    "__version__",
    "linear_tnt_loss",
    "negative_ids_from_phrases",
    "tnt_loss",
    "weights_from_blocklist",
    "weights_from_correction",
    "weights_from_spans",
]


def __getattr__(name: str) -> Any:
    if name == "hf":  # needs transformers, and takes seconds to import
        import importlib

        return importlib.import_module("tnt_kernels.hf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
