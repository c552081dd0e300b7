"""Stages of several score terms in kernels: further terms of all pairs are made beforehand."""

from __future__ import annotations

import pytest
import torch
from library.studies import STUDIES

import attnlang as al
from attnlang import library
from attnlang.ir import Program
from attnlang.runtime import lowering, regions, stages
from attnlang.runtime.errors import Unavailable

pytestmark = pytest.mark.usefixtures("unoptimised")

Tensor = torch.Tensor
NAMES = ("local_linear", "local_linear_moments", "relational", "latent_alignment", "refined_words", "gradient_map")


def results(found: object) -> dict[str, Tensor]:
    if isinstance(found, dict):
        return found
    return {"o": found[0], **found[1]} if isinstance(found, tuple) else {"o": found}  # type: ignore[dict-item]


def derived(made: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Smooth results, and gradients of a linear function of them."""
    smooth = {n: t.squeeze(-1).double() for n, t in sorted(made.items()) if t.requires_grad}
    loss = torch.stack([(t * torch.arange(t.numel()).view(t.shape).cos()).sum() for t in smooth.values()]).sum()
    grads = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True, materialize_grads=True)
    return {**smooth, **{f"gradient of {n}": g.double() for n, g in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = STUDIES[name]
    program = getattr(library, study.program)
    operands, captured = study.make()
    every = {**dict(zip("qkv", operands, strict=True)), **captured}
    leaves = {n: t.requires_grad_() for n, t in every.items() if t.is_floating_point() and n not in study.fixed}
    want = derived(study.define(operands, captured), leaves)
    single = {n: t.detach().float().requires_grad_(n in leaves) for n, t in every.items() if t.is_floating_point()}
    params = {n: x for n, x in study.params.items() if n in {p.name for p in program.scalars}}
    monkeypatch.setattr(regions, "_forward", None)  # which is how one block of pairs would be computed
    call = al.compile(program, backend="cpp")
    made = results(call(**{**every, **single}, return_aux=True, scale=study.scale, **params))
    got = derived(made, {n: single[n] for n in leaves})
    assert set(got) == set(want)
    for n, expected in want.items():
        size = max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(got[n], expected, atol=3e-5 * size, rtol=3e-5, msg=lambda text, n=n: f"{n}: {text}")


def relation(rule: str) -> Program:
    return al.parse(f"""pattern relation(more: float[B, H, Lk, E]):
    term t = dot(Q, more)
    mask = {rule}
    output along = sum(w * t, over=k)
""")


def test_few_pairs_and_large_tensors_are_left_to_the_blockwise_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    monkeypatch.setattr(stages, "_runs_of", lambda *given, real=stages._runs_of: made.append(True) or real(*given))
    monkeypatch.setattr(lowering, "_of_all_pairs", lambda *_: pytest.fail("all pairs are made"))
    q, k, v = (torch.randn(1, 1, 2048, 4) for _ in range(3))
    o, aux = al.compile(relation("q == k"))(q, k, v, more=k, return_aux=True)
    assert made
    torch.testing.assert_close(o, v)
    torch.testing.assert_close(aux["along"], (q * k).sum(-1))
    monkeypatch.setattr(lowering, "LARGEST", 100)
    al.compile(relation("k <= q"))(q[:, :, :20], k[:, :, :20], v[:, :, :20], more=k[:, :, :20])
    with pytest.raises(Unavailable, match="several score terms"):
        al.compile(relation("k <= q"), backend="cpp")(q, k, v, more=k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bodies_that_add_up_products(dtype: torch.dtype) -> None:
    """A score whose body is linear in the two features; kernels of bodies keep it where rows would be rounded."""
    program = al.parse("""pattern p(a: float[H, D], c: float[B, H, Lq, D]):
    term t = sum_d((y - x) * c[b, h, q, d] + x * a[h, d] + 0.25 * y, Q, K)
    mask = k <= q
    score = t
""")
    q, k, v = (torch.randn(2, h, 40, 8).to(dtype) for h in (4, 2, 2))
    given = {"a": torch.randn(4, 8), "c": torch.randn(2, 4, 40, 8)}
    want = al.reference(program, q, k, v, **given)
    got = al.compile(program, backend="cpp")(q, k, v, **given)
    close = 2e-2 if dtype is torch.bfloat16 else 2e-5
    torch.testing.assert_close(got.double(), want.double(), atol=close, rtol=close)


def test_autocast_does_not_reach_inside() -> None:
    q, k, v = (torch.randn(1, 2, 12, 4) for _ in range(3))
    call = al.compile(relation("k <= q"))
    want = results(call(q, k, v, more=k, return_aux=True))
    with torch.autocast("cpu", torch.bfloat16):
        made = results(call(q, k, v, more=k, return_aux=True))
    for name, t in want.items():
        torch.testing.assert_close(made[name], t, atol=0, rtol=0)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_bare_rows_of_fewer_heads_and_rows_stand_for_queries(backend: str | None) -> None:
    """Addresses outside of a tensor move to the nearest row, those that are not written among them."""
    program = al.parse("pattern p:\n    term t = dot(V, K)\n    score = s * t\n")
    q, (k, v) = torch.randn(1, 4, 12, 4), (torch.randn(1, 2, 9, 4) for _ in range(2))
    near, keys = v[:, [0, 1, 1, 1]][:, :, [*range(9), 8, 8, 8]], k.repeat_interleave(2, 1)
    scores = q @ keys.mT / 2 * (near @ keys.mT)
    want = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(al.compile(program, backend=backend)(q, k, v), want, atol=2e-5, rtol=2e-5)
