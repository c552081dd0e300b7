"""Applying a helper or a pattern to arguments: matching, conversion, shapes, substitution."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from attnlang.ir import (
    BUILTIN_SIZES,
    INT,
    STAGE_INPUTS,
    Attend,
    Const,
    Expr,
    Index,
    Input,
    Load,
    Operand,
    Param,
    Pool,
    ScalarParam,
    Size,
    Stage,
    TensorParam,
    Type,
    build,
    map_record,
    postorder,
    rewrite,
)

from . import syntax as ast
from .errors import suggest
from .scope import Poisoned, Scope, Template

__all__ = ["Substitution", "bind_scalar", "bind_tensor", "check_shapes", "match_arguments", "widen"]


@dataclass
class Substitution:
    """Replaces parameters, captured tensors and free sizes of a template, all at once."""

    nodes: dict[Expr, Expr] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)

    def stage(self, stage: Stage) -> Stage:
        """Replace in a whole stage; rows of captured tensors follow the names of those."""
        changed = map_record(stage, lambda e: self.apply(e)[0])
        if not isinstance(changed, Attend):
            return replace(changed, source=self._named(changed.source)) if isinstance(changed, Pool) else changed
        terms = (replace(t, left=self._rows(t.left), right=self._rows(t.right)) for t in changed.terms)
        outputs = (o if o.rows is None else replace(o, rows=self._rows(o.rows)) for o in changed.outputs)
        return replace(changed, terms=tuple(terms), outputs=tuple(outputs))

    def _named(self, tensor: str) -> str:
        return tensor if tensor in STAGE_INPUTS else self.tensors.get(tensor, tensor)

    def _rows(self, operand: Operand) -> Operand:
        return replace(operand, source=self._named(operand.source))

    def apply(self, *roots: Expr) -> tuple[Expr, ...]:
        def rule(node: Expr) -> Expr:
            if isinstance(node, Load):
                return Load(self.tensors.get(node.tensor, node.tensor), node.indices, node.type)
            return self.nodes.get(node, node)

        return rewrite(roots, rule)


def match_arguments(template: Template, call: ast.Call, scope: Scope) -> dict[str, ast.Argument]:
    """Return the argument given for each parameter that has one."""
    given: dict[str, ast.Argument] = {}
    for position, argument in enumerate(call.args):
        if argument.name is not None:
            name = argument.name.id
            if name not in template.order:
                hint = suggest(name, template.order) or _listing(template)
                raise scope.error(argument.name, "ATL204", f"`{template.name}` has no parameter `{name}`", hint)
        else:
            if position and call.args[position - 1].name is not None:
                raise scope.error(argument, "ATL204", "a positional argument cannot follow a named one")
            if position >= len(template.order):
                count = len(template.order)
                message = f"`{template.name}` takes {count} argument{'s' * (count != 1)}, got {len(call.args)}"
                raise scope.error(argument, "ATL204", message, _listing(template))
            name = template.order[position]
        if name in given:
            raise scope.error(argument, "ATL204", f"parameter `{name}` of `{template.name}` is given twice")
        given[name] = argument
    return given


def _listing(template: Template) -> str:
    return f"its parameters: {', '.join(template.order)}" if template.order else "it has no parameters"


def widen(expr: Expr, to: Type, what: str, at: ast.Node, scope: Scope) -> Expr:
    """Convert to a wider type, or complain that ``what`` would be narrowed."""
    if expr.type.value > to.value:
        hint = f"convert it with `{to}(...)`" if to is INT else "compare it with something, e.g. `... != 0`"
        raise scope.error(at, "ATL203", f"{what} must be {to}, got {expr.type}", hint)
    return build.cast(expr, to)


def bind_scalar(
    template: Template, param: ScalarParam, argument: ast.Argument, expr: Expr, scope: Scope, into: Substitution
) -> None:
    """Bind ``param`` to the value ``expr`` of ``argument``."""
    what = f"argument `{param.name}` of `{template.name}`"
    expr = widen(expr, param.type, what, argument.value, scope)
    node = Param(param.name, param.type)
    leaves = [n for n in postorder(expr) if not n.args]
    if param.static and not all(
        isinstance(n, Const) or (isinstance(n, Param) and n.name in scope.statics) for n in leaves
    ):
        message = f"{what} is static: it takes constants and static parameters only"
        raise scope.error(argument.value, "ATL204", message, "declare the parameter you pass as `static`")
    if any(isinstance(n, Index | Load | Input) for n in postorder(expr)) and node in _shape_nodes(template):
        message = f"{what} sets a size, so it cannot depend on b, h, q, k or a captured tensor"
        raise scope.error(argument.value, "ATL204", message)
    into.nodes[node] = expr


def _shape_nodes(template: Template) -> set[Expr]:
    grids = template.program.grids if template.program else ()
    shapes = [d for t in template.tensors for d in t.shape] + [e for _, coords in grids for _, e in coords]
    return set(postorder(*shapes))


def tensor_argument(template: Template, param: TensorParam, argument: ast.Argument, scope: Scope) -> TensorParam:
    """Return the captured tensor that ``argument`` names."""
    node = argument.value
    value = scope.values.get(node.id) if isinstance(node, ast.Name) else None
    if isinstance(node, ast.Name) and node.id in scope.values and value is None:
        raise Poisoned
    if not isinstance(value, TensorParam):
        tensors = [name for name, entry in scope.values.items() if isinstance(entry, TensorParam)]
        message = f"argument `{param.name}` of `{template.name}` must be the name of a captured tensor"
        hint = suggest(node.id, tensors) if isinstance(node, ast.Name) else ""
        raise scope.error(node, "ATL205", message, hint or "declare it as a parameter, e.g. `name: float[Lk]`")
    return value


def bind_tensor(
    template: Template, param: TensorParam, argument: ast.Argument, scope: Scope, into: Substitution
) -> None:
    """Bind ``param`` to a captured tensor of the scope, and its free sizes to that tensor's dimensions."""
    tensor = tensor_argument(template, param, argument, scope)
    what = f"`{param.name}` of `{template.name}`"
    if tensor.type is not param.type:
        message = f"{what} is a tensor of {param.type}, but `{tensor.name}` holds {tensor.type}"
        raise scope.error(argument.value, "ATL203", message)
    if len(tensor.shape) != len(param.shape):
        message = f"{what} has {len(param.shape)} dimension(s), but `{tensor.name}` has {len(tensor.shape)}"
        raise scope.error(argument.value, "ATL205", message)
    for want, have in zip(param.shape, tensor.shape, strict=True):
        free = isinstance(want, Size) and want.name not in BUILTIN_SIZES
        if free and into.nodes.setdefault(want, have) is not have:
            message = f"size `{want}` of `{template.name}` is both {into.nodes[want]} and {have}"
            raise scope.error(argument.value, "ATL212", message)
    into.tensors[param.name] = tensor.name


def check_shapes(template: Template, given: dict[str, ast.Argument], scope: Scope, into: Substitution) -> None:
    """Compare the dimensions that are not free sizes, once everything is bound."""
    for param in template.tensors:
        if param.name not in given:
            continue
        tensor = scope.values[into.tensors[param.name]]
        assert isinstance(tensor, TensorParam)
        for axis, (want, have) in enumerate(zip(into.apply(*param.shape), tensor.shape, strict=True)):
            if want is not have:
                message = f"dimension {axis} of `{tensor.name}` is {have}, but `{template.name}` needs {want}"
                raise scope.error(given[param.name].value, "ATL212", message)
