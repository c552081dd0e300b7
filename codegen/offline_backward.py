"""Compile the backward kernels of a plan for a GPU that is not here (see :mod:`attnlang.codegen.offline`)."""

from __future__ import annotations

from typing import Any

from .offline import POINTERS, Compiler, CompilerFailed, Resources, _source_file
from .plan import KernelPlan
from .triton import Config
from .triton_backward import QUERIES, backward_arguments, emit_keys, emit_queries, kernel_name
from .triton_backward_tiles import candidates
from .triton_tiles import settle, shared_limit

__all__ = ["compile_backward", "signature"]

_ALIAS = "\n\nattention_forward = {}  # the name the compiling process looks for\n"


def signature(plan: KernelPlan, kernel: str) -> dict[str, Any]:
    """Return types and divisibility of a backward kernel's parameters for contiguous tensors of ordinary shapes."""
    names = backward_arguments(plan, kernel)
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
        CompilerFailed: no tile compiles, or none fits the shared memory of the target.
    """
    made: dict[Config, Resources] = {}

    def spills(config: Config) -> int | None:
        made[config] = _compile(plan, kernel, target, compiler, config)
        return made[config].spill_bytes if made[config].shared_bytes <= shared_limit(target) else None

    config = settle(candidates(plan, kernel, target), spills)
    if config is None:
        raise CompilerFailed(f"no tile of {plan.program.name} backward fits the shared memory of {target}")
    return made[config]


def _compile(plan: KernelPlan, kernel: str, target: str, compiler: Compiler, config: Config) -> Resources:
    source = (emit_queries if kernel == QUERIES else emit_keys)(plan, config)
    with _source_file(source + _ALIAS.format(kernel_name(kernel))) as path:
        job = {"path": str(path), "target": target, "warps": config.warps, "stages": config.stages}
        answer = compiler._ask(job | signature(plan, kernel))
    if "error" in answer:
        raise CompilerFailed(
            f"{plan.program.name} backward over {kernel} for {target} at {config.key}: {answer['error']}"
        )
    return Resources(target=target, config=config.key, **answer)
