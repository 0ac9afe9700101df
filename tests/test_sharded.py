"""``group=``: the loss of logits whose vocabulary is sharded over gloo processes, against the unsharded truth."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    INF,
    NAN,
    OBJECTIVES,
    Batch,
    Result,
    assert_agrees,
    mixed_batch,
    truth,
)
from ranks import beside, collectives, columns, needs_gloo, run_cases, shard_sizes
from torch import Tensor

import tnt_kernels as tnt
from tnt_kernels._call import LossCall, RowTensors, Shard
from tnt_kernels._operators import (
    new_losses,
    row_gradients,
    row_gradients_,
    row_losses,
    row_losses_,
)
from tnt_kernels._scalars import Scalars
from tnt_kernels._sharded import agreement

pytestmark = needs_gloo
SMOOTHINGS = ("negatives", "uniform")


def run(
    batch: Batch, sizes: list[int], rank: int, *, upstream: Tensor | None = None, **keywords: Any
) -> Result:
    """As ``oracle.run`` on the whole: this rank's loss and statistics, all ranks' gradients."""
    mine = columns(sizes, rank)
    leaf = batch.logits[..., mine].clone().requires_grad_()
    ref = None if batch.ref_logits is None else batch.ref_logits[..., mine]
    options = {**batch.options, **keywords}
    logits = leaf * 1 if options.get("inplace") else leaf
    out = tnt.tnt_loss(
        logits,
        ref,
        batch.labels,
        batch.weights,
        group=dist.group.WORLD,
        shard_sizes=sizes,
        **options,
    )
    loss, stats = out if isinstance(out, tuple) else (out, None)
    (gradient,) = torch.autograd.grad(
        loss, logits, torch.ones_like(loss) if upstream is None else upstream
    )
    return Result(loss.detach(), beside(gradient, sizes), stats)


def every_loss(rank: int, world: int) -> None:
    upstream = torch.linspace(-1, 2, 12)
    for dtype, objective, smoothing in itertools.product(DTYPES, OBJECTIVES, SMOOTHINGS):
        batch = mixed_batch(103, dtype).with_options(method=objective, smoothing=smoothing)
        expected, sizes = truth(batch), shard_sizes(103, world)
        per_row = upstream.to(F64 if dtype == F64 else F32)
        for backend, inplace in (("cpu", False), ("cpu", True), ("torch", False)):
            for reduction, given in (("mean", None), ("none", per_row)):
                result = run(
                    batch, sizes, rank, upstream=given, reduction=reduction, inplace=inplace,
                    return_stats=True, backend=backend,
                )  # fmt: skip
                label = f"{backend} {objective} {smoothing} {reduction} {inplace}"
                assert_agrees(
                    result, expected, batch, reduction=reduction, upstream=given, label=label
                )


def settings(rank: int, world: int) -> None:
    """Few columns, rows (2, 6), a floor, alpha per row, a normalizer; sizes derived from the group."""
    for vocab in (2, 5, 40):
        batch = mixed_batch(vocab)
        shape = (2, 6)
        batch = Batch(
            batch.logits.view(*shape, vocab), batch.ref_logits.view(*shape, vocab),
            batch.labels.view(shape), batch.weights.view(shape),
            {"negative_ids": batch.options["negative_ids"].view(*shape, -1), "nl_floor": -3.0,
             "alpha": torch.linspace(0, 2, 6), "temperature": 1.5},
        )  # fmt: skip
        sizes = shard_sizes(vocab, world)
        for objective in OBJECTIVES[:4]:
            some = batch.with_options(method=objective)
            result = run(some, sizes, rank, return_stats=True, normalizer=7)
            assert_agrees(result, truth(some), some, normalizer=7.0, label=f"{vocab} {objective}")


def edges(rank: int, world: int) -> None:
    """No rows, ignored rows, p = q, one broken shard."""
    sizes = shard_sizes(20, world)
    for dtype in (F32, F16):
        for rows, weight in ((0, 1.0), (3, 0.0)):
            z = torch.full((rows, 20), NAN, dtype=dtype)
            batch = Batch(z, z, torch.zeros(rows, dtype=torch.int64), torch.full((rows,), weight))
            for reduction, inplace in itertools.product(("mean", "none"), (False, True)):
                result = run(batch, sizes, rank, reduction=reduction, inplace=inplace)
                assert (result.loss == 0).all()
                assert (result.gradient == 0).all()
    z = 4 * torch.randn(5, 20)
    batch = Batch(z, z.clone(), torch.zeros(5, dtype=torch.int64), torch.linspace(0.5, 2, 5))
    for method in ("tnff", "tnrr"):
        result = run(batch, sizes, rank, method=method)
        assert (result.loss == 0).all()
        assert (result.gradient == 0).all()
    z[2, 0] = INF
    result = run(batch, sizes, rank, reduction="none", return_stats=True)
    assert result.loss[2].isnan()
    assert result.gradient[2].isnan().all()
    assert torch.isfinite(result.gradient[[0, 1, 3, 4]]).all()


def counts(rank: int, world: int) -> None:
    """Two all-gathers with gradient, one where the statistics say it all; none in backward, none for a group of one.

    On a CPU, one more, by which the ranks agree.
    """
    batch, sizes = mixed_batch(40), shard_sizes(40, world)
    run(batch, sizes, rank)
    mine = columns(sizes, rank)
    labels = batch.labels.clamp_max(min(sizes) - 1)

    def step(dtype: torch.dtype, options: dict[str, Any]) -> None:
        z, r = batch.logits[:, mine].to(dtype), batch.ref_logits[:, mine].to(dtype)
        loss = tnt.tnt_loss(z.requires_grad_(), r, labels, batch.weights, **options)
        loss.sum().backward()

    for method, smoothing, reduction, dtype in itertools.product(
        ("tnff", "tnrr", "nl+ll", "ul+ll"), SMOOTHINGS, ("mean", "none"), (F32, F16)
    ):
        options = {"method": method, "smoothing": smoothing, "reduction": reduction}
        sharded = {**options, "group": dist.group.WORLD, "shard_sizes": sizes}
        expected = 2 if method == "nl+ll" or (smoothing == "uniform" and method != "ul+ll") else 1
        assert len(collectives(partial(step, dtype, sharded))) == 1 + expected, method
        with as_on_a_device():
            seen = collectives(partial(step, dtype, sharded))
        assert len(seen) == expected, (method, seen)
        assert collectives(partial(step, dtype, {**options, "group": alone[rank]})) == []


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Where ranks agree at a group's first call alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_exchanges", lambda shard, _: not agreement._known(shard))
        yield


alone: list[Any] = []


def groups_of_one(rank: int, world: int) -> None:
    alone[:] = [dist.new_group([i]) for i in range(world)]


def every_rank_alike(rank: int, world: int) -> None:
    """The loss to the last bit."""
    batch, sizes = mixed_batch(1003), shard_sizes(1003, world)
    for objective in OBJECTIVES[:4]:
        loss = run(batch, sizes, rank, method=objective).loss
        others = [torch.empty_like(loss) for _ in sizes]
        dist.all_gather(others, loss)
        assert all(torch.equal(loss, other) for other in others)


def overlapping(storage: Tensor, vocab: int) -> dict[str, Any]:
    """Logits to be overwritten and a reference that share memory."""
    storage = storage.requires_grad_() * 1
    logits = storage[:, :vocab]
    return {"logits": logits, "ref_logits": logits.detach(), "inplace": True}


def bad_input(rank: int, world: int) -> None:
    """All ranks raise, and the next call works."""
    batch, sizes = mixed_batch(40), shard_sizes(40, world)
    mine = columns(sizes, rank)
    world_group = dist.group.WORLD
    z, r = batch.logits[:, mine], batch.ref_logits[:, mine]

    def call(**changed: Any) -> Tensor:
        arguments = {
            "logits": z, "ref_logits": r, "labels": batch.labels, "weights": batch.weights,
            "group": world_group, "shard_sizes": sizes, **changed,
        }  # fmt: skip
        return tnt.tnt_loss(**arguments)

    def raises(error: type[Exception], match: str, **changed: Any) -> None:
        with pytest.raises(error, match=match):
            call(**changed)
        assert torch.isfinite(call(method="ul+ll"))

    last = rank == world - 1
    labels = batch.labels.clone()
    labels[0] = 40
    raises(ValueError, "labels: row 0 has label 40", labels=labels)
    # one rank alone
    other = "rank [0-9] of group has raised"
    if last:
        raises(TypeError, "ref_logits: dtype", ref_logits=r.double())
        raises(ValueError, "method is", method="no")
        raises(TypeError, "logits: list, expected", logits=[1.0])
        raises(ValueError, r"logits: shape \(\)", logits=torch.tensor(1.0))
        wide = torch.zeros(12, 2 * z.size(1))
        raises(ValueError, "inplace: .* share memory", **overlapping(wide, z.size(1)))
    else:
        for _ in range(4):
            raises(RuntimeError, other)
        leaf = z.clone().requires_grad_()
        raises(RuntimeError, other, logits=leaf * 1, inplace=True)
    # what does not fit, on every rank alike
    cut = slice(len(batch.labels) - last)
    rows = {
        "logits": z[cut], "ref_logits": r[cut], "labels": batch.labels[cut], "weights": batch.weights[cut],
    }  # fmt: skip
    raises(ValueError, f"labels: 12 rows on rank 0 and 11 on rank {world - 1} of group", **rows)
    if last:
        empty = {"logits": z[:, :0], "ref_logits": r[:, :0]}
        raises(ValueError, "shard_sizes: .* expected", **empty)
    else:
        raises(ValueError, "shard_sizes: .* expected")
    weights = batch.weights + last
    for name, changed in {
        "labels": {"labels": batch.labels.roll(int(last))},
        "weights": {"weights": weights},
        "method": {"method": "tnrr" if last else "tnff"},
        "eps": {"eps": 1e-3 if last else 1e-6},
        "alpha": {"alpha": torch.full((12,), 1.0 + last)},
        "negative_ids": {"negative_ids": torch.tensor([1, 2 + last])},
        "normalizer": {"normalizer": 3.0 + last},
    }.items():
        raises(ValueError, f"{name}: not the same on rank 0 and rank {world - 1}", **changed)
    for weights in (batch.weights, None):
        for first, other in ((F32, F64), (BF16, F32)):
            dtype = other if last else first
            changed = {"logits": z.to(dtype), "ref_logits": r.to(dtype), "weights": weights}
            match = f"logits: dtype {first} on rank 0 and {other} on rank {world - 1} of group"
            raises(ValueError, match, **changed)
    fresh = [size + (1 if i == 0 else -1 if i == 1 else 0) for i, size in enumerate(sizes)]
    raises(ValueError, "shard_sizes: .* expected", shard_sizes=fresh)
    raises(ValueError, "shard_sizes: .* expected", shard_sizes=fresh if last else [1, *sizes[1:]])
    with pytest.raises(ValueError, match=r"expected \d sizes"):
        call(shard_sizes=[40])
    with pytest.raises(ValueError, match="without group"):
        call(group=None)
    with pytest.raises(TypeError, match="group: str, expected"):
        call(group="world")


def sizes_from_the_group(rank: int, world: int) -> None:
    """Asked once; a vocabulary that changes is an error on all ranks."""
    group = dist.new_group(list(range(world)))
    for vocab in (40, 40):
        batch, sizes = mixed_batch(vocab), shard_sizes(vocab, world)
        mine = columns(sizes, rank)
        expected = truth(batch)
        leaf = batch.logits[:, mine].clone().requires_grad_()
        loss = tnt.tnt_loss(
            leaf,
            batch.ref_logits[:, mine],
            batch.labels,
            batch.weights,
            group=group,
            **batch.options,
        )
        loss.backward()
        assert_agrees(Result(loss, beside(leaf.grad, sizes), None), expected, batch)
    z = torch.randn(3, 8 if rank else 21)
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits: V = .* needs shard_sizes"):
        tnt.tnt_loss(z, z, labels, group=group)
    with as_on_a_device(), pytest.raises((ValueError, RuntimeError), match=r"V = |has raised"):
        tnt.tnt_loss(z, z, labels, group=group)


def errors_on_a_device(rank: int, world: int) -> None:
    """A rank that raises makes the others' loss NaN there, unless it is a group's first call, which tells them all."""
    batch, sizes = mixed_batch(40), shard_sizes(40, world)
    mine, last = columns(sizes, rank), rank == world - 1
    group = dist.new_group(list(range(world)))
    inputs = (batch.logits[:, mine], batch.ref_logits[:, mine])

    def call(method: str = "tnff", rows: int = 12) -> Tensor:
        logits, ref_logits = (x[:rows] for x in inputs)
        labels, weights = batch.labels[:rows], batch.weights[:rows]
        return tnt.tnt_loss(logits, ref_logits, labels, weights, group=group, method=method)

    def raises_as(last: bool) -> Any:
        kind, match = (ValueError, "method is") if last else (RuntimeError, "has raised")
        return pytest.raises(kind, match=match)

    with as_on_a_device():
        with pytest.raises(ValueError, match="12 rows on rank 0 and 10"):
            call(rows=12 - 2 * last)
        with raises_as(last):
            call(method="no" if last else "tnff")
        assert call().isfinite()
        # with its headers read, as on a CPU; a device's rank would go on with NaN
        with raises_as(last):
            call(method="no" if last else "ul+ll")
        assert call().isfinite()


def dtensors(rank: int, world: int) -> None:
    """Sharded on V, unevenly; on rows too; other placements raise."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    batch = mixed_batch(42)
    labels, weights, options = batch.labels, batch.weights, batch.options
    mesh = dist.init_device_mesh("cpu", (world,))
    expected = truth(batch)

    def split(x: Tensor, mesh: Any, *placements: Any) -> DTensor:
        return distribute_tensor(x.clone(), mesh, placements)

    for vocab in (Shard(1), Shard(-1)):
        leaf = split(batch.logits, mesh, vocab).requires_grad_()
        ref = split(batch.ref_logits, mesh, vocab)
        for rows in (labels, split(labels, mesh, Replicate())):
            loss = tnt.tnt_loss(leaf, ref, rows, weights, **options)
            (gradient,) = torch.autograd.grad(loss, leaf)
            assert gradient.placements == leaf.placements
            assert_agrees(Result(loss, gradient.full_tensor(), None), expected, batch)
    # rows over one mesh dimension, the vocabulary over the other
    both = dist.init_device_mesh("cpu", (2, world // 2))
    leaf = split(batch.logits, both, Shard(0), Shard(1)).requires_grad_()
    ref = split(batch.ref_logits, both, Shard(0), Shard(1))
    tensors = [split(x, both, Shard(0), Replicate()) for x in (labels, weights)]
    ids = split(options["negative_ids"], both, Shard(0), Replicate())
    count = int(((labels != -100) & (weights != 0)).sum())
    loss = tnt.tnt_loss(leaf, ref, *tensors, negative_ids=ids, normalizer=count)
    (gradient,) = torch.autograd.grad(loss, leaf)
    total = loss.detach().clone()
    dist.all_reduce(total, group=both.get_group(0))
    assert_agrees(Result(total, gradient.full_tensor(), None), expected, batch)
    whole = split(batch.logits, mesh, Replicate())
    with pytest.raises(ValueError, match=r"logits: DTensor with placements .*Replicate"):
        tnt.tnt_loss(whole, whole, labels, weights)
    leaf = split(batch.logits, mesh, Shard(1))
    with pytest.raises(ValueError, match="ref_logits: DTensor with placements"):
        tnt.tnt_loss(leaf, split(batch.logits, mesh, Replicate()), labels, weights)
    with pytest.raises(TypeError, match="ref_logits: Tensor, expected a DTensor"):
        tnt.tnt_loss(leaf, batch.ref_logits, labels, weights)
    with pytest.raises(ValueError, match="group: given with logits that are a DTensor"):
        tnt.tnt_loss(leaf, leaf, labels, weights, group=dist.group.WORLD)


def operators(rank: int, world: int) -> None:
    """What PyTorch expects of an operator: its schema, its shapes for tracing, with dynamic ones too."""
    z, r = torch.randn(2, 6, 9)
    tensors = RowTensors(r, torch.arange(6), torch.tensor([1.0, -1.0] * 3), None, None, None)
    shard = Shard(dist.group.WORLD.group_name, [9] * world)

    def check(operator: Any, logits: torch.Tensor, call: LossCall, *more: Any) -> None:
        flat = operator.one_by_one(logits, call, *more)
        torch.library.opcheck(operator.overload, tuple(flat))

    for reduction, diagnostics in itertools.product(("mean", "none"), (False, True)):
        scalars = Scalars(1, 2, 1.0, 1e-6, False, None, 1.0, -100, reduction, None)
        call = LossCall(tensors, scalars, "cpu", False, diagnostics, shard)
        for now, later in ((True, False), (False, True), (False, False)):
            check(row_losses, z, call, now, later)
        check(row_losses_, z.clone(), call, *new_losses(z, call))
        saved = row_losses.on(z)(z, call, False, True)[1 + diagnostics :]
        upstream = torch.rand(6 if reduction == "none" else ())
        check(row_gradients, z, call, saved, upstream)
        check(row_gradients_, z.clone(), call, saved, upstream)


CASES = [
    groups_of_one, every_loss, settings, edges, counts, every_rank_alike, bad_input, errors_on_a_device,
    sizes_from_the_group,
    dtensors, operators,
]  # fmt: skip


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_logits(world: int, tmp_path: Path, cpu: str) -> None:
    run_cases(world, tmp_path, CASES)
