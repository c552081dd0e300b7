"""Random functions built from torch operations: the traced program equals eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from grid import check_mask, check_score
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_generator = torch.Generator().manual_seed(5)
TABLE_1 = torch.randint(-5, 6, (7,), generator=_generator)
TABLE_2 = torch.rand((4, 7), generator=_generator, dtype=torch.float64)

Point = dict[str, Any]
Make = Callable[[Point], Any]


def unary(fn: Callable[[Any], Any], a: Make) -> Make:
    return lambda p: fn(a(p))


def binary(fn: Callable[[Any, Any], Any], a: Make, b: Make) -> Make:
    return lambda p: fn(a(p), b(p))


def leaf(name: str) -> Make:
    return lambda p: p[name]


def constant(value: float) -> Make:
    return lambda p: p["q"] * 0 + value


def nonzero(y: Any) -> Any:
    return torch.where(y == 0, 3, y)


INT_BINARY = (
    lambda x, y: x + y,
    lambda x, y: x - y,
    lambda x, y: (x * y) % 1000,
    lambda x, y: x // nonzero(y),
    lambda x, y: x % nonzero(y),
    lambda x, y: torch.fmod(x, nonzero(y)),
    lambda x, y: torch.div(x, nonzero(y), rounding_mode="trunc"),
    torch.minimum,
    torch.maximum,
    lambda x, y: x & y,
    lambda x, y: x ^ y,
    lambda x, y: x >> (y.abs() % 8),
    lambda x, y: torch.where(x < y, x, y * 2),
)
INT_UNARY = (
    lambda x: -x,
    lambda x: x.abs(),
    lambda x: ~x,
    lambda x: x.clamp(-3, 4),
    lambda x: TABLE_1[x % 14 - 7],
    lambda x: TABLE_1[x.clamp(-7, 6)],
    lambda x: x.sign(),
    lambda x: (x * 0.3).floor().long(),
)
FLOAT_BINARY = (
    lambda x, y: x + y,
    lambda x, y: x - y,
    lambda x, y: x * y,
    lambda x, y: x / (y.abs() + 1),
    torch.minimum,
    torch.maximum,
    lambda x, y: torch.where(x < y, x, y),
)
FLOAT_UNARY = (
    torch.tanh,
    torch.sigmoid,
    torch.sin,
    lambda x: torch.log1p(x.abs()),
    lambda x: torch.exp(-x.abs()),
    lambda x: torch.sqrt(x.abs() + 1e-3),
    torch.nn.functional.softplus,
    torch.nn.functional.gelu,
    lambda x: x.clamp(min=-2, max=2) ** 2,
    torch.relu,
)
COMPARE = (torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne)

ints = st.recursive(
    st.one_of(st.sampled_from("bhqk").map(leaf), st.integers(-9, 9).map(constant)),
    lambda inner: st.one_of(
        st.builds(unary, st.sampled_from(INT_UNARY), inner),
        st.builds(binary, st.sampled_from(INT_BINARY), inner, inner),
    ),
    max_leaves=6,
)
floats = st.recursive(
    st.one_of(
        st.just(leaf("s")),
        ints.map(lambda a: lambda p: a(p) * 0.25),
        st.tuples(ints, ints).map(lambda ab: lambda p: TABLE_2[ab[0](p) % 4][ab[1](p) % 14 - 7]),
        st.tuples(ints).map(lambda a: lambda p: (TABLE_2[p["h"], 1:4] * a[0](p)).sum(-1)),
    ),
    lambda inner: st.one_of(
        st.builds(unary, st.sampled_from(FLOAT_UNARY), inner),
        st.builds(binary, st.sampled_from(FLOAT_BINARY), inner, inner),
    ),
    max_leaves=5,
)
bools = st.recursive(
    st.builds(binary, st.sampled_from(COMPARE), ints, ints),
    lambda inner: st.one_of(
        st.builds(unary, st.just(lambda x: ~x), inner),
        st.builds(binary, st.sampled_from((lambda x, y: x & y, lambda x, y: x | y, lambda x, y: x ^ y)), inner, inner),
    ),
    max_leaves=3,
)

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(bools)
def test_random_masks(make: Make) -> None:
    check_mask(lambda b, h, q, k: make({"b": b, "h": h, "q": q, "k": k}))


@quick
@given(floats)
def test_random_scores(make: Make) -> None:
    check_score(lambda s, b, h, q, k: make({"s": s, "b": b, "h": h, "q": q, "k": k}))
