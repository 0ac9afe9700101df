"""Hidden states to losses and gradients, a chunk of rows at a time: what the operators of ``_linear_ops`` do.

A chunk is multiplied out, the loss overwrites its logits with their gradient (``_shards.chunk_losses_``), and that is
multiplied back. Chunks are float32 (float64 for float64 hidden states), whatever the dtype of the parameters. It buys a
gradient that is rounded once, right before the matmuls that sum it up, room to scale it for float16, and references of
any dtype.

Of 16-bit parameters, a matmul's float32 sums are rounded to 16 bits where the device offers nothing else (a CPU), which
near p = q is most of the gradient's error: there, the logits pass through a 16-bit buffer, and chunks cost two passes
and 4 bytes more per entry than logits in the parameters' dtype would. CUDA leaves the sums as they are
(:func:`keeps_float32`): one pass less than that, as nothing is copied from the 16-bit buffer, which the gradient alone
still needs, and the same bytes per entry. What the matmul writes is twice as wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tnt_kernels import _shards
from tnt_kernels._groups import Shard, all_reduce_, place
from tnt_kernels._ops import RowTensors
from tnt_kernels.backends.call import Scalars, real_dtype
from tnt_kernels.objectives import RowLoss

#: What a chunk's buffers may take. Every chunk reads all of the weight and reads and writes all of its gradient: at V =
#: 32000 and H = 512, 170 float32 rows at a time take a CPU some 15 % longer than 500. A GPU wants 1000.
CHUNK_BYTES = {"cpu": 64 << 20}
CHUNK_BYTES_ELSEWHERE = 1 << 30
#: An eighth of them is left to matmuls: to a CPU's copies of their operands (some 10 MiB), and to the 16-bit parts of
#: the weight's gradient on their way to its float32 sum.
_MATMUL_SHARE = 8


class LinearTensors(NamedTuple):
    """The operators' tensors, in this order. V: the vocabulary, which the parameters may exceed."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (>= V, H)
    bias: Tensor | None  # (>= V,)
    ref_hidden: Tensor | None  # (..., H_ref)
    ref_weight: Tensor | None  # (>= V, H_ref)
    ref_bias: Tensor | None  # (>= V,)
    labels: Tensor  # (...) int64
    weights: Tensor | None  # (...) real
    alpha: Tensor | None  # (...) or () real
    negative_ids: Tensor | None  # (..., K) or (K,) int64
    normalizer: Tensor | None  # () real


class LinearScalars(NamedTuple):
    """The operators' first scalars, in this order; ``Scalars`` follow."""

    softcap: float | None
    ref_softcap: float | None
    logit_scale: float
    ref_logit_scale: float
    vocab_size: int
    chunk_size: int | None  # rows; None: what fits into the budget
    max_active_rows: int | None  # None: as many as there are


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient until the upstream factor arrives: a mean's would underflow in float16."""
    return torch.float32 if dtype == torch.float16 else dtype


@cache
def keeps_float32(device_type: str) -> bool:
    """Whether matmuls of 16-bit matrices can leave their float32 sums unrounded: cuBLAS can, from torch 2.8 on."""
    cublas = device_type == "cuda" and torch.version.cuda is not None
    return cublas and hasattr(torch.ops.aten.mm, "dtype_out")


def _wide_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b`` of 16-bit matrices, float32, where ``keeps_float32``."""
    torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, float32 where nothing needs to be rounded."""
    if a.dtype.itemsize > 2 or not keeps_float32(a.device.type):
        return torch.mm(a, b)
    out = a.new_empty((a.size(0), b.size(1)), dtype=torch.float32)
    _wide_mm(a, b, out)
    return out


def _budget(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE)


def flatten_rows(t: LinearTensors) -> LinearTensors:
    """(...) as (N,). What holds for every row stays as it is."""
    alpha, ids = t.alpha, t.negative_ids
    return t._replace(
        hidden=t.hidden.reshape(-1, t.hidden.size(-1)),
        ref_hidden=None
        if t.ref_hidden is None
        else t.ref_hidden.reshape(-1, t.ref_hidden.size(-1)),
        labels=t.labels.reshape(-1),
        weights=None if t.weights is None else t.weights.reshape(-1),
        alpha=alpha if alpha is None or alpha.dim() == 0 else alpha.reshape(-1),
        negative_ids=ids if ids is None or ids.dim() == 1 else ids.reshape(-1, ids.size(-1)),
    )


def active_rows(labels: Tensor, weights: Tensor | None, ignore_index: int) -> Tensor:
    active = labels != ignore_index
    return active if weights is None else active & (weights != 0)


class RowGroup(NamedTuple):
    """Rows that are computed alike."""

    rows: Tensor  # (n,) int64, their indices
    reads_reference: bool
    all_active: bool


def plan(
    t: LinearTensors, s: Scalars, max_active_rows: int | None
) -> tuple[list[RowGroup], Tensor]:
    """The rows to compute, those that read the reference apart from the others; and the number of active rows.

    That number sits on the device: to ask for it is the one place where a GPU is waited for. With ``max_active_rows``
    it is not asked for, and that many rows are taken, active ones first, all with their reference.
    """
    active = active_rows(t.labels, t.weights, s.ignore_index)
    positive, negative = (RowLoss(x).reads_reference for x in (s.positive_loss, s.negative_loss))
    reads = torch.full_like(active, positive)
    if positive != negative:
        is_negative = torch.zeros_like(active) if t.weights is None else t.weights < 0
        if t.negative_ids is not None:
            is_negative |= (t.negative_ids >= 0).any(-1)
        reads = is_negative if negative else ~is_negative
    count = active.sum()
    # 0: reads the reference, 1: does not, 2: nothing to do
    order = torch.where(active, (~reads).to(torch.int8), 2).argsort(stable=True)
    if max_active_rows is not None:
        groups = [RowGroup(order[:max_active_rows], positive or negative, False)]
    else:
        total, with_reference = torch.stack((count, (active & reads).sum())).tolist()
        groups = [
            RowGroup(order[:with_reference], True, True),
            RowGroup(order[with_reference:total], False, True),
        ]
    return [group for group in groups if len(group.rows)], count


class _Head:
    """``softcap(scale * (hidden @ weight.T + bias))`` of one model, in buffers for a chunk of rows."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        scale: float,
        vocab: int,
    ) -> None:
        self.hidden, self.weight = hidden, weight[:vocab]
        self.bias = None if bias is None else bias[:vocab]
        self.softcap, self.scale = softcap, scale

    def logits(self, rows: Tensor, out: Tensor, narrow: Tensor | None, tanh: Tensor | None) -> None:
        """Writes to ``out``, by way of ``narrow`` if the matmul rounds to its dtype. ``tanh`` keeps softcap's."""
        scale = self.scale if self.softcap is None else self.scale / self.softcap
        wide = out if tanh is None else tanh
        if narrow is None and rows.dtype != wide.dtype:
            # mm, as addmm's bias would have to be 16-bit in some versions and float32 in others
            _wide_mm(rows, self.weight.t(), wide)
            if scale != 1.0:
                wide.mul_(scale)
            if self.bias is not None:
                wide.add_(self.bias, alpha=scale)
        else:
            raw = wide if narrow is None else narrow
            beta, addend = (0.0, raw) if self.bias is None else (scale, self.bias)
            torch.addmm(addend, rows, self.weight.t(), beta=beta, alpha=scale, out=raw)
            if narrow is not None:
                wide.copy_(narrow)
        if self.softcap is not None:
            torch.mul(wide.tanh_(), self.softcap, out=out)


class Gradients:
    """Of hidden, weight and bias, None where not wanted; chunk after chunk is added."""

    def __init__(
        self,
        t: LinearTensors,
        vocab: int,
        real: torch.dtype,
        wanted: tuple[bool, ...],
        shard: Shard | None,
    ) -> None:
        self.dtype, self.real, self.vocab, self.shard = t.hidden.dtype, real, vocab, shard
        hidden, weight, bias = wanted
        # A shard's part of the hidden states' gradient is rounded when all parts are summed.
        dtype = held_dtype(self.dtype) if shard is None else real
        self.hidden = t.hidden.new_zeros(t.hidden.shape, dtype=dtype) if hidden else None
        # new_zeros, not zeros_like: contiguous, whatever the parameter's strides
        self.weight = t.weight.new_zeros(t.weight.shape, dtype=real) if weight else None
        self.bias = (
            t.bias.new_zeros(t.bias.shape, dtype=real) if bias and t.bias is not None else None
        )

    def add(
        self, head: _Head, index: Tensor, rows: Tensor, gradient: Tensor, narrow: Tensor | None
    ) -> None:
        """Adds a chunk: its rows (n, H), and the gradient (n, V) of its logits before softcap, which is overwritten."""
        if self.bias is not None:
            self.bias[: self.vocab].add_(gradient.sum(0), alpha=head.scale)
        exponent = None
        if self.dtype == torch.float16:
            # Each row is brought to a largest entry of 1/2 to 1 by a power of two, which the product with the weight
            # gives back, as does the hidden state where rows are summed. Undefined rows stay what they are.
            largest = torch.linalg.vector_norm(gradient, torch.inf, dim=1, keepdim=True)
            exponent = torch.frexp(largest).exponent.clamp_min(-100)
            exponent = exponent.where(largest.isfinite() & (largest > 0), -100)
            gradient.mul_(_exp2(-exponent))
        matrix = gradient if narrow is None else narrow.copy_(gradient)
        if self.hidden is not None:
            product = _mm(matrix, head.weight).to(self.real).mul_(head.scale)
            if exponent is not None:
                product.mul_(_exp2(exponent))
            self.hidden.index_copy_(0, index, product.to(self.hidden.dtype))
        if self.weight is None:
            return
        if narrow is None:
            self.weight[: self.vocab].addmm_(matrix.t(), rows, alpha=head.scale)
            return
        # The product has to be somewhere before it is added to the float32 sum.
        factor = None
        if exponent is not None:
            top = exponent.max()
            rows, factor = (rows * _exp2(exponent - top)).to(self.dtype), _exp2(top)
        entry = self.real.itemsize
        if not keeps_float32(rows.device.type):
            entry += matrix.element_size()
        step = max(1, _budget(rows.device) // _MATMUL_SHARE // (rows.size(1) * entry))
        for begin in range(0, self.vocab, step):
            end = min(begin + step, self.vocab)
            part = _mm(matrix[:, begin:end].t(), rows)
            if factor is not None:
                part = part.to(self.real).mul_(factor)
            self.weight[begin:end].add_(part, alpha=head.scale)

    def results(self) -> list[Tensor]:
        if self.shard is not None and self.hidden is not None:
            all_reduce_(self.hidden, self.shard.group)
        return [
            x.to(held_dtype(self.dtype))
            for x in (self.hidden, self.weight, self.bias)
            if x is not None
        ]


def _exp2(exponent: Tensor) -> Tensor:
    """float32; exact."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _unless_it_reads(row_loss: int) -> int:
    return int(RowLoss.NONE if RowLoss(row_loss).reads_reference else row_loss)


class _Buffers:
    """For one chunk of ``rows`` rows, as many as ``chunk_size`` says or the budget holds."""

    def __init__(
        self,
        t: LinearTensors,
        linear: LinearScalars,
        group: RowGroup,
        real: torch.dtype,
        with_gradient: bool,
        widest: int,
    ) -> None:
        policy, reference = t.hidden, t.ref_hidden if group.reads_reference else None
        wide = {"logits", *(["ref_logits"] if reference is not None else [])}
        if linear.softcap is not None and with_gradient:
            wide.add("tanh")
        # Narrow are the logits where matmuls round them, and the gradient that goes into matmuls.
        self.rounds = not keeps_float32(policy.device.type)
        dtypes = {x.dtype for x in (policy, reference) if x is not None and self.rounds} - {real}
        if with_gradient:
            dtypes |= {policy.dtype} - {real}
        n, budget = len(group.rows), _budget(policy.device)
        budget -= budget // _MATMUL_SHARE
        row = widest * (len(wide) * real.itemsize + sum(x.itemsize for x in dtypes))
        row += policy.size(1) * (2 * policy.element_size() + 2 * real.itemsize)
        row += 0 if reference is None else reference.size(1) * reference.element_size()
        most = max(1, linear.chunk_size or budget // row)
        self.rows = -(-n // -(-n // most))  # chunks of even size
        shape = (self.rows, linear.vocab_size)
        self.wide = {name: policy.new_empty(shape, dtype=real) for name in sorted(wide)}
        self.narrow = {dtype: policy.new_empty(shape, dtype=dtype) for dtype in dtypes}

    def first(self, n: int, name: str) -> Tensor | None:
        return self.wide[name][:n] if name in self.wide else None

    def for_logits(self, n: int, dtype: torch.dtype) -> Tensor | None:
        """What a matmul of this dtype rounds to; None where it does not."""
        return self.for_gradient(n, dtype) if self.rounds else None

    def for_gradient(self, n: int, dtype: torch.dtype) -> Tensor | None:
        """The gradient as matmuls of this dtype take it; None: as it is."""
        return self.narrow[dtype][:n] if dtype in self.narrow else None


def compute(
    t: LinearTensors,
    linear: LinearScalars,
    s: Scalars,
    groups: list[RowGroup],
    gradients: Gradients | None,
    with_stats: bool,
    upstream: Tensor | None,
    shard: Shard | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Chunk after chunk, what it yields: its rows' indices, their loss and statistics. Adds to ``gradients``.

    ``t`` has flat rows. ``upstream`` (N,) multiplies the gradient of every row.
    """
    real, vocab = real_dtype(t.hidden), linear.vocab_size
    # all ranks have chunks of the same rows, whatever their shards' sizes
    widest = vocab if shard is None else place(shard, vocab).widest
    policy = _Head(t.hidden, t.weight, t.bias, linear.softcap, linear.logit_scale, vocab)
    for group in groups:
        buffers = _Buffers(t, linear, group, real, gradients is not None, widest)
        reference, settings = None, s
        if not group.reads_reference:
            # None of these rows is of a side that reads it, but a backend asks for it if one side might.
            sides = _unless_it_reads(s.positive_loss), _unless_it_reads(s.negative_loss)
            settings = s._replace(positive_loss=sides[0], negative_loss=sides[1])
        elif t.ref_hidden is not None and t.ref_weight is not None:
            softcap, scale = linear.ref_softcap, linear.ref_logit_scale
            reference = _Head(t.ref_hidden, t.ref_weight, t.ref_bias, softcap, scale, vocab)
        for index in group.rows.split(buffers.rows):
            n = len(index)
            rows, labels = policy.hidden[index], t.labels[index]
            weights = None if t.weights is None else t.weights[index]
            if not group.all_active:
                # 0 · NaN is NaN: a row of weight 0 must not reach the gradient of the weight
                rows.masked_fill_(~active_rows(labels, weights, s.ignore_index)[:, None], 0.0)
            logits, ref_logits, tanh = (
                buffers.first(n, x) for x in ("logits", "ref_logits", "tanh")
            )
            assert logits is not None
            policy.logits(rows, logits, buffers.for_logits(n, rows.dtype), tanh)
            if reference is not None and ref_logits is not None:
                ref_rows = reference.hidden[index]
                reference.logits(ref_rows, ref_logits, buffers.for_logits(n, ref_rows.dtype), None)
            alpha, ids = t.alpha, t.negative_ids
            tensors = RowTensors(
                ref_logits,
                labels,
                weights,
                alpha if alpha is None or alpha.dim() == 0 else alpha[index],
                ids if ids is None or ids.dim() == 1 else ids[index],
                t.normalizer,
            )
            arguments = (logits, tensors, settings, shard, with_stats)
            if gradients is None:
                yield index, *_shards.chunk_losses(*arguments)
                continue
            loss, stats = _shards.chunk_losses_(*arguments)
            if upstream is not None:
                logits.mul_(upstream[index][:, None])
            if tanh is not None:
                logits.addcmul_(logits, tanh.square_(), value=-1)  # softcap's derivative, 1 - tanh²
            gradients.add(policy, index, rows, logits, buffers.for_gradient(n, rows.dtype))
            yield index, loss, stats
