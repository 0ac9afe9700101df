"""The authors' own numbers (``golden/``) through the public function, on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import F32, F64
from torch import Tensor

import tnt_kernels as tnt
from tnt_kernels.objectives import METHODS

FILE = Path(__file__).parent / "golden" / "t5patches.npz"
NAMES = {"NL": "nl+ll", "UL": "ul+ll"}
#: Theirs smooth with ε = 1e-6, always uniformly; the others do not.
SMOOTHED = ("TNRR", "TNRF", "TNRLL")


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    with np.load(FILE) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def entropy_of_target(ref: Tensor, labels: Tensor, weights: Tensor, eps: float) -> Tensor:
    """Their forward KL is a cross-entropy: this much more, on rows that have one."""
    q = ref.softmax(-1)
    left = q.gather(-1, labels[..., None]) * (weights >= 0)[..., None]
    q = q.scatter(-1, labels[..., None], left)
    q = (q / q.sum(-1, keepdim=True) + eps) / (1 + q.size(-1) * eps)
    return -torch.xlogy(q, q).sum(-1)


@pytest.mark.parametrize("case", ["0", "1", "2"])
@pytest.mark.parametrize("name", ["NL", "UL", "TNFF", "TNRR", "TNRF", "TNFLL", "TNRLL"])
def test_golden(name: str, case: str, arrays: dict[str, Tensor], backend: str) -> None:
    logits, ref, labels, weights, alpha = (
        arrays[f"{case}/{key}"] for key in ("logits", "ref_logits", "labels", "weights", "alpha")
    )
    assert logits.dtype == F64
    method = METHODS[NAMES.get(name, name.lower())]
    eps = 1e-6 if name in SMOOTHED else 0.0
    keywords: dict[str, Any] = {
        "method": method,
        "alpha": float(alpha),
        "eps": eps,
        "smoothing": "uniform" if eps else "negatives",
        "backend": backend,
    }
    forward = torch.where(
        weights < 0, method.negative == "forward_kl", method.positive == "forward_kl"
    )
    factor = torch.where(weights < 0, float(alpha), weights)
    constant = torch.where(forward, entropy_of_target(ref, labels, weights, eps) * factor, 0.0)
    expected, expected_grad = arrays[f"{case}/{name}/loss"], arrays[f"{case}/{name}/grad"]
    assert set(weights.unique().tolist()) > {-1.0, 1.0}

    for dtype, tolerance in ((F64, 1e-12), (F32, 3e-5)):
        for reduction in ("none", "sum"):
            leaf = logits.detach().to(dtype).requires_grad_()
            reference = ref.to(dtype)
            loss = tnt.tnt_loss(leaf, reference, labels, weights, reduction=reduction, **keywords)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            assert loss.dtype == dtype
            if reduction == "none":
                got, want = loss.detach().double() + constant, expected
            else:
                got, want = loss.detach().double() + constant.sum(), expected.sum()
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(
                gradient.double(), expected_grad, rtol=tolerance, atol=tolerance
            )
