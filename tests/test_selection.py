"""Which backend ``backend=None`` takes on GPUs, without one: from a description of the logits."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tnt_kernels import backends, tuning
from tnt_kernels._call import RowCall
from tnt_kernels._scalars import Scalars
from tnt_kernels.backends import cuda, triton
from tnt_kernels.backends.triton.config import RowConfig, row_config
from tnt_kernels.bench.steps import library_backends
from tnt_kernels.objectives import resolve_method

TOO_OLD = "CUDA: no device: CUDA driver version is insufficient for CUDA runtime version"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def logits(dtype: torch.dtype = torch.bfloat16, vocab: int = 128256, device: str = "cuda:0") -> Any:
    where = torch.device(device)
    return SimpleNamespace(
        device=where, is_cpu=where.type == "cpu", dtype=dtype, size=lambda dim: vocab
    )


class Machine:
    """What the kernels and torch are asked about its GPU."""

    def __init__(self) -> None:
        self.capability, self.failure, self.asked = (9, 0), "", 0

    def why_not_cuda(self, index: int) -> str:
        self.asked += 1
        return self.failure


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine()
    monkeypatch.delenv("TNT_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(cuda, "module", machine)
    monkeypatch.setattr(cuda, "_missing", "")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: machine.capability)
    caches = (cuda._reason, cuda._failure, cuda._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield machine
    for cache in caches:
        cache.cache_clear()


def scalars(method: str = "tnff", **others: Any) -> Scalars:
    objective = resolve_method(method)
    return Scalars(int(objective.positive_loss), int(objective.negative_loss), **others)


def select(
    of: Any,
    requested: str | None = None,
    numbers: Scalars | None = None,
    sharded: bool = False,
    differences: bool = False,
) -> str:
    numbers = scalars() if numbers is None else numbers
    return backends.select(of, requested, numbers, sharded, differences)


def test_cuda_serves_what_it_reads_once(machine: Machine) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for method in ("tnff", "tnrr", "tnfll", "ul+ll"):
            assert select(logits(dtype), None, scalars(method)) == "cuda"
        assert select(logits(dtype), None, scalars(reduction="sum")) == "cuda"
    assert select(logits(torch.float32), differences=True) == "cuda"
    assert machine.asked == 1


def test_triton_serves_what_both_read_twice(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case in (
        (logits(torch.float16),),
        (logits(), None, scalars(reduction="none")),
        (logits(), None, scalars(uniform_smoothing=True)),
        (logits(), None, scalars("nl+ll")),
        (logits(), None, None, True),
        (logits(torch.bfloat16), None, None, False, True),
    ):
        assert select(*case) == "triton"
    machine.capability = (8, 9)  # without clusters
    assert select(logits()) == "triton"
    # CUDA serves them all the same, where there is no Triton or where it is asked for.
    monkeypatch.setattr(triton, "why_not", lambda logits: "not installed")
    assert select(logits()) == "cuda"
    assert select(logits(torch.float16), "cuda") == "cuda"


def test_what_cuda_does_not_serve_is_passed_on_without_a_word(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(logits(torch.float64)) == "torch"
        assert select(logits(vocab=2**19 + 1)) == "triton"
        assert select(logits(device="xpu:0")) == "triton"
        machine.capability = (7, 5)
        cuda._reason.cache_clear()
        assert select(logits()) == "triton"
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert select(logits()) == "triton"
        monkeypatch.setattr(cuda, "_missing", "no nvcc at installation")
        assert select(logits()) == "triton"
    assert machine.asked == 0


def test_a_driver_too_old_is_said_once(machine: Machine) -> None:
    machine.failure = TOO_OLD
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert select(logits()) == "triton"
    (warning,) = seen
    assert "the CUDA kernels are built, but fail on cuda:0" in str(warning.message)
    assert "driver version is insufficient" in str(warning.message)
    assert machine.asked == 1


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_cuda_by_name_is_asked_once(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    machine.capability = capability
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert select(logits(dtype), "cuda") == "cuda"
    monkeypatch.setenv("TNT_KERNELS_BACKEND", "cuda")
    assert select(logits()) == "cuda"
    assert select(logits(), "triton") == "triton"
    assert machine.asked == 1


def test_both_gpu_backends_are_measured(machine: Machine) -> None:
    """By the benchmarks, in one run; CUDA first."""
    assert library_backends(logits()) == ["cuda", "triton"]


def test_cuda_by_name_fails_where_it_cannot_serve(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(why: str, **described: Any) -> None:
        cuda._reason.cache_clear()
        with pytest.raises(RuntimeError, match=rf"^backend='cuda' cannot serve .*{why}"):
            select(logits(**described), "cuda")

    refused("float32, bfloat16 and float16", dtype=torch.float64)
    refused("up to 524288 columns", vocab=2**19 + 1)
    refused("NVIDIA", device="xpu:0")
    machine.capability = (7, 5)
    refused("capability 8.0 or later, cuda:0 has 7.5")
    assert machine.asked == 0
    machine.capability, machine.failure = (8, 0), TOO_OLD
    refused("driver version is insufficient")
    monkeypatch.setenv("TNT_KERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"^TNT_KERNELS_BACKEND='cuda' cannot serve"):
        select(logits())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    refused("NVIDIA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "NVIDIA" in cuda.why_not(None)
    monkeypatch.setattr(cuda, "_missing", "no nvcc at installation")
    refused("no nvcc")


def test_launch_options_of_every_kind_of_gpu() -> None:
    """Triton refuses an option that its compiler for that GPU does not know, and only NVIDIA's knows this one."""
    for architecture, expected in (
        ("sm_90", {"num_warps": 8, "maxnreg": 255}),
        ("gfx942", {"num_warps": 4}),
        ("xpu", {"num_warps": 8}),
    ):
        assert triton.options(RowConfig(2048, 8, 1), architecture) == expected


def test_a_search_s_best_is_what_launches_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the command's table, for rows of the same kind alone; without it, the measured settings."""
    testing = importlib.import_module("triton.testing")
    errors = importlib.import_module("triton.errors")
    tried: list[tuple[RowConfig, RowCall]] = []

    def do_bench(call: Callable[[], None], return_mode: str) -> float:
        call()
        if tried[-1][0].warps == 32:
            raise errors.TritonError("out of resources")
        return 1.0 if tried[-1][0].warps == 16 else 2.0

    monkeypatch.setattr(testing, "do_bench", do_bench)
    monkeypatch.setattr(triton, "launch", lambda call, config: tried.append((config, call)))
    cpu = functools.partial(tuning.search, rows=2, device="cpu")
    monkeypatch.setattr(tuning, "search", cpu)
    table = tmp_path / "table.json"
    table.write_text('{"of another GPU": [128, 4, 1]}')
    tuning.main(["--out", str(table), "--vocab", "50"])
    expected = [
        (config, kind == "KL", gradient)
        for dtype in tuning.DTYPES
        for kind, gradient in itertools.product(("KL", "one row"), (True, False))
        for config in tuning.candidates(kind, dtype)
    ]
    assert expected == [
        (config, call.tensors.ref_logits is not None, call.gradient is call.logits)
        for config, call in tried
    ]
    best = next(x for x in tuning.candidates("KL", torch.bfloat16) if x.warps == 16)
    rows = {"kind": "KL", "gradient": False, "ids": False, "architecture": "cpu"}
    usual = row_config(50, 2, **rows)
    monkeypatch.setenv("TNT_KERNELS_TUNING", str(table))
    assert row_config(50, 2, **rows) == row_config(64, 2, **rows) == best != usual
    assert row_config(50, 2, **{**rows, "ids": True}) == usual
    assert json.loads(table.read_text())["of another GPU"] == [128, 4, 1]


def test_one_device_that_serves_is_enough(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = [(7, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert cuda.why_not(None) == ""
    capabilities[1] = (7, 5)
    cuda._reason.cache_clear()
    assert "compute capability" in cuda.why_not(None)


def test_a_compiler_traces_the_question(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes from the kernels' own runtime: for fullgraph=True it has to be a constant."""
    native = pytest.importorskip("tnt_kernels._C")
    if hasattr(native, "why_not_cuda"):
        monkeypatch.setattr(cuda, "module", native)

    def step(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if cuda._why_not_device(99) else x + 2

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == (1 if hasattr(native, "why_not_cuda") else 2)
