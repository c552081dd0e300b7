"""Pictures of masks: which tiles are empty, partial and full, as text and as a PNG.

A picture is drawn from the run map of a program, the same one its kernels walk, so it costs no more than the analysis
and works at any length.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from attnlang.ir import UsageError
from attnlang.sparsity import EMPTY, FULL, PARTIAL

if TYPE_CHECKING:
    from attnlang.sparsity import RunMap

__all__ = ["TilePicture", "picture_of", "write_atomically"]

GLYPHS = {"unicode": ("· ", "▒▒", "██"), "ascii": (" .", "++", "##")}
COLOURS = ("#f4f1ea", "#e8a33d", "#23527c")
NAMES = ("empty: skipped", "partial: mask evaluated", "full: no mask code runs")

Kinds = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TilePicture:
    """The tiles of one batch element and head: ``kinds`` is uint8 [query tiles, key tiles] of EMPTY, PARTIAL, FULL."""

    title: str
    kinds: Kinds
    tile: tuple[int, int]
    q_len: int
    kv_len: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of empty, partial and full tiles."""
        empty, partial, full = (int((self.kinds == kind).sum()) for kind in (EMPTY, PARTIAL, FULL))
        return empty, partial, full

    @property
    def summary(self) -> str:
        """The counts in one sentence."""
        empty, partial, full = self.counts
        share = (partial + full) / max(1, self.kinds.size)
        tile = f"{self.tile[0]} x {self.tile[1]}"
        return (
            f"{self.q_len} queries x {self.kv_len} keys in tiles of {tile}: "
            f"{full} full, {partial} partial, {empty} empty; {share:.1%} of the tiles are computed"
        )

    def text(self, *, columns: int = 100, style: str = "unicode") -> str:
        """Draw the picture in at most ``columns`` characters a line, merging tiles where there are too many."""
        glyphs = GLYPHS[style]
        step = max(1, -(-2 * self.kinds.shape[1] // max(columns, 2)))
        kinds = _merged(self.kinds, step)
        lines = ["".join(glyphs[kind] for kind in row).rstrip() for row in kinds.tolist()]
        legend = "   ".join(f"{glyphs[kind]} {NAMES[kind].partition(':')[0]}" for kind in (FULL, PARTIAL, EMPTY))
        if step > 1:
            legend += f"   (one cell is {step} x {step} tiles)"
        return "\n".join([self.title, *lines, legend, self.summary])

    def png(self, path: Path) -> None:
        """Write the picture with matplotlib; ``path`` appears only when it is complete.

        Raises:
            UsageError: matplotlib is not installed, or the file cannot be written.
        """
        try:
            from matplotlib import patches
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.colors import ListedColormap
            from matplotlib.figure import Figure
        except ImportError:
            raise UsageError("--png needs matplotlib: pip install 'attnlang[pictures]'") from None
        rows, columns = self.kinds.shape
        width = 6.5
        height = max(2.5, min(9.0, width * rows / max(columns, 1))) + 1.4
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        extent = (0.0, float(columns * self.tile[1]), float(rows * self.tile[0]), 0.0)
        colours = ListedColormap(list(COLOURS))
        axes.imshow(self.kinds, cmap=colours, vmin=0, vmax=2, extent=extent, interpolation="nearest", aspect="auto")
        axes.set_xlim(0, max(self.kv_len, 1))
        axes.set_ylim(max(self.q_len, 1), 0)
        if max(rows, columns) <= 128:
            axes.set_xticks(np.arange(columns + 1) * self.tile[1], minor=True)
            axes.set_yticks(np.arange(rows + 1) * self.tile[0], minor=True)
            axes.grid(which="minor", color="white", linewidth=0.5)
            axes.tick_params(which="minor", length=0)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        empty, partial, full = self.counts
        counts = f"{full} full, {partial} partial, {empty} empty tiles of {self.tile[0]} x {self.tile[1]}"
        axes.set_title(f"{self.title}\n{counts}", fontsize=10)
        keys = [
            patches.Patch(facecolor=COLOURS[k], edgecolor="#999999", label=NAMES[k]) for k in (FULL, PARTIAL, EMPTY)
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _merged(kinds: Kinds, step: int) -> Kinds:
    """Merge ``step`` x ``step`` tiles into one: empty or full where all of them are, partial otherwise."""
    if step == 1 or kinds.size == 0:
        return kinds
    rows, columns = (np.arange(0, n, step) for n in kinds.shape)

    def reduce(fn: np.ufunc) -> Kinds:
        out: Kinds = fn.reduceat(fn.reduceat(kinds, rows, axis=0), columns, axis=1)
        return out

    low, high = reduce(np.minimum), reduce(np.maximum)
    return np.where(low == high, low, PARTIAL).astype(np.uint8)


def picture_of(runs: RunMap, title: str, *, batch: int = 0, head: int = 0) -> TilePicture:
    """Draw one batch element and head of a run map."""
    kinds = np.asarray(runs.tile_kinds(batch, head), dtype=np.uint8)
    return TilePicture(title, kinds, runs.tile, *runs.sizes)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)`` and move the result to ``path``, so that ``path`` is never half written.

    Raises:
        UsageError: the folder does not exist or cannot be written.
    """
    folder = path.parent
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; give the name of a file")
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
        os.close(handle)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
