"""The Triton kernels against the oracle.

On a GPU they run as they are; with TRITON_INTERPRET=1 they are simulated on the CPU, on small shapes and with small
tiles, so that a row has several and a ragged one. That takes a process of its own (``make test`` has one).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import hard_rows
import pytest
import torch
from fuzz import SmallCall
from oracle import (
    BF16,
    F16,
    F32,
    F64,
    INF,
    INTERPRETED,
    NAN,
    OBJECTIVES,
    Batch,
    Result,
    Truth,
    assert_agrees,
    identical,
    mixed_batch,
    run,
    truth,
)  # fmt: skip
from shards import assert_rounds_its_gradient, run_shards
from shards import launched as launched_by
from torch import Tensor

import tnt_kernels as tnt
from tnt_kernels._call import (
    ROW_DIAGNOSTICS,
    ROW_PARTIAL_SUMS,
    ROW_STATISTICS,
    Kind,
    RowCall,
    RowTensors,
)
from tnt_kernels._scalars import Scalars
from tnt_kernels.backends import BACKENDS, triton
from tnt_kernels.objectives import METHODS, resolve_method

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a GPU, or TRITON_INTERPRET=1 in a process of its own",
    ),
    pytest.mark.filterwarnings(
        "ignore::RuntimeWarning"
    ),  # numpy's, of the interpreter: infinities are meant
]
DEVICE = "cpu" if INTERPRETED else "cuda"
VOCAB = 200 if INTERPRETED else 32003
SHAPES = (1, 2, 17, 128, VOCAB)


def on_device(batch: Batch) -> Batch:
    def move(x: Any) -> Any:
        return x.to(DEVICE) if isinstance(x, Tensor) else x

    return Batch(
        move(batch.logits), move(batch.ref_logits), move(batch.labels), move(batch.weights),
        {name: move(value) for name, value in batch.options.items()},
    )  # fmt: skip


def check(batch: Batch, label: str = "", **keywords: Any) -> Any:
    batch = on_device(batch)
    result = run(batch, "triton", **keywords)
    judged = {k: v for k, v in keywords.items() if k in ("reduction", "normalizer", "upstream")}
    assert_agrees(result, truth(batch), batch, label=label, **judged)
    return result


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("smoothing", ["negatives", "uniform"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: "-".join(o))
def test_losses_gradients_and_statistics(
    objective: tnt.Objective, smoothing: str, dtype: torch.dtype
) -> None:
    batch = mixed_batch(VOCAB, dtype).with_options(method=objective, smoothing=smoothing)
    check(batch, "mean", return_stats=True)
    check(batch, "none", reduction="none")


@pytest.mark.parametrize("vocab", SHAPES)
def test_sizes(vocab: int) -> None:
    for method in ("tnrf", "ul+ll"):
        check(mixed_batch(vocab, ids=2).with_options(method=method, temperature=1.7), str(vocab))


@pytest.mark.skipif(not INTERPRETED, reason="makes its tensors on the CPU")
@pytest.mark.parametrize("index", range(40))
def test_random_calls(index: int) -> None:
    """Against the oracle that shares no code with the library."""
    SmallCall(0, index).check("triton", truncated=True)


def test_forward_alone() -> None:
    """One read of the logits; the same loss to rounding."""
    for objective, smoothing in (
        *itertools.product(OBJECTIVES[:4], ["negatives"]),
        (OBJECTIVES[1], "uniform"),
    ):
        batch = on_device(mixed_batch(VOCAB).with_options(method=objective, smoothing=smoothing))
        expected, arguments = (
            truth(batch),
            (batch.logits, batch.ref_logits, batch.labels, batch.weights),
        )
        loss, stats = tnt.tnt_loss(
            *arguments, **batch.options, reduction="none", return_stats=True, backend="triton"
        )
        scaled = run(batch, "triton", reduction="none")
        torch.testing.assert_close(loss, scaled.loss, rtol=1e-5, atol=1e-7, equal_nan=True)
        for name in tnt.RowStats._fields:
            got, want = getattr(stats, name).double(), getattr(expected.terms, name)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("at_once", [1024, 16])
def test_negative_ids(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_IDS_AT_ONCE", at_once)
    mixed = mixed_batch(VOCAB, ids=0)
    rows = len(mixed.labels)
    many = torch.stack([torch.randperm(VOCAB)[:70] for _ in range(rows)])
    many[::3, 20:] = -1
    many[1::2, 5] = mixed.labels[1::2].clamp_min(0)
    for name, ids in {
        "none": torch.empty(rows, 0, dtype=torch.int64),
        "padding": torch.full((rows, 3), -1),
        "shared": torch.tensor([17, -1, 199, 17, 0, 63, 64, -1]),
        "shared, with labels": mixed.labels[[1, 3, 5]],
        "shared, most": torch.randperm(VOCAB)[: VOCAB - 20],
        "70 a row": many,
        "int32": many.int(),
    }.items():
        check(mixed.with_options(negative_ids=ids, method="tnrf"), name)
        check(mixed.with_options(negative_ids=ids, method="nl+ll"), name)


@pytest.mark.parametrize("method", METHODS)
def test_settings(method: str) -> None:
    batch = mixed_batch(VOCAB).with_options(method=method)
    check(
        batch.with_options(alpha=torch.linspace(-1, 2, 12), nl_floor=-6.0, eps=1e-3),
        normalizer=0.37,
    )
    check(batch.with_options(eps=0.0, alpha=0.5), reduction="sum")
    check(batch, reduction="none", upstream=torch.linspace(-1, 1, 12, device=DEVICE))


def rows_of(z: Tensor, r: Tensor, method: str, **options: Any) -> Batch:
    """Every pair of rows as a positive row, a removed label, and one that is pushed down in part."""
    n = len(z)
    weights = torch.tensor([1.0, -1.0, -0.4]).repeat_interleave(n)
    labels = torch.zeros(3 * n, dtype=torch.int64)
    return Batch(z.repeat(3, 1), r.repeat(3, 1), labels, weights, {"method": method, **options})


@pytest.mark.parametrize("method", METHODS)
def test_hard_rows(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(8, VOCAB, generator=generator)
    r = z + 0.1 * torch.randn(8, VOCAB, generator=generator)
    z[0, 0], r[0, 0] = 90.0, 90.0  # p(S), q(S) -> 1
    z[1, 0], r[1, 0] = -90.0, -90.0
    z[2] *= 1e4
    r[2] *= 1e4
    z[3, 1:150] = -INF  # the first tiles hold nothing
    r[3, 1:150] = -INF
    z[4, -1], r[4, -1] = 300.0, 299.0  # far above the first tile
    r[5, 3] = -INF
    z[6, 3] = -INF
    z[7] += 50.0
    check(rows_of(z, r, method), return_stats=True)
    check(rows_of(z, r, method, temperature=0.3), reduction="none")


@pytest.mark.parametrize("method", METHODS)
def test_broken_rows_are_nan_and_others_are_not(method: str) -> None:
    z = torch.randn(6, VOCAB)
    r = torch.randn(6, VOCAB)
    z[0, 5], r[1, 5], z[2, 5], r[3, 5], z[4] = NAN, NAN, INF, INF, -INF
    batch = rows_of(z, r, method)
    check(batch, reduction="none")
    check(batch.with_options(negative_ids=torch.tensor([5])), reduction="none")


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_known_values(dtype: torch.dtype) -> None:
    """Any finite logit is a logit, one side may be shifted, and one rule says what is broken."""
    for keywords in ({"reduction": "none"}, {"reduction": "sum"}):

        def result(batch: Batch, keywords: Any = keywords) -> Any:
            return run(on_device(batch), "triton", return_stats=True, **keywords)

        hard_rows.assert_known(result, dtype, str(keywords))
    hard_rows.assert_known_of_shards("triton", dtype, prepare=on_device)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["masks", "shifts", "broken"])
def test_finite_masks_shifts_and_broken_rows(kind: str, dtype: torch.dtype) -> None:
    for batch in itertools.islice(getattr(hard_rows, kind)(dtype, VOCAB), 0, None, 5):
        check(batch, f"{kind} {batch.options['method']}", reduction="none", return_stats=True)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_removed_tokens_with_the_lowest_logit(dtype: torch.dtype) -> None:
    """Whose exponent is infinite, in a set that is written behind the other entries and in one that is not."""
    z = torch.randn(3, 60)
    z[:, ::2] = torch.tensor([[1.0], [0.5], [0.3]]) * torch.finfo(dtype).min
    for method, count in itertools.product(("tnff", "tnrr"), (5, 40)):
        batch = Batch(z.to(dtype), z.to(dtype), torch.ones(3, dtype=torch.int64))
        check(batch.with_options(method=method, negative_ids=torch.arange(count)), reduction="sum")


@pytest.mark.skipif(not INTERPRETED, reason="asking a GPU would wait for it")
def test_labels_and_ids_out_of_range_raise_on_a_cpu() -> None:
    leaf, z = torch.randn(3, VOCAB, requires_grad=True), torch.randn(3, VOCAB)
    hidden, weight = torch.randn(3, 4), torch.randn(VOCAB, 4)
    labels, ids = torch.tensor([3, VOCAB, 1]), torch.tensor([[-1], [-1], [VOCAB]])
    message = f"labels: row 1 has label {VOCAB}, expected 0 <= label < V"
    for call, arguments in (
        (tnt.tnt_loss, (leaf, z)),
        (tnt.tnt_loss, (z, z)),
        (tnt.linear_tnt_loss, (hidden, weight, hidden, weight)),
    ):
        for reduction in ("mean", "none"):
            options = {"reduction": reduction, "backend": "triton"}
            with pytest.raises(ValueError, match=message):
                call(*arguments, labels, **options)
            with pytest.raises(ValueError, match=f"negative_ids: row 2 has id {VOCAB}, expected"):
                call(*arguments, labels % VOCAB, negative_ids=ids, **options)


def test_labels_and_ids_out_of_range_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody asks, as it would mean to wait for a GPU."""
    monkeypatch.setattr(BACKENDS["triton"], "check_indices", lambda *_: None)
    z = torch.randn(5, VOCAB, device=DEVICE, requires_grad=True)
    labels = torch.tensor([3, VOCAB, -1, 2**40, 4], device=DEVICE)
    ids = torch.tensor([[1], [1], [1], [1], [VOCAB]], device=DEVICE)
    loss = tnt.tnt_loss(
        z,
        z.detach() + 1,
        labels,
        method="tnff",
        negative_ids=ids,
        reduction="none",
        backend="triton",
    )
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, True, True, True]
    assert z.grad.isnan().all(-1).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_nothing_to_do_at_p_equal_q(dtype: torch.dtype) -> None:
    z = (5 * torch.randn(4, VOCAB, device=DEVICE)).to(dtype)
    for method in ("tnff", "tnrr"):
        for reduction in ("mean", "none"):
            batch = Batch(z, z.clone(), torch.arange(4, device=DEVICE), None, {"method": method})
            result = run(batch, "triton", reduction=reduction)
            assert (result.loss == 0).all()
            assert (result.gradient == 0).all()


def test_next_to_p_equal_q() -> None:
    """The relative error of loss and gradient does not grow with the distance's inverse."""
    r = 3 * torch.randn(4, VOCAB, dtype=torch.float64)
    for size in (1e-1, 1e-2, 1e-3, 1e-4):
        z = (r + size * torch.randn(r.shape, dtype=torch.float64)).float()
        for method in ("tnff", "tnrr"):
            batch = on_device(Batch(z, r.float(), torch.arange(4), None, {"method": method}))
            expected = truth(batch)
            losses = [
                run(batch, "triton", reduction="none").loss,
                run(batch, "triton", reduction="sum").loss,
            ]
            torch.testing.assert_close(
                losses[0].double(), expected.terms.loss, rtol=2e-5 + 3e-8 / size, atol=0
            )
            torch.testing.assert_close(
                losses[1].double(), expected.terms.loss.sum(), rtol=2e-5 + 3e-8 / size, atol=0
            )


def test_ignored_rows_are_not_read_and_no_rows() -> None:
    z = torch.full((3, VOCAB), NAN, device=DEVICE, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        loss = tnt.tnt_loss(
            z, z.detach(), torch.tensor([-100, 1, 2], device=DEVICE), torch.zeros(3, device=DEVICE), method="tnrf",
            reduction=reduction, backend="triton",
        )  # fmt: skip
        assert (loss == 0).all()
        loss.sum().backward()
        assert (z.grad == 0).all()
        nothing = tnt.tnt_loss(
            z[:0], z[:0].detach(), torch.empty(0, dtype=torch.int64, device=DEVICE), reduction=reduction,
            backend="triton",
        )  # fmt: skip
        assert (nothing == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_in_place_fresh_strided_and_scaled(dtype: torch.dtype) -> None:
    """Rows may lie anywhere, and runs repeat to the last bit, whatever else is asked for."""
    batch = on_device(mixed_batch(VOCAB, dtype).with_options(method="tnrf"))
    want = run(batch, "triton")
    assert identical(run(batch, "triton"), want)
    assert identical(run(batch, "triton", inplace=True), want)
    for z_at, r_at in ((1, 1), (1, 0), (8, 3)):
        moved = batch
        for name, at in (("logits", z_at), ("ref_logits", r_at)):
            wide = torch.full((len(batch.labels), VOCAB + 9), NAN, dtype=dtype, device=DEVICE)
            wide[:, at : at + VOCAB] = getattr(batch, name)
            moved = replace(moved, **{name: wide[:, at : at + VOCAB]})
        check(moved, f"at {z_at}, {r_at}")
        check(moved, f"at {z_at}, {r_at}", inplace=True)
    scaled = run(batch, "triton", upstream=torch.tensor(2.0, device=DEVICE), inplace=True)
    if dtype != F16:  # whose subnormals round
        assert torch.equal(scaled.gradient, 2 * want.gradient) or dtype == BF16
        torch.testing.assert_close(scaled.gradient, 2 * want.gradient, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_usual_rows_are_served_by_the_kernel_of_kl_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether logits are near or far apart, on one level or not, with a set or without; at any address.

    Whatever is asked for, and of shards; but where a label is pushed down in part, not the statistics.
    """
    left: list[Tensor] = []
    launch = triton._launch_kl
    monkeypatch.setattr(triton, "_launch_kl", lambda *x: left.append(launch(*x)) or left[-1])
    generator = torch.Generator().manual_seed(4)
    weights = torch.tensor([1.0, -1.0, 0.0, -3.0, -0.4])
    ids = torch.randint(VOCAB, (5, 7), generator=generator)
    sets = (("tnff", None), ("tnrr", ids), ("tnrf", ids[0]))
    distances = (1e-3, 0.0), (0.3, 0.75), (1.0, 0.0)
    for (size, shift), (method, negative_ids) in itertools.product(distances, sets):
        r = 3 * torch.randn(5, VOCAB, generator=generator, dtype=F64)
        z = r + shift + size * torch.randn(r.shape, generator=generator, dtype=F64)
        wide = torch.zeros(2, 8, VOCAB + 10, dtype=dtype)[:, :5, 3 : VOCAB + 3]
        wide.copy_(torch.stack((z, r)))
        batch = Batch(wide[0], wide[1], torch.arange(5), weights, {"method": method})
        batch = batch.with_options(negative_ids=negative_ids)
        check(batch, f"{method} {size}")
        assert not left.pop().any(), (method, size, shift)
        check(batch, f"{method} {size}, a loss a row", reduction="none")
        assert not left.pop().any(), (method, size, shift)
        check(batch, f"{method} {size}, statistics", return_stats=True)
        assert not left.pop()[:4].any(), (method, size, shift)
        batch = on_device(batch)
        shards = run_shards(batch, "triton", (70, VOCAB - 70), with_stats=False)
        assert_agrees(shards, truth(batch), batch)
        assert not torch.stack([left.pop(), left.pop()]).any(), (method, size, shift)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled(inplace: bool) -> None:
    """The kernels are one opaque operator of the graph."""
    batch = on_device(mixed_batch(VOCAB).with_options(method="tnrf"))

    def step(z: Tensor, r: Tensor, ids: Tensor) -> Tensor:
        return tnt.tnt_loss(
            z * 1,
            r,
            batch.labels,
            batch.weights,
            method="tnrf",
            negative_ids=ids,
            inplace=inplace,
            backend="triton",
        )

    arguments = (batch.ref_logits, batch.options["negative_ids"])
    z = batch.logits.clone().requires_grad_()
    loss = torch.compile(step, backend="aot_eager", fullgraph=True)(z, *arguments)
    loss.backward()
    want = run(batch, "triton")
    assert identical((loss.detach(), z.grad), want[:2])


def test_a_gradient_in_bfloat16_of_float32_logits() -> None:
    """The interpreter truncates what it stores."""
    for method, smoothing in (("tnff", "negatives"), ("tnrr", "uniform"), ("ul+ll", "negatives")):
        batch = on_device(mixed_batch(VOCAB)).with_options(method=method, smoothing=smoothing)
        assert_rounds_its_gradient(batch, "triton", rounding=2**-7)


# --- a sharded vocabulary: the three launches in one process ------------------------------------------------------


def check_kept(batch: Batch, objective: tnt.Objective, kept: Tensor) -> None:
    """The number of columns outside the set, from which the other backends learn how many it holds."""
    vocab = batch.logits.size(-1)
    for row, ids in enumerate(batch.options["negative_ids"].tolist()):
        label, weight = int(batch.labels[row]), float(batch.weights[row])
        held = {k for k in ids if k >= 0}
        if weight < 0:
            held.add(label)
        if held and weight != 0 and label != -100 and objective.negative != "none":
            assert kept[row] == vocab - len(held), row


def sharded(batch: Batch, cuts: list[int], reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and diagnostics of logits cut at these columns."""
    options = dict(batch.options)
    objective = resolve_method(options.pop("method"))
    scalars = Scalars(
        objective.positive_loss, objective.negative_loss, options.get("alpha", 1.0), options.get("eps", 1e-6),
        options.get("smoothing", "negatives") == "uniform", options.get("nl_floor"), options.get("temperature", 1.0),
        -100, reduction, None,
    )  # fmt: skip
    vocab, rows = batch.logits.size(-1), len(batch.labels)
    edges = list(itertools.pairwise([0, *cuts, vocab]))
    launch = BACKENDS["triton"].launch
    make = {"dtype": F32, "device": DEVICE}

    def call(kind: Kind, begin: int, end: int) -> RowCall:
        tensors = RowTensors(
            batch.ref_logits[:, begin:end], batch.labels, batch.weights, None,
            options.get("negative_ids"), None,
        )  # fmt: skip
        return RowCall(kind, batch.logits[:, begin:end], tensors, scalars, begin, vocab)

    diagnostics = torch.empty(ROW_DIAGNOSTICS, rows, **make)
    gathered = torch.empty(len(edges), rows, ROW_STATISTICS, **make)
    for shard, (begin, end) in enumerate(edges):
        first = call(Kind.STATISTICS, begin, end)
        launch(first._replace(statistics=gathered[shard], diagnostics=diagnostics))
    check_kept(batch, objective, gathered[..., -1].sum(0))
    partial_sums = torch.empty(len(edges), rows, ROW_PARTIAL_SUMS, **make)
    gradient = torch.empty_like(batch.logits)
    waits = scalars.gradient_needs_totals
    for shard, (begin, end) in enumerate(edges):
        mine = None if waits else gradient[:, begin:end]
        second = call(Kind.PARTIAL_SUMS, begin, end)
        launch(second._replace(gathered=gathered, partial_sums=partial_sums[shard], gradient=mine))
    total_sums = partial_sums.sum(0)
    loss = torch.empty(rows if reduction == "none" else (), **make)
    for begin, end in edges:
        mine = gradient[:, begin:end] if waits else None
        last = call(Kind.FINISH, begin, end)._replace(gathered=gathered, total_sums=total_sums)
        launch(last._replace(gradient=mine, loss=loss, diagnostics=diagnostics))
    return loss, gradient, diagnostics


@pytest.mark.parametrize("smoothing", ["negatives", "uniform"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: "-".join(o))
def test_sharded_vocabulary(objective: tnt.Objective, smoothing: str) -> None:
    batch = on_device(mixed_batch(VOCAB).with_options(method=objective, smoothing=smoothing))
    if objective.negative == "negative_likelihood":
        batch = batch.with_options(nl_floor=-7.0)
    for cuts in ([70], [3, 120, 121]):
        loss, gradient, diagnostics = sharded(batch, cuts, "mean")
        result = Result(loss, gradient, tnt.RowStats(*diagnostics.unbind()))
        assert_agrees(result, truth(batch), batch, label=str(cuts))


@pytest.mark.skipif(
    not INTERPRETED, reason="the other backend takes its tensors where they are, at its own pace"
)
@pytest.mark.parametrize("smoothing", ["negatives", "uniform"])
def test_backends_understand_each_other(smoothing: str) -> None:
    """What shards tell each other means the same (docs/sharded.md)."""
    batch = mixed_batch(VOCAB).with_options(smoothing=smoothing, nl_floor=-5.0)
    upstream = torch.linspace(-1, 2, 12)
    for objective in OBJECTIVES[:4]:
        some = batch.with_options(method=objective)
        for names in (("triton", "torch"), ("torch", "triton")):
            result = run_shards(some, names, (70, VOCAB - 70), reduction="none", upstream=upstream)
            assert_agrees(
                result, truth(some), some, reduction="none", upstream=upstream, label=str(names)
            )


# --- differences to the reference, and a gradient's upstream factors ----------------------------------------------


launched = partial(launched_by, "triton", differences=True)


def at_odd_addresses(batch: Batch, dtype: torch.dtype) -> Batch:
    """Both rows of logits as many columns after a boundary."""
    rows, vocab = batch.logits.shape
    wide = torch.full((2, rows + -rows % 8, vocab + 10), NAN, dtype=dtype, device=DEVICE)
    wide = wide[:, :rows, 3 : vocab + 3]
    wide.copy_(torch.stack((batch.logits, batch.ref_logits)))
    return replace(on_device(batch), logits=wide[0], ref_logits=wide[1])


def truth_of_differences(batch: Batch) -> Truth:
    """In float64, with the tolerance of sums that are rounded to float32."""
    r = batch.ref_logits.double()
    sums = replace(batch, logits=batch.logits.double() + r, ref_logits=r)
    rounded = replace(sums, logits=sums.logits.float(), ref_logits=r.float())
    return Truth(*truth(sums)[:2], *truth(rounded)[2:])


def far_and_near_differences(vocab: int) -> Batch:
    """Those of ``mixed_batch``; rows 0 and 9 have a masked vocabulary: by the reference, some of it by both."""
    batch = mixed_batch(vocab, ids=0)
    d, r, masked = batch.logits - batch.ref_logits, batch.ref_logits, torch.tensor([[0], [9]])
    r[masked, torch.arange(20, 40)] = -INF
    d[masked, torch.arange(30, 40)] = -INF
    batch.labels[masked] = 50
    return replace(batch, logits=d)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("method", ["tnff", "tnrr", "tnfll", "ul+ll", "nl+ll"])
def test_differences(method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once and later, in place and elsewhere, with sets of every kind."""
    monkeypatch.setattr(triton, "_IDS_AT_ONCE", 16)
    vocab, upstream = 101, torch.arange(-5, 7, device=DEVICE) / 4
    plain = far_and_near_differences(vocab).with_options(method=method)
    generator = torch.Generator().manual_seed(2)
    shapes = ((12, 0), (12, 5), (12, 40), (20,))
    turn = (F32, BF16, F16).index(dtype)
    for later, reduction, asked in ((False, "mean", upstream[7:8]), (True, "none", upstream)):
        ids = torch.randint(vocab, shapes[(turn + later) % len(shapes)], generator=generator)
        batch = at_odd_addresses(plain.with_options(negative_ids=ids), dtype)
        expected, inplace = truth_of_differences(batch), later == (dtype == F32)
        result = launched(
            batch, reduction=reduction, upstream=asked, inplace=inplace, later=later, stats=later
        )
        label = f"{later=} {tuple(ids.shape)}"
        assert_agrees(result, expected, batch, reduction=reduction, upstream=asked, label=label)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("method", ["tnff", "tnrr"])
def test_differences_next_to_p_equal_q(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the log-ratios, to all their digits; and where they are 0, loss and gradient are."""
    left: list[Tensor] = []
    launch = triton._launch_kl
    monkeypatch.setattr(triton, "_launch_kl", lambda *x: left.append(launch(*x)) or left[-1])
    r = 3 * torch.randn(3, 101) + torch.tensor([[0.0], [20.0], [-200.0]])
    r[1, :30] = -INF
    labels, upstream = torch.full((3,), 60), torch.tensor([2.0**12], device=DEVICE)
    for size, error in ((0.0, 0.0), (1e-3, {F32: 1e-5, BF16: 1e-2, F16: 1e-3}[dtype])):
        near = Batch(size * torch.randn(r.shape), r, labels, None, {"method": method})
        batch = at_odd_addresses(near, dtype)
        expected = truth_of_differences(batch)
        for result in (
            launched(batch, reduction="sum", upstream=upstream),
            launched(batch, reduction="sum", upstream=upstream, later=True),
            run_shards(
                batch, "triton", (40, 61), reduction="sum", upstream=upstream, differences=True
            ),
        ):
            loss, gradient = expected.terms.loss.sum(), expected.gradient * upstream.double()
            assert (result.loss.double() - loss).abs() <= 1e-5 * loss
            off = (result.gradient.double() - gradient).norm(dim=-1)
            assert (off <= error * gradient.norm(dim=-1)).all()
    assert left
    assert not torch.cat(left).any()  # the kernel of KL rows serves them


def test_differences_of_shards() -> None:
    """Their gradient is written in the second launch, or it waits for total sums."""
    upstream = torch.tensor([0.5], device=DEVICE)
    plain = far_and_near_differences(101).with_options(nl_floor=-7.0)
    plain = plain.with_options(negative_ids=torch.randint(101, (12, 5)))
    for method, smoothing in (("tnrf", "negatives"), ("nl+ll", "negatives"), ("tnrr", "uniform")):
        batch = at_odd_addresses(plain.with_options(method=method, smoothing=smoothing), BF16)
        result = run_shards(batch, "triton", (40, 61), upstream=upstream, differences=True)
        assert_agrees(result, truth_of_differences(batch), batch, upstream=upstream, label=method)


def test_differences_of_broken_rows() -> None:
    """A logit of -inf is removed by either row; one that is no number, or +inf, breaks the row."""
    d, r = torch.randn(2, 7, 101)
    d[0, 5], d[1, 5], r[2, 5], r[3, 5], r[4, 5] = -INF, NAN, NAN, INF, -INF
    d[4, 5], d[5, 5], r[6] = INF, INF, -INF
    for method, weight in (("tnff", 1.0), ("tnrr", 1.0), ("ul+ll", -1.0)):
        rows = Batch(d, r, torch.zeros(7, dtype=torch.int64), torch.full((7,), weight))
        batch = on_device(rows.with_options(method=method))
        result = launched(batch, reduction="none")
        assert_agrees(result, truth_of_differences(batch), batch, reduction="none", label=method)


def test_a_bfloat16_gradient_of_float32_differences() -> None:
    batch = at_odd_addresses(far_and_near_differences(101).with_options(method="tnrf"), F32)
    result = launched(batch, reduction="sum", gradient_dtype=BF16)
    rounded = replace(batch, logits=batch.logits.to(BF16))
    assert_agrees(result, truth_of_differences(batch), rounded, reduction="sum")


def test_upstream_factors_at_once() -> None:
    """Of a launch that writes the gradient by itself: it is 0 where a factor is, whatever the other one is."""
    mixed, upstream = mixed_batch(101), torch.arange(-5, 7, device=DEVICE) / 4
    mixed.logits[5] = NAN
    nobody = torch.tensor([7], device=DEVICE)  # of weight 0
    for method, smoothing in (("tnrf", "negatives"), ("ul+ll", "negatives"), ("tnff", "uniform")):
        batch = on_device(mixed.with_options(method=method, smoothing=smoothing))
        given = {"reduction": "none", "upstream": upstream.index_fill(0, nobody, NAN)}
        result = launched(batch, **given, differences=False)
        assert_agrees(result, truth(batch), batch, reduction="none", upstream=upstream)
    endless = batch.with_options(alpha=torch.full((12,), INF, device=DEVICE))
    result = launched(endless, reduction="none", upstream=0 * upstream[:1], differences=False)
    assert (result.gradient == 0).all()


# --- what only a GPU can show -------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("vocab", [32003, 128256, 262144])
def test_large_vocabularies(vocab: int, dtype: torch.dtype) -> None:
    for method in ("tnff", "tnrr", "tnrf", "ul+ll"):
        check(mixed_batch(vocab, dtype).with_options(method=method), return_stats=True)


@gpu
@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    rows, vocab = 2**31 // 128256 + 2, 128256
    z = (
        torch.randn(1, vocab, device=DEVICE, dtype=BF16)
        .expand(rows, -1)
        .contiguous()
        .requires_grad_()
    )
    r = torch.randn(1, vocab, device=DEVICE, dtype=BF16).expand(rows, -1)
    loss = tnt.tnt_loss(
        z * 1,
        r,
        torch.zeros(rows, dtype=torch.int64, device=DEVICE),
        reduction="sum",
        backend="triton",
        inplace=True,
    )
    loss.backward()
    assert torch.equal(z.grad[0], z.grad[-1])
    assert math.isfinite(loss.item())
