"""Backends: what computes the rows. ``protocol`` says what one is."""

from __future__ import annotations

import os

from torch import Tensor

import tnt_kernels.backends.cpu as cpu
import tnt_kernels.backends.cuda as cuda
import tnt_kernels.backends.torch as torch_backend
import tnt_kernels.backends.triton as triton
from tnt_kernels._scalars import Scalars
from tnt_kernels.backends.protocol import Backend

BACKENDS: dict[str, Backend] = {"cpu": cpu, "cuda": cuda, "triton": triton, "torch": torch_backend}
#: ``os.environ`` takes 5 µs of a call to say that a variable is not there: its own dictionary is asked first.
_ENVIRONMENT: dict[object, object] = os.environ._data  # type: ignore[attr-defined]
_VARIABLE = os.environ.encodekey("TNT_KERNELS_BACKEND")


def availability() -> dict[str, str]:
    """Every backend's name, with ``""`` if it can run on this machine, else the reason why it cannot."""
    return {name: backend.why_not(None) for name, backend in BACKENDS.items()}


def select(
    logits: Tensor,
    requested: str | None,
    scalars: Scalars,
    sharded: bool,
    differences: bool = False,
) -> str:
    """The backend for a call: the requested one, ``TNT_KERNELS_BACKEND``, or the fastest that serves its logits, which
    may be ``differences`` (``RowCall``).

    Raises:
        ValueError: a name that is not a backend's.
        RuntimeError: a requested backend that cannot serve these logits.
    """
    source = "backend"
    if requested is None and _VARIABLE in _ENVIRONMENT:
        requested = os.environ.get("TNT_KERNELS_BACKEND") or None
        source = "TNT_KERNELS_BACKEND"
    if requested is None:
        for name, backend in BACKENDS.items():
            if not backend.why_not(logits):
                suits = name == "cuda" and _suits_triton(logits, scalars, sharded, differences)
                return "triton" if suits else name
            if name == "cuda":
                cuda.warn_of_failure(logits)
    if requested is None or requested not in BACKENDS:
        raise ValueError(
            f"{source} is {requested!r}, expected one of {', '.join(map(repr, BACKENDS))}"
        )
    reason = BACKENDS[requested].why_not(logits)
    if reason:
        raise RuntimeError(f"{source}={requested!r} cannot serve these logits: {reason}")
    return requested


def _suits_triton(logits: Tensor, scalars: Scalars, sharded: bool, differences: bool) -> bool:
    """Calls that both GPU backends read twice are faster by Triton: benchmarks/CUDA_NOTES.md has the figures."""
    once = cuda.reads_once(logits, scalars, sharded, differences)
    return not once and not triton.why_not(logits)
