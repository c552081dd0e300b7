"""Programs with results of their own as one registered PyTorch operator, ``attnlang::run``; see :mod:`.op`.

The operator returns every result of the program, in the program's order. Its backward computes the forward pass once
more with autograd recording it, since what kernels save between the passes is not among the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnlang.ir import Attend, Environment, Map, Pool, Select, evaluate, output_shape

from . import layouts
from .eager import compute_dtype
from .op import ARGS, LIBRARY, define, no_gradients, site_of

__all__ = ["run"]

Tensor = torch.Tensor


def _forward(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], *numbers: Any) -> list[Tensor]:
    *rest, handle = numbers
    site = site_of(handle)
    with torch.no_grad():
        made = layouts.run(site.call((q, k, v), captured, *rest), site.layout, site.backend)
    inputs = {t.untyped_storage().data_ptr() for t in (q, k, v, *captured)}
    # a result that is a view of an argument would break the promise that results are new
    return [t.clone() if t.untyped_storage().data_ptr() in inputs else t for t in made.values()]


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    scale: float,
    handle: int,
) -> list[Tensor]:
    site = site_of(handle)
    call = site.call((q, k, v), captured, [int(n) for n in ints], floats, scale)
    sizes = {name: int(n) for name, n in call.sizes.items()}
    dtype = compute_dtype(q.dtype)
    made: dict[str, Tensor] = {}
    for stage in call.program.stages:
        operands = {"q": q, "k": k, "v": v}
        env = Environment({}, sizes, call.params, {**call.tensors, **made}, {}, dtype, q.device, operands)
        if isinstance(stage, Attend):
            for out in stage.outputs:
                shape, kind = output_shape(out, stage, env)
                kind = q.dtype if out.rows is not None else kind
                made[out.name] = q.new_empty(shape, dtype=kind)
        elif isinstance(stage, Map | Select):
            shape = tuple(int(evaluate(e, env)) for e in stage.extents)
            made[stage.name] = q.new_empty(shape, dtype=torch.bool if isinstance(stage, Select) else q.dtype)
        elif isinstance(stage, Pool):
            source = env.rows(stage.source)
            block = max(1, int(evaluate(stage.block, env)))
            stride = block if stage.stride is None else max(1, int(evaluate(stage.stride, env)))
            made[stage.name] = q.new_empty((*source.shape[:2], -(-source.shape[2] // stride), source.shape[3]))
    return [made[name] for name in call.program.results]


def _backward(
    grads: Sequence[Tensor],
    given: Sequence[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    scale: float,
    handle: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    site = site_of(handle)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(need) for t, need in zip((q, k, v, *captured), needs, strict=True)]
        call = site.call((leaves[0], leaves[1], leaves[2]), leaves[3:], ints, floats, scale)
        made = layouts.run(call, site.layout, site.backend).values()
        pairs = [(t, g) for t, g, one in zip(made, grads, given, strict=True) if one and t.requires_grad]
        wanted = [t for t in leaves if t.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            found = torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    known = dict(zip(map(id, wanted), found, strict=True))
    return [
        torch.zeros_like(t) if (g := known.get(id(t))) is None else g.contiguous() if need else q.new_empty(0)
        for t, need in zip(leaves, needs, strict=True)
    ]


def _fake_backward(grads: Any, given: Any, q: Tensor, k: Tensor, v: Tensor, captured: Any, *rest: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (q, k, v, *captured)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, captured, ctx.ints, ctx.floats, ctx.scale, ctx.handle = inputs
    ctx.needs = [t.requires_grad for t in (q, k, v, *captured)]
    ctx.shapes = [(t.shape, t.dtype) for t in output]
    ctx.save_for_backward(q, k, v, *captured)


def _autograd_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    q, k, v, *captured = ctx.saved_tensors
    given = [g is not None for g in grads]
    every = [q.new_zeros(s, dtype=d) if g is None else g for g, (s, d) in zip(grads, ctx.shapes, strict=True)]
    found = torch.ops.attnlang.run_backward(
        every, given, q, k, v, captured, ctx.ints, ctx.floats, ctx.scale, ctx.handle, ctx.needs
    )
    dq, dk, dv, *rest = (g if need else None for g, need in zip(found, ctx.needs, strict=True))
    return dq, dk, dv, rest, *no_gradients(ctx)


define(f"run({ARGS}) -> Tensor[]", _forward, _fake_forward)
define(f"run_backward(Tensor[] grads, bool[] given, {ARGS}, bool[] needs) -> Tensor[]", _backward, _fake_backward)
torch.library.register_autograd("attnlang::run", _autograd_backward, setup_context=_setup_context, lib=LIBRARY)

run = torch.ops.attnlang.run
"""(q, k, v, captured, ints, floats, scale, handle) to the program's results; arguments in the program's order."""
