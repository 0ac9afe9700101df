"""Shared libraries that tests compile from the project's C++ sources."""

from __future__ import annotations

import fcntl
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def compiled(name: str, arguments: Sequence[str], sources: Iterable[Path]) -> Path:
    """What g++ makes of ``arguments``, in the project's folder: once for the same ones and the same ``sources``."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    read = [" ".join(arguments).encode(), *(path.read_bytes() for path in sources)]
    digest = hashlib.sha256(b"".join(read)).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"{name}-{digest}"
    cache.mkdir(exist_ok=True)
    library = cache / f"{name}.so"
    with open(cache / f"{name}.lock", "w") as lock:  # one worker compiles, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = library.with_suffix(".partial")
            result = subprocess.run(
                [compiler, *arguments, "-fPIC", "-shared", "-Icsrc", "-o", str(partial)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == 0, result.stderr
            partial.rename(library)
    return library
