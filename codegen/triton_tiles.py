"""Which tile a Triton kernel uses: a table per target, and a resource model that keeps shared memory within limits.

The table is data; :func:`candidates` filters it by the model and returns what is left in order of preference, so that a
launch that runs out of a resource can step down deterministically.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnlang.ir import Load
from attnlang.passes.levels import Level

from .plan import KernelPlan
from .triton import Config, padded

__all__ = ["INTERPRETED", "SHARED_LIMIT", "candidates", "shared_bytes"]

INTERPRETED = "interpret"
"""Target name of Triton's interpreter: small tiles, so that tests meet several of them."""

SHARED_LIMIT = {"cuda:80": 166_912, "cuda:86": 101_376, "cuda:89": 101_376, "cuda:90": 232_448, "cuda:100": 232_448}
"""Bytes of shared memory a block may use, by target; other NVIDIA chips are taken to have 99 KiB, AMD chips 64 KiB."""
SHARED_LIMIT["cuda:120"] = SHARED_LIMIT["cuda:121"] = SHARED_LIMIT["cuda:86"]

HIP_LIMIT = 65_536
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Row:
    """Tiles for one class of kernels, best first: (queries, keys, warps, stages).

    A row serves kernels whose larger head dimension, padded, is at most ``head_dim``.
    """

    head_dim: int
    tiles: tuple[tuple[int, int, int, int], ...]


HALF_HOPPER = (
    Row(64, ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2))),
    Row(128, ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2))),
    Row(256, ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2))),
    Row(512, ((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1))),
)
HALF_AMPERE = (
    Row(64, ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2))),
    Row(128, ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2))),
    Row(256, ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1))),
    Row(512, ((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1))),
)
HALF_AMD = (
    Row(64, ((128, 64, 4, 2), (128, 64, 4, 1), (64, 64, 4, 1))),
    Row(128, ((128, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1))),
    Row(256, ((64, 32, 4, 1), (32, 32, 4, 1))),
    Row(512, ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1))),
)
FULL_FLOAT = (
    Row(64, ((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 1))),
    Row(128, ((32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 4, 1))),
    Row(256, ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1))),
    Row(512, ((16, 32, 8, 1), (16, 16, 8, 1))),
)
SMALL = (Row(512, ((32, 16, 4, 1),)),)


def _table(target: str, dtype: str) -> tuple[Row, ...]:
    if target == INTERPRETED:
        return SMALL
    if dtype == "float32":
        return FULL_FLOAT
    if target.startswith("hip:"):
        return HALF_AMD
    return HALF_HOPPER if target in ("cuda:90", "cuda:100", "cuda:103") else HALF_AMPERE


def _limit(target: str) -> int:
    if target.startswith("hip:"):
        return HIP_LIMIT
    return SHARED_LIMIT.get(target, SHARED_LIMIT["cuda:86"])


def shared_bytes(plan: KernelPlan, config: Config) -> int:
    """Return an upper estimate of the shared memory of a kernel in bytes.

    q once, k and v once for each stage, and one staged tile for each gather (a captured tensor read per pair).
    """
    size = BYTES[plan.dtype]
    d, dv = padded(plan.head_dim), padded(plan.value_dim)
    rows = config.block_m * max(d, dv) * size
    keys = config.stages * config.block_n * (d + dv) * size
    pairs = plan.partial.pair
    gathers = sum(1 for v in pairs if isinstance(v.expr, Load) and v.level is Level.PAIR)
    return rows + keys + min(gathers, 1) * config.block_m * config.block_n * 4


def candidates(plan: KernelPlan, target: str) -> tuple[Config, ...]:
    """Return the tiles that fit ``target`` in order of preference; never empty."""
    width = max(padded(plan.head_dim), padded(plan.value_dim))
    table = _table(target, plan.dtype)
    row = next((r for r in table if width <= r.head_dim), table[-1])
    configs = tuple(Config(*tile) for tile in row.tiles)
    if target == INTERPRETED:
        return configs
    fitting = tuple(c for c in configs if shared_bytes(plan, c) <= _limit(target))
    return fitting or configs[-1:]
