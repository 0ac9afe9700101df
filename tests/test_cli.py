"""The command line."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import tnt_kernels
from tnt_kernels import _build_info, cli
from tnt_kernels.backends import cuda


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
    assert ("CUDA kernels compiled for " in text) == hasattr(native, "run_rows_cuda")


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (_build_info.BuildInfo(cuda_missing="no nvcc"), "none: no nvcc"),
        (_build_info.BuildInfo(cuda_architectures=("8.0", "9.0+PTX")), "compiled for 8.0, 9.0+PTX"),
    ],
)
def test_info_tells_of_the_cuda_kernels(build, text, monkeypatch):
    pytest.importorskip("tnt_kernels._C")
    monkeypatch.setattr(_build_info, "load", lambda: build)
    assert ("CUDA kernels", text) in cli.info()


def test_info_tells_how_rows_are_spread_over_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "why_not", lambda logits: "no GPU")
    assert cli.plans() == [("rows on a GPU", "not known: no GPU")]
    monkeypatch.setattr(cuda, "why_not", lambda logits: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    asked = []

    def plan(dtype, vocab, pair, device):
        asked.append((dtype, vocab, pair, device))
        return cuda.Plan(8, 256, 68 * 1024, 45) if vocab < 2**18 else cuda.Plan(0, 0, 0, 0)

    monkeypatch.setattr(cuda, "plan", plan)
    assert cli.main(["info", "--gpu"]) == 0
    text = capsys.readouterr().out
    assert "8 blocks of 256 threads a row, 68.0 KiB each; 45 rows at a time" in text
    assert "read twice" in text
    assert (torch.bfloat16, 128256, True, 0) in asked


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


def test_bench_measures_and_says_what_it_means(tmp_path, capsys, monkeypatch):
    from tnt_kernels.bench import cli as bench

    monkeypatch.setattr(bench, "TINY_CASES", ((bench.Size(8, 300, "float32"), ("ul+ll",)),) * 2)
    steps = bench.steps
    monkeypatch.setattr(
        bench, "steps", lambda problem, method, first: steps(problem, method, False)
    )
    out = tmp_path / "bench.json"
    assert cli.main(["bench", "--tiny", "--device", "cpu", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "tnt_loss, in place" in text
    results = json.loads(out.read_text())
    assert {r["contender"] for r in results["cases"]} == {"in place", "fresh", "naive"}
    assert all(r["gradient_error"] < 1e-4 and r["ms_min"] > 0 for r in results["cases"])
    # Nothing is begun when the time is over, and that is said.
    assert cli.main(["bench", "--tiny", "--device", "cpu", "--seconds", "-1"]) == 0
    assert capsys.readouterr().out.count("left out, the time is over: 8x300-float32") == 2


def test_bench_verdicts():
    from tnt_kernels.bench.cli import verdict

    ours = {"backend": "cpu", "contender": "fresh", "ms_min": 2.0, "bytes_beyond_inputs": 5}
    naive = {"backend": None, "contender": "naive", "ms_min": 8.0, "bytes_beyond_inputs": 9}
    assert verdict(ours, [naive]) == "4.0x as fast as naive, less memory"
    assert verdict({**ours, "ms_min": 16.0}, [naive]) == "SLOWER than naive: 0.50x, less memory"
    assert verdict({**ours, "bytes_beyond_inputs": 10}, [naive]).endswith("MORE memory")
    assert (
        verdict({**ours, "failed": "ValueError: wrong gradient"}, [naive])
        == "ValueError: wrong gradient"
    )
    assert (
        verdict(ours, [{"backend": None, "contender": "compiled", "failed": "x"}])
        == "nothing to compare with"
    )
