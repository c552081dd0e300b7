"""Random programs over the whole language: every executor against the dense reference in float64, with gradients."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

import attnlang as al
from attnlang.ir import Attend, Load, postorder, verify
from attnlang.ir.build import TRUE
from attnlang.runtime import regions

from .random_programs import arguments, random_program

FUZZ = int(os.environ.get("ATTNLANG_FUZZ", "1"))
PROGRAMS = 500 * FUZZ
CHUNK = 50
START = int(os.environ.get("ATTNLANG_SEED", "0"))
COMPILED = 100 * FUZZ
"""Programs that also run as a user's would on this machine, through unoptimised kernels."""


def outside_masks(program):
    """Captured tensors that something else than a mask reads: those a gradient can be asked for."""
    blind = without_masks(program)
    return {n.tensor for stage in blind.stages for n in postorder(*stage.roots()) if isinstance(n, Load)} | {
        o.source for stage in program.stages if isinstance(stage, Attend) for o in stage.operands()
    }


def without_masks(program):
    """The program without its masks."""

    def bare(stage):
        if not isinstance(stage, Attend):
            return stage
        return replace(stage, branches=tuple(replace(branch, mask=TRUE) for branch in stage.branches))

    return replace(program, stages=tuple(map(bare, program.stages)))


def leaves(seed, dtype=torch.float64):
    operands, captured = arguments(seed, dtype)
    read = outside_masks(random_program(seed))
    wanted = [t.requires_grad_() for t in operands]
    wanted += [t.requires_grad_() for n, t in captured.items() if t.is_floating_point() and n in read]
    return operands, captured, wanted


def results(run, program, operands, captured):
    lse = {"return_lse": True} if "lse" in program.results else {}
    got = run(*operands, **captured, return_aux=True, **lse)
    if isinstance(got, dict):
        return got
    return {"o": got[0]} | got[-1]


def gradients(made, wanted, cotangents):
    smooth = [n for n, t in made.items() if t.requires_grad]
    if not smooth:
        return [torch.zeros_like(t) for t in wanted]
    found = torch.autograd.grad([made[n] for n in smooth], wanted, [cotangents[n] for n in smooth], allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]


def same(got, want, what, **tolerance):
    torch.testing.assert_close(got, want, **tolerance, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("chunk", range(PROGRAMS // CHUNK))
def test_blockwise_executor(chunk, monkeypatch):
    monkeypatch.setattr(regions, "TILE", (4, 4))
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        program = verify(random_program(seed))
        operands, captured, wanted = leaves(seed)
        want = results(lambda *a, _p=program, **c: al.reference(_p, *a, **c), program, operands, captured)
        got = results(al.compile(program, backend="eager"), program, operands, captured)
        generator = torch.Generator().manual_seed(seed)
        cotangents = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in want.items()}
        for name, value in want.items():
            torch.testing.assert_close(
                got[name], value, rtol=1e-8, atol=1e-9, msg=lambda m, s=seed, n=name: f"{s} {n} {m}"
            )
        for a, c in zip(gradients(got, wanted, cotangents), gradients(want, wanted, cotangents), strict=True):
            torch.testing.assert_close(a, c, rtol=1e-7, atol=1e-8, msg=lambda m, s=seed: f"{s} {m}")


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("first", range(START, START + COMPILED, 25))
def test_what_a_call_runs_here(first):
    """Rewritten stages, kernels in both directions and what is left to the blockwise executor, in float32."""
    for seed in range(first, first + 25):
        program = verify(random_program(seed))
        operands, captured, wanted = leaves(seed)
        want = results(lambda *a, _p=program, **c: al.reference(_p, *a, **c), program, operands, captured)
        generator = torch.Generator().manual_seed(seed)
        cotangents = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in want.items()}
        exact = gradients(want, wanted, cotangents)
        operands, captured, wanted = leaves(seed, torch.float32)
        got = results(al.compile(program), program, operands, captured)
        for name, value in want.items():
            if value.dtype is not torch.int64:  # which of two nearly equal values is larger is not compared
                same(got[name].double(), value, f"{seed} {name}", rtol=1e-3, atol=1e-3)
        found = gradients(got, wanted, {n: t.float() for n, t in cotangents.items()})
        for number, (a, c) in enumerate(zip(found, exact, strict=True)):
            size = max(1.0, float(c.abs().max()) if c.numel() else 0.0)
            same(a.double(), c, f"{seed} gradient {number}", rtol=0, atol=2e-3 * size)
