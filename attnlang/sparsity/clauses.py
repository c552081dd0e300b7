"""The clauses of a mask, and what each of them decides: alone, and by what would change without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnlang.ir import Const, Expr, Op, Program, format_expr
from attnlang.ir.build import all_of, any_of

from .analyse import analyse
from .layout import Layout
from .runmap import RunMap

__all__ = ["Clause", "clause_report"]

MOST = 16  # clauses reported, so that a generated mask of hundreds does not cost hundreds of analyses
DEPTH = 3  # levels of and/or that are taken apart
Counts = tuple[int, int, int]


@dataclass(frozen=True)
class Clause:
    """One clause of the and/or tree of a mask: ``counts`` are (empty, partial, full) tiles of the clause alone.

    ``without`` are the counts of the whole mask if the clause were not there. ``depth`` is its level in the tree and
    ``joined`` the connective ('and', 'or') that joins it to its neighbours. A conjunction is decided by what its
    clauses find empty, a disjunction by what they find full.
    """

    text: str
    joined: str
    depth: int
    empty: int
    partial: int
    full: int
    without: Counts

    @property
    def counts(self) -> Counts:
        return self.empty, self.partial, self.full


@dataclass(frozen=True)
class _Place:
    expr: Expr
    joined: str
    depth: int
    rest: Expr  # the mask without it


def _parts(node: Expr) -> list[Expr]:
    """The clauses of the outermost connective of a node in source order; the node itself where it has none."""
    if not (isinstance(node, Op) and node.op in ("and", "or")):
        return [node]
    out: list[Expr] = []
    stack: list[Expr] = [node]
    while stack:
        part = stack.pop()
        if isinstance(part, Op) and part.op == node.op:
            stack += reversed(part.args)
        else:
            out.append(part)
    return out


def _places(node: Expr, depth: int, put: Any) -> Iterator[_Place]:
    """Every clause below ``node``; ``put(expr)`` is the mask with ``expr`` in the place of ``node``."""
    parts = _parts(node)
    if len(parts) == 1 or depth == DEPTH:
        return
    assert isinstance(node, Op)
    join = all_of if node.op == "and" else any_of
    for i, part in enumerate(parts):
        others = parts[:i] + parts[i + 1 :]
        yield _Place(part, node.op, depth, put(join(*others)))
        yield from _places(part, depth + 1, lambda inner, i=i: put(join(*parts[:i], inner, *parts[i + 1 :])))


def clause_report(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    tile: tuple[int, int] = (128, 128),
    whole: RunMap | None = None,
    layout: Layout | None = None,
) -> tuple[Clause, ...]:
    """Return what each clause of the mask proves by itself, and the counts of the mask without it.

    Counts are over the batch elements and heads that the whole mask depends on (``whole``: its run map, if known). A
    mask of one clause has nothing to report.
    """
    places = list(_places(program.mask, 0, lambda expr: expr))[:MOST]
    if not places:
        return ()
    whole = analyse(program, sizes, params, tensors, tile, layout=layout) if whole is None else whole
    slots = whole.batch * whole.heads

    def counts(mask: Expr) -> Counts:
        runs = analyse(program.with_hooks(mask=mask), sizes, params, tensors, tile, layout=layout)
        copies = max(1, slots // max(1, runs.batch * runs.heads))
        empty, partial, full = (n * copies for n in runs.counts())
        return empty, partial, full

    return tuple(
        Clause(format_expr(p.expr), p.joined, p.depth, *counts(p.expr), without=counts(p.rest))
        for p in places
        if not isinstance(p.expr, Const)
    )
