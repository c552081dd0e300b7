"""Broken versions of every part of the domain above the tables of rules, by the dotted name of the part.

Each makes its part a little too sure of itself, or plainly wrong. HARMLESS names what cannot make a claim wrong, and
why; tests/sparsity/test_mutations.py asserts that every function is in one of the two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from attnlang.ir import BOOL, INT, Size
from attnlang.ir.build import op
from attnlang.passes.intervals import Interval, Truth
from attnlang.sparsity import captured, classify, domain, terms
from attnlang.sparsity.classify import Boxes
from attnlang.sparsity.terms import Linear

__all__ = ["HARMLESS", "MUTANTS", "OWNERS", "narrower", "surer"]

Wrap = Callable[[Any], Any]

OWNERS: dict[str, Any] = {
    "Terms": terms.Terms,
    "Captured": captured.Captured,
    "Line": captured._Line,
    "captured": captured,
    "CapturedCells": captured.CapturedCells,
    "cells": sys.modules["attnlang.sparsity.cells"],
    "Classifier": classify.Classifier,
    "domain": domain,
    "terms": terms,
    "classify": classify,
    "descend": sys.modules["attnlang.sparsity.descend"],
    "refine": sys.modules["attnlang.sparsity.refine"],
}


def narrower(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule with its upper bound one too low wherever the interval has room."""

    def broken(*args: Any) -> Any:
        lo, hi = rule(*args)
        return Interval(lo, hi - (hi > lo))

    return broken


def surer(rule: Callable[..., Truth]) -> Callable[..., Truth]:
    """The comparison that is never undecided."""

    def broken(*args: Any) -> Truth:
        true, false = rule(*args)
        return Truth(true, false & (true == False))  # noqa: E712 - elementwise on arrays

    return broken


def first(r: Interval) -> Interval:
    return Interval(r.lo, r.lo)


def shifted(form: Any) -> Any:
    return Linear(form.const + 1, form.terms) if isinstance(form, Linear) else form


def less_room(found: Any) -> Any:
    """An interval with a lower upper bound; anything else as it is."""
    return Interval(found.lo, found.hi - (found.hi > found.lo)) if type(found) is Interval else found


def lossy_combine(old: Any) -> Any:
    def combine(self: Any, a: Any, b: Any, scale: int) -> Any:
        out = old(self, a, b, scale)
        return out._replace(const=out.const - 1) if out is not None and len(out.terms) > 1 else out

    return combine


def interned_without_data(old: Any) -> Any:
    def add(self: Any, node: Any) -> int:
        key = (node.op, node.args, node.type) if node.op == "load" else (node.op, node.args, node.type, node.data)
        if key not in self._ids:
            self._ids[key] = len(self.nodes)
            self.nodes.append(node)
        return int(self._ids[key])

    return add


def narrow_node(old: Any) -> Any:
    def make(self: Any, name: str, args: Any, type_: Any, **extra: Any) -> int:
        ref = old(self, name, args, type_, **extra)
        self.nodes[ref] = replace(self.nodes[ref], range=less_room(self.nodes[ref].range))
        return int(ref)

    return make


def hasty_bool(old: Any) -> Any:
    def make(self: Any, name: str, args: Any, data: Any = None) -> int:
        ref = old(self, name, args, data)
        return int(self.true if name == "eq0" and self.nodes[ref].range.true else ref)

    return make


def hasty_constant(old: Any) -> Any:
    def single(self: Any, ref: int) -> Any:
        r = self.nodes[ref].range
        return Linear(int(r.lo)) if r.hi - r.lo == 1 else old(self, ref)

    return single


def greedy_inner(old: Any) -> Any:
    def inner(self: Any, name: str, form: Any, c: int) -> Any:
        found = old(self, name, form, c)
        if found is not None and name == "floordiv":
            return found[0], found[1] + 1
        return found

    return inner


def deaf_abs(old: Any) -> Any:
    def without(self: Any, form: Any) -> Any:
        for ref, c in form.terms:
            node = self.nodes[ref]
            if node.op == "abs" and isinstance(node.args[0], Linear):
                rest = Linear(form.const, tuple(t for t in form.terms if t[0] != ref))
                return self._combine(rest, node.args[0], c) or form
        return old(self, form)

    return without


def one_more(old: Any) -> Any:
    return lambda self, node: shifted(old(self, node)) if isinstance(node, Size) else old(self, node)


def ge_as_gt(old: Any) -> Any:
    return lambda self, node, args: old(self, op("gt", *node.args) if node.op == "ge" else node, args)


def turned_load(old: Any) -> Any:
    return lambda self, node, args: old(self, node, args[::-1])


def half(old: Any) -> Any:
    """Bisection that forgets the upper halves."""

    def bisect(boxes: Any, tile: Any, marks: Any) -> Any:
        out, owner = old(boxes, tile, marks)
        keep = np.arange(len(boxes))
        return refine_take(out, keep), owner[keep]

    refine_take = OWNERS["refine"]._take
    return bisect


def fewer(old: Any) -> Any:
    """Cutting that loses the last part."""

    def cut(*args: Any) -> Any:
        level = old(*args)
        return level.take(np.arange(max(len(level) - 1, 1)))

    return cut


def short_boxes(old: Any) -> Any:
    def boxes(*args: Any) -> Any:
        b = old(*args)
        return Boxes(b.b, b.h, b.q, Interval(b.k.lo, np.maximum(b.k.lo, b.k.hi - 1)))

    return boxes


def narrow_pack(old: Any) -> Any:
    return lambda self, lo, hi: less_room(old(self, lo, hi))


def whole(old: Any) -> Any:
    return property(lambda self: less_room(old.func(self)))


def hidden_by_nan(old: Any) -> Any:
    return property(lambda self: (self.values, self.values))


def rolled(old: Any) -> Any:
    return lambda self, *args: np.roll(old(self, *args), 1, axis=-1)


MUTANTS: dict[str, Wrap] = {
    "Terms._add": interned_without_data,
    "Terms._const": lambda old: lambda self, value: old(self, True),
    "Terms.value": lambda old: lambda self, arg: less_room(old(self, arg)),
    "Terms._flags": lambda old: lambda self, args: (old(self, args)[0] & ~1, old(self, args)[1]),
    "Terms._make": narrow_node,
    "Terms._bool": hasty_bool,
    "Terms._single": hasty_constant,
    "Terms._combine": lossy_combine,
    "Terms.step": lambda old: lambda self, f: (old(self, f)[0], old(self, f)[1] + (old(self, f)[0] > 1)),
    "Terms._integer": lambda old: lambda self, name, args: old(self, "max" if name == "min" else name, args),
    "Terms._divide": lambda old: lambda self, name, a, c: shifted(old(self, name, a, c)),
    "Terms._inner": greedy_inner,
    "Terms._less": lambda old: lambda self, a, b, less: old(self, a, b, "le"),
    "Terms.below": lambda old: lambda self, form: old(self, shifted(form)),
    "Terms._cases": lambda old: lambda self, form, ref, c: (old(self, form, ref, c)[0],) * 2,
    "Terms._cond": lambda old: lambda self, node: self.negate(old(self, node)),
    "Terms._equal": lambda old: lambda self, a, b: old(self, shifted(a), b),
    "Terms._zero": lambda old: lambda self, form: old(self, shifted(form)),
    "Terms._without_abs": deaf_abs,
    "Terms.negate": lambda old: lambda self, ref: ref if self.nodes[ref].op in ("and", "or") else old(self, ref),
    "Terms._many": lambda old: lambda self, name, refs: old(self, name, refs[:-1]),
    "Terms._ite": lambda old: lambda self, c, a, b: old(self, c, b, a),
    "Terms._logic": lambda old: lambda self, name, args: old(self, "or" if name == "xor" else name, args),
    "Terms._leaf": one_more,
    "Terms._number": lambda old: lambda self, value, type_: shifted(old(self, value, type_)),
    "Terms._load": turned_load,
    "Terms._op": ge_as_gt,
    "Terms.build": lambda old: lambda self, mask: self.negate(old(self, mask)),
    "Captured.nan": lambda old: property(lambda self: False),
    "Captured._sorted_values": hidden_by_nan,
    "Captured.whole": whole,
    "Captured._pack": narrow_pack,
    "Captured.query": lambda old: lambda self, ranges, count: old(self, [first(r) for r in ranges], count),
    "Captured._clamp": lambda old: staticmethod(
        lambda r, n: Interval(np.minimum(np.abs(r.lo), n - 1), np.minimum(np.abs(r.hi), n - 1))
    ),
    "Captured._row": lambda old: lambda self, ranges, axis: 0 * old(self, ranges, axis),
    "Captured._along": rolled,
    "Captured._line": lambda old: lambda self, ranges, axis: old(self, [first(r) for r in ranges], axis),
    "Captured._flat": rolled,
    "Captured._memo": lambda old: lambda self, key, make: old(self, key[:1], make),
    "Captured._monotone": lambda old: lambda self, axis: 1,
    "Captured._counts": lambda old: lambda self, axis: np.minimum(old(self, axis), 3),
    "Captured._extremes": lambda old: lambda self, axis: old(self, axis)[:1] * 2,
    "Captured._box": lambda old: lambda self, ranges: old(self, [first(r) for r in ranges]),
    "Captured._sums": lambda old: lambda self, ranges: old(self, [first(r) for r in ranges]),
    "Captured._area": lambda old: lambda self, name, flags, at: old(self, name, flags, [first(r) for r in at]),
    "captured._volume": lambda old: lambda ranges: old(ranges) - 1,
    "captured._cells_of": lambda old: lambda r: first(old(r)),
    "CapturedCells.query": lambda old: lambda self, ranges, count: old(self, [first(r) for r in ranges], count),
    "CapturedCells._line": lambda old: lambda self, ranges, axis: old(self, [first(r) for r in ranges], axis),
    "CapturedCells._sums": surer,
    "cells.cells": lambda old: lambda t, type_: replace(old(t, type_), high=old(t, type_).low),
    "cells._strips": lambda old: lambda t: (strip.flip(-2) for strip in old(t)),
    "cells._reduced": lambda old: lambda t, dim, fn: old(t, dim, fn).roll(1, dim),
    "Captured._cell_query": lambda old: lambda self, side, ranges: old(self, side, [first(r) for r in ranges]),
    "Captured._cell": rolled,
    "Line.query": lambda old: lambda self, row, lo, hi: old(self, row, lo, lo),
    "captured._numbers": lambda old: lambda t, type_: old(t, type_) if type_ is BOOL else np.abs(old(t, type_)),
    "Classifier.reads": lambda old: property(lambda self: 12),
    "Classifier.reads_axis": lambda old: lambda self, axis: False,
    "Classifier._form": lambda old: lambda self, form, values: less_room(old(self, form, values)),
    "Classifier.values": lambda old: lambda self, b: old(self, Boxes(b.b, b.h, first(b.q), b.k)),
    "Classifier.classify": lambda old: surer(old),
    "Classifier.decide": lambda old: surer(old),
    "domain._as_bit": lambda old: lambda xp, a: first(old(xp, a)),
    "domain._bool_to_float": lambda old: lambda a: old(a)._replace(hi=old(a).lo),
    "domain._select_float": lambda old: lambda c, a, b: a,
    "domain._truth": lambda old: surer(old),
    "domain._float": lambda old: lambda node, args: old(node, args)._replace(hi=old(node, args).lo),
    "domain.apply": lambda old: lambda *args: less_room(old(*args)) if args[1].type is INT else old(*args),
    "descend._cut": fewer,
    "descend._split": fewer,
    "descend._boxes": short_boxes,
    "refine._bisect": half,
}

HARMLESS = {
    "terms._bounded": "tested with numbers at the edge of int64 (test_hostile_sizes.py)",
    "classify.prepare": "arguments in, summaries out",
    "classify.numbers": "arguments in, numbers out",
    "classify.classify_tile": "one box of what the parts above classify",
    "domain._conjunction": "a rule of TRUTH_RULES, broken there",
    "domain._disjunction": "a rule of TRUTH_RULES, broken there",
    "Terms._saturated": "only says where smaller tiles are worth trying",
    "cells.is_large": "a table may be summarised either way",
    "Captured.all_mixed": "only says where smaller tiles are worth trying",
    "Classifier._load_wish": "only says where smaller tiles are worth trying",
    "Classifier._moves": "only says where smaller tiles are worth trying",
    "Classifier.wishes": "only says where smaller tiles are worth trying",
    "Classifier.nodes": "the list itself",
    "Classifier._needed": "a node it leaves out is missed at once",
    "Classifier._fits_int32": "tested with numbers at the edge of int32 (test_hostile_sizes.py)",
    "descend._fields": "the record as a tuple",
    "descend.descend": "the loop around the parts above",
    "refine.steps": "any cut is right; this finds good ones",
    "refine._halves": "any cut is right; this finds good ones",
    "refine._corners": "what they see can only leave a tile partial",
    "refine._take": "an index into a record",
    "refine.refine": "the loop around the parts above",
}
"""Functions that cannot make a claim wrong, and why."""
