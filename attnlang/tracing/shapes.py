"""Views, indexing and joins of traced arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnlang.ir import BOOL, INT, Const, Expr
from attnlang.ir.build import op

from .arrays import ZERO, Pull, Where, broadcast_index, reshape, take
from .errors import TraceError, current_location
from .scalars import int_add, int_mul, mod, wrap_index
from .state import current

__all__ = ["concatenate", "expand", "getitem", "index", "permute", "select", "slice_", "squeeze", "unsqueeze"]

Tensor = torch.Tensor


def _dim(array: Pull, dim: int, extra: int = 0) -> int:
    rank = len(array.shape) + extra
    if not -rank <= dim < max(rank, 1):
        raise IndexError(f"dimension {dim} is out of range for a tensor of {rank} dimension(s)")
    return dim % max(rank, 1)


def _constant(i: int, array: Pull, dim: int) -> Expr:
    """Return Python index ``i`` of a dimension; from the end it stays symbolic."""
    n = array.shape[dim]
    if not -n <= i < n:
        raise TraceError(
            f"index {i} is out of range for a dimension of length {n}", "use an index inside it", current_location()
        )
    if i >= 0:
        return Const(i, INT)
    size = array.sizes[dim]
    return Const(size.value + i, INT) if isinstance(size, Const) else op("add", size, i)


def select(array: Pull, dim: int, i: Expr) -> Pull:
    """Return ``array`` with dimension ``dim`` fixed at an index that is in range."""
    shape = array.shape[:dim] + array.shape[dim + 1 :]
    sizes = array.sizes[:dim] + array.sizes[dim + 1 :]
    return array.viewed(shape, sizes, lambda w: (*w[:dim], i, *w[dim:]))


def slice_(array: Pull, dim: int, part: slice) -> Pull:
    """Return a slice with Python's bounds."""
    start, stop, step = part.indices(array.shape[dim])
    if step < 1:
        raise ValueError("slice step must be positive")
    length = len(range(start, stop, step))
    if (start, step, length) == (0, 1, array.shape[dim]):
        return array
    stride, first = Const(step, INT), Const(start, INT)
    return take(array, dim, lambda i: int_add(int_mul(i, stride), first), length)


def permute(array: Pull, dims: Sequence[int]) -> Pull:
    order = [_dim(array, d) for d in dims]
    back = [order.index(d) for d in range(len(order))]
    return array.viewed(
        [array.shape[d] for d in order], [array.sizes[d] for d in order], lambda w: tuple(w[d] for d in back)
    )


def unsqueeze(array: Pull, dim: int) -> Pull:
    dim = _dim(array, dim, 1)
    shape = (*array.shape[:dim], 1, *array.shape[dim:])
    sizes = (*array.sizes[:dim], Const(1, INT), *array.sizes[dim:])
    return array.viewed(shape, sizes, lambda w: (*w[:dim], *w[dim + 1 :]))


def squeeze(array: Pull, dims: Sequence[int] | None = None) -> Pull:
    wanted = range(len(array.shape)) if dims is None else [_dim(array, d) for d in dims]
    for dim in sorted((d for d in wanted if array.shape[d] == 1), reverse=True):
        current().bake(array.sizes[dim], 1)
        array = select(array, dim, ZERO)
    return array


def expand(array: Pull, shape: Sequence[int]) -> Pull:
    skip = len(shape) - len(array.shape)
    out = tuple(array.shape[d - skip] if n == -1 else n for d, n in enumerate(shape))
    sizes = [
        array.sizes[d - skip] if d >= skip and array.shape[d - skip] == n else Const(n, INT) for d, n in enumerate(out)
    ]
    for d, n in enumerate(array.shape):
        if n != out[d + skip]:
            current().bake(array.sizes[d], n)
    return array.viewed(out, sizes, lambda w: broadcast_index(w, array.shape, out))


def flip(array: Pull, dims: Sequence[int]) -> Pull:
    for d in dims:
        dim = _dim(array, d)
        last = _constant(-1, array, dim)
        array = take(array, dim, lambda i, last=last: _minus(last, i), array.shape[dim], array.sizes[dim])  # type: ignore[misc]
    return array


def _minus(a: Expr, b: Expr) -> Expr:
    return Const(a.value - b.value, INT) if isinstance(a, Const) and isinstance(b, Const) else op("sub", a, b)


def roll(array: Pull, shifts: Sequence[int], dims: Sequence[int]) -> Pull:
    if not dims:
        return reshape(roll(reshape(array, (_numel(array.shape),)), shifts, (0,)), array.shape)
    for shift, d in zip(shifts, dims, strict=True):
        dim = _dim(array, d)
        size, by = array.sizes[dim], Const(-shift, INT)
        array = take(array, dim, lambda i, size=size, by=by: mod(int_add(i, by), size), array.shape[dim], size)  # type: ignore[misc]
    return array


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def diagonal(array: Pull, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Pull:
    one, two = _dim(array, dim1), _dim(array, dim2)
    row, col = max(-offset, 0), max(offset, 0)
    length = max(min(array.shape[one] - row, array.shape[two] - col), 0)
    rest = [d for d in range(len(array.shape)) if d not in (one, two)]

    def pick(w: Where) -> Where:
        where = dict(zip(rest, w[:-1], strict=True))
        where[one], where[two] = int_add(w[-1], Const(row, INT)), int_add(w[-1], Const(col, INT))
        return tuple(where[d] for d in range(len(array.shape)))

    sizes = [*(array.sizes[d] for d in rest), Const(length, INT)]
    return array.viewed([*(array.shape[d] for d in rest), length], sizes, pick)


def concatenate(arrays: Sequence[Pull], dim: int) -> Pull:
    """Join arrays of one type along an existing dimension."""
    arrays = [a for a in arrays if a.shape != (0,)] or list(arrays[:1])
    first = arrays[0]
    dim = _dim(first, dim)
    starts = [sum(a.shape[dim] for a in arrays[:n]) for n in range(len(arrays))]
    total = starts[-1] + arrays[-1].shape[dim]

    def fn(w: Where) -> Expr:
        i = w[dim]

        def part(n: int) -> Expr:
            own = int_add(i, Const(-starts[n], INT))
            return arrays[n].at((*w[:dim], own, *w[dim + 1 :]))

        if isinstance(i, Const):
            return part(max(n for n, s in enumerate(starts) if s <= i.value and arrays[n].shape[dim]))
        out = part(len(arrays) - 1)
        for n in range(len(arrays) - 2, -1, -1):
            out = op("where", op("lt", i, starts[n + 1]), part(n), out)
        return out

    shape = (*first.shape[:dim], total, *first.shape[dim + 1 :])
    sizes = (*first.sizes[:dim], Const(total, INT), *first.sizes[dim + 1 :])
    return Pull(shape, first.type, fn, sizes)


def index(array: Pull, indices: Sequence[Pull | None]) -> Pull:
    """Return ``array`` indexed by int arrays (None keeps a dimension), with NumPy's placement of the result dimensions.

    Raises:
        TraceError: a bool index, whose result would have a size known only when the kernel runs.
    """
    used = [d for d, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    if any(i.type is not INT for i in given):
        what = "bool" if any(i.type is BOOL for i in given) else "float"
        raise TraceError(
            f"a tensor is indexed with a traced {what} value",
            "use torch.where(mask, a, b) instead of a bool index, and .to(torch.int64) for a float index",
            current_location(),
        )
    joint = tuple(torch.broadcast_shapes(*(i.shape for i in given)))
    joint_sizes = next((i.sizes for i in given if i.shape == joint), tuple(Const(n, INT) for n in joint))
    adjacent = used == list(range(used[0], used[-1] + 1))
    place = used[0] if adjacent else 0
    kept = [d for d in range(len(array.shape)) if d not in used]
    before = [d for d in kept if d < place] if adjacent else []
    after = [d for d in kept if d not in before]

    def pick(w: Where) -> Where:
        inner = w[len(before) : len(before) + len(joint)]
        where: dict[int, Expr] = dict(zip(before, w, strict=False))
        where |= dict(zip(after, w[len(before) + len(joint) :], strict=True))
        for d, i in zip(used, given, strict=True):
            where[d] = wrap_index(i.at(broadcast_index(inner, i.shape, joint)), array.sizes[d])
        return tuple(where[d] for d in range(len(array.shape)))

    shape = (*(array.shape[d] for d in before), *joint, *(array.shape[d] for d in after))
    sizes = (*(array.sizes[d] for d in before), *joint_sizes, *(array.sizes[d] for d in after))
    return array.viewed(shape, sizes, pick)


def getitem(array: Pull, key: Any, pull: Any) -> Pull:
    """Return ``array[key]`` for ints, slices, None, ... and tensors; ``pull`` turns a tensor into an array.

    Raises:
        TraceError: lists of traced values, bool indices, or more indices than dimensions.
    """
    keys = list(key) if not isinstance(key, Tensor) and isinstance(key, tuple) else [key]
    taken = sum(1 for k in keys if k is not None and k is not Ellipsis)
    if taken > len(array.shape):
        raise TraceError(
            f"{taken} indices for a tensor of {len(array.shape)} dimension(s)",
            "remove an index, or capture a tensor with more dimensions",
            current_location(),
        )
    if not any(k is Ellipsis for k in keys):
        keys.append(Ellipsis)
    dim = 0
    tensors: list[Pull | None] = []
    for n, k in enumerate(keys):
        if k is Ellipsis:
            dim = len(array.shape) - sum(1 for r in keys[n + 1 :] if r is not None)
            tensors += [None] * (dim - len(tensors))
        elif k is None:
            array, dim = unsqueeze(array, dim), dim + 1
            tensors.append(None)
        elif isinstance(k, Tensor):
            tensors.append(pull(k))
            dim += 1
        elif isinstance(k, slice):
            array, dim = slice_(array, dim, k), dim + 1
            tensors.append(None)
        elif isinstance(k, (list, range)):
            tensors.append(pull(torch.stack([torch.as_tensor(i) for i in k])))
            dim += 1
        else:
            array = select(array, dim, _constant(k.__index__(), array, dim))
    return index(array, tensors) if any(t is not None for t in tensors) else array


def gather(array: Pull, dim: int, where: Pull) -> Pull:
    """Return torch.gather: the index array has the rank of ``array``."""
    dim = _dim(array, dim) if array.shape else 0

    def pick(w: Where) -> Where:
        if not array.shape:
            return ()
        i = wrap_index(where.at(w), array.sizes[dim])
        return (*w[:dim], i, *w[dim + 1 :])

    return array.viewed(where.shape, where.sizes, pick)


def take_flat(array: Pull, where: Pull) -> Pull:
    """Return torch.take: an index into the flattened array."""
    flat = reshape(array, (_numel(array.shape),))
    return index(flat, [where])


def index_select(array: Pull, dim: int, where: Pull) -> Pull:
    dim = _dim(array, dim)
    indices: list[Pull | None] = [None] * len(array.shape)
    indices[dim] = reshape(where, (1,)) if where.shape == () else where
    return index(array, indices)
