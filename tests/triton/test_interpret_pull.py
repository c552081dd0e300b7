"""Gradients of stages beyond plain softmax by interpreted Triton kernels, against autograd of the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from streaming_cases import CASES, TENSORS, masked

import attnlang as al
from attnlang.ir import Expr, Program, reference
from attnlang.ir.build import TRUE, all_of, k, op, q
from attnlang.runtime import compiled

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Tensor = torch.Tensor
GIVEN = {n: c for n, c in CASES.items() if n not in ("softmax", "peak", "column_peak", "least", "temperature")}
"""Softmax alone has kernels of its own; the gradients of the others go to the pair that made an extremum."""
GIVEN["temperature"] = replace(CASES["temperature"], outputs=CASES["temperature"].outputs[:1])
HOLES = all_of(op("ge", op("add", q, 9), k), op("ge", q, 3), op("ne", op("mod", k, 7), 2))
"""Rows without keys, and tiles of every kind."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every backward pass so far, whether kernels made the gradients."""
    found: list[bool] = []
    original = compiled.StageKernel.gradients

    def gradients(self, *args):
        result = original(self, *args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(compiled.StageKernel, "gradients", gradients)
    return found


def leaves(heads: tuple[int, int], lengths: tuple[int, int], dims: tuple[int, int], batch: int = 1):
    generator = torch.Generator().manual_seed(0)
    (hq, hk), (lq, lk), (d, dv) = heads, lengths, dims
    shapes = {"q": (batch, hq, lq, d), "k": (batch, hk, lk, d), "v": (batch, hk, lk, dv)}
    shapes |= {"sink": (hq,), "rate": (hq,), "gate": (hq, lk), "noise": (lq, lk)}
    found = {n: torch.randn(x, generator=generator) for n, x in shapes.items()}
    return {**found, "rate": found["rate"].abs() * 0.1}


def results(program: Program, given: dict[str, Tensor]) -> dict[str, Tensor]:
    operands, others = [given[n] for n in "qkv"], {t.name: given[t.name] for t in TENSORS}
    if given["q"].dtype is torch.float64:
        (b, h, lq, d), (_, hkv, lk, _) = given["q"].shape, given["k"].shape
        sizes = {"B": b, "H": h, "Hkv": hkv, "Lq": lq, "Lk": lk}
        return reference(program, *operands, sizes, {}, others, d**-0.5)
    attention = al.compile(program, backend="triton")
    both = {"return_lse": True} if "lse" in program.results else {}
    found = attention(*operands, **others, return_aux=True, **both)
    if isinstance(found, dict):
        return found
    return {**dict(zip(("o", "lse"), found[:-1], strict=False)), **found[-1]}


def gradients(program: Program, given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    at = {n: t.to(dtype).requires_grad_() for n, t in given.items()}
    outs = {n: t for n, t in results(program, at).items() if t.is_floating_point()}
    generator = torch.Generator().manual_seed(1)
    parts = []
    for _, t in sorted(outs.items()):
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        parts.append((t.double().nan_to_num(neginf=0.0) * weights).sum())
    found = torch.autograd.grad(torch.stack(parts).sum(), list(at.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(at.items(), found, strict=True)}


def check(
    name: str,
    made: list[bool],
    mask: Expr = TRUE,
    heads: tuple[int, int] = (2, 2),
    lengths: tuple[int, int] = (21, 35),
    dims: tuple[int, int] = (16, 16),
    batch: int = 1,
) -> None:
    program = Program(name, (masked(GIVEN[name], mask),), tensors=TENSORS)
    given = leaves(heads, lengths, dims, batch)
    want, got = gradients(program, given, torch.float64), gradients(program, given, torch.float32)
    assert made == [True], "no kernel ran"
    for n, grad in want.items():
        size = max(1e-3, float(grad.abs().max()))
        torch.testing.assert_close(
            got[n].double(), grad, atol=1e-4 * size, rtol=0, msg=lambda text, n=n: f"{name} {n}: {text}"
        )


@pytest.mark.parametrize("mask", [TRUE, HOLES], ids=["all", "holes"])
@pytest.mark.parametrize("name", GIVEN)
def test_gradients(name: str, mask: Expr, made: list[bool]) -> None:
    check(name, made, mask)
