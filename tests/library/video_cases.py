"""Dense definitions of ``video.attn``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from library.records import Case, Points, Setup, groups_mask, square
from library.vision_cases import nearest

Tensor = torch.Tensor
AXES = ("t", "y", "x")


def sides(p: Points) -> tuple[int, int, int]:
    return p["frames"], p["height"], p["width"]


def cells(p: Points) -> Tensor:
    count = p["frames"] * p["height"] * p["width"]
    return torch.arange(count).view(sides(p))


def volume(axis: Callable[[Points, str, int, int], list[int]]) -> Callable[[Points], Tensor]:
    """Product of a rule ``axis(p, name, coordinate, length)`` over time, rows and columns."""

    def mask(p: Points) -> Tensor:
        lengths = sides(p)
        out = torch.zeros(*lengths, *lengths, dtype=torch.bool)
        for at in product(*map(range, lengths)):
            t, y, x = (torch.tensor(axis(p, *args)) for args in zip(AXES, at, lengths, strict=True))
            out[at][t[:, None, None], y[:, None], x] = True
        return out.view(cells(p).numel(), -1)

    return mask


def nat_axis(p: Points, name: str, i: int, length: int) -> list[int]:
    return nearest(i, list(range(length)), p["window_t"] if name == "t" else p["window"])


def dilated_axis(p: Points, name: str, i: int, length: int) -> list[int]:
    members = list(range(i % p["dilation"], length, p["dilation"]))
    return nearest(members.index(i), members, p["window"])


def gna_axis(p: Points, name: str, i: int, length: int) -> list[int]:
    window, stride = p[f"window_{name}"], p[f"stride_{name}"]
    group = list(range(length))[i // stride * stride :][:stride]
    leader = group[min(stride // 2, len(group) - 1)]
    return nearest(leader, list(range(length)), window)


def tile_axis(p: Points, name: str, i: int, length: int) -> list[int]:
    tiles = list(torch.arange(length).split(p["tile"]))
    chosen = nearest(i // p["tile"], list(range(len(tiles))), 2 * p["reach"] + 1)
    return [int(j) for n in chosen for j in tiles[n]]


def inward_axis(p: Points, name: str, i: int, length: int) -> list[int]:
    return list(range(length)) if name == "t" else nearest(i, list(range(length)), 2 * p[f"radius_{name}"] + 1)


def video_swin(p: Points) -> Tensor:
    """The roll, the region mask and the partition of the released model, in three dimensions."""
    size = (p["window_t"], p["window"], p["window"])
    shift = (p["shift_t"], p["shift"], p["shift"])
    ids = cells(p)
    pads = [-n % m for n, m in zip(ids.shape, size, strict=True)]
    ids = F.pad(ids, (0, pads[2], 0, pads[1], 0, pads[0]), value=-1)
    regions = torch.zeros_like(ids)
    spans = [(slice(-m), slice(-m, -s), slice(-s, None)) for m, s in zip(size, shift, strict=True)]
    for n, part in enumerate(product(*spans)):
        regions[part] = n
    ids = ids.roll([-s for s in shift], (0, 1, 2))

    def partition(x: Tensor) -> Tensor:
        for dim, m in enumerate(size):
            x = x.unfold(dim, m, m)
        return x.reshape(-1, size[0] * size[1] * size[2])

    count = p["frames"] * p["height"] * p["width"]
    mask = torch.zeros(count + 1, count + 1, dtype=torch.bool)
    for tokens, parts in zip(partition(ids), partition(regions), strict=True):
        mask[tokens[:, None], tokens[None, :]] |= parts[:, None] == parts[None, :]
    return mask[:count, :count]


def divided_space(p: Points) -> Tensor:
    return groups_mask(p.shape.Lk, cells(p).flatten(1))


def divided_time(p: Points) -> Tensor:
    return groups_mask(p.shape.Lk, cells(p).flatten(1).T)


def spatiotemporal_window(p: Points) -> Tensor:
    blocks = [part for rows in cells(p).split(p["window"], 1) for part in rows.split(p["window"], 2)]
    return groups_mask(p.shape.Lk, blocks)


def with_text(p: Points, video: Tensor) -> Tensor:
    """Add text rows and columns that see and are seen by everything, and the first frame as a sink."""
    count = p["frames"] * p["frame"]
    mask = torch.ones(*video.shape[:-2], p.shape.Lq, p.shape.Lk, dtype=torch.bool)
    mask[..., :count, :count] = video
    mask[..., : p["frame"]] = True
    return mask


def make_kinds(setup: Setup, g: torch.Generator) -> dict[str, Any]:
    return {"by_frame": torch.arange(setup.shape.H) % 2 == 0}


def band(n: int, width: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril(width).triu(-width)


def sparse_videogen(p: Points) -> Tensor:
    frames, frame = p["frames"], p["frame"]
    inside = torch.kron(band(frames, p["near_frames"]).int(), torch.ones(frame, frame, dtype=torch.int32))
    across = band(frame, p["near_tokens"]).repeat(frames, frames)
    heads = [inside.bool() if kind else across for kind in p.tensors["by_frame"].tolist()]
    return with_text(p, torch.stack(heads))


def radial(p: Points) -> Tensor:
    """One square of the mask for each pair of frames."""
    frames, frame, block = p["frames"], p["frame"], p["block"]
    video = torch.zeros(frames, frame, frames, frame, dtype=torch.bool)
    for i, j in product(range(frames), repeat=2):
        distance = abs(i - j)
        halved = 2 ** frame.bit_length() / 2 ** distance.bit_length()
        if distance == 1 and p["half_next"]:
            square_mask = band(frame, frame // 2)
        elif distance <= 1:
            square_mask = band(frame, frame)
        elif halved >= block or distance % int(block / halved) == 0:
            square_mask = band(frame, int(max(halved * p["decay"], block)))
        else:
            square_mask = band(frame, 0) & False
        video[i, :, j] = square_mask
    return with_text(p, video.view(frames * frame, -1))


def clip(frames: int, height: int, width: int, **params: Any) -> Setup:
    """Self-attention over a whole volume."""
    return square(frames * height * width, frames=frames, height=height, width=width, **params)


def dit(frames: int, frame: int, text: int, **params: Any) -> Setup:
    """A video and then text."""
    return square(frames * frame + text, frames=frames, frame=frame, **params)


_GNA_TINY = {"window_t": 2, "window_y": 2, "window_x": 3, "stride_t": 1, "stride_y": 2, "stride_x": 2}
_GNA_MEDIUM = {"window_t": 3, "window_y": 3, "window_x": 4, "stride_t": 2, "stride_y": 3, "stride_x": 3}

_CASES = {
    "neighborhood_3d": Case(
        "neighborhood_3d",
        clip(2, 3, 5, window_t=2, window=3),
        clip(5, 6, 8, window_t=3, window=5),
        volume(nat_axis),
    ),
    "dilated_neighborhood_3d": Case(
        "dilated_neighborhood_3d",
        clip(2, 3, 5, window=2, dilation=2),
        clip(5, 7, 7, window=2, dilation=3),
        volume(dilated_axis),
    ),
    "gna_3d": Case("gna_3d", clip(2, 3, 5, **_GNA_TINY), clip(5, 6, 8, **_GNA_MEDIUM), volume(gna_axis)),
    "sliding_tile": Case(
        "sliding_tile", clip(1, 4, 8, tile=1, reach=1), clip(4, 8, 8, tile=2, reach=1), volume(tile_axis)
    ),
    "video_swin": Case(
        "video_swin",
        clip(2, 4, 4, window_t=2, window=2, shift_t=1, shift=1),
        clip(5, 6, 8, window_t=4, window=3, shift_t=2, shift=1),
        video_swin,
    ),
    "divided_space": Case("divided_space", clip(3, 2, 5), clip(5, 6, 8), divided_space),
    "divided_time": Case("divided_time", clip(3, 2, 5), clip(5, 6, 8), divided_time),
    "spatiotemporal_window": Case(
        "spatiotemporal_window", clip(2, 3, 5, window=2), clip(5, 6, 8, window=4), spatiotemporal_window
    ),
    "inward_window": Case(
        "inward_window",
        clip(2, 3, 5, radius_y=1, radius_x=1),
        clip(4, 7, 9, radius_y=2, radius_x=3),
        volume(inward_axis),
    ),
    "sparse_videogen": Case(
        "sparse_videogen",
        dit(4, 7, 3, near_frames=1, near_tokens=1),
        dit(12, 19, 13, near_frames=2, near_tokens=4),
        sparse_videogen,
        tensors=make_kinds,
    ),
    "radial": Case(
        "radial",
        dit(5, 6, 1, block=2, decay=1.0, half_next=False),
        dit(24, 10, 5, block=4, decay=0.75, half_next=False),
        radial,
    ),
    "radial/half_next": Case(
        "radial",
        dit(5, 6, 1, block=3, decay=1.0, half_next=True),
        dit(16, 15, 9, block=8, decay=1.0, half_next=True),
        radial,
    ),
}

CASES = {name: replace(case, resizable=False) for name, case in _CASES.items()}
