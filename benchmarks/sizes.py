"""At which sizes the CPU's suite measures, as data."""

from __future__ import annotations

from tnt_kernels.bench.problem import Size

#: Where everything is compared.
SIZES = tuple(Size(512, v, d) for v in (32000, 128256) for d in ("float32", "bfloat16"))
HALF = Size(512, 32000, "float16")
#: Sweeps over the vocabulary and over the rows: the sizes beyond SIZES. Rows of 256 show what a row costs besides its
#: entries.
VOCABULARIES = (50257, 151936, 262144)
ROWS = (64, 2048)
SWEEP = (
    *(Size(512, v, "bfloat16") for v in VOCABULARIES),
    *(Size(n, 32000, "bfloat16") for n in ROWS),
    *(Size(65536, 256, d) for d in ("float32", "bfloat16")),
)
#: For --quick and the tests: every line runs, and the figures mean nothing.
QUICK_SIZES = (Size(16, 5000, "float32"), Size(16, 5000, "bfloat16"))
QUICK_HALF = Size(16, 5000, "float16")
QUICK_SWEEP = (Size(16, 7000, "bfloat16"), Size(8, 5000, "bfloat16"))

SPARSE = 0.1  # active share where "one row in ten" is measured

#: How far the policy has left the reference, as ``make_problem`` has it, where that is what is compared. All else is
#: measured at 0.3.
DISTANCES = (0.1, 0.3, 1.0, 3.0)
