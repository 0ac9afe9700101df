"""The CUDA backend on a GPU; skipped without one. tests/test_cuda_model.py judges the same kernels on a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import hard_rows
import pytest
import torch
from fuzz import Disagreement, GpuCall, assert_none
from oracle import (
    BF16,
    F16,
    F32,
    OBJECTIVES,
    Batch,
    Result,
    assert_agrees,
    mixed_batch,
    on_cpu,
    on_gpu,
    run,
    truth,
)
from shards import cuts, run_shards

import tnt_kernels as tnt
from tnt_kernels.backends import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(cuda.why_not(None)), reason=cuda.why_not(None) or "runs"),
]


PARTS = 16  # of the random calls: most of their time is the oracle's, on the CPU


def gpu_run(batch: Batch, **keywords: object) -> Result:
    return on_cpu(run(on_gpu(batch), "cuda", **keywords))  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", ["negatives", "uniform"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("vocab", [17, 32003, 128256, 262144])
def test_agreement(vocab: int, dtype: torch.dtype, smoothing: str) -> None:
    for objective in OBJECTIVES:
        batch = mixed_batch(vocab, dtype).with_options(method=objective, smoothing=smoothing)
        result = gpu_run(batch)
        assert_agrees(result, truth(batch), batch, label=f"{objective}")
        again = gpu_run(batch)
        assert torch.equal(result.loss, again.loss)
        assert torch.equal(result.gradient.nan_to_num(7.0), again.gradient.nan_to_num(7.0))


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part: int) -> None:
    """Against the oracle that shares no code with the library."""
    failures = []
    for index in range(part, 800, PARTS):
        try:
            GpuCall(0, index).check("cuda", device="cuda")
        except Disagreement as error:
            failures.append(str(error))
    assert_none(failures)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_hard_rows(dtype: torch.dtype) -> None:
    """Any finite logit is a logit, one side may be shifted, and one rule says what is broken."""
    for reduction in ("mean", "none"):
        hard_rows.assert_known(
            partial(gpu_run, reduction=reduction, return_stats=True), dtype, reduction
        )
    for batches in (hard_rows.masks, hard_rows.shifts, hard_rows.broken):
        for batch in itertools.chain(batches(dtype, 803), batches(dtype, 20011)):
            result = gpu_run(batch, return_stats=True)
            label = f"{batches.__name__} {batch.options['method']}"
            assert_agrees(result, truth(batch), batch, label=label)


# Few and small enough for `compute-sanitizer python -m pytest tests/test_cuda.py -k small`.


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("offset", [0, 3])
def test_small_rows(offset: int, dtype: torch.dtype) -> None:
    """One block and a cluster of them, aligned or not; a gradient now and later."""
    upstream = torch.linspace(-1, 2, 12)
    for vocab, objective in itertools.product((17, 3001, 60001), OBJECTIVES[:4]):
        batch = mixed_batch(vocab, dtype).with_options(method=objective)
        wide = torch.zeros(12, vocab + 5, dtype=dtype)
        wide[:, offset : offset + vocab] = batch.logits
        moved = Batch(wide.cuda()[:, offset : offset + vocab], *_rest(on_gpu(batch)))
        for reduction, per_row in (("mean", None), ("none", upstream)):
            up = None if per_row is None else per_row.cuda()
            result = on_cpu(run(moved, "cuda", reduction=reduction, upstream=up, return_stats=True))
            assert_agrees(result, truth(batch), batch, reduction=reduction, upstream=per_row)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_small_shards(dtype: torch.dtype) -> None:
    upstream = torch.linspace(-1, 2, 12)
    for smoothing, objective in itertools.product(("negatives", "uniform"), OBJECTIVES):
        batch = mixed_batch(3001, dtype).with_options(method=objective, smoothing=smoothing)
        for sizes, (reduction, per_row) in itertools.product(
            cuts(3001), (("mean", None), ("none", upstream))
        ):
            up = None if per_row is None else per_row.cuda()
            result = on_cpu(
                run_shards(on_gpu(batch), "cuda", sizes, reduction=reduction, upstream=up)
            )
            label = f"{objective} {smoothing} {sizes}"
            assert_agrees(
                result, truth(batch), batch, reduction=reduction, upstream=per_row, label=label
            )


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_large_shards(dtype: torch.dtype) -> None:
    for method in ("tnff", "tnrr", "ul+ll"):
        batch = mixed_batch(128256, dtype).with_options(method=method)
        result = on_cpu(run_shards(on_gpu(batch), "cuda", (64128, 64000, 128)))
        assert_agrees(result, truth(batch), batch, label=method)


def _rest(batch: Batch) -> tuple[object, ...]:
    return batch.ref_logits, batch.labels, batch.weights, batch.options


def test_more_than_2_to_the_31_elements() -> None:
    rows, vocab = 17000, 128256
    z = torch.randn(1, vocab, device="cuda", dtype=BF16).expand(rows, vocab).contiguous()
    labels = torch.full((rows,), 5, device="cuda")
    loss = tnt.tnt_loss(
        z, z[:1].expand(rows, vocab), labels, -torch.ones(rows, device="cuda"), reduction="none",
        backend="cuda",
    )  # fmt: skip
    assert torch.equal(loss, loss[:1].expand(rows))
    assert loss[0] > 0


@pytest.fixture
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device(no_sync: None) -> None:
    logits = torch.randn(8, 1000, device="cuda", requires_grad=True)
    labels = torch.arange(8, device="cuda")
    tnt.tnt_loss(logits, logits.detach(), labels, backend="cuda").backward()


def test_graph_capture_on_a_stream_of_its_own() -> None:
    logits, reference = torch.randn(2, 8, 5000, device="cuda")
    labels = torch.arange(8, device="cuda")
    want = tnt.tnt_loss(logits, reference, labels, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tnt.tnt_loss(logits, reference, labels, backend="cuda")
    graph.replay()
    assert torch.equal(got, want)


def test_every_device() -> None:
    for index in range(torch.cuda.device_count()):
        z, r = torch.randn(2, 4, 1000, device=f"cuda:{index}")
        loss = tnt.tnt_loss(z, r, torch.zeros(4, dtype=torch.long, device=z.device), backend="cuda")
        assert loss.device == z.device
        assert loss.item() > 0
