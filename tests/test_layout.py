"""What two files must agree on, and the public names."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tnt_kernels as tnt
from tnt_kernels import backends
from tnt_kernels.objectives import METHODS, RowLoss

CSRC = Path(__file__).parents[1] / "csrc"


@pytest.mark.skipif(not CSRC.is_dir(), reason="no C++ sources next to the tests")
def test_row_losses_are_numbered_alike_in_python_and_cpp() -> None:
    header = (CSRC / "row_math.h").read_text()
    body = re.search(r"enum RowLoss : int \{(.*?)\};", header, re.DOTALL)
    assert body
    values = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", body[1])}
    assert values == {loss.name: loss.value for loss in RowLoss}


@pytest.mark.skipif(not CSRC.is_dir(), reason="no C++ sources next to the tests")
@pytest.mark.parametrize("name", ["ROW_COEFFICIENTS", "ROW_STATISTICS", "ROW_PARTS"])
def test_numbers_of_a_row_are_counted_alike_in_python_and_cpp(name: str, cpu: str) -> None:
    from tnt_kernels import _C

    count = re.search(rf"{name} = (\d+);", (CSRC / "params.h").read_text())
    assert count
    assert int(count[1]) == getattr(backends.call, name) == getattr(_C, name)


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
    assert list(availability) == ["cpu", "triton", "cuda", "torch"]
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
