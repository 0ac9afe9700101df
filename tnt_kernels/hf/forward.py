"""A model's forward, with what computes the loss inside of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tnt_kernels.hf.head import head_input, logits_of, plain_head

Forward = Callable[[], Any]  # runs a model's own forward on a batch, and returns its outputs
Found = TypeVar("Found")
_MOST_KNOWN = 4


class Forwards:
    """Runs the models of a trainer.

    Args:
        accelerator: of accelerate, which wraps them.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self._inner: dict[nn.Module, nn.Module] = {}

    def within(
        self, model: nn.Module, inputs: dict[str, Any], function: Callable[[Forward], Tensor]
    ) -> Tensor:
        """``model(**inputs)``, with ``function(forward)`` in place of the inner model's forward.

        What computes the loss has to run in there: DistributedDataParallel prepares its reduction for the parameters
        that the outputs depend on, FSDP has them gathered in there only, and accelerate casts what comes out.
        """
        module = self.unwrapped(model)
        before = module.__dict__.get("forward")
        forward = _bare_forward(module)

        def restore() -> None:
            module.__dict__.pop("forward", None)
            if before is not None:
                module.__dict__["forward"] = before

        def redirected(*arguments: Any, **keywords: Any) -> Tensor:
            restore()
            with self.accelerator.autocast():
                return function(partial(forward, *arguments, **keywords))

        module.__dict__["forward"] = redirected
        try:
            return cast(Tensor, model(**inputs))
        finally:
            restore()

    def said(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The last hidden states of a batch (B, T, H), or the logits of a model whose head is not plain.

        Every process of FSDP has to ask at the same time.
        """
        module = self.unwrapped(model)
        module = getattr(module, "_orig_mod", module)  # as it is: it is not compiled for this
        head = plain_head(module)

        def hidden(forward: Forward) -> Tensor:
            if head is None:
                return logits_of(forward())
            with head_input(head) as kept:
                outputs = forward()
            return kept[0] if kept else logits_of(outputs)

        return self.look(module, inputs, hidden)

    def look(
        self, model: nn.Module, inputs: dict[str, Any], function: Callable[[Forward], Found]
    ) -> Found:
        """What ``function(forward)`` returns within the model's forward, without gradients."""
        found: list[Found] = []

        def run(forward: Forward) -> Tensor:
            found.append(function(forward))
            return torch.zeros((), device=self.accelerator.device)

        with torch.no_grad():
            self.within(model, inputs, run)
        return found[0]

    def everywhere(self, here: bool) -> bool:
        """Whether it is so in every process; all have to ask."""
        flag = torch.tensor([int(here)], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).min())

    def unwrapped(self, model: nn.Module) -> nn.Module:
        """The model in what makes it distributed. A compiled one stays compiled, whatever that holds."""
        if hasattr(model, "_orig_mod"):
            return model
        if model not in self._inner:  # accelerate looks through all modules
            if len(self._inner) >= _MOST_KNOWN:  # those of earlier trials are to be freed
                self._inner.clear()
            self._inner[model] = self.accelerator.unwrap_model(model)
        return self._inner[model]


def _bare_forward(module: nn.Module) -> Callable[..., Any]:
    """``module.forward``, without accelerate's wrapper, which would cast the logits to float32.

    Other forwards that stand in its place, as that of a base whose adapters are disabled, are what is to be called.
    """
    forward: Any = module.forward
    original = getattr(module, "_original_forward", None)
    if original is not None:
        inner, function = forward, getattr(original, "__func__", original)
        while getattr(inner, "__func__", inner) is not function and hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        if getattr(inner, "__func__", inner) is function:
            forward = original
    return cast(Callable[..., Any], forward)
