"""The matmuls of ``linear_tnt_loss``: hidden states to logits (``Head``), their gradient back (``Gradients``).

Logits are float32 (float64 for float64 hidden states), whatever the dtype of the parameters: rounding them is most of
the gradient's error near p = q. CUDA can leave a matmul's float32 sums unrounded (:func:`keeps_float32`); elsewhere
16-bit operands are converted, a part of the weight at a time. The gradient is rounded once, by the loss, unless
something is yet to happen to it (softcap, float16).

The gradient of 16-bit logits waits until there are rows enough for one large matmul. A matmul of few rows spends its
time on the (V, H) sum that it adds to: 8 bytes an entry, read and written, are 1.3 ms of an H100 at 128256 x 4096,
where 700 rows are 1 ms of arithmetic. Best of all is one matmul, which needs no sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tnt_kernels._call import Shard, real_dtype
from tnt_kernels._sharded.collectives import all_reduce_

#: Entries of a product below which a GPU has more multiprocessors than it has tiles (of 128 x 256).
_FEW_ENTRIES = 128 * 128 * 256


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


def difference(hidden: Tensor, ref_hidden: Tensor, logits_dtype: torch.dtype) -> Tensor:
    """The policy's hidden states less the reference's (n, H), of its first n rows, as matmuls take them."""
    hidden = hidden[: len(ref_hidden)]
    if hidden.dtype != logits_dtype and not keeps_float32(hidden.device.type):
        return hidden.to(logits_dtype).sub_(ref_hidden)
    return hidden - ref_hidden


def _wide_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b`` of 16-bit matrices, float32, where ``keeps_float32``."""
    torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


def _wide_addmm_(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    """``out = beta * out + alpha * a @ b`` of 16-bit matrices, float32, where ``adds_to_float32``."""
    torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=beta, alpha=alpha, out=out)


def _mm_into(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """``out = scale * a @ b``, whose sums are of a float32 ``out`` of 16-bit matrices where ``keeps_float32``."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0, alpha=scale, out=out)
    elif scale != 1.0 and adds_to_float32(a.device.type):
        _wide_addmm_(out, a, b, 0.0, scale)
    else:
        _wide_mm(a, b, out)
        if scale != 1.0:
            out.mul_(scale)


def _mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * a @ b``, float32 where nothing needs to be rounded."""
    keeps = a.dtype.itemsize == 2 and keeps_float32(a.device.type)
    out = a.new_empty((a.size(0), b.size(1)), dtype=torch.float32 if keeps else a.dtype)
    _mm_into(out, a, b, scale)
    return out


def _exp2(exponent: Tensor) -> Tensor:
    """float32; exact."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


class Head:
    """``softcap(scale * (hidden @ weight.T + bias))`` of one model, in buffers for a chunk of rows.

    ``part_bytes``: for parts of the weight in the logits' dtype.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        scale: float,
        vocab: int,
        part_bytes: int,
    ) -> None:
        self.weight, self.bias = weight[:vocab], None if bias is None else bias[:vocab]
        self.softcap, self.scale, self._part_bytes = softcap, scale, part_bytes

    def logits(self, rows: Tensor, out: Tensor, tanh: Tensor | None = None) -> None:
        """Of hidden states (n, H), to ``out`` (n, V). ``tanh`` keeps softcap's."""
        scale = self.scale if self.softcap is None else self.scale / self.softcap
        to = out if tanh is None else tanh
        if rows.dtype == to.dtype and self.bias is not None:
            torch.addmm(self.bias, rows, self.weight.t(), beta=scale, alpha=scale, out=to)
        else:
            self._multiply(rows, to, scale)
            if self.bias is not None:
                to.add_(self.bias, alpha=scale)
        if self.softcap is not None:
            torch.mul(to.tanh_(), self.softcap, out=out)

    def differences(self, rows: Tensor, out: Tensor) -> None:
        """Of differences of hidden states, those of the logits, of a head without softcap."""
        self._multiply(rows, out, self.scale)

    def _multiply(self, rows: Tensor, out: Tensor, scale: float) -> None:
        weight, keeps = self.weight, keeps_float32(rows.device.type)
        if weight.dtype == out.dtype or (weight.dtype.itemsize == 2 and keeps):
            return _mm_into(out, rows, weight.t(), scale)
        rows = rows.to(out.dtype)
        columns, width = weight.shape
        step = max(64, self._part_bytes // (width * out.element_size()) // 64 * 64)
        buffer = out.new_empty((min(step, columns), width))
        for part, to in zip(weight.split(step), out.split(step, 1), strict=True):
            wide = buffer[: len(part)].copy_(part)
            torch.addmm(to, rows, wide.t(), beta=0, alpha=scale, out=to)


class Gradients:
    """Of hidden, weight and bias, None where not wanted; chunk after chunk is added, in the order of a plan.

    Args:
        head: the policy's.
        hidden: (n, H), all rows of the plan.
        weight, bias: the parameters, which may have more rows than the vocabulary.
        wanted: whether those of hidden, weight and bias are.
        waiting: rows whose gradient waits for a common matmul; 0: none, it is in the parameters' dtype already.
        one_matmul: there are no more rows than that.
        part_bytes: for products on their way to a float32 sum.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: Sequence[bool],
        shard: Shard | None,
        waiting: int,
        one_matmul: bool,
        part_bytes: int,
    ) -> None:
        real = real_dtype(hidden)
        self.head, self.dtype, self.real, self.shard = head, hidden.dtype, real, shard
        self._part_bytes, self._rows = part_bytes, hidden
        # A shard's part of the hidden states' gradient is rounded when all parts are summed.
        held = held_dtype(self.dtype)
        to_sum = held if shard is None else real
        self.hidden = hidden.new_empty(hidden.shape, dtype=to_sum) if wanted[0] else None
        self._parameter = weight if wanted[1] else None
        self._sum_dtype = held if one_matmul else real
        self._is_first = True  # what self.weight holds is to be overwritten
        # That of one matmul can wait until the chunks' buffers are free again.
        self.weight = None if one_matmul else self._new_weight()
        self.bias = (
            bias.new_zeros(bias.shape, dtype=real) if wanted[2] and bias is not None else None
        )
        self._logits = None
        if waiting:
            self._logits = new_rows(hidden, waiting, len(head.weight), hidden.dtype)
        self._begin = self._end = 0  # of the rows that wait
        self._exponents: list[Tensor] = []

    def _new_weight(self) -> Tensor | None:
        if self._parameter is None:
            return None
        # new_empty, not empty_like: contiguous, whatever the parameter's strides
        weight = self._parameter.new_empty(self._parameter.shape, dtype=self._sum_dtype)
        weight[len(self.head.weight) :].zero_()
        return weight

    def reserve(self, n: int) -> Tensor | None:
        """Where the gradient of the next chunk's logits (n, V) waits, free for other uses until it is written; None
        where no rows wait."""
        if self._logits is None:
            return None
        if self._end - self._begin + n > len(self._logits):
            self.multiply_waiting()
        first = self._end - self._begin
        return self._logits[first : first + n]

    def add(self, begin: int, gradient: Tensor, slot: Tensor | None) -> None:
        """Adds a chunk from row ``begin`` of the plan on: the gradient (n, V) of its logits before softcap, which is
        overwritten, unless it is the ``slot`` that was reserved for it."""
        if self.bias is not None:
            vocab = gradient.size(1)
            self.bias[:vocab].add_(gradient.sum(0, dtype=self.real), alpha=self.head.scale)
        if slot is None:
            self._multiply(begin, gradient, None)
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
        if gradient is not slot:
            slot.copy_(gradient)
        self._end += len(gradient)

    def results(self, index: Tensor | None, rows: int) -> list[Tensor]:
        """Once nothing waits any more. ``index``: which of all the ``rows`` the plan has, None for all of them."""
        self._logits = None
        if self.shard is not None and self.hidden is not None:
            all_reduce_(self.hidden, self.shard.group)
        if self._is_first:  # there was no row
            self.weight = self._new_weight()
            if self.weight is not None:
                self.weight.zero_()
        held, hidden = held_dtype(self.dtype), self.hidden
        if hidden is not None:
            hidden = hidden.to(held)
            if index is not None:
                zeros = hidden.new_zeros((rows, hidden.size(1)))
                hidden = zeros.index_copy_(0, index, hidden)
        return [x.to(held) for x in (hidden, self.weight, self.bias) if x is not None]

    def multiply_waiting(self) -> None:
        if self._logits is None or self._end == self._begin:
            return
        exponent = torch.cat(self._exponents) if self._exponents else None
        self._multiply(self._begin, self._logits[: self._end - self._begin], exponent)
        self._begin, self._exponents = self._end, []

    def _multiply(self, begin: int, gradient: Tensor, exponent: Tensor | None) -> None:
        """The gradient (n, V) of the logits of rows from ``begin`` on, in the parameters' dtype, times 2^-exponent
        (n, 1)."""
        end = begin + len(gradient)
        if self.hidden is not None:
            self._write_hidden(self.hidden[begin:end], gradient, exponent)
        if self.weight is None:
            self.weight = self._new_weight()
        if self.weight is not None:
            out = self.weight[: gradient.size(1)]
            self._add_to_weight(out, gradient.t(), self._rows[begin:end], exponent)
            self._is_first = False

    def _write_hidden(self, out: Tensor, gradient: Tensor, exponent: Tensor | None) -> None:
        head, keeps = self.head, keeps_float32(gradient.device.type)
        # A product of few tiles is split over the vocabulary, and its parts may be rounded to 16 bits before they are
        # summed (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction): then it is a float32 one.
        splits = keeps and gradient.dtype.itemsize == 2 and out.numel() < _FEW_ENTRIES
        if exponent is None and not splits and (out.dtype == gradient.dtype or keeps):
            return _mm_into(out, gradient, head.weight, head.scale)
        product = _mm(gradient, head.weight, head.scale)
        if exponent is not None:
            product = product.to(self.real).mul_(_exp2(exponent))
        out.copy_(product)

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
