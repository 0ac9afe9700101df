"""The model of the fused linear loss on a GPU: that it says of a known step what is known of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("not in this distribution", allow_module_level=True)
sys.path.append(str(ROOT))  # last: the package under test is the installed one

from benchmarks.linear import LinearSize  # noqa: E402
from benchmarks.linear_model import LOSS_SHARE, Step, arithmetic, predicted  # noqa: E402
from benchmarks.row_model import H100, H200  # noqa: E402
from tnt_kernels._linear.sizes import Sizes  # noqa: E402

LLAMA = LinearSize(8192, 4096, 128256, "bfloat16")
#: Of the memory's bandwidth, by the loss of commit 6df96f3: it took 5.7 ms beside 53.7 ms of matmuls on an H200.
MEASURED_SHARE = 0.52


def test_the_code_as_it_was() -> None:
    step = Step(Sizes(512, 8192, True), pair_bytes=8, hidden_bytes=14)
    assert arithmetic(LLAMA) == pytest.approx(49.2e3, rel=1e-3)
    for device, times in ((H100, 1.14), (H200, 1.11)):
        found = predicted(LLAMA, step, device, MEASURED_SHARE) / arithmetic(LLAMA)
        assert found == pytest.approx(times, abs=0.015)


def test_small_chunks_wait_for_the_weight() -> None:
    """128 rows at a time, as 1 GiB held of float32 pairs at V = 262144."""
    gemma = LinearSize(8192, 2304, 262144, "bfloat16")
    few, many = (Step(Sizes(n, 1152, False), 8, 14) for n in (128, 512))
    of_few, of_many = (
        predicted(gemma, x, H100, LOSS_SHARE[H100]) / arithmetic(gemma) for x in (few, many)
    )
    assert 1.5 < of_few < 1.8
    assert of_many < of_few - 0.3
