"""Rows stages on kernels: one pass over memory where PyTorch makes a tensor for each operation.

Gradients are rows, too (``row_backward``); those that are not, and gradients of gradients, are PyTorch's own of the
same stage.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnlang.ir import (
    FLOAT,
    Const,
    Environment,
    Expr,
    Index,
    Input,
    Load,
    Map,
    Op,
    Param,
    Program,
    Size,
    TensorParam,
    evaluate,
    postorder,
    substitute,
)
from attnlang.ir.rowstages import index_grid, run_rows
from attnlang.ir.stages import Stage
from attnlang.passes.levels import axes_of

from .call import Call, never
from .compiled import DEVICES, rows_of
from .errors import Unavailable
from .row_backward import GRADIENT, gradient_of
from .transforms import Kind, innermost, without_kernels

__all__ = [
    "as_rows",
    "declaring",
    "for_kernels",
    "load_axes",
    "make_rows",
    "read_by",
    "rows_call",
    "sizes_of",
    "tabulated",
]

Tensor = torch.Tensor

DEAR = {"sin", "cos", "tan", "atan", "erf", "pow", "expm1", "log1p"}
"""Operators that cost a kernel more than a load."""


def make_rows(stage: Map, env: Environment, call: Call, backend: str | None = None) -> Tensor:
    """Return the rows of ``stage`` [B, H, L, D] in the dtype that ``env`` computes in, differentiable.

    ``backend`` is the one to use in place of that of the device.
    """
    backend = backend or DEVICES.get(call.q.device.type)
    tensors = read_by(stage, env)
    if env.float_dtype is not torch.float32 or innermost() is not Kind.NONE or without_kernels(tensors.values()):
        return run_rows(stage, env)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    try:
        if recorded:
            made: Tensor = _Rows.apply(_Work(stage, env, call, backend, tuple(tensors)), *tensors.values())
            return made
        return _by_kernel(_Work(stage, env, call, backend), tensors)
    except Unavailable:
        return run_rows(stage, env)


@dataclass(frozen=True)
class _Work:
    stage: Map
    env: Environment
    call: Call
    backend: str | None
    names: tuple[str, ...] = ()


class _Rows(torch.autograd.Function):
    """The kernel, and as its derivative kernels or that of the stage in PyTorch, on tensors of its own: some of those
    given may be made of each other, and the gradient of each is that of its own part."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> Tensor:
        ctx.work = replace(work, env=replace(work.env, tensors={}, operands={}))  # what else there is may go
        ctx.save_for_backward(*tensors)
        return _by_kernel(work, dict(zip(work.names, tensors, strict=True)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        wanted = ctx.needs_input_grad[1:]
        if not again and (made := _gradients(ctx.work, ctx.saved_tensors, grads[0], wanted)) is not None:
            return None, *made
        with torch.enable_grad():
            tensors = [
                t if not want else t.view_as(t) if again else t.detach().requires_grad_()
                for t, want in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            env = replace(ctx.work.env, tensors=dict(zip(ctx.work.names, tensors, strict=True)), operands={})
            rows = run_rows(ctx.work.stage, env)
            inputs = [t for t, want in zip(tensors, wanted, strict=True) if want]
            found = iter(torch.autograd.grad(rows, inputs, grads[0], create_graph=again, allow_unused=True))
        return None, *(next(found) if want else None for want in wanted)


def _gradients(
    work: _Work, tensors: tuple[Tensor, ...], grad: Tensor, wanted: Iterable[bool]
) -> list[Tensor | None] | None:
    """Gradients of ``tensors`` by kernels, None where these cannot make all that are ``wanted``."""
    given = dict(zip(work.names, tensors, strict=True))
    env = replace(work.env, tensors=given, operands={})
    extents = tuple(grad.shape)
    found: list[Tensor | None] = []
    try:
        for (name, t), want in zip(given.items(), wanted, strict=True):
            made = gradient_of(work.stage, name, env, extents) if want else None
            if want and made is None:
                return None
            if made is None:
                found.append(None)
                continue
            here = replace(env, tensors={**given, **made.tables, GRADIENT: grad})
            rows = _by_kernel(replace(work, stage=made.stage, env=here), read_by(made.stage, here))
            found.append(made.summed(rows, t.shape).to(t.dtype))
    except Unavailable:
        return None
    return found


def _by_kernel(work: _Work, tensors: dict[str, Tensor]) -> Tensor:
    extents = tuple(int(evaluate(e, work.env)) for e in work.stage.extents)
    if 0 in extents or len(extents) != 4:
        raise Unavailable("there are no rows")
    return rows_of(work.backend)(rows_call(work.call, work.stage, work.env, tensors), extents)


def rows_call(call: Call, stage: Map, env: Environment, tensors: Mapping[str, Tensor]) -> Call:
    """Return ``stage`` as a program of its own, of the ``tensors`` it reads.

    Raises:
        Unavailable: the stage reads a parameter that is a tensor, or a tensor has the name of a table.
    """
    stage, tensors = for_kernels(stage, env, tensors)
    program = declaring(call.program, (stage,), tuple((name, t.dim()) for name, t in tensors.items()))
    return replace(call, program=program, tensors=tensors, sizes=env.sizes, closed=never)


def for_kernels(stage: Map, env: Environment, tensors: Mapping[str, Tensor]) -> tuple[Map, dict[str, Tensor]]:
    """Return ``stage`` as kernels make it, and those of ``tensors`` it reads then, with tables of what is dear.

    Raises:
        Unavailable: the stage reads a parameter that is a tensor, or a tensor has the name of a table.
    """
    if any(isinstance(env.params.get(name), Tensor) for name in _params(stage)):
        raise Unavailable("a parameter is a tensor")
    changed, tables = tabulated(stage)
    if any(name in env.tensors for name, _ in tables):
        raise Unavailable("a tensor has the name of a table")
    found = {**tensors, **{name: _table(expr, stage, env) for name, expr in tables}}
    return changed, {name: found[name] for name in _read(changed)}


@functools.lru_cache(maxsize=256)
def _read(stage: Map) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n.tensor for n in postorder(*stage.roots()) if isinstance(n, Load)))


def read_by(stage: Map, env: Environment) -> dict[str, Tensor]:
    """Return the tensors that ``stage`` reads, by name."""
    return {name: env.tensor(name) for name in _read(stage)}


@functools.lru_cache(maxsize=256)
def _params(stage: Map) -> tuple[str, ...]:
    return tuple(n.name for n in postorder(*stage.roots()) if isinstance(n, Param))


@functools.lru_cache(maxsize=256)
def sizes_of(stage: Map) -> frozenset[str]:
    """Names of the sizes that expressions of ``stage`` read."""
    return frozenset(n.name for n in postorder(*stage.roots()) if isinstance(n, Size))


@functools.lru_cache(maxsize=256)
def tabulated(stage: Map) -> tuple[Map, tuple[tuple[str, Expr], ...]]:
    """``stage`` with loads in place of what is dear and the same for all batch elements and heads, and what that is."""
    roots = (*(e for _, _, e in stage.lets), stage.value)
    axes = axes_of(*roots)
    dear: set[Expr] = set()
    for node in postorder(*roots):
        if (isinstance(node, Op) and node.op in DEAR and not _square(node)) or any(a in dear for a in node.args):
            dear.add(node)
    lets = {name for name, _, _ in stage.lets}
    free = {
        n
        for n in dear
        if "d" in axes[n]
        and not axes[n] - {"q", "d"}
        and n.type is FLOAT
        and not any(isinstance(x, Input) and x.name in lets for x in postorder(n))
    }
    largest = dict.fromkeys(n for n in roots if n in free)
    largest |= dict.fromkeys(a for n in postorder(*roots) if n not in free for a in n.args if a in free)
    found: dict[Expr, Expr] = {
        node: Load(f"{stage.name}_table{i}", tuple(Index(a) for a in "qd" if a in axes[node]), FLOAT)
        for i, node in enumerate(largest)
    }
    if not found:
        return stage, ()
    *sums, value = (substitute(root, found) for root in roots)
    given = tuple((name, monoid, e) for (name, monoid, _), e in zip(stage.lets, sums, strict=True))
    tables = tuple((f"{stage.name}_table{i}", node) for i, node in enumerate(largest))
    return replace(stage, lets=given, value=value), tables


def _square(node: Op) -> bool:
    return node.op == "pow" and isinstance(node.args[1], Const) and node.args[1].value == 2.0


def load_axes(expr: Expr) -> str:
    """Axes of the table of ``expr``."""
    return "".join(a for a in "qd" if a in axes_of(expr)[expr])


def _table(expr: Expr, stage: Map, env: Environment) -> Tensor:
    axes = load_axes(expr)
    extents = tuple(int(evaluate(stage.extents["bhqd".index(a)], env)) for a in axes)
    with torch.no_grad():
        return evaluate(expr, index_grid(extents, axes, env)).to(env.float_dtype).expand(extents).contiguous()


def as_rows(program: Program, stage: Map, ranks: Mapping[str, int]) -> Program:
    """Return ``stage`` as a program of its own; ``ranks`` are dimensions of what it reads."""
    changed, tables = tabulated(stage)
    known = {**ranks, **{name: len(load_axes(e)) for name, e in tables}}
    return declaring(program, (changed,), tuple((name, known[name]) for name in _read(changed)))


@functools.lru_cache(maxsize=256)
def declaring(program: Program, stages: tuple[Stage, ...], ranks: tuple[tuple[str, int], ...]) -> Program:
    """Return ``program`` with other ``stages`` and those tensors declared that rows stages among them read, of ranks.

    The same object for the same stages, since kernels are remembered by program.
    """
    maps = [s for s in stages if isinstance(s, Map)]
    loads = {n.tensor: n.type for s in maps for n in postorder(*s.roots()) if isinstance(n, Load)}
    kept = program.tensors if len(maps) < len(stages) else ()
    known = {t.name for t in kept}
    more = tuple(
        TensorParam(name, loads[name], tuple(Size(f"{name}_{d}") for d in range(rank)))
        for name, rank in ranks
        if name not in known
    )
    return replace(program, name=stages[-1].name, stages=stages, tensors=(*kept, *more), returns=())
