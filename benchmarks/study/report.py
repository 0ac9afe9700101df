"""From the runs to the tables of ``README.md`` and the plots; nothing is measured here."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd

from benchmarks.report import PLOT_STYLE, ROOT, with_block
from benchmarks.report import table as render
from benchmarks.study import grid
from benchmarks.study.finetune import ANNOTATIONS

README = Path(__file__).with_name("README.md")
REDUCTIONS = (0.25, 0.5, 0.75, 0.9)
_MARKED = {"set": "all unwanted tokens", "token": "the sampled token"}
BASELINES = ("nl+ll", "ul+ll")
_TNT = tuple(m for m in grid.METHODS if m not in BASELINES)
_SETTINGS = tuple(itertools.product(grid.TASKS[:2], ("token", "set")))
_COLOURS = dict(zip(grid.METHODS, plt.get_cmap("tab10").colors, strict=False))


def frame(path: Path) -> pd.DataFrame:
    """One row a run; ``reduction`` is that of the greedy rate, ``kl`` in nats a token."""
    done = grid.load(path)
    table = pd.DataFrame({**vars(run), **record} for run, record in done.items())
    table["reduction"] = 1 - table.rate / table.original_rate
    table["kl"] = table.left + table.collateral
    return table


def _main(table: pd.DataFrame) -> pd.DataFrame:
    """The main grid and its relatives: no tuning, and everything that the further experiments vary as it is."""
    whole = (table["size"] == "base") & (table.share == 1) & (table.rounds == 1)
    return table[whole & table.tuning.isna()]


#: Figures of the original.
_ORIGINALS = {"bleu": 1.0, "identical": 1.0, "collateral": 0.0}


class Crossing(NamedTuple):
    """Where a seed's runs cross a reduction."""

    bleu: float
    value: float  # of the column
    from_original: bool  # every run reduces more than this


def at_reduction(curve: pd.DataFrame, target: float, column: str) -> Crossing | None:
    """``column`` where the runs of a seed, in the order of alpha, cross the reduction ``target``; the best BLEU counts.

    Between neighbouring values of alpha both are taken as linear; alpha = 0 is the original, at reduction 0.
    """
    points = curve.sort_values("alpha")
    # Of the original's own texts none is changed, so that a share of the changed ones is that of the first run.
    first = _ORIGINALS.get(column, points[column].iloc[0])
    path = [(0.0, 1.0, first), *zip(points.reduction, points.bleu, points[column], strict=True)]
    found = []
    for i, ((at, bleu, value), (next_at, next_bleu, next_value)) in enumerate(
        itertools.pairwise(path)
    ):
        if min(at, next_at) <= target <= max(at, next_at):
            t = (target - at) / (next_at - at) if next_at != at else 0.0
            crossing = Crossing(
                bleu + t * (next_bleu - bleu), value + t * (next_value - value), i == 0
            )
            found.append(crossing)
    return max(found, default=None)


def matched(table: pd.DataFrame) -> pd.DataFrame:
    """Every column at every matched reduction: one row a task, annotation, method, seed and reduction."""
    rows = []
    runs = _main(table)
    runs = runs[runs.method.isin(grid.METHODS)]
    for key, curve in runs.groupby(["task", "annotation", "method", "seed"]):
        for target in REDUCTIONS:
            columns = (*_ORIGINALS, "disfluent", "broken", "repeats")
            crossings = {c: at_reduction(curve, target, c) for c in columns}
            found = {c: None if x is None else x.value for c, x in crossings.items()}
            first = crossings["bleu"]
            found["from_original"] = first is not None and first.from_original
            rows.append(
                dict(zip(("task", "annotation", "method", "seed"), key, strict=True))
                | {"at": target, **found}
            )
    return pd.DataFrame(rows)


# --- tables -----------------------------------------------------------------------------------------


def _seeds(values: pd.Series, digits: int = 2, scale: float = 1.0) -> str:
    """The mean, with every seed behind it; a dash for a seed that did not get there."""
    known = values.dropna() * scale
    if known.empty:
        return "–"
    each = " ".join("–" if v != v else f"{v * scale:.{digits}f}" for v in values)
    return (
        f"{known.mean():.{digits}f} ({each})" if len(values) > 1 else f"{known.mean():.{digits}f}"
    )


def _matched(points: pd.DataFrame, column: str, digits: int = 2, scale: float = 1.0) -> str:
    """As ``_seeds``; † where every run of a seed reduces more, so that one end of the line is the original."""
    return _seeds(points[column], digits, scale) + (" †" if points.from_original.any() else "")


def _name(method: str, annotation: str) -> str:
    same = grid.SAME_WITH_SETS.get(method, ()) if annotation == "set" else ()
    return ", ".join((method, *same)).upper()


def originals_table(table: pd.DataFrame) -> str:
    head = ["task", "size", "greedy rate", "sampled rate", "−log(1 − p(S)), nats", "masking: BLEU"]
    head += ["masking: identical", "masking: disfluent, of the changed"]
    rows = []
    for _, o in table[table.method == "original"].iterrows():
        masks = table[(table.method == "masking") & (table.task == o.task)]
        masking = masks.iloc[0] if o["size"] == "base" and len(masks) else None
        cells = [o.task, o["size"], f"{o.rate:.1%}", f"{o.sampled:.1%}", f"{o.left:.4f}"]
        cells += (
            ["–"] * 3
            if masking is None
            else [f"{masking.bleu:.2f}", f"{masking.identical:.0%}", f"{masking.disfluent:.0%}"]
        )
        rows.append(cells)
    return render(head, rows, 2)


def matched_table(points: pd.DataFrame, task: str, annotation: str) -> str:
    """BLEU at matched reductions; what else there is at half the unwanted rate."""
    head = ["method", *(f"BLEU at −{r:.0%}" for r in REDUCTIONS), "identical at −50%, %"]
    head += ["disfluent at −50%, % of the changed", "collateral at −50%, mnats"]
    rows = []
    for method in grid.METHODS:
        mine = points[
            (points.task == task) & (points.annotation == annotation) & (points.method == method)
        ].sort_values("seed")
        if mine.empty:
            continue
        half = mine[mine["at"] == 0.5]
        rows.append(
            [
                _name(method, annotation),
                *(_matched(mine[mine["at"] == r], "bleu") for r in REDUCTIONS),
                _matched(half, "identical", 0, 100),
                _matched(half, "disfluent", 0, 100),
                _matched(half, "collateral", 1, 1000),
            ]
        )
    return render(head, rows)


def best(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The runs at the alpha where the seeds' mean of ``column`` is the lowest, per task, annotation and method."""
    runs = _main(table)
    runs = runs[runs.method.isin(grid.METHODS)]
    means = runs.groupby(["task", "annotation", "method", "alpha"])[column].mean()
    chosen = means.groupby(["task", "annotation", "method"]).idxmin()
    return runs.set_index(["task", "annotation", "method", "alpha"]).loc[chosen].reset_index()


def kl_table(table: pd.DataFrame, task: str) -> str:
    head = ["method", "annotation", "learning rate", "α", "KL to the exact update, mnats"]
    head += ["left of S", "collateral", "greedy rate, %", "sampled rate, %", "BLEU"]
    runs = best(table, "kl")
    rows = []
    for annotation, method in itertools.product(("token", "set"), grid.METHODS):
        mine = runs[
            (runs.task == task) & (runs.annotation == annotation) & (runs.method == method)
        ].sort_values("seed")
        if len(mine):
            rows.append(
                [
                    _name(method, annotation),
                    annotation,
                    f"{mine.learning_rate.iloc[0]:g}",
                    f"{mine.alpha.iloc[0]:g}",
                    _seeds(mine.kl, 1, 1000),
                    f"{mine.left.mean() * 1000:.1f}",
                    f"{mine.collateral.mean() * 1000:.1f}",
                    f"{mine.rate.mean():.1%}",
                    f"{mine.sampled.mean():.1%}",
                    f"{mine.bleu.mean():.2f}",
                ]
            )
    return render(head, rows, 2)


def spread_table(table: pd.DataFrame) -> str:
    head = ["method", "annotation", "α", "sampled rate, %", "KL to the exact update, mnats", "BLEU"]
    runs = _main(table)
    runs = runs[(runs.task == grid.TASKS[2]) & runs.method.isin(grid.METHODS)]
    rows = [
        [
            _name(method, annotation),
            annotation,
            f"{alpha:g}",
            _seeds(mine.sampled, 1, 100),
            _seeds(mine.kl, 1, 1000),
            f"{mine.bleu.mean():.2f}",
        ]
        for (annotation, method, alpha), mine in runs.groupby(
            ["annotation", "method", "alpha"], sort=False
        )
    ]
    return render(head, sorted(rows, key=lambda r: (r[1] == "set", r[0], float(r[2]))), 2)


def sequence_table(table: pd.DataFrame) -> str:
    head = ["method", "annotation", "α", "KL(p° given clean ‖ p), nats a sequence"]
    head += ["greedy rate, %", "sampled rate, %", "BLEU"]
    runs = best(table[table.task == "words"], "sequence_kl")
    rows = []
    for annotation, method in itertools.product(ANNOTATIONS, grid.METHODS):
        mine = runs[(runs.annotation == annotation) & (runs.method == method)].sort_values("seed")
        if len(mine):
            rows.append(
                [
                    _name(method, annotation),
                    annotation,
                    f"{mine.alpha.iloc[0]:g}",
                    _seeds(mine.sequence_kl),
                    f"{mine.rate.mean():.1%}",
                    f"{mine.sampled.mean():.1%}",
                    f"{mine.bleu.mean():.2f}",
                ]
            )
    return render(head, rows, 2)


_FURTHER = (
    ("all samples, one round, base model", {}),
    ("30 % of the samples", {"share": 0.3}),
    ("10 % of the samples", {"share": 0.1}),
    ("three rounds of a third", {"rounds": 3}),
    ("smaller model", {"size": "small"}),
    ("larger model", {"size": "large"}),
)


def _further(
    table: pd.DataFrame, task: str, method: str, change: dict[str, object]
) -> pd.DataFrame:
    wanted = {"size": "base", "share": 1.0, "rounds": 1, "annotation": "token", **change}
    wanted |= {"task": task, "method": method, "alpha": grid.FURTHER_ALPHA}
    rows = table[table.tuning.isna()]
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows.sort_values("seed")


def further_table(table: pd.DataFrame, task: str) -> str:
    head = ["", "method", "rate, % of the original's", "BLEU", "disfluent, % of the changed"]
    head += ["KL to the exact update, mnats"]
    rows = []
    for (label, change), method in itertools.product(_FURTHER, grid.FURTHER_METHODS):
        mine = _further(table, task, method, change)
        if len(mine):
            rows.append(
                [
                    label,
                    _name(method, "token"),
                    _seeds(1 - mine.reduction, 0, 100),
                    _seeds(mine.bleu),
                    _seeds(mine.disfluent, 0, 100),
                    _seeds(mine.kl, 1, 1000),
                ]
            )
    return render(head, rows, 2)


# --- claims -----------------------------------------------------------------------------------------


def _compare(ours: pd.Series, theirs: pd.Series, higher: bool) -> str:
    """Of the seeds of a TNT method and of a baseline: "won", "lost" or "open".

    Won and lost are without overlap: the worst seed of the one beats the best seed of the other.
    """
    sign = 1 if higher else -1
    mine, other = sign * ours.dropna(), sign * theirs.dropna()
    if len(mine) < len(ours) or len(other) < len(theirs):
        # Who does not get to the reduction at all with every seed has lost to who does.
        return "open" if len(mine) == len(other) else "won" if len(mine) > len(other) else "lost"
    return "won" if mine.min() > other.max() else "lost" if mine.max() < other.min() else "open"


def _verdict(counts: pd.Series) -> str:
    won, lost = counts.get("won", 0), counts.get("lost", 0)
    if lost == 0 and won > counts.sum() / 2:
        return "confirmed"
    return "not confirmed" if won <= lost else "mixed"


def claims_table(table: pd.DataFrame, points: pd.DataFrame) -> str:
    head = ["claim", "task", "annotation", "won", "lost", "open", "verdict"]
    rows = []
    outcomes: list[tuple[str, str, str, str]] = []
    for task, annotation in _SETTINGS:
        here = points[(points.task == task) & (points.annotation == annotation)]
        for claim, column, reductions, higher in (
            ("better trade-off up to 50 % reduction", "bleu", (0.25, 0.5), True),
            ("fewer introduced disfluencies", "disfluent", (0.25, 0.5, 0.75), False),
        ):
            tnt = grid.methods(annotation, _TNT)
            for r, ours, theirs in itertools.product(reductions, tnt, BASELINES):
                a, b = (here[(here.method == m) & (here["at"] == r)] for m in (ours, theirs))
                outcomes.append((claim, task, annotation, _compare(a[column], b[column], higher)))
    for task, share, ours in itertools.product(grid.TASKS[:2], (0.3, 0.1), ("tnff", "tnrf")):
        a, b = (_further(table, task, m, {"share": share}) for m in (ours, "ul+ll"))
        claim = "closer to the exact update with less data"
        outcomes.append((claim, task, "token", _compare(a.kl, b.kl, False)))
    counted = pd.DataFrame(outcomes, columns=["claim", "task", "annotation", "outcome"])
    for key, group in counted.groupby(["claim", "task", "annotation"], sort=False):
        counts = group.outcome.value_counts()
        rows.append(
            [*key, *(str(counts.get(o, 0)) for o in ("won", "lost", "open")), _verdict(counts)]
        )
    return render(head, sorted(rows), 3)


def advice_table(table: pd.DataFrame) -> str:
    """KL to the exact update of the methods that it comes to, in both tasks."""
    runs = best(table, "kl")
    chosen = (
        ("set", "tnff"),
        ("set", "ul+ll"),
        ("token", "tnrr"),
        ("token", "tnrf"),
        ("token", "ul+ll"),
    )
    rows = []
    for annotation, method in chosen:
        mine = runs[(runs.annotation == annotation) & (runs.method == method)]
        means = [mine[mine.task == task].kl.mean() for task in grid.TASKS[:2]]
        rows.append([f"`{method}`", _MARKED[annotation], *(f"{kl * 1000:.1f}" for kl in means)])
    start = table[(table.method == "original") & (table["size"] == "base")]
    lefts = [start[start.task == task].kl.mean() for task in grid.TASKS[:2]]
    rows.append(["the original", "", *(f"{kl * 1000:.1f}" for kl in lefts)])
    return render(
        ["KL to the exact update, thousandths of a nat a token", "marked", *grid.TASKS[:2]], rows, 2
    )


# --- all of it --------------------------------------------------------------------------------------


def blocks(path: Path) -> dict[str, str]:
    table = frame(path)
    points = matched(table)
    found = {"originals": originals_table(table), "claims": claims_table(table, points)}
    for task, annotation in _SETTINGS:
        found[f"matched-{task}-{annotation}"] = matched_table(points, task, annotation)
    for task in grid.TASKS[:2]:
        found[f"kl-{task}"] = kl_table(table, task)
        found[f"further-{task}"] = further_table(table, task)
    found["spread"] = spread_table(table)
    found["sequence"] = sequence_table(table)
    hours = table.seconds.sum() / 3600
    found["cost"] = (
        f"{table.tuning.isna().sum()} runs and {table.tuning.notna().sum()} more to tune the learning rates: "
        f"{hours:.1f} hours of processes with one thread each, two at a time on two cores that did other work too."
    )
    return found


def pages(path: Path) -> dict[Path, str]:
    """The READMEs that show the results, as they should be."""
    text = README.read_text()
    for name, block in blocks(path).items():
        text = with_block(text, f"study-{name}", block, README.name)
    front = ROOT / "README.md"
    advice = advice_table(frame(path))
    return {README: text, front: with_block(front.read_text(), "study-advice", advice, front.name)}


def plot_trade_off(table: pd.DataFrame, path: Path) -> None:
    """BLEU over the reduction: a line through the means of the seeds over alpha, a point for each run."""
    runs = _main(table)
    with plt.rc_context(PLOT_STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained", sharex=True)
        for axis, (task, annotation) in zip(axes.flat, _SETTINGS, strict=True):
            here = runs[(runs.task == task) & (runs.annotation == annotation)]
            for method in grid.METHODS:
                mine = here[here.method == method]
                if mine.empty:
                    continue
                mean = mine.groupby("alpha")[["reduction", "bleu"]].mean()
                colour = _COLOURS[method]
                style = "--" if method in BASELINES else "-"
                axis.plot([0, *mean.reduction], [1, *mean.bleu], style, color=colour, lw=1.3,
                          label=method.upper())  # fmt: skip
                axis.plot(mine.reduction, mine.bleu, ".", color=colour, markersize=3)
            masking = runs[(runs.task == task) & (runs.method == "masking")]
            axis.plot(masking.reduction, masking.bleu, "k*", label="masking while decoding")
            axis.set_title(f"{task}, {annotation} annotated", fontsize=9)
            axis.set(xlim=(-0.05, 1.05))
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes[:, 0]:
            axis.set_ylabel("BLEU with the original's text")
        for axis in axes[-1]:
            axis.set_xlabel("reduction of the unwanted rate, greedy")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def plot_kl(table: pd.DataFrame, path: Path) -> None:
    """KL to the exact update at each method's best alpha, as its two parts; the original's as a line."""
    runs = best(table, "kl")
    with plt.rc_context(PLOT_STYLE):
        figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
        for axis, (task, annotation) in zip(axes, _SETTINGS, strict=True):
            here = runs[(runs.task == task) & (runs.annotation == annotation)]
            means = here.groupby("method")[["left", "collateral"]].mean()
            means = means.reindex([m for m in grid.METHODS[::-1] if m in means.index]) * 1000
            labels = [_name(m, annotation).replace(", ", ",\n") for m in means.index]
            axis.barh(labels, means.left, label="left of the unwanted set")
            axis.barh(labels, means.collateral, left=means.left, label="collateral damage")
            original = table[(table.task == task) & (table.method == "original")]
            line = original.left.iloc[0] * 1000
            axis.axvline(line, color="k", lw=0.8, label="the original")
            axis.set_xlim(0, 1.5 * line)  # NL+LL with sets is off by a hundred times
            for place, total in enumerate(means.sum(axis=1)):
                if total > 1.5 * line:
                    axis.text(1.48 * line, place, f"{total:.0f} →", ha="right", va="center")
            axis.set_title(f"{task}, {annotation} annotated", fontsize=9)
            axis.set_xlabel("KL to the exact update, mnats a token")
            axis.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                      frameon=False)  # fmt: skip
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def write(path: Path, publish: bool) -> None:
    """The plots and the matched points beside ``path``, a file of runs; the READMEs' tables, if it is theirs."""
    table = frame(path)
    matched(table).to_csv(path.with_name("matched.csv"), index=False, float_format="%.4g")
    plot_trade_off(table, path.with_name("trade_off.svg"))
    plot_kl(table, path.with_name("kl.svg"))
    if publish:
        for file, text in pages(path).items():
            file.write_text(text)
