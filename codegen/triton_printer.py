"""Prints the expressions of a plan as Triton.

Values are scalars at GRID level, ``[BLOCK_M]`` at ROW level, ``[BLOCK_N]`` at COL level and ``[BLOCK_M, BLOCK_N]`` at
PAIR level (in a rows stage, whose columns are features, BLOCK_D or BLOCK_DV in place of BLOCK_N). Triton's integer
``//`` and ``%`` truncate like C, so floor semantics come from a proof, a shift or a helper function
(``templates/triton_helpers.j2``); the printer records which helpers it used.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Mapping
from typing import ClassVar

from attnlang.ir import BOOL, FLOAT, INT, Const, Expr, Index, Input, Load, Op, Param, Size
from attnlang.passes.levels import Level
from attnlang.passes.widths import Width
from attnlang.sparsity.closed_form import KEY_TILE, QUERY_TILE

from .plan import KernelPlan
from .printer import Plan, Printer
from .triton_helpers import HELPERS

__all__ = ["RESERVED", "TritonExpressions", "TritonPrinter", "precedence", "safe_name", "top_operators"]

_TEMPLATE_NAMES = """
BLOCK_D BLOCK_DV BLOCK_M BLOCK_N FEATURES HEAD_DIM LN2 LOG2E VALUE_DIM
acc attention_forward attention_rows b bh change_output d_idx d_mask decay descriptor dv_idx dv_mask first_tile float
full_ptr full_runs gap1 gap2 gap3 h inside int k k_base k_batches k_desc k_distance k_first k_heads k_idx k_last
k_local k_offsets k_ptr k_row k_rows key_batch key_head launch lse lse_ptr make_queries make_rows
map_batch map_heads map_row num_q_tiles num_stages num_warps o o_base o_desc o_mask o_offsets o_ptr
part_ptr part_runs pid q q_base q_desc q_distance q_first q_idx q_last q_local q_offsets q_ptr q_row query_inside range
rate row_max row_sum run s scale scores softmax_step start start_q step TensorDescriptor tile tile_q tile_step tiles tl
triton v v_base v_desc v_offsets v_ptr visible
"""
_STRIDES = frozenset(f"{operand}_stride_{dim}" for operand in "qkvo" for dim in "bhnd")
RESERVED = frozenset(_TEMPLATE_NAMES.split()) | _STRIDES | frozenset(HELPERS)
"""Names the template uses; parameters and captured tensors of a program that share one get an underscore."""

_OF_TENSORS = re.compile(r"_(ptr|stride\d+|size\d+)$")
"""What the kernel's parameters for a captured tensor end in."""

_TILES: dict[Expr, str] = {KEY_TILE: "BLOCK_N", QUERY_TILE: "BLOCK_M"}
_INT_TYPES = {Width.I32: "tl.int32", Width.I64: "tl.int64"}
_LOAD_TO = {Width.I32: "tl.int32", Width.I64: "tl.int64", Width.F32: "tl.float32"}
_NATIVE = {"int32": Width.I32, "int64": Width.I64, "float32": Width.F32}


def safe_name(name: str) -> str:
    """Return ``name``, or ``name_`` where Python, Triton, the template or a captured tensor has another use for it."""
    taken = name in RESERVED or f"{name}_ptr" in RESERVED or keyword.iskeyword(name) or keyword.issoftkeyword(name)
    taken = taken or _OF_TENSORS.search(name) is not None
    return f"{name}_" if taken or name.startswith("_") or name.endswith("_") else name


_PRECEDENCE = {"*": 6, "/": 6, "//": 6, "%": 6, "+": 5, "-": 5, "<<": 4, ">>": 4, "&": 3, "^": 2, "|": 1}
_TERM = 7


class _Text(str):
    """Text of an operand, with parentheses where its place asks for them.

    The format spec is the precedence of the operator it stands beside, with ``r`` if equal precedence needs
    parentheses too; ``p`` asks for a single term.
    """

    def __format__(self, spec: str) -> str:
        have = precedence(self)
        if not spec:
            return str(self)
        if spec == "p":
            wrap = have < _TERM or self[0] in "-~"
        else:
            wrap = have < int(spec[0]) + ("r" in spec)
        return f"({self})" if wrap else str(self)


def precedence(text: str) -> int:
    """Return the lowest precedence among the operators of ``text`` outside brackets; comparisons have 0."""
    return min((_PRECEDENCE.get(op, 0) for op in top_operators(text)), default=_TERM)


def top_operators(text: str) -> list[str]:
    """Return the infix operators of ``text`` outside brackets: operators, and nothing else, stand between spaces."""
    depth, outside = 0, []
    for char in text:
        depth += (char in "([") - (char in ")]")
        outside.append(char if depth == 0 and char not in "()[]" else "x")
    return "".join(outside).split(" ")[1::2]


def _is_term(text: str) -> bool:
    return precedence(text) == _TERM


def _literal(value: float) -> str:
    if math.isnan(value):
        return 'float("nan")'
    if math.isinf(value):
        return 'float("inf")' if value > 0 else '-float("inf")'
    return repr(value)


class TritonExpressions(Printer[Plan]):
    """Prints the expressions of one plan, whatever its rows and columns are.

    ``helpers`` collects the names of helper functions the text calls, ``used`` the index variables it reads.
    """

    axes: ClassVar[Mapping[str, tuple[str, Level]]]
    """The variable of each index, and its level."""

    formats: Mapping[str, str] = {
        "add": "{0:5} + {1:5r}",
        "sub": "{0:5} - {1:5r}",
        "mul": "{0:6} * {1:6r}",
        "div": "{0:6} / {1:6r}",
        "neg": "-{0:p}",
        "abs": "tl.abs({0})",
        "pow": "power({0}, {1})",
        "bitand": "{0:3} & {1:3r}",
        "bitor": "{0:1} | {1:1r}",
        "bitxor": "{0:2} ^ {1:2r}",
        "bitnot": "~{0:p}",
        "and": "{0:3} & {1:3r}",
        "or": "{0:1} | {1:1r}",
        "xor": "{0:2} ^ {1:2r}",
        "not": "~{0:p}",
        "lt": "{0:0r} < {1:0r}",
        "le": "{0:0r} <= {1:0r}",
        "gt": "{0:0r} > {1:0r}",
        "ge": "{0:0r} >= {1:0r}",
        "eq": "{0:0r} == {1:0r}",
        "ne": "{0:0r} != {1:0r}",
        "where": "tl.where({0}, {1}, {2})",
        "to_float": "{0:p}.to(tl.float32)",
        "to_bool": "{0:0r} != 0",
        "exp": "tl.exp({0})",
        "exp2": "tl.exp2({0})",
        "expm1": "expm1({0})",
        "log": "tl.log({0})",
        "log2": "tl.log2({0})",
        "log1p": "log1p({0})",
        "sqrt": "tl.sqrt({0})",
        "rsqrt": "tl.rsqrt({0})",
        "sin": "tl.sin({0})",
        "cos": "tl.cos({0})",
        "tan": "tan({0})",
        "atan": "atan({0})",
        "tanh": "tanh({0})",
        "sigmoid": "sigmoid({0})",
        "erf": "tl.erf({0})",
        "floor": "tl.floor({0})",
        "ceil": "tl.ceil({0})",
        "round": "round_half_even({0})",
        "trunc": "truncate({0})",
    }

    def __init__(self, plan: Plan, *, interpreted: bool = False) -> None:
        super().__init__(plan)
        self.helpers: set[str] = set()
        self.used: set[str] = set()
        self.interpreted = interpreted

    def value_name(self, name: str) -> str:
        return safe_name(name)

    # operators

    def operation(self, node: Op, at: Level) -> str:
        special = getattr(self, f"_op_{node.op}", None)
        if special is not None:
            out: str = special(node, at)
        else:
            out = self._apply(self.formats[node.op], node, at)
        return self._for_interpreter(node, out) if self.interpreted and node.type is BOOL else out

    def _for_interpreter(self, node: Op, text: str) -> str:
        """The interpreter stores a scalar comparison in the type of its operands, where ``~`` and ``|`` go wrong."""
        if node.op == "not":
            return f"{_Text(text.removeprefix('~')):0r} == 0"
        if self.plan.level(node) is Level.GRID and node.args[0].type is FLOAT:
            return f"tl.where({text}, 1, 0) != 0"
        return text

    def _apply(self, template: str, node: Op, at: Level) -> str:
        head = template.partition("(")[0]
        if head.isidentifier():
            self.helpers.add(head)
        return template.format(*(_Text(self.argument(node, a, at)) for a in node.args))

    def argument(self, user: Op, arg: Expr, at: Level) -> str:
        if isinstance(arg, Const) or arg in _TILES:  # constants take the width of the other operand
            return self.text(arg, at)
        return super().argument(user, arg, at)

    def _division(self, node: Op, at: Level, exact: str, general: str) -> str:
        dividend, divisor = node.args
        if node.type is FLOAT:
            return self._apply(f"float_{general}({{0}}, {{1}})", node, at)
        if isinstance(divisor, Const) and int(divisor.value) > 0 and int(divisor.value).bit_count() == 1:
            amount = int(divisor.value).bit_length() - 1 if exact == "//" else int(divisor.value) - 1
            text = _Text(self.argument(node, dividend, at))
            return f"{text:4} >> {amount}" if exact == "//" else f"{text:3} & {amount}"
        positive = self.plan.never_zero(divisor) and self.plan.never_negative(divisor)
        if positive and self.plan.never_negative(dividend):
            return self._apply(f"{{0:6}} {exact} {{1:6r}}", node, at)
        kind = f"{general}_positive" if positive else general
        return self._apply(f"{kind}({{0}}, {{1}})", node, at)

    def _op_floordiv(self, node: Op, at: Level) -> str:
        return self._division(node, at, "//", "floor_div")

    def _op_mod(self, node: Op, at: Level) -> str:
        return self._division(node, at, "%", "floor_mod")

    def _extremum(self, node: Op, at: Level, name: str) -> str:
        nan = ", propagate_nan=tl.PropagateNan.ALL" if node.type is FLOAT else ""
        return self._apply(f"tl.{name}({{0}}, {{1}}{nan})", node, at)

    def _op_min(self, node: Op, at: Level) -> str:
        return self._extremum(node, at, "minimum")

    def _op_max(self, node: Op, at: Level) -> str:
        return self._extremum(node, at, "maximum")

    def _op_sign(self, node: Op, at: Level) -> str:
        return self._apply(f"{'float' if node.type is FLOAT else 'int'}_sign({{0}})", node, at)

    def _op_pow(self, node: Op, at: Level) -> str:
        exponent = node.args[1]
        names = {2.0: "square({0})", 3.0: "cube({0})", 1.0: "{0}", 0.5: "tl.sqrt({0})"}
        template = names.get(float(exponent.value)) if isinstance(exponent, Const) else None
        return self._apply(template or self.formats["pow"], node, at)

    def _shift(self, node: Op, at: Level, symbol: str) -> str:
        bits = 31 if self.plan.width(node) is Width.I32 and self.plan.width(node.args[0]) is Width.I32 else 63
        value, distance = (_Text(self.argument(node, a, at)) for a in node.args)
        known = node.args[1]
        if isinstance(known, Const):
            return f"{value:4} {symbol} {min(max(int(known.value), 0), bits)}"
        return f"{value:4} {symbol} tl.minimum(tl.maximum({distance}, 0), {bits})"

    def _op_shl(self, node: Op, at: Level) -> str:
        return self._shift(node, at, "<<")

    def _op_shr(self, node: Op, at: Level) -> str:
        return self._shift(node, at, ">>")

    def _op_to_int(self, node: Op, at: Level) -> str:
        if node.args[0].type is FLOAT:
            text = self._apply("float_to_int({0})", node, at)
        else:
            text = self._apply("{0:p}.to(tl.int32)", node, at)
        return self.convert(text, Width.I32, self.plan.width(node), at)

    # leaves and loads

    def _spread(self, text: str, have: Level, at: Level) -> str:
        """Give a row or column vector the shape of a pair."""
        if at is not Level.PAIR or have in (Level.GRID, Level.PAIR):
            return text
        return f"{_Text(text):p}{'[:, None]' if have is Level.ROW else '[None, :]'}"

    def reference(self, node: Expr, name: str, at: Level) -> str:
        return self._spread(self.value_name(name), self.plan.level(node), at)

    def constant(self, node: Const, at: Level) -> str:
        return _literal(node.value) if node.type is FLOAT else repr(node.value)

    def index(self, node: Index, at: Level) -> str:
        name, level = self.axes[node.axis]
        self.used.add(name)
        return self._spread(name, level, at)

    def size(self, name: str, at: Level) -> str:
        wide = self.plan.width(Size(name)) is Width.I64
        return f"{safe_name(name)}.to(tl.int64)" if wide else safe_name(name)

    def parameter(self, node: Param, at: Level) -> str:
        name = safe_name(node.name)
        if node.type is BOOL:
            return f"{name} != 0"
        return f"{name}.to(tl.int64)" if node.type is INT and self.plan.width(node) is Width.I64 else name

    def convert(self, text: str, have: Width, want: Width, at: Level) -> str:
        if have is want:
            return text
        return f"{_Text(text):p}.to({_INT_TYPES[want]})"

    def load(self, node: Load, at: Level) -> str:
        name = safe_name(node.tensor)
        parts: dict[Level, list[str]] = {level: [] for level in Level}
        guards = self.plan.load_guards(node)
        for dim, (index, guard) in enumerate(zip(node.indices, guards, strict=True)):
            level = self.plan.level(index)
            text = self._position(index, f"{name}_size{dim}", guard, level)
            parts[level].append(f"{_Text(text):6} * {name}_stride{dim}")
        offsets = []
        for level, terms in parts.items():
            if terms:
                offsets.append(self._spread(" + ".join(terms), level, at))
        address = " + ".join([f"{name}_ptr", *offsets])
        return self._loaded(node, f"tl.load({address})")

    def _position(self, index: Expr, size: str, guard: tuple[bool, bool], level: Level) -> str:
        """Print one index of a load, clamped where no proof says that it is inside, in the width of an offset."""
        text = self.text(index, level)
        if isinstance(index, Const):
            text = repr(min(max(int(index.value), 0), 2**31 - 1))
            low, high = False, int(index.value) > 0
        else:
            low, high = guard
        if low:
            text = f"tl.maximum({text}, 0)"
        if high:
            text = f"tl.minimum({text}, {size} - 1)"
        if isinstance(index, Const) and not high:
            return text
        want = Width.I64 if self.plan.wide or level is Level.GRID else Width.I32
        have = self.plan.width(index)
        if isinstance(index, Const):
            have = Width.I32
        return self.convert(text, have, want, level)

    def _loaded(self, node: Load, text: str) -> str:
        """Convert a loaded element to the width the plan computes with."""
        dtype = next(t.dtype for t in self.plan.tensors if t.name == node.tensor)
        want = self.plan.width(node)
        if want is Width.BOOL:
            return f"{text} != 0"
        return text if _NATIVE.get(dtype) is want else f"{text}.to({_LOAD_TO[want]})"


class TritonPrinter(TritonExpressions[KernelPlan]):
    """Prints the plan of a kernel over pairs."""

    axes: ClassVar[Mapping[str, tuple[str, Level]]] = {
        "b": ("b", Level.GRID),
        "h": ("h", Level.GRID),
        "q": ("q_idx", Level.ROW),
        "k": ("k_idx", Level.COL),
        "d": ("d_", Level.GRID),
    }

    def _op_to_float(self, node: Op, at: Level) -> str:
        distance = self._distance(node.args[0], at)
        return distance or self._apply(self.formats["to_float"], node, at)

    def _distance(self, node: Expr, at: Level) -> str | None:
        """Print q - k, k - q or their size as the difference of two float vectors relative to the tile.

        The vectors are exact, so the result is rounded once; the obvious text converts a whole tile of integers.
        """
        if at is not Level.PAIR or node in self.plan.names or not isinstance(node, Op):
            return None
        if node.op == "abs":
            inner = self._distance(node.args[0], at)
            return f"tl.abs({inner})" if inner else None
        if node.op != "sub" or not all(isinstance(a, Index) for a in node.args):
            return None
        vectors = {"q": "q_distance[:, None]", "k": "k_distance[None, :]"}
        texts = [vectors.get(a.axis) for a in node.args if isinstance(a, Index)]
        if None in texts:
            return None
        self.used.add("k_distance")
        return f"({texts[0]} - {texts[1]})"

    def input(self, node: Input, at: Level) -> str:
        if "d" in node.axes:
            return self._spread(f"{node.name}_", Level.ROW if "q" in node.axes else Level.COL, at)
        return _TILES.get(node, node.name)
