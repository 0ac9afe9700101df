"""Backends: what computes the rows. Each is one module with ``why_not(logits)``, ``launch(call)`` and ``scale_``."""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

from tnt_kernels.backends import cpu, cuda, eager, triton

#: By name. Importing one queries no device and loads no compiler.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "cuda": cuda, "torch": eager}
#: Where none is asked for, the first of these that serves the tensors is taken. The CUDA kernels are not among them:
#: the one that serves most calls has not been measured on the same GPU as Triton's, and the others are slower.
AUTOMATIC = ("cpu", "triton", "torch")


def availability() -> dict[str, str]:
    """Every backend's name, with ``""`` if it can run on this machine, else the reason why it cannot."""
    return {name: backend.why_not(None) for name, backend in BACKENDS.items()}


def select(logits: Tensor, requested: str | None) -> str:
    """The backend for these logits: the requested one, ``TNT_KERNELS_BACKEND``, or the first that serves them.

    Raises:
        ValueError: a name that is not a backend's.
        RuntimeError: a requested backend that cannot serve these logits.
    """
    source = "backend"
    if requested is None:
        requested = os.environ.get("TNT_KERNELS_BACKEND") or None
        source = "TNT_KERNELS_BACKEND"
    if requested is None:
        return next(name for name in AUTOMATIC if not BACKENDS[name].why_not(logits))
    if requested not in BACKENDS:
        raise ValueError(
            f"{source} is {requested!r}, expected one of {', '.join(map(repr, BACKENDS))}"
        )
    reason = BACKENDS[requested].why_not(logits)
    if reason:
        raise RuntimeError(f"{source}={requested!r} cannot serve these logits: {reason}")
    return requested
