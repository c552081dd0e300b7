"""Dense definitions of ``windows.attn``."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from library.records import Case, Points, Setup, Shape, floats, light, small
from library.vision_cases import maxvit_block as squares
from library.vision_cases import maxvit_grid as grid_groups
from library.vision_cases import nearest, swin_mask

Tensor = torch.Tensor
Generator = torch.Generator


def image(height: int, width: int, **params: Any) -> Setup:
    return small(height * width, height=height, width=width, **params)


def place(p: Points, n: int) -> tuple[int, int]:
    return divmod(n, p["width"])


def table_of(rows: Any, columns: Any) -> Any:
    """Builder of a table [H, rows, columns]; the sizes are functions of the parameters."""
    return lambda setup, g: {"table": floats((setup.shape.H, rows(setup.params), columns(setup.params)), g)}


def squared(size: Any) -> Any:
    return table_of(size, size)


def relative(p: Points, index: Any) -> Tensor:
    """Bias [H, Lq, Lk] of table entries ``index(dy, dx)``, distances from query to key; entries outside are 0."""
    table = p.floats("table")
    padded = torch.nn.functional.pad(table, (0, 1, 0, 1))  # row and column -1 are zeros
    at = [[index(*(b - a for a, b in zip(place(p, i), place(p, j), strict=True))) for j in range(p.shape.Lk)]
          for i in range(p.shape.Lq)]  # fmt: skip
    y, x = torch.tensor(at).unbind(-1)
    inside = (y >= 0) & (y < table.shape[1]) & (x >= 0) & (x < table.shape[2])
    return padded[:, torch.where(inside, y, -1), torch.where(inside, x, -1)]


def biased(index: Any) -> Any:
    return lambda s, p: s + relative(p, lambda dy, dx: index(p, dy, dx))


def centred(p: Points, dy: int, dx: int) -> tuple[int, int]:
    return dy + p["window"] - 1, dx + p["window"] - 1


def gna_line(p: Points, axis: str, i: int, length: int) -> set[int]:
    """Visible coordinates, by listing the tokens of the residue class."""
    window, stride, dilation = (p[f"{name}_{axis}"] for name in ("window", "stride", "dilation"))
    members = list(range(i % dilation, length, dilation))
    at = members.index(i)
    group = list(range(len(members)))[at - at % stride :][:stride]
    if p[f"causal_{axis}"]:
        last = group[-1]
        return {members[n] for n in range(max(0, last - window + 1), last + 1) if n <= at}
    leader = group[min(stride // 2, len(group) - 1)]
    return set(nearest(leader, members, window))


def gna(p: Points) -> Tensor:
    sides = (p["frames"], p["height"], p["width"])
    cells = list(product(*map(range, sides)))
    lines = {(a, i): gna_line(p, a, i, n) for a, n in zip("tyx", sides, strict=True) for i in range(n)}

    def seen(i: int, j: int) -> bool:
        return all(cells[j][n] in lines[axis, cells[i][n]] for n, axis in enumerate("tyx"))

    return p.pairs("", seen)


def dinat(p: Points) -> Tensor:
    def line(i: int, length: int) -> list[int]:
        members = list(range(i % p["dilation"], length, p["dilation"]))
        return nearest(members.index(i), members, p["window"])

    def seen(i: int, j: int) -> bool:
        (y, x), (v, u) = place(p, i), place(p, j)
        return v in line(y, p["height"]) and u in line(x, p["width"])

    return p.pairs("", seen)


def dinat_index(p: Points, dy: int, dx: int) -> tuple[int, int]:
    d = p["dilation"]
    if dy % d or dx % d:
        return -1, -1
    return dy // d + p["window"] - 1, dx // d + p["window"] - 1


def square_window(p: Points) -> Tensor:
    """Ones of a padded image unfolded round each pixel."""
    height, width, radius = p["height"], p["width"], p["radius"]
    out = torch.zeros(height, width, height, width, dtype=torch.bool)
    for y, x in product(range(height), range(width)):
        out[y, x, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = True
    return out.view(height * width, -1)


def grid_index(p: Points, dy: int, dx: int) -> tuple[int, int]:
    steps = (p["height"] // p["cells"], p["width"] // p["cells"])
    if dy % steps[0] or dx % steps[1]:
        return -1, -1
    return dy // steps[0] + p["cells"] - 1, dx // steps[1] + p["cells"] - 1


def intervals(params: Any, name: str) -> int:
    return len(range(0, params[name], params["interval"]))


def interval_index(p: Points, dy: int, dx: int) -> tuple[int, int]:
    if dy % p["interval"] or dx % p["interval"]:
        return -1, -1
    rows, columns = (intervals(p.params, name) for name in ("height", "width"))
    return -dy // p["interval"] + rows - 1, -dx // p["interval"] + columns - 1


def long_distance(p: Points) -> Tensor:
    def seen(i: int, j: int) -> bool:
        return all((a - b) % p["interval"] == 0 for a, b in zip(place(p, i), place(p, j), strict=True))

    return p.pairs("", seen)


def style_swin(p: Points) -> Tensor:
    half = p.shape.H // 2
    return torch.stack([swin_mask(p, p["window"], 0 if h < half else p["window"] // 2) for h in range(p.shape.H)])


def swin_index(p: Points, dy: int, dx: int) -> tuple[int, int]:
    return p["window"] - 1 - dy, p["window"] - 1 - dx


def rolled_window(p: Points) -> Tensor:
    """Roll the token grid, cut it into windows, and let the members of each see each other."""
    ids = torch.arange(p.shape.Lk).view(p["height"], p["width"]).roll((p["shift"], p["shift"]), (0, 1))
    mask = p.false()
    for rows in ids.split(p["window"], 0):
        for cell in rows.split(p["window"], 1):
            mask[cell.reshape(-1, 1), cell.reshape(1, -1)] = True
    return mask


def multi_scale(p: Points) -> Tensor:
    def seen(h: int, i: int, j: int) -> bool:
        step = 1 if h < p.shape.H // 2 else p["dilation"]
        reach = {step * n for n in range(-p["radius"], p["radius"] + 1)}
        return all(b - a in reach for a, b in zip(place(p, i), place(p, j), strict=True))

    return p.pairs("h", seen)


def coarse(p: Points, j: int) -> tuple[int, int]:
    return divmod(j, p["width"] // p["ratio"])


def varying_window(p: Points) -> Tensor:
    """The square of pixels round the window; a coarse cell belongs to it with its first pixel."""
    window, ratio = p["window"], p["ratio"]

    def seen(i: int, j: int) -> bool:
        corners = [(c // window * window) - (ratio - 1) * window // 2 for c in place(p, i)]
        return all(c * ratio in range(at, at + ratio * window) for c, at in zip(coarse(p, j), corners, strict=True))

    return p.pairs("", seen)


def window_upsample(p: Points) -> Tensor:
    """Windows of the coarse map, blown up to pixels."""
    rows, columns = p["height"] // p["ratio"], p["width"] // p["ratio"]
    ids = torch.arange(rows * columns).view(rows, columns)
    window = ids // columns // p["window"] * columns + ids % columns // p["window"]
    fine = window.repeat_interleave(p["ratio"], 0).repeat_interleave(p["ratio"], 1)
    return fine.reshape(-1, 1) == window.reshape(1, -1)


def all_frames(p: Points) -> Tensor:
    spatial = swin_mask(p, p["window"], (p["window"] - p["move"]) % p["window"])
    return spatial.repeat(p["frames"], p["frames"])


def make_kernel(setup: Setup, g: Generator) -> dict[str, Any]:
    s = setup.shape
    return {"kernel": floats((s.B, s.H, s.Lq, setup.params["window"] ** 2), g)}


def neighbours(p: Points, i: int) -> list[int]:
    """The tokens of a pixel's window in row-major order."""
    y, x = place(p, i)
    rows, columns = (nearest(a, list(range(p[side])), p["window"]) for a, side in ((y, "height"), (x, "width")))
    return [r * p["width"] + c for r in rows for c in columns]


def context_mixing(s: Tensor, p: Points) -> Tensor:
    """Spread each pixel's kernel over its neighbours."""
    out = s * 0.0
    for i in range(p.shape.Lq):
        out[:, :, i, neighbours(p, i)] = p.floats("kernel")[:, :, i]
    return out


_GNA = {
    "frames": 1, "height": 1, "window_t": 1, "window_y": 1, "stride_t": 1, "stride_y": 1, "dilation_t": 1,
    "dilation_y": 1, "causal_t": False, "causal_y": False, "causal_x": False,
}  # fmt: skip


def gna_setup(frames: int, height: int, width: int, **params: Any) -> Setup:
    sides = {"frames": frames, "height": height, "width": width}
    return Setup(Shape(1, 2, 1, frames * height * width, frames * height * width), {**_GNA, **params, **sides})


_LINE = gna_setup(1, 1, 37, window_x=4, stride_x=3, dilation_x=2, causal_x=True)
_PLANE = gna_setup(1, 6, 7, window_y=3, window_x=2, stride_y=2, stride_x=1, dilation_y=1, dilation_x=3, causal_y=True)
_VOLUME = gna_setup(
    3, 4, 4, window_t=2, window_y=3, window_x=2, stride_t=1, stride_y=2, stride_x=1, dilation_x=2, causal_t=True
)
_WIDE = squared(lambda params: 2 * params["window"] - 1)

CASES: dict[str, Case] = {
    "generalized_neighborhood/line": light("generalized_neighborhood", _LINE, gna),
    "generalized_neighborhood/plane": light("generalized_neighborhood", _PLANE, gna),
    "generalized_neighborhood": light("generalized_neighborhood", _VOLUME, gna),
    "dinat": light("dinat", image(6, 7, window=2, dilation=3), dinat, biased(dinat_index), tensors=_WIDE),
    "square_window": light(
        "square_window",
        image(5, 6, radius=1),
        square_window,
        biased(lambda p, dy, dx: (dy + p["radius"], dx + p["radius"])),
        tensors=squared(lambda params: 2 * params["radius"] + 1),
    ),
    "window_bias": light("window_bias", image(5, 6, window=3), squares, biased(centred), tensors=_WIDE),
    "grid_bias": light(
        "grid_bias",
        image(4, 6, cells=2),
        grid_groups,
        biased(grid_index),
        tensors=squared(lambda params: 2 * params["cells"] - 1),
    ),
    "long_distance_bias": light(
        "long_distance_bias",
        image(5, 6, interval=2),
        long_distance,
        biased(interval_index),
        tensors=table_of(lambda x: 2 * intervals(x, "height") - 1, lambda x: 2 * intervals(x, "width") - 1),
    ),
    "style_swin": light("style_swin", image(4, 8, window=4), style_swin, biased(swin_index), tensors=_WIDE),
    "rolled_window": light("rolled_window", image(5, 6, window=3, shift=2), rolled_window),
    "multi_scale_window": light("multi_scale_window", image(6, 6, radius=1, dilation=2), multi_scale),
    "varying_window": light("varying_window", small(48, 12, height=6, width=8, window=2, ratio=2), varying_window),
    "window_upsample": light("window_upsample", small(48, 12, height=6, width=8, window=2, ratio=2), window_upsample),
    "swin_all_frames": light("swin_all_frames", small(40, frames=2, height=4, width=5, window=3, move=1), all_frames),
    "context_mixing": light(
        "context_mixing",
        image(4, 5, window=3),
        lambda p: p.rows(lambda i: neighbours(p, i)),
        context_mixing,
        tensors=make_kernel,
    ),
}
