"""Rows stages on C++ kernels: made on the way of a kernel of attention, or by a kernel of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

import attnlang as al
from attnlang.codegen.isa import ISAS
from attnlang.runtime import cpp_common
from attnlang.runtime.toolchain import processor_features

Tensor = torch.Tensor

TURN = "X * cos[q, d] + sin[q, d] * (X_back if d >= half else -X_on)"
ANGLE = "(place[q] * theta ** (-2.0 * (d // 2) / D))"


def turned(name: str) -> str:
    return (
        TURN.replace("X_back", f"{name}[b, h, q, d - half]")
        .replace("X_on", f"{name}[b, h, q, d + half]")
        .replace("X", f"{name}[b, h, q, d]")
    )


PROGRAMS = {
    "rope": (
        f"""
pattern rope(cos: float[N, F], sin: float[N, F]):
    let half = D // 2
    rows turned[Lq, D] = {turned("Q")}
    rows keys_[B, Hkv, Lk, D] = {turned("K")}
    attend o:
        queries = turned
        keys = keys_
        mask = k <= q
    return o, o_lse
""",
        "before",
    ),
    "interleaved": (
        f"""
pattern interleaved(theta: float = 100.0, place: int[Lq]):
    rows turned[Lq, D] = Q[b, h, q, d] * cos({ANGLE}) + sin({ANGLE}) * Q[b, h, q, d ^ 1] * (2 * (d % 2) - 1)
    queries = turned
    output o = sum(w * V, over=k)
    output most = max(s, over=k)
""",
        "before",
    ),
    "normed": (
        """
pattern normed(gamma: float[D], gate: float[H, Dv], on: bool[B, Lq]):
    rows unit[Lq, D] = (Q[b, h, q, d] - mean_d(Q[b, h, q, d])) * rsqrt(sum_d(Q[b, h, q, d] ** 2) + 0.1) * gamma[d]
    attend inner:
        queries = unit
        mask = q - k < 9
    let low = 1e-6
    rows o[Lq, Dv] = inner[b, h, q, d] * (rsqrt(mean_d(inner[b, h, q, d] ** 2) + low) if on[b, q] else 0.5) * gate[h, d]
    return o, inner_lse
""",
        "before after",
    ),
    "segments": (
        """
pattern segments(old_k: float[B, Hkv, P, D], old_v: float[B, Hkv, P, Dv]):
    attend old:
        lengths = (Lq, P)
        keys = old_k
        values = old_v
    attend new:
        mask = k <= q
    let share = sigmoid(new_lse[b, h, q] - old_lse[b, h, q])
    rows o[Lq, Dv] = share * new[b, h, q, d] + (1 - share) * old[b, h, q, d]
""",
        "after",
    ),
    "gated": (
        """
pattern gated(gate: float[B, H, Lq, Dv]):
    attend inner:
        normalize = elementwise(sigmoid(s))
        weights = w * (1 + 0.1 * s)
        mask = k <= q
        output inner = sum(w * V, over=k)
        output mass = sum(w, over=k)
    rows o[Lq, Dv] = inner[b, h, q, d] * sigmoid(gate[b, h, q, d]) / (1 + mass[b, h, q])
    return o, mass
""",
        "after",
    ),
    "branches": (
        """
pattern branches(share: float[H]):
    branch near:
        mask = abs(q - k) < 4
    branch far:
        mask = k <= q
    output o_near = sum(w * V, over=k, branch=near)
    output o_far = sum(w * V, over=k, branch=far)
    rows o[Lq, Dv] = share[h] * o_near[b, h, q, d] + (1 - share[h]) * o_far[b, h, q, d]
""",
        "after",
    ),
    "elsewhere": (
        """
pattern elsewhere():
    attend inner:
        mask = k <= q
    rows o[Lq, Dv] = inner[b, h, q, d] - inner[b, h, q // 2 * 2, Dv - 1 - d]
""",
        "",
    ),
    "read_twice": (
        """
pattern read_twice():
    rows unit[Lq, D] = Q[b, h, q, d] * rsqrt(mean_d(Q[b, h, q, d] ** 2) + 1e-6)
    attend inner:
        queries = unit
        keys = unit
    rows o[Lq, Dv] = 2 * inner[b, h, q, d]
    return o, inner
""",
        "",
    ),
}

OTHERS = {"elsewhere"}
"""Programs whose gradients are not rows."""


def captured(name: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    batch, heads, lq, dim = q.shape
    hkv, lk, dv = k.shape[1], k.shape[2], v.shape[3]
    angles = torch.randn(max(lq, lk), dim)
    made = {
        "rope": {"cos": angles.cos(), "sin": angles.sin()},
        "interleaved": {"place": torch.randint(0, 50, (lq,))},
        "normed": {"gamma": torch.rand(dim), "gate": torch.rand(heads, dv), "on": torch.rand(batch, lq) < 0.7},
        "segments": {"old_k": torch.randn(batch, hkv, 11, dim), "old_v": torch.randn(batch, hkv, 11, dv)},
        "gated": {"gate": torch.randn(batch, heads, lq, dv)},
        "branches": {"share": torch.rand(heads)},
    }
    return made.get(name, {})


@dataclass
class Seen:
    """What was launched: maps taken in by kernels of attention, and kernels of their own."""

    taken_in: set[str] = field(default_factory=set)
    alone: int = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    found = Seen()
    run = cpp_common.Loaded.run

    def spy(loaded, *args):
        if loaded.plan.direction == "rows":
            found.alone += 1
        else:
            found.taken_in |= {name for name in ("before", "after") if getattr(loaded.plan, name) is not None}
        return run(loaded, *args)

    monkeypatch.setattr(cpp_common.Loaded, "run", spy)
    yield found


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def results(attention: al.Attention, q: Tensor, k: Tensor, v: Tensor, more: dict[str, Tensor]) -> dict[str, Tensor]:
    made = attention(q, k, v, **more, return_aux=True)
    return made if isinstance(made, dict) else {"o": made[0], **made[1]}


def close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value.double(), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.usefixtures("lightly_optimised")
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_without_gradients(name: str, seen: Seen) -> None:
    text, taken_in = PROGRAMS[name]
    attention = al.compile(al.parse(text))
    dim = 24
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
        for lq, hkv in ((37, 4), (130, 2)):
            lk, dv = (lq, dim) if name == "read_twice" else (lq + 8, 20)
            if name == "read_twice" and hkv == 2:
                continue
            q, k = torch.randn(2, 4, lq, dim), torch.randn(2, hkv, lk, dim)
            v = torch.randn(2, hkv, lk, dv)
            q, k, v = (t.to(dtype) for t in (q, k, v))
            more = captured(name, q, k, v)
            want = results(attention, q.double(), k.double(), v.double(), double(more))
            close(results(attention, q, k, v, more), want, tolerance)
    assert seen.taken_in == set(taken_in.split())


@pytest.mark.usefixtures("lightly_optimised")
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_gradients(name: str, seen: Seen) -> None:
    attention = al.compile(al.parse(PROGRAMS[name][0]))
    dim = 24
    q, k, v = (
        torch.randn(1, 2, 21, dim),
        torch.randn(1, 2, 21, dim),
        torch.randn(1, 2, 21, dim if "twice" in name else 20),
    )
    more = captured(name, q, k, v)
    floats = [n for n, t in more.items() if t.is_floating_point()]
    given = [t.requires_grad_() for t in (q, k, v, *(more[n] for n in floats))]
    exact = [t.detach().double().requires_grad_() for t in given]

    def loss(leaves: list[Tensor]) -> Tensor:
        made = results(attention, *leaves[:3], more | dict(zip(floats, leaves[3:], strict=True)))
        return sum(((0.3 * t).sin().sum() for t in made.values() if t.is_floating_point()), torch.zeros(()))

    def alike(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)

    made = loss(given)
    forward = seen.alone
    want = torch.autograd.grad(loss(exact), exact, create_graph=True, materialize_grads=True)
    alike(torch.autograd.grad(made, given, materialize_grads=True), want)
    assert forward
    assert not seen.taken_in
    assert (seen.alone > forward) == (name not in OTHERS)  # gradients are rows, too
    got = torch.autograd.grad(loss(given), given, create_graph=True, materialize_grads=True)
    alike(got, want)
    # and once more: the derivative of a kernel that made rows is differentiable
    again = torch.autograd.grad(sum(g.square().sum() for g in got), given[0])
    exactly = torch.autograd.grad(sum(g.square().sum() for g in want), exact[0])
    torch.testing.assert_close(again[0].double(), exactly[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("isa", [name for name in ISAS if ISAS[name].needs <= processor_features()])
def test_instruction_sets(isa: str, monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    monkeypatch.setenv("ATTNLANG_ISA", isa)
    attention = al.compile(al.parse(PROGRAMS["normed"][0]))
    q, k, v = torch.randn(2, 2, 70, 16), torch.randn(2, 2, 70, 16), torch.randn(2, 2, 70, 33)
    more = captured("normed", q, k, v)
    want = results(attention, q.double(), k.double(), v.double(), double(more))
    close(results(attention, q, k, v, more), want, 2e-5)
    assert seen.taken_in == {"before", "after"}


ROWS = """
pattern rows_(table: float[N], which: int[F], on: bool[F], t: float[B, Lk]):
    rows far[B, Hkv, Lk, D] = (table[which[d]] if on[d] else K[b, h, q, d - 1]) + t[b, q] * K[b, 0, Lk - 1 - q, d]
    rows mixed[B, Hkv, Lk, D] = K[b, h, q, D - 1 - d] if d % 3 == 0 else erf(1.0 * d - q)
    rows other[B, Hkv, Lk, D] = far[b, h, q, d] + max_d(-K[b, h, q, d]) * mixed[b, h, q, d] ** 2
    keys = other
"""


def test_a_kernel_of_its_own(seen: Seen) -> None:
    attention = al.compile(al.parse(ROWS))
    q, k, v = (
        torch.randn(2, 2, 9, 19),
        torch.randn(2, 2, 77, 19).transpose(2, 3).contiguous().mT,
        torch.randn(2, 2, 77, 8),
    )
    more = {
        "table": torch.randn(5),
        "which": torch.randint(-2, 7, (19,)),
        "on": torch.rand(19) < 0.5,
        "t": torch.randn(2, 77, 2)[..., 0],
    }
    want = results(attention, q.double(), k.double(), v.double(), double(more))
    close(results(attention, q, k, v, more), want, 2e-5)
    assert seen.alone == 3


def test_not_a_number_is_the_largest(seen: Seen) -> None:
    text = """
pattern top():
    attend inner:
        mask = k <= q
    rows o[Lq, Dv] = max_d(inner[b, h, q, d]) + 0 * q
"""
    attention = al.compile(al.parse(text))
    q, k, v = (torch.randn(1, 1, 40, 20) for _ in range(3))
    v[0, 0, 0, 17] = float("nan")
    assert attention(q, k, v).isnan().all()
    assert seen.taken_in == {"after"}


def test_no_queries_and_no_keys(seen: Seen) -> None:
    attention = al.compile(al.parse(PROGRAMS["normed"][0]))
    for lq, lk in ((0, 5), (5, 0)):
        q, k, v = torch.randn(1, 2, lq, 16), torch.randn(1, 2, lk, 16), torch.randn(1, 2, lk, 16)
        more = captured("normed", q, k, v)
        want = results(attention, q.double(), k.double(), v.double(), double(more))
        close(results(attention, q, k, v, more), want, 2e-5)
