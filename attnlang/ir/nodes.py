"""Expression nodes: immutable, typed and interned.

Building a node that already exists returns the existing object. Structural equality is therefore identity, equal
sub-expressions are shared without a separate pass, and analyses can memoise by node. Nodes may be nested deeper than
Python's recursion limit: walk them with :func:`postorder`, never by recursion.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from .types import BOOL, FLOAT, INT, Type

__all__ = [
    "AXES",
    "Const",
    "Expr",
    "Index",
    "Input",
    "Load",
    "Op",
    "Param",
    "Scalar",
    "Size",
    "index_axes",
    "input_names",
    "postorder",
    "rewrite",
    "substitute",
]

Scalar: TypeAlias = bool | int | float

AXES = ("b", "h", "q", "k")
"""Names of the index axes: batch element, query head, query position, key position. Terms and row maps also have ``d``,
the feature."""

_interned: weakref.WeakValueDictionary[tuple[Any, ...], Expr] = weakref.WeakValueDictionary()
_lock = threading.Lock()


class _Interned(type):
    """Metaclass that returns the existing node when an equal one is alive."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        node = super().__call__(*args, **kwargs)
        with _lock:
            return _interned.setdefault((cls, *node._key()), node)


class Expr(metaclass=_Interned):
    """Base class of all expression nodes. ``type`` is the value type of the node."""

    __slots__ = ("__weakref__",)
    type: Type

    @property
    def args(self) -> tuple[Expr, ...]:
        """The direct sub-expressions, in order."""
        return ()

    def with_args(self, args: tuple[Expr, ...]) -> Expr:
        """Return this node with other sub-expressions (same number, same types)."""
        return self

    def _key(self) -> tuple[Any, ...]:
        raise NotImplementedError

    def __copy__(self) -> Expr:
        return self

    def __deepcopy__(self, memo: object) -> Expr:
        return self

    def __repr__(self) -> str:
        from .printer import format_expr

        return format_expr(self)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Const(Expr):
    """A literal. ``value`` is a bool, int or float according to ``type``."""

    value: Scalar
    type: Type

    def __post_init__(self) -> None:
        exact = {BOOL: bool, INT: int, FLOAT: float}[self.type]
        if type(self.value) is not exact:
            object.__setattr__(self, "value", exact(self.value))

    def _key(self) -> tuple[Any, ...]:
        # hex() tells -0.0 from 0.0 and makes NaN equal to itself
        return (self.type, self.value.hex() if isinstance(self.value, float) else self.value)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Const, (self.value, self.type))


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Index(Expr):
    """The current position on one axis of :data:`AXES`; an int that is never negative."""

    axis: str

    @property
    def type(self) -> Type:  # type: ignore[override]
        return INT

    def _key(self) -> tuple[Any, ...]:
        return (self.axis,)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Index, (self.axis,))


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Size(Expr):
    """A length known at launch: ``B H Hkv Lq Lk`` or a symbolic size of a captured tensor."""

    name: str

    @property
    def type(self) -> Type:  # type: ignore[override]
        return INT

    def _key(self) -> tuple[Any, ...]:
        return (self.name,)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Size, (self.name,))


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Input(Expr):
    """A value the core hands to a hook, such as the score ``s``.

    ``axes`` are the axes it varies over.
    """

    name: str
    type: Type
    axes: str = "bhqk"

    def _key(self) -> tuple[Any, ...]:
        return (self.name, self.type, self.axes)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Input, (self.name, self.type, self.axes))


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Param(Expr):
    """A scalar parameter of the program."""

    name: str
    type: Type

    def _key(self) -> tuple[Any, ...]:
        return (self.name, self.type)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Param, (self.name, self.type))


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Load(Expr):
    """One element of captured tensor ``tensor``; each index is clamped into its dimension."""

    tensor: str
    indices: tuple[Expr, ...]
    type: Type

    @property
    def args(self) -> tuple[Expr, ...]:
        return self.indices

    def with_args(self, args: tuple[Expr, ...]) -> Expr:
        return Load(self.tensor, args, self.type)

    def _key(self) -> tuple[Any, ...]:
        return (self.tensor, self.indices, self.type)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Load, (self.tensor, self.indices, self.type))


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Op(Expr):
    """One operator of :data:`attnlang.ir.ops.OPS` applied to arguments of the types its row asks for."""

    op: str
    operands: tuple[Expr, ...]
    type: Type

    @property
    def args(self) -> tuple[Expr, ...]:
        return self.operands

    def with_args(self, args: tuple[Expr, ...]) -> Expr:
        return Op(self.op, args, self.type)

    def _key(self) -> tuple[Any, ...]:
        return (self.op, self.operands, self.type)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Op, (self.op, self.operands, self.type))


def postorder(*roots: Expr) -> Iterator[Expr]:
    """Yield every node reachable from ``roots`` once, arguments before users, in a deterministic order."""
    seen: set[Expr] = set()
    for root in roots:
        stack: list[Expr | None] = [root]  # None says that the arguments of the node below are done
        while stack:
            node = stack.pop()
            if node is None:
                yield stack.pop()  # type: ignore[misc]
            elif node not in seen:
                seen.add(node)
                args = node.args
                if not args:
                    yield node
                    continue
                stack.append(node)
                stack.append(None)
                for a in reversed(args):
                    if a not in seen:
                        stack.append(a)


def index_axes(*roots: Expr) -> set[str]:
    """Return the axes of all indices under ``roots``."""
    return {n.axis for n in postorder(*roots) if isinstance(n, Index)}


def input_names(*roots: Expr) -> set[str]:
    """Return the names of all inputs under ``roots``."""
    return {n.name for n in postorder(*roots) if isinstance(n, Input)}


def rewrite(roots: Iterable[Expr], rule: Callable[[Expr], Expr]) -> tuple[Expr, ...]:
    """Rebuild ``roots`` bottom up, replacing each node by ``rule(node with rewritten arguments)``."""
    roots = tuple(roots)
    done: dict[Expr, Expr] = {}
    for node in postorder(*roots):
        args = tuple(done[a] for a in node.args)
        done[node] = rule(node if args == node.args else node.with_args(args))
    return tuple(done[r] for r in roots)


def substitute(expr: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """Replace nodes of ``expr`` by the nodes ``mapping`` gives for them."""
    (out,) = rewrite((expr,), lambda node: mapping.get(node, node))
    return out
