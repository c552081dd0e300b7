"""Hypothesis strategies for random typed expressions over the whole operator table."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from attnlang.ir import BOOL, FLOAT, INT, OPS, Const, Expr, Load, Size, Type
from attnlang.ir.build import b, h, k, op, q, s

LEAF_INTS: Sequence[Expr] = (b, h, q, k, Size("Lq"), Size("Lk"), Size("B"), Size("H"))
TENSORS = {"doc": (INT, ("q",)), "flag": (BOOL, ("k",)), "table": (FLOAT, ("h", "k")), "pair": (INT, ("q", "k"))}
AXIS = {"b": b, "h": h, "q": q, "k": k}


def constants(kind: Type) -> st.SearchStrategy[Expr]:
    if kind is BOOL:
        return st.booleans().map(lambda v: Const(v, BOOL))
    if kind is INT:
        return st.integers(-9, 40).map(lambda v: Const(v, INT))
    return st.floats(-3, 3, width=32).map(lambda v: Const(v, FLOAT))


def loads(kind: Type) -> list[Expr]:
    return [Load(n, tuple(AXIS[a] for a in axes), t) for n, (t, axes) in TENSORS.items() if t is kind]


def leaves(kind: Type, *, score: bool) -> st.SearchStrategy[Expr]:
    options = [constants(kind)]
    fixed = loads(kind)
    if kind is INT:
        fixed += [*LEAF_INTS, q, k, q, k]
    if kind is FLOAT and score:
        fixed += [s, s, s]
    if fixed:
        options.append(st.sampled_from(fixed))
    return st.one_of(options)


def expressions(kind: Type, depth: int = 4, *, score: bool = False, ops: Sequence[str] | None = None):
    """Random expressions of type ``kind``; ``score`` lets them read ``s``."""
    names = [n for n in OPS if ops is None or n in ops]

    def candidates(result: Type) -> list[tuple[str, Type]]:
        out = []
        for name in names:
            spec = OPS[name]
            for shared in (INT, FLOAT) + ((BOOL,) if "x" in spec.args else ()):
                if shared is BOOL and "n" in spec.args:
                    continue
                got = spec.result if isinstance(spec.result, Type) else shared
                if got is result and ("n" in spec.args or "x" in spec.args or shared is INT):
                    out.append((name, shared))
        return out

    def build(result: Type, level: int) -> st.SearchStrategy[Expr]:
        leaf = leaves(result, score=score)
        options = candidates(result)
        if level == 0 or not options:
            return leaf

        def apply(choice: tuple[str, Type]) -> st.SearchStrategy[Expr]:
            name, shared = choice
            fixed = {"i": INT, "f": FLOAT, "b": BOOL}
            kinds = [fixed.get(c, shared) for c in OPS[name].args]
            return st.tuples(*(build(t, level - 1) for t in kinds)).map(lambda args: op(name, *args))

        return st.one_of(leaf, st.sampled_from(options).flatmap(apply), st.sampled_from(options).flatmap(apply))

    return build(kind, depth)
