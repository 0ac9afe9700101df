"""From what pytest-benchmark and the memory processes measured to ``cpu.json``: ratios, no figure of its own."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tnt_kernels

SCHEMA = 1
_SIZE = ["rows", "vocab", "dtype"]


def timings(report: dict[str, Any]) -> pd.DataFrame:
    """pytest-benchmark's report as one row a measurement, with its minimum and median in ms."""
    return pd.DataFrame(
        {
            **b["extra_info"],
            "ms_min": b["stats"]["min"] * 1e3,
            "ms_median": b["stats"]["median"] * 1e3,
            "rounds": b["stats"]["rounds"],
        }
        for b in report["benchmarks"]
    )


def bandwidths(t: pd.DataFrame) -> pd.DataFrame:
    """The best of the two-read, one-write variants at each size, by its minimum."""
    b = t[t.kind == "bandwidth"].copy()
    b["gb_per_s"] = b.floor_bytes / b.ms_min / 1e6
    best = b.loc[b.groupby(_SIZE).gb_per_s.idxmax()]
    return best[[*_SIZE, "contender", "gb_per_s", "ms_min", "ms_median", "rounds"]].rename(
        columns={"contender": "variant"}
    )


def page_faults(t: pd.DataFrame) -> pd.DataFrame:
    """What the first touch of a new gradient costs beyond writing to a resident one."""
    touch = t[t.kind == "first touch"].pivot(index=_SIZE, columns="contender")
    fresh = t[(t.contender == "fresh") & (t.kind == "step") & (t.method == "tnff")]
    result = pd.DataFrame(
        {
            "new_ms": touch["ms_min"]["new"],
            "resident_ms": touch["ms_min"]["resident"],
            "faults": touch["minor_faults"]["new"],
        }
    )
    result["page_fault_ms"] = result.new_ms - result.resident_ms
    result["fresh_step_ms"] = fresh.set_index(_SIZE).ms_min
    result["share_of_fresh_step"] = result.page_fault_ms / result.fresh_step_ms
    return result.reset_index()


def cases(t: pd.DataFrame, memory: pd.DataFrame) -> pd.DataFrame:
    """The steps, each as a fraction of the floor and against the naive one and the compiled one."""
    steps = t[t.kind == "step"].dropna(axis="columns", how="all").drop(columns="kind")
    steps = steps.merge(bandwidths(t)[[*_SIZE, "gb_per_s"]], on=_SIZE)
    steps["floor_ms"] = steps.pop("floor_bytes") / steps.pop("gb_per_s") / 1e6
    steps["fraction_of_floor"] = steps.floor_ms / steps.ms_min

    # A sparse batch or one with ids is other work than the peer's.
    whole = (steps.active_share == 1) & (steps.negatives == "none")
    ms = steps[whole].set_index([*_SIZE, "method", "contender"]).ms_min
    for peer in ("naive", "compiled"):
        # What needs no gradient is compared with what computes none.
        of = steps.contender.map(lambda c, peer=peer: f"{peer} forward" if "forward" in c else peer)
        keys = pd.MultiIndex.from_frame(steps[[*_SIZE, "method"]].assign(peer=of))
        steps[f"times_{peer}"] = (ms.reindex(keys).to_numpy() / steps.ms_min).where(whole)

    on = [*_SIZE, "contender"]
    bytes_ = memory[[*on, "bytes_beyond_inputs"]].assign(
        method="tnff", negatives="none", active_share=1.0
    )
    return steps.merge(bytes_, how="left", on=[*on, "method", "negatives", "active_share"])


def distances(t: pd.DataFrame) -> list[dict[str, Any]]:
    """Of each method, what a step in place takes at each distance of the models, and the paths of its blocks."""
    gb_per_s = bandwidths(t).set_index(_SIZE).gb_per_s
    found = [
        {
            **{name: getattr(measured, name) for name in _SIZE},
            "method": method,
            "distance": float(distance),
            "ms_min": ms,
            "paths": measured.paths[distance],
            "fraction_of_floor": measured.floor_bytes
            / gb_per_s[tuple(getattr(measured, name) for name in _SIZE)]
            / 1e6
            / ms,
        }
        for measured in t[t.kind == "distances"].itertuples()
        for method, by_distance in measured.by_distance.items()
        for distance, ms in by_distance.items()
    ]
    return _records(pd.DataFrame(found))


def overhead(t: pd.DataFrame) -> dict[str, float]:
    """Microseconds a call at N = 1, V = 8."""
    (us,) = t[t.kind == "overhead"].us
    return {str(name): float(value) for name, value in us.items()}


def linear(t: pd.DataFrame, memory: pd.DataFrame) -> dict[str, Any]:
    """``linear_tnt_loss``: the steps as multiples of their matmuls, and its memory beyond inputs and gradients."""
    steps = t[t.kind == "linear"].dropna(axis="columns", how="all").drop(columns="kind")
    size = ["rows", "hidden", "vocab", "dtype"]
    keys = [*size, "active_share"]
    ms = steps.set_index([*keys, "contender"]).ms_min
    floors = ms.xs("floor", level="contender")
    steps["times_floor"] = (
        steps.ms_min / floors.reindex(pd.MultiIndex.from_frame(steps[keys])).to_numpy()
    )
    whole = ms[ms.index.get_level_values("active_share") == 1].droplevel("active_share")
    all_rows = whole.reindex(pd.MultiIndex.from_frame(steps[[*size, "contender"]]))
    steps["share_of_all_rows"] = steps.ms_min / all_rows.to_numpy()
    memory = memory.assign(
        bytes_beyond_gradients=memory.bytes_beyond_inputs - memory.gradient_bytes
    )
    return {"cases": _records(steps), "memory": _records(memory)}


def environment(report: dict[str, Any]) -> dict[str, Any]:
    machine, commit = report["machine_info"], report["commit_info"]
    cpu = machine["cpu"]
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        _C = import_module("tnt_kernels._C")
        native = {"instruction_set": _C.selected_instruction_set(), "compiler": _C.compiler}
    except ImportError:
        native = {"instruction_set": None, "compiler": None}
    return {
        "date": report["datetime"],
        "commit": None if commit["id"] == "unknown" else commit["id"],
        "dirty": commit["dirty"],
        "threads": torch.get_num_threads(),
        "machine": {
            "cpu": cpu.get("brand_raw", platform.processor()),
            "family": cpu.get("family"),
            "model": cpu.get("model"),
            "cores": os.cpu_count(),
            "l3": cache.read_text().strip() if cache.exists() else None,
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": f"{machine['system']} {machine['release']}",
            "transparent_hugepage": thp.read_text().strip() if thp.exists() else None,
        },
        "versions": {
            "python": machine["python_version"],
            "torch": torch.__version__,
            "tnt_kernels": tnt_kernels.__version__,
            **native,
        },
    }  # fmt: skip


def commit() -> str | None:
    """The commit that is checked out, "-dirty" where files differ from it; None where there is no repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    root = Path(__file__).parent.parent
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def huge_pages(t: pd.DataFrame, huge: pd.DataFrame) -> pd.DataFrame:
    """Page faults and times of what allocates, without and with huge pages."""
    on = [*_SIZE, "kind", "method", "contender"]
    columns = [*on, "ms_min", "minor_faults"]
    whole = t[t.active_share.isna() | ((t.active_share == 1) & (t.negatives == "none"))]
    return whole[columns].merge(huge[columns], on=on, suffixes=("", "_huge"))


def assemble(
    report: dict[str, Any],
    huge: dict[str, Any],
    memory: list[dict[str, Any]],
    quick: bool,
    linear_memory: list[dict[str, Any]] | None = None,
    accuracy: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The contents of ``cpu.json``.

    Args:
        report: what ``--benchmark-json`` wrote.
        huge: the same of the measurements with huge pages.
        memory: what the memory processes printed.
        quick: whether the sizes were those of ``--quick``.
        accuracy: what ``benchmarks.accuracy`` measured.
        linear_memory: what the memory processes of ``benchmarks.linear`` printed, if the report has its measurements.
    """
    t, m = timings(report), pd.DataFrame(memory)
    return {
        "schema": SCHEMA,
        "quick": quick,
        **environment(report),
        "bandwidth": _records(bandwidths(t)),
        "page_faults": _records(page_faults(t)),
        "huge_pages": _records(huge_pages(t, timings(huge))),
        "overhead_us": {k: round(v, 3) for k, v in overhead(t).items()},
        "cases": _records(cases(t, m)),
        "distances": distances(t),
        "memory": _records(m),
        "accuracy": _records(pd.DataFrame(accuracy or [])),
        **({} if linear_memory is None else {"linear": linear_part(report, linear_memory)}),
    }


def linear_part(report: dict[str, Any], memory: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``cpu.json`` has under "linear", with its own commit and date, as it may be measured alone."""
    return {**environment(report), **linear(timings(report), pd.DataFrame(memory))}


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain data, four digits, nothing where there is no figure."""

    def plain(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        if value is None or value != value:
            return None
        if isinstance(value, float):
            return int(value) if value.is_integer() else float(f"{value:.4g}")
        return value

    rows = frame.astype(object).to_dict("records")
    return [{str(k): plain(v) for k, v in row.items()} for row in rows]
