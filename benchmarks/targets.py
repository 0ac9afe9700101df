"""What the CPU kernels are held to, and what ``cpu.json`` says of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd

from benchmarks import THREADS, linear
from benchmarks.sizes import DISTANCES, QUICK_SWEEP, SPARSE, SWEEP
from tnt_kernels._linear.sizes import CHUNK_BYTES

MIB = 1 << 20
#: In place, at the usual distance: with the smaller vocabulary, with the larger one.
BANDWIDTH = {"float32": (0.45, 0.5), "bfloat16": (0.26, 0.33)}
TIMES_NAIVE = {"float32": 20, "bfloat16": 40}
TIMES_COMPILED = {"bfloat16": 12}
#: Of 64 negative ids a row and of thousands that all share: the time over that of none.
NEGATIVES = {"64 a row": 1.1, "4000 shared": 1.25}
#: Speed in place at a distance of the two models, as a share of that at the smallest.
SPEED = {1.0: 0.7, 3.0: 0.55}


class Target(NamedTuple):
    what: str
    where: str
    value: float | None  #: None: not measured in this run
    bound: float
    at_least: bool  #: else at most

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def targets(results: dict[str, Any]) -> list[Target]:
    frame = pd.DataFrame(results["cases"])
    memory = pd.DataFrame(results["memory"])
    sizes = frame[["rows", "vocab", "dtype"]].drop_duplicates()
    swept = set(map(tuple, (*SWEEP, *QUICK_SWEEP)))
    found: list[Target] = []
    for rows, vocab, dtype in sizes.itertuples(index=False):
        if dtype == "float16" or (rows, vocab, dtype) in swept:
            continue
        here = frame[(frame.rows == rows) & (frame.vocab == vocab) & (frame.dtype == dtype)]
        where = f"V = {vocab}, {dtype}"
        keys = ["contender", "negatives", "active_share"]
        tnff, ul, nl = (
            here[here.method == method].set_index(keys) for method in ("tnff", "ul+ll", "nl+ll")
        )

        def step(
            column: str, contender: str, negatives: str = "none", of: pd.DataFrame = tnff
        ) -> float | None:
            key = (contender, negatives, 1)
            value = of[column].get(key) if key in of.index else None
            return None if value is None or value != value else float(value)

        def add(
            what: str, value: float | None, bound: float, at_least: bool, where: str = where
        ) -> None:
            found.append(Target(what, where, value, bound, at_least))

        least = BANDWIDTH[dtype][vocab > 100_000]
        add("in place, share of the bandwidth", step("fraction_of_floor", "in place"), least, True)
        for what, of in (("UL and LL", ul), ("NL and LL", nl)):
            value = step("fraction_of_floor", "in place", of=of)
            add(f"{what} in place, share of the bandwidth", value, 0.45, True)
        add("in place, times naive", step("times_naive", "in place"), TIMES_NAIVE[dtype], True)
        if dtype in TIMES_COMPILED:
            value = step("times_compiled", "in place")
            add("in place, times compiled", value, TIMES_COMPILED[dtype], True)
        add("fresh, times naive", step("times_naive", "fresh"), 5, True)
        add("fresh, times compiled", step("times_compiled", "fresh"), 1, True)

        whole = step("ms_min", "in place")
        for negatives, most in NEGATIVES.items():
            ms = step("ms_min", "in place", negatives)
            ratio = ms / whole if ms and whole else None
            add(f"{negatives} negative ids, times the time of none", ratio, most, False)
        for method in ("tnff", "tnrr"):
            ms_at = {
                d["distance"]: d["ms_min"]
                for d in results.get("distances", [])
                if (d["rows"], d["vocab"], d["dtype"], d["method"]) == (rows, vocab, dtype, method)
            }
            for distance, least in SPEED.items():
                ratio = ms_at[DISTANCES[0]] / ms_at[distance] if distance in ms_at else None
                what = f"{method} at a distance of {distance:g}, speed over that at {DISTANCES[0]}"
                add(what, ratio, least, True)
        sparse = here[here.active_share < 1]
        share = None
        if whole and len(sparse):
            a = float(sparse.active_share.iloc[0])
            share = (3 * a + (1 - a)) / 3 * whole / float(sparse.ms_min.iloc[0])
        add(f"{SPARSE:.0%} of rows active, share of its own floor", share, 0.85, True)

        mine = memory[(memory.rows == rows) & (memory.vocab == vocab) & (memory.dtype == dtype)]
        mine = mine.set_index("contender")
        for contender, bound in (
            ("in place", THREADS * MIB + 64 * rows),
            ("fresh", rows * vocab * _width(dtype) + THREADS * MIB),
        ):
            value = mine.bytes_beyond_inputs.get(contender)
            value = None if value is None else value / MIB
            add(f"{contender}, MiB beyond the inputs", value, bound / MIB, False)
    calls = results["overhead_us"]
    for contender in ("fresh", "in place"):
        value = calls[contender] - calls["empty"] if contender in calls else None
        found.append(
            Target(f"a call {contender}, µs above an empty one", "N = 1, V = 8", value, 20, False)
        )
    return found + _of_linear(results.get("linear", {"cases": [], "memory": []}))


def _of_linear(results: dict[str, Any]) -> list[Target]:
    found = []
    for c in results["cases"]:
        if c["contender"] != "fused" or c["dtype"] != "float32":
            continue
        where = f"{c['rows']} × {c['hidden']} × {c['vocab']}"
        if c["active_share"] == 1:
            what = "linear_tnt_loss, times its matmuls"
            found.append(Target(what, where, c["times_floor"], 1.3, False))
        else:
            assert c["active_share"] == linear.SPARSE
            what = (
                f"linear_tnt_loss with {linear.SPARSE:.0%} of rows active, share of the time of all"
            )
            found.append(Target(what, where, c["share_of_all_rows"], 0.35, False))
    for m in results["memory"]:
        if m["contender"] != "fused":
            continue
        where = f"{m['rows']} × {m['hidden']} × {m['vocab']}, {m['dtype']}"
        bound = CHUNK_BYTES["cpu"] + MIB + 64 * m["rows"]
        if m["dtype"] == "bfloat16":  # the float32 sum of the weight's gradient
            bound += 4 * m["hidden"] * m["vocab"]
        value = m["bytes_beyond_gradients"] / MIB
        found.append(
            Target(
                "linear_tnt_loss, MiB beyond inputs and gradients", where, value, bound / MIB, False
            )
        )
    return found


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
