"""What the CPU kernels are held to, and what ``cpu.json`` says of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd

from benchmarks import linear
from benchmarks.sizes import QUICK_SWEEP, SPARSE, SWEEP
from tnt_kernels._linear.chunks import CHUNK_BYTES

MIB = 1 << 20


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
        tnff = here[here.method == "tnff"].set_index(["contender", "negatives", "active_share"])

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

        add("in place, share of the bandwidth", step("fraction_of_floor", "in place"),
            0.5 if dtype == "float32" else 0.25, True)  # fmt: skip
        add("in place, times naive", step("times_naive", "in place"), 20, True)
        add("fresh, times naive", step("times_naive", "fresh"), 5, True)
        add("fresh, times compiled", step("times_compiled", "fresh"), 1, True)

        whole = step("ms_min", "in place")
        for negatives in ("64 a row", "4000 shared"):
            ms = step("ms_min", "in place", negatives)
            ratio = ms / whole if ms and whole else None
            add(f"{negatives} negative ids, times the time of none", ratio, 1.15, False)
        sparse = here[here.active_share < 1]
        share = None
        if whole and len(sparse):
            a = float(sparse.active_share.iloc[0])
            share = (3 * a + (1 - a)) / 3 * whole / float(sparse.ms_min.iloc[0])
        add(f"{SPARSE:.0%} of rows active, share of its own floor", share, 0.85, True)

        mine = memory[(memory.rows == rows) & (memory.vocab == vocab) & (memory.dtype == dtype)]
        mine = mine.set_index("contender")
        for contender, bound in (
            ("in place", MIB + 64 * rows),
            ("fresh", rows * vocab * _width(dtype) + MIB),
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
