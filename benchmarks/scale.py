"""What sharded vocabularies cost, per token and per step, by formula: the tables of ``docs/sharded.md``.

``python -m benchmarks.scale`` writes them there, ``--check`` exits with 1 if they are not up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.report import table, with_block
from tnt_kernels._call import ROW_STATISTICS

PAGE = Path(__file__).parent.parent / "docs" / "sharded.md"
RESULTS = Path(__file__).parent / "results" / "cpu.json"
FLOAT32, BFLOAT16 = 4, 2
HIDDEN, TOKENS = 4096, 2**20


def memory_traffic(vocab: int, ranks: int, width: int = BFLOAT16) -> float:
    """Bytes per token: two reads and a write; of a split vocabulary, both are read once more after the collective."""
    return (3 if ranks == 1 else 5) * vocab * width / ranks


def exponentials(vocab: int, ranks: int) -> float:
    """Per token, at most: two per column and pass, over the columns twice. Next to p = q a KL takes one."""
    return 4 * vocab / ranks


def gathered(ranks: int) -> int:
    """Bytes per token that a rank receives in the all-gather of statistics.

    One of partial sums follows for KLs under uniform smoothing or by Triton, and for NL: 2 numbers to these 15.
    """
    return FLOAT32 * ROW_STATISTICS * (ranks - 1)


def gathered_logits(vocab: int, ranks: int, width: int = BFLOAT16) -> float:
    """Bytes per token that a rank would receive if both logits were gathered instead."""
    return 2 * vocab * width * (ranks - 1) / ranks


def matmuls(vocab: int, ranks: int, hidden: int = HIDDEN) -> float:
    """Flop per token: policy, reference, the gradients of hidden and of weight."""
    return 4 * 2 * hidden * vocab / ranks


def reduced(ranks: int, hidden: int = HIDDEN) -> float:
    """Bytes per token of a ring all-reduce of the hidden states' gradient."""
    return 2 * (ranks - 1) / ranks * FLOAT32 * hidden


def per_token() -> str:
    return table(
        (
            "V | P | memory, KiB | exponentials at most, thousands | all-gathers, bytes | gathering the logits, KiB | "
            "linear, Gflop | linear's all-reduce, KiB"
        ).split(" | "),
        [
            [
                f"{vocab}",
                f"{ranks}",
                f"{memory_traffic(vocab, ranks) / 2**10:.0f}",
                f"{exponentials(vocab, ranks) / 1e3:.0f}",
                f"{gathered(ranks)}",
                f"{gathered_logits(vocab, ranks) / 2**10:.0f}",
                f"{matmuls(vocab, ranks) / 1e9:.2f}",
                f"{reduced(ranks) / 2**10:.0f}",
            ]
            for vocab in (128256, 262144)
            for ranks in (1, 2, 4, 8)
        ],
        words=0,
    )


def per_step(vocab: int = 128256) -> str:
    rows = []
    for gpus in (8, 64, 256, 1024):
        for ranks in (1, 8):
            replicas = gpus // ranks
            tokens = TOKENS // replicas
            logits = 2 * vocab * BFLOAT16 / ranks
            rows.append(
                [
                    f"{gpus}",
                    f"{ranks}",
                    f"{replicas}",
                    f"{tokens}",
                    f"{tokens * memory_traffic(vocab, ranks) / 2**30:.1f}",
                    f"{tokens * gathered(ranks) / 2**20:.1f}",
                    f"{tokens * logits / 2**30:.1f}",
                    f"{tokens * matmuls(vocab, ranks) / 1e12:.0f}",
                ]
            )
    return table(
        (
            "GPUs | P | replicas | tokens per replica | memory traffic per GPU, GiB | all-gathers per GPU, MiB | "
            "both logits per GPU, GiB | linear matmuls per GPU, Tflop"
        ).split(" | "),
        rows,
        words=0,
    )


def measured() -> str:
    """One device by formula and as measured: TNFF with its gradient in place, on the CPU of ``cpu.json``."""
    rows = []
    for case in json.loads(RESULTS.read_text())["cases"]:
        whole = case["negatives"] == "none" and case["active_share"] == 1
        if not (whole and (case["contender"], case["method"]) == ("in place", "tnff")):
            continue
        vocab, tokens = case["vocab"], case["rows"]
        widths = {"float32": FLOAT32, "bfloat16": BFLOAT16}
        if tokens != 512 or case["dtype"] not in widths or case["bytes_beyond_inputs"] is None:
            continue
        traffic = memory_traffic(vocab, 1, widths[case["dtype"]])
        gb_per_s = tokens * traffic / case["floor_ms"] / 1e6
        seconds = case["ms_min"] / 1e3 / tokens
        rows.append(
            [
                f"{vocab}",
                case["dtype"],
                f"{traffic / 2**10:.0f}",
                f"{traffic / gb_per_s / 1e3:.1f}",
                f"{seconds * 1e6:.1f}",
                f"{exponentials(vocab, 1) / seconds / 1e9:.1f}",
                f"{case['bytes_beyond_inputs'] / tokens:.0f}",
            ]
        )
    return table(
        (
            "V | dtype | memory by formula, KiB | that at the copy's bandwidth, µs | measured, µs | "
            "exponentials by formula over the time measured, 10⁹/s | memory beyond the inputs, bytes"
        ).split(" | "),
        rows,
        words=0,
    )


def filled(page: str) -> str:
    """The page with its tables, each between its markers."""
    tables = {"per-token": per_token(), "per-step": per_step(), "measured": measured()}
    for name, text in tables.items():
        page = with_block(page, name, text, PAGE.name)
    return page


def write() -> None:
    PAGE.write_text(filled(PAGE.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if stale")
    page = PAGE.read_text()
    if parser.parse_args().check:
        sys.exit(f"{PAGE}: run python -m benchmarks.scale" if filled(page) != page else 0)
    write()


if __name__ == "__main__":
    main()
