"""The loss as an ``nn.Module``."""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import Tensor, nn

from tnt_kernels.functional import RowStats, tnt_loss
from tnt_kernels.objectives import resolve_method

_KEYWORDS = tuple(
    name
    for name, parameter in inspect.signature(tnt_loss).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)


class TNTLoss(nn.Module):
    """:func:`tnt_loss` as a module: its keywords at construction, its tensors at call.

    ``negative_ids``, ``alpha`` and ``normalizer``, which may differ from batch to batch, can be given at call too and
    then replace those of construction.

    Args:
        keywords: any keyword argument of :func:`tnt_loss`.

    Raises:
        TypeError: a keyword that :func:`tnt_loss` does not have.
        ValueError: an unknown method.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        for name in keywords:
            if name not in _KEYWORDS:
                raise TypeError(
                    f"TNTLoss: unknown keyword {name!r}, expected one of {', '.join(_KEYWORDS)}"
                )
        resolve_method(keywords.get("method", "tnff"))
        self.keywords = keywords

    def forward(
        self,
        logits: Tensor,
        ref_logits: Tensor | None,
        labels: Tensor,
        weights: Tensor | None = None,
        **tensors: Any,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """As :func:`tnt_loss`; ``tensors`` may be ``negative_ids``, ``alpha`` and ``normalizer``."""
        for name in tensors:
            if name not in ("negative_ids", "alpha", "normalizer"):
                raise TypeError(
                    f"TNTLoss: {name!r} at call, expected negative_ids, alpha or normalizer; give it at construction"
                )
        keywords = {**self.keywords, **tensors}
        return cast(Tensor, tnt_loss(logits, ref_logits, labels, weights, **keywords))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())
