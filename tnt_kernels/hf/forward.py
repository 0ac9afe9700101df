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
    """Runs the models of a trainer, which accelerate wraps."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self._inner: dict[nn.Module, nn.Module] = {}

    def within(
        self, model: nn.Module, inputs: dict[str, Any], function: Callable[[Forward], tuple[Tensor, Found]]
    ) -> tuple[Tensor, Found]:  # fmt: skip
        """Runs ``model(**inputs)`` with ``function(forward)`` in place of the inner model's forward.

        What computes the loss has to run in there: DistributedDataParallel prepares its reduction for the parameters
        that the outputs depend on, FSDP has them gathered in there only, and accelerate casts what comes out.

        Returns:
            The tensor that ``function`` returns, as it comes out of ``model``, and what else it returns.
        """
        module = self.unwrapped(model)
        before = module.__dict__.get("forward")
        forward = _bare_forward(module)
        found: list[Found] = []

        def restore() -> None:
            module.__dict__.pop("forward", None)
            if before is not None:
                module.__dict__["forward"] = before

        def redirected(*arguments: Any, **keywords: Any) -> Tensor:
            restore()
            with self.accelerator.autocast():
                x, more = function(partial(forward, *arguments, **keywords))
            found.append(more)
            return x

        module.__dict__["forward"] = redirected
        try:
            return cast(Tensor, model(**inputs)), found[0]
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
        nothing = torch.zeros((), device=self.accelerator.device)
        with torch.no_grad():
            return self.within(model, inputs, lambda forward: (nothing, function(forward)))[1]

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

    Whatever else stands in its place is to be called, as the forward of a base whose adapters are off.
    """
    forward: Any = module.forward
    bare = getattr(module, "_original_forward", None)
    if bare is not None:
        inner, function = forward, getattr(bare, "__func__", bare)
        while getattr(inner, "__func__", inner) is not function and hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        if getattr(inner, "__func__", inner) is function:
            forward = bare
    return cast(Callable[..., Any], forward)
