"""The losses as ``nn.Module``s."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from tnt_kernels.functional import RowStats, tnt_loss
from tnt_kernels.linear import linear_tnt_loss
from tnt_kernels.objectives import resolve_method


def _keywords(function: Callable[..., object]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.items()
    return tuple(name for name, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


class _Loss(nn.Module):
    _known: ClassVar[tuple[str, ...]]
    _at_call: ClassVar[tuple[str, ...]] = ("negative_ids", "alpha", "normalizer")

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        for name in keywords:
            if name not in self._known:
                raise TypeError(
                    f"{type(self).__name__}: unknown keyword {name!r}, expected one of {', '.join(self._known)}"
                )
        resolve_method(keywords.get("method", "tnff"))
        self.keywords = keywords

    def _with(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a call."""
        for name in tensors:
            if name not in self._at_call:
                *most, last = self._at_call
                raise TypeError(
                    f"{type(self).__name__}: {name!r} at call, expected {', '.join(most)} or {last}; "
                    "give it at construction"
                )
        return {**self.keywords, **tensors}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())


class TNTLoss(_Loss):
    """:func:`tnt_loss` as a module: its keywords at construction, its tensors at call.

    ``negative_ids``, ``alpha`` and ``normalizer``, which may differ from batch to batch, can be given at call too and
    then replace those of construction.

    Args:
        keywords: any keyword argument of :func:`tnt_loss`.

    Raises:
        TypeError: a keyword that :func:`tnt_loss` does not have.
        ValueError: an unknown method.
    """

    _known = _keywords(tnt_loss)

    def forward(
        self,
        logits: Tensor,
        ref_logits: Tensor | None,
        labels: Tensor,
        weights: Tensor | None = None,
        **tensors: Any,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """As :func:`tnt_loss`; ``tensors`` may be ``negative_ids``, ``alpha`` and ``normalizer``."""
        keywords = self._with(tensors)
        return cast(Tensor, tnt_loss(logits, ref_logits, labels, weights, **keywords))


class LinearTNTLoss(_Loss):
    """:func:`linear_tnt_loss` as a module: its keywords at construction, its tensors at call.

    ``bias``, ``ref_bias``, ``negative_ids``, ``alpha`` and ``normalizer`` can be given at call too and then replace
    those of construction. The module holds no parameters: ``weight`` and ``bias`` stay those of the model's head.

    Args:
        keywords: any keyword argument of :func:`linear_tnt_loss`.

    Raises:
        TypeError: a keyword that :func:`linear_tnt_loss` does not have.
        ValueError: an unknown method.
    """

    _known = _keywords(linear_tnt_loss)
    _at_call = ("bias", "ref_bias", *_Loss._at_call)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        labels: Tensor,
        weights: Tensor | None = None,
        **tensors: Any,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """As :func:`linear_tnt_loss`; ``tensors`` may be those that the class names."""
        keywords = self._with(tensors)
        arguments = (hidden, weight, ref_hidden, ref_weight, labels, weights)
        return cast(Tensor, linear_tnt_loss(*arguments, **keywords))
