"""Kernels of normalisers, weights and outputs compile for chips that are not here, inside their shared memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from streaming_cases import CASES, TENSORS, masked

from attnlang.codegen.offline import Compiler, compile_plan
from attnlang.codegen.plan import make_plan
from attnlang.codegen.triton_tiles import shared_limit
from attnlang.ir import Program
from attnlang.ir.build import k, op, q


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as made:
        yield made


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
@pytest.mark.parametrize("name", ["sink", "sigmoid", "cog", "decay", "entropy", "cut", "peak"])
def test_compiles(compiler: Compiler, name: str, target: str) -> None:
    program = Program(name, (masked(CASES[name], op("le", k, q)),), tensors=TENSORS)
    storage = {t.name: "float32" for t in TENSORS}
    plan = make_plan(program, dtype="bfloat16", head_dim=64, value_dim=64, storage=storage)
    made = compile_plan(plan, target, descriptors=False, compiler=compiler)
    assert made.shared_bytes <= shared_limit(target)
    assert made.mma
