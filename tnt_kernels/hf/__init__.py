"""Targeted Negative Training with Hugging Face models: start at :class:`TNTTrainer` and :class:`TNTConfig`."""

from __future__ import annotations

try:
    import accelerate  # noqa: F401
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    message = f"tnt_kernels.hf needs {error.name}: pip install 'tnt_kernels[hf]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from tnt_kernels.hf.collator import TNTDataCollator
from tnt_kernels.hf.config import TNTConfig
from tnt_kernels.hf.loss_func import compute_loss_func
from tnt_kernels.hf.precompute import precompute_reference
from tnt_kernels.hf.refine import generate_completions, refine
from tnt_kernels.hf.trainer import TNTTrainer

__all__ = [
    "TNTConfig",
    "TNTDataCollator",
    "TNTTrainer",
    "compute_loss_func",
    "generate_completions",
    "precompute_reference",
    "refine",
]
