"""Index grids from Python: what ``grid`` means in the text, in programs, layouts and outside of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnlang as al


def neighborhood(y: Any, x: Any, radius: int) -> Callable[..., Any]:
    at = al.grid(y=y, x=x)

    def near(q: Any, k: Any) -> Any:
        here, there = at(q), at(k)
        return ((here.y - there.y).abs() <= radius) & ((here.x - there.x).abs() <= radius)

    return near


def video(t: int, y: int, x: int) -> Callable[..., Any]:
    at = al.grid(t=t, y=y, x=x)

    def axial(q: Any, k: Any) -> Any:
        (t, y, x), other = at(q), at(k)
        return (t == other.t) | ((y == other.y) & (x == other.x))

    return axial


def own_extents(Lq: int, q: Any, k: Any) -> Any:
    at = al.grid(y=Lq // 8, x=8)
    return at(q).y + at(q).x < k


def biased(y: int, x: int) -> Callable[..., Any]:
    at, table = al.grid(y=y, x=x), torch.randn(2, 7, 9)
    return lambda s, h, q, k: s + table[h, at(q).y - at(k).y + 3, at(q).x - at(k).x + 4]


NEAR = "    mask = abs(q.y - k.y) <= radius and abs(q.x - k.x) <= radius"
SAME = {
    "parameters": (
        f"pattern p(y: int, x: int, radius: int):\n    grid q, k = (y: y, x: x)\n{NEAR}",
        lambda: al.program(neighborhood(4, 5, 1)),
        {"y": 4, "x": 5, "radius": 1},
    ),
    "words": (
        f"pattern p(radius: int):\n    grid q, k = (y: Lq // 5, x: 5)\n{NEAR}".replace("x: 5", "x: min(5, Lq)"),
        lambda: al.program(neighborhood("Lq // 5", "min(5, Lq)", 1)),
        {"radius": 1},
    ),
    "a function": (
        f"pattern p(radius: int):\n    grid q, k = (y: Lk // 5, x: 5)\n{NEAR}".replace("x: 5", "x: Lq // 4"),
        lambda: al.program(neighborhood(lambda Lk: Lk // 5, lambda Lq: Lq // 4, 1)),
        {"radius": 1},
    ),
    "three coordinates": (
        "pattern p(t: int, y: int, x: int):\n    grid q, k = (t: t, y: y, x: x)\n"
        "    mask = q.t == k.t or q.y == k.y and q.x == k.x",
        lambda: al.program(video(2, 2, 5)),
        {"t": 2, "y": 2, "x": 5},
    ),
    "one axis": (
        "pattern p:\n    grid q = (y: Lq // 8, x: 8)\n    mask = q.y + q.x < k",
        lambda: al.program(own_extents),
        {},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_python_and_text_are_one_program(name: str) -> None:
    text, make, params = SAME[name]
    stated, traced = al.parse(text), make()
    assert traced.program.stages == stated.stages
    assert traced.program.grids == stated.grids
    assert traced.program.scalars == stated.scalars
    assert traced.scalars == params
    q, k, v = (torch.randn(1, 2, 20, 6) for _ in range(3))
    torch.testing.assert_close(al.reference(traced, q, k, v), al.reference(stated, q, k, v, **params), rtol=0, atol=0)


@pytest.mark.usefixtures("unoptimised")
def test_layouts_know_the_grid() -> None:
    q, k, v = (torch.randn(1, 2, 16 * 16, 4) for _ in range(3))
    text = al.parse(f"pattern p(y: int, x: int, radius: int):\n    grid q, k = (y: y, x: x)\n{NEAR}")
    traced = al.program(neighborhood(16, 16, 2))
    found = al.compile(traced, layout="4x4").layout_of(256, 256, H=2)
    assert found == al.compile(text, layout="4x4").layout_of(256, 256, H=2, y=16, x=16, radius=2)
    big = al.compile(traced, layout="auto").layout_of(64 * 64, 64 * 64, y=64, x=64, radius=6)
    assert big is not None
    assert big == al.compile(text, layout="auto").layout_of(64 * 64, 64 * 64, y=64, x=64, radius=6)
    torch.testing.assert_close(al.compile(traced, layout="4x4")(q, k, v), al.reference(traced, q, k, v).float())


def test_extents_are_parameters_of_one_kernel() -> None:
    attention = al.compile(al.program(neighborhood(4, 5, 1)))
    q, k, v = (torch.randn(1, 1, 20, 4, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v, y=2, x=10), al.reference(al.program(neighborhood(2, 10, 1)), q, k, v))


def test_scores_and_functions_of_flex_attention_read_coordinates() -> None:
    q, k, v = (torch.randn(1, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    score, mask = biased(4, 5), neighborhood(4, 5, 1)
    program = al.program(mask, score)
    assert program.scalars["x"] == 5
    flex = al.flex_attention(
        q,
        k,
        v,
        lambda s, b, h, i, j: score(s, h, i, j),
        al.create_block_mask(lambda b, h, i, j: mask(i, j), 1, 1, 20, 20, device="cpu"),
    )
    torch.testing.assert_close(flex, al.reference(program, q, k, v), rtol=1e-6, atol=1e-6)


def test_coordinates_of_positions() -> None:
    at = al.grid(y=3, x=4)
    position = torch.arange(12)
    assert [x.tolist() for x in at(position)] == [(position // 4).tolist(), (position % 4).tolist()]
    assert tuple(map(int, at(7))) == (1, 3)
    assert repr(at) == "grid(y=3, x=4)"


def test_the_first_grid_of_an_axis_counts() -> None:
    def both(q: Any, k: Any) -> Any:
        return (al.grid(y=4, x=5)(q).x == 0) | (al.grid(y=2, x=10)(q).x > 3) | (al.grid(x=3)(k + 1).x > 2)

    (axis, shape), *others = al.program(both).program.grids
    assert (axis, [name for name, _ in shape], others) == ("q", ["y", "x"], [])
    assert [e.value for _, e in shape] == [4, 5]


def test_any_name_is_a_coordinate() -> None:
    assert [int(i) for i in al.grid(self=3, index=4)(7)] == [1, 3]


MISTAKES = {
    "no coordinates": (lambda: al.grid(), "one to three coordinates, got 0"),
    "four": (lambda: al.grid(a=1, b=1, c=1, d=1), "one to three coordinates, got 4"),
    "name": (lambda: al.grid(_y=1), "'_y'"),
    "extent": (lambda: al.grid(y=0, x=3), "the extent of 'y' is at least 1, got 0"),
    "float": (lambda: al.grid(y=2.0), "the extent of 'y' is 2.0; give an int"),
    "words": (lambda: al.program(neighborhood("Lq // Lz", 5, 1)), "Lz"),
    "computed": (lambda: al.program(lambda q, k, Lq: al.grid(x=Lq - Lq * 2 + 0 * k)(q).x > 0), "reads k"),
    "function": (lambda: al.program(neighborhood(lambda q: q, 5, 1)), "the extent of 'y' reads 'q'"),
    "float index": (lambda: al.program(lambda q: al.grid(y=2, x=2)(q * 0.5).x > 0), "a grid is given a float value"),
    "index of floats": (lambda: al.grid(y=2, x=2)(torch.tensor([1.5])), "a grid is given a torch.float32 tensor"),
    "truth as index": (lambda: al.grid(y=2, x=2)(True), "a grid is given a bool"),
    "coordinate": (lambda: al.program(lambda q: al.grid(y=2, x=2)(q).z > 0), "'z'"),
    "outside": (lambda: al.grid(y="Lq // 2", x=2)(torch.arange(4)), "known in the function of a program only"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(name: str) -> None:
    make, message = MISTAKES[name]
    with pytest.raises(al.AttnlangError) as caught:
        make()
    assert message in str(caught.value)
