"""Instructions of the CPU kernels per pair of logits, as callgrind counts them: a guard that needs no quiet machine.

``python -m benchmarks.instructions`` prints them next to those of ``results/instructions.json``, ``--write`` puts them
there. They hold for one compiler. Valgrind knows no AVX-512, so it is the AVX2 and the baseline kernels that are
counted: the same source.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

PATH = Path(__file__).parent / "results" / "instructions.json"
ROOT = Path(__file__).parent.parent
#: A change of a few instructions in a loop of 60 shows; what differs between two runs is far less.
TOLERANCE = 0.03
ROWS, VOCAB = 4, 4096
CASES = (
    ("tnff", "float32", True),
    ("tnff", "bfloat16", True),
    ("tnff", "float32", False),
    ("tnrf", "float32", True),
    ("ul+ll", "float32", True),
)
INSTRUCTION_SETS = ("avx2", "baseline")


def why_not() -> str:
    """Why they cannot be counted here; empty where they can."""
    if not shutil.which("valgrind"):
        return "valgrind is not installed"
    try:
        from tnt_kernels import _C
    except ImportError as error:
        return f"no native kernels: {error}"
    missing = set(INSTRUCTION_SETS) - set(_C.instruction_sets())
    return f"no kernels for {', '.join(sorted(missing))}" if missing else ""


def compiler() -> str:
    from tnt_kernels import _C

    return str(_C.compiler)


def _names() -> list[str]:
    return [
        f"{isa}, {method}, {dtype}, {'step' if with_gradient else 'forward'}"
        for isa in INSTRUCTION_SETS
        for method, dtype, with_gradient in CASES
    ]


def call_all() -> None:
    """What is counted: under callgrind, in this order, the calls of the kernels."""
    import tnt_kernels as tnt
    from tnt_kernels import _C

    torch.set_num_threads(1)
    torch.manual_seed(0)
    reference = torch.randn(ROWS, VOCAB).mul_(3)
    policy = reference + 0.3 * torch.randn(ROWS, VOCAB)
    labels = torch.arange(ROWS)
    weights = torch.tensor([1.0, -1.0] * (ROWS // 2))
    for isa in INSTRUCTION_SETS:
        _C.select_instruction_set(isa)
        for method, dtype, with_gradient in CASES:
            logits, ref_logits = (x.to(getattr(torch, dtype)) for x in (policy, reference))
            logits.requires_grad_(with_gradient)
            for _ in range(2):  # the first one's dump has what happens only once
                tnt.tnt_loss(logits, ref_logits, labels, weights, method=method, backend="cpu")


def _part(path: Path) -> int:
    return int(path.suffix[1:])


def count() -> dict[str, float]:
    """Instructions per pair of logits, by case."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = [f"tnt::{isa}::run_rows(tnt::RowCall const&, int)" for isa in INSTRUCTION_SETS]
        command = [
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out",
            *(f"--dump-{when}={k}" for when in ("before", "after") for k in kernels),
            sys.executable, "-m", "benchmarks.instructions", "--call",
        ]  # fmt: skip
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(
                f"valgrind exited with {result.returncode}:\n{result.stderr[-2000:]}"
            )
        texts = [p.read_text() for p in sorted(Path(folder).glob("out.*"), key=_part)]
    # What ran since the dump before: the kernel.
    kernel = [text for text in texts if "Trigger: --dump-after" in text]
    totals = [int(match[1]) for t in kernel if (match := re.search(r"^totals: (\d+)", t, re.M))]
    names = _names()
    if len(totals) != 2 * len(names) or not all(totals):
        raise RuntimeError(f"callgrind counted {totals}, expected {2 * len(names)} counts")
    pairs = ROWS * VOCAB
    return {name: round(totals[2 * i + 1] / pairs, 3) for i, name in enumerate(names)}


def changes(counted: dict[str, float], committed: dict[str, float]) -> list[str]:
    """What is not within ``TOLERANCE`` of what was committed; less is a change too, to be written down."""
    found = []
    for name in sorted({*counted, *committed}):
        now, then = counted.get(name), committed.get(name)
        if now is None or then is None or abs(now - then) > TOLERANCE * then:
            found.append(f"{name}: {now} instructions a pair, committed {then}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {PATH.name}")
    parser.add_argument("--call", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.call:
        return call_all()
    if reason := why_not():
        sys.exit(reason)
    counted = count()
    committed = (
        json.loads(PATH.read_text()) if PATH.exists() else {"compiler": None, "per_pair": {}}
    )
    for name, value in counted.items():
        print(f"{name:<36}{value:>9.3f}   committed {committed['per_pair'].get(name)}")
    if a.write:
        PATH.write_text(json.dumps({"compiler": compiler(), "per_pair": counted}, indent=1) + "\n")


if __name__ == "__main__":
    main()
