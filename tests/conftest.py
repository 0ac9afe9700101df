from __future__ import annotations

import pytest
import torch
from oracle import BACKENDS, MISSING


def pytest_configure() -> None:
    """Small tensors, maybe several workers of pytest-xdist: threads would be in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param in MISSING:
        pytest.skip(MISSING[request.param])
    return request.param


@pytest.fixture
def cpu() -> str:
    """The compiled kernels, for what the other backend does not promise."""
    if "cpu" in MISSING:
        pytest.skip(MISSING["cpu"])
    return "cpu"
