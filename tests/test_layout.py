"""What two files must agree on, and the public names."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracle import DTYPES, Tagged, identical, mixed_batch
from shards import prepared
from torch import nn

import tnt_kernels as tnt
from tnt_kernels import _call, _scalars, backends
from tnt_kernels.backends import native
from tnt_kernels.objectives import METHODS, RowLoss

CSRC = Path(__file__).parents[1] / "csrc"


@pytest.mark.skipif(not CSRC.is_dir(), reason="no C++ sources next to the tests")
@pytest.mark.parametrize(
    ("header", "name", "expected"),
    [
        ("row_rules.h", "RowLoss", {loss.name: loss.value for loss in RowLoss}),
        ("call.h", "Kind", {kind.name: kind.value for kind in _call.Kind}),
        ("call.h", "Reduction", {x.upper(): i for i, x in enumerate(_scalars.REDUCTIONS)}),
    ],
    ids=["RowLoss", "Kind", "Reduction"],
)
def test_names_have_the_same_numbers_in_python_and_cpp(
    header: str, name: str, expected: dict[str, int]
) -> None:
    text = (CSRC / header).read_text()
    body = re.search(rf"enum (?:class )?{name} : int {{(.*?)}};", text, re.DOTALL)
    assert body
    assert {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", body[1])} == expected


@pytest.mark.skipif(not CSRC.is_dir(), reason="no C++ sources next to the tests")
def test_dtypes_come_in_the_same_order_in_python_and_cpp() -> None:
    body = re.search(r"#define TNT_DTYPES(.*?[^\\])\n", (CSRC / "call.h").read_text(), re.DOTALL)
    assert body
    names = [f"torch.{name}" for name in re.findall(r"\(\w+, (\w+)\)", body[1])]
    assert names == [str(dtype) for dtype in _call.LOGITS_DTYPES]


@pytest.mark.parametrize(
    "name", ["ROW_COEFFICIENTS", "ROW_STATISTICS", "ROW_PARTIAL_SUMS", "ROW_DIAGNOSTICS"]
)
def test_numbers_of_a_row_are_counted_alike_in_python_and_cpp(name: str, cpu: str) -> None:
    from tnt_kernels import _C

    assert getattr(_call, name) == getattr(_C, name)


def test_diagnostics_are_those_of_the_public_record() -> None:
    assert len(tnt.RowStats._fields) == _call.ROW_DIAGNOSTICS


@pytest.mark.parametrize("record", [_call.RowCall, _call.RowTensors, _scalars.Scalars])
def test_the_fields_of_a_call_come_in_the_same_order_in_python_and_cpp(
    record: type[NamedTuple], cpu: str
) -> None:
    from tnt_kernels import _C

    name = re.sub(r"(?<!^)(?=[A-Z])", "_", record.__name__).upper()
    assert getattr(_C, f"{name}_FIELDS") == list(record._fields)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_read_alike_by_dlpack_and_by_attributes(
    dtype: torch.dtype, cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DLPack's exchange API, where PyTorch has it, tells of plain tensors; attributes tell of others."""
    for shared, reduction in itertools.product((False, True), ("mean", "none")):
        batch = mixed_batch(37, dtype)
        ids = torch.tensor([3, 36, -1]) if shared else batch.options["negative_ids"]
        batch = batch.with_options(negative_ids=ids, alpha=torch.tensor(2.0))
        rows, real = len(batch.logits), _call.real_dtype(batch.logits)
        logits = torch.zeros(rows, 50, dtype=dtype)[:, 5:42].copy_(batch.logits)
        call = prepared(replace(batch, logits=logits), cpu, reduction)
        shape = (rows,) if reduction == "none" else ()
        results = []
        for tagged in (False, True):

            def read(x: Any, tagged: bool = tagged) -> Any:
                return x.as_subclass(Tagged) if tagged and x is not None else x

            loss, gradient = torch.empty(shape, dtype=real), torch.empty(rows, 41, dtype=dtype)
            launch = _call.RowCall(
                _call.Kind.FUSED, read(logits), _call.RowTensors(*map(read, call.tensors)), call.scalars, 0, 37,
                loss=read(loss), gradient=read(gradient[:, :37]),
            )  # fmt: skip
            with monkeypatch.context() as patch:
                if not tagged and hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
                    patch.setattr(torch.Tensor, "data_ptr", None)
                backends.BACKENDS[cpu].launch(launch)
            results.append((loss, gradient[:, :37]))
        assert identical(*results)


def test_what_is_no_call_is_refused(cpu: str) -> None:
    from tnt_kernels import _C

    for other in (None, (), "call"):
        with pytest.raises(TypeError, match=r"expected a tnt_kernels\._call\.RowCall"):
            _C.run_rows(other, 1)


@pytest.mark.parametrize("name", ["ROW_CALL_FIELDS", "SCALARS_FIELDS"])
def test_a_module_of_other_fields_is_stale(
    name: str, cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tnt_kernels import _C

    monkeypatch.setattr(_C, name, getattr(_C, name)[1:])
    module, missing = native._load()
    assert module is None
    assert re.fullmatch(r"tnt_kernels\._C is stale: .*; install tnt_kernels again", missing)


def test_the_stubs_know_the_compiled_module(cpu: str) -> None:
    """Every attribute, every function with as many arguments; those for CUDA where they are built."""
    from tnt_kernels import _C

    body = ast.parse(Path(tnt.__file__).with_name("_C.pyi").read_text()).body
    stubs = {
        node.name: len(node.args.posonlyargs) + len(node.args.args)
        for node in body
        if isinstance(node, ast.FunctionDef)
    }
    attributes = {
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    public = {name for name in dir(_C) if not name.startswith("__")}
    functions = {name for name in public if callable(getattr(_C, name))}
    assert attributes == public - functions
    assert functions <= set(stubs)
    if hasattr(_C, "run_rows_cuda"):
        assert set(stubs) == functions
    for name in functions:
        signature = (getattr(_C, name).__doc__ or "").partition(" -> ")[0]
        assert signature.count(": ") == stubs[name], name


def test_import_is_light() -> None:
    """Neither transformers nor triton, and no compiler of torch."""
    script = (
        "import json, sys, torch; before = set(sys.modules); import tnt_kernels; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    new = json.loads(done.stdout)
    heavy = ("transformers", "triton", "accelerate", "tokenizers", "matplotlib", "pandas", "tqdm")
    heavy += ("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "setuptools")
    assert not [name for name in new if name.startswith(heavy)]


def test_public_names() -> None:
    names = ("tnt_loss", "TNTLoss", "linear_tnt_loss", "LinearTNTLoss", "Objective", "METHODS")
    for name in (*names, "RowStats", "__version__"):
        assert name in tnt.__all__
        assert getattr(tnt, name).__class__ is not None
    assert issubclass(tnt.TNTLoss, nn.Module)
    assert issubclass(tnt.LinearTNTLoss, nn.Module)
    assert tnt.METHODS is METHODS
    assert list(METHODS) == ["tnff", "tnrr", "tnrf", "tnfr", "tnfll", "tnrll", "nl+ll", "ul+ll"]
    assert tnt.Objective() == tnt.Objective(positive="forward_kl", negative="reverse_kl")
    assert tnt.Objective._fields == ("positive", "negative")


def test_signature() -> None:
    """Names, order, defaults: users, tests and benchmarks rely on them."""
    parameters = inspect.signature(tnt.tnt_loss).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {
        "weights": None,
        "method": "tnff",
        "alpha": 1.0,
        "negative_ids": None,
        "eps": 1e-6,
        "smoothing": "negatives",
        "nl_floor": None,
        "temperature": 1.0,
        "ignore_index": -100,
        "reduction": "mean",
        "normalizer": None,
        "inplace": False,
        "return_stats": False,
        "group": None,
        "shard_sizes": None,
        "backend": None,
    }
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["logits", "ref_logits", "labels", "weights"]
    assert all(p.kind is p.KEYWORD_ONLY for n, p in parameters.items() if n not in positional)


def test_all_backends_are_known() -> None:
    availability = backends.availability()
    assert list(availability) == ["cpu", "cuda", "triton", "torch"]
    assert availability["torch"] == ""


def test_the_example_of_the_docstring_of_the_module() -> None:
    """A call as the design writes it, with nothing but the four tensors."""
    logits = torch.randn(2, 3, 7, requires_grad=True)
    ref_logits = torch.randn(2, 3, 7)
    labels = torch.randint(7, (2, 3))
    weights = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -1.0]])
    loss, stats = tnt.tnt_loss(logits, ref_logits, labels, weights, return_stats=True)
    loss.backward()
    assert loss.shape == ()
    assert logits.grad is not None
    assert isinstance(stats, tnt.RowStats)
    assert stats.kl.shape == (2, 3)
