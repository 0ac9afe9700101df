"""Thousands of seeded random calls of the public functions, against the oracle of ``exact``.

``make fuzz`` runs more of them; a failing call prints the line that repeats it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import pytest
from fuzz import Disagreement, LinearCall, LogitsCall, assert_none
from oracle import BACKENDS, INTERPRETED, MISSING, instruction_set, instruction_sets

pytestmark = pytest.mark.skipif(INTERPRETED, reason="this process runs the Triton kernels")
#: ``make fuzz SEED=7 CALLS=20000`` sets them.
SEED = int(os.environ.get("TNT_FUZZ_SEED", "0"))
CALLS = int(os.environ.get("TNT_FUZZ_CALLS", "2000"))
LINEAR_CALLS = CALLS * 3 // 20
PARTS = 10  # for as many workers
HERE = [backend for backend in BACKENDS if backend not in MISSING]


def run(part: int, calls: int, call: Callable[[int, int], LogitsCall | LinearCall]) -> None:
    """Every call of a part on every backend, of "cpu" with one instruction set after the other."""
    failures, sets = [], instruction_sets()
    for index in range(part, calls, PARTS):
        some = call(SEED, index)
        for backend in HERE:
            name, selected = backend, contextlib.nullcontext()
            if backend == "cpu":
                chosen = sets[index // PARTS % len(sets)]
                name, selected = f"cpu/{chosen}", instruction_set(chosen)
            try:
                with selected:
                    some.check(backend)
            except Disagreement as error:
                failures.append(f"{name}: {error}")
    assert_none(failures)


@pytest.mark.parametrize("part", range(PARTS))
def test_tnt_loss(part: int) -> None:
    run(part, CALLS, LogitsCall)


@pytest.mark.parametrize("part", range(PARTS))
def test_linear_tnt_loss(part: int) -> None:
    run(part, LINEAR_CALLS, LinearCall)
