"""``summary.md`` of a GPU run: what failed, and every figure beside its target and what was predicted of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.linear import FUSED, LinearSize
from benchmarks.linear_model import LOSS_SHARE, floor, predicted, step_of

Range = tuple[float, float]
#: What CUDA_NOTES.md and linear.py's count predict, as (lowest, highest). Fractions of the floor in place, V = 128256:
PREDICTED: dict[tuple[str, str], Range] = {
    ("cuda", "H100"): (0.74, 0.82),
    ("cuda", "H200"): (0.65, 0.71),
    ("triton", "H100"): (0.65, 0.77),
    ("triton", "H200"): (0.55, 0.58),
}
#: Of the cuda backend's launches with a gradient, for a pair of logits: elements to and from DRAM, instructions.
PREDICTED_ELEMENTS: Range = (3.0, 3.0)
PREDICTED_INSTRUCTIONS: Range = (36.0, 39.0)


class Verdict(NamedTuple):
    figure: str
    value: float | None
    target: float | None
    at_least: bool = True
    predicted: Range | None = None

    @property
    def met(self) -> str:
        if self.value is None or self.target is None:
            return ""
        good = self.value >= self.target if self.at_least else self.value <= self.target
        return "yes" if good else "**no**"

    def __str__(self) -> str:
        target = "" if self.target is None else f"{'≥' if self.at_least else '≤'} {self.target:g}"
        predicted = "–".join(f"{x:g}" for x in dict.fromkeys(self.predicted or ()))
        return f"| {self.figure} | {self.value:.3g} | {target} | {self.met} | {predicted} |"


def _predicted_linear(case: dict[str, Any], gpu: str) -> Range | None:
    """By the lower end of what the loss is predicted to reach; None for a device that the model does not know."""
    device = next((d for d in LOSS_SHARE if d.name == gpu), None)
    if device is None or case.get("dtype") != "bfloat16":
        return None
    size = LinearSize(case["rows"], case["hidden"], case["vocab"], "bfloat16")
    us = predicted(size, step_of(size, case["contender"] == "pairs"), device, LOSS_SHARE[device])
    times = round(us / floor(size, device), 2)
    return times, times


def verdicts(results: dict[str, Any]) -> Iterator[Verdict]:
    """The figures that the project wants of a GPU."""
    device = str(results["machine"].get("device"))
    gpu = next((name for name in ("H100", "H200") if name in device), "")
    h200 = gpu == "H200"
    cases = [c for c in results["cases"] if "failed" not in c]

    def of(column: str, **where: Any) -> float | None:
        found = [c[column] for c in cases if all(c.get(k) == v for k, v in where.items())]
        return min(found) if found and column.startswith("ms") else max(found, default=None)

    main = {
        "rows": 8192,
        "vocab": 128256,
        "dtype": "bfloat16",
        "active_share": 1.0,
        "negatives": "none",
    }
    for backend, target in (("cuda", 0.75 if h200 else 0.85), ("triton", 0.6 if h200 else 0.7)):
        ours = {**main, "backend": backend}
        for method in ("tnff", "tnrr"):
            value = of("fraction_of_floor", contender="in place", method=method, **ours)
            yield Verdict(
                f"{backend}, {method} in place, of the floor",
                value,
                target,
                True,
                PREDICTED.get((backend, gpu)),
            )
            value = of("fraction_of_floor", contender="forward", method=method, **ours)
            yield Verdict(
                f"{backend}, {method} forward, of the floor", value, 0.85 if h200 else 0.9, True
            )
        own = 0.65 if h200 else 0.75
        for vocab in (32000, 50257, 151936, 262144):
            where = {**ours, "vocab": vocab, "contender": "in place", "method": "tnff"}
            yield Verdict(
                f"{backend}, V = {vocab}, of the floor", of("fraction_of_floor", **where), own, True
            )
        for share in (0.1, 0.5):
            where = {**ours, "contender": "in place", "method": "tnff"}
            value = of("fraction_of_floor", **{**where, "active_share": share})
            yield Verdict(f"{backend}, {share:.0%} active, of its floor", value, own)
        mine = of("ms_min", contender="in place", method="tnff", **ours)
        for negatives in ("64 a row", "4000 shared"):
            where = {**ours, "negatives": negatives, "contender": "in place", "method": "tnff"}
            ms = of("ms_min", **where)
            yield Verdict(
                f"{backend}, {negatives} ids, times none",
                ms / mine if ms and mine else None,
                1.15,
                False,
            )
        for other, factor in (("speculators fused KL", 2), ("compiled", 5), ("naive", 10)):
            ms = of("ms_min", contender=other, method="tnff", **main)
            yield Verdict(
                f"{other} over {backend}", ms / mine if ms and mine else None, factor, True
            )
    linear = [c for c in results["linear"] if "failed" not in c and c["active_share"] == 1]
    floors = {_shape(c): c["ms_min"] for c in linear if c["contender"] == "floor"}
    for c in linear:
        if c["contender"] in FUSED and _shape(c) in floors:
            of_model = _predicted_linear(c, gpu)
            times = c["ms_min"] / floors[_shape(c)]
            yield Verdict(
                f"linear, {c['contender']}, {c['backend']}, {_shape(c)}, times its matmuls",
                times,
                1.15,
                False,
                of_model,
            )

    for p in results["profiles"]:
        mine = p["backend"] == "cuda" and "forward" not in p["launch"]
        elements, instructions = _a_pair(p)
        name = f"{p['backend']}, {p['launch']},"
        predicted = PREDICTED_ELEMENTS if mine else None
        yield Verdict(f"{name} elements moved a pair", elements, None, predicted=predicted)
        predicted = PREDICTED_INSTRUCTIONS if mine else None
        yield Verdict(f"{name} instructions a pair", instructions, None, predicted=predicted)


def _shape(c: dict[str, Any]) -> str:
    return f"{c['rows']} × {c['hidden']} × {c['vocab']}"


def _a_pair(profile: dict[str, Any]) -> tuple[float | None, float | None]:
    """Of a launch on 16-bit logits: elements to and from DRAM, and instructions of a thread."""
    pairs = profile["rows"] * profile["vocab"]
    read, written = profile.get("dram__bytes_read.sum"), profile.get("dram__bytes_write.sum")
    instructions = profile.get("smsp__inst_executed.sum")
    return (
        None if read is None or written is None else (read + written) / 2 / pairs,
        None if instructions is None else 32 * instructions / pairs,
    )


#: What decides of a launch: the head of a column, Nsight Compute's name, and what it is multiplied by.
DECIDING = (
    ("ms", "gpu__time_duration.sum", 1e3),
    ("DRAM GB read", "dram__bytes_read.sum", 1e-9),
    ("written", "dram__bytes_write.sum", 1e-9),
    ("L2 hits, %", "lts__t_sector_hit_rate.pct", 1.0),
    ("issue slots used, %", "smsp__issue_active.avg.pct_of_peak_sustained_active", 1.0),
    ("occupancy, %", "sm__warps_active.avg.pct_of_peak_sustained_active", 1.0),
    ("registers", "launch__registers_per_thread", 1.0),
)
STALL = "smsp__average_warps_issue_stalled_"


def _profile(p: dict[str, Any]) -> list[str]:
    cells = [p["backend"], p["launch"]]
    cells += [f"{p[name] * by:.4g}" if name in p else "" for _, name, by in DECIDING]
    stalls = {k[len(STALL) :].partition("_per_issue")[0]: p[k] for k in p if k.startswith(STALL)}
    stalls.pop("selected", None)
    most = sorted(stalls, key=lambda name: -stalls[name])[:4]
    return [*cells, ", ".join(f"{name} {stalls[name]:.2f}" for name in most)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))]


def summary(results: dict[str, Any]) -> str:
    """One page of Markdown: what went wrong, then the verdicts, then all that was measured."""
    commit = str(results["commit"])[:10]
    lines = [f"# {results['machine'].get('device')}, {results['date'][:16]}, commit {commit}", ""]
    ends: dict[str, list[dict[str, Any]]] = {}
    for end in results["stages"]:
        ends.setdefault(end["stage"], []).append(end)
    lines.append(
        "Seconds of each stage's longest process: "
        + ", ".join(f"{stage} {max(e['seconds'] for e in of)}" for stage, of in ends.items())
        + "."
    )
    wrong = [r for r in results["smoke"] if not r["ok"]]
    lines.append(f"Smoke: {len(results['smoke'])} calls, {len(wrong)} wrong.")
    lines += [
        f"- **{e['stage']} {e['process']}**: {e['ended']}, {e['seconds']} s"
        for e in results["stages"]
        if e["ended"] != "ok"
    ]
    lines += [
        f"- **wrong** in {r['stage']}: {r['backend']}, {r['method']}, {r['dtype']}, V = {r['vocab']}: "
        f"loss {r['loss_error']:.2g}, gradient {r['gradient_error']:.2g}"
        for r in wrong
    ]
    lines += [
        f"- **failed**: {r['backend'] or ''} {r['contender']}, {r['rows']} × {r['vocab']}: {r['failed']}"
        for name in ("cases", "linear", "settings", "distances", "accuracy")
        for r in results[name]
        if "failed" in r
    ]
    found = list(verdicts(results))
    lines += ["", "| figure | measured | target | met | predicted |"]
    lines += ["| --- | ---: | ---: | --- | ---: |"]
    lines += [str(v) for v in found if v.value is not None]
    missing = [v.figure for v in found if v.value is None]
    lines += ["", f"Not measured: {'; '.join(missing) or 'nothing'}."]
    if results["profiles"]:
        head = [
            "backend",
            "launch",
            *(name for name, *_ in DECIDING),
            "stalls, cycles an instruction",
        ]
        lines += _table(head, [_profile(p) for p in results["profiles"]])
    columns = ["contender", "method", "rows", "vocab", "dtype", "negatives", "active_share"]
    rows = [
        [
            c["backend"] or "",
            *(str(c[name]) for name in columns),
            f"{c['ms_min']:.4g}",
            f"{c['fraction_of_floor']:.3f}",
            f"{c['gradient_error']:.1e}" if "gradient_error" in c else "",
        ]
        for c in results["cases"]
        if "failed" not in c
    ]
    if rows:
        lines += _table(["backend", *columns, "ms", "of the floor", "error"], rows)
    return "\n".join(lines) + "\n"
