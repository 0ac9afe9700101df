"""From ``results/cpu.json`` to the tables in the READMEs and the plot; nothing is measured here.

``python -m benchmarks.report`` writes them, ``--check`` exits with 1 if they are not up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.targets import MIB, targets

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
CONTENDERS = {
    "in place": "tnt_loss, in place",
    "fresh": "tnt_loss",
    "compiled": "torch.compile of the naive loss",
    "naive": "naive PyTorch",
}


def load(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text())
    return results


# --- tables --------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


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
    """TNFF at every size: time, ratios, memory."""
    frame = _whole(results)
    frame = frame[(frame.method == "tnff") & frame.contender.isin(CONTENDERS)]
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
    return _table(head, rows)


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
                f"V = {c.vocab}, {c.dtype}, {c.method}: {c.contender}{also}",
                _number(c.ms_min),
                _number(c.ms_median),
                _number(c.fraction_of_floor),
                _number(c.times_naive, "×"),
                _number(c.times_compiled, "×"),
                str(c.minor_faults),
            ]
        )
    return _table(head, rows)


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
    return _table(["target", "measured", "bound", "met"], rows)


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
        share = "–" if pd.isna(p.share_of_fresh_step) else f"{p.share_of_fresh_step:.0%}"
        rows.append(
            [
                f"{p.vocab}, {p.dtype}",
                _number(b.gb_per_s),
                b.variant,
                _number(p.page_fault_ms),
                share,
            ]
        )
    return _table(head, rows)


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
    return _table(head, rows)


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
            f"Page faults of the new gradient are {min(shares):.0%} to {max(shares):.0%} of a step that is not "
            "in place."
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
        elif "rows active" in what:
            lines.append(f"In place with {what}: at least {_number(min(values))}.")
    return "\n".join(f"- {line}" for line in [*lines, call_line(results)])


def blocks(results: dict[str, Any]) -> dict[Path, str]:
    """What stands between the markers, for each file of the repository that has them."""
    quick = ["**A quick run: these figures mean nothing.**"] if results["quick"] else []
    short = [*quick, main_table(results), facts(results), provenance(results)]
    full = [
        *short,
        "### Targets",
        target_table(results),
        "### Every step",
        case_table(results),
        "### The machine",
        machine_table(results),
        "With `THP_MEM_ALLOC_ENABLE=1`, PyTorch asks for huge pages:",
        huge_page_table(results),
    ]
    return {
        ROOT / "README.md": "\n\n".join(short),
        ROOT / "benchmarks" / "README.md": "\n\n".join(full),
    }


def with_block(text: str, block: str, name: str) -> str:
    """``text`` with ``block`` between the markers.

    Raises:
        SystemExit: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in after:
        sys.exit(
            f"{name}: expected the lines {BEGIN} and {END} once each; the tables go between them"
        )
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


# --- the plot ------------------------------------------------------------------------------------


def _digest(path: Path) -> str:
    return f"sha256 of {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()}"


def write_plot(path: Path) -> None:
    """``path``'s figures as bars, with the digest of the file that they come from in the SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    results = load(path)
    frame = _whole(results)
    frame = frame[(frame.method == "tnff") & (frame.dtype != "float16")]
    names = list(CONTENDERS)
    frame = frame.assign(
        size=[f"V = {v}\n{d}" for v, d in zip(frame.vocab, frame.dtype, strict=True)],
        floors=1 / frame.fraction_of_floor,
        mib=frame.bytes_beyond_inputs / MIB,
    )
    sizes = list(dict.fromkeys(frame["size"]))
    panels = {
        "floors": "time, in units of the floor (2 reads and 1 write at full bandwidth)",
        "mib": "peak memory beyond the inputs, MiB",
    }
    style = {"svg.hashsalt": "tnt_kernels", "svg.fonttype": "none", "font.size": 9}
    colours = dict(zip(names, ("#1b7837", "#7fbf7b", "#b0b0b0", "#606060"), strict=True))
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
        for axis, (column, title) in zip(axes, panels.items(), strict=True):
            values = frame.pivot(index="size", columns="contender", values=column)
            values = values.reindex(index=sizes, columns=names)
            values.plot.barh(ax=axis, width=0.8, legend=False, color=colours)
            for bars in axis.containers:
                labels = [_number(bar.get_width()) for bar in bars]
                axis.bar_label(bars, labels=labels, padding=3, fontsize=8)
            axis.set(title=title, ylabel="")
            axis.title.set_fontsize(9)
            axis.margins(x=0.12)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].invert_yaxis()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles,
            [CONTENDERS[n] for n in labels],
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
        metadata = {"Date": None, "Description": _digest(path)}
        figure.savefig(path.with_suffix(".svg"), metadata=metadata)
        plt.close(figure)


# --- writing and checking ------------------------------------------------------------------------


def write(path: Path) -> None:
    """The plot and the READMEs' blocks."""
    write_plot(path)
    for file, block in blocks(load(path)).items():
        if not file.exists():
            sys.exit(f"{file}: missing; the benchmark tables go there")
        file.write_text(with_block(file.read_text(), block, file.name))


def stale(path: Path) -> list[str]:
    """What does not show the figures in ``path``."""
    if not path.exists():
        return [f"{path} is missing: run python -m benchmarks.run"]
    results = load(path)
    found = ["cpu.json is from a quick run"] if results["quick"] else []
    plot = path.with_suffix(".svg")
    if not plot.exists() or _digest(path) not in plot.read_text():
        found.append(f"{plot} is not of {path.name}")
    for file, block in blocks(results).items():
        text = file.read_text() if file.exists() else ""
        if f"{BEGIN}\n{block}\n{END}" not in text:
            found.append(f"{file} does not show {path.name}")
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
        sys.exit("\n".join([*problems, "`python -m benchmarks.report` renders cpu.json again"]))


if __name__ == "__main__":
    main()
