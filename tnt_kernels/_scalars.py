"""The numbers of a call: declared, checked, and remembered."""

from __future__ import annotations

import functools
import math
from numbers import Real
from typing import NamedTuple

from torch import Tensor

from tnt_kernels.objectives import Objective, RowLoss, resolve_method

#: In the order of ``enum Reduction`` in csrc/call.h.
REDUCTIONS = ("none", "sum", "mean")


class Scalars(NamedTuple):
    """The numbers of a call."""

    positive_loss: int  # objectives.RowLoss
    negative_loss: int
    alpha_value: float = 1.0
    eps: float = 1e-6
    uniform_smoothing: bool = False
    nl_floor: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    reduction: str = "mean"  # one of REDUCTIONS
    normalizer_value: float | None = None  # and no tensor either: the number of active rows

    @property
    def sides(self) -> tuple[RowLoss, RowLoss]:
        """The loss of positive rows, that of negative ones."""
        return RowLoss(self.positive_loss), RowLoss(self.negative_loss)

    @property
    def smooths_uniformly(self) -> bool:
        """Without eps the two smoothings are one."""
        return self.uniform_smoothing and self.eps > 0

    @property
    def gradient_needs_totals(self) -> bool:
        """Whether, for some row of a sharded call, the gradient needs what all shards' second passes yield."""
        sides = self.sides
        return (self.smooths_uniformly and RowLoss.REVERSE_KL in sides) or (
            self.nl_floor is not None and RowLoss.NEGATIVE_LIKELIHOOD in sides
        )

    @property
    def loss_needs_totals(self) -> bool:
        """Whether some row's loss of a sharded call is not known from the statistics alone (docs/sharded.md)."""
        return any(
            (side.reads_reference and self.smooths_uniformly) or side is RowLoss.NEGATIVE_LIKELIHOOD
            for side in self.sides
        )


def check_scalars(
    method: str | Objective,
    alpha: float | Tensor,
    eps: float,
    smoothing: str,
    nl_floor: float | None,
    temperature: float,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
    traced: bool,
) -> tuple[Objective, bool, Scalars]:
    """The objective, whether it reads the reference, the numbers: checked once, and anew wherever it is ``traced``."""
    # Tensors are not for the cache, which would keep them, and are checked elsewhere.
    if isinstance(alpha, Tensor):
        alpha = 1.0
    divides = normalizer is not None
    if isinstance(normalizer, Tensor):
        normalizer = None
    arguments = (
        method, alpha, eps, smoothing, nl_floor, temperature, ignore_index, reduction, divides, normalizer
    )  # fmt: skip
    if not traced:
        try:
            return _known_scalars(*arguments)
        except TypeError:  # perhaps as something cannot be hashed, which has an error of its own
            pass
    return _checked_scalars(*arguments)


def _checked_scalars(
    method: str | Objective,
    alpha: float,
    eps: float,
    smoothing: str,
    nl_floor: float | None,
    temperature: float,
    ignore_index: int,
    reduction: str,
    divides: bool,
    normalizer: float | None,
) -> tuple[Objective, bool, Scalars]:
    objective = resolve_method(method)
    alpha = as_number("alpha", alpha)
    if smoothing not in ("negatives", "uniform"):
        raise ValueError(f"smoothing is {smoothing!r}, expected 'negatives' or 'uniform'")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    if divides and reduction != "mean":
        raise ValueError(
            f"normalizer: given with reduction={reduction!r}, expected reduction='mean'"
        )
    if normalizer is not None:
        normalizer = as_number("normalizer", normalizer, least=0.0)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: {type(ignore_index).__name__}, expected an int")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index}, expected one that int64 can hold")
    scalars = Scalars(
        int(objective.positive_loss),
        int(objective.negative_loss),
        alpha,
        as_number("eps", eps, least=0.0),
        smoothing == "uniform",
        None if nl_floor is None else as_number("nl_floor", nl_floor),
        as_number("temperature", temperature, above=0.0),
        ignore_index,
        reduction,
        normalizer,
    )
    return objective, objective.reads_reference, scalars


#: ``typed``, because True is 1 to a dictionary, and an error here.
_known_scalars = functools.lru_cache(maxsize=256, typed=True)(_checked_scalars)


def as_number(name: str, x: float, least: float = -math.inf, above: float = -math.inf) -> float:
    if type(x) is not float:
        if isinstance(x, bool) or not isinstance(x, Real):
            raise TypeError(f"{name}: {type(x).__name__}, expected a number")
        x = float(x)
    if not (-math.inf < x < math.inf and x >= least and x > above):  # the compiler can trace these
        bound = (
            f" above {above:g}"
            if above > -math.inf
            else f" of at least {least:g}"
            if least > -math.inf
            else ""
        )
        raise ValueError(f"{name} is {x}, expected a finite number{bound}")
    return x
