"""Programs beyond one softmax stage: the stage graph runs in order, each stage on the executor that can run it.

An Attend stage that is softmax attention in disguise (other operands, other names) becomes a call of its own, so that
compiled kernels serve it; any other goes to the blockwise executor. Rows made point by point have kernels, too, and a
kernel of attention takes them in where it can (``fused``); pools and selections are PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch

from attnlang.ir import (
    DEFAULT_OUTPUTS,
    Attend,
    Branch,
    Dot,
    Environment,
    Map,
    Program,
)
from attnlang.ir.build import any_of
from attnlang.ir.rowstages import run_rows
from attnlang.passes.buckets import FIRST, in_buckets
from attnlang.passes.fusion import Fusion, fusions
from attnlang.passes.positions import at_slots
from attnlang.passes.terms import alone

from . import buckets, regions
from .alone import as_program, softmax_roles
from .call import Call
from .compiled import DEVICES, has_gradient, has_kernel, kernel_of, outputs_of
from .eager import compute_dtype
from .errors import Unavailable
from .fused import fused, maps_of, taking_in
from .lowering import apart, lowered, recorded
from .roots import has_roots, probe, without_roots
from .rows import make_rows
from .runs import Runs, run_maps
from .transforms import Kind, innermost, without_kernels

__all__ = ["run"]

NARROW = 16
"""Keys in a tile of a stage that was taken apart: branches often share the keys out among them, at any number."""

SPARSE = 90.0
"""Per cent of pairs in empty tiles from which on the blockwise executor is the faster way to further score terms."""

Tensor = torch.Tensor
Attention: TypeAlias = Callable[[Call], tuple[Tensor, Tensor]]
Rows: TypeAlias = Callable[[Map, Environment], Tensor]
Attends: TypeAlias = Callable[[Attend, Environment, Fusion], dict[str, Tensor]]
ALONE = Fusion()


def run(call: Call, attention: Attention, backend: str | None = None) -> dict[str, Tensor]:
    """Return every result of the program by name.

    ``attention`` runs a call that is one plain softmax stage and returns (o, lse). An output that
    sums rows has the dtype of q, other float outputs that of the compute dtype.

    Raises:
        Unavailable: ``backend`` was named and has no kernel for a stage.
    """
    program = call.program
    dtype = compute_dtype(call.q.dtype)
    operands = {"q": call.q, "k": call.k, "v": call.v}
    env = Environment({}, call.sizes, call.params, call.tensors, {}, dtype, call.q.device, operands)

    compiled = call.q.dtype is not torch.float64 and (backend is not None or call.q.device.type in DEVICES)

    def attend(stage: Attend, here: Environment, fusion: Fusion = ALONE) -> dict[str, Tensor]:
        if backend == "eager":
            return one(call, stage, here)
        stage = at_slots(stage)
        before = fusion.before
        if before is not None:
            parts = apart(stage)
            with_rows = on_the_way(call, stage, here, fusion, 0) if len(parts) == 1 and served(stage) else None
            if with_rows is not None:
                return with_rows
            here = replace(here, tensors={**here.tensors, before.name: rows(before, here)})
        if has_roots(stage, here) and compiled and has_kernel(probe(alone(stage)[0])):
            stage, roots = without_roots(stage, here, attend)
            here = replace(here, tensors={**here.tensors, **roots})
        with_one, scaled = alone(stage)
        own = call if scaled else replace(call, scale=1.0)

        def pays(alone: Attend) -> bool:
            """Whether kernels run a stage of one term, and it sees enough of all pairs."""
            if without_kernels((*here.operands.values(), *here.tensors.values())) or not all(map(served, apart(alone))):
                return False
            return backend is not None or _runs_of(own, with_one, here)[2](buckets.TILE).sparsity() < SPARSE

        found = lowered(with_one, here, own.scale, pays)
        inner = replace(here, tensors={**here.tensors, **found.tensors})
        key_tile = NARROW if len(found.parts) > 1 else 0
        ways = {part: way(own, part, inner, key_tile) for part in found.parts}
        if None in ways.values():
            return one(call, stage, here)
        last = taking_in(fusion, found.parts, found.after)
        made: dict[str, Tensor] = {}
        for part, run in ways.items():
            if run is not None and part is not last:
                made |= run()
        if last is not None and (run := ways[last]) is not None:
            known = replace(inner, tensors={**inner.tensors, **made})
            with_rows = on_the_way(own, last, known, replace(fusion, before=None), key_tile) if served(last) else None
            made |= run() if with_rows is None else with_rows
        return made | {name: change(made[name].to(dtype)) for name, change in found.after.items()}

    def on_the_way(
        own: Call, part: Attend, here: Environment, fusion: Fusion, key_tile: int
    ) -> dict[str, Tensor] | None:
        """What ``part`` makes in a kernel that takes rows stages in, None where there is none."""
        after = fusion.after if call.q.dtype is torch.float32 or fusion.last else None
        maps = maps_of(part, replace(fusion, after=after))
        if maps is None:
            return None
        program, sizes, runs = _runs_of(own, part, here)
        alone = replace(own, program=program, sizes=sizes, tensors=here.tensors, runs=runs, key_tile=key_tile)
        try:
            outputs = outputs_of(backend or DEVICES[call.q.device.type])
            return fused(alone, part, here, maps, outputs)
        except Unavailable:
            return None

    def rows(stage: Map, here: Environment) -> Tensor:
        return make_rows(stage, here, call, backend) if compiled and backend != "eager" else run_rows(stage, here)

    def served(stage: Attend) -> bool:
        return softmax_roles(stage) is not None or (compiled and has_kernel(stage))

    def way(own: Call, part: Attend, here: Environment, key_tile: int) -> Callable[[], dict[str, Tensor]] | None:
        """How kernels run a part of a stage, None where they do not."""
        if served(part):
            return lambda: one(own, part, here, key_tile)
        if without_kernels((*here.operands.values(), *here.tensors.values())):
            return None
        apart = in_buckets(part)
        if apart is None or not all(map(served, apart.stages)):
            return None
        if backend is None and recorded(here) and not all(map(_differentiable, apart.smooth)):
            return None  # gradients that the blockwise executor makes are better made in one pass
        if not buckets.fits(apart, part, own, here, lambda *given: _runs_of(*given)[2](buckets.TILE)):
            return None
        return lambda: buckets.run(apart, part, own, here, one)

    def one(own: Call, stage: Attend, here: Environment, key_tile: int = 0) -> dict[str, Tensor]:
        roles = softmax_roles(stage)
        if roles is not None:
            return _plain(own, stage, here, roles, attention, key_tile)
        return _general(own, stage, here, backend)

    with torch.autocast(call.q.device.type, enabled=False):
        made = _run(program, env, attend, rows, compiled and backend != "eager" and _takes_in(env))
    return {name: _cast(program, name, made[name], call.q.dtype) for name in program.results}


def _takes_in(env: Environment) -> bool:
    """Whether kernels may take in other stages: nobody asks for gradients, and tensors have memory."""
    tensors = (*env.operands.values(), *env.tensors.values())
    return not recorded(env) and innermost() is Kind.NONE and not without_kernels(tensors)


def _run(program: Program, env: Environment, attend: Attends, rows: Rows, takes_in: bool) -> dict[str, Tensor]:
    """Run the stages in order and return everything they make, by name, but for rows that nobody else reads."""
    found = fusions(program) if takes_in else {}
    waiting = {f.before.name for f in found.values() if f.before is not None}
    made: dict[str, Tensor] = {}
    for stage in program.stages:
        here = replace(env, tensors={**env.tensors, **made})
        if isinstance(stage, Attend):
            made |= attend(stage, here, found.get(stage.name, ALONE))
        elif not isinstance(stage, Map):
            made[stage.name] = run_rows(stage, here)
        elif stage.name not in made and stage.name not in waiting:
            made[stage.name] = rows(stage, here)
    return made


def _differentiable(stage: Attend) -> bool:
    return softmax_roles(stage) is not None or has_gradient(stage)


def _cast(program: Program, name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows have the dtype of q; statistics keep the dtype they were computed in."""
    for stage in program.stages:
        if isinstance(stage, Attend):
            for out in stage.outputs:
                if out.name == name:
                    return t.to(dtype) if out.rows is not None else t
    return t.to(dtype) if t.is_floating_point() else t


def _plain(
    call: Call,
    stage: Attend,
    here: Environment,
    roles: tuple[str, str, str, str, str | None],
    attention: Attention,
    key_tile: int,
) -> dict[str, Tensor]:
    query, key, value, out, lse = roles
    alone, sizes = as_program(call.program, stage, here)
    q, k, v = (here.rows(name).to(call.q.dtype) for name in (query, key, value))
    sizes |= {"Hkv": k.shape[1]}
    runs = run_maps.provider(alone, sizes, call.params, here.tensors)
    o, total = attention(Call(alone, q, k, v, sizes, call.params, here.tensors, call.scale, runs, key_tile))
    return {out: o} | ({lse: total} if lse is not None else {})


def _runs_of(call: Call, stage: Attend, here: Environment) -> tuple[Program, dict[str, int], Runs]:
    """A stage as a program of its own, its sizes, and the run maps of what any branch sees."""
    alone, sizes = as_program(call.program, stage, here)
    inner = at_slots(alone.attend)  # the map counts slots
    mask = any_of(*(branch.mask for branch in inner.branches))
    union = replace(inner, branches=(Branch(mask),), outputs=DEFAULT_OUTPUTS, terms=(Dot(),))
    seen = replace(alone, stages=(union,))
    warns = FIRST.name not in call.params  # that a bucket is empty is no mistake
    return alone, sizes, run_maps.provider(seen, sizes, call.params, here.tensors, warns)


def _general(call: Call, stage: Attend, here: Environment, backend: str | None) -> dict[str, Tensor]:
    alone, sizes, runs = _runs_of(call, stage, here)
    inner = alone.attend
    masks = {branch.mask for branch in inner.branches}
    env = replace(here, sizes=sizes)
    work = regions.Work(inner, env, call.scale, runs, exact=len(masks) == 1)
    if backend != "eager":
        try:
            kernel = kernel_of(replace(call, runs=runs), alone, work, backend)
            work = replace(work, kernel=kernel)
        except Unavailable as error:
            if backend is not None:
                raise Unavailable(f"{error.reason}; backend='eager' runs {call.program.name}") from error
    return regions.attend(work)
