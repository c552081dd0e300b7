"""Every program of the library through the public API on the CPU, against its dense definition in float64."""

from __future__ import annotations

import pytest
import torch
from library.cases import CASES, Instance, program_of

import attnlang as al


def check(attention: al.Attention, instance: Instance) -> None:
    """Compare output and lse of a float32 call; rows without visible keys must give exactly 0 and -inf."""
    q, k, v = instance.operands(d=24, dv=16, dtype=torch.float32)
    out, lse = attention(q, k, v, return_lse=True, **instance.params, **instance.captured)
    want_out, want_lse = instance.dense_attention(q, k, v)
    empty = torch.isneginf(want_lse)
    assert torch.equal(torch.isneginf(lse), empty)
    assert not out[empty].any()
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("name", CASES)
def test_cpu_executors_agree_with_the_dense_definition(name: str, backend: str) -> None:
    instances = [CASES[name].instance(size) for size in ("tiny", "medium")]
    attention = al.compile(program_of(instances[0]), backend=backend)
    for instance in instances:
        check(attention, instance)
