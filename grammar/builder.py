"""Builds syntax trees while the parser reduces; one method per rule of ``attnlang.lark``.

Every token is kept, so the span of a node runs from its first child to its last.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias, TypeVar

from lark import Token, Transformer

from . import syntax as ast
from .errors import Source, Span
from .layout import token_span

__all__ = ["Builder"]

Child: TypeAlias = "Token | ast.Node | tuple[ast.Node, ...] | list[ast.ParamDecl] | str"
N = TypeVar("N", bound=ast.Node)

_STATEMENTS = (ast.Let, ast.Hook, ast.Grid, ast.Named, ast.Block, ast.Returns)
INT_LIMIT = 2**63 - 1
MAX_DIGITS = 100


def _span(child: object) -> Span:
    return token_span(child) if isinstance(child, Token) else child.span  # type: ignore[attr-defined]


def _cover(children: Sequence[object]) -> Span:
    first = children[0]
    last = next(c for c in reversed(children) if not (isinstance(c, Token) and c.type in ("NEWLINE", "DEDENT")))
    return _span(first).to(_span(last))


def _nodes(children: Sequence[object], kind: type[N]) -> tuple[N, ...]:
    return tuple(c for c in children if isinstance(c, kind))


def _names(children: Sequence[object]) -> tuple[ast.Name, ...]:
    return tuple(_name(c) for c in children if isinstance(c, Token) and c.type == "NAME")


def _name(token: object) -> ast.Name:
    assert isinstance(token, Token)
    return ast.Name(token_span(token), str(token))


def _string(children: Sequence[object]) -> tuple[str, Span]:
    token = next(c for c in children if isinstance(c, Token) and c.type == "STRING")
    quote = 3 if token.startswith(('"""', "'''")) else 1
    return str(token)[quote:-quote], token_span(token)


class _Wrapped(ast.Node):
    """A part that exists only between two reductions; ``parts`` says what it holds."""

    __slots__ = ("kind", "parts")
    kind: str
    parts: tuple[object, ...]


def _wrap(kind: str, children: Sequence[object], *parts: object) -> _Wrapped:
    node = _Wrapped(_cover(children))
    object.__setattr__(node, "kind", kind)
    object.__setattr__(node, "parts", parts)
    return node


def _part(children: Sequence[object], kind: str) -> _Wrapped | None:
    return next((c for c in children if isinstance(c, _Wrapped) and c.kind == kind), None)


def _doc(children: Sequence[object]) -> str:
    doc = _part(children, "doc")
    return "" if doc is None else str(doc.parts[0])


def _params(children: Sequence[object]) -> tuple[ast.ParamDecl, ...]:
    params = _part(children, "params")
    return () if params is None else _nodes(params.parts, ast.ParamDecl)


def _after(children: Sequence[object], token: str) -> ast.Node | None:
    """The expression that follows the first ``token``, if there is one."""
    for here, following in pairwise(children):
        if isinstance(here, Token) and here.type == token:
            return following if isinstance(following, ast.Node) else None
    return None


def _value(children: Sequence[object], token: str = "ASSIGN") -> ast.Node:
    value = _after(children, token)
    assert value is not None
    return value


class Builder(Transformer):
    """Reduction callbacks; ``source`` is what errors quote."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    # file

    def start(self, children: list) -> ast.SourceFile:
        imports = tuple(c for c in children if isinstance(c, ast.ImportModule | ast.ImportNames))
        definitions = tuple(c for c in children if isinstance(c, ast.Helper | ast.Pattern))
        doc = _doc(children[:1])
        return ast.SourceFile(doc, imports, definitions)

    def module_doc(self, children: list) -> ast.Node:
        return _wrap("doc", children, inspect.cleandoc(_string(children)[0]))

    doc = module_doc
    tail_doc = module_doc

    def import_module(self, children: list) -> ast.Node:
        path, span = _string(children)
        return ast.ImportModule(_cover(children), path, span, _names(children)[0])

    def imported(self, children: list) -> ast.Node:
        names = _names(children)
        return _wrap("imported", children, names[0], names[-1])

    def import_names(self, children: list) -> ast.Node:
        path, span = _string(children)
        names = tuple(c.parts for c in _nodes(children, _Wrapped))
        return ast.ImportNames(_cover(children), path, span, names)  # type: ignore[arg-type]

    # definitions

    def helper(self, children: list) -> ast.Node:
        result = _part(children, "result")
        returned = _part(children, "return")
        value = returned.parts[0] if returned else _value(children)
        return ast.Helper(
            _cover(children[:2]),
            _names(children)[0],
            _params(children),
            _doc(children),
            result.parts[0] if result else None,  # type: ignore[arg-type]
            _nodes(children, ast.Let),
            value,  # type: ignore[arg-type]
        )

    def pattern(self, children: list) -> ast.Node:
        statements = tuple(c for c in children if isinstance(c, _STATEMENTS))
        name, doc = _names(children)[0], _doc(children)
        value = _after(children, "ASSIGN")
        return ast.Pattern(_cover(children[:2]), name, _params(children), doc, statements, value)

    def result(self, children: list) -> ast.Node:
        return _wrap("result", children, _name(children[1]))

    def params(self, children: list) -> ast.Node:
        return _wrap("params", children, *children)

    def param(self, children: list) -> ast.Node:
        static = children[0].type == "STATIC"
        name, type_ = _names(children)
        dims, default = _part(children, "dims"), _part(children, "default")
        return ast.ParamDecl(
            _cover(children),
            name,
            type_,
            _nodes(dims.parts, ast.Node) if dims else None,
            default.parts[0] if default else None,  # type: ignore[arg-type]
            static,
        )

    def dims(self, children: list) -> ast.Node:
        return _wrap("dims", children, *children)

    def default(self, children: list) -> ast.Node:
        return _wrap("default", children, children[1])

    # statements

    def let(self, children: list) -> ast.Node:
        return ast.Let(_cover(children), _name(children[1]), _value(children))

    def returned(self, children: list) -> ast.Node:
        return _wrap("return", children, children[1])

    def hook(self, children: list) -> ast.Node:
        return ast.Hook(_cover(children), _name(children[0]), _value(children))

    def named(self, children: list) -> ast.Node:
        kind, name = _names(children)
        dims = _part(children, "dims")
        shape = _nodes(dims.parts, ast.Node) if dims else None
        return ast.Named(_cover(children), kind, name, shape, _value(children))

    def block(self, children: list) -> ast.Node:
        kind, *names = _names(children)
        statements = tuple(c for c in children if isinstance(c, _STATEMENTS))
        return ast.Block(_cover(children[: 1 + len(names)]), kind, names[0] if names else None, statements)

    def returns(self, children: list) -> ast.Node:
        return ast.Returns(_cover(children), _nodes(children, ast.Node))

    def grid(self, children: list) -> ast.Node:
        return ast.Grid(_cover(children), _names(children), _nodes(children, ast.Coordinate))

    def coordinate(self, children: list) -> ast.Node:
        return ast.Coordinate(_cover(children), _name(children[0]), _value(children, "COLON"))

    # expressions

    def conditional(self, children: list) -> ast.Node:
        return ast.Conditional(_cover(children), children[0], children[2], children[4])

    def binary(self, children: list) -> ast.Node:
        return ast.Binary(_cover(children), str(children[1]), children[0], children[2])

    def unary(self, children: list) -> ast.Node:
        return ast.Unary(_cover(children), str(children[0]), children[1])

    def compare(self, children: list) -> ast.Node:
        return ast.Compare(_cover(children), tuple(map(str, children[1::2])), tuple(children[::2]))

    def attribute(self, children: list) -> ast.Node:
        return ast.Attribute(_cover(children), children[0], _name(children[2]))

    def call(self, children: list) -> ast.Node:
        return ast.Call(_cover(children), children[0], _nodes(children[1:], ast.Argument))

    def subscript(self, children: list) -> ast.Node:
        return ast.Subscript(_cover(children), children[0], _nodes(children[1:], ast.Node))

    def argument(self, children: list) -> ast.Node:
        name = _name(children[0]) if len(children) == 3 else None
        return ast.Argument(_cover(children), name, children[-1])

    def name(self, children: list) -> ast.Node:
        return _name(children[0])

    def group(self, children: list) -> ast.Node:
        return children[1]

    def sequence(self, children: list) -> ast.Node:
        return ast.Tuple(_cover(children), _nodes(children, ast.Node))

    def literal(self, children: list) -> ast.Node:
        (token,) = children
        span = token_span(token)
        if token.type in ("TRUE", "FALSE"):
            return ast.Literal(span, token.type == "TRUE")
        digits = str(token).replace("_", "")
        if token.type == "FLOAT":
            value = float(digits)
            if math.isinf(value):
                raise self.source.error(span, "ATL107", "this number is too large for a float", "write `inf`")
            return ast.Literal(span, value)
        prefix = digits[:2].lower()
        base = {"0x": 16, "0b": 2}.get(prefix, 10)
        body = digits[2:] if base != 10 else digits
        if not body:
            raise self.source.error(span, "ATL101", f"`{token}` has no digits")
        if len(body) > MAX_DIGITS or int(body, base) > INT_LIMIT:
            raise self.source.error(span, "ATL107", f"this integer is larger than {INT_LIMIT}")
        return ast.Literal(span, int(body, base))
