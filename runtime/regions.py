"""The blockwise executor of any Attend stage: whatever hooks it has, on any device, in memory linear in the lengths.

A block of queries meets all keys that the run map keeps for it at once, so every row statistic is known inside the
block. The forward pass adds up what the blocks contribute; the backward pass recomputes one block at a time with
autograd. It is to the whole language what :mod:`.eager` is to softmax attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from attnlang.ir import (
    COMBINE,
    Attend,
    Environment,
    Output,
    Region,
    attend_region,
    evaluate,
    finish,
    is_map,
    output_shape,
)

from .autograd import differentiable
from .transforms import Kind, innermost, outside, without_kernels

if TYPE_CHECKING:
    from attnlang.sparsity import RunMap

__all__ = ["Work", "attend"]

Tensor = torch.Tensor

TILE = (128, 128)
TALL = (8192, 128)
"""The tile where all keys fit into one: there are no keys to skip, and fewer regions cost less."""
BUDGET = 1 << 22
"""Pairs evaluated at once; one block of rows of one head may exceed it."""


class Kernel(Protocol):
    """What :class:`.compiled.StageKernel` does for the executor."""

    @property
    def saved(self) -> tuple[str, ...]: ...

    def outputs(self, work: Work) -> dict[str, Tensor] | None: ...

    def saving(self, work: Work) -> dict[str, Tensor] | None: ...

    def gradients(
        self,
        work: Work,
        held: Mapping[str, Tensor],
        finals: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        wanted: Iterable[str],
    ) -> dict[str, Tensor] | None: ...


@dataclass(frozen=True)
class Work:
    """One Attend stage with everything bound. ``runs(tile)`` is the run map of pairs that any branch sees;
    ``exact`` says that a full tile of it is full for every branch. ``kernel``, where given, is a faster way to the
    outputs and gradients of the work it is given; it returns None where it cannot."""

    stage: Attend
    env: Environment
    scale: float
    runs: Callable[[tuple[int, int]], RunMap]
    exact: bool
    kernel: Kernel | None = None

    @property
    def lengths(self) -> tuple[int, int]:
        lq, lk = (int(evaluate(e, self.env)) for e in self.stage.lengths)
        return lq, lk

    def with_tensors(self, found: Mapping[str, Tensor]) -> Work:
        """The same work on other values of some tensors."""
        tensors = {n: found.get(f"t.{n}", t) for n, t in self.env.tensors.items()}
        operands = {n: found.get(f"o.{n}", t) for n, t in self.env.operands.items()}
        return replace(self, env=replace(self.env, tensors=tensors, operands=operands))

    def floats(self) -> dict[str, Tensor]:
        """Every tensor a gradient may reach, under a name that tells operands from captured tensors."""
        found = {f"t.{n}": t for n, t in self.env.tensors.items()} | {f"o.{n}": t for n, t in self.env.operands.items()}
        return {n: t for n, t in found.items() if t.is_floating_point()}


def _keys(runs: list[list[int]], width: int, length: int, device: Any) -> Tensor:
    parts = [torch.arange(a * width, min(e * width, length), device=device) for a, e in runs]
    return torch.cat(parts) if parts else torch.arange(0, device=device)


def _regions(work: Work) -> Iterator[Region]:
    sizes, device = work.env.sizes, work.env.device
    lq, lk = work.lengths
    height, width = TALL if lk <= TILE[1] else TILE
    run_map = work.runs((height, width))
    with outside():
        table = run_map.launch_table()
        ptrs = [table.full_ptr.tolist(), table.part_ptr.tolist()]
        lists = [table.full_runs.tolist(), table.part_runs.tolist()]
    blocks = -(-lq // height)
    for mb in range(run_map.batch):
        for mh in range(run_map.heads):
            batch = torch.arange(sizes["B"], device=device) if run_map.batch == 1 else torch.tensor([mb], device=device)
            heads = torch.arange(sizes["H"], device=device) if run_map.heads == 1 else torch.tensor([mh], device=device)
            for block in range(blocks):
                row = (mb * run_map.heads + mh) * blocks + block
                full, part = (
                    _keys(found[ptr[row] : ptr[row + 1]], width, lk, device)
                    for ptr, found in zip(ptrs, lists, strict=True)
                )
                rows = torch.arange(block * height, min((block + 1) * height, lq), device=device)
                pairs = len(rows) * (len(full) + len(part))
                step = max(1, BUDGET // max(1, pairs))
                keys = torch.cat([full, part])
                known = len(full) if work.exact else 0
                for b in batch.split(max(1, step // max(1, len(heads)))):
                    for h in heads.split(max(1, min(step, len(heads)))):
                        yield Region(b, h, rows, keys, known)


def _start(out: Output, work: Work) -> Tensor:
    shape, dtype = output_shape(out, work.stage, work.env)
    fill: float = 0.0
    if out.over == "":
        fill = out.empty
    elif out.monoid in ("max", "min"):
        fill = -math.inf if out.monoid == "max" else math.inf
    return torch.full(shape, -1 if out.monoid == "argmax" else fill, dtype=dtype, device=work.env.device)


def _merge(out: Output, total: Tensor, found: Tensor, region: Region) -> None:
    """Add what a region contributes to the whole output, in place."""
    b, h = region.batch[:, None, None], region.heads[:, None]
    if is_map(out):
        total[b[..., None], h[..., None], region.rows[:, None], region.keys] = found.to(total.dtype)
    elif "q" not in out.over:
        total[b, h, region.rows] = found.to(total.dtype)
    else:
        where = (b, h, region.keys) if out.over == "q" else (b[..., 0], h[:, 0])
        old = total[where]
        total[where] = COMBINE[out.monoid](old, found)


def _cotangent(out: Output, grad: Tensor, region: Region, final: Tensor, found: Tensor) -> Tensor:
    """The part of an output's gradient that belongs to what a region contributed."""
    b, h = region.batch[:, None, None], region.heads[:, None]
    if is_map(out):
        return grad[b[..., None], h[..., None], region.rows[:, None], region.keys]
    if "q" not in out.over:
        return grad[b, h, region.rows]
    where = (b, h, region.keys) if out.over == "q" else (b[..., 0], h[:, 0])
    here = grad[where]
    return here if out.monoid == "sum" else torch.where(found.detach() == final[where], here, 0.0)


def _forward(work: Work) -> dict[str, Tensor]:
    totals = {out.name: _start(out, work) for out in work.stage.outputs}
    for region in _regions(work):
        found = attend_region(work.stage, work.env, region, work.scale)
        for out in work.stage.outputs:
            _merge(out, totals[out.name], found[out.name], region)
    return {out.name: finish(out, totals[out.name]) for out in work.stage.outputs}


def _outputs(work: Work) -> dict[str, Tensor]:
    found = None if work.kernel is None else work.kernel.outputs(work)
    return _forward(work) if found is None else found


def _recorded(work: Work) -> dict[str, Tensor]:
    """The forward pass in one region, recorded by autograd any number of times; memory is that of all pairs."""
    lq, lk = work.lengths
    region = Region.whole(work.env.sizes["B"], work.env.sizes["H"], lq, lk, work.env.device)
    found = attend_region(work.stage, work.env, region, work.scale)
    return {out.name: finish(out, found[out.name]) for out in work.stage.outputs}


def _differentiable(
    work: Work, names: Sequence[str], needs: Mapping[str, bool], tensors: Sequence[Tensor], grads: Mapping[str, Tensor]
) -> list[Tensor | None]:
    """Gradients of ``tensors``, called ``names``, recorded by autograd any number of times."""

    def forward(inputs: Sequence[Tensor]) -> list[Tensor]:
        made = _recorded(work.with_tensors(dict(zip(names, inputs, strict=True))))
        return [made[n] for n in grads]

    return differentiable(forward, tensors, [needs[n] for n in names], list(grads.values()))


def _backward(
    work: Work, needs: Mapping[str, bool], grads: Mapping[str, Tensor], finals: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients of the tensors that need one, block by block."""
    leaves = {n: t.detach() for n, t in work.floats().items() if needs[n]}
    totals = {n: torch.zeros_like(t, dtype=work.env.float_dtype) for n, t in leaves.items()}
    for region in _regions(work):
        with torch.enable_grad():
            inputs = {n: t.detach().to(work.env.float_dtype).requires_grad_() for n, t in leaves.items()}
            found = attend_region(work.stage, work.with_tensors(inputs).env, region, work.scale)
        outputs, cotangents = [], []
        for out in work.stage.outputs:
            if out.name in grads and found[out.name].requires_grad:
                outputs.append(found[out.name])
                cotangents.append(_cotangent(out, grads[out.name], region, finals[out.name], found[out.name]))
        if not outputs:
            continue
        parts = torch.autograd.grad(outputs, list(inputs.values()), cotangents, allow_unused=True)
        for total, part in zip(totals.values(), parts, strict=True):
            if part is not None:
                total += part
    return {n: total.to(leaves[n].dtype) for n, total in totals.items()}


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(work: Work, names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        work = work.with_tensors(dict(zip(names, tensors, strict=True)))
        found = None if work.kernel is None else work.kernel.saving(work)
        return tuple((_outputs(work) if found is None else found).values())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.work, ctx.names, *tensors = inputs
        ctx.count = len(tensors)
        outs = len(ctx.work.stage.outputs)
        ctx.mark_non_differentiable(*output[outs:], *(o for o in output[:outs] if not o.is_floating_point()))
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, finals = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        work: Work = ctx.work.with_tensors(dict(zip(ctx.names, tensors, strict=True)))
        outs = [out.name for out in work.stage.outputs]
        given = {n: g.to(work.env.float_dtype) for n, g in zip(outs, grads, strict=False) if g is not None}
        needs = dict(zip(ctx.names, ctx.needs_input_grad[2:], strict=True))
        if not given:
            return (None,) * (2 + ctx.count)
        if torch.is_grad_enabled():
            return (None, None, *_differentiable(work, ctx.names, needs, tensors, given))
        known = dict(zip(outs, finals, strict=False))
        if work.kernel is not None and len(finals) == len(outs) + len(work.kernel.saved):
            held = dict(zip(work.kernel.saved, finals[len(outs) :], strict=True))
            fast = work.kernel.gradients(work, held, known, given, [n for n in ctx.names if needs[n]])
            if fast is not None:
                named = zip(ctx.names, tensors, strict=True)
                return (None, None, *(_like(fast, n, t) if needs[n] else None for n, t in named))
        if work.kernel is not None and any(o.monoid != "sum" and "q" in o.over for o in work.stage.outputs):
            known = _forward(work)  # which pairs made an extremum is decided by equality
        result = _backward(work, needs, given, known)
        return (None, None, *(result.get(n) for n in ctx.names))


def _like(made: Mapping[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    return made[name].to(tensor.dtype) if name in made else torch.zeros_like(tensor)


def attend(work: Work) -> dict[str, Tensor]:
    """Run a stage; every output by name, float outputs in the float dtype of the environment, differentiable.

    Gradients reach every float tensor the stage reads, and gradients of gradients as well (those with the memory of all
    pairs).
    """
    floats = work.floats()
    with torch.autocast(torch.device(work.env.device).type, enabled=False):
        if without_kernels(floats.values()):
            return _recorded(work)
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in floats.values())
        if not recorded and innermost() is not Kind.GRAD:
            with torch.no_grad():
                return _outputs(work)
        # the record outlives the call: it must not keep the tensors that save_for_backward manages
        none = {n: t.new_empty(0) for n, t in floats.items()}
        made = _Attend.apply(work.with_tensors(none), tuple(floats), *floats.values())
        return dict(zip((out.name for out in work.stage.outputs), made, strict=False))
