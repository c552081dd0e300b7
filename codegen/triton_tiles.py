"""Which tile a Triton kernel uses: a table per target, and a resource model that keeps shared memory within limits.

The table is data. :func:`candidates` filters it by the model and returns what is left in order of preference;
:func:`settle` takes the first that the compiler can keep in registers, so the choice is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from attnlang.ir import Load
from attnlang.passes.levels import Level

from .plan import KernelPlan
from .triton_common import Config, padded

__all__ = ["INTERPRETED", "candidates", "is_compiler_failure", "settle", "shared_bytes", "shared_limit"]

INTERPRETED = "interpret"
"""Target name of Triton's interpreter: small tiles, so that tests meet several of them."""

SHARED_LIMIT = {"cuda:80": 166_912, "cuda:87": 166_912, "cuda:90": 232_448, "cuda:100": 232_448, "cuda:103": 232_448}
"""Bytes of shared memory a block may use; other NVIDIA chips have 99 KiB, AMD chips 64 KiB."""
OTHER_CUDA_LIMIT, HIP_LIMIT = 101_376, 65_536

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
Tile = tuple[int, int, int, int]


@dataclass(frozen=True)
class Row:
    """Tiles for one class of kernels, best first: (queries, keys, warps, stages).

    A row serves kernels whose larger head dimension, padded, is at most ``head_dim``. ``loads`` tiles come first where
    the key loop reads captured tensors, which takes registers.
    """

    head_dim: int
    tiles: tuple[Tile, ...]
    loads: tuple[Tile, ...] = ()


HOPPER = (
    Row(
        64,
        ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2), (64, 16, 8, 2)),
        ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 8, 2), (64, 16, 8, 2)),
    ),
    Row(128, ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 8, 2), (64, 16, 8, 2))),
    Row(256, ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2))),
    Row(512, ((64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1), (32, 16, 8, 1))),
)
BLACKWELL = (
    Row(64, ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 8, 2), (64, 16, 8, 2))),
    Row(128, ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 8, 2), (64, 16, 8, 2))),
    Row(256, ((128, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2))),
    Row(512, ((64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1), (32, 16, 8, 1))),
)
AMPERE = (
    Row(64, ((128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 8, 2), (32, 16, 8, 1))),
    Row(
        128,
        (
            (128, 64, 8, 3),
            (128, 64, 8, 2),
            (64, 64, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 8, 2),
            (64, 16, 8, 2),
            (32, 16, 4, 1),
        ),
    ),
    Row(256, ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1))),
    Row(512, ((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1))),
)
AMD = (
    Row(64, ((128, 64, 4, 2), (128, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1))),
    Row(128, ((128, 64, 4, 1), (128, 32, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1))),
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
    if dtype == "float32":  # products are made without matrix units, to be exact
        return FULL_FLOAT
    if target.startswith("hip:"):
        return AMD
    return {"cuda:90": HOPPER, "cuda:100": BLACKWELL, "cuda:103": BLACKWELL}.get(target, AMPERE)


def shared_limit(target: str) -> int:
    """Return the bytes of shared memory that one block may use on ``target``."""
    return HIP_LIMIT if target.startswith("hip:") else SHARED_LIMIT.get(target, OTHER_CUDA_LIMIT)


def _loads(plan: KernelPlan, level: Level) -> int:
    values = plan.partial.pair if level is Level.PAIR else plan.partial.col
    return sum(isinstance(v.expr, Load) for v in values)


def shared_bytes(plan: KernelPlan, config: Config) -> int:
    """Return an upper estimate of the shared memory of a kernel in bytes.

    The query or output tile once, keys and values for each stage, and for captured tensors that are read for each pair
    the tiles that the pipeline stages.
    """
    size = BYTES[plan.dtype]
    d, dv = padded(plan.head_dim), padded(plan.value_dim)
    rows = config.block_m * max(d, dv) * size
    keys = config.stages * config.block_n * (d + dv) * size
    pairs = _loads(plan, Level.PAIR) * max(1, config.stages - 1) * config.block_m * config.block_n * 4
    vectors = (1 + _loads(plan, Level.COL)) * config.stages * config.block_n * 8
    return rows + keys + pairs + vectors + 1024


MOST_PAIRS = 128 * 64
"""Pairs of a tile where a loop over features computes more than a product: larger ones spill registers."""


def candidates(plan: KernelPlan, target: str, *, descriptors: bool = False) -> tuple[Config, ...]:
    """Return the tiles that fit ``target`` in order of preference; never empty."""
    width = max(padded(plan.head_dim), padded(plan.value_dim))
    table = _table(target, plan.dtype)
    row = next((r for r in table if width <= r.head_dim), table[-1])
    loaded = _loads(plan, Level.COL) + _loads(plan, Level.PAIR) > 0
    tiles = row.loads if loaded and row.loads else row.tiles
    configs = tuple(replace(Config(*tile), descriptors=descriptors) for tile in tiles)
    if plan.body is not None:
        configs = tuple(c for c in configs if c.block_m * c.block_n <= MOST_PAIRS) or configs[-1:]
    if target == INTERPRETED:
        return configs
    fitting = tuple(c for c in configs if shared_bytes(plan, c) <= shared_limit(target))
    return fitting or configs[-1:]


COMPILER_FAILURES = ("PassManager::run failed", "failed to translate module")
"""What a RuntimeError of Triton says where its compiler fails on a valid kernel, as some versions do at some tiles."""


def is_compiler_failure(message: str) -> bool:
    """Whether an error says that Triton's compiler failed on a kernel at one tile, which another tile may avoid."""
    return any(words in message for words in COMPILER_FAILURES)


def settle(configs: tuple[Config, ...], spills: Callable[[Config], int | None]) -> Config | None:
    """Return the first tile without spilled registers, or the one with the fewest; None where nothing fits.

    ``spills`` compiles a tile and returns how much it spills, None if it does not fit the device or does not compile.
    """
    best: tuple[int, Config] | None = None
    for config in configs:
        amount = spills(config)
        if amount is not None and (best is None or amount < best[0]):
            best = amount, config
        if amount == 0:
            break
    return best[1] if best else None
