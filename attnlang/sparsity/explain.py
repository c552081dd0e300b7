"""Why a mask is as sparse as it is: counts, the part of each clause, tile efficiency and advice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attnlang.ir import INT, Expr, Op, Program, UsageError, format_expr

from .analyse import analyse
from .classify import numbers
from .closed_form import ClosedForm, closed_form
from .layout import propose_layouts
from .runmap import RunMap
from .settle import partial_tiles, visible_pairs

__all__ = ["Clause", "Report", "clause_report", "explain"]

GRID_TILES = 1 << 20  # tiles up to which other orders of tokens are tried
SAMPLE = 256  # partial tiles evaluated to estimate tile efficiency
WIDTH = 88


@dataclass(frozen=True)
class Clause:
    """One clause of the outermost and/or: what it says alone about the tiles."""

    text: str
    empty: int
    partial: int
    full: int


@dataclass(frozen=True)
class Report:
    """Facts about a program at given lengths; ``str()`` is the text for people.

    ``efficiency`` is visible pairs / computed pairs; ``exact`` says that all partial tiles were counted, otherwise a
    sample of them was. ``computed_pairs`` over the whole batch and all heads.
    """

    name: str
    runs: RunMap
    batch: int
    heads: int
    connective: str
    clauses: tuple[Clause, ...]
    efficiency: float
    exact: bool
    computed_pairs: int
    form: ClosedForm | None
    advice: tuple[str, ...]

    def flops(self, head_dim: int) -> int:
        """Multiply-adds of the forward pass, counted as two, over all computed tiles."""
        return 4 * head_dim * self.computed_pairs

    def __str__(self) -> str:
        empty, partial, full = self.runs.counts()
        total = max(1, empty + partial + full)
        lq, lk = self.runs.sizes
        lines = [
            f"{self.name}: {lq} queries x {lk} keys in tiles of {self.runs.tile[0]} x {self.runs.tile[1]}"
            + f" (depends on {_axes(self.runs)})",
            *(
                f"  {name:<8}{count:>12,}  {100 * count / total:6.2f} %"
                for name, count in (("empty", empty), ("partial", partial), ("full", full))
            ),
            f"  tile efficiency {self.efficiency:.3f}{'' if self.exact else ' (sampled)'}: visible / computed pairs",
            f"  forward FLOPs at head dim 64: {self.flops(64):.3g}; run map {self.runs.memory_bytes / 1024:.1f} KiB in "
            f"{len(self.runs.start):,} runs",
        ]
        if len(self.clauses) > 1:
            lines.append(f"  clauses joined by '{self.connective}':           empty      partial         full")
            lines += [f"    {_cut(c.text, 38):<38}{c.empty:>12,} {c.partial:>12,} {c.full:>12,}" for c in self.clauses]
        if self.form is not None:
            for start, part in zip(("closed form: rows q_first..q_last see", "and"), self.form.parts, strict=False):
                low, high, full_low, full_high = (_cut(format_expr(x), WIDTH) for x in part.exprs)
                lines.append(f"  {start} keys from {low} up to {high}")
                lines.append(f"    and all of them from {full_low} up to {full_high}")
        lines += [f"  advice: {text}" for text in self.advice]
        return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _axes(runs: RunMap) -> str:
    read = [name for name, n in (("batch", runs.batch), ("head", runs.heads)) if n > 1]
    return " and ".join(read) if read else "positions only"


def _flatten(mask: Expr) -> tuple[str, list[Expr]]:
    """The outermost connective and its clauses in source order."""
    if not (isinstance(mask, Op) and mask.op in ("and", "or")):
        return "and", [mask]
    out: list[Expr] = []
    stack: list[Expr] = [mask]
    while stack:
        node = stack.pop()
        if isinstance(node, Op) and node.op == mask.op:
            stack += reversed(node.args)
        else:
            out.append(node)
    return mask.op, out


def clause_report(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    tile: tuple[int, int] = (128, 128),
) -> tuple[Clause, ...]:
    """Return for each clause of the outermost and/or how many tiles it proves empty or full by itself.

    In a conjunction a clause decides the tiles it finds empty, in a disjunction those it finds full.
    """
    out = []
    for clause in _flatten(program.mask)[1]:
        runs = analyse(program.with_hooks(mask=clause), sizes, params, tensors, tile)
        empty, partial, full = runs.counts()
        out.append(Clause(format_expr(clause), empty, partial, full))
    return tuple(out)


def _efficiency(
    program: Program,
    runs: RunMap,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor] | None,
) -> tuple[float, bool]:
    """Visible / computed pairs, counting all partial tiles or an even sample of them."""
    row, column = partial_tiles(runs)
    pick = (
        np.unique(np.linspace(0, len(row) - 1, SAMPLE).astype(np.int64)) if len(row) > SAMPLE else np.arange(len(row))
    )
    seen = visible_pairs(program, runs, sizes, params, tensors, row[pick], column[pick])
    area = runs.tile[0] * runs.tile[1]
    _, partial, full = runs.counts()
    if not partial + full:
        return 1.0, True
    density = float(seen.sum()) / (area * len(pick)) if len(pick) else 0.0
    return (full + partial * density) / (partial + full), len(pick) == len(row)


def _share_full(runs: RunMap) -> float:
    _, partial, full = runs.counts()
    return full / (partial + full) if partial + full else 0.0


def _round_parameters(
    program: Program,
    runs: RunMap,
    sizes: Mapping[str, int],
    params: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor] | None,
) -> list[str]:
    """Try each int parameter at the next multiple of the tile, and one less: does the share of full tiles jump?"""
    advice = []
    known = numbers(params, program)
    now = _share_full(runs)
    for scalar in program.scalars:
        value = known.get(scalar.name)
        if scalar.type is not INT or not isinstance(value, int) or value < 2:
            continue
        above = -(-value // runs.tile[1]) * runs.tile[1]
        best, share = value, now
        for candidate in (above, above - 1, above + 1):
            if candidate == value:
                continue
            then = _share_full(analyse(program, sizes, {**known, scalar.name: candidate}, tensors, runs.tile))
            if then > share + 0.02:
                best, share = candidate, then
        if best != value:
            advice.append(
                f"{scalar.name} {value} -> {best} makes {100 * share:.0f} % of the computed tiles full "
                f"(now {100 * now:.0f} %)"
            )
    return advice


def _order_tokens(
    program: Program,
    runs: RunMap,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor] | None,
    efficiency: float,
) -> list[str]:
    """The best order of tokens for a mask over a grid, where it saves a fifth of the tiles or more."""
    if not program.grids or efficiency > 0.8 or runs.nq * runs.nk > GRID_TILES or runs.always_empty:
        return []
    try:
        best = propose_layouts(program, sizes, params, tensors, runs.tile, limit=1)
    except UsageError:  # the lengths are not those of the grid
        return []
    return [
        f"tokens in {p.layout.name} raise tile efficiency from {efficiency:.2f} to {efficiency * p.gain:.2f}"
        for p in best
        if p.gain > 1.2
    ]


def explain(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    tile: tuple[int, int] = (128, 128),
) -> Report:
    """Return a printable report: what is empty, partial and full, which clause decides it, and what would help.

    Raises:
        UsageError: as :func:`attnlang.sparsity.analyse`.
    """
    runs = analyse(program, sizes, params, tensors, tile)
    connective, clauses = _flatten(program.mask)
    efficiency, exact = _efficiency(program, runs, sizes, params, tensors)
    _, partial, full = runs.counts()
    batch, heads = sizes.get("B", 1), sizes.get("H", 1)
    copies = (batch if runs.batch == 1 else 1) * (heads if runs.heads == 1 else 1)
    advice = _round_parameters(program, runs, sizes, params or {}, tensors)
    advice += _order_tokens(program, runs, sizes, params, tensors, efficiency)
    if runs.always_empty and min(runs.sizes) > 0:
        advice.append("no query can see any key: the mask contradicts itself at these lengths")
    report = clause_report(program, sizes, params, tensors, tile) if len(clauses) > 1 else ()
    form = closed_form(program)
    computed = (partial + full) * tile[0] * tile[1] * copies
    return Report(
        program.name, runs, batch, heads, connective, report, efficiency, exact, computed, form, tuple(advice)
    )
