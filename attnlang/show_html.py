"""A mask as a web page to zoom and move about in, drawn from runs: one file, no network, small at a million tokens.

The page holds the run map at the tile of a kernel and at every tile twice as large, up to a handful of cells. Each run
is stored as its difference from the run in the same place of the row above, and the whole is deflated: a mask of any
length whose rows resemble each other takes a few kilobytes. Where the finest maps are too large even so, they are left
out, and the page says so.
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from importlib import resources
from pathlib import Path

import numpy as np

from attnlang.sparsity import RunMap

from .show import COLOURS, write_atomically

__all__ = ["page_of", "write_page"]

BYTES = 256 << 10
"""What all levels together may take, encoded."""
RUNS = 1 << 20
"""Runs of the finest level; a browser draws this many without delay."""
CELLS = 32
"""Rows and columns of the coarsest level, at most."""


def _one(runs: RunMap, batch: int, head: int) -> RunMap:
    """The map of one batch element and head."""
    first = (min(batch, runs.batch - 1) * runs.heads + min(head, runs.heads - 1)) * runs.nq
    ptr = runs.ptr[first : first + runs.nq + 1]
    low, high = int(ptr[0]), int(ptr[-1])
    parts = runs.start[low:high], runs.end[low:high], runs.kind[low:high]
    return RunMap(runs.tile, runs.sizes, 1, 1, ptr - low, *parts)


def _encode(runs: RunMap) -> str:
    """Base64 of deflated int32 differences: runs of each row, first tiles, lengths; then the kinds as bytes."""
    count = np.diff(runs.ptr)
    row = runs.row_of_run()
    place = np.arange(len(row)) - runs.ptr[row]
    above = np.where(row > 0, runs.ptr[row - 1] + place, 0)
    known = (row > 0) & (place < count[row - 1])
    parts = [np.diff(count, prepend=0)]
    for values in (runs.start, runs.end - runs.start):
        parts.append(values - np.where(known, values[above], 0))
    raw = np.concatenate(parts).astype("<i4").tobytes() + runs.kind.tobytes()
    return base64.b64encode(zlib.compress(raw, 6)).decode("ascii")


def _levels(runs: RunMap) -> list[tuple[RunMap, str]]:
    """The map and its coarser forms, finest first; levels that do not fit are left out from the finest on."""
    maps = [runs]
    while max(maps[-1].nq, maps[-1].nk) > CELLS:
        maps.append(maps[-1].retile((maps[-1].tile[0] * 2, maps[-1].tile[1] * 2)))
    kept: list[tuple[RunMap, str]] = []
    room = BYTES
    for level in reversed(maps):
        if len(level.start) > RUNS and kept:
            break
        text = _encode(level)
        room -= len(text)
        if room < 0 and kept:
            break
        kept.append((level, text))
    return kept[::-1]


def page_of(runs: RunMap, title: str, *, batch: int = 0, head: int = 0) -> str:
    """Return a self-contained HTML page of one batch element and head of a run map."""
    one = _one(runs, batch, head)
    levels = _levels(one)
    empty, partial, full = one.counts()
    total = max(1, empty + partial + full)
    (lq, lk), (bm, bn) = one.sizes, one.tile
    summary = (
        f"{lq:,} queries x {lk:,} keys in tiles of {bm} x {bn}: {full:,} full, {partial:,} partial, {empty:,} empty; "
        f"{(partial + full) / total:.2%} of the tiles are computed"
    )
    note = "" if levels[0][0].tile == one.tile else f"; the map of {bm} x {bn} is too large for this page"
    data = {
        "lengths": [lq, lk],
        "note": note,
        "levels": [{"tile": list(level.tile), "runs": len(level.start), "data": text} for level, text in levels],
    }
    page = (resources.files("attnlang") / "show_page.html").read_text(encoding="utf-8")
    fields = {
        "@@TITLE@@": html.escape(title),
        "@@SUMMARY@@": html.escape(summary),
        "@@DATA@@": json.dumps(data).replace("<", "\\u003c"),
        **dict(zip(("@@EMPTY@@", "@@PARTIAL@@", "@@FULL@@"), COLOURS, strict=True)),
    }
    head_, *pieces = page.split("@@")
    out = [head_]
    for name, text in zip(pieces[::2], pieces[1::2], strict=True):  # one pass: what is filled in is not looked at again
        out += [fields[f"@@{name}@@"], text]
    return "".join(out)


def write_page(path: Path, runs: RunMap, title: str, *, batch: int = 0, head: int = 0) -> int:
    """Write the page of :func:`page_of`; ``path`` appears only when it is complete. Return its size in bytes.

    Raises:
        UsageError: the file cannot be written.
    """
    data = page_of(runs, title, batch=batch, head=head).encode("utf-8")
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    return len(data)
