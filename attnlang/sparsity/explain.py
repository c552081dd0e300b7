"""Why a mask is as sparse as it is: counts, the part of each clause, tile efficiency, work and traffic, advice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attnlang.ir import Index, Load, Program, format_expr, postorder

from .advice import advise, computed_pairs
from .analyse import analyse
from .clauses import Clause, clause_report
from .closed_form import ClosedForm, closed_form
from .layout import Layout, lay_out
from .runmap import FULL, PARTIAL, RunMap
from .settle import visible_pairs, visible_shares

__all__ = ["Efficiency", "Report", "explain"]

PAIRS = 1 << 24  # pairs evaluated to count what is visible in partial tiles; beyond it an even sample of tiles
POINTS = 512  # positions of a tile in each direction that are looked at for a sample; more than a kernel's tile has
AXES = (("b", "the batch element"), ("h", "the head"))
WIDTH, TEXT = 88, 40


@dataclass(frozen=True)
class Efficiency:
    """Visible pairs / computed pairs, over the batch elements and heads the mask depends on.

    ``visible`` is exact where every partial tile was counted; otherwise ``error`` is the standard error of ``share``
    from the ``sampled`` partial tiles that were.
    """

    visible: float
    computed: int
    sampled: int
    exact: bool
    error: float

    @property
    def share(self) -> float:
        return self.visible / self.computed if self.computed else 1.0

    def __str__(self) -> str:
        return f"{self.share:.3f}" + (
            "" if self.exact else f" ± {self.error:.3f} (from {self.sampled:,} partial tiles)"
        )


@dataclass(frozen=True)
class Report:
    """Facts about a program at given lengths; ``str()`` is the text for people, :meth:`to_dict` the data.

    ``reads`` names what the mask depends on beside positions. ``computed_pairs`` is over the whole batch and all heads.
    """

    name: str
    runs: RunMap
    batch: int
    heads: int
    kv_heads: int
    reads: tuple[str, ...]
    clauses: tuple[Clause, ...]
    measured: Efficiency
    form: ClosedForm | None
    advice: tuple[str, ...]
    order: str = ""

    @property
    def efficiency(self) -> float:
        """Visible pairs / computed pairs."""
        return self.measured.share

    @property
    def exact(self) -> bool:
        """Whether all partial tiles were counted, not a sample of them."""
        return self.measured.exact

    @property
    def copies(self) -> int:
        """How many (batch element, head) pairs share one row of the map."""
        return (self.batch if self.runs.batch == 1 else 1) * (self.heads if self.runs.heads == 1 else 1)

    @property
    def computed_pairs(self) -> int:
        """Pairs in computed tiles, cut ones whole, over the whole batch and all heads."""
        return computed_pairs(self.runs) * self.copies

    def flops(self, head_dim: int, value_dim: int | None = None) -> int:
        """Multiply-adds of the two products of the forward pass, counted as two, over all computed tiles."""
        return 2 * (head_dim + (head_dim if value_dim is None else value_dim)) * self.computed_pairs

    def operand_bytes(self, head_dim: int, itemsize: int = 2) -> int:
        """Bytes of q, k, v and the output: the least that has to move."""
        lq, lk = self.runs.sizes
        return 2 * head_dim * itemsize * self.batch * (self.heads * lq + self.kv_heads * lk)

    def tile_bytes(self, head_dim: int, itemsize: int = 2) -> int:
        """Bytes that tiles read and write where nothing is shared: k and v for every computed tile, q and o once."""
        rows = 2 * head_dim * itemsize * self.batch * self.heads * self.runs.sizes[0]
        return rows + 2 * head_dim * itemsize * (self.computed_pairs // self.runs.tile[0])

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON values; FLOPs and bytes at head dimension 64 and two bytes a number."""
        empty, partial, full = self.runs.counts()
        total = max(1, empty + partial + full)
        kinds = {"empty": empty, "partial": partial, "full": full}
        form = None
        if self.form is not None:
            names = ("touched_lo", "touched_hi", "full_lo", "full_hi")
            form = {n: format_expr(getattr(self.form, n)) for n in names}
        return {
            "name": self.name,
            "lengths": list(self.runs.sizes),
            "tile": list(self.runs.tile),
            "batch": self.batch,
            "heads": self.heads,
            "depends_on": ["positions", *self.reads],
            "order": self.order or None,
            "tiles": kinds,
            "fractions": {name: count / total for name, count in kinds.items()},
            "efficiency": {
                "share": self.measured.share,
                "exact": self.measured.exact,
                "standard_error": self.measured.error,
                "visible_pairs": self.measured.visible,
                "computed_pairs": self.measured.computed,
            },
            "forward": {
                "head_dim": 64,
                "flops": self.flops(64),
                "operand_bytes": self.operand_bytes(64),
                "tile_bytes": self.tile_bytes(64),
            },
            "run_map": {"runs": len(self.runs.start), "bytes": self.runs.memory_bytes},
            "clauses": [
                {
                    "text": c.text,
                    "joined_by": c.joined,
                    "depth": c.depth,
                    "alone": dict(zip(kinds, c.counts, strict=True)),
                    "without": dict(zip(kinds, c.without, strict=True)),
                }
                for c in self.clauses
            ],
            "closed_form": form,
            "advice": list(self.advice),
        }

    def __str__(self) -> str:
        return "\n".join([*self._counts(), *self._work(), *self._clauses(), *self._form(), *self._advice()])

    def _counts(self) -> list[str]:
        (lq, lk), (bm, bn) = self.runs.sizes, self.runs.tile
        kinds = dict(zip(("empty", "partial", "full"), self.runs.counts(), strict=True))
        total = max(1, sum(kinds.values()))
        depends = ", ".join(("positions", *self.reads))
        return [
            f"{self.name}: {lq} queries x {lk} keys in tiles of {bm} x {bn} (depends on {depends})",
            *([f"  tokens in {self.order}"] if self.order else []),
            *(f"  {name:<8}{count:>14,}  {100 * count / total:6.2f} %" for name, count in kinds.items()),
            f"  tile efficiency {self.measured}: visible / computed pairs",
        ]

    def _work(self) -> list[str]:
        return [
            f"  forward at head dim 64: {self.flops(64):.3g} FLOPs, {self.operand_bytes(64):.3g} bytes of q, k, v and "
            f"output in 16 bits, {self.tile_bytes(64):.3g} read by tiles",
            f"  run map {self.runs.memory_bytes / 1024:.1f} KiB in {len(self.runs.start):,} runs",
        ]

    def _clauses(self) -> list[str]:
        if not self.clauses:
            return []
        lines = [f"  {'clause, alone':<{TEXT}}{'empty':>13}{'partial':>13}{'full':>13}   without it"]
        now = sum(self.runs.counts()[1:])
        for c in self.clauses:
            text = _cut(f"{'  ' * c.depth}{c.joined} {c.text}", TEXT - 2)
            change = sum(c.without[1:]) - now
            effect = f"{change:+,} computed" if change else _more(c.without[2] - self.runs.counts()[2])
            lines.append(f"    {text:<{TEXT - 2}}{c.empty:>13,}{c.partial:>13,}{c.full:>13,}   {effect}")
        return lines

    def _form(self) -> list[str]:
        if self.form is None:
            return []
        low, high = (_cut(format_expr(x), WIDTH) for x in (self.form.touched_lo, self.form.touched_hi))
        full_low, full_high = (_cut(format_expr(x), WIDTH) for x in (self.form.full_lo, self.form.full_hi))
        return [
            f"  closed form: rows q_first..q_last see keys from {low} up to {high}",
            f"    and all of them from {full_low} up to {full_high}",
        ]

    def _advice(self) -> list[str]:
        return [f"  advice: {text}" for text in self.advice]


def _more(full: int) -> str:
    return f"{full:+,} full" if full else "the same"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _reads(program: Program) -> tuple[str, ...]:
    """What a mask depends on beside positions: the batch element, the head, captured tensors."""
    nodes = list(postorder(program.mask))
    axes = {n.axis for n in nodes if isinstance(n, Index)}
    tensors = dict.fromkeys(n.tensor for n in nodes if isinstance(n, Load))
    return (*(name for axis, name in AXES if axis in axes), *tensors)


def _pairs(runs: RunMap, kind: int) -> int:
    """Pairs in range in tiles of one kind."""
    pick = np.nonzero(runs.kind == kind)[0]
    (bm, bn), (lq, lk) = runs.tile, runs.sizes
    i = runs.row_of_run()[pick] % max(1, runs.nq)
    wide = np.minimum(runs.end[pick].astype(np.int64) * bn, lk) - runs.start[pick].astype(np.int64) * bn
    return int(((np.minimum((i + 1) * bm, lq) - i * bm) * wide).sum())


def _some_partial(runs: RunMap, most: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """(row, key tile) of all partial tiles, or of ``most`` spread evenly over them; and whether these are all."""
    pick = np.nonzero(runs.kind == PARTIAL)[0]
    total = np.cumsum((runs.end[pick] - runs.start[pick]).astype(np.int64))
    count = int(total[-1]) if len(total) else 0
    number = np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64)
    run = np.searchsorted(total, number, side="right")
    column = runs.end[pick][run] - (total[run] - number)
    return runs.row_of_run()[pick][run], column, count <= most


def _efficiency(
    program: Program,
    runs: RunMap,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None,
    tensors: Mapping[str, torch.Tensor] | None,
) -> Efficiency:
    """Visible / computed pairs, counting all partial tiles or an even sample of them."""
    computed, full = computed_pairs(runs), _pairs(runs, FULL)
    area = min(runs.tile[0], max(1, runs.sizes[0])) * min(runs.tile[1], max(1, runs.sizes[1]))
    row, column, every = _some_partial(runs, max(16, PAIRS // area))
    if every and len(row) * area <= PAIRS:
        seen = visible_pairs(program, runs, sizes, params, tensors, row, column)
        return Efficiency(full + int(seen.sum()), computed, len(row), True, 0.0)
    density = visible_shares(program, runs, sizes, params, tensors, row, column, POINTS)
    pairs = _pairs(runs, PARTIAL)
    error = float(density.std(ddof=1)) / len(row) ** 0.5 * pairs / computed if len(row) > 1 else 1 / POINTS
    return Efficiency(full + pairs * float(density.mean()), computed, len(row), False, error)


def explain(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    tile: tuple[int, int] = (128, 128),
    layout: Layout | None = None,
) -> Report:
    """Return a printable report: what is empty, partial and full, which clause decides it, and what would help.

    ``sizes`` and ``layout`` as for :func:`attnlang.sparsity.analyse`. No more than a fixed number of pairs is looked
    at.

    Raises:
        UsageError: as :func:`attnlang.sparsity.analyse`.
    """
    runs = analyse(program, sizes, params, tensors, tile, layout=layout)
    if layout is None:
        measured = _efficiency(program, runs, sizes, params, tensors)
    else:
        laid = lay_out(program, layout, sizes, params, tensors)
        measured = _efficiency(laid.program, runs, laid.sizes, params, laid.tensors)
    heads = sizes.get("H", 1)
    return Report(
        program.name,
        runs,
        sizes.get("B", 1),
        heads,
        sizes.get("Hkv", heads),
        _reads(program),
        clause_report(program, sizes, params, tensors, tile, runs, layout),
        measured,
        closed_form(program) if layout is None else None,
        advise(program, runs, sizes, params or {}, tensors, measured.share, layout),
        layout.name if layout else "",
    )
