"""Build calls of the C++ backend by hand: every tile classified by brute force from the dense mask."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attnlang.ir import Program, dense_mask, reference_attention
from attnlang.runtime.call import Call
from attnlang.runtime.cpp import forward

Tensor = torch.Tensor


@dataclass(frozen=True)
class Table:
    full_ptr: np.ndarray
    full_runs: np.ndarray
    part_ptr: np.ndarray
    part_runs: np.ndarray


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(int), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


class BruteForceRuns:
    """A run map from the dense mask [B, H, Lq, Lk]; with ``partial`` every tile that is not empty is PARTIAL."""

    def __init__(self, mask: Tensor, tile: tuple[int, int], partial: bool = False) -> None:
        self.batch, self.heads, lq, lk = mask.shape
        rows, cols = tile
        lists: tuple[list[int], list[Any], list[int], list[Any]] = ([0], [], [0], [])
        for line in mask.reshape(self.batch * self.heads, lq, lk):
            for first in range(0, lq, rows):
                tiles = [line[first : first + rows, at : at + cols] for at in range(0, lk, cols)]
                full = np.array([bool(t.all()) and t.shape[1] == cols and not partial for t in tiles], dtype=bool)
                some = np.array([bool(t.any()) for t in tiles], dtype=bool) & ~full
                for at, flags in ((0, full), (2, some)):
                    lists[at + 1].extend(_runs(flags))
                    lists[at].append(len(lists[at + 1]))
        arrays = [np.array(x, dtype=np.int32) for x in lists]
        self.table = Table(arrays[0], arrays[1].reshape(-1, 2), arrays[2], arrays[3].reshape(-1, 2))

    def launch_table(self) -> Table:
        return self.table


@functools.cache
def diagonal(tile: tuple[int, int], length: int = 400) -> BruteForceRuns:
    """PARTIAL runs along the diagonal, whatever the mask."""
    return BruteForceRuns(torch.eye(length, dtype=torch.bool)[None, None], tile, partial=True)


def make_call(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    sizes: Mapping[str, int] | None = None,
    scale: float | None = None,
    partial: bool = False,
    runs: Callable[[tuple[int, int]], Any] | None = None,
) -> Call:
    bound = {"B": q.shape[0], "H": q.shape[1], "Hkv": k.shape[1], "Lq": q.shape[2], "Lk": k.shape[2], **(sizes or {})}
    params, tensors = params or {}, tensors or {}
    found: dict[tuple[int, int], BruteForceRuns] = {}

    def from_mask(tile: tuple[int, int]) -> Any:
        if tile not in found:
            mask = dense_mask(program, bound, params, tensors)
            found[tile] = BruteForceRuns(mask, tile, partial)
        return found[tile]

    return Call(
        program, q, k, v, bound, params, tensors, q.shape[3] ** -0.5 if scale is None else scale, runs or from_mask
    )


def check(call: Call, atol: float = 2e-5, rtol: float = 2e-5) -> tuple[Tensor, Tensor]:
    """Compare the C++ backend with the reference in float64 and return what it gave."""
    o, lse = forward(call)
    want = reference_attention(
        call.program, call.q, call.k, call.v, call.sizes, call.params, call.tensors, call.scale, torch.float64
    )
    assert o.dtype is call.q.dtype and lse.dtype is torch.float32
    torch.testing.assert_close(o.double(), want[0], atol=atol, rtol=rtol, equal_nan=True)
    torch.testing.assert_close(lse.double(), want[1], atol=max(atol, 2e-5), rtol=max(rtol, 2e-5), equal_nan=True)
    return o, lse
