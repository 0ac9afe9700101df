"""The CUDA kernels on a model of a GPU: agreement with the oracle, and a model that notices what is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import hard_rows
import pytest
import torch
from cuda_model import MUTATIONS, SCHEDULES, build, installed, rows_left
from differences import check_close_models, check_differences
from fuzz import SmallCall
from oracle import (
    BF16,
    F16,
    F32,
    INF,
    NAN,
    OBJECTIVES,
    Batch,
    Result,
    assert_agrees,
    identical,
    mixed_batch,
    run,
    truth,
)
from shards import assert_rounds_its_gradient, cuts, losses_into, prepared, run_shards

import tnt_kernels as tnt
from tnt_kernels._call import RowCall
from tnt_kernels.backends import cuda

# Clusters or not, the largest, bytes of shared memory a block, the architecture that the kernels were compiled for:
# which path V = 803 takes.
MACHINES = {
    "two passes": (False, 1, 1 << 16, 80),
    "one block": (True, 1, 1 << 18, 90),
    "cluster": (True, 4, 3800, 90),
    "cluster, two passes": (True, 16, 1950, 90),
}
DTYPES = (F32, BF16, F16)


@pytest.fixture(scope="module")
def model() -> Iterator[ModuleType]:
    with installed(build()) as module:
        yield module


def check(batch: Batch, label: str = "", **keywords: Any) -> None:
    expected = truth(batch)
    upstream = torch.linspace(-1, 2, batch.labels.numel())
    for reduction, per_row in (("mean", None), ("none", upstream)):
        result = run(
            batch, "cuda", reduction=reduction, upstream=per_row, return_stats=True, **keywords
        )
        assert_agrees(
            result, expected, batch, reduction=reduction, upstream=per_row,
            label=f"{reduction} {label} {batch.options.get('method', '')}",
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_loss(model: ModuleType, machine: str, dtype: torch.dtype) -> None:
    for vocab, schedule in ((1, "forward"), (17, "reverse"), (803, "shuffled")):
        model.machine(*MACHINES[machine], SCHEDULES[schedule], 0)
        for smoothing in ("negatives", "uniform"):
            for objective in OBJECTIVES:
                batch = mixed_batch(vocab, dtype).with_options(
                    method=objective, smoothing=smoothing
                )
                check(batch, f"V={vocab} {smoothing}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("machine", MACHINES)
def test_differences(model: ModuleType, machine: str, dtype: torch.dtype) -> None:
    for vocab, schedule in ((1, "forward"), (17, "reverse"), (803, "shuffled")):
        model.machine(*MACHINES[machine], SCHEDULES[schedule], 0)
        for objective in OBJECTIVES:
            for gap in (0, 3):
                check_differences(vocab, dtype, "cuda", gap, method=objective)
        check_differences(vocab, dtype, "cuda", method=OBJECTIVES[0], smoothing="uniform")
    for method in ("tnff", "tnrr"):
        check_close_models(dtype, "cuda", method)


@pytest.mark.parametrize("machine", MACHINES)
def test_random_calls(model: ModuleType, machine: str) -> None:
    """Against the oracle that shares no code with the library."""
    for index in range(list(MACHINES).index(machine), 200, len(MACHINES)):
        schedule = list(SCHEDULES.values())[index % 3]
        model.machine(*MACHINES[machine], schedule, 0)
        SmallCall(0, index).check("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_ptx_of_an_older_architecture(model: ModuleType, dtype: torch.dtype) -> None:
    """Compiled by the driver for a device with clusters, of which the kernels then know nothing."""
    for machine in ("one block", "cluster, two passes"):
        model.machine(*MACHINES[machine][:-1], 80, SCHEDULES["forward"], 0)
        for objective in OBJECTIVES[:4]:
            check(mixed_batch(803, dtype).with_options(method=objective), machine)
            check_shards(mixed_batch(803, dtype).with_options(method=objective), machine, False)


KEYWORDS: tuple[dict[str, Any], ...] = (
    {"alpha": -2.5},
    {"alpha": torch.linspace(-1, 2, 12)},
    {"temperature": 0.5},
    {"temperature": 1.7, "smoothing": "uniform"},
    {"eps": 0.0},
    {"nl_floor": -9.0},
    {"negative_ids": torch.tensor([17, -1, 600, 17, 0, 31, 32, -1])},
    {"negative_ids": torch.randperm(803, generator=torch.Generator().manual_seed(0))[:500]},
)


@pytest.mark.parametrize("keywords", KEYWORDS, ids=lambda x: next(iter(x)))
@pytest.mark.parametrize("machine", ["two passes", "cluster"])
def test_keywords(model: ModuleType, machine: str, keywords: dict[str, Any]) -> None:
    model.machine(*MACHINES[machine], SCHEDULES["forward"], 0)
    for method in ("tnff", "tnrr", "ul+ll", "nl+ll"):
        check(mixed_batch(803, BF16).with_options(method=method, **keywords), str(keywords))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_of_any_alignment_in_place(
    model: ModuleType, machine: str, dtype: torch.dtype
) -> None:
    """Views into a wider buffer, whose other bytes stay; the gradient over the logits has a new one's bits."""
    model.machine(*MACHINES[machine], SCHEDULES["shuffled"], 0)
    plain = mixed_batch(803, dtype)
    for offset in (0, 1, 3, 6):
        wide = torch.full((12, 803 + 7 + offset), NAN, dtype=dtype)
        view = wide[:, offset : offset + 803]
        view.copy_(plain.logits)
        before = wide.clone()
        leaf = view.detach().requires_grad_()
        batch = Batch(leaf, plain.ref_logits, plain.labels, plain.weights, plain.options)
        fresh = run(batch, "cuda")
        assert_agrees(fresh, truth(plain), plain, label=f"offset {offset}")
        assert torch.equal(wide.nan_to_num(7.0), before.nan_to_num(7.0))
        # Where the reference begins equally far behind a boundary, and where it does not.
        for ref_logits in (
            plain.ref_logits,
            wide.clone()[:, offset : offset + 803].copy_(plain.ref_logits),
        ):
            results = [
                run(Batch(view.clone(), ref_logits, *_rest(plain)[1:]), "cuda", inplace=inplace)
                for inplace in (False, True)
            ]
            assert_agrees(results[0], truth(plain), plain, label=f"offset {offset}")
            assert torch.equal(results[0].gradient, results[1].gradient)
            assert torch.equal(results[0].loss, results[1].loss)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_gradient_in_bfloat16_of_float32_logits(model: ModuleType, machine: str) -> None:
    model.machine(*MACHINES[machine], SCHEDULES["shuffled"], 0)
    for objective, smoothing in itertools.product(OBJECTIVES, ("negatives", "uniform")):
        options = {"method": objective, "smoothing": smoothing}
        for vocab in (17, 803) if smoothing == "negatives" else (803,):
            assert_rounds_its_gradient(mixed_batch(vocab).with_options(**options), "cuda")


def _rest(batch: Batch) -> tuple[Any, ...]:
    return batch.ref_logits, batch.labels, batch.weights, batch.options


def test_gradient_over_the_logits_alone(model: ModuleType) -> None:
    """In a wider buffer at any offset: no neighbour's byte is written."""
    plain = mixed_batch(803, BF16)
    for machine, offset in itertools.product(MACHINES, (0, 1, 5)):
        model.machine(*MACHINES[machine], SCHEDULES["reverse"], 0)
        wide = torch.full((12, 840), 7.0, dtype=BF16)
        base = wide.clone().requires_grad_()
        moved = base * 1
        view = moved[:, offset : offset + 803]
        with torch.no_grad():
            view.copy_(plain.logits)
        tnt.tnt_loss(
            view, plain.ref_logits, plain.labels, plain.weights, inplace=True, backend="cuda",
            **plain.options,
        )  # fmt: skip
        assert (moved[:, :offset] == 7).all()
        assert (moved[:, offset + 803 :] == 7).all()
        assert not (view == plain.logits).all()


@pytest.mark.parametrize("machine", MACHINES)
def test_nothing_moves_at_the_reference(model: ModuleType, machine: str) -> None:
    """p = q gives exactly 0, whatever the alignment of the two."""
    model.machine(*MACHINES[machine], SCHEDULES["forward"], 0)
    z = 3 * torch.randn(4, 803, generator=torch.Generator().manual_seed(0))
    for dtype, method in itertools.product(DTYPES, ("tnff", "tnrr")):
        wide = torch.zeros(4, 810, dtype=dtype)
        reference = wide[:, 3:806]
        reference.copy_(z)
        batch = Batch(z.to(dtype), reference, torch.zeros(4, dtype=torch.long))
        result = run(batch.with_options(method=method), "cuda")
        assert result.loss == 0
        assert (result.gradient == 0).all()


@pytest.mark.parametrize("machine", MACHINES)
def test_infinities_and_indices_out_of_range(model: ModuleType, machine: str) -> None:
    model.machine(*MACHINES[machine], SCHEDULES["forward"], 0)
    z, r = torch.randn(2, 6, 200, generator=torch.Generator().manual_seed(0))
    z[0, 3:50], r[1, 3:50], z[2, 7], z[3] = -INF, -INF, NAN, -INF
    z[4] *= 1e4
    batch = Batch(z, r, torch.arange(6) * 30)
    for method in ("tnff", "tnrr", "nl+ll"):
        check(batch.with_options(method=method))
    labels = torch.tensor([5, 200, -3, 7, 8, 9])
    ids = torch.full((6, 2), -1)
    ids[3, 1], ids[4, 0] = 10**12, -2
    loss, stats = tnt.tnt_loss(
        r.nan_to_num(neginf=0.0), r, labels, negative_ids=ids, reduction="none", return_stats=True,
        backend="cuda",
    )  # fmt: skip
    assert loss.isnan().tolist() == [False, True, True, True, True, False]
    assert stats.entropy.isnan()[[1, 2, 3, 4]].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("machine", MACHINES)
def test_hard_rows(model: ModuleType, machine: str, dtype: torch.dtype) -> None:
    """Any finite logit is a logit, one side may be shifted, and one rule says what is broken."""
    model.machine(*MACHINES[machine], SCHEDULES["forward"], 0)
    for reduction in ("none", "sum"):

        def result(batch: Batch, reduction: str = reduction) -> Any:
            return run(batch, "cuda", reduction=reduction, return_stats=True)

        hard_rows.assert_known(result, dtype, f"{machine} {reduction}")
    for batches in (hard_rows.masks, hard_rows.shifts, hard_rows.broken):
        for batch in itertools.islice(batches(dtype, 803), list(MACHINES).index(machine), None, 5):
            expected = truth(batch)
            found = run(batch, "cuda", reduction="none", return_stats=True)
            assert_agrees(
                found, expected, batch, reduction="none",
                label=f"{batches.__name__} {batch.options['method']}",
            )  # fmt: skip


def test_the_same_bits_whatever_the_schedule(model: ModuleType) -> None:
    batch = mixed_batch(803, BF16).with_options(method="tnrr")
    for machine in MACHINES.values():
        results = []
        for schedule in SCHEDULES.values():
            model.machine(*machine, schedule, 0)
            results.append(run(batch, "cuda"))
        for result in results[1:]:
            assert torch.equal(result.loss, results[0].loss)
            assert torch.equal(result.gradient, results[0].gradient)


def test_scaling_on_the_device(model: ModuleType) -> None:
    model.machine(*MACHINES["one block"], SCHEDULES["forward"], 0)
    for dtype in DTYPES:
        x = torch.randn(7, 33).to(dtype)
        for factor in (1.0, 0.25):
            scaled = x.clone()
            cuda.scale_(scaled, torch.tensor(factor))
            assert torch.equal(scaled, x * factor)


# ---- logits cut over the vocabulary: by stream_kernel, whatever the machine


def check_shards(batch: Batch, label: str = "", every_cut: bool = True) -> None:
    """The gradient as soon as it is known, and one that waits for backward."""
    expected, upstream = truth(batch), torch.linspace(-1, 2, len(batch.labels))
    some = list(cuts(batch.logits.size(-1)))
    for sizes in some if every_cut else some[-1:]:
        for reduction, per_row in (("mean", None), ("none", upstream)):
            if reduction == "mean" and not expected.terms.loss.isfinite().all():
                continue  # its gradients would be lost in a sum that is not finite
            result = run_shards(batch, "cuda", sizes, reduction=reduction, upstream=per_row)
            where = f"{reduction} {sizes} {label} {batch.options.get('method')}"
            assert_agrees(
                result, expected, batch, reduction=reduction, upstream=per_row, label=where
            )


@pytest.mark.parametrize(
    ("machine", "dtype"),
    [
        ("two passes", F32),
        ("two passes", F16),
        ("cluster, two passes", BF16),
    ],
)
def test_every_loss_of_shards(model: ModuleType, machine: str, dtype: torch.dtype) -> None:
    for vocab, schedule in ((1, "forward"), (17, "reverse"), (803, "shuffled")):
        model.machine(*MACHINES[machine], SCHEDULES[schedule], 0)
        for smoothing, objective in itertools.product(("negatives", "uniform"), OBJECTIVES):
            batch = mixed_batch(vocab, dtype).with_options(method=objective, smoothing=smoothing)
            check_shards(batch, f"V={vocab} {smoothing}", every_cut=vocab == 17)


@pytest.mark.parametrize("keywords", KEYWORDS, ids=lambda x: next(iter(x)))
def test_keywords_of_shards(model: ModuleType, keywords: dict[str, Any]) -> None:
    model.machine(*MACHINES["cluster, two passes"], SCHEDULES["forward"], 0)
    for objective in OBJECTIVES[:4]:
        batch = mixed_batch(803).with_options(method=objective, **keywords)
        expected = truth(batch)
        for normalizer in (None, 3.0, 0.0):
            whole = batch if normalizer is None else batch.with_options(normalizer=normalizer)
            result = run_shards(whole, "cuda", (300, 0, 503))
            assert_agrees(
                result, expected, batch, normalizer=normalizer, label=f"{keywords} {normalizer}"
            )


def test_edge_rows_of_shards(model: ModuleType) -> None:
    """-inf on a whole shard; the maximum by far in one; what is lost in one is lost in all."""
    model.machine(*MACHINES["two passes"], SCHEDULES["forward"], 0)
    z, r = torch.randn(2, 10, 90, generator=torch.Generator().manual_seed(0))
    z[0, :40], r[1, 30:], z[2, 7], r[3, 80] = -INF, -INF, NAN, NAN
    z[4, 50], z[5, 3], r[6, 60] = 1e4, INF, -INF  # reverse KL of row 6: +inf
    z[7, 2] = -INF  # forward KL: +inf
    z[8], r[8] = -1e4 * torch.rand(2, 90)
    ids = torch.full((10, 90), -1)
    ids[9] = torch.arange(90)  # nothing is left
    weights = torch.tensor([1.0, -1, 1, 1, -0.5, 1, 1, 1, -1, -1])
    for smoothing, objective in itertools.product(("negatives", "uniform"), OBJECTIVES[:4]):
        options = {"negative_ids": ids, "smoothing": smoothing, "method": objective}
        batch = Batch(z, r, torch.arange(10) * 9, weights, options)
        expected = truth(batch)
        for sizes in ((40, 50), (30, 0, 60)):
            result = run_shards(batch, "cuda", sizes, reduction="none", with_stats=False)
            assert_agrees(
                result, expected, batch, reduction="none", label=f"{objective} {smoothing}"
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_rows_of_shards(model: ModuleType, dtype: torch.dtype) -> None:
    model.machine(*MACHINES["two passes"], SCHEDULES["reverse"], 0)
    hard_rows.assert_known_of_shards("cuda", dtype)
    for batches in (hard_rows.masks, hard_rows.shifts, hard_rows.broken):
        for batch in itertools.islice(batches(dtype, 200), DTYPES.index(dtype), None, 5):
            check_shards(batch, batches.__name__, every_cut=False)


def test_nothing_moves_at_the_reference_of_shards(model: ModuleType) -> None:
    model.machine(*MACHINES["cluster, two passes"], SCHEDULES["reverse"], 0)
    z = 4 * torch.randn(4, 803, generator=torch.Generator().manual_seed(0))
    z[1] += 1000
    z[2, :400] = -INF
    for dtype, method in itertools.product(DTYPES, ("tnff", "tnrr")):
        batch = Batch(z.to(dtype), z.to(dtype), torch.zeros(4, dtype=torch.long))
        for sizes in cuts(803):
            result = run_shards(batch.with_options(method=method, temperature=0.7), "cuda", sizes)
            assert result.loss == 0
            assert (result.gradient == 0).all()


def test_more_shards_than_lanes(model: ModuleType) -> None:
    model.machine(*MACHINES["two passes"], SCHEDULES["forward"], 0)
    for method, dtype in (("tnrf", F32), ("tnfll", BF16)):
        batch = mixed_batch(70, dtype).with_options(method=method)
        result = run_shards(batch, "cuda", (2,) * 33 + (0, 4))
        assert_agrees(result, truth(batch), batch, label=method)


def test_the_maximum_of_nothing_says_nothing(
    model: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does what another backend sends in its place, far above these logits."""
    model.machine(*MACHINES["two passes"], SCHEDULES["forward"], 0)
    launch = cuda.launch

    def launch_like_others(call: RowCall) -> None:
        launch(call)
        if call.statistics is not None:
            for at in (0, 3, 6, 9):
                call.statistics[:, at].masked_fill_(call.statistics[:, at + 1] == -INF, 1e6)

    monkeypatch.setattr(cuda, "launch", launch_like_others)
    for method in ("tnff", "tnrr", "ul+ll"):
        batch = mixed_batch(300).with_options(method=method)
        z, r = batch.logits - 300, batch.ref_logits - 300
        z[:4, 100:], r[:4, 100:] = -INF, -INF  # the last of three shards holds nothing
        batch = Batch(z, r, *_rest(batch)[1:])
        result = run_shards(batch, "cuda", (60, 140, 100), reduction="none")
        assert_agrees(result, truth(batch), batch, reduction="none", label=method)


@pytest.mark.parametrize("smoothing", ["negatives", "uniform"])
def test_cuda_and_a_cpu_understand_each_other(model: ModuleType, cpu: str, smoothing: str) -> None:
    """What the shards of these backends tell each other means the same (docs/sharded.md)."""
    model.machine(*MACHINES["two passes"], SCHEDULES["forward"], 0)
    batch = mixed_batch(300).with_options(smoothing=smoothing, nl_floor=-5.0)
    upstream = torch.linspace(-1, 2, 12)
    for objective in OBJECTIVES[:4]:
        some = batch.with_options(method=objective)
        expected = truth(some)
        for names in (("cuda", cpu), (cpu, "cuda"), ("cuda", "torch"), ("torch", "cuda")):
            result = run_shards(some, names, (100, 200), reduction="none", upstream=upstream)
            assert_agrees(
                result, expected, some, reduction="none", upstream=upstream, label=str(names)
            )


# ---- kl_kernel: KLs, LL and UL

SERVED = tuple(x for x in OBJECTIVES if x.positive != "none" and "negative_l" not in x.negative)
KL_METHODS = tuple(name for name in tnt.METHODS if name != "nl+ll")
KL_MACHINES = {
    "one block": MACHINES["one block"],
    "cluster": MACHINES["cluster"],
    "8 blocks": (True, 8, 4000, 90),
}


def launched(
    batch: Batch, reduction: str, with_stats: bool, gradient: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and diagnostics of one launch that writes the gradient, in float16 too, or none."""
    call = prepared(batch, "cuda", reduction)
    return losses_into(gradient, batch.logits, call._replace(diagnostics=with_stats))


def check_kl(
    model: ModuleType, batch: Batch, label: str = "", reduction: str = "sum"
) -> list[list[int]]:
    """With a gradient and without: which rows were left to the other kernel, without statistics and with."""
    expected, all_left = truth(batch), []
    for with_stats in (False, True):
        gradient = torch.full_like(batch.logits, NAN)
        (loss, stats), left = rows_left(model, launched, batch, reduction, with_stats, gradient)
        assert left is not None
        all_left.append(left)
        rows = tnt.RowStats(*stats.unbind()) if with_stats else None
        where = (
            f"{reduction} {'statistics' if with_stats else ''} {label} {batch.options['method']}"
        )
        assert_agrees(
            Result(loss, gradient, rows), expected, batch, reduction=reduction, label=where
        )
        assert identical((loss, stats), launched(batch, reduction, with_stats, None)), where
    return all_left


#: The largest cluster once.
ON_KL_MACHINES = pytest.mark.parametrize(
    ("machine", "dtype"),
    [*itertools.product(("one block", "cluster"), DTYPES), ("8 blocks", F32)],
)


@ON_KL_MACHINES
def test_kl_kernel(
    model: ModuleType, machine: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method, on rows that it serves."""
    if machine == "8 blocks":
        monkeypatch.setenv("TNT_KERNELS_CUDA_CLUSTER", "8")
    some = (
        *((17, "reverse", "mean", x) for x in KL_METHODS[::2]),
        *((800, "forward", "mean", x) for x in KL_METHODS[1::2]),
        *((803, "shuffled", "sum", x) for x in KL_METHODS),
    )
    for vocab, schedule, reduction, method in some:
        model.machine(*KL_MACHINES[machine], SCHEDULES[schedule], 0)
        batch = mixed_batch(vocab, dtype).with_options(method=method)
        assert check_kl(model, batch, f"V={vocab}", reduction) == [[], []]
    for method in KL_METHODS:  # nothing is left outside of a set
        check_kl(model, mixed_batch(1, dtype).with_options(method=method), "V=1", "mean")


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_threads_a_block(
    model: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TNT_KERNELS_CUDA_THREADS", "64")
    for shared_bytes, method in itertools.product((1 << 18, 8000), KL_METHODS):
        model.machine(True, 4, shared_bytes, 90, SCHEDULES["shuffled"], 0)
        batch = mixed_batch(2100, dtype, rows=4).with_options(method=method)
        assert check_kl(model, batch, f"{shared_bytes}") == [[], []]
    monkeypatch.setenv("TNT_KERNELS_CUDA_THREADS", "100")
    model.machine(*KL_MACHINES["one block"], SCHEDULES["forward"], 0)
    with pytest.raises(
        RuntimeError, match="THREADS is 100, expected a multiple of 32 from 64 to 96"
    ):
        check_kl(model, batch)
    monkeypatch.delenv("TNT_KERNELS_CUDA_THREADS")
    model.machine(*KL_MACHINES["one block"], SCHEDULES["forward"], 0)


@pytest.mark.parametrize("keywords", KEYWORDS, ids=lambda x: next(iter(x)))
def test_keywords_of_kl_kernel(model: ModuleType, keywords: dict[str, Any]) -> None:
    if keywords.get("smoothing") == "uniform":
        pytest.skip("kl_kernel does not serve it")
    for machine, dtype in (("one block", F32), ("cluster", BF16)):
        model.machine(*KL_MACHINES[machine], SCHEDULES["forward"], 0)
        for method in ("tnff", "tnrr", "ul+ll", "tnfll"):
            batch = mixed_batch(803, dtype).with_options(method=method, **keywords)
            left = check_kl(model, batch, f"{keywords}", "mean")
            assert left == [[], []] or (method, *keywords) == ("tnrr", "eps")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_set_far_above_the_rest(model: ModuleType, dtype: torch.dtype) -> None:
    model.machine(*KL_MACHINES["one block"], SCHEDULES["forward"], 0)
    for depth, method in itertools.product((30.0, 1e3, 1e4, 6e4), KL_METHODS):

        def change(z: torch.Tensor, r: torch.Tensor, depth: float = depth) -> None:
            z -= depth
            r -= depth
            z[300] = r[300] = 0.0

        assert check_kl(model, hard_row(dtype, change, -1.0, method=method)) == [[], []]


@pytest.mark.parametrize("machine", ["one block", "cluster"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_known_rows_of_kl_kernel(model: ModuleType, machine: str, dtype: torch.dtype) -> None:
    model.machine(*KL_MACHINES[machine], SCHEDULES["shuffled"], 0)

    def result(batch: Batch) -> Result:
        gradient = torch.empty_like(batch.logits)
        loss, stats = launched(batch, "sum", True, gradient)
        return Result(loss, gradient, tnt.RowStats(*stats.unbind()))

    hard_rows.assert_known(result, dtype, machine)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("machine", ["one block", "cluster"])
def test_hard_rows_of_kl_kernel(model: ModuleType, machine: str, dtype: torch.dtype) -> None:
    model.machine(*KL_MACHINES[machine], SCHEDULES["shuffled"], 0)
    for batches in (hard_rows.masks, hard_rows.shifts, hard_rows.broken):
        some = (x for x in batches(dtype, 803) if x.options["method"] in SERVED)
        for batch in itertools.islice(some, DTYPES.index(dtype), None, 5):
            check_kl(model, batch, batches.__name__)


def hard_row(
    dtype: torch.dtype,
    change: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    weight: float = 1.0,
    **options: Any,
) -> Batch:
    """Three rows, near the reference; the one in the middle is changed."""
    generator = torch.Generator().manual_seed(2)
    z = 3 * torch.randn(3, 803, generator=generator)
    r = z + 0.3 * torch.randn(3, 803, generator=generator)
    if change:
        change(z[1], r[1])
    weights = torch.tensor([1.0, weight, -1.0])
    return Batch(z.to(dtype), r.to(dtype), torch.tensor([7, 300, 802]), weights, options)


def left_rows(dtype: torch.dtype) -> Iterator[tuple[str, Batch]]:
    """Rows that are not for kl_kernel, each between two that are."""

    def put(side: int, value: float, at: int = 500) -> Callable[[torch.Tensor, torch.Tensor], None]:
        return lambda *x: x[side].narrow(0, at, 1).fill_(value)

    def ids(*some: int) -> torch.Tensor:
        rows = torch.full((3, max(2, len(some))), -1)
        rows[1, : len(some)] = torch.tensor(some)
        return rows

    for method in ("tnff", "tnrr"):
        everything = ids(*range(803))
        yield "nothing is left", hard_row(dtype, method=method, negative_ids=everything)
        if dtype != F32:
            yield "levels too far apart", hard_row(dtype, lambda z, r: r.add_(90.0), method=method)
        for side, value in itertools.product((0, 1), (NAN, INF)):
            yield f"{value} of {'zr'[side]}", hard_row(dtype, put(side, value), method=method)
    yield "an infinite forward KL", hard_row(dtype, put(0, -INF), method="tnff")
    yield "an infinite reverse KL", hard_row(dtype, put(1, -INF), method="tnrr")
    no_floor = hard_row(dtype, eps=0.0, negative_ids=ids(3, 500), method="tnrr")
    yield "no floor", replace(no_floor, weights=torch.ones(3))
    yield "-inf at the label", hard_row(dtype, put(0, -INF, 300), method="ul+ll")
    for method in ("tnff", "tnrr", "ul+ll"):
        for alpha in (0.0, NAN):
            alphas = torch.tensor([1.0, alpha, 1.0])
            yield f"alpha {alpha}", hard_row(dtype, weight=-1.0, alpha=alphas, method=method)
    yield "an infinite weight", hard_row(dtype, weight=INF, method="tnff")
    for value in (NAN, INF):
        yield f"{value}", hard_row(dtype, put(0, value), method="ul+ll")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_kl_kernel_leaves(model: ModuleType, dtype: torch.dtype) -> None:
    for machine in ("one block", "cluster"):
        model.machine(*KL_MACHINES[machine], SCHEDULES["shuffled"], 0)
        for name, batch in left_rows(dtype):
            assert check_kl(model, batch, name) == [[1], [1]], name
        for method in ("tnff", "tnrr", "ul+ll"):
            # what the CPU calls an error is a row of NaN
            for label, bad in ((803, -1), (-3, -1), (300, 803), (300, -2), (300, 10**12)):
                ids = torch.full((3, 2), -1)
                ids[1, 1] = bad
                batch = hard_row(dtype, method=method, negative_ids=ids)
                batch.labels[1] = label
                gradient = torch.zeros_like(batch.logits)
                (loss, stats), left = rows_left(model, launched, batch, "sum", True, gradient)
                assert left == [1], (label, method)
                assert loss.isnan()
                assert stats[0].isnan().tolist() == [False, True, False]
                assert gradient.isnan().all(-1).tolist() == [False, True, False]
                assert gradient[::2].isfinite().all()
            batch = hard_row(dtype, method=method, normalizer=0.0)
            gradient = torch.full_like(batch.logits, NAN)
            (loss, _), left = rows_left(model, launched, batch, "mean", False, gradient)
            assert left == [0, 1, 2]
            assert loss == 0
            assert (gradient == 0).all()


def retried_rows(dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., None]]]:
    """Of whose maximum a few entries say nothing."""

    def peak(z: torch.Tensor, r: torch.Tensor) -> None:  # between the entries that are looked at
        z[401] = r[401] = 60.0

    def half(z: torch.Tensor, r: torch.Tensor) -> None:
        z[:401] = r[:401] = -1e4

    def all_but_few(z: torch.Tensor, r: torch.Tensor) -> None:
        z[:790] = r[:790] = -1e4

    def shift(z: torch.Tensor, r: torch.Tensor) -> None:
        r += 30.0

    yield from (("peak", peak), ("half", half), ("all but few", all_but_few))
    if dtype != F32:
        yield "shift", shift


@ON_KL_MACHINES
def test_rows_that_kl_kernel_retries(model: ModuleType, machine: str, dtype: torch.dtype) -> None:
    schedules, weights = itertools.cycle(SCHEDULES.values()), itertools.cycle((1.0, -1.0))
    for (name, change), method in itertools.product(retried_rows(dtype), KL_METHODS):
        model.machine(*KL_MACHINES[machine], next(schedules), 0)
        batch = hard_row(dtype, change, next(weights), method=method)
        assert check_kl(model, batch, name) == [[], []], name


@pytest.mark.parametrize("machine", ["one block", "cluster"])
def test_entropy_of_nearly_deterministic_rows(model: ModuleType, machine: str) -> None:
    """Small differences of large numbers, unless the row's level is its maximum."""
    model.machine(*KL_MACHINES[machine], SCHEDULES["reverse"], 0)
    for height, at, method in itertools.product((17.0, 22.0, 28.0), (0, 401), KL_METHODS):

        def change(z: torch.Tensor, r: torch.Tensor, at: int = at, height: float = height) -> None:
            z *= 0.1
            z[at] = height
            r.copy_(z)

        batch = hard_row(F32, change, method=method)
        batch.labels[1] = at
        (_, stats), left = rows_left(
            model, launched, batch, "sum", True, torch.empty_like(batch.logits)
        )
        log_p = batch.logits[1].double().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum()
        assert left == []
        assert abs(stats[4, 1] - entropy) < 2.0**-21 + 1e-5 * entropy, (height, at, method)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("machine", ["one block", "cluster"])
def test_rows_between_junk(model: ModuleType, machine: str, dtype: torch.dtype) -> None:
    """Rows that begin anywhere, all equally far behind a boundary, with NaN around them, and a gradient that begins
    elsewhere: p = q gives exactly 0, and no byte outside is written."""
    schedules = itertools.cycle(SCHEDULES.values())
    some = (*((803, x) for x in range(8)), (1, 0), (1, 5), (17, 3), (17, 7), (800, 1))
    for vocab, offset in some:
        model.machine(*KL_MACHINES[machine], next(schedules), 0)
        columns = -(-(offset + vocab + 1) // 16) * 16
        plain = mixed_batch(vocab, dtype, rows=4)
        assert plain.ref_logits is not None

        def wide(x: torch.Tensor, at: int = offset, columns: int = columns) -> torch.Tensor:
            buffer = torch.full((len(x), columns + 16), NAN, dtype=x.dtype)
            buffer[:, at : at + x.size(-1)] = x
            return buffer[:, at : at + x.size(-1)]

        def outside_is_nan(x: torch.Tensor, buffer: torch.Tensor) -> bool:
            rest = buffer.clone()
            rest.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(NAN)
            return bool(rest.isnan().all())

        z = plain.logits.nan_to_num(0.0, 0.0)
        positive = torch.zeros(len(z), dtype=torch.long), torch.ones(len(z))
        for method in ("tnff", "tnrr"):
            same = Batch(wide(z), wide(z), *positive, {"method": method})
            mixed = Batch(wide(plain.logits), wide(plain.ref_logits), *_rest(plain)[1:])
            for batch in (same, mixed.with_options(method=method)):
                elsewhere = wide(torch.full_like(batch.logits, 7.0), (offset + 3) % 8)
                over = Batch(wide(batch.logits), *_rest(batch))
                dense = torch.full_like(z, 7.0)
                results = []
                for call, gradient in ((batch, elsewhere), (batch, dense), (over, over.logits)):
                    (loss, _), left = rows_left(model, launched, call, "sum", False, gradient)
                    assert left == [] or vocab == 1
                    results.append((loss, gradient))
                    buffer = gradient if gradient is dense else gradient._base
                    assert buffer is not None
                    assert outside_is_nan(gradient, buffer)
                assert identical(results[0], results[1])
                assert identical(results[0], results[2])
                if batch is same:
                    assert results[0][0] == 0
                    assert (dense == 0).all()
                elif offset % 3 == 1:  # the others have the same arithmetic
                    result = Result(results[0][0], dense, None)
                    assert_agrees(result, truth(batch), batch, reduction="sum")


#: "once": by kl_kernel. stream_kernel copies nothing and sends no messages.
@pytest.mark.parametrize(
    ("mutation", "reads"),
    [
        *itertools.product(MUTATIONS, ["once"]),
        *itertools.product((*MUTATIONS[:3], "early exit"), ["twice"]),
    ],
)
def test_the_model_notices(model: ModuleType, mutation: str, reads: str) -> None:
    """Broken on purpose, the kernels raise an error or disagree with the oracle, under some schedule."""
    batch = hard_row(BF16 if reads == "once" else F32, dict(retried_rows(F32))["half"], -1.0)
    smoothing = "negatives" if reads == "once" else "uniform"
    batch, noticed = batch.with_options(method="tnrr", smoothing=smoothing), False
    expected, reduction = truth(batch), "sum"
    for schedule in SCHEDULES.values():
        model.machine(*MACHINES["cluster"], schedule, 0)
        assert_agrees(run(batch, "cuda", reduction=reduction), expected, batch, reduction=reduction)
        model.machine(*MACHINES["cluster"], schedule, 1 + MUTATIONS.index(mutation))
        try:
            result = run(batch, "cuda", reduction=reduction)
            assert_agrees(result, expected, batch, reduction=reduction)
        except (RuntimeError, AssertionError):
            noticed = True
    model.machine(*MACHINES["cluster"], SCHEDULES["forward"], 0)
    assert noticed


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_likely_label(model: ModuleType, dtype: torch.dtype) -> None:
    """-log of what is next to 1, where odds and their logarithm cancel."""
    model.machine(*KL_MACHINES["one block"], SCHEDULES["forward"], 0)
    for above in (1.0, 10.0, 23.0, 60.0):
        z = torch.zeros(3, 17)
        z[:, 3] = above
        batch = Batch(z.to(dtype), None, torch.full((3,), 3), torch.ones(3), {"method": "ul+ll"})
        assert check_kl(model, batch, f"{above}") == [[], []]
