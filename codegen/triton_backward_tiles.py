"""Which tiles the Triton backward kernels use: a small table, and a model that keeps shared memory within limits."""

from __future__ import annotations

from .plan import KernelPlan
from .triton_backward_arguments import QUERIES, has_diagonals
from .triton_common import Config, padded
from .triton_tiles import INTERPRETED, shared_limit

__all__ = ["candidates", "shared_bytes"]

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

_Rows = tuple[tuple[int, tuple[tuple[int, int, int, int], ...]], ...]

# (largest padded head dimension, tiles (queries, keys, warps, stages), best first)
_HALF: _Rows = (
    (64, ((64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 1), (16, 32, 4, 1))),
    (128, ((64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1))),
    (256, ((32, 64, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1))),
    (512, ((16, 32, 8, 1), (16, 16, 8, 1))),
)
_AMD: _Rows = (
    (64, ((64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1))),
    (128, ((64, 32, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1))),
    (256, ((32, 32, 4, 1), (16, 32, 4, 1))),
    (512, ((16, 16, 4, 1),)),
)
_FULL: _Rows = (
    (64, ((32, 64, 8, 2), (32, 32, 8, 2), (32, 32, 4, 1))),
    (128, ((32, 32, 8, 1), (16, 32, 8, 1))),
    (512, ((16, 32, 8, 1), (16, 16, 8, 1))),
)


def shared_bytes(plan: KernelPlan, kernel: str, config: Config) -> int:
    """Return an upper estimate of the shared memory of a kernel in bytes.

    The rows that stay and, once for each stage, the rows that are streamed, of two tensors each; two tiles of pairs.
    """
    row = (padded(plan.head_dim) + padded(plan.value_dim)) * BYTES[plan.dtype]
    stay, stream = (config.block_m, config.block_n)[:: 1 if kernel == QUERIES else -1]
    return (stay + config.stages * stream) * row + 2 * config.block_m * config.block_n * BYTES[plan.dtype]


def candidates(plan: KernelPlan, kernel: str, target: str) -> tuple[Config, ...]:
    """Return the tiles of the ``queries`` or ``keys`` kernel that fit ``target``, best first; never empty."""
    if target == INTERPRETED:
        return (Config(16, 32, 4, 1),)
    table = _FULL if plan.dtype == "float32" else _AMD if target.startswith("hip:") else _HALF
    width = max(padded(plan.head_dim), padded(plan.value_dim))
    tiles = next((tiles for most, tiles in table if width <= most), table[-1][1])
    configs = tuple(Config(*tile) for tile in tiles)
    if kernel == QUERIES and has_diagonals(plan):  # a tile is skewed along its keys
        configs = tuple(c for c in configs if c.block_m <= c.block_n)
    fitting = tuple(c for c in configs if shared_bytes(plan, kernel, c) <= shared_limit(target))
    return fitting or configs[-1:]
