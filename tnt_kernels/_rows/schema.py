"""Operators for PyTorch's compiler, made from plain functions.

PyTorch's operators take tensors, numbers and strings, one by one. The functions here take records of these (the named
tuples of ``_call``), and are called with them everywhere: a schema with the fields one by one is made from their
signature, and used where a compiler traces.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("tnt_kernels", "FRAGMENT")


class _Parameter(NamedTuple):
    """Of a function, or a field of a record among them."""

    name: str
    hint: Any  # its type
    record: Any  # the named tuple's class; None: a tensor, a number or a string
    may_be_none: bool  # of a record; PyTorch then sees fields that are None
    fields: tuple[_Parameter, ...]  # of a record


def _parameter(name: str, hint: Any, in_optional: bool = False) -> _Parameter:
    record, may_be_none = hint, False
    if isinstance(hint, types.UnionType):
        record, may_be_none = hint.__args__[0], types.NoneType in hint.__args__
    if not hasattr(record, "_fields"):
        if in_optional:
            hint = hint | None
        return _Parameter(name, hint, None, False, ())
    hints = typing.get_type_hints(record)
    fields = tuple(_parameter(field, hints[field], may_be_none) for field in record._fields)
    return _Parameter(name, hint, record, may_be_none, fields)


def _parameters(function: Callable[..., Any]) -> list[_Parameter]:
    hints = typing.get_type_hints(function)
    return [_parameter(name, hints[name]) for name in inspect.signature(function).parameters]


def _plain(parameters: Iterable[_Parameter]) -> list[_Parameter]:
    """The tensors, numbers and strings."""
    found: list[_Parameter] = []
    for parameter in parameters:
        found.extend([parameter] if parameter.record is None else _plain(parameter.fields))
    return found


def _one_by_one(parameters: Iterable[_Parameter], arguments: Iterable[Any]) -> list[Any]:
    """The operator's arguments, of the function's."""
    flat: list[Any] = []
    for parameter, argument in zip(parameters, arguments, strict=True):
        if parameter.record is None:
            flat.append(argument)
        elif argument is None:
            flat.extend([None] * len(_plain(parameter.fields)))
        else:
            flat.extend(_one_by_one(parameter.fields, argument))
    return flat


def _records(parameters: Iterable[_Parameter], flat: Iterator[Any]) -> list[Any]:
    """The function's arguments, of the operator's."""
    found: list[Any] = []
    for parameter in parameters:
        if parameter.record is None:
            found.append(next(flat))
            continue
        values = _records(parameter.fields, flat)
        is_none = parameter.may_be_none and values[0] is None
        found.append(None if is_none else parameter.record(*values))
    return found


def _schema(
    function: Callable[..., Any], parameters: list[_Parameter], overwrites: Sequence[str]
) -> str:
    """In PyTorch's words."""

    def prototype() -> None: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    prototype.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(x.name, kind, annotation=_known(x.hint)) for x in _plain(parameters)],
        return_annotation=_known(typing.get_type_hints(function)["return"]),
    )
    return torch.library.infer_schema(prototype, mutates_args=overwrites)


def _known(hint: Any) -> Any:
    """``X | None`` as PyTorch 2.6 knows it."""
    if isinstance(hint, types.UnionType):
        return typing.Union[hint.__args__]  # noqa: UP007
    return None if hint is types.NoneType else hint


class Operator(Generic[P, R]):
    """A function that PyTorch knows as ``torch.ops.tnt_kernels.<name>``.

    A call goes through PyTorch. ``operator.on(tensor)`` is the function itself where nobody would see the difference:
    the way through the dispatcher and back into Python takes 20 µs of a forward and backward call.

    Args:
        function: computes. Its arguments are given by position.
        traced: its outputs for a compiler that traces it: of the right shape and dtype, with any values.
        overwrites: the names of the tensors that the function writes to.
    """

    def __init__(
        self, function: Callable[P, R], traced: Callable[..., R], overwrites: Sequence[str] = ()
    ) -> None:
        name = function.__name__
        self._function, self._parameters = function, _parameters(function)
        _library.define(
            name + _schema(function, self._parameters, overwrites),
            tags=(torch.Tag.needs_fixed_stride_order,),
        )
        _library.impl(name, self._taking_records(function), "CompositeExplicitAutograd")
        fake = self._taking_records(traced)
        torch.library.register_fake(f"tnt_kernels::{name}", fake, lib=_library)
        #: What PyTorch calls, with the fields of records one by one.
        self.overload = getattr(torch.ops.tnt_kernels, name).default

    def _taking_records(self, function: Callable[..., R]) -> Callable[..., R]:
        return lambda *flat: function(*_records(self._parameters, iter(flat)))

    def on(self, tensor: Tensor) -> Callable[P, R]:
        """The function; the operator where a compiler traces, a mode watches, or the tensor is no plain one."""
        if (
            type(tensor) is Tensor
            and not is_dynamo_compiling()
            and _len_torch_dispatch_stack() == 0
        ):
            return self._function
        return self

    def __call__(self, *arguments: P.args, **_: P.kwargs) -> R:
        result: R = self.overload(*self.one_by_one(*arguments))
        return result

    def one_by_one(self, *arguments: Any) -> list[Any]:
        """The arguments of ``overload``."""
        return _one_by_one(self._parameters, arguments)


def operator(
    traced: Callable[..., R], *, overwrites: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Makes an :class:`Operator` of a function."""
    return lambda function: Operator(function, traced, overwrites)


def nothing(*_: Any) -> None:
    """What a compiler traces where tensors are written to."""
