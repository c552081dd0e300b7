"""Pull arrays: a traced tensor of any rank is a function from index expressions to a scalar expression.

``bias[b][h, q]`` never materialises anything: ``bias[b]`` is the function ``(i, j) -> Load(bias, b, i, j)``. Views
compose index functions, pointwise operations compose value functions, and a reduction calls its argument once for each
element of the dimension it reduces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from attnlang.ir import INT, Const, Expr, Type

from .errors import TraceError, current_location
from .scalars import floordiv, int_add, int_mul, mod

__all__ = ["MAX_UNROLL", "Pull", "broadcast_index", "broadcast_sizes", "elements", "reshape", "scalar", "take"]

MAX_UNROLL = 64
"""Largest extent of a dimension that a reduction unrolls."""

Where = tuple[Expr, ...]


class Pull:
    """A symbolic tensor.

    ``shape`` is the concrete shape of this trace, ``sizes`` the same lengths as expressions (a symbolic size of a
    captured tensor where it is one). ``at`` returns the element at index expressions that are in range.
    """

    __slots__ = ("_fn", "_memo", "shape", "sizes", "type")

    def __init__(
        self, shape: Sequence[int], type_: Type, fn: Callable[[Where], Expr], sizes: Sequence[Expr] | None = None
    ) -> None:
        self.shape = tuple(shape)
        self.sizes = tuple(Const(n, INT) for n in self.shape) if sizes is None else tuple(sizes)
        self.type = type_
        self._fn = fn
        self._memo: dict[Where, Expr] = {}

    def at(self, where: Where) -> Expr:
        """Return the element at ``where`` (one int expression per dimension)."""
        found = self._memo.get(where)
        if found is None:
            found = self._memo[where] = self._fn(where)
        return found

    def viewed(self, shape: Sequence[int], sizes: Sequence[Expr], index: Callable[[Where], Where]) -> Pull:
        """Return a view whose element at ``i`` is this array's element at ``index(i)``."""
        return Pull(shape, self.type, lambda where: self.at(index(where)), sizes)


def scalar(expr: Expr) -> Pull:
    """Return a 0-d array."""
    return Pull((), expr.type, lambda _: expr)


ZERO = Const(0, INT)


def broadcast_index(where: Where, shape: tuple[int, ...], out: tuple[int, ...]) -> Where:
    """Return the index into an array of ``shape`` for index ``where`` of the broadcast ``out``."""
    skip = len(out) - len(shape)
    return tuple(ZERO if n == 1 and out[d + skip] != 1 else where[d + skip] for d, n in enumerate(shape))


def broadcast_sizes(arrays: Sequence[Pull], out: tuple[int, ...]) -> tuple[Expr, ...]:
    """Return the symbolic lengths of the broadcast of ``arrays``."""
    sizes: list[Expr] = []
    for d, n in enumerate(out):
        found: Expr = Const(n, INT)
        for array in arrays:
            own = d - len(out) + len(array.shape)
            if own >= 0 and array.shape[own] == n:
                found = array.sizes[own]
                break
        sizes.append(found)
    return tuple(sizes)


def elements(extents: Sequence[int], what: str) -> Iterator[Where]:
    """Yield every index of a box.

    Raises:
        TraceError: the box is too large to unroll.
    """
    total = 1
    for n in extents:
        total *= n
        if n > MAX_UNROLL or total > MAX_UNROLL * MAX_UNROLL:
            raise TraceError(
                f"{what} over a dimension of length {n}: at most {MAX_UNROLL} elements per point can be unrolled",
                "do the reduction before the function is defined and capture its result",
                current_location(),
            )
    for where in product(*(range(n) for n in extents)):
        yield tuple(Const(i, INT) for i in where)


def _flatten(where: Where, sizes: Sequence[Expr]) -> Expr:
    flat: Expr = ZERO
    for i, n in zip(where, sizes, strict=True):
        flat = int_add(int_mul(flat, n), i)
    return flat


def _unflatten(flat: Expr, shape: Sequence[int], sizes: Sequence[Expr]) -> Where:
    out: list[Expr] = []
    for d in range(len(shape) - 1, -1, -1):
        rest = any(n != 1 for n in shape[:d])
        out.append(ZERO if shape[d] == 1 else mod(flat, sizes[d]) if rest else flat)
        flat = floordiv(flat, sizes[d])
    return tuple(reversed(out))


def reshape(array: Pull, shape: tuple[int, ...]) -> Pull:
    """Return ``array`` with its elements in row-major order in another shape."""
    old = [(n, s) for n, s in zip(array.shape, array.sizes, strict=True) if n != 1]
    new = [d for d, n in enumerate(shape) if n != 1]
    sizes: list[Expr] = [Const(n, INT) for n in shape]
    if [shape[d] for d in new] == [n for n, _ in old]:  # only dimensions of length 1 come and go
        for d, (_, s) in zip(new, old, strict=True):
            sizes[d] = s

        def index(where: Where) -> Where:
            kept = iter([where[d] for d in new])
            return tuple(ZERO if n == 1 else next(kept) for n in array.shape)

        return array.viewed(shape, sizes, index)
    return array.viewed(shape, sizes, lambda where: _unflatten(_flatten(where, sizes), array.shape, array.sizes))


def take(array: Pull, dim: int, index: Callable[[Expr], Expr], length: int, size: Expr | None = None) -> Pull:
    """Return ``array`` with ``length`` entries along ``dim``, entry ``i`` read at ``index(i)``."""
    shape, sizes = list(array.shape), list(array.sizes)
    shape[dim] = length
    sizes[dim] = Const(length, INT) if size is None else size
    return array.viewed(shape, sizes, lambda w: (*w[:dim], index(w[dim]), *w[dim + 1 :]))
