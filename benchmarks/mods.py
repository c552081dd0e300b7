"""The masks of the table at a million tokens as functions for FlexAttention, written as its users write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["mods"]

Mod = Callable[..., Any]


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def causal_window(window: int) -> Mod:
    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (q - k <= window)

    return mod


def document(doc: torch.Tensor) -> Mod:
    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return doc[q] == doc[k]

    return mod


def causal_document(doc: torch.Tensor) -> Mod:
    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (doc[q] == doc[k])

    return mod


def prefix_lm(prefix: torch.Tensor) -> Mod:
    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k < prefix[b]) | (q >= k)

    return mod


def longformer(flags: torch.Tensor, window: int = 256) -> Mod:
    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ((q - k).abs() <= window) | flags[q] | flags[k]

    return mod


def dilated_window(window: int, dilation: int) -> Mod:
    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        distance = (q - k).abs()
        return (distance <= window * dilation) & (distance % dilation == 0)

    return mod


def shifted_window(width: int, window: int, shift: int) -> Mod:
    move = window - shift

    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        rows = (q // width + move) // window == (k // width + move) // window
        return rows & ((q % width + move) // window == (k % width + move) // window)

    return mod


def inside(q: Any, k: Any, extent: int, window: int) -> Any:
    """Whether k lies in the window around q that is pushed inward at the borders."""
    start = (q - window // 2).clamp(0, extent - window)
    return (k >= start) & (k < start + window)


def neighborhood(extents: tuple[int, ...], windows: tuple[int, ...]) -> Mod:
    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen = None
        for extent, window in zip(extents[:0:-1], windows[:0:-1], strict=True):
            near = inside(q % extent, k % extent, extent, window)
            seen = near if seen is None else seen & near
            q, k = q // extent, k // extent
        return inside(q, k, extents[0], windows[0]) & seen

    return mod


def mods(doc: torch.Tensor, first: torch.Tensor, scattered: torch.Tensor) -> dict[str, Mod]:
    """The functions by the names of the table; ``doc`` int64 [N], the two sets of global tokens bool [N]."""
    return {
        "causal": causal,
        "causal window 4096": causal_window(4096),
        "1000 documents": document(doc),
        "1000 causal documents": causal_document(doc),
        "prefix LM": prefix_lm(torch.tensor([5000])),
        "Longformer, 64 first tokens": longformer(first),
        "Longformer, 64 scattered tokens": longformer(scattered),
        "dilated window": dilated_window(256, 8),
        "Swin 1024x1024": shifted_window(1024, 8, 4),
        "2-D neighbourhood 1024x1024": neighborhood((1024, 1024), (7, 7)),
        "3-D neighbourhood 64x128x128": neighborhood((64, 128, 128), (3, 7, 7)),
    }
