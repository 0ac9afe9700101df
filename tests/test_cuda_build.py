"""The built extension's CUDA kernels, as the assembler left them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tnt_kernels import _build_info

native = pytest.importorskip("tnt_kernels._C")
if not hasattr(native, "run_rows_cuda"):
    pytest.skip(_build_info.load().cuda_missing or "no CUDA kernels", allow_module_level=True)
if _build_info.load().sanitize:
    pytest.skip("an instrumented build is larger", allow_module_level=True)

MEGABYTE = 10**6
KERNELS = {
    "kl_kernel": 8,
    "stream_kernel": 4,
    "scale_kernel": 3,
    "normalizer_kernel": 1,
    "loss_kernel": 1,
}
#: Bytes of a kernel's stack, 0 for the others. stream_kernel calls functions between its passes, once a row; its loops
#: keep everything in registers.
STACK = {"stream_kernel": 512}


def cuobjdump() -> str:
    """Triton's wheel bundles one."""
    triton = importlib.util.find_spec("triton")
    folders = [f"{os.environ['CUDA_HOME']}/bin"] if "CUDA_HOME" in os.environ else []
    if triton is not None and triton.origin is not None:
        folders.append(f"{Path(triton.origin).parent}/backends/nvidia/bin")
    path = os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("cuobjdump", path=path) or pytest.skip("no cuobjdump")


def test_no_spills(record_property: Callable[[str, object], None]) -> None:
    """Every kernel of every architecture: nothing in local memory, and on the stack what its functions take."""
    command = [cuobjdump(), "--dump-resource-usage", str(native.__file__)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    images = re.split(r"^arch = (\w+)$", report, flags=re.MULTILINE)[1:]
    architectures: dict[str, str] = {}  # every source has an image of each
    for architecture, text in zip(images[::2], images[1::2], strict=True):
        architectures[architecture] = architectures.get(architecture, "") + text
    built = _build_info.load().cuda_architectures
    assert {"sm_" + x.removesuffix("+PTX").replace(".", "") for x in built} <= set(architectures)
    for architecture, text in architectures.items():
        found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
        for name, count in KERNELS.items():
            some = [x for x in found if f"{len(name)}{name}" in x[0]]
            assert len(some) == count, (architecture, name)
            registers = ", ".join(x[1] for x in some)
            record_property("resources", f"{architecture} CUDA {name}: registers {registers}")
        for function, _, stack, local in found:
            allowed = sum(STACK[name] for name in STACK if f"{len(name)}{name}" in function)
            assert int(stack) <= allowed, (architecture, function)
            assert local == "0", (architecture, function)


def test_the_extension_stays_small() -> None:
    assert Path(native.__file__).stat().st_size < 10 * MEGABYTE
