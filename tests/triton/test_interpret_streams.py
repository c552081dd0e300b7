"""Normalisers, weights and outputs beyond plain softmax in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from streaming_cases import CASES, TENSORS, masked

from attnlang.ir import Program, reference
from attnlang.ir.build import TRUE, all_of, k, op, q, s
from attnlang.runtime import triton as backend
from attnlang.runtime.call import Call
from attnlang.sparsity import analyse

MASKS = {
    "full": TRUE,
    "causal": op("le", k, q),
    "holes": all_of(op("lt", op("abs", op("sub", q, k)), 21), op("ne", op("mod", q, 5), 3)),
}


def make_call(name: str, mask: str, lq: int = 50, lk: int = 50, d: int = 16, dv: int = 24) -> Call:
    program = Program(name, (masked(CASES[name], MASKS[mask]),), tensors=TENSORS)
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, lq, d), (1, 1, lk, d), (1, 1, lk, dv))
    operands = [torch.randn(x, generator=generator) for x in shapes]
    sizes = {"B": 1, "H": 2, "Hkv": 1, "Lq": lq, "Lk": lk}
    tensors = {
        "sink": torch.tensor([0.5, -1.0]),
        "rate": torch.tensor([0.1, 0.03]),
        "gate": torch.randn(2, lk, generator=generator),
        "noise": torch.randn(lq, lk, generator=generator),
    }
    return Call(
        program, *operands, sizes, {}, tensors, d**-0.5, lambda tile: analyse(program, sizes, {}, tensors, tile)
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_stream(name: str, mask: str) -> None:
    call = make_call(name, mask)
    got = backend.outputs(call)
    want = reference(call.program, call.q, call.k, call.v, call.sizes, {}, call.tensors, call.scale)
    assert set(got) == set(want)
    for out, value in want.items():
        torch.testing.assert_close(got[out].double(), value.double(), atol=3e-5, rtol=5e-5, msg=lambda m, o=out: o + m)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["columns", "column_peak", "sigmoid_columns"])
def test_scores_of_minus_infinity_bring_nothing_to_sums_over_queries(name: str) -> None:
    call = make_call(name, "causal", 19, 35)
    stage = call.program.attend
    score = op("where", op("lt", op("mod", q, 7), 2), float("-inf"), op("where", op("eq", k, 3), float("-inf"), s))
    scored = replace(stage, branches=(replace(stage.branch, score=score),))
    call = replace(call, program=replace(call.program, stages=(scored,)))
    got = backend.outputs(call)
    want = reference(call.program, call.q, call.k, call.v, call.sizes, {}, call.tensors, call.scale)
    assert got["column"].isfinite().all()
    for out, value in want.items():
        torch.testing.assert_close(got[out].double(), value.double(), atol=3e-5, rtol=5e-5, msg=lambda m, o=out: o + m)
