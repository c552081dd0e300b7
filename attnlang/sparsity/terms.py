"""Terms: the form of a mask in which tiles are classified.

Sizes and parameters are known when a map is made, so an int expression becomes a :class:`Linear` form over *nodes* that
are not linear (an index, a floor division, a load). Uses of one index meet in one form and cancel (``q - k`` twice or
``q - (q - 3)``), and a comparison becomes "form < 0" or "form = 0", decided on the difference. The builder also

* turns ``abs``, ``min``, ``max`` and ``where`` under a comparison into and/or/ite of linear comparisons,
* pushes negation to the leaves and flattens and/or,
* takes multiples of the divisor out of ``//`` and ``%`` and knows congruences (``2*q == 2*k + 1`` is never true),
* bounds every node over the whole problem; what is decided there is a constant.

A linear form exists only where the bounds prove that nothing on the way to it leaves int64, so linear algebra on it
means the same as the wrapping arithmetic of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from attnlang.ir import BOOL, FLOAT, INT, Const, Expr, Index, Load, Op, Param, Scalar, Size, Type, UsageError, postorder
from attnlang.passes.intervals import INF, NARROW_LIMIT, Interval, Python, Truth

from .captured import Captured
from .domain import apply

__all__ = ["AXIS_BITS", "Linear", "Node", "Ref", "Terms"]

AXIS_BITS = {"b": 1, "h": 2, "q": 4, "k": 8}
EXPANSIONS = 64  # comparisons that may be split into cases, so that no program grows exponentially


class Linear(NamedTuple):
    """``const + sum(coefficient * node)``; terms are (node id, coefficient), sorted, without zeros."""

    const: int
    terms: tuple[tuple[int, int], ...] = ()


Ref: TypeAlias = int
Arg: TypeAlias = Linear | int


@dataclass(frozen=True)
class Node:
    """One non-linear value. ``args`` are Linear (ints) or ids of bool and float nodes.

    ``range`` holds over the whole problem; ``reads`` are the axes it depends on; ``varies`` those along which a smaller
    tile would have a smaller range; ``step``: the value is ``step[1]`` modulo ``step[0]`` (0: it is that number);
    ``integral``: a float that is a whole number in every backend.
    """

    op: str
    args: tuple[Arg, ...]
    type: Type
    range: Any
    reads: int = 0
    varies: int = 0
    step: tuple[int, int] = (1, 0)
    integral: bool = False
    data: Any = None


def _bounded(r: Interval) -> bool:
    return r.lo > -INF and r.hi < INF


class Terms:
    """Builds and interns nodes for one mask at known sizes, parameters and captured tensors."""

    def __init__(
        self,
        extents: Mapping[str, int],
        sizes: Mapping[str, int],
        params: Mapping[str, Scalar],
        tensors: Mapping[str, Captured],
        tile: tuple[int, int],
    ) -> None:
        self.nodes: list[Node] = []
        self.sizes, self.params, self.tensors, self.tile = sizes, params, tensors, tile
        self._ids: dict[Any, int] = {}
        self._budget = EXPANSIONS
        self.axes = {
            axis: self._add(
                Node("index", (), INT, Interval(0, max(extents[axis] - 1, 0)), bit, bit & 12, (1, 0), data=axis)
            )
            for axis, bit in AXIS_BITS.items()
        }
        self.true, self.false = self._const(True), self._const(False)

    # --- nodes

    def _add(self, node: Node) -> int:
        key = (node.op, node.args, node.type, node.data)
        if key not in self._ids:
            self._ids[key] = len(self.nodes)
            self.nodes.append(node)
        return self._ids[key]

    def _const(self, value: bool) -> int:
        return self._add(Node("const", (), BOOL, Truth(value, not value), data=value))

    def value(self, arg: Arg) -> Any:
        """The range of an argument over the whole problem."""
        if not isinstance(arg, Linear):
            return self.nodes[arg].range
        lo = hi = arg.const
        for ref, c in arg.terms:
            r = self.nodes[ref].range
            lo, hi = lo + (c * r.lo if c > 0 else c * r.hi), hi + (c * r.hi if c > 0 else c * r.lo)
        return Interval(max(lo, -INF), min(hi, INF))

    def _flags(self, args: tuple[Arg, ...]) -> tuple[int, int]:
        reads = varies = 0
        for arg in args:
            for ref in [r for r, _ in arg.terms] if isinstance(arg, Linear) else [arg]:
                reads |= self.nodes[ref].reads
                varies |= self.nodes[ref].varies
        return reads, varies

    def _make(self, op: str, args: tuple[Arg, ...], type_: Type, **extra: Any) -> int:
        """Intern a node; its range comes from the same rules that classify tiles."""
        reads, varies = self._flags(args)
        node = Node(op, args, type_, None, reads, varies, **extra)
        with np.errstate(all="ignore"):
            found = apply(Python, node, [self.value(a) for a in args], None)
        return self._add(Node(op, args, type_, found, reads, varies, **extra))

    def _bool(self, op: str, args: tuple[Arg, ...], data: Any = None) -> int:
        ref = self._make(op, args, BOOL, data=data)
        t = self.nodes[ref].range
        return self.true if not t.false else self.false if not t.true else ref

    # --- linear forms

    def _single(self, ref: int) -> Linear:
        r = self.nodes[ref].range
        return Linear(int(r.lo)) if r.lo == r.hi and _bounded(r) else Linear(0, ((ref, 1),))

    def _combine(self, a: Linear, b: Linear, scale: int) -> Linear | None:
        """``a + scale * b``, or None if something could leave int64."""
        if not (_bounded(self.value(a)) and _bounded(self.value(b))):
            return None
        terms = dict(a.terms)
        for ref, c in b.terms:
            terms[ref] = terms.get(ref, 0) + scale * c
        out = Linear(a.const + scale * b.const, tuple(sorted((r, c) for r, c in terms.items() if c)))
        return out if _bounded(self.value(out)) and all(abs(c) < 2**31 for _, c in out.terms) else None

    def step(self, form: Linear) -> tuple[int, int]:
        """The congruence of a linear form."""
        m, r = 0, form.const
        for ref, c in form.terms:
            sm, sr = self.nodes[ref].step
            m, r = math.gcd(m, c * sm), r + c * sr
        return m, (r % m if m else r)

    def _integer(self, op: str, args: tuple[Arg, ...]) -> Linear:
        a, b = args[0], args[-1]
        if isinstance(a, Linear) and isinstance(b, Linear):
            found: Linear | None = None
            match op:
                case "add":
                    found = self._combine(a, b, 1)
                case "sub":
                    found = self._combine(a, b, -1)
                case "neg":
                    found = self._combine(Linear(0), a, -1)
                case "mul" if not a.terms and abs(a.const) < 2**31:
                    found = self._combine(Linear(0), b, a.const)
                case "mul" if not b.terms and abs(b.const) < 2**31:
                    found = self._combine(Linear(0), a, b.const)
                case "floordiv" | "mod" if not b.terms and b.const > 0:
                    return self._divide(op, a, b.const)
            if found is not None:
                return found
        return self._single(self._make(op, args, INT))

    def _divide(self, op: str, a: Linear, c: int) -> Linear:
        """``a // c`` and ``a % c`` for a constant c > 0, with the multiples of c taken out of ``a``."""
        if not _bounded(self.value(a)):
            return self._single(self._make(op, (a, Linear(c)), INT))
        whole = Linear(a.const // c, tuple((r, f // c) for r, f in a.terms if f % c == 0))
        rest = Linear(a.const % c, tuple((r, f) for r, f in a.terms if f % c))
        m, r = self.step(rest)
        known = self.value(rest)
        if known.lo // c == known.hi // c:  # one quotient over the whole problem
            if op == "mod":
                return Linear(rest.const - known.lo // c * c, rest.terms)
            return Linear(whole.const + known.lo // c, whole.terms)
        inner = self._inner(op, rest, c)
        if inner is not None:
            rest, c = inner
        if op == "mod":
            g = math.gcd(m, c)
            if g == c:
                return Linear(r % c)
            fixed = self._saturated(rest, c)
            ref = self._make("mod", (rest, Linear(c)), INT, step=(g, r % g))
            if fixed and self.nodes[ref].varies:
                node = self.nodes[ref]
                self.nodes[ref] = Node(node.op, node.args, INT, node.range, node.reads, 0, node.step)
            return self._single(ref)
        quotient = self._single(self._make("floordiv", (rest, Linear(c)), INT))
        out = self._combine(quotient, whole, 1)
        return out if out is not None else self._single(self._make(op, (a, Linear(c)), INT))

    def _inner(self, op: str, form: Linear, c: int) -> tuple[Linear, int] | None:
        """Merge a division into the one below it: ``x // a // c`` and ``x % (n * c) % c``."""
        if form.const or len(form.terms) != 1 or form.terms[0][1] != 1:
            return None
        node = self.nodes[form.terms[0][0]]
        if node.op != op:
            return None
        below, divisor = node.args
        assert isinstance(below, Linear) and isinstance(divisor, Linear)
        if divisor.terms or divisor.const <= 0 or not _bounded(self.value(below)):
            return None
        if op == "floordiv":
            return (below, divisor.const * c) if divisor.const * c < NARROW_LIMIT else None
        return (below, c) if divisor.const % c == 0 else None

    def _saturated(self, form: Linear, c: int) -> bool:
        """Whether ``form % c`` takes its whole range in every full tile, so that smaller tiles tell no more."""
        size = {self.axes["q"]: self.tile[0], self.axes["k"]: self.tile[1]}
        return sum((size.get(ref, 1) - 1) * abs(f) for ref, f in form.terms) + 1 >= c

    # --- comparisons

    def _less(self, a: Linear, b: Linear, less: str) -> int:
        """``a < b`` or ``a <= b``."""
        form = self._combine(a, b, -1)
        if form is None:
            return self._bool(less, (a, b))
        return self.below(form if less == "lt" else Linear(form.const - 1, form.terms))

    def below(self, form: Linear) -> int:
        """``form < 0``."""
        if not form.terms:
            return self.true if form.const < 0 else self.false
        g = math.gcd(*(c for _, c in form.terms))
        form = Linear(-((-form.const - 1) // g) - 1, tuple((r, c // g) for r, c in form.terms))
        for ref, c in form.terms:
            node = self.nodes[ref]
            if node.op in ("abs", "min", "max", "where") and self._budget > 0:
                self._budget -= 1
                low, high = self._cases(form, ref, c)
                if low is None or high is None:
                    break
                if node.op == "where":
                    return self._ite(self._cond(node), self.below(low), self.below(high))
                conjunction = (c > 0) == (node.op in ("abs", "max"))
                return self._many("and" if conjunction else "or", [self.below(low), self.below(high)])
        return self._bool("lt0", (form,))

    def _cases(self, form: Linear, ref: int, c: int) -> tuple[Linear | None, Linear | None]:
        """``form`` with the node replaced by each of the two values it may have."""
        node = self.nodes[ref]
        rest = Linear(form.const, tuple(t for t in form.terms if t[0] != ref))
        values = [a for a in node.args if isinstance(a, Linear)]
        if node.op == "abs":
            return self._combine(rest, values[0], c), self._combine(rest, values[0], -c)
        return self._combine(rest, values[0], c), self._combine(rest, values[1], c)

    def _cond(self, node: Node) -> int:
        (ref,) = (a for a in node.args if not isinstance(a, Linear))
        return ref

    def _equal(self, a: Linear, b: Linear) -> int:
        form = self._combine(a, b, -1)
        return self._bool("eq", (a, b)) if form is None else self._zero(form)

    def _zero(self, form: Linear) -> int:
        """``form == 0``."""
        if not form.terms:
            return self.true if form.const == 0 else self.false
        m, r = self.step(form)
        if r % m if m else r:
            return self.false
        g = math.gcd(*(c for _, c in form.terms))
        if form.const % g:
            return self.false
        if form.terms[0][1] < 0:
            g = -g
        form = Linear(form.const // g, tuple((ref, c // g) for ref, c in form.terms))
        form = self._without_abs(form)
        for ref, c in form.terms:
            node = self.nodes[ref]
            if node.op == "where" and self._budget > 0:
                self._budget -= 1
                low, high = self._cases(form, ref, c)
                if low is not None and high is not None:
                    return self._ite(self._cond(node), self._zero(low), self._zero(high))
        return self._bool("eq0", (form,))

    def _without_abs(self, form: Linear) -> Linear:
        """``abs(x) % c == 0`` is ``x % c == 0``, which does not fold the tile at the diagonal."""
        if form.const == 0 and len(form.terms) == 1 and self.nodes[form.terms[0][0]].op == "mod":
            inner, divisor = self.nodes[form.terms[0][0]].args
            assert isinstance(inner, Linear) and isinstance(divisor, Linear)
            if not divisor.terms and divisor.const > 0 and inner.const == 0 and len(inner.terms) == 1:
                node = self.nodes[inner.terms[0][0]]
                if node.op == "abs" and isinstance(node.args[0], Linear) and abs(inner.terms[0][1]) == 1:
                    return self._divide("mod", node.args[0], divisor.const)
        return form

    # --- logic

    def negate(self, ref: int) -> int:
        node = self.nodes[ref]
        match node.op:
            case "const":
                return self.false if node.data else self.true
            case "not":
                return int(node.args[0])  # type: ignore[arg-type]
            case "lt0":
                (form,) = node.args
                assert isinstance(form, Linear)
                out = self._combine(Linear(-1), form, -1)
                return self._bool("not", (ref,)) if out is None else self._bool("lt0", (out,))
            case "and" | "or":
                return self._many("or" if node.op == "and" else "and", [self.negate(int(a)) for a in node.args])  # type: ignore[arg-type]
        return self._bool("not", (ref,))

    def _many(self, op: str, refs: list[int]) -> int:
        """N-ary and/or: flattened, without duplicates, constants folded."""
        unit, zero = (self.true, self.false) if op == "and" else (self.false, self.true)
        flat: dict[int, None] = {}
        for ref in refs:
            node = self.nodes[ref]
            for part in node.args if node.op == op else (ref,):
                flat[int(part)] = None  # type: ignore[arg-type]
        flat.pop(unit, None)
        if zero in flat:
            return zero
        if len(flat) <= 1:
            return next(iter(flat), unit)
        return self._bool(op, tuple(flat))

    def _ite(self, c: int, a: int, b: int) -> int:
        if c in (self.true, self.false) or a == b:
            return a if c != self.false else b
        return self._bool("ite", (c, a, b))

    def _logic(self, op: str, args: list[int]) -> int:
        match op:
            case "and" | "or":
                return self._many(op, args)
            case "not":
                return self.negate(args[0])
            case "xor":
                a, b = args
                if a == b:
                    return self.false
                for x, y in ((a, b), (b, a)):
                    if x in (self.true, self.false):
                        return self.negate(y) if x == self.true else y
                return self._bool("xor", (a, b))
        return self._ite(*args)

    # --- expressions

    def _leaf(self, node: Expr) -> Arg:
        match node:
            case Const(value=value):
                return self._number(value, node.type)
            case Index(axis=axis):
                return self._single(self.axes[axis])
            case Size(name=name):
                if name not in self.sizes:
                    raise UsageError(f"size {name!r} has no value; give it one to analyse the mask")
                return self._number(self.sizes[name], INT)
            case Param(name=name, type=type_):
                if name not in self.params:
                    raise UsageError(f"parameter {name!r} has no value; give it one to analyse the mask")
                return self._number(self.params[name], type_)
        raise UsageError(f"a mask cannot read {node!r}: only indices, sizes, parameters and captured tensors")

    def _number(self, value: Scalar, type_: Type) -> Arg:
        if type_ is BOOL:
            return self.true if value else self.false
        if type_ is FLOAT:
            number = float(value)
            return self._make("const", (), FLOAT, data=number.hex(), integral=number.is_integer())
        number = int(value)
        if abs(number) < INF:
            return Linear(number)
        return Linear(0, ((self._make("far", (), INT, data=number), 1),))

    def _load(self, node: Load, args: tuple[Linear, ...]) -> Arg:
        tensor = self.tensors[node.tensor]
        reads, varies = self._flags(args)
        found = tensor.whole
        ref = self._add(Node("load", args, node.type, found, reads, varies, data=node.tensor))
        if node.type is INT:
            return self._single(ref)
        if node.type is BOOL:
            return self.true if not found.false else self.false if not found.true else ref
        return ref

    def _op(self, node: Op, args: list[Any]) -> Arg:
        kind, name = node.args[0].type, node.op
        if name in ("lt", "le", "gt", "ge", "eq", "ne") and kind is INT:
            match name:
                case "lt" | "le":
                    return self._less(args[0], args[1], name)
                case "gt" | "ge":
                    return self._less(args[1], args[0], "lt" if name == "gt" else "le")
                case "eq":
                    return self._equal(args[0], args[1])
            return self.negate(self._equal(args[0], args[1]))
        if node.type is INT:
            if name == "to_int" and kind is INT:
                return args[0]
            if name == "where" and args[0] in (self.true, self.false):
                return args[1] if args[0] == self.true else args[2]
            return self._integer(name, tuple(args))
        if name == "to_bool":
            return self.negate(self._equal(args[0], Linear(0))) if kind is INT else self._bool("nonzero", tuple(args))
        if name == "to_float" and kind is FLOAT:
            return args[0]
        if node.type is BOOL and kind is BOOL:
            return self._logic(name, args)
        if node.type is BOOL:
            return self._bool("f" + name, tuple(args))
        floats = [self.nodes[a] for a in args if not isinstance(a, Linear) and self.nodes[a].type is FLOAT]
        whole = name in ("floor", "ceil", "round", "trunc", "sign", "to_float") or (
            name in ("add", "sub", "mul", "neg", "abs", "min", "max", "where") and all(f.integral for f in floats)
        )
        return self._make("f" + name, tuple(args), FLOAT, integral=whole)

    def build(self, mask: Expr) -> int:
        """Return the id of the node for a boolean expression.

        Raises:
            UsageError: a size, parameter or tensor is missing, or the expression reads scores.
        """
        done: dict[Expr, Arg] = {}
        for node in postorder(mask):
            args = [done[a] for a in node.args]
            match node:
                case Op():
                    done[node] = self._op(node, args)
                case Load(tensor=name):
                    if name not in self.tensors:
                        raise UsageError(f"captured tensor {name!r} has no value; give it one to analyse the mask")
                    done[node] = self._load(node, tuple(args))  # type: ignore[arg-type]
                case _:
                    done[node] = self._leaf(node)
        ref = done[mask]
        assert not isinstance(ref, Linear)
        return ref
