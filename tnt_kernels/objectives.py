"""The losses as data: which loss a row gets, and the paper's methods as pairs of them."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class RowLoss(IntEnum):
    """The loss of one row. The values are those of ``enum RowLoss`` in ``csrc/row_rules.h``."""

    NONE = 0
    FORWARD_KL = 1
    REVERSE_KL = 2
    LOG_LIKELIHOOD = 3
    UNLIKELIHOOD = 4
    NEGATIVE_LIKELIHOOD = 5

    @property
    def reads_reference(self) -> bool:
        return self in (RowLoss.FORWARD_KL, RowLoss.REVERSE_KL)

    @property
    def scaled_by_weight(self) -> bool:
        """Whether a pushed label's row counts as much as its weight, not only as α says."""
        return self in (RowLoss.UNLIKELIHOOD, RowLoss.NEGATIVE_LIKELIHOOD)


_POSITIVE = {loss.name.lower(): loss for loss in list(RowLoss)[:4]}
_NEGATIVE = {loss.name.lower(): loss for loss in RowLoss if loss is not RowLoss.LOG_LIKELIHOOD}


class _Sides(NamedTuple):
    positive: str
    negative: str


class Objective(_Sides):
    """A loss for positive rows and one for negative rows.

    Args:
        positive: ``"forward_kl"``, ``"reverse_kl"``, ``"log_likelihood"`` or ``"none"``: the loss of rows
            with an empty negative set.
        negative: ``"forward_kl"``, ``"reverse_kl"``, ``"unlikelihood"``, ``"negative_likelihood"`` or
            ``"none"``: the loss of rows with tokens to remove.

    Rows of a side that is ``"none"`` count as rows, with loss and gradient 0.

    Raises:
        ValueError: a name that is not one of these.
    """

    __slots__ = ()

    def __new__(cls, positive: str = "forward_kl", negative: str = "reverse_kl") -> Objective:
        for side, name, known in (
            ("positive", positive, _POSITIVE),
            ("negative", negative, _NEGATIVE),
        ):
            if name not in known:
                raise ValueError(
                    f"Objective: {side} is {name!r}, expected one of {', '.join(map(repr, known))}"
                )
        return super().__new__(cls, positive, negative)

    @property
    def positive_loss(self) -> RowLoss:
        return _POSITIVE[self.positive]

    @property
    def negative_loss(self) -> RowLoss:
        return _NEGATIVE[self.negative]

    @property
    def reads_reference(self) -> bool:
        """Whether some row's loss may need ``ref_logits``."""
        return self.positive_loss.reads_reference or self.negative_loss.reads_reference


#: The methods of the paper (arXiv 2406.13660, sections 4 and 5), named negative side first.
METHODS: dict[str, Objective] = {
    "tnff": Objective("forward_kl", "forward_kl"),
    "tnrr": Objective("reverse_kl", "reverse_kl"),
    "tnrf": Objective("forward_kl", "reverse_kl"),
    "tnfr": Objective("reverse_kl", "forward_kl"),
    "tnfll": Objective("log_likelihood", "forward_kl"),
    "tnrll": Objective("log_likelihood", "reverse_kl"),
    "nl+ll": Objective("log_likelihood", "negative_likelihood"),
    "ul+ll": Objective("log_likelihood", "unlikelihood"),
}


def resolve_method(method: str | Objective) -> Objective:
    if isinstance(method, Objective):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    raise ValueError(
        f"method is {method!r}, expected a tnt.Objective or one of {', '.join(map(repr, METHODS))}"
    )
