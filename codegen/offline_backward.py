"""Compile the kernels of gradients and of sums over queries for a GPU that is not here (see :mod:`.offline`)."""

from __future__ import annotations

from typing import Any

from attnlang.passes.streaming import streaming

from .offline import POINTERS, Compiler, Job, Resources, first_that_fits
from .plan import KernelPlan
from .triton_backward_arguments import KEYS, BackwardArguments, kernel_name
from .triton_backward_tiles import candidates
from .triton_columns import KERNEL_NAME, column_arguments, column_outputs, emit_columns
from .triton_common import Config
from .triton_pull import arguments_of, emit_backward

__all__ = ["compile_backward", "compile_columns", "signature"]


def signature(names: BackwardArguments) -> dict[str, Any]:
    """Return types and divisibility of a kernel's parameters for contiguous tensors of ordinary shapes."""
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
    title, types = f"{plan.program.name} backward over {kernel}", signature(arguments_of(plan, kernel))

    def job(config: Config) -> Job:
        return Job(title, emit_backward(plan, config, kernel), kernel_name(kernel), config, types)

    return first_that_fits(title, candidates(plan, kernel, target), job, target, compiler)


def compile_columns(plan: KernelPlan, target: str, compiler: Compiler) -> Resources:
    """Compile the kernel of the sums over queries of a plan for them, as :func:`compile_backward` does."""
    title, outs = f"{plan.program.name} over queries", column_outputs(streaming(plan.program.attend))
    types = signature(column_arguments(plan, outs))

    def job(config: Config) -> Job:
        return Job(title, emit_columns(plan, config, outs), KERNEL_NAME, config, types)

    return first_that_fits(title, candidates(plan, KEYS, target), job, target, compiler)
