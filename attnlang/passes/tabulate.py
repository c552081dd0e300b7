"""Tables: what a program computes from one of its long axes alone becomes a lookup by that axis.

The row and the column of a pixel, the window of a query, the document of a key: such values depend on a query or on a
key, never on both. A tabulated program reads them from captured tensors, one element a slot, and keeps only what really
meets in a pair. Slots may then hold the tokens in any order, because the tables say what was at home in each of them;
and a kernel loads where it had to divide.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from attnlang.ir import FLOAT, INT, Expr, Index, Input, Load, Program, Size, TensorParam, postorder
from attnlang.ir.program import BUILTIN_SIZES

from .simplify import map_program, simplify

__all__ = ["Table", "Tabulated", "tabulate"]

_EXTENTS = {"b": "B", "h": "H", "q": "Lq", "k": "Lk"}


@dataclass(frozen=True)
class Table:
    """A captured tensor of a tabulated program: ``expr`` at every point of ``axes``, the long axis last.

    The axis ``o`` counts orders of tokens: the element is the value under that order.
    """

    name: str
    expr: Expr
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Tabulated:
    """A program whose hooks read ``q`` and ``k`` only as indices of tables.

    ``order_of_head`` names the tensor int [H] that gives the order of each head, empty where all heads have one order;
    ``orders`` the size that counts them.
    """

    program: Program
    tables: tuple[Table, ...]
    order_of_head: str = ""
    orders: str = ""


@lru_cache(maxsize=256)
def tabulate(program: Program, per_head: bool = False) -> Tabulated:
    """Return ``program`` with the largest int and bool expressions of one long axis replaced by loads of tables.

    With ``per_head`` heads may differ in the order of their tokens. The same program gives the same object, so that
    kernels built for it are found again.
    """
    program = map_program(program, simplify)
    taken = {*_EXTENTS, *BUILTIN_SIZES, "s", *(p.name for p in program.scalars), *(t.name for t in program.tensors)}
    taken |= {d.name for t in program.tensors for n in t.shape for d in postorder(n) if isinstance(d, Size)}
    roots = (program.mask, program.score)
    which = orders = ""
    if per_head:
        which, orders = _fresh("order_of_head", taken), _fresh("orders", taken)
    reads = _reads(roots)
    done: dict[Expr, Expr] = {}
    tables: list[Table] = []
    params: list[TensorParam] = []
    for node in _largest(roots, reads):
        at = next(a for a in "qk" if a in reads[node])
        short = [a for a in "bh" if a in reads[node]]
        if per_head:
            short = [a for a in "bh" if a in reads[node] or a == "h"] if short else ["o"]
        axes = (*short, at)
        name = _fresh(f"at_{at}{1 + sum(t.axes[-1] == at for t in tables)}", taken)
        found = {"o": Load(which, (Index("h"),), INT)} if per_head else {}
        done[node] = Load(name, tuple(found.get(a) or Index(a) for a in axes), node.type)
        tables.append(Table(name, node, axes))
        extents = (Size(orders) if a == "o" else Size(_EXTENTS[a]) for a in axes)
        params.append(TensorParam(name, node.type, tuple(extents)))
    for node in postorder(*roots):
        if node not in done:
            done[node] = node.with_args(tuple(done[a] for a in node.args)) if node.args else node
    if per_head:
        params.append(TensorParam(which, INT, (Size("H"),)))
    hooked = program.with_hooks(mask=done[program.mask], score=done[program.score])
    return Tabulated(replace(hooked, tensors=(*program.tensors, *params), grids=()), tuple(tables), which, orders)


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _reads(roots: Iterable[Expr]) -> dict[Expr, frozenset[str]]:
    """The axes every node reads; ``!`` marks what cannot be in a table: inputs, and elements of float tensors."""
    out: dict[Expr, frozenset[str]] = {}
    for node in postorder(*roots):
        own = frozenset[str]()
        if isinstance(node, Index):
            own = frozenset(node.axis)
        elif isinstance(node, Input) or (isinstance(node, Load) and node.type is FLOAT):
            own = frozenset("!")
        out[node] = own.union(*(out[a] for a in node.args))
    return out


def _largest(roots: tuple[Expr, ...], reads: dict[Expr, frozenset[str]]) -> list[Expr]:
    """The outermost nodes that a table can hold, in the order of evaluation."""

    def fits(node: Expr) -> bool:
        return node.type is not FLOAT and "!" not in reads[node] and len(reads[node] & {"q", "k"}) == 1

    found, seen, stack = set(), set(roots), list(roots)
    while stack:
        node = stack.pop()
        if fits(node):
            found.add(node)
            continue
        stack += [a for a in node.args if a not in seen]
        seen.update(node.args)
    return [n for n in postorder(*roots) if n in found]
