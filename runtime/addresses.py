"""Which rows kernels read where they are: at the usual addresses, or for keys and values at one they compute."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from attnlang.ir import KEY_ADDRESS, QUERY_ADDRESS, Attend, Environment, Operand
from attnlang.passes.levels import axes_of

__all__ = ["fits", "in_place", "queries_fit", "readable"]

Tensor = torch.Tensor


def readable(keys: Operand) -> bool:
    """Whether kernels can compute the address: batch element and head for a query head, any row for a key."""
    if len(keys.index) != 3:
        return False
    batch, head, row = (axes_of(e)[e] for e in keys.index)
    return batch | head <= {"b", "h"} and row <= {"b", "h", "k"}


def fits(keys: Operand, rows: Tensor, sizes: Mapping[str, int]) -> bool:
    """Whether kernels may read the rows of ``keys`` in the tensor ``rows``.

    Addresses that a program states are moved into the tensor; usual ones have to be inside.
    """
    if rows.dim() != 4 or not rows.shape[1]:
        return False
    usual = rows.shape[0] == sizes["B"] and sizes["H"] % rows.shape[1] == 0
    if keys.index == KEY_ADDRESS:
        return usual and rows.shape[2] == sizes["Lk"]
    if not readable(keys) or 0 in rows.shape[:3] or rows.shape[1] != sizes["Hkv"]:
        return False
    if keys.index[:2] == KEY_ADDRESS[:2] and not usual:
        return False
    return keys.index[2] is not KEY_ADDRESS.row or rows.shape[2] == sizes["Lk"]


def queries_fit(queries: Operand, rows: Tensor, sizes: Mapping[str, int]) -> bool:
    """Whether kernels may read the rows of ``queries`` in the tensor ``rows``."""
    return queries.index == QUERY_ADDRESS and tuple(rows.shape[:3]) == tuple(sizes[n] for n in ("B", "H", "Lq"))


def in_place(stage: Attend, env: Environment, sizes: Mapping[str, int]) -> bool:
    """Whether a forward kernel for ``stage`` finds all its rows itself: one score term, and values where keys are.

    The other kernels read rows at the usual addresses only.
    """
    if len(stage.terms) != 1:
        return False
    (term,) = stage.terms
    rows = [out.rows for out in stage.outputs if out.rows is not None]
    if any(x.index != term.right.index for x in rows) or any(out.key or "q" in out.over for out in stage.outputs):
        return False
    keys = [term.right, *rows]
    shapes = {env.rows(x.source).shape[:3] for x in keys}
    found = all(fits(x, env.rows(x.source), sizes) for x in keys)
    return found and len(shapes) == 1 and queries_fit(term.left, env.rows(term.left.source), sizes)
