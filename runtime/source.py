"""Generated source of a program for a named target, without a device of that kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attnlang.ir import BOOL, INT, Attend, Environment, Map, Program, Type, UsageError, evaluate

from .bind import suggest

if TYPE_CHECKING:
    from attnlang.codegen.isa import Isa
    from attnlang.codegen.plan import KernelPlan

__all__ = ["DTYPES", "TARGETS", "check_target", "is_one_kernel", "isa_for", "plan_for", "source", "sources"]

TARGETS = ("cpu", "cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
"""Targets that are tested; ``cpu:<instruction set>`` and other chips of the same kinds are accepted, too."""

DTYPES = ("float32", "float16", "bfloat16")
MAX_DIM = 512
_GPU = re.compile(r"cuda:\d{2,3}\Z|hip:gfx[0-9a-f]{3,4}\Z")
_STORAGE: dict[Type, str] = {BOOL: "bool", INT: "int64"}


def check_target(target: str) -> str:
    """Return ``target``.

    Raises:
        UsageError: not the name of a target.
    """
    from attnlang.codegen.isa import ISAS

    if isinstance(target, str) and (target == "cpu" or target.removeprefix("cpu:") in ISAS or _GPU.match(target)):
        return target
    raise UsageError(f"unknown target {target!r}{suggest(str(target), (*TARGETS, *(f'cpu:{name}' for name in ISAS)))}")


def plan_for(
    program: Program,
    target: str,
    head_dim: int,
    value_dim: int,
    dtype: str,
    storage: Mapping[str, str] | None = None,
) -> KernelPlan:
    """Return the plan of the forward kernel of a specialised program; it computes its run bounds where it can.

    ``storage`` gives dtype names of captured tensors; int64, float32 and bool where it is silent.

    Raises:
        UsageError: unknown target or dtype, a head dimension outside 1 to 512, or a program that is not one kernel.
    """
    _check_one_kernel(program)
    return _plan(program, target, head_dim, value_dim, dtype, storage)


def _plan(
    program: Program,
    target: str,
    head_dim: int,
    value_dim: int,
    dtype: str,
    storage: Mapping[str, str] | None,
) -> KernelPlan:
    """The plan of one stage of attention and the rows stages that its kernel takes in."""
    from attnlang.codegen.plan import make_plan

    check_target(target)
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}{suggest(str(dtype), DTYPES)}")
    for name, dim in (("head_dim", head_dim), ("value_dim", value_dim)):
        if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= MAX_DIM:
            raise UsageError(f"{name} must be an int from 1 to {MAX_DIM}, got {dim!r}")
    held = _held(program, dtype, storage)
    return make_plan(
        program,
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim,
        storage=held,
        closed=("k",) if _exact(program) else (),
    )


def _held(program: Program, dtype: str, storage: Mapping[str, str] | None) -> dict[str, str]:
    """dtype names of what a program reads; operands that rows stages read have that of the call."""
    types = {**dict.fromkeys(("q", "k", "v"), dtype), **(storage or {})}
    return {t.name: types.get(t.name, _STORAGE.get(t.type, "float32")) for t in program.tensors}


def is_one_kernel(program: Program) -> bool:
    """Whether :func:`source` has the kernel of a program, and :func:`sources` is not needed."""
    return not _why_several(program)


def _why_several(program: Program) -> str:
    """Why a program is not one kernel, empty if it is."""
    from .compiled import why_none

    if len(program.stages) > 1:
        return f"{program.name} has {len(program.stages)} stages and is not one kernel"
    reason = why_none(program.attend)
    return f"{program.name} is not one kernel: {reason}" if reason else ""


def _check_one_kernel(program: Program) -> None:
    if reason := _why_several(program):
        ways = "call it with al.compile, which makes the kernels of all its parts, or see .sources(target)"
        raise UsageError(f"{reason}; {ways}")


def _exact(program: Program) -> bool:
    """Whether a kernel needs no run table: its text says what numbers it needs to be positive."""
    from attnlang.sparsity import closed_form

    form = closed_form(program)
    return form is not None and form.exact


def isa_for(target: str) -> Isa:
    """Return the instruction set of ``cpu:NAME``, or for ``cpu`` the best one of this processor."""
    from attnlang.codegen.isa import ISAS, best_isa

    from .toolchain import processor_features

    chosen = target.partition(":")[2]
    return ISAS[chosen] if chosen else best_isa(processor_features())


def source(
    program: Program,
    target: str,
    head_dim: int,
    value_dim: int,
    dtype: str,
    storage: Mapping[str, str] | None = None,
) -> str:
    """Return the forward kernel of a specialised program as source.

    Raises:
        UsageError: see :func:`plan_for`.
    """
    return _emitted(plan_for(program, target, head_dim, value_dim, dtype, storage), target)


def _emitted(plan: KernelPlan, target: str) -> str:
    if target.startswith("cpu"):
        from attnlang.codegen.cpp import emit as emit_cpp

        return emit_cpp(plan, isa_for(target))
    from attnlang.codegen.triton_stream import emit_forward as emit_triton
    from attnlang.codegen.triton_tiles import candidates

    return emit_triton(plan, candidates(plan, target)[0])


def sources(
    program: Program,
    target: str,
    head_dim: int,
    value_dim: int,
    dtype: str,
    storage: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the forward kernels of the parts of a specialised program that can be planned without operands, by name.

    Raises:
        UsageError: as :func:`plan_for`, or there is none; the message has the reason for each part.
    """
    from .compiled import why_none
    from .parts import parts_of

    check_target(target)
    parts = parts_of(program)
    attends = {name: any(isinstance(s, Attend) for s in part.stages) for name, part in parts.items()}
    reasons = {name: why_none(part.attend) if attends[name] else "" for name, part in parts.items()}
    if all(reasons.values()):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UsageError(f"no part of {program.name} is a kernel without its operands: {why}")

    def text(part: Program, attends: bool) -> str:
        if attends:
            return _emitted(_plan(part, target, head_dim, value_dim, dtype, storage), target)
        return _rows_source(part, target, _held(part, dtype, storage), {"D": head_dim, "Dv": value_dim})

    return {name: text(part, attends[name]) for name, part in parts.items() if not reasons[name]}


def _rows_source(program: Program, target: str, storage: Mapping[str, str], dims: Mapping[str, int]) -> str:
    from attnlang.codegen.rows import rows_plan

    (stage,) = program.stages
    assert isinstance(stage, Map)
    plan = rows_plan(program, stage, storage)
    if target.startswith("cpu"):
        from attnlang.codegen.cpp_rows import emit as emit_cpp

        return emit_cpp(plan, isa_for(target))
    from attnlang.codegen.triton_rows import MOST_FEATURES, candidates
    from attnlang.codegen.triton_rows import emit as emit_triton

    try:
        features = int(evaluate(stage.extents[3], Environment(sizes=dims)))
    except KeyError:  # other sizes are known in a call
        features = dims["D"]
    features = min(features, MOST_FEATURES)
    return emit_triton(plan, candidates(features)[0], features=features)
