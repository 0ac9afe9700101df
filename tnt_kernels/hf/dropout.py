"""Dropout of probability 0 in a model that trains, and the check that nothing random is left in it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tnt_kernels.hf.head import distance

#: Names of probabilities and widths of noise: dropout, layerdrop, attn_pdrop, drop_path, router_jitter_noise, ...
_RANDOM = re.compile("drop|jitter")
#: No rounding makes two forwards differ by more, relative to the norm, in any dtype.
_MOST_NOISE = 0.02
_MOST_NAMES = 3


class _Quiet:
    """A config as modules read it: the live one, but for the numbers that would make their forward random."""

    def __init__(self, config: PreTrainedConfig) -> None:
        object.__setattr__(self, "_config", config)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        if isinstance(value, PreTrainedConfig):
            return _Quiet(value)
        return 0.0 if _is_random(name, value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def __reduce__(self) -> tuple[type[_Quiet], tuple[PreTrainedConfig]]:
        return _Quiet, (self._config,)


def disable_dropout(model: nn.Module) -> None:
    """Makes every dropout of ``model`` one of probability 0, in place, and jitter likewise.

    The forward in train mode becomes that in eval mode, whereas gradient checkpointing goes on. Layers and the numbers
    that modules keep are set to 0. Modules that read such numbers from their config in their forward get a view of it
    that says 0, whereas the config of the model, which is saved with it, keeps its values. :func:`check_deterministic`
    finds what this cannot reach: constants, and a ``PreTrainedModel`` whose own forward reads them from its config.
    """
    views: dict[int, _Quiet] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # A model, and a wrapper of one, is where others look for the config: to save it, for one.
        holder = any(isinstance(x, PreTrainedModel) for x in module.modules())
        numbers = list(vars(module).items())
        if not any(module.children()) and any("jitter" in name for name, _ in numbers):
            # PhiMoE's router reads its jitter in eval mode as well, as the width of a tie between experts.
            if _as_in_eval not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_as_in_eval)
            continue
        for name, value in numbers:
            if _is_random(name, value):
                setattr(module, name, 0.0)
            elif isinstance(value, PreTrainedConfig) and not holder and _has_random(value):
                setattr(module, name, views.setdefault(id(value), _Quiet(value)))


def check_deterministic(
    model: nn.Module, forward: Callable[[], Tensor], everywhere: Callable[[bool], bool] = bool
) -> None:
    """Whether two forwards of one batch are equal, as :func:`disable_dropout` means them to be.

    Rounding that varies between runs, as that of kernels that add up in any order, is told from chance by two more
    forwards that start from one seed. The state of the random generators is the same afterwards. What is random in few
    forwards alone, as a layer that is seldom dropped, is seldom seen.

    Args:
        model: in train mode.
        forward: runs ``model`` on one batch, always the same, and returns its output, a tensor of any shape.
        everywhere: whether something that is so here is so in every process; all of them run as many forwards then.

    Raises:
        ValueError: they differ; with the names of the modules whose outputs differ although their inputs are equal.
    """
    state = random.getstate()
    devices = {x.device.index for x in model.parameters() if x.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
            first = forward()
            if everywhere(torch.equal(first, forward())):
                return
            first, again, other = (_seeded(forward, seed) for seed in (0, 0, 1))
            change, noise = distance(other, first), distance(again, first)
            if everywhere(change <= min(4 * noise, _MOST_NOISE)):
                return
            named = _random_modules(model, forward)
    finally:
        random.setstate(state)
    modules = ", ".join(named[:_MOST_NAMES]) or f"none but the whole, {type(model).__name__}"
    more = f" and {len(named) - _MOST_NAMES} more" if len(named) > _MOST_NAMES else ""
    raise ValueError(
        f"disable_dropout: two forwards of one batch differ by {change:.1e} of their norm, expected equal ones; the "
        f"modules that differ although their inputs are equal: {modules}{more}; set what is random in them to 0 in "
        "the model, or disable_dropout=False"
    )


def _as_in_eval(module: nn.Module, _: Any) -> None:
    module.training = False


def _is_random(name: str, value: Any) -> bool:
    return isinstance(value, float) and value != 0 and _RANDOM.search(name) is not None


def _has_random(config: PreTrainedConfig) -> bool:
    return any(
        _has_random(value) if isinstance(value, PreTrainedConfig) else _is_random(name, value)
        for name, value in vars(config).items()
    )


def _seeded(forward: Callable[[], Tensor], seed: int) -> Tensor:
    torch.manual_seed(seed)
    random.seed(seed)
    return forward()


def _random_modules(model: nn.Module, forward: Callable[[], Tensor]) -> list[str]:
    """The innermost modules with different outputs for equal inputs, as "name (class)", in the order of the model."""
    runs: list[dict[str, list[tuple[Any, Any]]]] = []
    for seed in (0, 1):
        calls: dict[str, list[tuple[Any, Any]]] = {}
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                for handle in _hooks(module, calls.setdefault(name, [])):
                    hooks.callback(handle.remove)
            _seeded(forward, seed)
        runs.append(calls)
    found = {
        name
        for name, calls in runs[0].items()
        if any(a == c and b != d for (a, b), (c, d) in zip(calls, runs[1][name], strict=False))
    }
    return [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if name in found
        and not any(x != name and x.startswith(f"{name}." if name else "") for x in found)
    ]


def _hooks(module: nn.Module, calls: list[tuple[Any, Any]]) -> Iterator[Any]:
    """Note what goes into and out of ``module``: sums, as all activations at once need not fit the memory."""
    before: list[Any] = []  # a stack: a module may call itself

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        before.append(_sums((args, kwargs)))  # now, as a module may change its inputs in place

    def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((before.pop(), _sums(output)))

    yield module.register_forward_pre_hook(enter, with_kwargs=True)
    yield module.register_forward_hook(leave, with_kwargs=True)


def _sums(x: Any) -> list[float]:
    if isinstance(x, Tensor):
        x = x.detach().double().nan_to_num()
        return [float(x.sum()), float(x.square().sum())]
    values = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
    return [number for value in values for number in _sums(value)]
