"""C++ kernels that compute their run bounds: the same bits as with a run table, at every length, and no run map."""

from __future__ import annotations

import pytest
import torch
from backward import cases
from closed.cases import CASES, closed_call

from attnlang.ir import reference_attention
from attnlang.runtime import cpp, cpp_backward

LENGTHS = ((150, 150), (1, 70), (200, 64), (64, 331))


@pytest.mark.parametrize("name", CASES)
def test_bounds_and_table_give_the_same_bits(name: str) -> None:
    case = CASES[name]
    for lq, lk in LENGTHS:
        table = cases.make_call(case.program, (2, 4, 2, lq, lk, 16, 16), case.tensors, params=case.params)
        if "n" in case.tensors and case.tensors["n"].dim() == 2:
            table = cases.make_call(case.program, (2, 2, 2, lq, lk, 16, 16), case.tensors, params=case.params)
        call = closed_call(table, case.both)
        o, lse = cpp.forward(call)
        for got, want in zip((o, lse), cpp.forward(table), strict=True):
            assert torch.equal(got, want)
        do = torch.randn_like(o)
        found, wanted = (cpp_backward.backward(c, o, lse, do, None, ()) for c in (call, table))
        for grad in ("q", "k", "v"):
            assert torch.equal(getattr(found, grad), getattr(wanted, grad))
        arguments = (call.program, call.q, call.k, call.v, call.sizes, call.params, call.tensors, call.scale)
        torch.testing.assert_close(o.double(), reference_attention(*arguments)[0], atol=2e-5, rtol=2e-5)
