"""Whether a gradient is right: no time is taken of a contender that computes something else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tnt_kernels.bench.contenders import gradient_scale
from tnt_kernels.bench.problem import Problem
from tnt_kernels.objectives import METHODS
from tnt_kernels.reference import row_gradients, row_terms

#: Of a row's largest entry: half an ulp of the stored dtype, and what float32 arithmetic loses.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-8 + 1e-4, torch.float16: 2.0**-11 + 1e-4}

#: (problem, rows) to what these rows contribute to the mean loss, and their gradients, in float64
Truth = Callable[[Problem, Tensor], tuple[Tensor, Tensor]]


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


def gradient_error(gradient: Tensor, problem: Problem, truth: Truth) -> float:
    """The largest error of an entry as a share of its row's largest one, over a few rows: two of each sign of weight
    that occurs, and the last.

    A row of weight 0 has an error of 0 or of infinity. NaN is infinity.
    """
    signs = problem.weights.sign()
    rows = torch.cat(
        [(signs == s).nonzero()[:2, 0] for s in (-1, 0, 1)] + [signs.new_tensor([-1]).long()]
    )
    exact = truth(problem, rows)[1] * gradient_scale(problem)
    errors = (gradient[rows].double() - exact).abs().amax(-1) / exact.abs().amax(-1)
    still = (gradient[rows] == 0).all(-1) & (exact == 0).all(-1)
    return float(errors.masked_fill(still, 0.0).nan_to_num(nan=torch.inf).amax())


def check_gradient(
    gradient: Tensor, problem: Problem, method: str, tolerance: float | None = None
) -> float:
    """Returns ``gradient_error``.

    Raises:
        AssertionError: it is above ``tolerance``, by default that of the gradient's dtype.
    """
    error = gradient_error(gradient, problem, lambda problem, rows: expected(problem, method, rows))
    allowed = TOLERANCE[gradient.dtype] if tolerance is None else tolerance
    assert error <= allowed, (
        f"gradient off by {error:.3g} of its largest entry, allowed {allowed:.3g}"
    )
    return error
