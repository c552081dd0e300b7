"""Programs depend on the structure of a mod, not on values: lifting of numbers, symbolic sizes, digests, speed."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import check_mask, check_score

from attnlang import ir
from attnlang.tracing import Traced, trace


def window_and_bias(size: int, cap: float, table: torch.Tensor, ids: torch.Tensor) -> Traced:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q - k <= size) & (ids[b, q] == ids[b][k])

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return torch.tanh(s / cap) * cap + table[h, q - k]

    return trace(mask, score)


def test_digest_ignores_values_sizes_and_dtypes_of_one_kind() -> None:
    one = window_and_bias(3, 20.0, torch.rand(4, 9), torch.zeros(2, 8, dtype=torch.int32))
    two = window_and_bias(9, 50.0, torch.rand(8, 33).half(), torch.zeros(5, 64, dtype=torch.int64))
    assert ir.digest(one.program) == ir.digest(two.program)
    assert one.program == two.program
    assert (one.scalars, two.scalars) == ({"size": 3, "cap": 20.0}, {"size": 9, "cap": 50.0})
    assert [ir.format_expr(d) for d in one.program.tensor("ids").shape] == ["ids_0", "ids_1"]


def test_digest_sees_structure() -> None:
    base = window_and_bias(3, 20.0, torch.rand(4, 9), torch.zeros(2, 8, dtype=torch.int32))
    other = window_and_bias(3, 20.0, torch.ones(4, 9, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int32))
    assert ir.digest(base.program) != ir.digest(other.program)


def test_negative_indices_wrap_only_where_they_can_be_negative() -> None:
    table = torch.arange(16)
    plain = trace(lambda b, h, q, k: table[q + k // 2 + (q - k).abs() % 3] > 0).program
    assert "where" not in ir.canonical(plain)
    wrapped = trace(lambda b, h, q, k: table[q - k] > 0).program
    assert ir.format_expr(wrapped.mask) == "table[q - k + table_0 if q - k < 0 else q - k] > 0"


def numbers(make: Callable[[], Callable[..., Any]], check: Callable[..., Traced] = check_mask) -> dict[str, Any]:
    return dict(check(make()).scalars)


def test_numbers_python_needs_are_baked_and_the_others_stay_lifted() -> None:
    def make(n: int, w: int, extra: float) -> Callable[..., Any]:
        def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            for i in range(n):
                s = s + i * extra
            return torch.where(q - k < w, s, 0.0)

        return score

    traced = check_score(make(3, 2, 0.5))
    assert traced.scalars == {"w": 2, "extra": 0.5}
    assert ir.digest(traced.program) != ir.digest(check_score(make(4, 2, 0.5)).program)


def test_branches_on_numbers_are_resolved() -> None:
    def make(w: int, cap: float) -> Callable[..., Any]:
        def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            if w > 0 and cap:
                return torch.where(q - k < w, s * cap, 0.0)
            return s

        return score

    assert check_score(make(2, 0.0)).scalars == {}
    assert check_score(make(0, 1.0)).scalars == {"cap": 1.0} or check_score(make(0, 1.0)).scalars == {}
    check_score(make(3, 2.5))


@pytest.mark.parametrize(
    "use",
    [
        lambda q, k, n: q - k < [1, 2, 3, 4][n],
        lambda q, k, n: (torch.arange(n) == q).any(),
        lambda q, k, n: q - k < {2: 1, 3: 5}[n],
        lambda q, k, n: q - k < (1 if n in {2, 3} else 4),
        lambda q, k, n: q - k < (1 if isinstance(n, int) else 4),
        lambda q, k, n: q - k < len(f"{n:4d}"),
        lambda q, k, n: torch.zeros((n, n), dtype=torch.int64)[q % n, k % n] == 0,
        lambda q, k, n: q - k < min(n, 3) + max(n, 1),
        lambda q, k, n: q - k < int(n) + round(n / 2) + n.bit_length(),
        lambda q, k, n: q - k < -n + abs(n) + n**2 - n // 2 + n % 2,
        lambda q, k, n: q.unsqueeze(0).expand(n).sum() > k,
        lambda q, k, n: torch.full((), n) > k,
        lambda q, k, n: torch.tensor(n) > k,
        lambda q, k, n: torch.tensor([n, 2 * n])[q % 2] > k,
        lambda q, k, n: torch.where(q > k, n, 2 * n) > 3,
        lambda q, k, n: torch.clamp(q, n, 2 * n) > k,
        lambda q, k, n: q - k < next(i for i in range(9) if i == n),
        lambda q, k, n: q - k < (n if type(n) is int else 0),
    ],
)
def test_uses_of_a_captured_number(use: Callable[..., Any]) -> None:
    # the function that reads n is the closure, so that what it calls is part of what is lifted
    for n in (2, 3):
        check_mask(lambda b, h, q, k, n=n: use(q, k, n))
        check_mask(functools.partial(lambda b, h, q, k, n: use(q, k, n), n=n))


@dataclasses.dataclass(frozen=True)
class Config:
    window: int
    slope: float
    causal: bool = True


def test_records_bools_and_methods() -> None:
    config = Config(3, 0.5)

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        s = s - config.slope * (q - k).abs()
        return torch.where(q >= k, s, -1.0) if config.causal else s

    traced = check_score(score)
    assert traced.scalars == {"slope": 0.5}
    assert config == Config(3, 0.5)


def test_changed_flag_gives_another_program() -> None:
    programs = []
    for add in (True, False):
        traced = check_score(lambda s, b, h, q, k, add=add: s + 3 if add else s * 2)
        programs.append(ir.digest(traced.program))
    assert programs[0] != programs[1]


def test_shared_variables_are_one_scalar() -> None:
    size = 3

    def near(q: Any, k: Any) -> Any:
        return q - k < size

    traced = trace(lambda b, h, q, k: near(q, k) & (k < size), lambda s, b, h, q, k: s * size)
    assert traced.scalars == {"size": 3}


def test_sizes_that_were_unrolled_are_checked() -> None:
    points = torch.rand(7, 3, dtype=torch.float64)
    traced = check_score(lambda s, b, h, q, k: s - (points[q] - points[k]).pow(2).sum())
    assert [ir.format_expr(d) for d in traced.program.tensor("points").shape] == ["points_0", "3"]


def test_literal_tensors_are_constants_and_captured_ones_are_not() -> None:
    one = torch.tensor(3)
    traced = check_mask(lambda b, h, q, k: (q - k < torch.tensor(2)) & (k < one))
    assert list(traced.tensors) == ["one"]
    assert traced.program.tensor("one").shape == ()


def test_recursive_closures() -> None:
    def power(x: Any, n: int) -> Any:
        return x if n == 0 else power(x * x, n - 1)

    check_score(lambda s, b, h, q, k: power(s, 2))


def test_verified_and_named() -> None:
    def sliding(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    assert trace(sliding).program.name == "sliding"
    assert trace(None, None).program == ir.simple("full")
    assert trace(sliding, name="mine").program.name == "mine"


def test_torch_operations_inside_see_the_asked_device_and_dtype() -> None:
    seen: list[Any] = []

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        seen.append((s.dtype, q.dtype, s.device.type, s.shape, s.dim()))
        return s

    trace(score_mod=score, dtype=torch.bfloat16)
    assert seen == [(torch.bfloat16, torch.int64, "cpu", (), 0)]


def test_tracing_is_fast() -> None:
    ids, size = torch.zeros(2, 64, dtype=torch.int64), 3

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (q - k <= size) & (ids[b, q] == ids[b, k])

    times = []
    for _ in range(50):
        start = time.perf_counter()
        trace(mask)
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-3
