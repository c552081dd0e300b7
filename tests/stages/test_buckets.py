"""Stages with groups and keyed outputs run in kernels, in both directions, and mean what the reference says."""

from __future__ import annotations

import pytest
import torch

import attnlang as al
from attnlang.ir import INT, Environment, Program, evaluate, reference
from attnlang.runtime import regions

from .bucket_programs import PROGRAMS, SHARP

Tensor = torch.Tensor
LENGTH = 70
SMOOTH = tuple(n for n in PROGRAMS if n not in SHARP)


def leaves(program: Program, length: int = LENGTH, heads: tuple[int, int] = (4, 2), dim: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"B": 2, "H": heads[0], "Lq": length, "Lk": length}
    found = {n: torch.randn(2, count, length, dim, generator=generator) for n, count in zip("qkv", (*heads, heads[1]))}
    for t in program.tensors:
        shape = [int(evaluate(d, Environment(sizes=sizes))) for d in t.shape]
        ints = torch.randint(-1, 2, shape, generator=generator)
        found[t.name] = ints if t.type is INT else torch.rand(shape, generator=generator)
    return found


def results(program: Program, given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    operands, others = [given[n] for n in "qkv"], {n: t for n, t in given.items() if n not in "qkv"}
    (b, h, lq, d), (_, hkv, lk, _) = operands[0].shape, operands[1].shape
    if backend == "reference":
        sizes = {"B": b, "H": h, "Hkv": hkv, "Lq": lq, "Lk": lk}
        return reference(program, *operands, sizes, {}, others, d**-0.5)
    both = {"return_lse": True} if "lse" in program.results else {}
    found = al.compile(program, backend=backend)(*operands, **others, return_aux=True, **both)
    if isinstance(found, dict):
        return found
    return {**dict(zip(("o", "lse"), found[:-1], strict=False)), **found[-1]}


def everything(
    program: Program, given: dict[str, Tensor], dtype: torch.dtype, backend: str, wanted: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every result and every gradient, by name."""
    at = {n: t.to(dtype).requires_grad_(wanted) if t.is_floating_point() else t for n, t in given.items()}
    made = results(program, at, backend)
    if not wanted:
        return made, {}
    generator = torch.Generator().manual_seed(1)
    loss = []
    for _, t in sorted(made.items()):
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        loss.append((torch.where(t.isfinite(), t.double(), 0.0) * weights).sum())
    floats = {n: t for n, t in at.items() if t.is_floating_point()}
    grads = torch.autograd.grad(torch.stack(loss).sum(), list(floats.values()), allow_unused=True)
    return made, {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(floats.items(), grads, strict=True)}


def compare(program: Program, given: dict[str, Tensor], backend: str, wanted: bool = True) -> None:
    want, want_grads = everything(program, given, torch.float64, "reference", wanted)
    got, grads = everything(program, given, torch.float32, backend, wanted)
    assert list(got) == list(want)
    for n, t in want.items():
        torch.testing.assert_close(got[n].double(), t, atol=1e-4, rtol=1e-4, msg=lambda text, n=n: f"{n}: {text}")
    for n, t in want_grads.items():
        size = max(1e-3, float(t.abs().max()))
        torch.testing.assert_close(
            grads[n].double(), t, atol=1e-4 * size, rtol=1e-4, msg=lambda text, n=n: f"gradient of {n}: {text}"
        )


@pytest.fixture
def no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be left to the blockwise executor."""
    monkeypatch.setattr(regions, "_forward", None)
    monkeypatch.setattr(regions, "_backward", None)


@pytest.mark.usefixtures("lightly_optimised", "no_blocks")
@pytest.mark.parametrize("name", SMOOTH)
def test_values_and_gradients(name: str) -> None:
    compare(PROGRAMS[name], leaves(PROGRAMS[name]), "cpp")


@pytest.mark.usefixtures("lightly_optimised", "no_blocks")
@pytest.mark.parametrize("name", SHARP)
def test_extrema(name: str) -> None:
    compare(PROGRAMS[name], leaves(PROGRAMS[name]), "cpp", wanted=False)
