"""Compares a traced program with its Python function, called by eager PyTorch on every point of a small grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from attnlang import ir
from attnlang.tracing import Traced, trace

SHAPE = (2, 4, 6, 7)
"""B, H, Lq and Lk of the grid."""


def axes() -> dict[str, torch.Tensor]:
    return {
        axis: torch.arange(n).view([-1 if d == own else 1 for d in range(4)])
        for own, (axis, n) in enumerate(zip("bhqk", SHAPE, strict=True))
    }


def scores() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def evaluated(expr: ir.Expr, traced: Traced) -> torch.Tensor:
    sizes = dict(zip(("B", "H", "Lq", "Lk"), SHAPE, strict=True)) | {"Hkv": SHAPE[1]}
    for param in traced.program.tensors:
        tensor = traced.tensors[param.name]
        assert len(param.shape) == tensor.dim()
        for dim, n in zip(param.shape, tensor.shape, strict=True):
            if isinstance(dim, ir.Size):
                sizes[dim.name] = n
            else:
                assert isinstance(dim, ir.Const)
                assert dim.value == n
    environment = ir.Environment(axes(), sizes, dict(traced.scalars), dict(traced.tensors), {"s": scores()})
    return ir.evaluate(expr, environment).expand(SHAPE)


def eager(mod: Callable[..., Any], with_score: bool) -> torch.Tensor:
    """Call ``mod`` on real 0-d tensors at every point."""
    s, values = scores(), []
    for point in product(*map(range, SHAPE)):
        index = tuple(torch.tensor(i) for i in point)
        values.append(mod(s[point], *index) if with_score else mod(*index))
    return torch.stack([torch.as_tensor(v).detach().reshape(()) for v in values]).view(SHAPE)


@contextmanager
def double() -> Iterator[None]:
    """Let int / int be float64 in eager PyTorch, as it is in the reference."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_mask(mod: Callable[..., Any]) -> Traced:
    with double():
        traced = trace(mod, dtype=torch.float64)
        got, want = evaluated(traced.program.mask, traced), eager(mod, False)
    assert got.dtype == want.dtype == torch.bool
    assert torch.equal(got, want)
    return traced


def check_score(mod: Callable[..., Any]) -> Traced:
    with double():
        traced = trace(score_mod=mod, dtype=torch.float64)
        want = eager(mod, True).double()
        got = evaluated(traced.program.score, traced)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)
    return traced
