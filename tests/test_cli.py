"""The command line."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch

import tnt_kernels
from tnt_kernels import _build_info, cli


def test_info_names_every_backend_and_why_it_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(cli, "availability", lambda: {"torch": "", "cuda": "built without nvcc"})
    assert cli.main(["info"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"tnt_kernels {tnt_kernels.__version__}" in lines
    assert f"torch {torch.__version__}" in lines
    assert "backend torch available" in lines
    assert "backend cuda built without nvcc" in lines


def test_info_tells_what_the_native_kernels_are():
    native = pytest.importorskip("tnt_kernels._C")
    text = "\n".join(" ".join(pair) for pair in cli.info())
    assert f"selected: {native.selected_instruction_set()}" in text
    assert native.compiler in text
    assert (f"OpenMP {torch.get_num_threads()} threads" in text) == native.openmp()


def test_info_without_native_kernels_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "tnt_kernels._C", None)  # importing it raises ImportError
    monkeypatch.delattr(tnt_kernels, "_C", raising=False)
    monkeypatch.setattr(_build_info, "load", lambda: _build_info.BuildInfo("no compiler"))
    assert ("native kernels", "none: no compiler") in cli.info()


def test_demo_gets_the_remaining_arguments(monkeypatch):
    received: list[list[str]] = []
    demo = ModuleType("tnt_kernels.demo")
    monkeypatch.setattr(demo, "main", lambda argv: received.append(argv) or 3, raising=False)
    monkeypatch.setitem(sys.modules, "tnt_kernels.demo", demo)
    assert cli.main(["demo", "--help", "here", "--steps", "2"]) == 3
    assert received == [["--help", "here", "--steps", "2"]]


def test_demo_without_its_packages_exits_with_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tnt_kernels.demo", None)
    assert cli.main(["demo"]) == 1
    assert "tnt_kernels.demo" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["info", "nonsense"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    assert "usage: tnt-kernels" in capsys.readouterr().err


def test_runs_as_a_module():
    command = [sys.executable, "-m", "tnt_kernels", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["tnt_kernels", tnt_kernels.__version__]
