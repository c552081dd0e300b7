"""Parameter lists: declared ones, and those a composition inherits from the patterns it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from attnlang.ir import (
    AXES,
    BOOL,
    BUILTIN_SIZES,
    HEAD_SIZES,
    INT,
    Const,
    Environment,
    Expr,
    Scalar,
    ScalarParam,
    Size,
    TensorParam,
    Type,
    build,
    evaluate,
)

from . import syntax as ast
from .apply import Substitution, widen
from .errors import AttnError, suggest
from .lower import lower
from .scope import RESERVED_VALUES, TYPES, Poisoned, Scope, Template, Value

__all__ = ["Parameters", "check_count", "check_name", "declare", "type_named"]

MAX_PARAMETERS = 256


def type_named(name: ast.Name, scope: Scope) -> Type:
    """Return the type called ``name``."""
    if name.id not in TYPES:
        spoken = {"boolean": "bool", "integer": "int", "double": "float", "number": "float", "real": "float"}
        close = spoken.get(name.id.lower())
        hint = f"write `{close}`" if close else suggest(name.id, TYPES)
        raise scope.error(name, "ATL200", f"unknown type `{name.id[:80]}`", hint or "the types are bool, int and float")
    return TYPES[name.id]


def check_name(name: ast.Name, scope: Scope, what: str, taken: Mapping[str, object]) -> None:
    """Refuse names of the language and names that are taken already; a helper may call its arguments q, k or s."""
    if name.id in RESERVED_VALUES and (scope.axes or name.id not in (*AXES, "s")):
        raise scope.error(name, "ATL202", f"`{name.id}` is a name of the language; {what} needs another one")
    if name.id in taken or (name.id in scope.sizes and name.id not in RESERVED_VALUES):
        raise scope.error(name, "ATL201", f"`{name.id}` is defined twice", f"rename this {what.split()[-1]}")


class Parameters:
    """Scalars and captured tensors of one definition, in order."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.table: dict[str, ScalarParam | TensorParam] = {}
        self.origin: dict[str, str] = {}

    @property
    def scalars(self) -> tuple[ScalarParam, ...]:
        return tuple(p for p in self.table.values() if isinstance(p, ScalarParam))

    @property
    def tensors(self) -> tuple[TensorParam, ...]:
        return tuple(p for p in self.table.values() if isinstance(p, TensorParam))

    def add(self, param: ScalarParam | TensorParam) -> None:
        self.table[param.name] = param
        if isinstance(param, TensorParam):
            self.scope.values[param.name] = param
            self.scope.sizes.update(d.name for d in param.shape if isinstance(d, Size))
            return
        self.scope.values[param.name] = Value(build.param(param.name, param.type))
        if param.static:
            self.scope.statics.add(param.name)

    def inherit(self, template: Template, param: ScalarParam | TensorParam, at: ast.Node) -> None:
        """Take over a parameter that a composition left open, or merge it with one of the same name."""
        mine = self.table.get(param.name)
        if mine is None:
            if param.name in self.scope.values:
                raise Poisoned
            self._check_sizes(template, param, at)
            check_count(len(self.table) + 1, at, self.scope)
            self.add(param)
            self.origin[param.name] = template.name
            return
        where = f"`{self.origin[param.name]}`" if param.name in self.origin else "this pattern"
        hint = f"give it: `{template.name}({param.name}=...)`"
        if isinstance(mine, TensorParam) or isinstance(param, TensorParam):
            if mine != param:
                message = f"`{param.name}` is {_describe(mine)} in {where}, but {_describe(param)} in `{template.name}`"
                raise self.scope.error(at, "ATL211", message, hint)
            return
        if mine.type is not param.type or mine.static != param.static:
            message = f"`{param.name}` is {_describe(mine)} in {where}, but {_describe(param)} in `{template.name}`"
            raise self.scope.error(at, "ATL211", message, hint)
        if param.name in self.origin and None is not param.default != mine.default:
            if mine.default is not None:
                message = (
                    f"`{param.name}` has default {mine.default} in {where}, but {param.default} in `{template.name}`"
                )
                raise self.scope.error(at, "ATL211", message, "declare the parameter in this pattern")
            self.table[param.name] = replace(mine, default=param.default)

    def _check_sizes(self, template: Template, param: ScalarParam | TensorParam, at: ast.Node) -> None:
        """A free size and a parameter of one pattern cannot share a name."""
        sizes = {d.name for d in getattr(param, "shape", ()) if isinstance(d, Size)}
        both = sizes & self.table.keys() or {param.name} & self.scope.sizes
        if both:
            message = f"`{min(both)}` is a parameter and a size in this composition"
            raise self.scope.error(at, "ATL211", message, f"rename the one in `{template.name}` or give it a value")


def _describe(param: ScalarParam | TensorParam) -> str:
    if isinstance(param, TensorParam):
        return f"{param.type}[{', '.join(map(str, param.shape))}]"
    return f"{'static ' * param.static}{param.type}"


def declare(params: tuple[ast.ParamDecl, ...], into: Parameters) -> list[AttnError]:
    """Add the declared parameters, scalars first so that shapes may use them; return the mistakes found."""
    scope = into.scope
    errors: list[AttnError] = []
    order = {p.name.id: i for i, p in enumerate(params)}
    symbols = {n.id for p in params for d in p.dims or () for n in ast.walk(d) if isinstance(n, ast.Name)}
    free = frozenset(n for n in symbols if n[0].isupper() and n not in order)
    for decl in sorted(params[: MAX_PARAMETERS + 1], key=lambda p: p.dims is not None):
        try:
            check_count(order[decl.name.id] + 1, decl, scope)
            check_name(decl.name, scope, "a parameter", scope.values)
            into.add(_tensor(decl, free, scope) if decl.dims is not None else _scalar(decl, scope))
        except AttnError as error:
            errors.append(error)
            scope.values.setdefault(decl.name.id, None)
        except Poisoned:
            scope.values.setdefault(decl.name.id, None)
    into.table = dict(sorted(into.table.items(), key=lambda item: order[item[0]]))
    errors += [] if errors else _unbound_sizes(params, into)
    return errors


def check_count(count: int, at: ast.Node, scope: Scope) -> None:
    """Refuse more parameters than any kernel could take."""
    if count > MAX_PARAMETERS:
        hint = "put the numbers into a captured tensor"
        raise scope.error(at, "ATL106", f"there are more than {MAX_PARAMETERS} parameters", hint)


def _scalar(decl: ast.ParamDecl, scope: Scope) -> ScalarParam:
    type_ = type_named(decl.type, scope)
    default = None if decl.default is None else _default(decl, decl.default, type_, scope)
    return ScalarParam(decl.name.id, type_, default, decl.static)


def _default(decl: ast.ParamDecl, node: ast.Node, type_: Type, scope: Scope) -> Scalar:
    """Evaluate a default, which is any expression of constants."""
    expr = lower(node, Scope(scope.source, scope.names, scope.budget, "a default value", sizes=set(), axes=""))
    if expr.type.value > type_.value or (expr.type is BOOL) != (type_ is BOOL):
        message = f"the default of `{decl.name.id}` is {expr.type}, but the parameter is {type_}"
        raise scope.error(node, "ATL208", message, f"declare it `{decl.name.id}: {expr.type}`")
    expr = widen(expr, type_, "the default", node, scope)
    if isinstance(expr, Const):
        return expr.value
    scope.budget.count((expr,), scope.source, node.span)
    value = evaluate(expr, Environment(float_dtype=torch.float64)).item()
    return int(value) if type_ is INT else value


def _tensor(decl: ast.ParamDecl, free: frozenset[str], scope: Scope) -> TensorParam:
    if decl.static:
        raise scope.error(decl, "ATL205", f"captured tensor `{decl.name.id}` cannot be static", "remove `static`")
    if decl.default is not None:
        raise scope.error(decl.default, "ATL208", f"captured tensor `{decl.name.id}` cannot have a default")
    assert decl.dims is not None
    type_ = type_named(decl.type, scope)
    what = "the shape of a captured tensor"
    inner = replace(scope.restricted(what, axes="", tensors=False), sizes=scope.sizes | free)
    dims: list[Expr] = []
    for node in decl.dims:
        dim = lower(node, inner)
        if dim.type is not INT:
            raise scope.error(node, "ATL212", f"a dimension must be int, got {dim.type}")
        if isinstance(dim, Const) and not 0 <= dim.value < 2**31:
            raise scope.error(node, "ATL212", f"a dimension cannot be {dim.value}")
        dims.append(dim)
    return TensorParam(decl.name.id, type_, tuple(dims))


def _unbound_sizes(params: tuple[ast.ParamDecl, ...], into: Parameters) -> list[AttnError]:
    """A free size gets its value from a tensor that has it alone as a dimension; find those that never do."""
    bound = {d.name for t in into.tensors for d in t.shape if isinstance(d, Size)} | {*BUILTIN_SIZES, *HEAD_SIZES}
    errors = []
    for decl in params:
        for name in (n for d in decl.dims or () for n in ast.walk(d) if isinstance(n, ast.Name)):
            if name.id[0].isupper() and name.id not in bound and name.id not in into.table:
                message = (
                    f"size `{name.id}` cannot be found: no captured tensor has a dimension that is just `{name.id}`"
                )
                errors.append(into.scope.error(name, "ATL212", message, f"add a parameter `{name.id}: int`"))
                bound.add(name.id)
    return errors


def rename_open(param: ScalarParam | TensorParam, into: Substitution) -> ScalarParam | TensorParam:
    """Return an inherited parameter with the sizes and scalars of its shape replaced by what was given for them."""
    if isinstance(param, ScalarParam):
        return param
    return replace(param, shape=into.apply(*param.shape))
