"""Dense definitions of ``steering.attn`` and ``relative.attn``."""

from __future__ import annotations

from typing import Any

import torch
from library.records import Case, Points, Setup, Shape, flags, floats, light, small
from library.region_cases import draw
from library.vision_cases import halo, unidirectional_block
from library.windows_cases import image, place

Tensor = torch.Tensor
Generator = torch.Generator

# steering.attn


def token_emphasis(s: Tensor, p: Points) -> Tensor:
    """Logits of image tokens times e^gain, and of the chosen ones times 1 + strength, in weights before the sum."""
    image, chosen = (p.tensors[name][:, None, None].double() for name in ("image", "chosen"))
    factor = (1.0 + p["strength"] * chosen) * torch.exp(p.floats("gain"))[:, :, None, None]
    return s + torch.log(image * factor + (1.0 - image))


def source_gain(s: Tensor, p: Points) -> Tensor:
    onehot = torch.nn.functional.one_hot(p.tensors["origin"].long(), 3).double()
    return s * (onehot @ p.floats("gain"))


def image_boost(s: Tensor, p: Points) -> Tensor:
    image = p.tensors["image"][:, None, None].double()
    return torch.log(torch.exp(s) * (1.0 + (p.floats("factor") - 1.0) * image))


def inhibition(s: Tensor, p: Points) -> Tensor:
    text, image = p.tensors["text"], p.tensors["image"]
    weak = text[:, :, None] & image[:, None] & (p.tensors["focus"].detach() < p["threshold"])
    return s - p["penalty"] * weak[:, None]


def visual_branch(p: Points) -> Tensor:
    hidden = p.tensors["image"] & ~p.tensors["chosen"]
    return p.tril() & ~hidden[:, None, None]


def identity(p: Points) -> Tensor:
    return torch.eye(p.shape.Lq, p.shape.Lk).bool()


# relative.attn: in these tests the tables are drawn; test_compositions.py makes them from queries and embeddings


def spread(p: Points, name: str, index: Any) -> Tensor:
    """Read ``table[b, h, i, index(i, j)]``; an index outside reads entry 0, which the mask hides."""
    table = p.floats(name)
    at = p.pairs("", index)[0, 0]
    at = torch.where((at >= 0) & (at < table.shape[-1]), at, 0)
    return torch.gather(table, -1, at.expand(*table.shape[:2], -1, -1))


def rows_and_columns(reach_y: Any, reach_x: Any) -> Any:
    def score(s: Tensor, p: Points) -> Tensor:
        y, x = reach_y(p), reach_x(p)
        rows = spread(p, "rows", lambda i, j: place(p, j)[0] - place(p, i)[0] + y - 1)
        return s + rows + spread(p, "columns", lambda i, j: place(p, j)[1] - place(p, i)[1] + x - 1)

    return score


def tables(**widths: Any) -> Any:
    """Builder of float tables [B, H, Lq, width]."""

    def make(setup: Setup, g: Generator) -> dict[str, Any]:
        s = setup.shape
        return {name: floats((s.B, s.H, s.Lq, width), g) for name, width in widths.items()}

    return make


def neighbor_class(p: Points, i: int, j: int) -> int:
    (y, x), (v, u) = place(p, i), place(p, j)
    size = p["block"]
    return {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3}.get((y // size - v // size, x // size - u // size), -1)


def time_and_channel(p: Points, n: int) -> tuple[int, int]:
    return divmod(n, p["channels"])


def earlier(p: Points) -> Tensor:
    return p.pairs("", lambda i, j: time_and_channel(p, j)[0] <= time_and_channel(p, i)[0])


def multivariate(s: Tensor, p: Points) -> Tensor:
    last = (p.shape.Lq - 1) // p["channels"]

    def near(i: int, j: int) -> bool:
        now, then = time_and_channel(p, i)[0], time_and_channel(p, j)[0]
        return abs(now - then) <= p["reach"] or now == last

    def gap(axis: int) -> Any:
        return lambda i, j: abs(time_and_channel(p, i)[axis] - time_and_channel(p, j)[axis])

    return s * p.pairs("", near) + spread(p, "time", gap(0)) + spread(p, "channel", gap(1))


def make_places(setup: Setup, g: Generator) -> dict[str, Any]:
    s, bins = setup.shape, 6
    likely = flags((s.B, s.Lq, s.Lk), 0.4, g)
    likely[:, 2] = False
    return {
        "query_place": torch.rand(s.B, s.Lq, 3, generator=g),
        "key_place": torch.rand(s.B, s.Lk, 3, generator=g),
        "likely": likely,
        "empty": ~likely.any(-1),
        "query_term": floats((s.B, s.H, s.Lq, 3, bins), g),
        "key_term": floats((s.B, s.H, s.Lk, 3, bins), g),
    }


def likely_or_all(p: Points) -> Tensor:
    likely = p.tensors["likely"]
    return torch.where(likely.any(-1, keepdim=True), likely, True)[:, None]


def contextual(s: Tensor, p: Points) -> Tensor:
    """One-hot bins [B, Lq, Lk, 3, L] times the tables."""
    q, k = (p.tensors[name].detach() for name in ("query_place", "key_place"))
    offset = (q.double()[:, :, None] - k.double()[:, None]) / p["step"]
    onehot = torch.nn.functional.one_hot(offset.floor().long().add(3).clamp(0, 5), 6).double()
    by_query = torch.einsum("bijal,bhial->bhij", onehot, p.floats("query_term"))
    return s + by_query + torch.einsum("bijal,bhjal->bhij", onehot, p.floats("key_term"))


def make_fundamental(setup: Setup, g: Generator) -> dict[str, Any]:
    return {"fundamental": floats((setup.shape.B, 3, 3, 3, 3), g)}


def epipolar(p: Points) -> Tensor:
    matrices, pixels = p.tensors["fundamental"].double(), p["pixels"]

    def homogeneous(n: int) -> Tensor:
        y, x = divmod(n % pixels, p["width"])
        return torch.tensor([x, y, 1.0], dtype=torch.float64)

    def seen(b: int, i: int, j: int) -> bool:
        v, u = i // pixels, j // pixels
        line = matrices[b, v, u] @ homogeneous(i)
        distance = (line @ homogeneous(j)).abs() / line[:2].norm()
        return v == u or bool(distance <= p["reach"])

    return p.pairs("b", seen)


_BK = ("B", "K")

CASES: dict[str, Case] = {
    "temperature": light(
        "temperature",
        small(19),
        score=lambda s, p: s / p.floats("value"),
        tensors=draw(value=((), "positive")),
    ),
    "head_temperature": light(
        "head_temperature",
        small(19),
        Points.tril,
        lambda s, p: s * p.floats("value")[:, None, None],
        tensors=draw(value=(("H",), "positive")),
    ),
    "token_emphasis": light(
        "token_emphasis",
        small(22, strength=1.5),
        Points.tril,
        token_emphasis,
        tensors=draw(image=(_BK, 0.6), chosen=(_BK, 0.4), gain=(("B", "H"), "float")),
    ),
    "source_gain": light(
        "source_gain", small(14, 25), score=source_gain, tensors=draw(origin=(("K",), 3), gain=((3,), "positive"))
    ),
    "image_boost": light(
        "image_boost",
        small(22),
        Points.tril,
        image_boost,
        tensors=draw(image=(_BK, 0.5), factor=((), "positive")),
    ),
    "style_share": light(
        "style_share",
        small(14, 25, content=15),
        score=lambda s, p: torch.cat([s[..., :15], s[..., 15:] + p.floats("share").log()], -1),
        tensors=draw(share=((), "positive")),
    ),
    "regional_prior": light(
        "regional_prior",
        small(14, 9),
        score=lambda s, p: torch.log(torch.exp(s) * p.floats("prior")[:, None]),
        tensors=draw(prior=(("B", "Q", "K"), "positive")),
    ),
    "head_key_bias": light(
        "head_key_bias",
        small(14, 21),
        score=lambda s, p: s + p.floats("bias")[:, :, None],
        tensors=draw(bias=(("B", "H", "K"), "float")),
    ),
    "inhibition": light(
        "inhibition",
        small(20, penalty=2.5, threshold=0.1),
        Points.tril,
        inhibition,
        tensors=draw(text=(_BK, 0.5), image=(_BK, 0.5), focus=(("B", "Q", "K"), "float")),
    ),
    "enhanced_visual": light(
        "enhanced_visual",
        small(20, gain=0.7),
        visual_branch,
        lambda s, p: torch.where(p.tensors["chosen"][:, None, None], s + 0.7, s),
        tensors=draw(image=(_BK, 0.5), chosen=(_BK, 0.5)),
    ),
    "uniform": light("uniform", small(18), Points.tril, lambda s, p: s * 0.0),
    "self_only": light("self_only", small(18), identity),
    "botnet": light(
        "botnet",
        image(4, 5),
        score=rows_and_columns(lambda p: p["height"], lambda p: p["width"]),
        tensors=tables(rows=7, columns=9),
    ),
    "halonet": light(
        "halonet",
        image(5, 6, block=2, radius=1),
        halo,
        rows_and_columns(*[lambda p: p["block"] + p["radius"]] * 2),
        tensors=tables(rows=5, columns=5),
    ),
    "inf_dit": light(
        "inf_dit",
        image(5, 6, block=2),
        unidirectional_block,
        lambda s, p: s + spread(p, "neighbor", lambda i, j: neighbor_class(p, i, j)),
        tensors=tables(neighbor=4),
    ),
    "multivariate_parallel": light(
        "multivariate_parallel",
        small(24, channels=4, reach=2),
        earlier,
        multivariate,
        tensors=tables(time=6, channel=4),
    ),
    "contextual_position": light(
        "contextual_position", small(9, 17, step=0.25), likely_or_all, contextual, tensors=make_places
    ),
    "epipolar": light(
        "epipolar",
        Setup(Shape(2, 2, 1, 36, 36), {"width": 4, "pixels": 12, "reach": 0.8}),
        epipolar,
        tensors=make_fundamental,
    ),
}
