"""What tells one black box from another: its code, as far as Python shows it.

Counted are bytecode and constants of a function and of the functions of its module that it calls,
defaults, and the numbers, texts and arrays that it captures or reads from its module. Comments and
places do not count. What other modules and files hold is out of sight.
"""

import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from scoreprior.train.identity import digest


def name_of(function: Callable[..., Any]) -> str:
    """A name for a person to read."""
    if isinstance(function, functools.partial):
        return f"partial of {name_of(function.func)}"
    return getattr(function, "__qualname__", type(function).__qualname__)


def code_of(function: Callable[..., Any]) -> str:
    """Checksum of what is counted."""
    checksum = hashlib.sha256()
    for part in _parts(function, ()):
        checksum.update(part.encode() + b";")
    return checksum.hexdigest()[:16]


def _parts(value: Any, outer: tuple[Any, ...]) -> Iterator[str]:
    if any(value is other for other in outer):  # what captures itself
        return
    outer = (*outer, value)
    match value:
        case bool() | int() | float() | complex() | str() | bytes() | None:
            yield repr(value)
        case np.ndarray() | np.generic() | jax.Array():
            yield digest(value)
        case frozenset() | set():
            yield repr(sorted(map(repr, value)))
        case types.CodeType():
            yield value.co_code.hex()
            yield from _parts((value.co_names, value.co_consts), outer)
        case types.ModuleType() | type() | types.BuiltinFunctionType():
            yield value.__name__
        case _:
            yield type(value).__qualname__
            for entry in _inside(value):
                yield from _parts(entry, outer)


def _inside(value: Any) -> Iterator[Any]:
    match value:
        case tuple() | list():
            yield from value
        case dict():
            for name, entry in value.items():
                yield str(name)
                yield entry
        case functools.partial():
            yield from (value.func, value.args, value.keywords)
        case types.MethodType():
            yield from (value.__func__, value.__self__)
        case types.FunctionType():
            yield from (value.__code__, value.__defaults__, value.__kwdefaults__)
            yield from (cell.cell_contents for cell in value.__closure__ or ())
            yield from (g for n in _names(value.__code__) if _counts(g := _global(value, n), value))
        case _:
            yield getattr(inspect.getattr_static(value, "__call__", None), "__code__", None)
            yield getattr(value, "__dict__", None)


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that a function, and those inside of it, may look up in its module."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _global(function: types.FunctionType, name: str) -> Any:
    return function.__globals__.get(name)


def _counts(value: Any, function: types.FunctionType) -> bool:
    if isinstance(value, types.FunctionType):
        return value.__module__ == function.__module__
    return isinstance(value, bool | int | float | str | tuple | np.ndarray | jax.Array)


__all__ = ["code_of", "name_of"]
