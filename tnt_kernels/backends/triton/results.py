"""What launches leave behind of a row: for the caller, for other shards, for a gradient that waits."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from tnt_kernels._call import Kind
from tnt_kernels.backends.triton.objectives import INF, ExpPlan, KlPlan, UniformPlan

# What a launch does.
FUSED = tl.constexpr(int(Kind.FUSED))
BACKWARD = tl.constexpr(int(Kind.BACKWARD))
STATISTICS = tl.constexpr(int(Kind.STATISTICS))
PARTIAL_SUMS = tl.constexpr(int(Kind.PARTIAL_SUMS))
FINISH = tl.constexpr(int(Kind.FINISH))


class Outputs(NamedTuple):
    """Of a row: pointers, None where nobody asks."""

    loss: tl.tensor
    diagnostics: tl.tensor  # one number here, the next ``rows`` further on
    rows: tl.tensor  # in 64 bits
    coefficients: tl.tensor
    statistics: tl.tensor
    partial_sums: tl.tensor


@triton.jit
def outputs_of(index, loss, diagnostics, rows, coefficients, statistics, partial_sums):
    """Of tensors of all rows, or None."""
    return Outputs(
        None if loss is None else loss + index,
        None if diagnostics is None else diagnostics + index,
        tl.cast(rows, tl.int64),
        None if coefficients is None else coefficients + index * 16,
        None if statistics is None else statistics + index * 15,
        None if partial_sums is None else partial_sums + index * 2,
    )


@triton.jit
def write_diagnostics(to, loss, kl, d):
    tl.store(to.diagnostics, loss)
    tl.store(to.diagnostics + to.rows, kl)
    tl.store(to.diagnostics + 2 * to.rows, d.negative_mass)
    tl.store(to.diagnostics + 3 * to.rows, d.ref_negative_mass)
    tl.store(to.diagnostics + 4 * to.rows, d.entropy)


@triton.jit
def write_partial_sums(to, loss, active):
    tl.store(to.partial_sums, loss)
    tl.store(to.partial_sums + 1, active)


@triton.jit
def write_uncomputed(to, value, counted, KIND: tl.constexpr):
    """Of a row that is not computed: ``value`` stands for what it yields, ``counted`` for that times its factor."""
    if KIND == FUSED:
        if to.coefficients is not None:
            tl.store(to.coefficients + 15, counted)
    if KIND == STATISTICS:
        for i in tl.static_range(15):
            tl.store(to.statistics + i, -INF if i == 1 or i == 4 or i == 7 or i == 10 else 0.0)
    if KIND == PARTIAL_SUMS:
        write_partial_sums(to, value, value)
    if KIND == FUSED or KIND == FINISH:
        if to.diagnostics is not None:
            nan = value * 0.0 + float("nan")
            tl.store(to.diagnostics, value)
            for i in tl.static_range(1, 5):
                tl.store(to.diagnostics + i * to.rows, nan)
        if to.loss is not None:
            tl.store(to.loss, counted)


# A plan takes at most 13 of a row's 16 coefficients; the last one is the factor on the gradient.


@triton.jit
def save(to, plan, factor):
    for i in tl.static_range(len(plan)):
        tl.store(to + i, plan[i])
    tl.store(to + 15, factor)


@triton.jit
def saved_kl(at):
    return KlPlan(
        tl.load(at + 0), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
        tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9), tl.load(at + 10), tl.load(at + 11),
        tl.load(at + 12),
    )  # fmt: skip


@triton.jit
def saved_exp(at):
    return ExpPlan(
        tl.load(at + 0), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
        tl.load(at + 6),
    )  # fmt: skip


@triton.jit
def saved_uniform(at):
    return UniformPlan(
        tl.load(at + 0), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
    )  # fmt: skip


@triton.jit
def with_loss(plan, loss):
    return UniformPlan(plan.z_ref, plan.p_inverse, plan.p_log_sum, plan.r_ref, plan.q_inverse, loss)
