"""Every backend and instruction set against the oracle: losses, gradients, statistics."""

from __future__ import annotations

import concurrent.futures
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    NAN,
    NEGATIVE,
    OBJECTIVES,
    POSITIVE,
    Batch,
    Result,
    Truth,
    assert_agrees,
    identical,
    implementations,
    instruction_set,
    instruction_sets,
    mixed_batch,
    negative_rows,
    run,
    threads,
    truth,
)
from torch import Tensor

import tnt_kernels as tnt
from tnt_kernels.objectives import METHODS

SMOOTHINGS = ("negatives", "uniform")


def check(batch: Batch, expected: Truth | None = None, *, label: str = "", **keywords: Any) -> None:
    """All implementations, with the gradient written in forward (mean) and in backward (none)."""
    expected = expected or truth(batch)
    upstream = torch.linspace(-1, 2, batch.labels.numel()).view(batch.labels.shape)
    upstream = upstream.to(F64 if batch.logits.dtype == F64 else F32)
    for backend, name in implementations():
        if backend == "torch" and batch.logits.size(-1) > 100_000:
            continue  # seconds, to compare the reference with itself
        for reduction, per_row in (("mean", None), ("none", upstream)):
            result = run(
                batch,
                backend,
                reduction=reduction,
                upstream=per_row,
                return_stats=True,
                **keywords,
            )
            assert_agrees(
                result,
                expected,
                batch,
                reduction=reduction,
                upstream=per_row,
                label=f"{name} {reduction} {label} {batch.options.get('method', '')}",
            )


# --- objectives, dtypes, vocabularies ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 17, 1000])
def test_every_pair_of_losses(vocab: int, dtype: torch.dtype) -> None:
    mixed = mixed_batch(vocab, dtype)
    negative = negative_rows(mixed)
    for smoothing in SMOOTHINGS:
        batch = mixed.with_options(smoothing=smoothing)
        known = {o: truth(batch.with_options(method=o)) for o in OBJECTIVES}
        for objective, expected in known.items():
            check(batch.with_options(method=objective), expected, label=smoothing)
        by_positive = {o.positive: known[o] for o in OBJECTIVES}
        by_negative = {o.negative: known[o] for o in OBJECTIVES}
        for positive, negative_loss in itertools.product(POSITIVE, NEGATIVE):
            objective = tnt.Objective(positive, negative_loss)
            pair = batch.with_options(method=objective)
            expected = by_negative[negative_loss].where(negative, by_positive[positive])
            result = run(pair, return_stats=True)
            assert_agrees(result, expected, pair, label=f"{objective} {smoothing}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabulary(dtype: torch.dtype) -> None:
    batch = mixed_batch(32003, dtype, rows=10)
    for smoothing, objective in itertools.product(SMOOTHINGS, OBJECTIVES[:4]):
        check(batch.with_options(method=objective, smoothing=smoothing), label=smoothing)


@pytest.mark.parametrize("vocab", [128256, 262144])
def test_largest_vocabularies(vocab: int) -> None:
    for dtype, objective in itertools.product((F32, BF16), OBJECTIVES[:4]):
        check(mixed_batch(vocab, dtype, rows=4).with_options(method=objective), label=str(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_methods_by_name(method: str, backend: str) -> None:
    """The paper's table: negative side first."""
    sides = {"f": "forward_kl", "r": "reverse_kl"}
    if method.startswith("tn"):
        negative, positive = sides[method[2]], sides.get(method[3:], "log_likelihood")
    else:
        negative = {"nl": "negative_likelihood", "ul": "unlikelihood"}[method[:2]]
        positive = "log_likelihood"
    batch = mixed_batch(50).with_options(method=method)
    expected = truth(batch.with_options(method=tnt.Objective(positive, negative)))
    assert_agrees(run(batch, backend), expected, batch, label=method)


# --- keywords ----------------------------------------------------------------------------------------


SETTINGS: tuple[dict[str, Any], ...] = (
    {"alpha": 0.3},
    {"alpha": 0},
    {"alpha": -2.5},
    {"temperature": 0.5},
    {"temperature": 3},
    {"temperature": 1.7, "smoothing": "uniform"},
    {"eps": 0.1},
    {"eps": 1e-12},
    {"eps": 1e-3, "smoothing": "uniform"},
    {"eps": 0.0, "smoothing": "uniform"},
    {"nl_floor": -6.0},
    {"nl_floor": -9},
    {"nl_floor": -1e9},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings(settings: dict[str, Any]) -> None:
    for dtype, objective in itertools.product((F32, BF16), OBJECTIVES[:4]):
        check(mixed_batch(300, dtype).with_options(method=objective, **settings), label=str(dtype))


def test_eps_zero() -> None:
    """Without a floor, a removed token that has mass is infinitely bad for a reverse KL."""
    batch = mixed_batch(40).with_options(method="tnrr", eps=0.0)
    assert truth(batch).terms.loss.isinf().any()
    check(batch)


def test_nl_floor_is_met() -> None:
    """The settings above must have log-probabilities on both sides of the floor."""
    batch = mixed_batch(300, ids=2).with_options(method="nl+ll", nl_floor=-9.0)
    free = truth(batch.with_options(nl_floor=None)).terms.loss
    floored = truth(batch).terms.loss
    rows = negative_rows(batch)
    assert (free != floored)[rows].any()
    assert (free == floored)[rows & (batch.weights != 0)].any()


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_alpha_tensors(dtype: torch.dtype) -> None:
    """Of any shape that broadcasts to the rows, and of any real dtype."""
    batch = grid(mixed_batch(40, dtype), 3, 4)
    for alpha in (
        torch.tensor(2.0),
        torch.tensor([0.5]),
        torch.tensor(2),
        torch.linspace(-1, 2, 12).view(3, 4),
        torch.linspace(-1, 2, 12, dtype=F64).view(4, 3).t(),
        torch.tensor([1.0, 0.25, 3.0, -1.0], dtype=BF16),
        torch.tensor([[2], [0], [5]]),
        torch.tensor([[1.5]]),
    ):
        for method in ("tnrf", "ul+ll"):
            check(batch.with_options(method=method, alpha=alpha), label=str(alpha.shape))


def grid(batch: Batch, *shape: int) -> Batch:
    """The same rows, (B, T)."""
    options = dict(batch.options)
    for name in ("negative_ids", "alpha"):
        if isinstance(options.get(name), Tensor) and options[name].dim() > 1:
            options[name] = options[name].view(*shape, -1)
    ref = batch.ref_logits
    return Batch(
        batch.logits.view(*shape, -1),
        None if ref is None else ref.view(*shape, -1),
        batch.labels.view(shape),
        None if batch.weights is None else batch.weights.view(shape),
        options,
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_negative_ids(dtype: torch.dtype) -> None:
    mixed = mixed_batch(5000, dtype)
    rows = len(mixed.labels)
    thousands = torch.randperm(5000)[:3000]
    many = torch.stack([torch.randperm(5000)[:70] for _ in range(rows)])
    many[::3, 20:] = -1
    many[1::2, 5] = mixed.labels[1::2].clamp_min(0)
    lists: dict[str, Tensor | None] = {
        "none": None,
        "K = 0": torch.empty(rows, 0, dtype=torch.int64),
        "all padding": torch.full((rows, 3), -1),
        "padding, shared": torch.full((2,), -1),
        "shared": torch.tensor([17, -1, 4999, 17, 0, 1023, 1024, -1]),
        "shared with some labels": mixed.labels[[1, 3, 5]],
        "thousands, shared": thousands,
        "thousands a row": thousands.expand(rows, -1),
        "64 a row": many,
        "int32": many.int(),
        "int8": torch.tensor([5, 1, -1], dtype=torch.int8),
        "a stride": many[:, ::2],
    }
    for name, ids in lists.items():
        for method in ("tnff", "tnrr", "ul+ll", "nl+ll")[: 4 if dtype == F32 else 2]:
            check(mixed.with_options(negative_ids=ids, method=method), label=name)


def test_negative_ids_are_a_set(backend: str) -> None:
    """However they are given, to the last bit."""
    mixed = mixed_batch(3000, ids=0)
    rows = len(mixed.labels)
    for method in METHODS:
        batch = mixed.with_options(method=method)
        want = run(batch.with_options(negative_ids=torch.tensor([3, 2500])), backend)
        for ids in (
            torch.tensor([[2500, 3]] * rows),
            torch.tensor([[2500, -1, 3, 3, -1, 2500]] * rows),
            torch.tensor([-1, 2500, 3, 3], dtype=torch.int32),
        ):
            assert identical(run(batch.with_options(negative_ids=ids), backend), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_labels_of_any_dtype(dtype: torch.dtype, backend: str) -> None:
    mixed = mixed_batch(30, dtype, ids=0)
    whole = mixed.weights.round()
    for weights in (None, whole.int(), whole.to(F16), whole.double(), whole > 0):
        for labels in (mixed.labels, mixed.labels.int(), mixed.labels.to(torch.int16)):
            batch = Batch(mixed.logits, mixed.ref_logits, labels, weights)
            if weights is None:
                batch = Batch(mixed.logits[:7], mixed.ref_logits[:7], labels[:7])
            assert_agrees(run(batch, backend), truth(batch), batch)


def test_ignore_index(backend: str) -> None:
    batch = mixed_batch(30)
    labels = batch.labels.clone()
    labels[[0, 3]] = 5
    labels[8] = 5  # the row of NaN
    batch = Batch(batch.logits, batch.ref_logits, labels, batch.weights).with_options(
        ignore_index=5
    )
    assert_agrees(run(batch, backend), truth(batch), batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_and_normalizers(dtype: torch.dtype) -> None:
    batch = mixed_batch(40, dtype).with_options(method="tnrf")
    expected = truth(batch)
    for backend, name in implementations():
        assert_agrees(run(batch, backend, reduction="sum"), expected, batch, reduction="sum")
        for normalizer in (3, 0.37, 1e4, torch.tensor(7), torch.tensor(2.5, dtype=F64)):
            result = run(batch, backend, normalizer=normalizer)
            value, label = float(normalizer), f"{name} {normalizer}"
            assert_agrees(result, expected, batch, normalizer=value, label=label)


def test_a_normalizer_of_zero_gives_zero(backend: str) -> None:
    batch = mixed_batch(40)
    for dtype, zero in itertools.product(DTYPES, (0, 0.0, torch.tensor(0), torch.tensor(0.0))):
        logits = batch.logits.to(dtype, copy=True)
        logits[0] = NAN
        broken = Batch(logits, batch.ref_logits.to(dtype), batch.labels, batch.weights)
        result = run(broken, backend, normalizer=zero)
        assert result.loss.item() == 0
        assert (result.gradient == 0).all()


def test_statistics_say_when_they_do_not_apply(backend: str) -> None:
    """NaN on rows of weight 0, and where the reference is not read; RowStats' order of fields."""
    batch = mixed_batch(20, ids=0).with_options(method="tnrll")
    _, stats = tnt.tnt_loss(
        batch.logits, batch.ref_logits, batch.labels, batch.weights, return_stats=True,
        method="tnrll", backend=backend,
    )  # fmt: skip
    assert stats._fields == ("loss", "kl", "negative_mass", "ref_negative_mass", "entropy")
    assert stats.loss[[7, 8]].tolist() == [0, 0]
    assert all(x[[7, 8]].isnan().all() for x in stats[1:])
    negative = batch.weights < 0
    assert torch.equal(stats.kl[negative], stats.loss[negative])
    assert stats.kl[~negative].isnan().all()
    assert stats.ref_negative_mass[~negative].isnan().all()
    for name in ("negative_mass", "ref_negative_mass"):
        logits = batch.logits if name == "negative_mass" else batch.ref_logits
        of_label = logits.softmax(-1).gather(-1, batch.labels.clamp_min(0)[:, None])[:, 0]
        torch.testing.assert_close(getattr(stats, name)[negative], of_label[negative])
    assert (stats.negative_mass[[0, 2, 4]] == 0).all()
    p = batch.logits.softmax(-1)
    entropy = -torch.xlogy(p, p).sum(-1)
    torch.testing.assert_close(stats.entropy[:7], entropy[:7])


# --- memory layouts ----------------------------------------------------------------------------------


def strided(x: Tensor, *, pad: int, offset: int = 0) -> Tensor:
    """The same values as ``[..., :V]`` of a wider buffer of NaN."""
    wide = torch.full((*x.shape[:-1], x.size(-1) + pad), NAN, dtype=x.dtype)
    view = wide[..., offset : offset + x.size(-1)]
    view.copy_(x)
    return view


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype) -> None:
    """Padded vocabularies, odd offsets, (B, T, V), transposed and expanded rows."""
    for vocab in (37, 1111):
        mixed = mixed_batch(vocab, dtype).with_options(method="tnrf")
        cube = grid(mixed, 3, 4)
        z, r = mixed.logits, mixed.ref_logits
        one_reference = mixed.ref_logits[:1]
        expanded = Batch(z, one_reference.expand_as(z), mixed.labels, mixed.weights, mixed.options)
        for name, batch, logits, ref in (
            ("padded", mixed, strided(z, pad=3), strided(r, pad=8)),
            ("odd offset", mixed, strided(z, pad=5, offset=1), r),
            ("reference alone", mixed, z, strided(r, pad=5, offset=3)),
            ("columns", mixed, z.t().contiguous().t(), r.t().contiguous().t()),
            ("every second row", mixed, torch.stack([z, z], 1)[:, 0], torch.stack([r, z], 1)[:, 0]),
            ("(B, T, V)", cube, cube.logits, cube.ref_logits),
            ("(B, T, V) padded", cube, strided(cube.logits, pad=2), cube.ref_logits),
            (
                "(T, B, V) transposed",
                cube,
                cube.logits.transpose(0, 1).contiguous().transpose(0, 1),
                cube.ref_logits,
            ),
            ("expanded reference", expanded, z, expanded.ref_logits),
        ):
            moved = Batch(logits, ref, batch.labels, batch.weights, batch.options)
            before = logits.clone(), ref.clone()
            check(moved, truth(batch), label=name)
            assert identical((logits, ref), before), name


def test_rows_of_one_token_and_a_single_row(backend: str) -> None:
    """(V,) logits with a 0-dim label; a vocabulary of one, in any layout."""
    batch = mixed_batch(30)
    for i in (0, 1, 3):
        ids = batch.options["negative_ids"][i]
        row = Batch(
            *(x[i] for x in (batch.logits, batch.ref_logits, batch.labels, batch.weights)),
            {"negative_ids": ids},
        )
        assert row.labels.shape == ()
        result = run(row, backend, reduction="none")
        assert_agrees(result, truth(row), row, reduction="none")
    column = torch.randn(3, 12).t()[:, 1:2]
    assert column.stride() == (1, 12)
    one = Batch(column, column + 1, torch.zeros(12, dtype=torch.int64), batch.weights.abs())
    for method in ("tnff", "tnrr", "nl+ll"):
        result = run(one.with_options(method=method), backend)
        assert abs(result.loss) < 1e-12
        assert (result.gradient.abs() < 1e-7).all()


def test_labels_and_weights_of_any_stride(backend: str) -> None:
    mixed = mixed_batch(30, ids=4)
    want = run(mixed, backend)
    spread = torch.stack([mixed.labels, mixed.labels + 1], 1)[:, 0]
    weights = torch.stack([mixed.weights, mixed.weights + 1], 1)[:, 0]
    ids = mixed.options["negative_ids"].t().contiguous().t()
    options = {"negative_ids": ids}
    got = run(Batch(mixed.logits, mixed.ref_logits, spread, weights, options), backend)
    assert identical(got, want)
    upstream = torch.linspace(-1, 1, 24)
    batch = mixed.with_options(reduction="none")
    assert identical(
        run(batch, backend, upstream=upstream[::2]),
        run(batch, backend, upstream=upstream[::2].clone()),
    )


# --- bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_runs_agree_to_the_last_bit(dtype: torch.dtype, cpu: str) -> None:
    for vocab, rows in ((1000, 36), (33, 600)):
        for objective in OBJECTIVES[:4]:
            batch = mixed_batch(vocab, dtype, rows=rows).with_options(method=objective)

            def runs(batch: Batch = batch) -> list[Result]:
                return [run(batch, cpu, reduction=r, return_stats=True) for r in ("mean", "none")]

            for name in instruction_sets():
                with instruction_set(name):
                    with threads(1):
                        first = runs()
                    for count in (2, 2):
                        with threads(count):
                            assert identical(runs(), first), (name, objective)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_threads_share(dtype: torch.dtype, cpu: str) -> None:
    """Fewer rows than threads, of a ragged last tile and a tile far above the others: the same bits."""
    vocab = 40_003
    ids = torch.tensor([[3, vocab - 1, vocab // 2]])
    for w, some in ((1.0, None), (-1.0, None), (-0.3, ids)):
        batch = mixed_batch(vocab, dtype, rows=1, ids=0)
        batch.logits[0, vocab // 2 + 7] += 40
        batch.ref_logits[0, 3 * vocab // 4 :] -= 1e4
        batch = replace(batch, weights=torch.full_like(batch.weights, w))
        for objective, smoothing in itertools.product(OBJECTIVES[:4], SMOOTHINGS):
            row = batch.with_options(method=objective, smoothing=smoothing, negative_ids=some)
            for name, reduction in itertools.product(instruction_sets(), ("mean", "none")):
                with instruction_set(name):
                    with threads(1):
                        want = run(row, cpu, reduction=reduction, return_stats=True)
                    for count in (2, 5):
                        with threads(count):
                            got = run(row, cpu, reduction=reduction, return_stats=True)
                        assert identical(got, want), (name, row.options, count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_loss_however_it_is_asked_for(dtype: torch.dtype, backend: str) -> None:
    """With and without gradient, statistics and ``inplace``: the same bits."""
    for smoothing, objective in itertools.product(SMOOTHINGS, OBJECTIVES[:4]):
        batch = mixed_batch(1500, dtype).with_options(method=objective, smoothing=smoothing)
        for reduction in ("mean", "sum", "none"):
            want = run(batch, backend, reduction=reduction, return_stats=True)
            plain = tnt.tnt_loss(
                batch.logits, batch.ref_logits, batch.labels, batch.weights,
                **batch.options, reduction=reduction, backend=backend,
            )  # fmt: skip
            assert identical(plain, want.loss)
            got = run(batch, backend, reduction=reduction)
            assert identical(got[:2], want[:2])
            got = run(batch, backend, reduction=reduction, return_stats=True, inplace=True)
            assert identical(got, want)


def test_calls_from_several_threads(cpu: str) -> None:
    """The kernels release the GIL."""
    batches = [mixed_batch(3000 + i, seed=i).with_options(method="tnrf") for i in range(8)]
    want = [run(batch, cpu) for batch in batches]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert identical(list(pool.map(lambda batch: run(batch, cpu), batches)), want)


def test_rows_do_not_depend_on_their_neighbours(backend: str) -> None:
    """Nor on where they lie: a row alone gives the bits that it gives in the batch."""
    for dtype, objective in itertools.product((F32, BF16), OBJECTIVES[:4]):
        batch = mixed_batch(1500, dtype).with_options(method=objective, reduction="none")
        whole = run(batch, backend)
        for i in range(len(batch.labels)):
            row = Batch(
                strided(batch.logits[i : i + 1], pad=i),
                batch.ref_logits[i : i + 1],
                batch.labels[i : i + 1],
                batch.weights[i : i + 1],
                {**batch.options, "negative_ids": batch.options["negative_ids"][i : i + 1]},
            )
            assert identical(
                run(row, backend)[:2], (whole.loss[i : i + 1], whole.gradient[i : i + 1])
            )


# --- the module ----------------------------------------------------------------------------------------


def test_module(backend: str) -> None:
    batch = mixed_batch(30, ids=0).with_options(method="tnrf", alpha=0.5, backend=backend)
    arguments = (batch.logits, batch.ref_logits, batch.labels, batch.weights)
    module = tnt.TNTLoss(**batch.options)
    assert identical(module(*arguments), tnt.tnt_loss(*arguments, **batch.options))
    at_call = {"negative_ids": torch.tensor([1, 2]), "alpha": 2.0, "normalizer": 3}
    want = tnt.tnt_loss(*arguments, **{**batch.options, **at_call})
    assert identical(module(*arguments, **at_call), want)
    assert "method='tnrf'" in repr(module)
