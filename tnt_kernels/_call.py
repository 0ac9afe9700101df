"""A call of a loss, as everything below the public functions sees it: its tensors, and a launch of rows.

A field is declared here, or in ``_scalars``, and nowhere else in Python. The operators' schemas are made from these
records (``_rows.schema``); the compiled kernels' own declaration, csrc/call.h, is held to them by a test.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from tnt_kernels._scalars import Scalars

#: Of logits, in the order of TNT_DTYPES in csrc/call.h; float64 on a CPU alone.
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXPECTED_DTYPES = "float32, bfloat16, float16, or float64 on a CPU"

#: Numbers that a kernel keeps of a row between its loss and a gradient that is written later.
ROW_COEFFICIENTS = 16
#: Numbers that one shard of the vocabulary tells the others about a row.
ROW_STATISTICS = 15
#: Numbers of a row that are summed over the shards: the loss terms of the second pass, NL's active tokens.
ROW_PARTIAL_SUMS = 2
#: Numbers of a row that a caller may ask for, in the order of ``RowStats``.
ROW_DIAGNOSTICS = 5


class Kind(IntEnum):
    """What a launch does. The values are those of ``enum Kind`` in csrc/call.h.

    A whole vocabulary takes FUSED, and BACKWARD where the gradient has to wait for its upstream factor. Of a sharded
    one, every rank launches STATISTICS, PARTIAL_SUMS and FINISH, with an all-gather behind each of the first two.
    """

    FUSED = 0  #: the loss, and the gradient or the coefficients that a later one needs
    BACKWARD = 1  #: that gradient, from the coefficients
    STATISTICS = 2  #: what a first pass over this shard finds, for all shards to merge
    #: what a second pass over it adds up, and the gradient where it can be written already
    PARTIAL_SUMS = 3
    FINISH = 4  #: the loss, without a look at the vocabulary; a gradient that had to wait


class RowTensors(NamedTuple):
    """The tensors beside the logits. "Real" is float32, or float64 for float64 logits; all but ``alpha`` are dense."""

    ref_logits: Tensor | None  # (N, V), rows at any distance
    labels: Tensor  # (N,) int64
    weights: Tensor | None  # (N,) real; None: 1
    alpha: Tensor | None  # (N,) or (1,) real; None: Scalars.alpha_value
    negative_ids: Tensor | None  # (N, K) or (K,) int64
    normalizer: Tensor | None  # () real; None: Scalars.normalizer_value


class Shard(NamedTuple):
    """Of a vocabulary: the process group that it is sharded over."""

    group: str  # its name
    sizes: list[int] | None  # columns of every rank, in rank order; None: the ranks exchange them


class LossCall(NamedTuple):
    """What a loss is asked for, beside the logits: what every operator on rows takes."""

    tensors: RowTensors
    scalars: Scalars
    backend: str  # a name in backends.BACKENDS
    inplace: bool  # whether the gradient goes over the logits
    diagnostics: bool  # whether they are wanted
    shard: Shard | None  # None: the vocabulary is whole


class RowCall(NamedTuple):
    """One launch of a backend: what it reads and what it writes. N rows, V vocabulary.

    Where the vocabulary is sharded over S devices, V counts this shard's columns; labels and ids are those of the whole
    vocabulary. Outputs that are None are not wanted. Per kind:

    - FUSED: ``loss`` and ``diagnostics``; ``gradient`` or ``coefficients``.
    - BACKWARD: ``coefficients`` in; ``gradient``.
    - STATISTICS: ``statistics``. ``diagnostics``, given already where they are wanted in the end, asks for their sums.
    - PARTIAL_SUMS: ``gathered`` in; ``partial_sums``, and ``gradient`` if it does not wait for total sums
      (``Scalars.gradient_needs_totals``).
    - FINISH: ``gathered`` and ``total_sums`` in; ``loss`` and ``diagnostics``, and the ``gradient`` that had to wait.

    A ``gradient`` is multiplied by ``upstream`` where that is given; no ``coefficients`` are.

    With ``differences``, ``logits`` hold the policy's minus the reference's, which every row then reads: next to p = q,
    where 16 bits hold no difference of two logits, they hold this one. The gradient is that of the policy's logits.
    """

    kind: Kind
    logits: Tensor  # (N, V), dense rows at any distance
    tensors: RowTensors
    scalars: Scalars
    vocab_offset: int  # the vocabulary id of column 0
    vocab_size: int  # of the whole vocabulary; V where it is not sharded
    # (N) stands for rows of any shape here.
    loss: Tensor | None = None  # () real, (N) where the reduction is "none"
    diagnostics: Tensor | None = None  # (ROW_DIAGNOSTICS, N) real
    coefficients: Tensor | None = None  # (N, ROW_COEFFICIENTS) real
    #: (N, V) in the logits' dtype, or bfloat16 where that is float32; may be the logits
    gradient: Tensor | None = None
    upstream: Tensor | None = None  # (1,) or (N,) real: the gradient of the loss
    statistics: Tensor | None = None  # (N, ROW_STATISTICS) real
    #: (S, N, ROW_STATISTICS) real; shard after shard, at any distance
    gathered: Tensor | None = None
    partial_sums: Tensor | None = None  # (N, ROW_PARTIAL_SUMS) real
    total_sums: Tensor | None = None  # (N, ROW_PARTIAL_SUMS) real: partial sums of all shards
    differences: bool = False  # what ``logits`` hold

    @property
    def is_first(self) -> bool:
        """Whether no launch of these rows came before."""
        return self.kind in (Kind.FUSED, Kind.STATISTICS)


def real_dtype(logits: Tensor) -> torch.dtype:
    """What the arithmetic, the loss, the weights and the diagnostics are in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """(..., V) as (N, V) with dense rows: a view wherever one exists, else a copy."""
    if x.dim() != 2:
        x = x.flatten(0, -2) if x.dim() > 2 else x[None]
    return x if x.is_contiguous() or x.stride(1) == 1 or x.size(1) <= 1 else x.contiguous()


def active_rows(labels: Tensor, weights: Tensor | None, ignore_index: int) -> Tensor:
    """(N,) bool: rows with a label and a weight other than 0. The others are not read."""
    active = labels != ignore_index
    return active if weights is None else active & (weights != 0)


def negative_rows(labels: Tensor, weights: Tensor | None, negative_ids: Tensor | None) -> Tensor:
    """(N,) bool: rows with something to remove, active or not. ``negative_ids`` are (N, K) or (K,)."""
    negative = torch.zeros_like(labels, dtype=torch.bool) if weights is None else weights < 0
    return negative if negative_ids is None else negative | (negative_ids >= 0).any(-1)
