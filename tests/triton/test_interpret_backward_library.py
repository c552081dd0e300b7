"""Gradients of library programs with captured float tensors, and of some without, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from backward import cases
from library.cases import BROAD, CASES, bind, program_of

from attnlang.ir import FLOAT
from attnlang.passes.specialise import specialise
from attnlang.runtime import triton as forward_pass
from attnlang.runtime import triton_backward
from attnlang.runtime.call import Call
from attnlang.sparsity import RunMap, analyse

PLAIN = ("full", "causal_document", "softcap", "neighborhood_2d", "duo_attention", "causal_bottom_right/more_queries")


def call_of(name: str) -> Call:
    instance = CASES[name].instance("tiny")
    program = program_of(instance)
    sizes, params = bind(program, instance)
    program = specialise(program, {p.name: params[p.name] for p in program.scalars if p.static})
    params = {p.name: params[p.name] for p in program.scalars}
    q, k, v = (t.float() for t in instance.operands(16, 24, torch.float32))
    maps: dict[tuple[int, int], RunMap] = {}

    def runs(tile: tuple[int, int]) -> RunMap:
        if tile not in maps:
            maps[tile] = analyse(program, sizes, params, instance.captured, tile=tile)
        return maps[tile]

    return Call(program, q, k, v, sizes, params, instance.captured, 0.25, runs)


def learns(name: str) -> bool:
    return any(t.type is FLOAT for t in program_of(CASES[name].instance("tiny")).tensors)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", [n for n in BROAD if n in PLAIN or learns(n)])
def test_library_program(name: str) -> None:
    cases.check(call_of(name), forward_pass.forward, triton_backward.backward)
