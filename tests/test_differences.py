"""Calls whose logits are the policy's minus the reference's."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from differences import check_close_models, check_differences, pair
from oracle import DTYPES, OBJECTIVES
from shards import launched

import tnt_kernels as tnt


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 17, 2500])
def test_every_loss(vocab: int, dtype: torch.dtype, backend: str) -> None:
    for smoothing, objective in itertools.product(("negatives", "uniform"), OBJECTIVES):
        for gap in (0, 3):
            check_differences(vocab, dtype, backend, gap, method=objective, smoothing=smoothing)
    for objective in (tnt.METHODS["tnrll"], tnt.METHODS["tnff"]):
        check_differences(
            vocab, dtype, backend, method=objective, temperature=0.7, negative_ids=None
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_difference_is_no_loss(dtype: torch.dtype, backend: str) -> None:
    _, batch = pair(2500, dtype)
    batch = replace(
        batch,
        logits=torch.zeros_like(batch.logits),
        labels=batch.labels.clamp(0, 2499),
        weights=torch.ones(len(batch.labels)),
    ).with_options(negative_ids=None)
    for method in ("tnff", "tnrr"):
        result = launched(
            backend, batch.with_options(method=method), reduction="none", differences=True
        )
        active = batch.ref_logits.isfinite().all(1)
        assert active.sum() > 5
        assert (result.loss[active] == 0).all()
        assert (result.gradient[active] == 0).all()


@pytest.mark.parametrize("method", ["tnff", "tnrr"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_close_models(dtype: torch.dtype, method: str, backend: str) -> None:
    check_close_models(dtype, backend, method)
