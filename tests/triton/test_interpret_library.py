"""Programs of the library in Triton's interpreter, against their hand-written dense definitions.

Light cases, which have no construct of their own, are compared on the other backends only. Every second of the rest is
run with every change, and all of them by `make test-long` and `make test-triton`.
"""

from __future__ import annotations

import pytest
import torch
from library.cases import BROAD, CASES, bind, program_of

from attnlang.passes.specialise import specialise
from attnlang.runtime import triton as backend
from attnlang.runtime.call import Call
from attnlang.sparsity import analyse


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", [n if i % 2 else pytest.param(n, marks=pytest.mark.long) for i, n in enumerate(BROAD)])
def test_library_program(name: str) -> None:
    instance = CASES[name].instance("tiny")
    program = program_of(instance)
    sizes, params = bind(program, instance)
    program = specialise(program, {p.name: params[p.name] for p in program.scalars if p.static})
    params = {p.name: params[p.name] for p in program.scalars}
    q, k, v = instance.operands(16, 24, torch.float32)
    q, k, v = q.float(), k.float(), v.float()

    def runs(tile):
        return analyse(program, sizes, params, instance.captured, tile=tile)

    o, lse = backend.forward(Call(program, q, k, v, sizes, params, instance.captured, 0.25, runs))
    want, want_lse = instance.dense_attention(q.double(), k.double(), v.double(), 0.25)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(o.double(), want, atol=3e-5, rtol=2e-5)
