"""The CUDA kernels on a host model of a GPU (tests/cuda_shim), behind ``backend="cuda"`` for CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sysconfig
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import pytest
from compiled import ROOT, compiled

from tnt_kernels.backends import cuda

SHIM = ROOT / "tests" / "cuda_shim"
FLAGS = """-std=c++17 -O1 -mfma -mf16c -ffp-contract=off -fno-math-errno -fvisibility=hidden
    -DTNT_CUDA_SHIM -Itests/cuda_shim""".split()
SCHEDULES = {"forward": 0, "reverse": 1, "shuffled": 2}
MUTATIONS = (
    "dropped barrier",
    "wrong shuffle",
    "dropped cluster barrier",
    "unawaited copy",
    "early exit",
    "lost message",
    "stuck exchange",
    "unawaited message",
    "early leave",
    "short expect",
)
T = TypeVar("T")


def build() -> ModuleType:
    """Compiles the kernels as C++, once for the same sources, and imports them."""
    pybind11 = pytest.importorskip("pybind11")
    sources = [path for folder in (ROOT / "csrc", SHIM) for path in sorted(folder.rglob("*.*"))]
    name = "tnt_cuda_model"
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    arguments = [*FLAGS, f"-DTNT_MODULE={name}", *(f"-I{path}" for path in includes)]
    arguments += ["-x", "c++", "csrc/cuda/entry_points.cu", "tests/cuda_shim/cuda_shim.cpp"]
    library = compiled(name, arguments, sources)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def installed(module: ModuleType) -> Iterator[ModuleType]:
    """``backend="cuda"`` runs on the model while this is open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "module", module)
        patch.setattr(cuda, "why_not", lambda logits: "")
        patch.setattr(cuda, "_device", lambda x: 0)
        patch.setattr(cuda, "_stream", lambda x: 0)
        yield module


def rows_left(
    module: ModuleType, call: Callable[..., T], *of_call: Any
) -> tuple[T, list[int] | None]:
    """The result of a call, and the rows that kl_kernel has left to another kernel; None if it was not asked."""
    run, left = module.run_rows_cuda, None

    def watched(*arguments: Any) -> None:
        nonlocal left
        rows, workspace = len(arguments[0].logits), arguments[-1]
        # csrc/cuda/entry_points.h: behind 1 + N doubles
        numbers = (ctypes.c_int * (1 + rows)).from_address(workspace + 8 * (1 + rows))
        numbers[0] = -1
        run(*arguments)
        left = sorted(numbers[1 : 1 + numbers[0]]) if numbers[0] >= 0 else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_rows_cuda", watched)
        result = call(*of_call)
    return result, left
