"""Compile the backward kernels of a plan for a GPU that is not here (see :mod:`attnlang.codegen.offline`)."""

from __future__ import annotations

from typing import Any

from .offline import POINTERS, Compiler, Job, Resources, first_that_fits
from .plan import KernelPlan
from .triton_backward_arguments import kernel_name
from .triton_backward_tiles import candidates
from .triton_common import Config
from .triton_pull import arguments_of, emit_backward

__all__ = ["compile_backward", "signature"]


def signature(plan: KernelPlan, kernel: str) -> dict[str, Any]:
    """Return types and divisibility of a backward kernel's parameters for contiguous tensors of ordinary shapes."""
    names = arguments_of(plan, kernel)
    types: dict[str, str] = {}
    divisible: list[str] = []
    for name in names.kernel:
        kind = names.types.get(name)
        if name in names.last:
            types[name] = "constexpr"
        elif kind is None or kind == "float":
            types[name] = "i32" if kind is None else "fp32"
        else:
            types[name] = POINTERS[kind]
        if types[name].startswith("*") or (types[name] == "i32" and "stride" in name and name not in names.loose):
            divisible.append(name)
    return {"types": types, "constants": dict.fromkeys(sorted(names.last), 1), "divisible": divisible}


def compile_backward(plan: KernelPlan, kernel: str, target: str, compiler: Compiler) -> Resources:
    """Compile the ``queries`` or the ``keys`` kernel for ``target``, at the tile a launch on such a chip settles on.

    Raises:
        CompilerFailed: a tile does not compile, or none fits the shared memory of the target.
    """
    title, types = f"{plan.program.name} backward over {kernel}", signature(plan, kernel)

    def job(config: Config) -> Job:
        return Job(title, emit_backward(plan, config, kernel), kernel_name(kernel), config, types)

    return first_that_fits(title, candidates(plan, kernel, target), job, target, compiler)
