"""What only a GPU can show, for every backend that runs on one: nothing waits for it, CUDA graphs, NCCL.

tests/test_triton.py and tests/test_cuda.py hold what is particular to one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import BF16, F16, F32, INTERPRETED, OBJECTIVES, identical, mixed_batch, on_gpu
from ranks import columns, needs_nccl, run_cases
from shards import assert_rounds_its_gradient
from torch import Tensor

import tnt_kernels as tnt
from tnt_kernels import backends
from tnt_kernels._call import LossCall, RowTensors, Shard
from tnt_kernels._linear import chunks
from tnt_kernels._linear.sizes import Sizes
from tnt_kernels._operators import row_losses
from tnt_kernels._scalars import Scalars

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [F32, BF16, F16]
ROWS, HIDDEN, VOCAB = 24, 64, 5000


@pytest.fixture(params=["cuda", "triton"])
def gpu(request: pytest.FixtureRequest) -> str:
    logits = torch.empty(1, 8, device="cuda")
    why_not = backends.BACKENDS[request.param].why_not(logits)
    if why_not:
        pytest.skip(why_not)
    name: str = request.param
    return name


@pytest.fixture
def no_sync() -> Iterator[Callable[[], Any]]:
    """Makes waiting for the device an error, once it is called."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def inputs(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Both heads' tensors and rows of every kind; a quarter of them left out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to("cuda", dtype)

    ids = torch.randint(VOCAB, (ROWS, 3), generator=generator)
    ids[::2] = -1
    return {
        "hidden": normal(ROWS, HIDDEN),
        "weight": normal(VOCAB, HIDDEN) / 8,
        "ref_hidden": normal(ROWS, HIDDEN),
        "ref_weight": normal(VOCAB, HIDDEN) / 8,
        "labels": torch.randint(VOCAB, (ROWS,), generator=generator).cuda(),
        "weights": torch.tensor([1.0, -1.0, -0.3, 0.0]).repeat(ROWS // 4).cuda(),
        "negative_ids": ids.cuda(),
    }


def of_logits(x: dict[str, Tensor], **keywords: Any) -> list[Tensor]:
    """The loss and its gradient."""
    leaf = (x["hidden"] @ x["weight"].t()).detach().requires_grad_()
    ref_logits = x["ref_hidden"] @ x["ref_weight"].t()
    loss = tnt.tnt_loss(
        leaf * 1, ref_logits, x["labels"], x["weights"], negative_ids=x["negative_ids"], **keywords
    )
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]


def of_hidden(x: dict[str, Tensor], **keywords: Any) -> list[Tensor]:
    leaves = [x[name].detach().requires_grad_() for name in ("hidden", "weight")]
    active = ROWS * 3 // 4
    loss = tnt.linear_tnt_loss(
        *leaves, x["ref_hidden"], x["ref_weight"], x["labels"], x["weights"],
        negative_ids=x["negative_ids"], max_active_rows=active, chunk_size=7, **keywords,
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def of_shared_head(x: dict[str, Tensor], **keywords: Any) -> list[Tensor]:
    """As of LoRA; of bfloat16 with pairs of logits in 16 bits, too."""
    shared = {**x, "ref_weight": x["weight"]}
    found = of_hidden(shared, **keywords)
    if x["weight"].dtype == BF16:
        found += of_hidden(shared, logits_dtype=BF16, **keywords)
    return found


def assert_close(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    """As close as matmuls of another algorithm leave it."""
    tolerance = {F32: 1e-4, BF16: 3e-2, F16: 4e-3}[dtype]
    for a, b in zip(got, want, strict=True):
        scale = float(b.abs().max()) + 1e-6
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


STEPS = [
    (of_logits, {}),
    (of_logits, {"inplace": True, "method": "tnrf"}),
    (of_logits, {"reduction": "none", "method": "tnrr"}),
    (of_logits, {"method": "ul+ll", "reduction": "sum"}),
    (of_hidden, {}),
    (of_shared_head, {}),
    (of_shared_head, {"reduction": "none", "method": "tnrr"}),
    (of_hidden, {"reduction": "none", "softcap": 30.0, "method": "tnfll"}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("step", "keywords"), STEPS)
def test_nothing_waits_for_the_device(
    step: Any, keywords: dict[str, Any], dtype: torch.dtype, gpu: str, no_sync: Any
) -> None:
    x = inputs(dtype)
    want = step(x, backend=gpu, **keywords)  # compiles, loads kernels
    no_sync()
    got = step(x, backend=gpu, **keywords)
    torch.cuda.set_sync_debug_mode("default")
    assert identical(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("step", "keywords"), STEPS)
def test_forward_and_backward_in_a_cuda_graph(
    step: Any, keywords: dict[str, Any], dtype: torch.dtype, gpu: str
) -> None:
    """Captured once, replayed on other numbers."""
    static, other = inputs(dtype), inputs(dtype, seed=1)
    want = [step(x, backend=gpu, **keywords) for x in (static, other)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(static, backend=gpu, **keywords)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static, backend=gpu, **keywords)
    graph.replay()
    assert_close(captured, want[0], dtype)
    for name, x in other.items():
        static[name].copy_(x)
    graph.replay()
    assert_close(captured, want[1], dtype)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gradients_wait_for_large_matmuls(
    dtype: torch.dtype, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One matmul, or several that add to a float32 sum; a vocabulary that is no multiple of anything."""
    x = inputs(dtype)
    for name in ("weight", "ref_weight"):
        x[name] = x[name][: VOCAB - 3]
    x["labels"].clamp_(max=VOCAB - 4)
    x["negative_ids"].clamp_(max=VOCAB - 4)
    active, found = ROWS * 3 // 4, []
    for waiting in (active, 14, 7):
        sizes = Sizes(7, waiting, waiting == active)
        monkeypatch.setattr(chunks, "sizes_of", lambda *_, sizes=sizes: sizes)
        found.append(of_hidden(x, backend=gpu))
    for other in found[1:]:
        assert_close(other, found[0], dtype)


def test_a_gradient_in_bfloat16_of_float32_logits(gpu: str) -> None:
    """On chip and in two passes; Triton's compiler may contract other instructions with another store behind them."""
    for vocab, objective in itertools.product((17, 5000, 128256), OBJECTIVES):
        for smoothing in ("negatives", "uniform"):
            options = {"method": objective, "smoothing": smoothing}
            batch = on_gpu(mixed_batch(vocab).with_options(**options))
            assert_rounds_its_gradient(batch, gpu, rounding=2**-7 if gpu == "triton" else 0.0)


def test_a_trainer_s_step_does_not_wait_for_the_device(tmp_path: Path) -> None:
    """More often than its two models do."""
    pytest.importorskip("transformers")
    import warnings

    from hf_tiny import annotated, config, tiny

    trainer = tnt.hf.TNTTrainer(
        tiny("llama"), config(tmp_path, use_cpu=False), train_dataset=annotated(8)
    )
    loader = iter(trainer.get_train_dataloader())
    (batch,), count = trainer.get_batch_samples(loader, 1, trainer.args.device)
    models = trainer.model, trainer.ref_model

    def bare() -> None:
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        for model in models:
            model(**given, use_cache=False)

    def step() -> None:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()

    waits = []
    for call in (bare, step):
        call()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
        torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(w.message) for w in seen))
    assert waits[1] <= waits[0]


# --- NCCL -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[Any]:
    """A group of this process alone."""
    if not dist.is_available() or not dist.is_nccl_available():
        pytest.skip("needs torch.distributed with NCCL")
    store = f"file://{tmp_path}/store"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_the_collectives_of_nccl(nccl: Any) -> None:
    """A group of one takes the ordinary path; the operators for shards, called by themselves, all the others' steps."""
    x = inputs(F32)
    assert identical(of_logits(x, group=nccl), of_logits(x))
    for method, smoothing in itertools.product(("tnff", "tnrr", "ul+ll"), ("negatives", "uniform")):
        batch = on_gpu(mixed_batch(1000))
        sides = tnt.METHODS[method].positive_loss, tnt.METHODS[method].negative_loss
        ids = batch.options["negative_ids"]
        tensors = RowTensors(batch.ref_logits, batch.labels, batch.weights, None, ids, None)
        uniform = smoothing == "uniform"
        scalars = Scalars(*map(int, sides), 1.0, 1e-6, uniform, None, 1.0, -100, "mean", None)
        shard = Shard(nccl.group_name, [1000])
        backend = backends.select(batch.logits, None, scalars, True)
        call = LossCall(tensors, scalars, backend, False, False, shard)
        loss, gradient = row_losses.on(batch.logits)(batch.logits, call, True, False)
        options = {"method": method, "smoothing": smoothing, **batch.options}
        leaf = batch.logits.clone().requires_grad_()
        want = tnt.tnt_loss(leaf, batch.ref_logits, batch.labels, batch.weights, **options)
        torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, *torch.autograd.grad(want, leaf), rtol=1e-4, atol=1e-6)


def shards_over_nccl(rank: int, world: int) -> None:
    torch.cuda.set_device(rank)
    sizes = [VOCAB - 100 * (world - 1), *[100] * (world - 1)]
    mine, group = columns(sizes, rank), dist.group.WORLD
    for dtype, (step, keywords) in itertools.product(DTYPES, STEPS):
        x = inputs(dtype)
        part = {**x, **{name: x[name][mine] for name in ("weight", "ref_weight")}}
        want, got = step(x, **keywords), step(part, group=group, shard_sizes=sizes, **keywords)
        whole = [want[0], want[1][..., mine]] if step is of_logits else [*want[:2], want[2][mine]]
        assert_close(got, whole, dtype)
    # a rank that raises after the first call: NaN elsewhere, no hang
    z = torch.randn(4, sizes[rank], device="cuda")
    call = {"labels": torch.zeros(4, dtype=torch.int64, device="cuda"), "group": group}
    if rank == world - 1:
        with pytest.raises(ValueError, match="method is"):
            tnt.tnt_loss(z, z, method="no", shard_sizes=sizes, **call)
    else:
        assert tnt.tnt_loss(z, z, shard_sizes=sizes, **call).isnan()


@needs_nccl
def test_shards_over_nccl(tmp_path: Path) -> None:
    run_cases(min(4, torch.cuda.device_count()), tmp_path, [shards_over_nccl], backend="nccl")
