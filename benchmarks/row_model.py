"""How long kl_kernel takes on a GPU that is not here, from the issue slots that its machine code has.

A multiprocessor is a closed network: the blocks that find room on it go round between the memory (a queue), the
issue slots (a queue), and what neither hides (a delay). Its constants are fitted to what an H200 measured; ``errors``
says how far the model is from every one of those cases. What it says of code that has not run is a prediction.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results"
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
DISTANCES = (0.1, 0.3, 1.0, 3.0)

# ------------------------------------------------------------------------------------------------------ the device


class Device(NamedTuple):
    """Compute capability 9.0, as the CUDA programming guide's table has it."""

    name: str
    bandwidth: float  # bytes a microsecond
    clock: float  # cycles a microsecond
    multiprocessors: int = 132
    registers: int = 65536  # of a multiprocessor, given to warps by 256
    shared: int = 228 << 10  # of a multiprocessor
    shared_of_block: int = 227 << 10
    shared_reserved: int = 1 << 10  # of each block
    threads: int = 2048
    largest_cluster: int = 16


#: 3.0 and 4.3 TB/s are a little less than copies of the same bytes reach. The clocks: an H200's is what its profiles of
#: 636108d give (instructions over issue slots used, multiprocessors, schedulers and time: 1829 to 1837); an H100's is
#: assumed.
H100 = Device("H100", 3.0e6, 1755.0)
H200 = Device("H200", 4.3e6, 1835.0)

#: Of a multiprocessor's four schedulers, each an instruction a cycle.
ISSUES = 4

#: The blocks of a cluster share one of the device's groups of multiprocessors (GPCs), whose sizes differ from device to
#: device and are not known here: the model has no groups. Measured on an H200 (CUDA_NOTES.md): where three blocks find
#: room on a multiprocessor, 45 clusters of 8 are in flight, 360 of 396 places.
MEASURED_CLUSTERS = {(8, 3): 45}
#: Chosen to fit the times: sizes that are no power of two leave as large a share of the places empty as those clusters
#: of 8 do. Without it 3, 9, 10 and 11 blocks a row come out too fast; with it 16 would come out too slow.
FILLED = 360 / 396


def blocks_of(device: Device, registers: int, threads: int, shared: int) -> int:
    """How many blocks find room on a multiprocessor."""
    if shared > device.shared_of_block:
        return 0
    warps = threads // 32
    of_warp = -(-registers * 32 // 256) * 256
    return min(
        device.registers // (of_warp * warps),
        device.shared // (shared + device.shared_reserved),
        device.threads // threads,
    )


def clusters_of(device: Device, cluster: int, blocks: int) -> int:
    """How many clusters are in flight."""
    if found := MEASURED_CLUSTERS.get((cluster, blocks)):
        return found
    clusters = device.multiprocessors * blocks // cluster
    return clusters if cluster & (cluster - 1) == 0 else math.floor(FILLED * clusters)


class Layout(NamedTuple):
    """What the launch of a row is worked out from, all read from the source by the compiler."""

    group: int  # columns of a thread and step
    threads: int  # of a block
    steps: int  # of a block at most
    granule: int  # slices are multiples of it
    registers: int
    #: Bytes of a block, by vocabulary, blocks a row, and whether both rows are read.
    shared: Mapping[tuple[int, int, bool], int]


class Launch(NamedTuple):
    cluster: int
    slice: int
    shared: int
    blocks: int  # of a multiprocessor
    clusters: int  # in flight


def slice_of(layout: Layout, vocab: int, cluster: int) -> int:
    columns = vocab if vocab % layout.group == 0 else vocab + layout.group - 1
    return math.ceil(math.ceil(columns / cluster) / layout.granule) * layout.granule


def launch_of(
    layout: Layout, device: Device, vocab: int, pair: bool, cluster: int
) -> Launch | None:
    """With so many blocks a row; None where they do not fit."""
    columns, shared = slice_of(layout, vocab, cluster), layout.shared[vocab, cluster, pair]
    blocks = blocks_of(device, layout.registers, layout.threads, shared)
    if columns > layout.steps * layout.threads * layout.group or not blocks:
        return None
    clusters = clusters_of(device, cluster, blocks)
    return Launch(cluster, columns, shared, blocks, clusters) if clusters else None


def choose(layout: Layout, device: Device, vocab: int, pair: bool) -> Launch:
    """As csrc/cuda/rows.cuh: choose_kl does: the largest product of rows and warps in flight."""
    sizes = range(1, device.largest_cluster + 1)
    found = [x for c in sizes if (x := launch_of(layout, device, vocab, pair, c))]
    if not found:
        raise ValueError(f"no launch for a vocabulary of {vocab}")
    return max(found, key=lambda x: x.clusters * x.clusters * x.cluster)


# ------------------------------------------------------------------------------------------------------- the rows

Floats = NDArray[np.float64]


class Shares(NamedTuple):
    """Of a row's groups of 256 columns, which a warp takes together: how often they go each way, a row on average."""

    first: Mapping[str, float]  # near, middle, far; 1 together where no row's sums are taken twice
    maxima: float  # how often the row's maxima are looked for
    exchanges: float  # of the blocks; 1 where no row's sums are taken twice
    second: Mapping[str, float]  # by form; 1 together


#: Few entries of a row have most of its weight, so that rows differ.
ROWS = 32


def _bfloat16(x: NDArray[np.float32]) -> Floats:
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    found: Floats = rounded.view(np.float32).astype(np.float64)
    return found


def _phi(y: float) -> float:
    return math.expm1(y) - y


@cache
def shares(reverse: bool, distance: float, vocab: int = 128256) -> Shares:
    """Which paths the kernel takes in seeded rows, T = 1, nothing removed.

    The reference's logits have the spread of the benchmarks' rows, 3, and the policy's differ by ``distance``.
    """
    rows = [_shares_of_row(reverse, distance, vocab, seed) for seed in range(ROWS)]

    def mean(which: Callable[[Shares], Mapping[str, float]]) -> dict[str, float]:
        names = dict.fromkeys(name for row in rows for name in which(row))
        return {name: sum(which(row).get(name, 0.0) for row in rows) / len(rows) for name in names}

    maxima = sum(x.maxima for x in rows) / len(rows)
    exchanges = sum(x.exchanges for x in rows) / len(rows)
    return Shares(mean(lambda x: x.first), maxima, exchanges, mean(lambda x: x.second))


def _shares_of_row(reverse: bool, distance: float, vocab: int, seed: int) -> Shares:
    """The steps of csrc/cuda/kl_kernel.cuh."""
    generator = np.random.default_rng(seed)
    r = (3 * generator.standard_normal(vocab)).astype(np.float32)
    z = (r + distance * generator.standard_normal(vocab)).astype(np.float32)
    policy, reference = _bfloat16(z), _bfloat16(r)
    x, o = (policy, reference) if reverse else (reference, policy)
    # KlBlock::levels: 32 groups of 8 columns all along the row.
    some = (np.arange(32)[:, None] * (vocab // 256 * 8) + np.arange(8)).ravel()
    x_ref, o_ref = float(x[some].max()), float(o[some].max())
    more = float((o - x)[some].mean()) - (o_ref - x_ref)
    more = more if abs(more) < 16 else 0.0
    whole = vocab // 256 * 256
    first = {"near": 0.0, "middle": 0.0, "far": 0.0}
    maxima = 0
    kl = log_ratio = a = near = 0.0
    off = np.zeros(0)
    for attempt in range(3):  # KlBlock::judge
        a = o_ref - x_ref + more
        y = o - x - a
        off = np.abs(y[:whole]).reshape(-1, 256).max(1)
        near, far = float((off < 1).mean()), float((off >= 64).mean())
        first["near"] += near
        first["middle"] += 1 - near - far
        first["far"] += far
        e = np.exp(x - x_ref)
        more_than_1 = np.expm1(y)
        s, moved = float(e.sum()), float((e * more_than_1).sum())
        phi = float((e * (more_than_1 - y)).sum())
        log_ratio = math.log1p(moved / s)
        excess = _phi(log_ratio)
        kl = phi / s - excess
        in_range = 2.0**-40 < s < 2.0**40 and s + moved < 2.0**60 and log_ratio > -3
        if (in_range and excess <= 0.5 * abs(kl)) or attempt == 2:
            break
        if in_range or attempt > 0:
            more += log_ratio
        else:
            maxima += 1
            x_ref, o_ref, more = float(x.max()), float(o.max()), 0.0
    if not reverse:  # kl_coefficients
        if kl > 2.0**-16 or abs(log_ratio) > 2.0**-7:
            second = {"direct": 1.0}
        elif abs(log_ratio) > 0.25:
            second = {"far": 1.0}
        else:
            second = {"near": near, "far": 1 - near}
    else:
        # A warp whose groups, one a step, were all near takes the direct form, if the levels are not far apart.
        groups = off < 1
        warps, steps = 8, 8  # of a block; of a slice, as most vocabularies have
        full = len(groups) // (warps * steps) * warps * steps
        columns = groups[:full].reshape(-1, steps, warps)
        direct = float(columns.all(1).mean()) if abs(a) < 2 else 0.0
        near = float(groups.mean())
        second = {"direct": direct, "near": near - direct, "far": 1 - near}
    return Shares(first, maxima, attempt + 1 + maxima, second)


# --------------------------------------------------------------------------------------------------------- the model

#: Fitted, by ``python -m benchmarks.sass --fit``, to the mean square of the logarithms of modelled over measured times
#: of the cases that ``measured`` calls fitted. Microseconds of a block's life outside both queues: launch, first bytes,
#: exchange. (Queues of such a network wait longer than the kernel does: it is less than the profile's 3 to 4.)
DELAY = {"636108d": 1.386, "6df96f3": 1.791}
#: Fitted with it: for every block that a row waits for.
DELAY_OF_BLOCK = 0.171
#: Estimated, not fitted: an exchange more, where sums are taken twice (the chain that ``benchmarks.sass`` prints).
EXCHANGE = 0.53
#: Share of the rows that have a set in the measured problems: a negative weight, whose label is removed.
NEGATIVE = 0.25


class Case(NamedTuple):
    commit: str
    method: str  # "tnff" "tnrr" "ul+ll"
    gradient: bool
    vocab: int
    rows: int
    distance: float
    cluster: int
    ms: float
    bandwidth: float  # bytes a microsecond, of the copies in the same run
    fitted: bool


class Work(NamedTuple):
    """Of the code."""

    slots: Callable[
        [str, bool, float], float
    ]  # a pair, in the loops: by method, whether there is a gradient, distance
    fixed: tuple[float, float]  # instructions a warp besides, without and for the gradient


def profiled(work: Work) -> dict[str, Work]:
    """By commit, with the instructions outside the loops that a profile leaves for them: of TNFF, 0.3 apart."""
    run = json.loads((RESULTS / "gpu-h200-variants.json").read_text())["runs"][0]
    fixed = []
    for launch, gradient in (("tnff forward", False), ("tnff", True)):
        p = next(x for x in run["profiles"] if x["launch"] == launch)
        warps = p["rows"] * p["launch__cluster_size"] * 8  # blocks had 256 threads
        pairs = p["rows"] * p["vocab"] / 32
        in_loops = work.slots("tnff", gradient, 0.3)
        fixed.append((p["smsp__inst_executed.sum"] - in_loops * pairs) / warps)
    return {"636108d": work._replace(fixed=(fixed[0], fixed[1] - fixed[0]))}


def mva(blocks: float, memory: float, issue: float, delay: float) -> float:
    """Blocks a microsecond that leave a closed network of two queues and a delay. In between by interpolation."""

    def exact(count: int) -> float:
        rate = in_memory = in_issue = 0.0
        for n in range(1, count + 1):
            wait_memory, wait_issue = memory * (1 + in_memory), issue * (1 + in_issue)
            rate = n / (delay + wait_memory + wait_issue)
            in_memory, in_issue = rate * wait_memory, rate * wait_issue
        return rate

    low, part = int(blocks), blocks - int(blocks)
    return (1 - part) * exact(low) + (part * exact(low + 1) if part else 0.0)


def against_profile(work: Work) -> dict[str, tuple[float, float, float]]:
    """Instructions a pair: of 636108d's profile, counted in the loops, counted outside them on the shortest way."""
    run = json.loads((RESULTS / "gpu-h200-variants.json").read_text())["runs"][0]
    found = {}
    for p in run["profiles"]:
        gradient = not p["launch"].endswith(" forward")
        method = p["launch"].removesuffix(" forward")
        a_warp = p["vocab"] / p["launch__cluster_size"] / 256  # pairs a lane
        outside = work.fixed[0] + (work.fixed[1] if gradient else 0.0)
        pairs = p["rows"] * p["vocab"] / 32
        found[p["launch"]] = (
            p["smsp__inst_executed.sum"] / pairs, work.slots(method, gradient, 0.3), outside / a_warp,
        )  # fmt: skip
    return found


class Prediction(NamedTuple):
    ms: float
    fraction: float  # of the floor
    slots: float  # a pair, with what is outside the loops
    issue: float  # share of the issue slots that are used


def predict(
    layout: Layout,
    work: Work,
    device: Device,
    launch: Launch,
    method: str,
    gradient: bool,
    rows: int,
    vocab: int,
    itemsize: int = 2,
    distance: float = 0.3,
    delay: float = DELAY["6df96f3"],
    delay_of_block: float = DELAY_OF_BLOCK,
) -> Prediction:
    tensors = (1 if method == "ul+ll" else 2) + gradient
    warps = layout.threads // 32
    lanes = vocab / launch.cluster / layout.threads  # pairs a lane
    instructions = work.slots(method, gradient, distance) * lanes + work.fixed[0]
    instructions += work.fixed[1] if gradient else 0.0
    memory = (
        vocab / launch.cluster * itemsize * tensors / (device.bandwidth / device.multiprocessors)
    )
    issue = instructions * warps / ISSUES / device.clock
    in_flight = launch.clusters * launch.cluster / device.multiprocessors
    delay += delay_of_block * launch.cluster
    if method != "ul+ll":
        delay += EXCHANGE * (shares(method == "tnrr", distance).exchanges - 1)
    rate = mva(in_flight, memory, issue, delay)
    us = rows * launch.cluster / (device.multiprocessors * rate)
    floor = rows * vocab * itemsize * tensors / device.bandwidth
    return Prediction(us / 1e3, floor / us, instructions / lanes, rate * issue)


def fastest(
    layout: Layout,
    work: Work,
    device: Device,
    method: str,
    gradient: bool,
    rows: int,
    vocab: int,
) -> tuple[Launch, Prediction]:
    """Of all sizes of clusters, by the model."""
    sizes = range(1, device.largest_cluster + 1)
    launches = [x for c in sizes if (x := launch_of(layout, device, vocab, method != "ul+ll", c))]
    found = [(x, predict(layout, work, device, x, method, gradient, rows, vocab)) for x in launches]
    return min(found, key=lambda x: x[1].ms)


#: What the launcher of 636108d took where a record does not say: the profile names 8 blocks for 128256; of the others
#: the records that did ask for these took the same time, and at 262144 those that asked for 8 took longer.
TAKEN_BY_636108D = {32000: 2, 50257: 2, 128256: 8, 151936: 8, 262144: 16}


def measured(layout: Layout) -> list[Case]:
    """What an H200 did with blocks of as many threads as now, without sets beyond the label of a negative row.

    Left out: 6df96f3's own choice at 128256, blocks of 192 threads, which no launcher takes any more.
    """
    found = []
    variants = json.loads((RESULTS / "gpu-h200-variants.json").read_text())["runs"]
    runs = (("636108d", "as committed"), ("6df96f3", "one warp begins the copies"))
    for commit, variant in runs:
        run = next(x for x in variants if x["commit"].startswith(commit))
        for r in run["records"]:
            usual = r.get("variant") == variant and r["dtype"] == "bfloat16"
            if not usual or r.get("threads", layout.threads) != layout.threads:
                continue
            found.append(_case(layout, commit, r, r.get("cluster")))
    for r in json.loads((RESULTS / "gpu.json").read_text())["cases"]:
        plain = r["negatives"] == "none" and r["active_share"] == 1 and r["dtype"] == "bfloat16"
        if r.get("backend") == "cuda" and plain and r["contender"] in ("in place", "forward"):
            found.append(_case(layout, "6df96f3", r, None))
    return [x for x in found if x]


def _case(layout: Layout, commit: str, r: Mapping[str, Any], cluster: int | None) -> Case | None:
    method, vocab, distance = r["method"], r["vocab"], r.get("distance", 0.3)
    if method not in ("tnff", "tnrr", "ul+ll"):
        return None
    if not cluster and commit == "6df96f3":
        if vocab == 128256 and method != "ul+ll":
            return None
        cluster = choose(layout, H200, vocab, method != "ul+ll").cluster
    elif not cluster:
        cluster = TAKEN_BY_636108D[vocab]
    gradient = r["contender"] != "forward"
    tensors = (1 if method == "ul+ll" else 2) + gradient
    # Of the floor that the record was compared with.
    moved = r["rows"] * vocab * 2 * tensors
    bandwidth = moved / (r["fraction_of_floor"] * r["ms_min"] * 1e3)
    return Case(
        commit, method, gradient, vocab, r["rows"], distance, cluster, r["ms_min"], bandwidth, distance < 3
    )  # fmt: skip


class Error(NamedTuple):
    case: Case
    predicted: float  # ms

    @property
    def relative(self) -> float:
        return self.predicted / self.case.ms - 1


def errors(
    layout: Layout,
    work: Work,
    cases: list[Case],
    delay: Mapping[str, float] = DELAY,
    delay_of_block: float = DELAY_OF_BLOCK,
) -> list[Error]:
    works = profiled(work)
    found = []
    for case in cases:
        device = H200._replace(bandwidth=case.bandwidth)
        launch = launch_of(layout, device, case.vocab, case.method != "ul+ll", case.cluster)
        if launch is None:  # the layout has changed since
            continue
        p = predict(
            layout, works.get(case.commit, work), device, launch, case.method, case.gradient, case.rows, case.vocab,
            distance=case.distance, delay=delay[case.commit], delay_of_block=delay_of_block,
        )  # fmt: skip
        found.append(Error(case, p.ms))
    return found


def fit(layout: Layout, work: Work, cases: list[Case]) -> tuple[dict[str, float], float]:
    """The constants once more: by coordinates, in ever smaller steps."""
    names = [*DELAY, "of a block"]
    values = [*DELAY.values(), DELAY_OF_BLOCK]
    fitted = [x for x in cases if x.fitted]

    def square(v: list[float]) -> float:
        found = errors(layout, work, fitted, dict(zip(DELAY, v, strict=False)), v[-1])
        return float(np.mean([math.log1p(x.relative) ** 2 for x in found]))

    best, step = square(values), 0.2
    while step > 5e-4:
        tried = [
            [max(0.0, v + d * step * (i == k)) for k, v in enumerate(values)]
            for i in range(len(values))
            for d in (-1, 1)
        ]
        square_of, candidate = min((square(v), v) for v in tried)
        if square_of < best:
            best, values = square_of, candidate
        else:
            step /= 2
    found = dict(zip(names, values, strict=True))
    return {name: found[name] for name in DELAY}, found["of a block"]
