"""``python -m benchmarks.study``: every run that is not there yet, then the tables, the plots and the verdicts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.study import grid, report

FOLDER = Path(__file__).parents[1] / "results" / "study"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a rough version in 3 minutes")
    parser.add_argument("--report", action="store_true", help="run nothing, show what there is")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="the folder of runs.jsonl and of the plots")
    parser.add_argument("--originals", type=Path, default=Path("build/study"), metavar="FOLDER")
    a = parser.parse_args(argv)
    out = a.out or (Path("build/study-quick") if a.quick else FOLDER)
    place = grid.Place(a.originals / ("quick" if a.quick else "full"), a.quick)
    runs = out / "runs.jsonl"
    if not a.report:
        grid.run_all(runs, place, a.workers)
    report.write(runs, publish=out == FOLDER)


if __name__ == "__main__":
    main()
