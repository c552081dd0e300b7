"""Dense definitions of ``vision.attn``: masks are built on the pixel grid, as [height, width, height, width]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from library.records import Case, Points, Setup, Shape, cross, floats, groups_mask, square

Tensor = torch.Tensor
Generator = torch.Generator
Axis = Callable[[int, int, Points], list[int]]
"""Keys that a coordinate sees on an axis of the given length."""


def nearest(i: int, members: list[int], window: int) -> list[int]:
    """The ``window`` members round position i of the list; the window is moved inside, not cut."""
    left = i - window // 2
    right = left + window
    if left < 0:
        left, right = 0, window
    if right > len(members):
        left, right = max(0, len(members) - window), len(members)
    return members[left:right]


def nat_axis(i: int, length: int, p: Points) -> list[int]:
    return nearest(i, list(range(length)), p["window"])


def dilated_axis(i: int, length: int, p: Points) -> list[int]:
    members = list(range(i % p["dilation"], length, p["dilation"]))
    return nearest(members.index(i), members, p["window"])


def gna_axis(i: int, length: int, p: Points) -> list[int]:
    group = i // p["stride"]
    leader = min(group * p["stride"] + p["stride"] // 2, length - 1)
    return nearest(leader, list(range(length)), p["window"])


def line(axis: Axis) -> Callable[[Points], Tensor]:
    return lambda p: p.rows(lambda i: axis(i, p.shape.Lk, p))


def plane(axis: Axis) -> Callable[[Points], Tensor]:
    """Product of one axis rule over rows and columns."""

    def mask(p: Points) -> Tensor:
        height, width = p["height"], p["width"]
        out = torch.zeros(height, width, height, width, dtype=torch.bool)
        for y in range(height):
            for x in range(width):
                rows, columns = torch.tensor(axis(y, height, p)), torch.tensor(axis(x, width, p))
                out[y, x, rows[:, None], columns] = True
        return out.view(height * width, -1)

    return mask


def make_table(setup: Setup, g: Generator) -> dict[str, Any]:
    side = 2 * setup.params["window"] - 1
    return {"table": floats((setup.shape.H, side, side), g)}


def nat_score(s: Tensor, p: Points) -> Tensor:
    """The bias of a window is a slice of the table that begins where the window begins, relative to the query."""
    height, width, window = p["height"], p["width"], p["window"]
    bias = torch.zeros(p.shape.H, height, width, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            rows, columns = nat_axis(y, height, p), nat_axis(x, width, p)
            top, left = rows[0] - y + window - 1, columns[0] - x + window - 1
            part = p.tensors["table"][:, top : top + window, left : left + window].double()
            bias[:, y, x, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = part
    return s + bias.view(p.shape.H, height * width, -1)


def pixels(p: Points) -> Tensor:
    return torch.arange(p["height"] * p["width"]).view(p["height"], p["width"])


def windows(ids: Tensor, size: int) -> Tensor:
    """Cut [height, width] into size x size squares, one a row; sides are padded with -1 first."""
    ids = F.pad(ids, (0, -ids.shape[1] % size, 0, -ids.shape[0] % size), value=-1)
    rows, columns = ids.shape[0] // size, ids.shape[1] // size
    return ids.view(rows, size, columns, size).transpose(1, 2).reshape(rows * columns, size * size)


def rolled_windows(p: Points, window: int, shift: int) -> tuple[Tensor, Tensor]:
    """Tokens and image regions of each window after padding and the cyclic roll, as in the released Swin."""
    ids = pixels(p)
    ids = F.pad(ids, (0, -ids.shape[1] % window, 0, -ids.shape[0] % window), value=-1)
    regions = torch.zeros_like(ids)
    if shift:
        spans = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for n, (rows, columns) in enumerate((r, c) for r in spans for c in spans):
            regions[rows, columns] = n
        ids = ids.roll((-shift, -shift), (0, 1))
    return windows(ids, window), windows(regions, window)


def swin_mask(p: Points, window: int, shift: int) -> Tensor:
    length = p["height"] * p["width"]
    mask = torch.zeros(length + 1, length + 1, dtype=torch.bool)  # the last row and column take the padding, -1
    for tokens, regions in zip(*rolled_windows(p, window, shift), strict=True):
        mask[tokens[:, None], tokens[None, :]] |= regions[:, None] == regions[None, :]
    return mask[:length, :length]


def shifted_window(p: Points) -> Tensor:
    return swin_mask(p, p["window"], p["shift"])


def swin_score(s: Tensor, p: Points) -> Tensor:
    window, length = p["window"], p["height"] * p["width"]
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()])
    relative = place[:, :, None] - place[:, None, :] + window - 1
    flat = relative[0] * (2 * window - 1) + relative[1]
    local = p.tensors["table"].double().flatten(1)[:, flat]
    bias = torch.zeros(p.shape.H, length + 1, length + 1, dtype=torch.float64)
    mask = torch.zeros(length + 1, length + 1, dtype=torch.bool)
    for tokens, regions in zip(*rolled_windows(p, window, p["shift"]), strict=True):
        same = regions[:, None] == regions[None, :]
        at = (tokens[:, None].expand_as(same)[same], tokens[None, :].expand_as(same)[same])
        bias[:, at[0], at[1]] = local[:, same]
        mask[at] = True
    return s + bias[:, :length, :length]


def double_window(p: Points) -> Tensor:
    first, second = swin_mask(p, p["window"], 0), swin_mask(p, p["window"], p["window"] // 2)
    half = p.shape.H // 2
    return torch.stack([first] * half + [second] * (p.shape.H - half))


def cyclic_window(p: Points) -> Tensor:
    rolled = pixels(p).roll((-p["shift_y"], -p["shift_x"]), (0, 1))
    quarters = [part for rows in rolled.chunk(2, 0) for part in rows.chunk(2, 1)]
    return groups_mask(rolled.numel(), quarters)


def maxvit_block(p: Points) -> Tensor:
    return groups_mask(p.shape.Lk, windows(pixels(p), p["window"]))


def maxvit_grid(p: Points) -> Tensor:
    cells = p["cells"]
    grid = pixels(p).view(cells, p["height"] // cells, cells, p["width"] // cells)
    return groups_mask(p.shape.Lk, grid.permute(1, 3, 0, 2).reshape(-1, cells * cells))


def long_distance(p: Points) -> Tensor:
    step = p["interval"]
    return groups_mask(p.shape.Lk, [pixels(p)[y::step, x::step] for y in range(step) for x in range(step)])


def by_halves(p: Points, horizontal: Tensor, vertical: Tensor) -> Tensor:
    half = p.shape.H // 2
    return torch.stack([horizontal] * half + [vertical] * (p.shape.H - half))


def cswin(p: Points) -> Tensor:
    ids = pixels(p)
    stripes = (groups_mask(ids.numel(), ids.split(p["stripe"], dim)) for dim in (0, 1))
    return by_halves(p, *stripes)


def axial(p: Points) -> Tensor:
    ids = pixels(p)
    return by_halves(p, groups_mask(ids.numel(), ids.unbind(0)), groups_mask(ids.numel(), ids.unbind(1)))


def criss_cross(p: Points) -> Tensor:
    ids = pixels(p)
    return groups_mask(ids.numel(), ids.unbind(0)) | groups_mask(ids.numel(), ids.unbind(1))


def halo(p: Points) -> Tensor:
    """Blocks and their surroundings by unfolding the padded image."""
    size, radius = p["block"], p["radius"]
    blocks = windows(pixels(p), size)
    bottom, right = -p["height"] % size, -p["width"] % size
    padded = F.pad(pixels(p), (radius, right + radius, radius, bottom + radius), value=-1)
    around = padded.unfold(0, size + 2 * radius, size).unfold(1, size + 2 * radius, size).flatten(0, 1).flatten(1)
    mask = p.false()
    for rows, columns in zip(blocks, around, strict=True):
        mask[rows[rows >= 0][:, None], columns[columns >= 0][None, :]] = True
    return mask


def unidirectional_block(p: Points) -> Tensor:
    size, ids = p["block"], pixels(p)
    mask = p.false()
    for top in range(0, p["height"], size):
        for left in range(0, p["width"], size):
            rows = ids[top : top + size, left : left + size].flatten()
            columns = ids[max(0, top - size) : top + size, max(0, left - size) : left + size].flatten()
            mask[rows[:, None], columns] = True
    return mask


def circular_window(p: Points) -> Tensor:
    y, x = torch.meshgrid(torch.arange(p["height"]), torch.arange(p["width"]), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], 1).double()
    text, count = p["text"], len(place)
    mask = torch.ones(p.shape.Lq, p.shape.Lk, dtype=torch.bool)
    mask[:text, text + count :] = False
    near = (place[:, None] - place[None, :]).square().sum(-1).sqrt() < p["radius"] - 1e-9
    mask[text : text + count, text : text + count] = near
    return mask


def region_queries(p: Points) -> Tensor:
    cells = p["cells"]
    grid = pixels(p).view(cells, p["height"] // cells, cells, p["width"] // cells)
    regions = grid.transpose(1, 2).reshape(cells * cells, -1)
    return p.rows(lambda i: regions[i].tolist())


def make_box(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"box": torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 1.0, 2.5, 3.0]])}


def foveal(s: Tensor, p: Points) -> Tensor:
    out = s.clone()
    for b, (left, top, right, bottom) in enumerate(p.tensors["box"].tolist()):
        for j in range(1, p.shape.Lk):
            y, x = divmod(j - 1, p["width"])
            if left <= x <= right and top <= y <= bottom:
                squared = math.hypot(x - (left + right) / 2, y - (top + bottom) / 2) ** 2
                out[b, :, 0, j] += p["alpha"] * math.exp(-squared / (2 * p["sigma"] ** 2))
    return out


def image(height: int, width: int, **params: Any) -> Setup:
    """Self-attention over a whole image."""
    return square(height * width, height=height, width=width, **params)


_CLEAR = Setup(Shape(2, 4, 2, 34, 40), {"height": 5, "width": 6, "text": 4, "radius": 3})
_CLEAR_MEDIUM = Setup(Shape(1, 4, 1, 221, 247), {"height": 12, "width": 17, "text": 17, "radius": 5})

_CASES = {
    "neighborhood_1d": Case("neighborhood_1d", square(23, window=5), square(243, window=32), line(nat_axis)),
    "neighborhood_2d": Case("neighborhood_2d", image(5, 6, window=3), image(15, 17, window=7), plane(nat_axis)),
    "neighborhood_2d/even": Case("neighborhood_2d", image(5, 6, window=4), image(13, 18, window=6), plane(nat_axis)),
    "neighborhood_2d/larger_than_image": Case(
        "neighborhood_2d", image(3, 9, window=5), image(6, 37, window=7), plane(nat_axis)
    ),
    "nat": Case("nat", image(5, 6, window=3), image(14, 15, window=5), plane(nat_axis), nat_score, make_table),
    "dilated_neighborhood_1d": Case(
        "dilated_neighborhood_1d",
        square(29, window=3, dilation=3),
        square(241, window=9, dilation=7),
        line(dilated_axis),
    ),
    "dilated_neighborhood_2d": Case(
        "dilated_neighborhood_2d",
        image(5, 6, window=2, dilation=2),
        image(15, 17, window=3, dilation=4),
        plane(dilated_axis),
    ),
    "gna_1d": Case("gna_1d", square(29, window=6, stride=3), square(241, window=33, stride=16), line(gna_axis)),
    "gna_2d": Case("gna_2d", image(5, 6, window=3, stride=2), image(15, 17, window=6, stride=5), plane(gna_axis)),
    "gna_2d/blocked": Case("gna_2d", image(4, 6, window=2, stride=2), image(12, 18, window=6, stride=6), maxvit_block),
    "gna_2d/stride_one": Case(
        "gna_2d", image(4, 6, window=3, stride=1), image(12, 18, window=5, stride=1), plane(nat_axis)
    ),
    "shifted_window": Case(
        "shifted_window", image(4, 6, window=2, shift=1), image(14, 21, window=7, shift=3), shifted_window
    ),
    "shifted_window/padded": Case(
        "shifted_window", image(5, 6, window=4, shift=2), image(15, 17, window=6, shift=3), shifted_window
    ),
    "swin": Case(
        "swin",
        image(4, 6, window=2, shift=1),
        image(14, 14, window=7, shift=3),
        shifted_window,
        swin_score,
        make_table,
    ),
    "swin/regular": Case(
        "swin",
        image(4, 6, window=2, shift=0),
        image(15, 14, window=7, shift=0),
        shifted_window,
        swin_score,
        make_table,
    ),
    "double_window": Case("double_window", image(4, 8, window=4), image(16, 16, window=8), double_window),
    "cyclic_window": Case(
        "cyclic_window", image(4, 6, shift_y=1, shift_x=2), image(14, 17, shift_y=3, shift_x=5), cyclic_window
    ),
    "maxvit_block": Case("maxvit_block", image(5, 6, window=3), image(15, 17, window=7), maxvit_block),
    "maxvit_grid": Case("maxvit_grid", image(4, 6, cells=2), image(15, 18, cells=3), maxvit_grid),
    "long_distance": Case("long_distance", image(5, 6, interval=2), image(15, 17, interval=4), long_distance),
    "cswin": Case("cswin", image(5, 6, stripe=2), image(15, 17, stripe=3), cswin),
    "axial": Case("axial", image(5, 6), image(15, 17), axial),
    "criss_cross": Case("criss_cross", image(5, 6), image(15, 17), criss_cross),
    "halo": Case("halo", image(5, 6, block=2, radius=1), image(15, 17, block=4, radius=2), halo),
    "unidirectional_block": Case(
        "unidirectional_block", image(5, 6, block=2), image(15, 17, block=4), unidirectional_block
    ),
    "circular_window": Case("circular_window", _CLEAR, _CLEAR_MEDIUM, circular_window),
    "circular_window/image_only": Case(
        "circular_window",
        image(5, 6, text=0, radius=2),
        image(15, 17, text=0, radius=6),
        circular_window,
    ),
    "region_queries": Case(
        "region_queries",
        cross(4, 24, height=4, width=6, cells=2),
        cross(9, 270, height=15, width=18, cells=3),
        region_queries,
    ),
    "foveal": Case(
        "foveal",
        square(21, width=5, alpha=0.5, sigma=1.5),
        square(226, width=15, alpha=0.2, sigma=4.0),
        score=foveal,
        tensors=make_box,
    ),
}

_ANY_LENGTH = {"neighborhood_1d", "dilated_neighborhood_1d", "gna_1d", "foveal"}
CASES = {name: replace(case, resizable=name in _ANY_LENGTH) for name, case in _CASES.items()}
