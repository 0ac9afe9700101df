"""The recipes run, and the unwanted tokens become rarer."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import needs_gloo

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="no examples next to the tests")


def masses(*command: str) -> list[float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *command], cwd=EXAMPLES, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [float(x) for x in re.findall(r"p\(unwanted\) = ([\d.]+)", done.stdout)]


def check(found: list[float]) -> None:
    assert len(found) == 5
    assert found[-1] < found[0] / 2


def test_plain_loop() -> None:
    check(masses("plain_loop.py"))


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="needs accelerate")
def test_accelerate() -> None:
    check(masses("accelerate_loop.py"))


@pytest.mark.skipif(not importlib.util.find_spec("lightning"), reason="needs lightning")
def test_lightning() -> None:
    check(masses("lightning_module.py"))


def test_every_recipe_is_listed() -> None:
    page = (EXAMPLES / "README.md").read_text()
    helpers = {"model.py", "hf_tiny_model.py"}
    recipes = {path.name for path in EXAMPLES.glob("*.py")} - helpers
    assert {*re.findall(r"^\| \[(\w+\.py)\]\(\1\)", page, re.MULTILINE)} == recipes


@needs_gloo
def test_tensor_parallel() -> None:
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    check(masses(*run, "2", "tensor_parallel.py"))
