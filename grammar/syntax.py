"""The syntax tree of the ``.attn`` language.

Plain records with source spans. Equality is identity: trees may be nested deeper than Python's recursion limit, so
nothing here compares, hashes or prints by recursion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from attnlang.ir import Scalar

from .errors import Span

__all__ = [
    "Argument",
    "Attribute",
    "Binary",
    "Block",
    "Call",
    "Compare",
    "Conditional",
    "Coordinate",
    "Definition",
    "Grid",
    "Helper",
    "Hook",
    "ImportModule",
    "ImportNames",
    "Let",
    "Literal",
    "Name",
    "Named",
    "Node",
    "ParamDecl",
    "Pattern",
    "Returns",
    "SourceFile",
    "Statement",
    "Subscript",
    "Tuple",
    "Unary",
    "values",
    "walk",
]


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Node:
    """Base class of everything that has a place in the source."""

    span: Span


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Literal(Node):
    value: Scalar


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Name(Node):
    id: str


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Attribute(Node):
    base: Node
    name: Name


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Argument(Node):
    """An argument of a call; ``name`` is None for a positional one."""

    name: Name | None
    value: Node


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Call(Node):
    callee: Node
    args: tuple[Argument, ...]


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Subscript(Node):
    base: Node
    indices: tuple[Node, ...]


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Unary(Node):
    op: str
    operand: Node


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Binary(Node):
    op: str
    left: Node
    right: Node


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Compare(Node):
    """A chain ``operands[0] ops[0] operands[1] ops[1] ...``."""

    ops: tuple[str, ...]
    operands: tuple[Node, ...]


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Conditional(Node):
    then: Node
    condition: Node
    other: Node


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Tuple(Node):
    items: tuple[Node, ...]


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class ParamDecl(Node):
    """``static name: type[dims] = default``; ``dims`` is None for a scalar."""

    name: Name
    type: Name
    dims: tuple[Node, ...] | None
    default: Node | None
    static: bool


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Let(Node):
    name: Name
    value: Node


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Hook(Node):
    """``mask = ...``, ``score = ...``, or an assignment the language does not have."""

    name: Name
    value: Node


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Named(Node):
    """``kind name[dims] = value``: an output, a term, a statistic, rows, ...; ``dims`` is None where there are none."""

    kind: Name
    name: Name
    dims: tuple[Node, ...] | None
    value: Node


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Block(Node):
    """``kind name:`` and the statements below it; ``span`` covers the head only."""

    kind: Name
    name: Name | None
    statements: tuple[Statement, ...]


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Returns(Node):
    """``return a, b``: which results a pattern gives back."""

    items: tuple[Node, ...]


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Coordinate(Node):
    name: Name
    extent: Node


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Grid(Node):
    axes: tuple[Name, ...]
    coordinates: tuple[Coordinate, ...]


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Definition(Node):
    """A helper or a pattern."""

    name: Name
    params: tuple[ParamDecl, ...]
    doc: str


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Helper(Definition):
    result: Name | None
    lets: tuple[Let, ...]
    value: Node


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Pattern(Definition):
    """``composition`` is None for a pattern with a body of statements."""

    statements: tuple[Statement, ...]
    composition: Node | None


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class ImportModule(Node):
    path: str
    path_span: Span
    name: Name


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class ImportNames(Node):
    """``names``: pairs of the name in the other file and the name here."""

    path: str
    path_span: Span
    names: tuple[tuple[Name, Name], ...]


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class SourceFile:
    doc: str
    imports: tuple[ImportModule | ImportNames, ...]
    definitions: tuple[Helper | Pattern, ...]


Statement: TypeAlias = "Let | Hook | Grid | Named | Block | Returns"


def values(*statements: Statement) -> Iterator[Node]:
    """Yield every expression that stands in ``statements`` and in the blocks below them."""
    stack = list(statements)
    while stack:
        match stack.pop():
            case Let(value=value) | Hook(value=value):
                yield value
            case Named(value=value, dims=dims):
                yield value
                yield from dims or ()
            case Grid(coordinates=coordinates):
                yield from (c.extent for c in coordinates)
            case Returns(items=items):
                yield from items
            case Block(statements=inner):
                stack += inner


def _children(node: Node) -> tuple[Node, ...]:
    match node:
        case Attribute(base=base):
            return (base,)
        case Call(callee=callee, args=args):
            return (callee, *(a.value for a in args))
        case Subscript(base=base, indices=indices):
            return (base, *indices)
        case Unary(operand=operand):
            return (operand,)
        case Binary(left=left, right=right):
            return (left, right)
        case Compare(operands=operands):
            return operands
        case Tuple(items=items):
            return items
        case Conditional(then=then, condition=condition, other=other):
            return (then, condition, other)
    return ()


def walk(*roots: Node) -> Iterator[Node]:
    """Yield every expression node below ``roots``, in no particular order."""
    stack = list(roots)
    while stack:
        node = stack.pop()
        yield node
        stack.extend(_children(node))
