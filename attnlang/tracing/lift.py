"""What a Python function has captured: names for its tensors, and its numbers lifted to runtime scalars.

A mod is rebuilt with its closure cells, defaults, partial arguments and attributes replaced, numbers by traced scalar
parameters. The rebuilt function runs the same code object, so file and line numbers stay the user's.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Lifter", "Reached", "reach"]

Visit = Callable[[Any, str], Any]

_CONTAINERS = (list, tuple, dict)
_PEEKS = frozenset(("type", "id", "callable", "hasattr", "getattr"))
"""Functions that could tell a lifted number from a Python number without failing: nothing they can reach is lifted."""

_LIMIT = 4096  # objects visited


def _is_library(fn: types.FunctionType) -> bool:
    module = fn.__module__ or ""
    if module.startswith(("attnlang.hooks.", "attnlang.tracing.")):
        return True
    return module.split(".")[0] in ("torch", "numpy", "math") and not module.startswith("torch.nn.attention")


def _peeks(code: types.CodeType) -> bool:
    return not _PEEKS.isdisjoint(code.co_names) or any(
        _peeks(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)
    )


def is_number(value: Any) -> bool:
    """Python ints that fit in 32 bits and floats; bools stay part of the structure."""
    return type(value) is float or (type(value) is int and -(2**31) < value < 2**31)


def _is_record(value: Any) -> bool:
    kind = type(value)
    return (
        isinstance(value, types.SimpleNamespace)
        or (dataclasses.is_dataclass(value) and not isinstance(value, type))
        or (callable(value) and not isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)))
    ) and (hasattr(value, "__dict__") and not kind.__module__.startswith(("torch._", "numpy")))


class Lifter:
    """Rebuilds a mod with its captured numbers replaced.

    ``replace(name, value)`` gives the replacement of a number; ``name`` is the variable, attribute or parameter it was
    found under. Every object is rebuilt once, so shared cells stay shared.
    """

    def __init__(self, replace: Visit) -> None:
        self._replace = replace
        self._done: dict[int, Any] = {}
        self._keep: list[Any] = []

    def mod(self, value: Any) -> Any:
        """Return the rebuilt callable."""
        return self._visit(value, "x")

    def _remember(self, old: Any, new: Any) -> Any:
        self._keep.append(old)
        self._done[id(old)] = new
        return new

    def _visit(self, value: Any, name: str) -> Any:
        if is_number(value):
            return self._replace(value, name)
        if id(value) in self._done:
            return self._done[id(value)]
        if len(self._done) > _LIMIT:
            return value
        if isinstance(value, types.FunctionType):
            return value if _is_library(value) else self._function(value)
        if isinstance(value, types.MethodType):
            if not isinstance(value.__func__, types.FunctionType):
                return value
            owner = value.__self__
            new = owner if isinstance(owner, type) else self._record(owner)
            return self._remember(value, types.MethodType(self._visit(value.__func__, name), new))
        if isinstance(value, functools.partial):
            return self._remember(value, self._partial(value))
        if type(value) in (tuple, list) and any(callable(v) or isinstance(v, _CONTAINERS) for v in value):
            # numbers inside containers stay: a container is usually indexed or measured while tracing
            items = [v if is_number(v) else self._visit(v, name) for v in value]
            return self._remember(value, type(value)(items))
        if isinstance(value, torch.Tensor):
            return value
        if _is_record(value):
            return self._record(value)
        return value

    def _function(self, fn: types.FunctionType) -> types.FunctionType:
        if not fn.__closure__ and not fn.__defaults__ and not fn.__kwdefaults__:
            return self._remember(fn, fn)
        code = fn.__code__
        cells = tuple(types.CellType() for _ in fn.__closure__ or ())
        new = types.FunctionType(code, fn.__globals__, fn.__name__, None, cells or None)
        new.__dict__.update(fn.__dict__)
        self._remember(fn, new)
        for variable, old, cell in zip(code.co_freevars, fn.__closure__ or (), cells, strict=True):
            try:
                content = old.cell_contents
            except ValueError:  # not assigned yet
                continue
            cell.cell_contents = self._cell(old, content, variable)
        arguments = code.co_varnames[: code.co_argcount]
        if fn.__defaults__:
            names = arguments[-len(fn.__defaults__) :]
            new.__defaults__ = tuple(self._visit(v, n) for n, v in zip(names, fn.__defaults__, strict=True))
        if fn.__kwdefaults__:
            new.__kwdefaults__ = {n: self._visit(v, n) for n, v in fn.__kwdefaults__.items()}
        return new

    def _cell(self, old: types.CellType, content: Any, variable: str) -> Any:
        key = id(old)
        if key in self._done:
            return self._done[key]
        return self._remember(old, self._visit(content, variable))

    def _partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        fn = value.func
        code = getattr(fn, "__code__", None)
        names = code.co_varnames[: code.co_argcount] if code is not None else ()
        args = [self._visit(a, names[n] if n < len(names) else f"arg{n}") for n, a in enumerate(value.args)]
        named = {k: self._visit(a, k) for k, a in value.keywords.items()}
        return functools.partial(self._visit(fn, "fn"), *args, **named)

    def _record(self, value: Any) -> Any:
        """Return a shallow copy of an object with the numbers among its attributes replaced."""
        if id(value) in self._done:
            return self._done[id(value)]
        attributes = getattr(value, "__dict__", None)
        if not attributes or isinstance(value, type) or (type(value).__dict__.get("__slots__") is not None):
            return value
        try:
            is_namespace = type(value) is types.SimpleNamespace
            new = types.SimpleNamespace() if is_namespace else object.__new__(type(value))
        except TypeError:
            return value
        self._remember(value, new)
        for key, item in attributes.items():
            hidden = key.startswith("__") or (isinstance(value, torch.nn.Module) and key.startswith("_"))
            keep = hidden or not (is_number(item) or isinstance(item, (types.FunctionType, functools.partial)))
            new.__dict__[key] = item if keep else self._visit(item, key)
        return new


@dataclasses.dataclass(frozen=True)
class Reached:
    """What mods can reach: names of tensors by id, and whether there are numbers and they may be lifted."""

    names: dict[int, str]
    may_lift: bool


def reach(*mods: Any) -> Reached:
    """Return the variable, parameter or attribute name of every tensor the mods reach; the first found wins."""
    names: dict[int, str] = {}
    seen: set[int] = set()
    may_lift, has_numbers = True, False
    work: list[tuple[Any, str]] = [(m, "x") for m in reversed(mods)]
    while work and len(seen) < _LIMIT:
        value, name = work.pop()
        if isinstance(value, torch.Tensor):
            names.setdefault(id(value), name)
            continue
        has_numbers = has_numbers or is_number(value)
        if id(value) in seen or isinstance(value, (int, float, str, type, types.ModuleType)) or value is None:
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType) and not _is_library(value):
            may_lift = may_lift and not _peeks(value.__code__)
        work.extend(reversed(list(_children(value, name))))
    return Reached(names, may_lift and has_numbers)


def _children(value: Any, name: str) -> list[tuple[Any, str]]:
    if isinstance(value, types.FunctionType):
        return [] if _is_library(value) else _captures(value)
    if isinstance(value, types.MethodType):
        return [(value.__func__, name), (value.__self__, name)]
    if isinstance(value, functools.partial):
        code = getattr(value.func, "__code__", None)
        known = code.co_varnames[: code.co_argcount] if code is not None else ()
        args = [(a, known[n] if n < len(known) else f"arg{n}") for n, a in enumerate(value.args)]
        return [(value.func, "fn"), *args, *((a, k) for k, a in value.keywords.items())]
    if isinstance(value, (list, tuple)):
        return [(v, f"{name}_{n}") for n, v in enumerate(value)] if len(value) <= 256 else []
    if isinstance(value, dict):
        return [(v, f"{name}_{k}") for k, v in value.items() if isinstance(k, str)] if len(value) <= 256 else []
    if isinstance(value, torch.nn.Module):
        own: list[tuple[Any, str]] = [(type(value).forward, name)]
        own += [(t, k.replace(".", "_")) for k, t in (*value.named_parameters(), *value.named_buffers())]
        return own + [(v, k) for k, v in vars(value).items() if not k.startswith("_")]
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and not type(value).__module__.startswith(("torch", "numpy")):
        call = [(type(value).__call__, name)] if callable(value) else []
        return call + [(v, k) for k, v in attributes.items() if not k.startswith("__")]
    return []


def _captures(fn: types.FunctionType) -> list[tuple[Any, str]]:
    out: list[tuple[Any, str]] = []
    code = fn.__code__
    for variable, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
        try:
            out.append((cell.cell_contents, variable))
        except ValueError:
            continue
    if fn.__defaults__:
        out += zip(fn.__defaults__, code.co_varnames[: code.co_argcount][-len(fn.__defaults__) :], strict=True)
    out += [(v, k) for k, v in (fn.__kwdefaults__ or {}).items()]
    known = ((n, fn.__globals__.get(n)) for n in code.co_names)
    return out + [(v, n) for n, v in known if isinstance(v, (torch.Tensor, types.FunctionType))]
