"""Stages beyond plain softmax on the C++ backend: every output against the reference, at every kind of shape."""

from __future__ import annotations

import pytest
import torch

from attnlang.ir import Expr, Program, reference
from attnlang.ir.build import TRUE, all_of, k, op, q
from attnlang.runtime import cpp
from tests.streaming_cases import CASES, TENSORS, masked

from .support import make_call

Tensor = torch.Tensor
CAUSAL = op("ge", q, k)
HOLES = all_of(op("ge", op("add", q, 40), k), op("ne", op("mod", q, 7), 3), op("ne", op("mod", k, 5), 1))
MASKS: dict[str, Expr] = {"all": TRUE, "causal": CAUSAL, "holes": HOLES}


def captured(h: int, lq: int, lk: int) -> dict[str, Tensor]:
    shapes = {"sink": (h,), "rate": (h,), "gate": (h, lk), "noise": (lq, lk)}
    made = {t.name: torch.randn(shapes[t.name]) for t in TENSORS}
    return {**made, "rate": made["rate"].abs() * 0.1}


def run(
    name: str,
    mask: Expr = TRUE,
    heads: tuple[int, int] = (2, 2),
    lengths: tuple[int, int] = (130, 150),
    dims: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
    batch: int = 1,
) -> None:
    torch.manual_seed(0)
    program = Program(name, (masked(CASES[name], mask),), (), TENSORS)
    (hq, hk), (lq, lk), (d, dv) = heads, lengths, dims
    queries, keys, values = (
        torch.randn(batch, h, n, w).to(dtype) for h, n, w in ((hq, lq, d), (hk, lk, d), (hk, lk, dv))
    )
    tensors = captured(hq, lq, lk)
    call = make_call(program, queries, keys, values, tensors=tensors, scale=1.5 * d**-0.5)
    got = cpp.outputs(call)
    want = reference(program, queries, keys, values, call.sizes, {}, tensors, call.scale, torch.float64)
    for out in program.attend.outputs:
        assert got[out.name].shape == want[out.name].shape, out.name
        assert got[out.name].dtype is (dtype if out.rows else torch.int64 if out.monoid == "argmax" else torch.float32)
        size = max(1.0, float(want[out.name].double().nan_to_num(0, 0, 0).abs().max())) if lq and lk else 1.0
        torch.testing.assert_close(
            got[out.name].double(),
            want[out.name].double(),
            atol=tolerance * size,
            rtol=tolerance,
            msg=lambda text, n=out.name: f"{name}.{n}: {text}",
        )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_reference(name: str, mask: str) -> None:
    run(name, MASKS[mask])
