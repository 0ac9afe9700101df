"""From ``results/cpu.json``, ``gpu.json`` and ``linear_accuracy.json`` to the tables in the READMEs and the plots.

Nothing is measured here.

``python -m benchmarks.report`` writes them, ``--check`` exits with 1 if they are not up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.linear_accuracy import CONTENDERS as LINEAR_ACCURACY_CONTENDERS
from benchmarks.peers import LINEAR_PEERS, PEERS
from benchmarks.sizes import DISTANCES
from benchmarks.targets import MIB, targets

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
CONTENDERS = {
    "in place": "tnt_loss, in place",
    "fresh": "tnt_loss",
    "compiled": "torch.compile of the naive loss",
    "naive": "naive PyTorch",
}
LINEAR_CONTENDERS = {
    "fused": "linear_tnt_loss",
    "shared": "linear_tnt_loss, shared head",
    "pairs": "linear_tnt_loss, shared head, 16-bit pairs",
    "unfused": "logits, then tnt_loss in place",
    "compiled": "torch.compile of logits and naive loss",
    "naive": "logits, then naive PyTorch",
    "floor": "the matmuls alone",
}
NOT_MEASURED = "not measured"
#: The same file from the same figures.
PLOT_STYLE = {"svg.hashsalt": "tnt_kernels", "svg.fonttype": "none", "font.size": 9}


def markers(name: str) -> tuple[str, str]:
    """The lines between which a generated block stands."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def load(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text())
    return results


# --- tables --------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """In Markdown; the first ``words`` columns are to the left, the others, numbers, to the right."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _percent(x: float) -> str:
    return f"{round(x, 2) + 0.0:.0%}"  # a difference within the noise may be less than 0: not "-0%"


def _number(value: float | None, unit: str = "") -> str:
    """Three digits, or a dash where nothing was measured."""
    if value is None or value != value:
        return "–"
    digits = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{digits}{unit}"


def _mebibytes(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value / MIB:.2f}" if value < MIB else f"{value / MIB:.0f}"


def _whole(results: dict[str, Any]) -> pd.DataFrame:
    """The steps on full batches without negative ids."""
    frame = pd.DataFrame(results["cases"])
    return frame[(frame.active_share == 1) & (frame.negatives == "none")]


def main_table(results: dict[str, Any]) -> str:
    """TNFF at every size with its most common number of rows: time, ratios, memory."""
    frame = _whole(results)
    frame = frame[(frame.method == "tnff") & frame.contender.isin(CONTENDERS)]
    frame = frame[frame.rows == frame.rows.mode()[0]]
    rows: list[list[str]] = []
    for (vocab, dtype), group in frame.groupby(["vocab", "dtype"], sort=False):
        group = group.set_index("contender")
        for contender, label in CONTENDERS.items():
            if contender in group.index and dtype != "float16":
                c = group.loc[contender]
                rows.append(
                    [
                        f"V = {vocab}, {dtype}: {label}",
                        _number(c.ms_min),
                        _number(c.fraction_of_floor),
                        _number(c.times_naive, "×"),
                        _number(c.times_compiled, "×"),
                        _mebibytes(c.bytes_beyond_inputs),
                    ]
                )
    head = [
        f"loss and gradient, {frame.rows.iloc[0]} rows",
        "ms",
        "of the floor",
        "naive / this",
        "compiled / this",
        "MiB beyond the inputs",
    ]
    return table(head, rows)


def first_table(results: dict[str, Any]) -> str:
    """What a reader sees first: TNFF at the largest size where all is compared."""
    frame = _whole(results)
    frame = frame[(frame.method == "tnff") & frame.contender.isin(CONTENDERS)]
    both = frame[frame.dtype == "float32"]
    vocab = both.vocab.max()
    frame = frame[(frame.vocab == vocab) & (frame.rows == frame.rows.mode()[0])]
    dtypes = [d for d in ("float32", "bfloat16") if d in set(frame.dtype)]
    head = [f"{frame.rows.iloc[0]} tokens × {vocab} vocabulary, CPU"]
    for dtype in dtypes:
        head += [f"{dtype}, ms", "naive / this", "MiB beyond the inputs"]
    rows = []
    for contender, label in CONTENDERS.items():
        cells = [label]
        for dtype in dtypes:
            found = frame[(frame.dtype == dtype) & (frame.contender == contender)]
            c = found.iloc[0] if len(found) else None
            cells += (
                [NOT_MEASURED, "–", "–"]
                if c is None
                else [
                    _number(c.ms_min),
                    _number(c.times_naive, "×"),
                    _mebibytes(c.bytes_beyond_inputs),
                ]
            )
        rows.append(cells)
    return table(head, rows)


def gpu_table(gpu: dict[str, Any] | None) -> str:
    """The training step that counts on a GPU, of everybody; "not measured" where it was not."""
    where = "8192 tokens × 128256 vocabulary, bfloat16, GPU"
    head = [
        where,
        "ms",
        "of the floor",
        "this / fastest tnt_loss",
        "MiB beyond the inputs",
        "gradient error",
    ]
    names = [
        "tnt_loss (cuda), in place",
        "tnt_loss (triton), in place",
        *list(CONTENDERS.values())[2:],
    ]
    names += [f"{p.name} ({p.work})" for p in PEERS]
    if gpu is None:
        return table(head, [[name, *[NOT_MEASURED] * 5] for name in names])
    rows: list[list[str]] = []
    largest = max(
        (c["rows"] * c["vocab"] for c in gpu["cases"] if c["dtype"] == "bfloat16"), default=0
    )
    cases = [
        c for c in gpu["cases"]
        if (c["active_share"] == 1 and c["negatives"] == "none" and "forward" not in c["contender"]
        and c["dtype"] == "bfloat16" and (c["rows"], c["vocab"]) == (8192, 128256))
        or (gpu["quick"] and c["rows"] * c["vocab"] == largest)
    ]  # fmt: skip
    for method in dict.fromkeys(c["method"] for c in cases):
        here = [c for c in cases if c["method"] == method]
        ours = [c["ms_min"] for c in here if c["backend"] and "ms_min" in c]
        for c in here:
            name = (
                f"tnt_loss ({c['backend']}), {c['contender']}" if c["backend"] else c["contender"]
            )
            name = {"naive": "naive PyTorch", "compiled": CONTENDERS["compiled"]}.get(name, name)
            name += "" if method == "tnff" or c["work"] else f", {method}"
            name += f" ({c['work']})" if c["work"] else ""
            if "failed" in c:
                rows.append([name, c["failed"], *["–"] * 4])
                continue
            error = c.get("gradient_error")
            rows.append(
                [
                    name,
                    _number(c["ms_min"]),
                    _number(c["fraction_of_floor"]),
                    _number(c["ms_min"] / min(ours) if ours else None, "×"),
                    _mebibytes(c.get("bytes_beyond_inputs")),
                    "–" if error is None else f"{error:.0e}",
                ]
            )
    measured = {c["backend"] for c in cases}
    rows += [
        [f"tnt_loss ({backend})", *[NOT_MEASURED] * 5]
        for backend in ("cuda", "triton")
        if backend not in measured and not gpu["quick"]
    ]
    # Every process that measures peers has looked for them.
    missing = {p["name"]: p["missing"] for p in gpu["peers"] if "missing" in p}
    rows += [[name, why, *["–"] * 4] for name, why in missing.items()]
    return table(head, rows)


def gpu_provenance(gpu: dict[str, Any] | None) -> str:
    if gpu is None:
        return "GPU: not measured yet; `python -m benchmarks.gpu_suite --out DIR` measures it."
    versions = gpu["versions"]
    return (
        f"GPU: measured on {gpu['date'][:10]}, commit {str(gpu['commit'])[:10]}, with "
        f"`python -m benchmarks.gpu_suite`: {gpu['machine']['device']}; torch {versions['torch']}, "
        f"Triton {versions['triton']}, tnt_kernels {versions['tnt_kernels']}, Python {versions['python']}."
    )


def linear_table(results: dict[str, Any]) -> str:
    """Time and memory of the fused linear loss, over sizes."""
    cases = pd.DataFrame(results["linear"]["cases"])
    memory = pd.DataFrame(results["linear"]["memory"])
    cases = cases[cases.active_share == 1]
    on = ["rows", "hidden", "vocab", "dtype", "contender"]
    if "chunking" not in cases:
        cases = cases.assign(chunking="")
    frame = memory[[*on, "bytes_beyond_gradients"]].merge(
        cases[[*on, "ms_min", "times_floor", "chunking"]], on=on, how="outer"
    )
    frame["chunking"] = frame.chunking.fillna("")
    rows = []
    by_size = frame.groupby(["vocab", "hidden", "dtype", "rows"], sort=False)
    for (vocab, hidden, dtype, tokens), group in by_size:
        group = group.set_index("contender")
        for contender, label in LINEAR_CONTENDERS.items():
            if contender in group.index:
                c = group.loc[contender]
                name = f"{label}, {c.chunking}" if c.chunking else label
                rows.append(
                    [
                        f"{tokens} × {hidden} × {vocab}, {dtype}: {name}",
                        _number(c.ms_min),
                        _number(c.times_floor, "×"),
                        _mebibytes(c.bytes_beyond_gradients),
                    ]
                )
    head = [
        "tokens × H × V, CPU: loss and gradients",
        "ms",
        "the matmuls",
        "MiB beyond inputs and gradients",
    ]
    return table(head, rows)


def linear_gpu_table(gpu: dict[str, Any] | None) -> str:
    head = [
        "8192 × 4096 × 128256, bfloat16, GPU",
        "ms",
        "the matmuls",
        "MiB beyond inputs and gradients",
    ]
    names = [LINEAR_CONTENDERS[c] for c in ("fused", "shared", "pairs", "naive", "floor")]
    names += [f"{p.name} ({p.work})" for p in LINEAR_PEERS]
    if gpu is None or not gpu["linear"]:
        return table(head, [[name, *[NOT_MEASURED] * 3] for name in names])
    here = [
        c for c in gpu["linear"] if c["active_share"] == 1 and (c["rows"] == 8192 or gpu["quick"])
    ]
    floor = next((c["ms_min"] for c in here if c["contender"] == "floor" and "ms_min" in c), None)
    rows = []
    for c in here:
        name = LINEAR_CONTENDERS.get(c["contender"], c["contender"])
        name += f" ({c['backend']})" if c["backend"] else f" ({c['work']})" if c["work"] else ""
        name += f", {c['chunking']}" if c.get("chunking") else ""
        if "failed" in c:
            rows.append([name, c["failed"], "–", "–"])
        else:
            times = c["ms_min"] / floor if floor else None
            rows.append(
                [
                    name,
                    _number(c["ms_min"]),
                    _number(times, "×"),
                    _mebibytes(c.get("bytes_beyond_gradients")),
                ]
            )
    return table(head, rows)


def accuracy_tables(records: Sequence[dict[str, Any]]) -> str:
    """Relative errors of loss and gradient against float64."""
    if not records:
        return f"Accuracy: {NOT_MEASURED}."
    frame = pd.DataFrame(records)
    frame["distance"] = frame.distance.fillna(-1.0)
    distances = list(dict.fromkeys(frame.distance))
    names = {
        "fresh": "tnt_loss",
        "naive": "naive, float32",
        "naive, narrow": "naive in the logits' dtype",
    }
    tables = []
    for column, title in (("loss_error", "loss"), ("gradient_error", "gradient")):
        head = [f"relative error of the {title}"]
        head += ["random logits" if d < 0 else f"p = q + {d:.0e}" for d in distances]
        rows = []
        for (dtype, method, contender), group in frame.groupby(
            ["dtype", "method", "contender"], sort=False
        ):
            values = group.set_index("distance")[column]
            cells = [f"{values[d]:.0e}" if d in values.index else "–" for d in distances]
            rows.append([f"{dtype}, {method}: {names.get(contender, contender)}", *cells])
        tables.append(table(head, rows))
    return "\n\n".join(tables)


def linear_accuracy_table(records: Sequence[dict[str, Any]], method: str = "tnff") -> str:
    """Relative errors of the fused linear loss and of others, next to p = q; below it, why one has none."""
    frame = pd.DataFrame(records)
    frame = frame[frame.method == method]
    names = [c.name for c in LINEAR_ACCURACY_CONTENDERS if (frame.contender == c.name).any()]
    rows = []
    for (heads, dtype, _), group in frame.groupby(["heads", "dtype", "target_kl"], sort=False):
        cases = {c["contender"]: c for c in group.to_dict("records")}
        cells = [_errors(cases[name]) if name in cases else "–" for name in names]
        rows.append([heads, dtype, f"{group.kl.iloc[0]:.1e}", *cells])
    title = f"{method}, {frame.rows.iloc[0]} × {frame.hidden.iloc[0]} × {frame.vocab.iloc[0]}"
    head = [f"{title}: output embeddings", "dtype", "KL, nats a row", *names]
    parts = [table(head, rows, words=2)]
    if "failed" in frame:
        failed = frame.dropna(subset="failed").groupby(["contender", "failed"], sort=False)
        parts += [
            f"- {name}, {' and '.join(dict.fromkeys(group.dtype))}, failed with {why}"
            for (name, why), group in failed
        ]
    return "\n\n".join(parts)


def _errors(case: dict[str, Any]) -> str:
    if isinstance(case.get("failed"), str):
        return "failed"
    return f"{_two_digits(case['loss_error'])} / {_two_digits(case['hidden_gradient_error'])}"


def _two_digits(error: float) -> str:
    """In percent."""
    return f"{float(f'{100 * error:.2g}'):g}"


def linear_accuracy_block(results: dict[str, Any] | None) -> str:
    if results is None:
        return f"Accuracy of the fused linear loss: {NOT_MEASURED}."
    versions, commit = results["versions"], str(results["commit"])
    changes = " with changes" if commit.endswith("-dirty") else ""
    return (
        f"{linear_accuracy_table(results['records'])}\n\n"
        f"Measured on {results['date'][:10]}, commit {commit[:10]}{changes}, with "
        f"`python -m benchmarks.linear_accuracy`: {results['machine']['device']}, {versions['instruction_set']}; "
        f"torch {versions['torch']}, Triton {versions['triton']}, Liger-Kernel {versions['liger-kernel']}, "
        f"tnt_kernels {versions['tnt_kernels']}, Python {versions['python']}."
    )


def case_table(results: dict[str, Any]) -> str:
    """Every step that was measured."""
    head = [
        "step",
        "ms",
        "median",
        "of the floor",
        "naive / this",
        "compiled / this",
        "page faults",
    ]
    rows = []
    for c in pd.DataFrame(results["cases"]).itertuples():
        also = "" if c.negatives == "none" else f", {c.negatives} negative ids"
        also += "" if c.active_share == 1 else f", {c.active_share:.0%} of rows active"
        rows.append(
            [
                f"{c.rows} × {c.vocab}, {c.dtype}, {c.method}: {c.contender}{also}",
                _number(c.ms_min),
                _number(c.ms_median),
                _number(c.fraction_of_floor),
                _number(c.times_naive, "×"),
                _number(c.times_compiled, "×"),
                str(c.minor_faults),
            ]
        )
    return table(head, rows)


def distance_table(records: Sequence[dict[str, Any]]) -> str:
    """How a step in place slows down as the policy leaves the reference."""
    if not records:
        return f"Time over the distance of the two models: {NOT_MEASURED}."
    head = ["in place, at a distance of", *(f"{d:g}: ms" for d in DISTANCES)]
    head += [f"speed at {d:g} / at {DISTANCES[0]:g}" for d in DISTANCES[1:]]
    head += [
        "of the floor",
        "blocks near, wide, middle, far at " + ", ".join(f"{d:g}" for d in DISTANCES),
    ]
    rows = []
    by_step = pd.DataFrame(records).groupby(["rows", "vocab", "dtype", "method"], sort=False)
    for (tokens, vocab, dtype, method), group in by_step:
        ms = group.set_index("distance").ms_min
        shares = group.fraction_of_floor
        rows.append(
            [
                f"{tokens} × {vocab}, {dtype}, {method}",
                *(_number(ms[d]) for d in DISTANCES),
                *(_number(ms[DISTANCES[0]] / ms[d]) for d in DISTANCES[1:]),
                f"{_number(shares.min())} to {_number(shares.max())}",
                "; ".join(
                    " ".join(f"{share:.0%}" for share in group.set_index("distance").paths[d])
                    for d in DISTANCES
                ),
            ]
        )
    return table(head, rows)


def target_table(results: dict[str, Any]) -> str:
    met = {True: "yes", False: "**no**", None: "not measured"}
    rows = [
        [
            f"{t.where}: {t.what}",
            _number(t.value),
            f"{'≥' if t.at_least else '≤'} {_number(t.bound)}",
            met[t.met],
        ]
        for t in targets(results)
    ]
    return table(["target", "measured", "bound", "met"], rows)


def machine_table(results: dict[str, Any]) -> str:
    """What the memory system gives: the floor, and the price of a new page."""
    bandwidth = pd.DataFrame(results["bandwidth"]).set_index(["rows", "vocab", "dtype"])
    head = [
        "V, dtype",
        "c = a + b, GB/s",
        "best variant",
        "new gradient's page faults, ms",
        "of a fresh step",
    ]
    rows = []
    for p in pd.DataFrame(results["page_faults"]).itertuples():
        b = bandwidth.loc[(p.rows, p.vocab, p.dtype)]
        share = "–" if pd.isna(p.share_of_fresh_step) else _percent(p.share_of_fresh_step)
        rows.append(
            [
                f"{p.vocab}, {p.dtype}",
                _number(b.gb_per_s),
                b.variant,
                _number(p.page_fault_ms),
                share,
            ]
        )
    return table(head, rows)


def huge_page_table(results: dict[str, Any]) -> str:
    head = ["", "ms", "page faults", "ms, huge pages", "page faults, huge pages"]
    names = {"new": "zeros in a new gradient", "resident": "zeros in a resident one"}
    rows = [
        [
            names.get(h.contender, f"{h.method}: {h.contender}") + f", V = {h.vocab}, {h.dtype}",
            _number(h.ms_min),
            _number(h.minor_faults),
            _number(h.ms_min_huge),
            _number(h.minor_faults_huge),
        ]
        for h in pd.DataFrame(results["huge_pages"]).itertuples()
    ]
    return table(head, rows)


def provenance(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    commit = (results["commit"] or "none")[:10] + (" with changes" if results["dirty"] else "")
    return (
        f"Measured on {results['date'][:10]}, commit {commit}: {machine['cpu']} (family {machine['family']}, "
        f"model {machine['model']}, {machine['cores']} cores, L3 {machine['l3']}, {machine['memory_gib']} GiB), "
        f"{results['threads']} threads, {versions['instruction_set']}; torch {versions['torch']}, "
        f"tnt_kernels {versions['tnt_kernels']}, Python {versions['python']}, {machine['system']}."
    )


def call_line(results: dict[str, Any]) -> str:
    us = results["overhead_us"]
    others = ", ".join(f"{name} {_number(us[name])} µs" for name in us if name != "empty")
    return (
        f"A call's own cost, forward and backward at N = 1 and V = 8: {others}; "
        f"an empty `autograd.Function` {_number(us['empty'])} µs."
    )


def facts(results: dict[str, Any]) -> str:
    """What the main table does not show, as a list."""
    by_kind: dict[str, list[float]] = {}
    for t in targets(results):
        if t.value is not None:
            by_kind.setdefault(t.what, []).append(t.value)
    lines = []
    shares = [p["share_of_fresh_step"] for p in results["page_faults"] if p["dtype"] != "float16"]
    shares = [s for s in shares if s is not None]
    if shares:
        lines.append(
            f"Page faults of the new gradient are {_percent(min(shares))} to {_percent(max(shares))} of a step that "
            "is not in place."
        )
    for h in results["huge_pages"]:
        if h["contender"] == "fresh":
            lines.append(
                f"With `THP_MEM_ALLOC_ENABLE=1`, PyTorch asks for huge pages: at V = {h['vocab']}, {h['dtype']}, that "
                f"step then takes {_number(h['ms_min_huge'])} ms in place of {_number(h['ms_min'])} ms."
            )
    for what, values in by_kind.items():
        if "negative ids" in what:
            lines.append(f"In place with {what}: at most {_number(max(values))}.")
        elif what.endswith("share of its own floor"):
            lines.append(f"In place with {what}: at least {_number(min(values))}.")
    return "\n".join(f"- {line}" for line in [*lines, call_line(results)])


def _beside(path: Path, name: str) -> dict[str, Any] | None:
    """Another results file in the folder of ``cpu.json``, where there is one."""
    other = path.with_name(name)
    return load(other) if other.exists() else None


def blocks(path: Path) -> dict[Path, dict[str, str]]:
    """What stands between the markers, for each file of the repository that has them, by the markers' name."""
    results, gpu = load(path), _beside(path, "gpu.json")
    quick = ["**A quick run: these figures mean nothing.**"] if results["quick"] else []
    linear = [linear_table(results)] if "linear" in results else []
    if "date" in results.get("linear", {}):
        linear.append(provenance(results["linear"]))
    linear.append(linear_gpu_table(gpu))
    names = _plots(path)
    short = [
        *quick,
        first_table(results),
        "![time over the vocabulary, share of the floor, memory over tokens](benchmarks/results/cpu.svg)",
        *(["![the same on a GPU](benchmarks/results/gpu.svg)"] if "gpu.svg" in names else []),
        gpu_table(gpu),
        f"{provenance(results)} `make bench` repeats it. {gpu_provenance(gpu)}",
    ]
    full = [
        *quick,
        main_table(results),
        facts(results),
        provenance(results),
        "### On a GPU",
        gpu_table(gpu),
        gpu_provenance(gpu),
        "### The fused linear loss",
        *linear,
        "### Accuracy",
        accuracy_tables(results.get("accuracy", ())),
        "### Over the distance of the two models",
        distance_table(results.get("distances", ())),
        "### Targets",
        target_table(results),
        "### Every step",
        case_table(results),
        "### The machine",
        machine_table(results),
        "With `THP_MEM_ALLOC_ENABLE=1`, PyTorch asks for huge pages:",
        huge_page_table(results),
    ]
    plot = "![time and memory over the tokens of a batch](benchmarks/results/linear.svg)"
    return {
        ROOT / "README.md": {
            "benchmark": "\n\n".join(short),
            "benchmark-linear": "\n\n".join([*linear, plot]),
        },
        ROOT / "benchmarks" / "README.md": {
            "benchmark": "\n\n".join(full),
            "linear-accuracy": linear_accuracy_block(_beside(path, "linear_accuracy.json")),
        },
    }


def with_block(text: str, name: str, block: str, file: str) -> str:
    """``text`` with ``block`` between the markers of this name.

    Raises:
        SystemExit: the markers are not there, once each and in order.
    """
    begin, end = markers(name)
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed) or begin in after or end in after:
        sys.exit(
            f"{file}: expected the lines {begin} and {end} once each; the tables go between them"
        )
    return f"{before}{begin}\n{block}\n{end}{after}"


# --- the plots -----------------------------------------------------------------------------------


class Panel(NamedTuple):
    """Lines, one a contender, over the first of the columns."""

    frame: pd.DataFrame
    x: str
    y: str
    title: str
    labels: dict[str, str]


_COLOURS = {
    "in place": "#1b7837", "fresh": "#7fbf7b", "fused": "#1b7837", "unfused": "#7fbf7b",
    "compiled": "#b0b0b0", "naive": "#606060", "floor": "#2166ac",
}  # fmt: skip


def _step_panels(frame: pd.DataFrame) -> list[Panel]:
    """Time and share of the floor over the vocabulary, memory over the tokens: TNFF on bfloat16 logits."""
    frame = frame[
        (frame.active_share == 1) & (frame.negatives == "none") & (frame.method == "tnff")
    ]
    dtype = "bfloat16" if (frame.dtype == "bfloat16").any() else frame.dtype.iloc[0]
    frame = frame[(frame.dtype == dtype) & frame.contender.isin([*_COLOURS])]
    frame = frame.assign(mib=(frame.bytes_beyond_inputs / MIB).clip(lower=0.01))
    tokens = frame.rows.mode()[0]
    over_v = frame[frame.rows == tokens].sort_values("vocab")
    vocab = frame.groupby("vocab").rows.nunique().idxmax()
    over_n = frame[(frame.vocab == vocab) & frame.bytes_beyond_inputs.notna()].sort_values("rows")
    return [
        Panel(
            over_v,
            "vocab",
            "ms_min",
            f"ms over the vocabulary, {tokens} tokens, {dtype}",
            CONTENDERS,
        ),
        Panel(over_v, "vocab", "fraction_of_floor", "the same as a share of the floor", CONTENDERS),
        Panel(over_n, "rows", "mib", f"MiB beyond the inputs over tokens, V = {vocab}", CONTENDERS),
    ]


def _linear_panels(cases: pd.DataFrame, memory: pd.DataFrame) -> list[Panel]:
    """Over the tokens, at the head that has been measured with most numbers of them."""
    cases = cases[cases.active_share == 1]
    vocab = cases.groupby("vocab").rows.nunique().idxmax()
    hidden = cases[cases.vocab == vocab].hidden.iloc[0]
    cases = cases[cases.vocab == vocab].sort_values("rows")
    memory = memory.assign(mib=memory.bytes_beyond_gradients / MIB)
    memory = memory[memory.vocab == vocab].sort_values("rows")
    return [
        Panel(
            cases, "rows", "ms_min", f"ms over tokens, H = {hidden}, V = {vocab}", LINEAR_CONTENDERS
        ),
        Panel(
            memory, "rows", "mib", "MiB beyond inputs and gradients over tokens", LINEAR_CONTENDERS
        ),
    ]


def _plots(path: Path) -> dict[str, tuple[Path, list[Panel]]]:
    """File name to the results that it shows and its panels."""
    results, gpu = load(path), _beside(path, "gpu.json")
    found = {"cpu.svg": (path, _step_panels(pd.DataFrame(results["cases"])))}
    if "linear" in results:
        linear = results["linear"]
        panels = _linear_panels(pd.DataFrame(linear["cases"]), pd.DataFrame(linear["memory"]))
        found["linear.svg"] = (path, panels)
    if gpu is not None:
        ran = pd.DataFrame([c for c in gpu["cases"] if "ms_min" in c])
        first = next((c["backend"] for c in gpu["cases"] if c["backend"]), None)
        ran = ran[ran.backend.isna() | (ran.backend == first)]  # one line a contender
        panels = _step_panels(ran)
        linear_ran = pd.DataFrame([c for c in gpu["linear"] if "ms_min" in c])
        if len(linear_ran):
            linear_ran = linear_ran[linear_ran.backend.isna() | (linear_ran.backend == first)]
            panels += _linear_panels(linear_ran, linear_ran)
        found["gpu.svg"] = (path.with_name("gpu.json"), panels)
    return found


def _digest(path: Path) -> str:
    return f"sha256 of {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()}"


def write_plots(path: Path) -> None:
    """Every plot, with the digest of the file that it comes from in the SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    for name, (source, panels) in _plots(path).items():
        with plt.rc_context(PLOT_STYLE):
            figure, axes = plt.subplots(
                1,
                len(panels),
                figsize=(4.2 * len(panels), 3.8),
                layout="constrained",
                squeeze=False,
            )
            for axis, panel in zip(axes[0], panels, strict=True):
                for contender, label in panel.labels.items():
                    line = panel.frame[panel.frame.contender == contender]
                    if len(line):
                        axis.plot(
                            line[panel.x], line[panel.y], marker="o", markersize=4, label=label,
                            color=_COLOURS[contender],
                        )  # fmt: skip
                axis.set(xscale="log", yscale="log")
                axis.set_title(panel.title, fontsize=9)
                ticks = sorted(set(panel.frame[panel.x]))
                axis.set_xticks(
                    ticks, [f"{t:g}" if t < 10_000 else f"{t / 1000:.0f}k" for t in ticks]
                )
                axis.minorticks_off()
                axis.spines[["top", "right"]].set_visible(False)
                axis.grid(alpha=0.3)
            labels: dict[str, Any] = {}
            for axis in axes[0]:
                for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                    labels.setdefault(label, handle)
            figure.legend(
                list(labels.values()),
                list(labels),
                loc="outside lower center",
                ncols=3,
                frameon=False,
            )
            metadata = {"Date": None, "Description": _digest(source)}
            figure.savefig(path.with_name(name), metadata=metadata)
            plt.close(figure)


# --- writing and checking ------------------------------------------------------------------------


def write(path: Path) -> None:
    """The plots and the READMEs' blocks."""
    write_plots(path)
    for file, named in blocks(path).items():
        if not file.exists():
            sys.exit(f"{file}: missing; the benchmark tables go there")
        text = file.read_text()
        for name, block in named.items():
            text = with_block(text, name, block, file.name)
        file.write_text(text)


def stale(path: Path) -> list[str]:
    """What does not show the figures in ``path`` and in the other files beside it."""
    if not path.exists():
        return [f"{path} is missing: run python -m benchmarks.run"]
    found = ["cpu.json is from a quick run"] if load(path)["quick"] else []
    for name, (source, _) in _plots(path).items():
        plot = path.with_name(name)
        if not plot.exists() or _digest(source) not in plot.read_text():
            found.append(f"{plot} is not of {source.name}")
    for file, named in blocks(path).items():
        text = file.read_text() if file.exists() else ""
        for name, block in named.items():
            if f"{markers(name)[0]}\n{block}\n{markers(name)[1]}" not in text:
                found.append(f"{file} does not show the results under {markers(name)[0]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if anything is stale"
    )
    a = parser.parse_args()
    path = RESULTS / "cpu.json"
    if not a.check:
        return write(path)
    if problems := stale(path):
        sys.exit("\n".join([*problems, "`python -m benchmarks.report` renders the results again"]))


if __name__ == "__main__":
    main()
