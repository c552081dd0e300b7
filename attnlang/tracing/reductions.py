"""Reductions and products over small dimensions of traced arrays, unrolled into scalar expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

from attnlang.ir import BOOL, FLOAT, INT, Const, Expr, Type
from attnlang.ir.build import cast, op

from .arrays import Pull, Where, broadcast_index, broadcast_sizes, elements
from .pointwise import POINTWISE, where
from .scalars import to
from .state import current

__all__ = ["arg_reduce", "dot_last", "fold", "matmul", "norm", "reduce_dims", "variance"]

Fold = Callable[[list[Expr]], Expr]


def dims_of(array: Pull, dims: Sequence[int] | int | None) -> tuple[int, ...]:
    """Return reduced dimensions as non-negative numbers; none given means all."""
    rank = len(array.shape)
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return tuple(range(rank))
    return tuple(sorted(d % max(rank, 1) for d in ((dims,) if isinstance(dims, int) else dims) if rank))


def reduce_dims(array: Pull, dims: Sequence[int], keepdim: bool, type_: Type, what: str, combine: Fold) -> Pull:
    """Reduce ``dims`` of ``array``: ``combine`` gets the elements in row-major order."""
    extents = [array.shape[d] for d in dims]
    inner = list(elements(extents, what))
    for d in dims:
        current().bake(array.sizes[d], array.shape[d])
    kept = [d for d in range(len(array.shape)) if d not in dims]

    def fn(w: Where) -> Expr:
        outer = [w[d] for d in kept] if keepdim else list(w)

        def at(i: Where) -> Where:
            where_ = dict(zip(kept, outer, strict=True)) | dict(zip(dims, i, strict=True))
            return tuple(where_[d] for d in range(len(array.shape)))

        return combine([array.at(at(i)) for i in inner])

    if keepdim:
        shape = [1 if d in dims else n for d, n in enumerate(array.shape)]
        sizes = [Const(1, INT) if d in dims else s for d, s in enumerate(array.sizes)]
        return Pull(shape, type_, fn, sizes)
    return Pull([array.shape[d] for d in kept], type_, fn, [array.sizes[d] for d in kept])


def fold(name: str, type_: Type, empty: bool | int | float | None = None) -> Fold:
    """Return the left fold with a pointwise operation, in the result type."""
    build = POINTWISE[name]

    def combine(values: list[Expr]) -> Expr:
        if not values:
            if empty is None:
                raise ValueError(f"reduction {name} over no elements has no value")
            return to(empty, type_)
        return reduce(lambda a, b: build(type_, a, b), (to(v, type_) for v in values))

    return combine


def mean(values: list[Expr]) -> Expr:
    return op("div", fold("add", FLOAT, 0.0)(values), float(len(values)) if values else math.nan)


def variance(correction: float, power: float) -> Fold:
    """Return the variance with n - correction degrees of freedom, or its square root (power 0.5)."""

    def combine(values: list[Expr]) -> Expr:
        centre = mean(values)
        parts = [op("sub", cast(v, FLOAT), centre) for v in values]
        total = fold("add", FLOAT, 0.0)([op("mul", p, p) for p in parts])
        out = op("div", total, max(len(values) - correction, 0.0))
        return out if power == 1.0 else op("sqrt", out)

    return combine


def norm(order: float) -> Fold:
    """Return the vector norm of the given order."""

    def combine(values: list[Expr]) -> Expr:
        sizes = [op("abs", cast(v, FLOAT)) for v in values]
        if order in (math.inf, -math.inf):
            return fold("maximum" if order > 0 else "minimum", FLOAT, 0.0)(sizes)
        if order == 0:
            return fold("add", FLOAT, 0.0)([cast(op("ne", v, 0.0), FLOAT) for v in sizes])
        if order == 1:
            return fold("add", FLOAT, 0.0)(sizes)
        if order == 2:
            return op("sqrt", fold("add", FLOAT, 0.0)([op("mul", cast(v, FLOAT), cast(v, FLOAT)) for v in values]))
        return op("pow", fold("add", FLOAT, 0.0)([op("pow", v, order) for v in sizes]), 1.0 / order)

    return combine


def logsumexp(values: list[Expr]) -> Expr:
    floats = [cast(v, FLOAT) for v in values]
    top = fold("maximum", FLOAT)(floats)
    pivot = where(op("lt", op("abs", top), math.inf), top, 0.0, FLOAT)
    total = fold("add", FLOAT)([op("exp", op("sub", v, pivot)) for v in floats])
    return op("add", op("log", total), pivot)


def arg_reduce(better: str) -> Fold:
    """Return the position of the first best element (``better`` is lt or gt)."""

    def combine(values: list[Expr]) -> Expr:
        best, at = to(values[0], INT) if values[0].type is BOOL else values[0], Const(0, INT)
        out: Expr = at
        for n, value in enumerate(values[1:], 1):
            number = to(value, INT) if value.type is BOOL else value
            wins = op(better, number, best)
            best, out = op("where", wins, number, best), op("where", wins, n, out)
        return out

    return combine


def dot_last(a: Pull, b: Pull, type_: Type) -> Pull:
    """Return sum over the last dimension of the broadcast product."""
    shape = tuple(max(m, n) if min(m, n) else 0 for m, n in _aligned(a.shape, b.shape))
    mul = POINTWISE["mul"]
    product = Pull(
        shape,
        type_,
        lambda w: mul(type_, a.at(broadcast_index(w, a.shape, shape)), b.at(broadcast_index(w, b.shape, shape))),
        broadcast_sizes((a, b), shape),
    )
    return reduce_dims(product, (len(shape) - 1,), False, type_, "a product of vectors", fold("add", type_, 0))


def _aligned(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[int, int]]:
    rank = max(len(a), len(b))
    return list(zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True))


def matmul(a: Pull, b: Pull, type_: Type) -> Pull:
    """Return the matrix product with torch.matmul's rules for vectors and batches.

    Raises:
        RuntimeError: the inner lengths differ, as torch says it.
    """
    from .shapes import permute, select, unsqueeze

    if not a.shape or not b.shape:
        raise RuntimeError("both arguments to matmul need to be at least 1-D")
    rows, cols = len(a.shape) > 1, len(b.shape) > 1
    left = a if rows else unsqueeze(a, 0)
    right = b if cols else unsqueeze(b, 1)
    if left.shape[-1] != right.shape[-2]:
        raise RuntimeError(f"matmul of shapes {list(a.shape)} and {list(b.shape)}: the inner lengths differ")
    turned = permute(right, (*range(len(right.shape) - 2), -1, -2))
    out = dot_last(unsqueeze(left, -2), unsqueeze(turned, -3), type_)  # [..., rows, cols]
    rank = len(out.shape)
    if not cols:
        out = select(out, rank - 1, Const(0, INT))
    return out if rows else select(out, rank - 2, Const(0, INT))
