"""What the build of this installation did: the ``_build_info.json`` that setup.py leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class BuildInfo(NamedTuple):
    native_missing: str = ""  #: why there is no ``_C``; empty when it was built
    instruction_sets: tuple[str, ...] = ()  #: of the CPU kernels, best last
    openmp: bool = False
    cuda_missing: str = ""  #: why ``_C`` has no CUDA kernels; empty when it has
    cuda_architectures: tuple[str, ...] = ()  #: that they were compiled for
    sanitize: str = ""  #: the sanitizers that ``_C`` was built with


def load(path: Path | None = None) -> BuildInfo:
    """Reads ``path``, by default this installation's; a tree that was never built has none."""
    path = path or Path(__file__).with_suffix(".json")
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        return BuildInfo("tnt_kernels was not installed: run `pip install .` or `pip install -e .`")
    for name in ("instruction_sets", "cuda_architectures"):
        fields[name] = tuple(fields.get(name, ()))
    return BuildInfo(**fields)
