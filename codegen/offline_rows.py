"""Compile the kernels of rows stages for a GPU that is not here (see :mod:`.offline`)."""

from __future__ import annotations

from typing import Any

from .offline import POINTERS, Compiler, Job, Resources, first_that_fits
from .rows import RowsPlan
from .triton_common import Config
from .triton_rows import KERNEL_NAME, arguments, candidates, emit

__all__ = ["compile_rows", "signature"]


def signature(plan: RowsPlan) -> dict[str, Any]:
    """Return types and divisibility of the kernel's parameters for contiguous tensors of ordinary shapes."""
    names = arguments(plan)
    types = dict.fromkeys(names.kernel, "i32") | dict.fromkeys(names.float_scalars, "fp32")
    types |= {"o_ptr": POINTERS[plan.storage]} | {names.pointers[t.name]: POINTERS[t.dtype] for t in plan.tensors}
    types |= dict.fromkeys(names.last_strides, "constexpr")
    strides = {n for n, kind in types.items() if "_stride" in n and kind == "i32"}
    divisible = [n for n, kind in types.items() if kind.startswith("*") or n in strides]
    return {"types": types, "constants": dict.fromkeys(names.last_strides, 1), "divisible": divisible}


def compile_rows(plan: RowsPlan, features: int, target: str, compiler: Compiler) -> Resources:
    """Compile the kernel that makes rows of ``features`` elements, at the tile a launch on such a chip settles on.

    Raises:
        CompilerFailed: a tile does not compile, or none fits the shared memory of the target.
    """
    title, types = f"the rows {plan.stage.name}", signature(plan)

    def job(config: Config) -> Job:
        return Job(title, emit(plan, config, features=features), KERNEL_NAME, config, types)

    return first_that_fits(title, candidates(features), job, target, compiler)
