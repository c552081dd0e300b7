"""Tracing one stated thing: what a function asks for by the names of its parameters, rows, addresses and sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import torch

from attnlang.ir import (
    BUILTIN_SIZES,
    FLOAT,
    HEAD_SIZES,
    INT,
    KEY_ADDRESS,
    OPERAND_SHAPES,
    QUERY_ADDRESS,
    Address,
    Expr,
    Input,
    Load,
    Operand,
    Size,
    Type,
    UsageError,
    build,
)
from attnlang.runtime.bind import suggest
from attnlang.tracing import Ask, Hook, NamedTensor, unwrap

from .specs import Length, Mod, Value

__all__ = ["ALIASES", "AXES", "OPERANDS", "SIZES", "Reader", "in_words", "is_function", "sizes_asked"]

Known: TypeAlias = "Mapping[str, Expr] | Mapping[str, Expr | NamedTensor]"

AXES: dict[str, Expr] = {"b": build.b, "h": build.h, "q": build.q, "k": build.k}
SIZES: dict[str, Expr] = {n: Size(n) for n in (*BUILTIN_SIZES, *HEAD_SIZES)}
ALIASES = {"q_idx": "q", "kv_idx": "k", "batch": "b", "head": "h", "score": "s"}
OPERANDS = {"Q": "q", "K": "k", "V": "v"}
"""How a program writes the operands of the call."""


def is_function(value: Any) -> bool:
    """Whether ``value`` is to be traced, and is not a number or a tensor that stands for itself."""
    return callable(value) and not isinstance(value, torch.Tensor)


class Made(Protocol):
    """What earlier stages make."""

    def find(self, name: str) -> NamedTensor | None:
        """Return the tensor called ``name``."""

    def names(self) -> list[str]:
        """Return all names that can be found."""

    def missing(self, name: str) -> str:
        """Say why ``name`` cannot be found, if it is a name that some stage has."""


class Reader:
    """Traces what one stage states: ``where`` is the stage in messages (empty for the main one)."""

    def __init__(self, ask: Ask, where: str, made: Made) -> None:
        self.ask = ask
        self.where = where
        self.made = made
        self.elements = {n: NamedTensor(own, FLOAT, OPERAND_SHAPES[own], n) for n, own in OPERANDS.items()}

    def named(self, kind: str) -> str:
        """How messages call a ``kind`` of thing in this stage."""
        return f"{kind} of {self.where}" if self.where else kind

    # values

    def value(
        self,
        kind: str,
        mod: Value,
        known: Known,
        want: Type | str,
        over_d: dict[tuple[str, Expr], Input] | None = None,
    ) -> Expr:
        """The expression of ``mod``, which may read ``known``, sizes, and what earlier stages make.

        Raises:
            UsageError: it is no function, tensor or number, or reads something else.
        """
        if not is_function(mod) and not isinstance(mod, (bool, int, float, torch.Tensor)):
            raise UsageError(f"{kind} is a {type(mod).__name__}; give a function, a tensor or a number")
        args = self._arguments(kind, mod, known) if is_function(mod) else [known[a] for a in "bhqkd" if a in known]
        return self.ask(Hook(kind, mod, tuple(args), want, over_d))

    def pairwise(self, kind: str, mod: Mod, first: Known, want: Type) -> Expr | None:
        """A function that reads ``first`` by position, as FlexAttention's do; what follows it reads by name.

        A function of fewer parameters, or with a name among the first that stands for something else, reads all by
        name. None for the function that changes nothing.

        Raises:
            UsageError: the parameters are those of FlexAttention in another order.
        """
        mod = unwrap(mod)
        if mod is None or not is_function(mod):
            return None if mod is None else self.value(kind, mod, {a: AXES[a] for a in AXES}, want)
        try:
            parameters = list(inspect.signature(mod).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if parameters and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            names = [ALIASES.get(p.name, p.name) for p in places[: len(first)]]
            if sorted(names) == sorted(first) and names != list(first):
                order = f"({', '.join(p.name for p in places[: len(first)])})"
                raise UsageError(f"{kind} has the parameters {order}; the order is ({', '.join(first)})")
            if len(places) < len(first) or self._other(names, first):
                return self.value(kind, mod, first, want)
        more = [self._found(kind, name, {}) for name in _required(places[len(first) :])]
        return self.ask(Hook(kind, mod, (*first.values(), *more), want))

    def _other(self, names: list[str], first: Known) -> bool:
        """Whether one of ``names`` stands for something else than what ``first`` has in its place."""
        known = {*first, *SIZES, *self.made.names()}
        given = zip(names, first, strict=True)
        return any(name in known and name != place and name.lower() != place for name, place in given)

    def _arguments(self, kind: str, mod: Mod, known: Known) -> list[Expr | NamedTensor]:
        """What the parameters of ``mod`` ask for by their names."""
        return [self._found(kind, name, known) for name in _asked(kind, mod)]

    def _found(self, kind: str, name: str, known: Known) -> Expr | NamedTensor:
        own = ALIASES.get(name, name)
        for table in (known, SIZES):
            if own in table:
                return table[own]
        if (tensor := self.made.find(name)) is not None:
            return tensor
        if why := self.made.missing(name):
            raise UsageError(f"{kind} reads {name!r}; {why}")
        if name in OPERANDS:
            why = "elements of Q, K and V are read in rows(...) and select(...) alone; rows of them by dot('Q', 'K')"
            raise UsageError(f"{kind} reads {name!r}; {why}")
        names = [*known, *self.made.names(), *SIZES]
        close = suggest(name, names)
        raise UsageError(
            f"{kind} reads {name!r}{close if close.startswith(';') else ''}; it can read {', '.join(names)}"
        )

    # rows and sizes

    def source(self, kind: str, name: str) -> NamedTensor:
        """The tensor [batch, heads, rows, features] that ``name`` stands for.

        Raises:
            UsageError: there is none of the name, or it has no rows.
        """
        found = self.elements[name] if name in self.elements else self.made.find(name)
        if found is None:
            there = ", ".join(map(repr, (*self.elements, *self.made.names())))
            why = self.made.missing(name) or f"there is {there}, and a function that returns a row of a tensor"
            raise UsageError(f"{kind} is {name!r}; {why}")
        if found.type is not FLOAT or found.left != 4:
            what = f"holds {found.type} values" if found.type is not FLOAT else f"has {found.left} dimensions"
            hint = "rows are those of a float tensor [batch, heads, rows, features]; a function can return another row"
            raise UsageError(f"{kind} is {name!r}, which {what}; {hint}")
        return found

    def rows(self, kind: str, value: Value, axis: str, own: Mapping[str, Operand]) -> Operand:
        """Rows of an operand of the call, of what a stage makes, or of a tensor; one for each step along ``axis``."""
        address = QUERY_ADDRESS if axis == "q" else KEY_ADDRESS
        if isinstance(value, str):
            return own.get(value) or Operand(self.source(kind, value).name, address)
        known = {a: AXES[a] for a in ("b", "h", axis)} if isinstance(value, torch.Tensor) else AXES
        load = self.value(kind, value, {**known, **self.elements}, "rows")
        if not isinstance(load, Load):
            raise UsageError(f"{kind} is a {type(value).__name__}; give a function that returns a row of a tensor")
        index = load.indices[:-1]
        if isinstance(value, torch.Tensor) and len(index) == 3:
            index = address
        return Operand(load.tensor, Address(*index) if len(index) == 3 else index)

    def operand(self, kind: str, name: str, value: Value) -> Operand:
        """What stands in the place of operand ``name``: rows, or three functions for its batch element, head, row."""
        axis = "q" if name == "Q" else "k"
        if not isinstance(value, (tuple, list)):
            return self.rows(kind, value, axis, {})
        if len(value) != 3:
            raise UsageError(f"{kind} are three functions: batch element, head and row, got {value!r}")
        known = {a: AXES[a] for a in ("b", "h", axis)}
        parts = [self.value(f"{kind}[{i}]", part, known, INT) for i, part in enumerate(value)]
        return Operand(OPERANDS[name], Address(*parts))

    def size(self, kind: str, value: Length) -> Expr:
        """A number, the words of the language, or a function of sizes."""
        if isinstance(value, str):
            return in_words(kind, value)
        if isinstance(value, bool) or not (isinstance(value, int) or is_function(value)):
            hint = "give an int, a size such as 'cdiv(Lk, 64)', or a function such as lambda Lk: Lk // 2"
            raise UsageError(f"{kind} is {value!r}; {hint}")
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{kind} is at least 1, got {value}")
        if isinstance(value, int):
            return build.const(value)
        sizes_asked(kind, value)  # refuses all else: a size is known before anything is computed
        return self.value(kind, value, {}, INT)


def sizes_asked(kind: str, mod: Mod) -> list[str]:
    """Names of the sizes that ``mod`` reads, which must be all that it reads."""
    names = list(_asked(kind, mod))
    if wrong := [n for n in names if n not in SIZES]:
        raise UsageError(f"{kind} reads {wrong[0]!r}; a size reads sizes: {', '.join(SIZES)}")
    return names


def _asked(kind: str, mod: Mod) -> Iterator[str]:
    """Names by which ``mod`` asks for what it reads."""
    try:
        return _required(list(inspect.signature(mod).parameters.values()))
    except (TypeError, ValueError):
        raise UsageError(f"{kind}: the parameters of {mod!r} cannot be read; wrap it in a lambda") from None


def _required(parameters: list[inspect.Parameter]) -> Iterator[str]:
    """Names of the parameters that have to be given, up to the first that has a captured value as its default."""
    for parameter in parameters:
        if parameter.default is not inspect.Parameter.empty:
            return
        if parameter.kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            return
        yield parameter.name


@lru_cache(256)
def in_words(kind: str, text: str) -> Expr:
    """The size that ``text`` is in the words of the language."""
    from attnlang.grammar import AttnError, parse

    try:
        program = parse(f"pattern size: output x = sum(w, over=k, key=k, extent=({text}))").default
    except AttnError as error:
        hint = f"; {error.hint}" if error.hint else ""
        raise UsageError(f"{kind} is {text!r}: {error.message}{hint}") from None
    return program.attend.outputs[-1].extents[0]
