"""The matmuls of ``linear_tnt_loss``: hidden states to logits (``Head``), their gradient back (``Gradients``).

Logits are float32 (float64 for float64 hidden states), whatever the dtype of the parameters, as CUDA can leave a
matmul's float32 sums unrounded (:func:`keeps_float32`); rounding them is most of the gradient's error near p = q.
Elsewhere 16-bit parameters have 16-bit logits, which stay so where nothing but the loss happens to them. The gradient
is rounded once, by the loss, unless something is yet to happen to it (softcap, float16, a factor for every row).

The gradient of 16-bit logits waits until there are rows enough for one large matmul. A matmul of few rows spends its
time on the (V, H) sum that it adds to: 8 bytes an entry, read and written, are 1.3 ms of an H100 at 128256 x 4096,
where 700 rows are 1 ms of arithmetic. Best of all is one matmul, which needs no sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tnt_kernels._call import Shard, real_dtype
from tnt_kernels._sharded.collectives import all_reduce_


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient until the upstream factor arrives: a mean's would underflow in float16."""
    return torch.float32 if dtype == torch.float16 else dtype


@cache
def keeps_float32(device_type: str) -> bool:
    """Whether matmuls of 16-bit matrices can leave their float32 sums unrounded: cuBLAS can, from torch 2.8 on."""
    cublas = device_type == "cuda" and torch.version.cuda is not None
    return cublas and hasattr(torch.ops.aten.mm, "dtype_out")


@cache
def adds_to_float32(device_type: str) -> bool:
    """Whether they can add to a float32 matrix: from torch 2.10 on (pytorch/pytorch#167931)."""
    return keeps_float32(device_type) and torch.__version__ >= "2.10"


def padded(columns: int) -> int:
    """Columns from row to row of a buffer whose rows begin at whole cache lines: a GPU has no fast matmul for 16-bit
    rows at odd addresses."""
    return -(-columns // 64) * 64


def new_rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns) to be written, in such a buffer, on the device of ``like``.

    The columns behind a row are 0, once and for all, because no matmul writes there. But one reads there: PyTorch's of
    bfloat16 on a CPU with AMX takes the columns of its first factor four at a time. It multiplies the excess by 0,
    which is NaN where the memory held an infinity or a NaN.
    """
    buffer = like.new_empty((rows, padded(columns)), dtype=dtype)
    buffer[:, columns:].zero_()
    return buffer[:, :columns]


def _wide_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b`` of 16-bit matrices, float32, where ``keeps_float32``."""
    torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


def _wide_addmm_(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    """``out = beta * out + alpha * a @ b`` of 16-bit matrices, float32, where ``adds_to_float32``."""
    torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=beta, alpha=alpha, out=out)


def _mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * a @ b``, float32 where nothing needs to be rounded."""
    if a.dtype.itemsize > 2 or not keeps_float32(a.device.type):
        return a.new_empty((a.size(0), b.size(1))).addmm_(a, b, beta=0, alpha=scale)
    out = a.new_empty((a.size(0), b.size(1)), dtype=torch.float32)
    _wide_mm(a, b, out)
    return out if scale == 1.0 else out.mul_(scale)


def _exp2(exponent: Tensor) -> Tensor:
    """float32; exact."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


class Head:
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


class Slot(NamedTuple):
    """Where the n rows of a chunk wait for the matmuls of the gradient."""

    logits: Tensor  # (n, V): the gradient; free for other uses until it is written
    rows: Tensor  # (n, H): hidden states


class Gradients:
    """Of hidden, weight and bias, None where not wanted; chunk after chunk is added.

    Args:
        head: the policy's, over flat rows.
        weight, bias: the parameters, which may have more rows than the vocabulary.
        wanted: whether those of hidden, weight and bias are.
        waiting: rows whose gradient waits for a common matmul; 0: none, it is in the parameters' dtype already.
        one_matmul: there are no more rows than that.
        part_bytes: for products on their way to a float32 sum.
    """

    def __init__(
        self,
        head: Head,
        weight: Tensor,
        bias: Tensor | None,
        wanted: Sequence[bool],
        shard: Shard | None,
        waiting: int,
        one_matmul: bool,
        part_bytes: int,
    ) -> None:
        hidden, real = head.hidden, real_dtype(head.hidden)
        self.head, self.dtype, self.real, self.shard = head, hidden.dtype, real, shard
        self._part_bytes = part_bytes
        # A shard's part of the hidden states' gradient is rounded when all parts are summed.
        held = held_dtype(self.dtype)
        to_sum = held if shard is None else real
        self.hidden = hidden.new_zeros(hidden.shape, dtype=to_sum) if wanted[0] else None
        self._parameter = weight if wanted[1] else None
        self._sum_dtype = held if one_matmul else real
        self._is_first = True  # what self.weight holds is to be overwritten
        # That of one matmul can wait until the chunks' buffers are free again.
        self.weight = None if one_matmul else self._new_weight()
        self.bias = (
            bias.new_zeros(bias.shape, dtype=real) if wanted[2] and bias is not None else None
        )
        self._logits = self._rows = None
        if waiting:
            self._logits = new_rows(hidden, waiting, len(head.weight), hidden.dtype)
            self._rows = hidden.new_empty((waiting, hidden.size(1)))
        self._filled = 0
        self._indices: list[Tensor] = []
        self._exponents: list[Tensor] = []

    def _new_weight(self) -> Tensor | None:
        if self._parameter is None:
            return None
        # new_empty, not empty_like: contiguous, whatever the parameter's strides
        weight = self._parameter.new_empty(self._parameter.shape, dtype=self._sum_dtype)
        weight[len(self.head.weight) :].zero_()
        return weight

    def reserve(self, n: int) -> Slot | None:
        """For the next chunk, of n rows; None where no rows wait."""
        if self._logits is None or self._rows is None:
            return None
        if self._filled + n > len(self._logits):
            self.multiply_waiting()
        free = slice(self._filled, self._filled + n)
        return Slot(self._logits[free], self._rows[free])

    def add(self, index: Tensor, rows: Tensor, gradient: Tensor, slot: Slot | None) -> None:
        """Adds a chunk: its rows (n, H), and the gradient (n, V) of its logits before softcap, which is overwritten,
        unless it is ``slot.logits``."""
        if self.bias is not None:
            vocab = gradient.size(1)
            self.bias[:vocab].add_(gradient.sum(0, dtype=self.real), alpha=self.head.scale)
        if slot is None:
            self._multiply(index, rows, gradient, None)
            return
        if self.dtype == torch.float16:
            # Each row is brought to a largest entry of 1/2 to 1 by a power of two, which the product with the weight
            # gives back, as does the hidden state where rows are summed. Undefined rows stay what they are.
            # (A CPU's vector_norm takes ten times as long as the two reductions.)
            largest = gradient.amax(1, keepdim=True).maximum(gradient.amin(1, keepdim=True).neg_())
            exponent = torch.frexp(largest).exponent.clamp_min(-100)
            exponent = exponent.where(largest.isfinite() & (largest > 0), -100)
            gradient.mul_(_exp2(-exponent))
            self._exponents.append(exponent)
        if gradient is not slot.logits:
            slot.logits.copy_(gradient)
        self._indices.append(index)
        self._filled += len(index)

    def results(self) -> list[Tensor]:
        """Once nothing waits any more."""
        self._logits = self._rows = None
        if self.shard is not None and self.hidden is not None:
            all_reduce_(self.hidden, self.shard.group)
        if self._is_first:  # there was no row
            self.weight = self._new_weight()
            if self.weight is not None:
                self.weight.zero_()
        return [
            x.to(held_dtype(self.dtype))
            for x in (self.hidden, self.weight, self.bias)
            if x is not None
        ]

    def multiply_waiting(self) -> None:
        if self._logits is None or self._rows is None or not self._filled:
            return
        exponent = torch.cat(self._exponents) if self._exponents else None
        rows, logits = self._rows[: self._filled], self._logits[: self._filled]
        self._multiply(torch.cat(self._indices), rows, logits, exponent)
        self._filled = 0
        self._indices, self._exponents = [], []

    def _multiply(
        self, index: Tensor, rows: Tensor, gradient: Tensor, exponent: Tensor | None
    ) -> None:
        """Rows (n, H) and the gradient (n, V) of their logits, both in the parameters' dtype, the latter times
        2^-exponent (n, 1)."""
        if self.hidden is not None:
            product = _mm(gradient, self.head.weight, self.head.scale)
            if exponent is not None:
                product = product.to(self.real).mul_(_exp2(exponent))
            self.hidden.index_copy_(0, index, product.to(self.hidden.dtype))
            del product
        if self.weight is None:
            self.weight = self._new_weight()
        if self.weight is not None:
            self._add_to_weight(self.weight[: gradient.size(1)], gradient.t(), rows, exponent)
            self._is_first = False

    def _add_to_weight(self, out: Tensor, a: Tensor, rows: Tensor, exponent: Tensor | None) -> None:
        """``out += scale * a @ (2^exponent * rows)``, or ``=`` for the first; a (V, n)."""
        beta, scale, real = 0.0 if self._is_first else 1.0, self.head.scale, self.real
        if exponent is None and out.dtype == a.dtype:
            out.addmm_(a, rows, beta=beta, alpha=scale)
            return
        keeps = keeps_float32(a.device.type)
        if exponent is None and adds_to_float32(a.device.type):
            _wide_addmm_(out, a, rows, beta, scale)
            return
        # The product has to be somewhere before it is added to the float32 sum.
        if self._is_first:
            out.zero_()
        entry, factor = rows.size(1) * (real.itemsize + (0 if keeps else a.element_size())), None
        if exponent is not None and keeps:
            top = exponent.max()
            rows, factor = (rows * _exp2(exponent - top)).to(a.dtype), _exp2(top)
        elif exponent is not None:
            # Rounded to float16, a sum over many rows might overflow.
            rows, entry = rows * _exp2(exponent), entry + len(rows) * real.itemsize
        step = max(64, self._part_bytes // entry // 64 * 64)  # parts begin at whole cache lines
        for part_of_a, part_of_out in zip(a.split(step), out.split(step), strict=True):
            part = _mm(part_of_a.to(rows.dtype), rows, scale)
            if factor is not None:
                part.mul_(factor)
            part_of_out.add_(part)
