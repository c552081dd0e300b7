"""Expressions in C++: scalars at GRID and COL level, vectors with one query per lane at ROW and PAIR level."""

from __future__ import annotations

import math
import struct
from typing import ClassVar

from attnlang.ir import BOOL, FLOAT, INT, Const, Expr, Index, Input, Load, Op, Param, Size, format_expr
from attnlang.passes.levels import Level
from attnlang.passes.widths import Width
from attnlang.sparsity.closed_form import KEY_TILE, RANGES

from .plan import KernelPlan, Value
from .printer import Plan, Printer

__all__ = ["ELEMENTS", "SCALARS", "VECTORS", "CppExpressions", "CppPrinter", "comment", "declaration"]

SCALARS = {Width.BOOL: "bool", Width.I32: "int", Width.I64: "int64", Width.F32: "float"}
VECTORS = {Width.BOOL: "vbool", Width.I32: "vint", Width.I64: "vint64", Width.F32: "vfloat"}
_SPLAT = {Width.BOOL: "all_bool", Width.I32: "all_int", Width.I64: "all_int64", Width.F32: "all_float"}

ELEMENTS = {
    "float32": "float",
    "float64": "double",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "int32": "int",
    "int64": "int64",
    "bool": "unsigned char",
}
"""C++ element type of a tensor by dtype name."""

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "bitand": "&",
    "bitor": "|",
    "bitxor": "^",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
}
_COMPARES = frozenset(("lt", "le", "gt", "ge", "eq", "ne", "to_bool"))
_LOGIC = {"and": ("&&", "&"), "or": ("||", "|"), "xor": ("!=", "^")}
_CALLS = [
    "floordiv",
    "mod",
    "abs",
    "min",
    "max",
    "sign",
    "pow",
    "shl",
    "shr",
    "where",
    "exp",
    "exp2",
    "expm1",
    "log",
    "log2",
    "log1p",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "tan",
    "atan",
    "tanh",
    "sigmoid",
    "erf",
    "floor",
    "ceil",
    "round",
    "trunc",
]

_FORMATS = {
    **{name: f"({{0}} {symbol} {{1}})" for name, symbol in _INFIX.items()},
    **{name: "op::" + name + "({args})" for name in _CALLS},
    "neg": "(-{0})",
    "bitnot": "(~{0})",
    "to_int": "op::to_int({0})",
    "to_bool": "({0} != 0)",
}


class CppExpressions(Printer[Plan]):
    """Prints the expressions of one plan, whose values of the levels ``laned`` are vectors.

    ``helpers`` collects the operators the file must define.
    """

    formats = _FORMATS
    laned: ClassVar[frozenset[Level]]

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.helpers: set[str] = set()

    @staticmethod
    def source(node: Expr) -> str:
        """The expression itself, for a comment."""
        text = format_expr(node)
        return comment(text if len(text) <= 90 else text[:87] + "...")

    # leaves

    def constant(self, node: Const, at: Level) -> str:
        if node.type is BOOL:
            text = "true" if node.value else "false"
        elif node.type is FLOAT:
            text = _float_literal(float(node.value))
        else:
            text = _int_literal(int(node.value), self.plan.width(node))
        return self.spread(text, node, at)

    def size(self, name: str, at: Level) -> str:
        return self.spread(f"n_{name}", Size(name), at)

    def parameter(self, node: Param, at: Level) -> str:
        return self.spread(f"p_{node.name}", node, at)

    def spread(self, text: str, node: Expr, at: Level) -> str:
        return f"{_SPLAT[self.plan.width(node)]}({text})" if at in self.laned else text

    # operators

    def operation(self, node: Op, at: Level) -> str:
        args = [self.argument(node, a, at) for a in node.args]
        laned = at in self.laned
        if node.op in _LOGIC:
            return f"({args[0]} {_LOGIC[node.op][laned]} {args[1]})"
        if node.op == "not":
            return f"({'~' if laned else '!'}{args[0]})"
        if node.op == "to_float" or (node.op == "to_int" and node.args[0].type is not FLOAT):
            have = self.plan.width(node.args[0])
            want = self.plan.width(node)
            return args[0] if have is want else self.convert(args[0], have, want, at)
        if node.op in ("floordiv", "mod") and node.type is INT and self._natural(node):
            return f"({args[0]} {'/' if node.op == 'floordiv' else '%'} {args[1]})"
        if node.op == "where" and self.plan.width(node) is Width.BOOL and laned:
            return f"(({args[0]} & {args[1]}) | (~{args[0]} & {args[2]}))"
        if node.op == "pow" and isinstance(node.args[1], Const) and node.args[1].value == 2:
            self.helpers.add("square")
            return f"op::square({args[0]})"
        if node.op in _CALLS or node.op == "to_int":
            self.helpers.add(node.op)
        text = self.formats[node.op].format(*args, args=", ".join(args))
        if node.op in _COMPARES and laned and self._operand(node) is Width.I64:
            return f"narrow{text}"
        return text

    def _operand(self, node: Op) -> Width:
        widths = [self.operand_width(node, a) for a in node.args]
        return Width.I64 if Width.I64 in widths else widths[0]

    def _natural(self, node: Op) -> bool:
        """Whether C's own ``/`` and ``%`` mean the same, and compilers have fast code for them."""
        a, b = node.args
        positive = self.plan.never_negative(a) and self.plan.never_negative(b) and self.plan.never_zero(b)
        return positive and (isinstance(b, Const) or self.plan.level(node) not in self.laned)

    def convert(self, text: str, have: Width, want: Width, at: Level) -> str:
        if at not in self.laned:
            return f"({SCALARS[want]}){text}"
        if have is Width.BOOL:
            text, have = f"(-{text})", Width.I32  # a true lane is -1
        return text if have is want else f"to<{VECTORS[want]}>({text})"

    # loads

    def load(self, node: Load, at: Level) -> str:
        fixed, moving = [f"t_{node.tensor}"], []
        for d, (index, (low, high)) in enumerate(zip(node.indices, self.plan.load_guards(node), strict=True)):
            laned = at in self.laned and self.plan.level(index) in self.laned
            level = at if laned else Level.GRID
            text = self.clamped(index, level, laned, f"a.t_{node.tensor}_n{d}", low, high)
            stride = f"t_{node.tensor}_s{d}"
            if not laned:
                fixed.append(f"(int64){text} * {stride}")
            elif self.plan.wide:
                wide = text if self.plan.width(index) is Width.I64 else f"to<vint64>({text})"
                moving.append(f"{wide} * {stride}")
            else:
                narrow = text if self.plan.width(index) is Width.I32 else f"to<vint>({text})"
                moving.append(f"{narrow} * (int){stride}")
        return self._fetch(node, at, " + ".join(fixed), " + ".join(moving))

    def _fetch(self, node: Load, at: Level, base: str, offsets: str) -> str:
        width = self.plan.width(node)
        boolean = node.type is BOOL
        if at not in self.laned:
            return f"(number(*({base})) != 0)" if boolean else f"({SCALARS[width]})number(*({base}))"
        if not offsets:  # the same element for every query
            value = f"(number(*({base})) != 0)" if boolean else f"({SCALARS[width]})number(*({base}))"
            return f"{_SPLAT[width]}({value})"
        element = SCALARS[width]
        return f"gather_{element}({base}, {offsets})"

    def clamped(self, index: Expr, at: Level, laned: bool, extent: str, low: bool, high: bool) -> str:
        own = self.plan.width(index)
        text = self.text(index, at)
        if not (low or high):
            return text
        kind = (VECTORS if laned else SCALARS)[own]
        name = f"clamp{'_low' * low}{'_high' * high}"
        last = "" if not high else f", ({SCALARS[own]}){extent}"
        return f"{name}<{kind}>({text}{last})"


class CppPrinter(CppExpressions[KernelPlan]):
    """Expressions of a kernel over pairs, where one query is one lane."""

    laned = frozenset((Level.ROW, Level.PAIR))

    def reference(self, node: Expr, name: str, at: Level) -> str:
        level = self.plan.level(node)
        if level is Level.ROW:
            return f"{name}[w]"
        return self.spread(name, node, at) if level is not Level.PAIR else name

    def index(self, node: Index, at: Level) -> str:
        if node.axis == "q":
            return "query[w]"
        return self.spread({"k": "key"}.get(node.axis, node.axis), node, at)

    def input(self, node: Input, at: Level) -> str:
        if node in RANGES:  # of run bounds
            return "TILE" if node is KEY_TILE else node.name
        if "k" in node.axes:
            return node.name
        held = f"rows.{node.name}[w]"  # an accumulator at the end of its pass
        stream = self.plan.stream
        return f"({held} * LOG_2)" if self.plan.binary and stream and node.name == stream.shift else held


def comment(text: str) -> str:
    """``text`` as the end of a line: a backslash there would swallow the next one."""
    return text.rstrip().rstrip("\\").rstrip()


def declaration(printer: CppExpressions[Plan], value: Value) -> str:
    """The statement that makes ``value``."""
    kinds = VECTORS if value.level in printer.laned else SCALARS
    text = printer.value(value)
    return f"const {kinds[printer.plan.width(value.expr)]} {value.name} = {text};  // {comment(value.comment)}"


def _int_literal(value: int, width: Width) -> str:
    value = (value + 2**63) % 2**64 - 2**63
    if value == -(2**63):
        return "(-9223372036854775807LL - 1)"
    if value == -(2**31) and width is Width.I32:
        return "(-2147483647 - 1)"
    text = f"{value}LL" if width is Width.I64 else str(value)
    return f"({text})" if value < 0 else text


def _float_literal(value: float) -> str:
    try:
        value = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        value = math.copysign(math.inf, value)
    if math.isnan(value):
        return '__builtin_nanf("")'
    if math.isinf(value):
        return "__builtin_inff()" if value > 0 else "(-__builtin_inff())"
    text = f"{value:.9g}"
    text += "f" if any(c in text for c in ".e") else ".0f"
    return f"({text})" if text.startswith("-") else text
