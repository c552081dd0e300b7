"""Rows stages in Triton's interpreter, by kernels of their own and inside of kernels of attention.

Everything is compared with the float64 reference, and what ran is looked at: where no kernel takes a stage in, another
way gives the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import attnlang as al
from attnlang.codegen.triton import emit
from attnlang.runtime import rows, triton_common, triton_rows

Tensor = torch.Tensor


@dataclass
class Ran:
    """What each launched kernel took in, and whether it was that of plain softmax; the rows made by kernels."""

    kernels: list[tuple[str, ...]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Rows are made by Triton, too."""
    found, launch = Ran(), triton_common.Kernel.run

    def run(kernel: Any, arguments: Callable[..., Any]) -> None:
        plan = kernel.plan
        if plan.direction == "rows":
            found.rows.append(plan.stage.name)
        elif plan.direction in ("forward", "saving"):
            maps = [name for name in ("before", "after") if getattr(plan, name) is not None]
            found.kernels.append((*maps, "plain" if kernel.emit is emit else "stream"))
        launch(kernel, arguments)

    monkeypatch.setattr(triton_common.Kernel, "run", run)
    monkeypatch.setattr(rows, "rows_of", lambda device: triton_rows.make)
    monkeypatch.setattr("attnlang.runtime.cpp.prefers_order", lambda call: False)  # which is a matter of CPUs
    return found


def operands(dims: tuple[int, int], lq: int = 37, lk: int = 45, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((1, 4, lq, dims[0]), (1, 2, lk, dims[0]), (1, 2, lk, dims[1]))
    return [torch.randn(s).to(dtype) for s in shapes]


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    parts = found if isinstance(found, tuple) else [found[name] for name in sorted(found)]
    return [t for part in parts for t in flat(part)]


def check(text: str, given: list[Tensor], captured: dict[str, Any], tolerance: float = 3e-5, **options: Any) -> None:
    program = al.parse(text)
    got = flat(al.compile(program, backend="triton")(*given, return_aux=True, **options, **captured))
    want = flat(al.reference(program, *given, return_aux=True, **options, **captured))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)


ROPE = """
pattern rope(cos: float[N, F], sin: float[M, F]):
    let half = D // 2
    rows turned[Lq, D] = Q[b, h, q, d] * cos[q, d] + sin[q, d] * (
        Q[b, h, q, d - half] if d >= half else -Q[b, h, q, d + half]
    )
    queries = turned
    mask = k <= q + 8
"""
PAIRS = """
pattern rope_of_pairs(cos: float[N, F], sin: float[M, F]):
    rows turned[Lq, D] = Q[b, h, q, d] * cos[q, d // 2] + sin[q, d // 2] * (
        Q[b, h, q, d ^ 1] if d % 2 == 1 else -Q[b, h, q, d ^ 1]
    )
    queries = turned
    mask = abs(k - q) < 20
    score = s + 0.01 * (q - k)
"""
NORM = """
pattern q_norm(gain: float[D], eps: float = 1e-5):
    rows normed[Lq, D] = Q[b, h, q, d] * rsqrt(mean_d(Q[b, h, q, d] ** 2) + eps) * gain[d]
    queries = normed
    mask = (q - k) % 3 != 1
"""
GATE = """
pattern gated(gate: float[B, H, Lq, G], by_head: float[H]):
    attend inner:
        mask = k < 3 * q
    rows o[Lq, Dv] = inner[b, h, q, d] * sigmoid(gate[b, h, q, d]) * by_head[h]
"""
NORMED = """
pattern normed_output(gate: float[H]):
    attend inner:
        mask = k <= q
    rows o[Lq, Dv] = inner[b, h, q, d] * rsqrt(mean_d(inner[b, h, q, d] ** 2) + 1e-6) * (
        gate[h] / max_d(abs(inner[b, h, q, d]))
    )
    return o, inner_lse
"""
SEGMENTS = """
pattern two_segments(old_k: float[B, Hkv, P, D], old_v: float[B, Hkv, P, Dv]):
    attend old:
        lengths = (Lq, P)
        keys = old_k
        values = old_v
    attend new:
        mask = k < q
    let share = sigmoid(new_lse[b, h, q] - old_lse[b, h, q])
    rows o[Lq, Dv] = share * new[b, h, q, d] + (1 - share) * old[b, h, q, d]
"""
BOTH = """
pattern turned_and_gated(gate: float[N, F], seen: bool[P], cos: float[M, E]):
    rows turned[Lq, D] = Q[b, h, q, d] * cos[q, d] - Q[b, h, q, D - 1 - d]
    attend inner:
        queries = turned
        mask = seen[k] and k <= q
    rows o[Lq, Dv] = inner[b, h, q, d] * gate[q, d] if seen[q] else max(inner_lse[b, h, q], -4.0) * 0.1 * d
    return o
"""
BRANCHES = """
pattern branches(gate: float[H]):
    branch near:
        mask = abs(q - k) < 4
    branch far:
        mask = abs(q - k) >= 4
        score = 0.5 * s
    output o_near = sum(w * V, over=k, branch=near)
    output o_far = sum(w * V, over=k, branch=far)
    rows o[B, H, Lq, Dv] = gate[h] * o_near[b, h, q, d] + (1 - gate[h]) * o_far[b, h, q, d]
"""
SIGMOID = """
pattern sigmoid_attention(gate: float[H, N], gain: float[D]):
    rows scaled[Lq, D] = Q[b, h, q, d] * gain[d]
    attend inner:
        queries = scaled
        mask = k <= q + 5
        normalize = elementwise(sigmoid(s), divisor=count)
        output total = sum(w * (k - q), over=k)
        output inner = sum(w * V, over=k)
    rows o[Lq, Dv] = inner[b, h, q, d] * gate[h, q] + sigmoid(total[b, h, q])
    return o, total
"""


def tensors(name: str, dims: tuple[int, int], lq: int = 37) -> dict[str, Tensor]:
    d, dv = dims
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "ROPE": {"cos": (lq + 3, d), "sin": (lq, d)},
        "PAIRS": {"cos": (lq, d // 2), "sin": (lq - 5, d // 2)},  # clamped at the end
        "NORM": {"gain": (d,)},
        "GATE": {"gate": (1, 4, lq, dv), "by_head": (4,)},
        "NORMED": {"gate": (4,)},
        "SEGMENTS": {"old_k": (1, 2, 21, d), "old_v": (1, 2, 21, dv)},
        "BOTH": {"gate": (lq, dv - 2), "cos": (lq, d)},
        "BRANCHES": {"gate": (4,)},
        "SIGMOID": {"gate": (4, lq), "gain": (d,)},
    }
    made = {n: torch.randn(s) for n, s in shapes[name].items()}
    return made | ({"seen": torch.rand(50) < 0.7} if name == "BOTH" else {})


TAKEN: dict[str, list[tuple[str, ...]]] = {
    "ROPE": [("before", "plain")],
    "PAIRS": [("before", "plain")],
    "NORM": [("before", "plain")],
    "GATE": [("after", "plain")],
    "NORMED": [("after", "plain")],
    "SEGMENTS": [("plain",), ("after", "plain")],
    "BOTH": [("before", "after", "plain")],
    "BRANCHES": [("plain",), ("after", "plain")],
    "SIGMOID": [("before", "after", "stream")],
}


@pytest.mark.parametrize(("name", "dims"), [(n, (20, 12) if i % 2 else (16, 32)) for i, n in enumerate(TAKEN)])
def test_kernels_take_rows_in(name: str, dims: tuple[int, int], ran: Ran) -> None:
    check(globals()[name], operands(dims), tensors(name, dims))
    assert ran == Ran(TAKEN[name])


@pytest.mark.parametrize("name", ["ROPE", "SEGMENTS", "BOTH", "SIGMOID"])
def test_bfloat16(name: str, ran: Ran) -> None:
    dims = (24, 12)
    captured = tensors(name, dims)
    if name == "SEGMENTS":
        captured = {n: t.bfloat16() for n, t in captured.items()}
    check(globals()[name], operands(dims, dtype=torch.bfloat16), captured, 3e-2)
    assert ran.kernels == TAKEN[name]


def test_one_query(ran: Ran) -> None:
    captured = tensors("BOTH", (16, 16), lq=1) | {"seen": torch.ones(45, dtype=torch.bool)}
    check(BOTH, operands((16, 16), lq=1), captured)
    assert ran.kernels == TAKEN["BOTH"]


def test_wide_kernels(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_common, "needs_wide", lambda call: True)
    check(BOTH, operands((20, 12)), tensors("BOTH", (20, 12)))
    assert ran.kernels == TAKEN["BOTH"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_queries_that_are_made_are_not_negated(scale: float, ran: Ran) -> None:
    """The kernel of plain softmax wants a positive scale, and others take any."""
    check(ROPE, operands((16, 16)), tensors("ROPE", (16, 16)), scale=scale)
    check(GATE, operands((16, 16)), tensors("GATE", (16, 16)), scale=scale)
    assert ran.kernels == [("before", "stream"), ("after", "stream")]


def test_sums_over_queries_read_queries_that_exist(ran: Ran) -> None:
    text = """
pattern watched(gain: float[D]):
    rows scaled[Lq, D] = Q[b, h, q, d] * gain[d]
    queries = scaled
    mask = k <= q
    output o = sum(w * V, over=k)
    output received = sum(w, over=q)
"""
    check(text, operands((16, 16)), {"gain": torch.randn(16)})
    assert ran.rows == ["scaled"]
    assert ran.kernels == [("stream",)]


def test_names_that_kernels_use(ran: Ran) -> None:
    text = """
pattern names(d_idx: float[D], q_idx: bool[H, D], element_: int[Lq], inner: float = 2.0, h_: float = 0.5):
    rows make_queries[Lq, D] = Q[b, h, q, d] * d_idx[d] * inner if q_idx[h, d] else 0.1 * h_ * element_[q]
    attend acc:
        queries = make_queries
        mask = k <= q
    rows o[Lq, Dv] = acc[b, h, q, d] * inner + sum_d(acc[b, h, q, d]) + acc_lse[b, h, q]
    return o
"""
    captured = {
        "d_idx": torch.randn(20),
        "q_idx": torch.rand(4, 20) < 0.5,
        "element_": torch.randint(-3, 3, (37,), dtype=torch.int16),
        "h_": -1.5,
    }
    check(text, operands((20, 12)), captured)
    assert ran.kernels == [("before", "after", "plain")]


KEYS = """
pattern keys_turned(cos: float[N, F], sin: float[N, F]):
    let half = D // 2
    rows turned[B, Hkv, Lk, D] = K[b, h, q, d] * cos[q, d] + sin[q, d] * (
        K[b, h, q, d - half] if d >= half else -K[b, h, q, d + half]
    )
    keys = turned
    mask = k <= q
"""
LETS = """
pattern lets(kind: int[H, D], used: bool[B, Lk], gain: float[D], power: float = 1.5, least: int = 2):
    rows changed[B, Hkv, Lk, D] = gain[d] * (K[b, h, q, d] - mean_d(K[b, h, q, d])) / (
        1.0 + max_d(abs(K[b, h, q, d]))
    ) + (
        power * kind[h, d] if used[b, q] and d >= least else -float(q) / Lk
    ) + 0.1 * sum_d(1.0)
    keys = changed
    mask = k <= q
"""


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["KEYS", "LETS"])
def test_kernels_of_rows(name: str, gradients: bool, ran: Ran) -> None:
    """Keys are read by many tiles: they are made before."""
    dims = (20, 12)
    q, k, v = operands(dims)
    captured: dict[str, dict[str, Any]] = {
        "KEYS": {"cos": torch.randn(45, 20), "sin": torch.randn(45, 20)},
        "LETS": {
            "kind": torch.randint(0, 3, (4, 20), dtype=torch.int8),
            "used": torch.rand(1, 45) < 0.5,
            "gain": torch.randn(20),
            "power": -0.75,
        },
    }
    program, given = al.parse(globals()[name]), captured[name]
    leaves = [k, *(t for t in given.values() if isinstance(t, Tensor) and t.is_floating_point())]
    found = []
    for run in (al.compile(program, backend="triton"), lambda *a, **c: al.reference(program, *a, **c)):
        for leaf in leaves:
            leaf.requires_grad_(gradients)
        o = run(q, k, v, **given)
        weights = torch.linspace(-1, 1, o.numel()).view(o.shape).to(o.dtype)
        grads = torch.autograd.grad((o * weights).sum(), leaves) if gradients else ()
        found.append([o, *grads])
    back = ["turned_k", "turned_cos", "turned_sin"] if gradients and name == "KEYS" else []  # no maximum over features
    assert ran.rows == ["turned" if name == "KEYS" else "changed", *back]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-4 if gradients else 3e-5, rtol=5e-5)


def test_tiles_of_rows(ran: Ran) -> None:
    """Several tiles and batch elements, strides, and what is not a number."""
    text = """
pattern peaks:
    rows peak[B, Hkv, Lk, Dv + 1] = max_d(V[b, h, q, d]) + sum_d(V[b, h, q, d]) if d == Dv else V[b, h, q, Dv - d]
    values = peak
    return o
"""
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 39, 16), torch.randn(2, 39, 2, 17).transpose(1, 2)
    check(text, [q, k, v], {})
    assert ran.rows == ["peak"]
    v[1, 1, 38, 3] = torch.nan
    made = al.compile(al.parse(text), backend="triton")(q, k, v)
    assert torch.equal(made.isnan(), al.reference(al.parse(text), q, k, v).isnan())


def test_too_many_features(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "MOST_FEATURES", 16)
    check(KEYS, operands((20, 12)), {"cos": torch.randn(45, 20), "sin": torch.randn(45, 20)})
    assert ran.rows == []
