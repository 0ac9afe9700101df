"""What every process of the tests begins with, those that a test spawns included."""

from __future__ import annotations

import os

import torch


def prepare() -> None:
    """One thread, for tensors are small, and there may be several workers of pytest-xdist.

    Fresh memory is NaN, or the largest integer: what is read before it is written shows. PyTorch fills it in its
    deterministic mode alone, for which cuBLAS wants to be told how much memory it may use.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
