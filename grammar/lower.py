"""Expressions: syntax tree to IR, with types.

Lowering is written as generators that yield the sub-expressions they need, and :func:`lower` drives them with a stack
of its own, so no depth of nesting can exhaust Python's.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias

from attnlang.ir import (
    AXES,
    BOOL,
    FLOAT,
    HEAD_SIZES,
    INT,
    Const,
    Expr,
    Index,
    Input,
    Load,
    Size,
    TensorParam,
    build,
)
from attnlang.ir.build import op

from . import syntax as ast
from .apply import Substitution, bind_scalar, bind_tensor, check_shapes, match_arguments
from .errors import AttnError, suggest
from .functions import CONSTANTS, FUNCTIONS, Function
from .scope import Poisoned, Scope, Template, Value
from .words import OPERANDS, OVER_D, callee, changes, describe, only_hooks

__all__ = ["Lowering", "lower"]

Steps: TypeAlias = Generator["ast.Node", Expr, Expr]

_ARITHMETIC = {"+": "add", "-": "sub", "*": "mul", "/": "div", "//": "floordiv", "%": "mod", "<<": "shl", ">>": "shr"}
_LOGIC = {"and": "and", "or": "or"}
_BITS = {"&": ("bitand", "and"), "|": ("bitor", "or"), "^": ("bitxor", "xor")}
_COMPARE = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}
_ALIASES = {"True": "`true`", "False": "`false`", "math": "the function without `math.`"}
_INDEX_OF = {"B": "b", "H": "h", "Hkv": "h", "Lq": "q"}  # for examples in hints
MAX_POWER = 64


def lower(node: ast.Node, scope: Scope) -> Expr:
    """Return ``node`` as an IR expression.

    Raises:
        AttnError: a name, a type or an argument is wrong.
        Poisoned: it uses a name whose definition was wrong.
    """
    return Lowering(scope).run(node)


class Lowering:
    """One walk over one expression; ``reads`` tells afterwards which inputs of the core it depends on."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.reads: set[str] = set()

    def run(self, root: ast.Node) -> Expr:
        scope = self.scope
        stack = [self._steps(root)]
        value: Expr | None = None
        while stack:
            try:
                child = stack[-1].send(value)  # type: ignore[arg-type]
            except StopIteration as done:
                stack.pop()
                value = done.value
                continue
            scope.budget.charge(1, scope.source, child.span)
            stack.append(self._steps(child))
            value = None
        assert value is not None
        return value

    def _steps(self, node: ast.Node) -> Steps:
        match node:
            case ast.Literal(value=value):
                return _done(build.const(value))
            case ast.Name():
                return _done(self._name(node))
            case ast.Attribute():
                return _done(self._attribute(node))
            case ast.Unary():
                return self._unary(node)
            case ast.Binary():
                return self._binary(node)
            case ast.Compare():
                return self._compare(node)
            case ast.Conditional():
                return self._conditional(node)
            case ast.Subscript():
                return self._subscript(node)
            case ast.Call():
                return self._call(node)
            case ast.Tuple():
                message = "a list of values in parentheses has no place in an expression"
                raise self.scope.error(node, "ATL203", message, "only `over`, `key` and `extent` take one")
        raise TypeError(f"not an expression: {type(node).__name__}")

    # names

    def _name(self, node: ast.Name) -> Expr:
        scope, name = self.scope, node.id
        if name in scope.values:
            if name == "w" and scope.known is not None and name in scope.known:
                message = "`w` is the weight here, and a name of this pattern"
                raise scope.error(node, "ATL202", message, "give the parameter or `let` another name")
            return self._value(node, scope.values[name])
        if name in AXES or (name == "d" and name in scope.axes):
            if name not in scope.axes:
                hint = "pass it as an argument" if "helper" in scope.what else ""
                raise scope.error(node, "ATL213", f"`{name}` is not known in {scope.what}", hint)
            return Index(name)
        if name in scope.inputs:
            self._read(node, name, f"{describe(scope.inputs[name])} is")
            return scope.inputs[name]
        if name in scope.sizes:
            return Size(name)
        if name in HEAD_SIZES and scope.sizes:
            return Size(name)
        if name in CONSTANTS:
            return Const(CONSTANTS[name], FLOAT)
        raise self._unknown(node)

    def _value(self, node: ast.Name, value: Value | TensorParam | None) -> Expr:
        scope = self.scope
        if value is None:
            raise Poisoned
        if isinstance(value, TensorParam):
            if not scope.tensors:
                raise scope.error(node, "ATL213", f"captured tensor `{node.id}` cannot be read in {scope.what}")
            if value.shape:
                example = ", ".join(_INDEX_OF.get(str(dim), "k") for dim in value.shape)
                message = f"captured tensor `{node.id}` is used without an index"
                raise scope.error(node, "ATL205", message, f"read one element, e.g. `{node.id}[{example}]`")
            return Load(value.name, (), value.type)
        for name in sorted(value.reads):
            known = scope.inputs.get(name)
            thing = f"`{name}`" if known is None else describe(known)
            self._read(node, name, f"`{node.id}` depends on {thing}, which is")
        return value.expr

    def _read(self, node: ast.Node, name: str, what: str) -> None:
        """Note that input ``name`` is read, which must be known here."""
        scope = self.scope
        if name not in (scope.inputs if scope.known is None else scope.known):
            hint = ""
            if "mask" in scope.what:
                hint = "a mask decides which pairs exist before any score is computed"
            elif scope.what in ("a score", "a normaliser"):
                hint = "it exists only after normalisation"
            raise scope.error(node, "ATL213", f"{what} not known in {scope.what}", hint)
        self.reads.add(name)

    def _unknown(self, node: ast.Name) -> AttnError:
        scope, name = self.scope, node.id
        if name in scope.later:
            hint = f"it is defined on line {scope.later[name]}; move that line up"
            return scope.error(node, "ATL200", f"`{name}` is used before it is defined", hint)
        if name in scope.names.templates or name in FUNCTIONS:
            template = scope.names.templates.get(name)
            kind = template.kind if template else "function"
            return scope.error(node, "ATL203", f"`{name}` is a {kind}, not a value", f"call it: `{name}(...)`")
        known = [*scope.values, *scope.sizes, *CONSTANTS]
        known += [a for a in AXES if a in scope.axes]
        known += [*scope.inputs] if scope.known is None else sorted(scope.known)
        hint = f"write {_ALIASES[name]}" if name in _ALIASES else suggest(name, known)
        if name in OPERANDS:
            hint = f"`{name}` stands for rows: it is a factor of an output, or an argument of a term, `pool` or `rows`"
        if not hint and "shape" in scope.what:
            hint = "a size that is taken from the tensor has a name with a capital letter, e.g. `N`"
        return scope.error(node, "ATL200", f"unknown name `{name[:80]}`", hint)

    def _attribute(self, node: ast.Attribute) -> Expr:
        scope = self.scope
        if not isinstance(node.base, ast.Name):
            raise scope.error(node, "ATL200", f"nothing here has a part `{node.name.id}`")
        axis, name = node.base.id, node.name.id
        if axis in scope.names.modules:
            raise scope.error(node, "ATL203", f"`{axis}.{name}` is not a value", f"call it: `{axis}.{name}(...)`")
        if axis not in AXES:
            raise scope.error(node, "ATL200", f"`{axis}` has no part `{name}`", "only q and k of a grid have parts")
        if axis not in scope.grids:
            hint = f"declare it first: `grid {axis} = (y: height, x: width)`"
            raise scope.error(node, "ATL209", f"`{axis}` has no grid, so there is no `{axis}.{name}`", hint)
        if name not in scope.grids[axis]:
            hint = suggest(name, scope.grids[axis]) or f"it has {', '.join(scope.grids[axis])}"
            raise scope.error(node.name, "ATL209", f"the grid of `{axis}` has no coordinate `{name}`", hint)
        if axis not in scope.axes:
            raise scope.error(node, "ATL213", f"`{axis}.{name}` is not known in {scope.what}")
        return scope.grids[axis][name]

    # operators

    def _apply(self, node: ast.Node, symbol: str, name: str, *args: Expr) -> Expr:
        try:
            return op(name, *args)
        except TypeError:
            types = " and ".join(str(a.type) for a in args)
            raise self.scope.error(
                node, "ATL203", f"`{symbol}` cannot be applied to {types}", _type_hint(symbol, args)
            ) from None

    def _unary(self, node: ast.Unary) -> Steps:
        value = yield node.operand
        if node.op == "not":
            return self._apply(node, "not", "not", value)
        if node.op == "~":
            return self._apply(node, "~", "not" if value.type is BOOL else "bitnot", value)
        if node.op == "+":
            return build.cast(value, INT) if value.type is BOOL else value
        if isinstance(value, Const):  # folded, so that a negative constant and its text are the same thing
            value = build.cast(value, INT) if value.type is BOOL else value
            assert isinstance(value, Const)
            return Const(-value.value, value.type)
        return self._apply(node, "-", "neg", value)

    def _binary(self, node: ast.Binary) -> Steps:
        left = yield node.left
        right = yield node.right
        if node.op in _BITS:
            on_int, on_bool = _BITS[node.op]
            both = left.type is BOOL and right.type is BOOL
            return self._apply(node, node.op, on_bool if both else on_int, left, right)
        if node.op == "**":
            return self._power(node, left, right)
        return self._apply(node, node.op, _ARITHMETIC.get(node.op) or _LOGIC[node.op], left, right)

    def _power(self, node: ast.Binary, base: Expr, exponent: Expr) -> Expr:
        """A constant power of an int stays an int, by squaring; every other power is a float."""
        if base.type is FLOAT or not (isinstance(exponent, Const) and exponent.type is INT and exponent.value >= 0):
            return self._apply(node, "**", "pow", base, exponent)
        if exponent.value > MAX_POWER:
            message = f"the exponent of an int power is at most {MAX_POWER}"
            raise self.scope.error(node.right, "ATL107", message, "make the base a float: `float(x) ** n`")
        base, left, out = build.cast(base, INT), int(exponent.value), None
        while left:
            if left & 1:
                out = base if out is None else op("mul", out, base)
            left >>= 1
            base = op("mul", base, base) if left else base
        return build.const(1) if out is None else out

    def _compare(self, node: ast.Compare) -> Steps:
        operands = []
        for operand in node.operands:
            value = yield operand
            operands.append(value)
        pairs = zip(node.ops, operands, operands[1:], strict=False)
        return build.all_of(*(self._pair(node, symbol, a, b) for symbol, a, b in pairs))

    def _pair(self, node: ast.Node, symbol: str, left: Expr, right: Expr) -> Expr:
        if left.type is BOOL and right.type is BOOL and symbol in ("==", "!="):
            differ = op("xor", left, right)
            return differ if symbol == "!=" else op("not", differ)
        return self._apply(node, symbol, _COMPARE[symbol], left, right)

    def _conditional(self, node: ast.Conditional) -> Steps:
        condition = yield node.condition
        then = yield node.then
        other = yield node.other
        if condition.type is not BOOL:
            message = f"the condition after `if` must be bool, got {condition.type}"
            raise self.scope.error(node.condition, "ATL203", message, "compare it with something, e.g. `... != 0`")
        return op("where", condition, then, other)

    def _subscript(self, node: ast.Subscript) -> Steps:
        scope, base = self.scope, node.base
        if isinstance(base, ast.Name) and base.id in OPERANDS and base.id not in scope.values:
            return (yield from self._element(node, base.id))
        tensor = scope.values.get(base.id) if isinstance(base, ast.Name) else None
        if isinstance(base, ast.Name) and not isinstance(tensor, TensorParam):
            if base.id not in scope.values:
                self._name(base)  # raises unless it is an index, a size or a constant
            elif tensor is None:
                raise Poisoned
            raise scope.error(base, "ATL205", f"`{base.id}` is a number, not a captured tensor: it has no elements")
        if not isinstance(tensor, TensorParam):
            raise scope.error(base, "ATL205", "only a captured tensor can be indexed")
        if not scope.tensors:
            raise scope.error(node, "ATL213", f"captured tensor `{tensor.name}` cannot be read in {scope.what}")
        if len(node.indices) != len(tensor.shape):
            shape = ", ".join(map(str, tensor.shape))
            message = f"`{tensor.name}` has {len(tensor.shape)} dimension(s), indexed with {len(node.indices)}"
            raise scope.error(node, "ATL205", message, f"it is declared `{tensor.type}[{shape}]`")
        indices = yield from self._indices(node, tensor.shape)
        return Load(tensor.name, tuple(indices), tensor.type)

    def _element(self, node: ast.Subscript, name: str) -> Steps:
        """One element of an operand of the call."""
        scope = self.scope
        if not scope.elements:
            hint = "scores read their products, `s` and `term`s; elements are read in `rows` and `select`"
            raise scope.error(node, "ATL213", f"elements of `{name}` are not known in {scope.what}", hint)
        if len(node.indices) != 4:
            message = f"`{name}` has 4 dimensions, indexed with {len(node.indices)}"
            raise scope.error(node, "ATL205", message, f"e.g. `{name}[b, h, q, d]`")
        if OPERANDS[name] in scope.values:
            message = f"a captured tensor called `{OPERANDS[name]}` hides `{name}`"
            raise scope.error(node, "ATL202", message, "give the tensor another name")
        indices = yield from self._indices(node, (None,) * 4)
        return Load(OPERANDS[name], tuple(indices), FLOAT)

    def _indices(self, node: ast.Subscript, shape: tuple[Expr | None, ...]) -> Generator[ast.Node, Expr, list[Expr]]:
        scope = self.scope
        indices: list[Expr] = []
        for child in node.indices:
            index = yield child
            if index.type is FLOAT:
                message = f"an index must be int, got {index.type}"
                raise scope.error(child, "ATL203", message, "convert it with `int(...)`")
            if isinstance(index, Const) and index.value < 0:
                message = f"index {index.value} is negative, and indices do not count from the end"
                length = shape[len(indices)]
                hint = "" if length is None else f"write `{length} - {-index.value}`"
                raise scope.error(child, "ATL205", message, hint)
            indices.append(build.cast(index, INT))
        return indices

    # calls

    def _call(self, node: ast.Call) -> Steps:
        if isinstance(node.callee, ast.Name) and node.callee.id in FUNCTIONS:
            return (yield from self._builtin(node, FUNCTIONS[node.callee.id]))
        if isinstance(node.callee, ast.Name) and node.callee.id in OVER_D and self.scope.over_d is not None:
            return (yield from self._over_d(node, OVER_D[node.callee.id], self.scope.over_d))
        template = callee(node.callee, self.scope, [*FUNCTIONS])
        given = match_arguments(template, node, self.scope)
        into = Substitution()
        for tensor in template.tensors:
            if tensor.name in given:
                bind_tensor(template, tensor, given[tensor.name], self.scope, into)
            else:
                raise self._missing(node, template, tensor.name)
        for scalar in template.scalars:
            if scalar.name in given:
                value = yield given[scalar.name].value
                bind_scalar(template, scalar, given[scalar.name], value, self.scope, into)
            elif scalar.default is not None:
                into.nodes[build.param(scalar.name, scalar.type)] = Const(scalar.default, scalar.type)
            else:
                raise self._missing(node, template, scalar.name)
        check_shapes(template, given, self.scope, into)
        return self._expand(node, template, into)

    def _over_d(self, node: ast.Call, monoid: str, known: dict[tuple[str, Expr], Input]) -> Steps:
        """A reduction over the features of a row; equal ones are one."""
        assert isinstance(node.callee, ast.Name)
        if len(node.args) != 1 or node.args[0].name is not None:
            raise self.scope.error(node, "ATL204", f"`{node.callee.id}` takes 1 argument, got {len(node.args)}")
        value = yield node.args[0].value
        if value.type is BOOL:
            raise self.scope.error(node.args[0], "ATL203", "features are float, got bool", "write `float(...)`")
        value = build.cast(value, FLOAT)
        return known.setdefault((monoid, value), Input(f"{monoid}_{len(known)}", FLOAT, "bhq"))

    def _expand(self, node: ast.Call, template: Template, into: Substitution) -> Expr:
        scope = self.scope
        scope.budget.charge(template.size, scope.source, node.span)
        if template.program is not None and not (only_hooks(template.program) and template.program.score is build.s):
            message = f"pattern `{template.name}` {changes(template.program)}, so it is not a condition"
            raise scope.error(node, "ATL210", message, "compose it: `pattern name = ... & ...`")
        root = template.value if template.program is None else template.program.mask
        assert root is not None
        return into.apply(root)[0]

    def _missing(self, node: ast.Call, template: Template, name: str) -> AttnError:
        message = f"`{template.name}` needs a value for `{name}`"
        return self.scope.error(node, "ATL204", message, f"its parameters: {', '.join(template.order)}")

    def _builtin(self, node: ast.Call, function: Function) -> Steps:
        scope, count = self.scope, len(node.args)
        if count < function.least or (function.most is not None and count > function.most):
            want = f"{function.least}" if function.most == function.least else f"at least {function.least}"
            plural = "s" * (function.least != 1)
            message = f"`{function.name}` takes {want} argument{plural}, got {count}"
            raise scope.error(node, "ATL204", message, f"it is `{function.signature}`")
        if function.pair and not {*AXES} <= {*scope.axes}:
            message = f"`{function.name}` reads b, h, q and k, which are not all known in {scope.what}"
            raise scope.error(node, "ATL213", message, "call `random(seed, ...)` with what is known")
        args = []
        for argument in node.args:
            if argument.name is not None:
                raise scope.error(argument, "ATL204", "built-in functions take no named arguments")
            value = yield argument.value
            args.append(value)
        try:
            return function.build(*args)
        except TypeError:
            types = ", ".join(str(a.type) for a in args)
            message = f"`{function.name}` cannot be applied to ({types})"
            raise scope.error(node, "ATL203", message, f"it is `{function.signature}`") from None


def _done(value: Expr) -> Steps:
    return value
    yield  # a generator that needs nothing


def _type_hint(symbol: str, args: tuple[Expr, ...]) -> str:
    if symbol in ("and", "or", "not"):
        return f"`{symbol}` joins conditions; compare the number with something, e.g. `... != 0`"
    if any(a.type is FLOAT for a in args):
        return "convert the float with `int(...)`"
    return ""
