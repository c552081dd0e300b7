"""Which expressions become statements of a kernel, and what they are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from attnlang.ir import Const, Expr, Index, Input, Load, Op, Param, Size, postorder
from attnlang.passes.levels import Level

from .runs import NAMES, RunBounds

__all__ = ["names"]

PREFIXES = ("n_", "p_", "t_")
"""What C++ sources put before names of sizes, parameters and tensors."""

MAX_INLINE_DEPTH = 6
"""Nested operators printed as one expression before a statement of their own is made."""


def _is_leaf(node: Expr) -> bool:
    return isinstance(node, (Const, Index, Size, Param, Input))


class _Namer:
    """Readable, unique, deterministic names for values."""

    def __init__(self, taken: Iterable[str], levels: Mapping[Level, str]) -> None:
        self._used: set[str] = {prefix + name for name in taken for prefix in ("", *PREFIXES)}
        self._levels = levels

    def take(self, stem: str) -> str:
        """Return ``stem``, with underscores where the program uses it."""
        while stem in self._used:
            stem += "_"
        return stem

    def __call__(self, node: Expr, level: Level) -> str:
        # operators are always numbered, so that templates can use names like row_max for themselves
        if isinstance(node, Load):
            stem, n = f"{node.tensor}_{self._levels[level]}", 2
            name = stem
        else:
            assert isinstance(node, Op)
            stem, n = f"{self._levels[level]}_{node.op}", 2
            name = f"{stem}1"
        while name in self._used:
            name, n = f"{stem}{n}", n + 1
        self._used.add(name)
        return name


def _users(roots: Iterable[Expr]) -> tuple[Counter[Expr], dict[Expr, list[Expr]]]:
    count: Counter[Expr] = Counter()
    users: dict[Expr, list[Expr]] = {}
    for node in postorder(*roots):
        for arg in node.args:
            count[arg] += 1
            users.setdefault(arg, []).append(node)
    return count, users


def _named_nodes(roots: tuple[Expr, ...], level_of: Mapping[Expr, Level]) -> Iterator[Expr]:
    """Nodes that become statements: loads, shared nodes, nodes used at a deeper level than their own, deep nests."""
    count, users = _users(roots)
    depth: dict[Expr, int] = {}
    for node in postorder(*roots):
        depth[node] = 1 + max((depth[a] for a in node.args), default=-1)
        if _is_leaf(node):
            continue
        shared = count[node] > 1
        crosses = any(level_of[u] is not level_of[node] for u in users.get(node, []))
        is_root = node in roots
        hoisted_root = is_root and level_of[node] is not Level.PAIR
        if shared or crosses or isinstance(node, Load) or hoisted_root or depth[node] >= MAX_INLINE_DEPTH:
            depth[node] = 0
            yield node


OF_PAIRS = {level: level.value for level in Level}
"""What values of a level are called."""


def names(
    taken: Iterable[str],
    hooks: tuple[Expr, ...],
    runs: tuple[RunBounds, ...],
    level_of: Mapping[Expr, Level],
    called: Mapping[Level, str] = OF_PAIRS,
) -> dict[Expr, str]:
    """Names of the values of the hooks and of the run bounds, arguments before users; none of them is ``taken``.

    ``called`` is how names of values of a level begin (of loads: end).
    """
    namer = _Namer(taken, called)
    given: dict[Expr, str] = {}
    for r in runs:
        for i, part in enumerate(r.parts):
            suffix = str(i + 1) if i else ""
            for name, expr in zip(NAMES, part.exprs, strict=True):
                if not _is_leaf(expr):
                    given.setdefault(expr, namer.take(f"{name}{suffix}"))
    ends = tuple(e for r in runs for e in r.exprs)
    named = {*_named_nodes(hooks, level_of), *_named_nodes(ends, level_of)}
    order = [n for n in postorder(*hooks, *ends) if n in named]
    return {n: given.get(n) or namer(n, level_of[n]) for n in order}
