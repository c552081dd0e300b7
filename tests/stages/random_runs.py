"""Random programs on an executor, against the dense reference in float64: every result and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

import attnlang as al
from attnlang.ir import Attend, Load, Program, postorder, verify
from attnlang.ir.build import TRUE
from attnlang.passes.fusion import fusions

from .random_programs import arguments, random_program

Tensor = torch.Tensor


def outside_masks(program: Program) -> set[str]:
    """Tensors that something else than a mask reads: those a gradient can be asked for."""
    blind = without_masks(program)
    return {n.tensor for stage in blind.stages for n in postorder(*stage.roots()) if isinstance(n, Load)} | {
        o.source for stage in program.stages if isinstance(stage, Attend) for o in stage.operands()
    }


def without_masks(program: Program) -> Program:
    """The program without its masks."""

    def bare(stage: Any) -> Any:
        if not isinstance(stage, Attend):
            return stage
        return replace(stage, branches=tuple(replace(branch, mask=TRUE) for branch in stage.branches))

    return replace(program, stages=tuple(map(bare, program.stages)))


def leaves(
    seed: int, program: Program, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Operands, captured tensors, and those of both that gradients are asked for."""
    operands, captured = arguments(seed, dtype)
    read = outside_masks(program)
    wanted = [t.requires_grad_() for t in operands]
    wanted += [t.requires_grad_() for n, t in captured.items() if t.is_floating_point() and n in read]
    return operands, captured, wanted


def results(run: Any, program: Program, operands: list[Tensor], captured: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every result of the program by name."""
    lse = {"return_lse": True} if "lse" in program.results else {}
    got = run(*operands, **captured, return_aux=True, **lse)
    if isinstance(got, dict):
        return got
    return {"o": got[0]} | got[-1]


def gradients(made: dict[str, Tensor], wanted: list[Tensor], cotangents: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of ``wanted``, zero where nothing depends on one."""
    smooth = [n for n, t in made.items() if t.requires_grad]
    if not smooth:
        return [torch.zeros_like(t) for t in wanted]
    found = torch.autograd.grad([made[n] for n in smooth], wanted, [cotangents[n] for n in smooth], allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]


@dataclass(frozen=True)
class Case:
    """A random program with what the reference makes of it in float64."""

    seed: int
    program: Program
    results: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    gradients: list[Tensor]


def case(seed: int) -> Case:
    """Evaluate the reference of a random program, with gradients for random cotangents."""
    program = verify(random_program(seed))
    operands, captured, wanted = leaves(seed, program)
    made = results(lambda *a, **c: al.reference(program, *a, **c), program, operands, captured)
    generator = torch.Generator().manual_seed(seed)
    cotangents = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in made.items()}
    return Case(seed, program, made, cotangents, gradients(made, wanted, cotangents))


def check(this: Case, values: float, grads: float, backend: str | None = None) -> None:
    """Compare a call with the reference: results within ``values``, gradients within ``grads`` of the largest element.

    The eager backend computes in float64. In float32 it is not compared which of two nearly equal values is larger.
    """
    seed, program = this.seed, this.program
    dtype = torch.float64 if backend == "eager" else torch.float32
    operands, captured, wanted = leaves(seed, program, dtype)
    attention = al.compile(program, backend=backend)
    made = results(attention, program, operands, captured)
    found = [made]
    if backend is None and any(f.before or f.after for f in fusions(program).values()):
        with torch.no_grad():  # kernels take rows stages in
            found.append(results(attention, program, operands, captured))
    for name, value in this.results.items():
        if value.dtype is torch.int64 and dtype is not torch.float64:
            continue
        for one in found:
            same(one[name].to(value.dtype), value, f"{seed} {name}", rtol=values, atol=values)
    found = gradients(made, wanted, {n: t.to(dtype) for n, t in this.cotangents.items()})
    for number, (mine, other) in enumerate(zip(found, this.gradients, strict=True)):
        size = max(1.0, float(other.abs().max()) if other.numel() else 0.0)
        same(mine.double(), other, f"{seed} gradient {number}", rtol=0, atol=grads * size)


def same(got: Tensor, want: Tensor, what: str, **tolerance: float) -> None:
    torch.testing.assert_close(got, want, **tolerance, msg=lambda text: f"{what}: {text}")


@dataclass
class Launches:
    """The programs that launched a kernel: forward, backward, of rows, and one that takes rows stages in.

    ``count`` wraps what launches one.
    """

    seed: int = -1
    forward: set[int] = field(default_factory=set)
    backward: set[int] = field(default_factory=set)
    rows: set[int] = field(default_factory=set)
    taken_in: set[int] = field(default_factory=set)

    def count(self, launch: Any) -> Any:
        def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            found = {"backward": self.backward, "rows": self.rows}.get(kernel.plan.direction, self.forward)
            found.add(self.seed)
            if getattr(kernel.plan, "before", None) or getattr(kernel.plan, "after", None):
                self.taken_in.add(self.seed)
            return launch(kernel, *args, **kwargs)

        return counted
