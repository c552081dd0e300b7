"""The entry point: the run map of a program at known sizes, parameters and captured tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnlang.ir import Program, UsageError

from .classify import Classifier, prepare
from .descend import descend
from .layout import Layout, lay_out
from .refine import refine
from .runmap import RunMap

__all__ = ["analyse"]


def _check(sizes: Mapping[str, int], tile: tuple[int, int]) -> None:
    for name in ("Lq", "Lk"):
        if sizes.get(name, -1) < 0:
            raise UsageError(f"size {name!r} must be given and not negative, got {sizes.get(name)}")
        if sizes[name] >= 2**31:
            raise UsageError(f"{name} is {sizes[name]}; lengths go up to 2^31 - 1")
    if min(tile) < 1:
        raise UsageError(f"tile sides must be at least 1, got {tile}")


def analyse(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    tile: tuple[int, int] = (128, 128),
    *,
    precise: bool = True,
    layout: Layout | None = None,
) -> RunMap:
    """Prove for every tile that it is empty, that it is full, or leave it partial.

    ``sizes`` needs Lq and Lk, B and H if the mask depends on them, and every symbolic size the mask reads. ``params``
    are numbers or 0-d tensors; defaults of the program apply. Time and memory follow the boundary of the mask and the
    elements of the captured tensors, never Lq * Lk. Without ``precise``, tiles that are undecided as a whole are not
    cut any further; that saves milliseconds on small maps and may leave more tiles partial. Under a ``layout`` the
    tiles are those of its slots.

    Raises:
        UsageError: something the mask reads has no value, a size or tile is out of range, or the layout does not fit.
    """
    _check(sizes, tile)
    if layout is not None:
        laid = lay_out(program, layout, sizes, params, tensors)
        program, sizes, tensors = laid.program, laid.sizes, laid.tensors
    classifier = Classifier(program.mask, sizes, *prepare(program, params or {}, tensors or {}), tile)
    batch = sizes.get("B", 1) if classifier.reads_axis("b") else 1
    heads = sizes.get("H", 1) if classifier.reads_axis("h") else 1
    runs = descend(classifier, tile, (sizes["Lq"], sizes["Lk"]), batch, heads)
    return refine(classifier, runs) if precise else runs
