"""The compiled module ``tnt_kernels._C``, for the CPU and the CUDA backend.

Its functions read a ``RowCall``, whose fields they name as Python does (csrc/call.h).
"""

from __future__ import annotations

from types import ModuleType

from tnt_kernels import _build_info
from tnt_kernels._call import RowCall, RowTensors
from tnt_kernels._scalars import Scalars

_INTERFACE = 8  # of csrc/bind.cpp
_FIELDS = tuple([*record._fields] for record in (RowCall, RowTensors, Scalars))


def _load() -> tuple[ModuleType | None, str]:
    """The module, or None and why there is none."""
    try:
        from tnt_kernels import _C
    except ImportError as error:
        return None, _build_info.load().native_missing or str(error)
    stale = ""
    if _C.INTERFACE != _INTERFACE:
        stale = f"it has interface {_C.INTERFACE}, this package expects {_INTERFACE}"
    elif _FIELDS != (_C.ROW_CALL_FIELDS, _C.ROW_TENSORS_FIELDS, _C.SCALARS_FIELDS):
        stale = "a call has other fields there than in this package"
    if stale:
        return None, f"tnt_kernels._C is stale: {stale}; install tnt_kernels again"
    return _C, ""


module, missing = _load()
