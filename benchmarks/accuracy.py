"""Relative error of loss and gradient against float64, on random logits and near p = q, where training starts.

``python -m benchmarks.accuracy`` prints the table's figures as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from tnt_kernels.bench.contenders import forward, gradient_scale, training_step
from tnt_kernels.bench.oracle import expected
from tnt_kernels.bench.problem import Problem, Size, make_problem
from tnt_kernels.bench.steps import Step, library_step

SIZE = Size(64, 32000, "float32")
QUICK_SIZE = Size(8, 2000, "float32")
#: Standard deviation of what the policy's logits differ by. None: logits that have nothing to do with the reference's.
DISTANCES = (None, 1e-1, 1e-2, 1e-3, 1e-4)
CONTENDERS = ("fresh", "naive", "naive, narrow")


def inputs(size: Size, distance: float | None, device: torch.device | str) -> Problem:
    """Rows without a removed token: one's loss would hide how near the others are to 0."""
    problem = make_problem(size, device, 0.0 if distance is None else distance).all_positive()
    if distance is None:
        problem.original.copy_(problem.original.roll(1, dims=0))
        problem.restore()
    return problem


def errors(step: Step, problem: Problem) -> dict[str, float]:
    """Of the mean loss, and of the gradient in the Euclidean norm."""
    rows = torch.arange(problem.size.rows, device=problem.logits.device)
    truth = step.truth or (lambda problem, rows: expected(problem, step.method, rows))
    losses, gradients = truth(problem, rows)
    problem.restore()
    loss = forward(step.loss, problem).double()
    problem.restore()
    gradient = training_step(step.loss, problem).double() / gradient_scale(problem)
    problem.restore()
    return {
        "loss_error": float((loss - losses.sum()).abs() / losses.sum()),
        "gradient_error": float((gradient - gradients).norm() / gradients.norm()),
    }


def measure(
    size: Size = SIZE,
    device: torch.device | str = "cpu",
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    methods: Sequence[str] = ("tnff", "tnrr"),
    steps: Sequence[Step] | None = None,
) -> list[dict[str, Any]]:
    """One record a contender, method, dtype and distance. ``steps``: None for ``CONTENDERS``."""
    found = []
    for dtype in dtypes:
        for distance in DISTANCES:
            problem = inputs(size._replace(dtype=dtype), distance, device)
            for method in methods:
                mine = steps or [library_step(c, method) for c in CONTENDERS]
                for step in mine:
                    if step.method != method or (
                        step.contender == "naive, narrow" and dtype == "float32"
                    ):
                        continue
                    record: dict[str, Any] = {
                        "contender": step.contender,
                        "backend": step.backend,
                        "method": method,
                        "distance": distance,
                        **problem.size._asdict(),
                    }
                    try:
                        record |= errors(step, problem)
                    except Exception as error:
                        record["failed"] = f"{type(error).__name__}: {error}"[:200]
                    found.append(record)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
