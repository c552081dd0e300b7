"""Which tiles the Triton backward kernels use: a small table, and a model that keeps shared memory within limits."""

from __future__ import annotations

from .plan import KernelPlan
from .triton import Config, padded
from .triton_backward import QUERIES
from .triton_tiles import INTERPRETED, SHARED_LIMIT

__all__ = ["candidates", "shared_bytes"]

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
HIP_LIMIT = 65_536

# (largest padded head dimension, tiles (queries, keys, warps, stages), best first); queries <= keys, as sums along
# diagonals ask
_HALF = (
    (64, ((64, 64, 4, 2), (64, 64, 4, 1), (32, 64, 4, 1))),
    (128, ((64, 64, 8, 2), (64, 64, 8, 1), (32, 64, 4, 1), (32, 32, 4, 1))),
    (256, ((32, 64, 8, 1), (32, 32, 8, 1), (16, 32, 4, 1))),
    (512, ((16, 32, 8, 1), (16, 16, 8, 1))),
)
_FULL = (
    (64, ((32, 64, 8, 2), (32, 32, 4, 2), (32, 32, 4, 1))),
    (128, ((32, 32, 8, 1), (16, 32, 4, 1))),
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
    width = max(padded(plan.head_dim), padded(plan.value_dim))
    table = _FULL if plan.dtype == "float32" else _HALF
    tiles = next((tiles for most, tiles in table if width <= most), table[-1][1])
    is_hip = target.startswith("hip:")
    configs = [Config(m, n, warps, 1 if is_hip else stages) for m, n, warps, stages in tiles]
    limit = HIP_LIMIT if is_hip else SHARED_LIMIT.get(target, SHARED_LIMIT["cuda:86"])
    fitting = tuple(dict.fromkeys(c for c in configs if shared_bytes(plan, kernel, c) <= limit))
    return fitting or tuple(configs[-1:])
