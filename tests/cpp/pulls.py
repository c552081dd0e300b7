"""Gradients through the backward kernels of streaming stages, and through the reference in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import attnlang as al
from attnlang.ir import Load, Program, postorder, reference
from attnlang.runtime import cpp_pull

Tensor = torch.Tensor


class Launches:
    """Counts launches of the backward kernel, so that no test passes by what the blockwise executor does instead."""

    def __init__(self, monkeypatch: Any) -> None:
        self.count, inner = 0, cpp_pull.launch

        def launch(*args: Any) -> Any:
            made = inner(*args)
            self.count += 1
            return made

        monkeypatch.setattr(cpp_pull, "launch", launch)


@dataclass(frozen=True)
class Problem:
    """A program of one stage with its operands ``q k v`` and captured tensors, all in ``leaves``."""

    program: Program
    leaves: Mapping[str, Tensor]

    @property
    def wanted(self) -> list[str]:
        """Leaves that a gradient is asked for."""
        read = {n.tensor for n in postorder(*self.program.attend.roots()) if isinstance(n, Load)}
        return [n for n, t in self.leaves.items() if t.is_floating_point() and (n in "qkv" or n in read)]

    def _given(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        given = {}
        for n, t in self.leaves.items():
            t = t.detach() if dtype is None or not t.is_floating_point() else t.detach().to(dtype)
            given[n] = t.requires_grad_() if n in self.wanted else t
        return given

    def exact(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every output of the reference in float64, and the leaves it was made of."""
        given = self._given(torch.float64)
        (b, h, lq, _), (_, hkv, lk, _) = given["q"].shape, given["k"].shape
        sizes = {"B": b, "H": h, "Hkv": hkv, "Lq": lq, "Lk": lk}
        captured = {t.name: given[t.name] for t in self.program.tensors}
        scale = given["q"].shape[3] ** -0.5
        return reference(self.program, *(given[n] for n in "qkv"), sizes, {}, captured, scale), given

    def ours(self, backend: str = "cpp") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every output of the kernels, and the leaves."""
        given = self._given(None)
        both = {"return_lse": True} if "lse" in self.program.results else {}
        captured = {t.name: given[t.name] for t in self.program.tensors}
        attention = al.compile(self.program, backend=backend)
        made = attention(*(given[n] for n in "qkv"), **captured, return_aux=True, **both)
        if not isinstance(made, dict):
            made = {**dict(zip(("o", "lse"), made[:-1], strict=False)), **made[-1]}
        return made, given


def cotangents(made: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """A random gradient in float64 for every output that has one; rows of infinity get none."""
    generator = torch.Generator().manual_seed(seed)
    found = {n: t for n, t in made.items() if t.requires_grad}
    grads = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in found.items()}
    return {n: torch.where(found[n].detach().isfinite(), g, 0.0) for n, g in grads.items()}


def gradients(
    made: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    wanted: list[str],
    grads: Mapping[str, Tensor],
    again: bool = False,
) -> dict[str, Tensor]:
    """Gradients of the leaves ``wanted``; with ``again`` they can be asked for again."""
    parts = torch.autograd.grad(
        [made[n] for n in grads],
        [given[n] for n in wanted],
        [g.to(made[n].dtype) for n, g in grads.items()],
        allow_unused=True,
        retain_graph=again,
    )
    return {n: torch.zeros_like(given[n]) if g is None else g for n, g in zip(wanted, parts, strict=True)}


def check(problem: Problem, tolerance: float = 1e-4, what: str = "") -> dict[str, Tensor]:
    """Compare every gradient with the reference's, relative to its largest element, and return what kernels gave."""
    made, given = problem.exact()
    grads = cotangents(made)
    want = gradients(made, given, problem.wanted, grads)
    ours, given = problem.ours()
    got = gradients(ours, given, problem.wanted, grads)
    for n, expected in want.items():
        size = max(1e-3, float(expected.abs().max())) if expected.numel() else 1.0
        message = lambda text, n=n: f"{what or problem.program.name} d{n}: {text}"  # noqa: E731
        torch.testing.assert_close(got[n].double(), expected, atol=tolerance * size, rtol=tolerance, msg=message)
    return got
