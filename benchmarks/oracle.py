"""Whether a gradient is right: no time is taken of a contender that computes something else."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.contenders import gradient_scale
from benchmarks.problem import Problem
from tnt_kernels.objectives import METHODS
from tnt_kernels.reference import row_gradients, row_terms

#: Of a row's largest entry: half an ulp of the stored dtype, and what float32 arithmetic loses.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-8 + 1e-4, torch.float16: 2.0**-11 + 1e-4}


def expected(problem: Problem, method: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What the rows contribute to the mean loss, and their gradients, in float64."""
    ids = problem.negative_ids
    arguments = (
        problem.original[rows].double(),
        problem.ref_logits[rows].double(),
        problem.labels[rows],
        problem.weights[rows].double(),
    )
    ids = ids[rows] if ids is not None and ids.dim() == 2 else ids
    terms = row_terms(*arguments, objective=METHODS[method], negative_ids=ids)
    gradients = row_gradients(*arguments, objective=METHODS[method], negative_ids=ids)
    factor = terms.scale / (problem.weights != 0).sum()
    return terms.loss * factor, gradients * factor[:, None]


def check_gradient(gradient: Tensor, problem: Problem, method: str) -> None:
    """Compares a few rows: two of each sign of weight that occurs.

    Raises:
        AssertionError: a row differs by more than ``TOLERANCE``.
    """
    signs = problem.weights.sign()
    rows = torch.cat([(signs == s).nonzero()[:2, 0] for s in (-1, 0, 1)])
    _, truth = expected(problem, method, rows)
    truth *= gradient_scale(problem)
    largest = truth.abs().amax(-1)
    error = (gradient[rows].double() - truth).abs().amax(-1)
    allowed = TOLERANCE[gradient.dtype] * largest
    assert bool((error <= allowed).all()), (
        f"gradient off by {error.tolist()}, allowed {allowed.tolist()}"
    )
