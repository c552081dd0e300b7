"""One call of a program as a registered PyTorch operator, so that graph capture sees a single opaque node.

``torch.compile(fullgraph=True)``, export and activation checkpointing work on operators with a fake implementation and
a registered backward; this module gives ``attnlang::attend`` both. Eager calls do not come through here.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map

from attnlang.ir import BOOL, FLOAT, Program, Scalar

from . import layouts
from .bind import Binder, Bound
from .call import Call
from .runs import run_maps

__all__ = ["ARGS", "LIBRARY", "Site", "attend", "define", "no_gradients", "register", "site_of"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Site:
    """What a node of a captured graph refers to by its handle: a program, how to bind it, backend and layout."""

    program: Program
    binder: Binder
    backend: str | None
    layout: layouts.Choice = None
    ints: tuple[str, ...] = field(init=False)
    floats: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        scalars = self.program.scalars
        object.__setattr__(self, "ints", tuple(p.name for p in scalars if p.type is not FLOAT))
        object.__setattr__(self, "floats", tuple(p.name for p in scalars if p.type is FLOAT))

    def call(
        self,
        operands: tuple[Tensor, Tensor, Tensor],
        captured: Sequence[Tensor],
        ints: Sequence[int],
        floats: Sequence[float],
        scale: float,
    ) -> Call:
        given: dict[str, Tensor | Scalar] = {t.name: x for t, x in zip(self.program.tensors, captured, strict=True)}
        kinds = {p.name: p.type for p in self.program.scalars}
        given |= {n: bool(x) if kinds[n] is BOOL else int(x) for n, x in zip(self.ints, ints, strict=True)}
        given |= dict(zip(self.floats, floats, strict=True))
        bound = self.binder.bind(*operands, given, {}, scale)
        return self.bound_call(bound)

    def bound_call(self, bound: Bound) -> Call:
        """The call of bound arguments, with the run maps of the program's mask."""
        runs = run_maps.provider(self.program, bound.sizes, bound.params, bound.tensors)
        return Call(
            self.program,
            bound.q,
            bound.k,
            bound.v,
            bound.sizes,
            bound.params,
            bound.tensors,
            bound.scale,
            runs,
            closed=runs.closed,
        )


_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(site: Site) -> int:
    """Return a handle for ``site``, valid as long as the caller keeps the site."""
    handle = next(_numbers)
    _sites[handle] = site
    return handle


def site_of(handle: int) -> Site:
    """The site that :func:`register` gave ``handle`` for."""
    return _sites[handle]


LIBRARY = torch.library.Library("attnlang", "DEF")
ARGS = "Tensor q, Tensor k, Tensor v, Tensor[] captured, SymInt[] ints, float[] floats, float scale, int handle"
"""What every operator of ours takes of a call."""


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator with what it does, and with what its results look like for graph capture."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnlang::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"attnlang::{name}", _of_elements(name), lib=LIBRARY)


def _of_elements(name: str) -> Callable[..., Any]:
    """What vmap makes of an operator inside of a graph: a node for each element of the batch; see :mod:`.elements`."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        operator = getattr(torch.ops.attnlang, name)
        made = [operator(*_element(args, in_dims, i)) for i in range(info.batch_size)]
        found = _stacked(made) if isinstance(made[0], list) else tuple(map(_stacked, zip(*made, strict=True)))
        return found, tree_map(lambda _: 0, found)

    return rule


def _element(args: Sequence[Any], dims: Sequence[Any], i: int) -> list[Any]:
    """Arguments, and lists of tensors among them, for element ``i`` of a batch."""
    found = []
    for x, dim in zip(args, dims, strict=True):
        if isinstance(dim, (list, tuple)):
            x = _element(x, dim, i)
        found.append(x.select(dim, i) if isinstance(dim, int) else x)
    return found


def _stacked(elements: Sequence[Any]) -> Any:
    if isinstance(elements[0], (list, tuple)):
        return [torch.stack(ts) for ts in zip(*elements, strict=True)]
    return torch.stack(list(elements))


def no_gradients(ctx: Any) -> tuple[Any, ...]:
    """What a backward says of ints, floats, scale and handle, which have no gradients.

    PyTorch takes a list of numbers for one argument, but an empty list for a list of tensors.
    """
    return *(None if numbers else [] for numbers in (ctx.ints, ctx.floats)), None, None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    scale: float,
    handle: int,
) -> tuple[Tensor, Tensor]:
    site = site_of(handle)
    with torch.no_grad():
        o, lse = layouts.attend(site.call((q, k, v), captured, ints, floats, scale), site.layout, site.backend)
    return o, lse


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=statistics)


def _backward(
    do: Tensor,
    dlse: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    scale: float,
    handle: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    site = site_of(handle)
    call = site.call((q, k, v), captured, ints, floats, scale)
    with torch.no_grad():
        every = (True, True, True, *needs)
        dq, dk, dv, *rest = layouts.gradients(call, site.layout, site.backend, every, o, lse, do, dlse)
    assert dq is not None and dk is not None and dv is not None
    missing = q.new_empty(0)
    return dq, _fold(dk, k), _fold(dv, v), [missing if x is None else x for x in rest]


def _fold(grad: Tensor, operand: Tensor) -> Tensor:
    """Sum over the batch where one key batch served all queries."""
    return grad.sum_to_size(operand.shape) if grad.shape != operand.shape else grad


def _fake_backward(
    do: Tensor, dlse: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, captured: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    needs = rest[-1]
    found = [torch.empty_like(t) if need else q.new_empty(0) for t, need in zip(captured, needs, strict=True)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), found


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, captured, ctx.ints, ctx.floats, ctx.scale, ctx.handle = inputs
    ctx.needs = [t.requires_grad for t in captured]
    ctx.save_for_backward(*output, q, k, v, *captured)


def _autograd_backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    o, lse, q, k, v, *captured = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    dq, dk, dv, rest = torch.ops.attnlang.attend_backward(
        do, dlse, o, lse, q, k, v, captured, ctx.ints, ctx.floats, ctx.scale, ctx.handle, ctx.needs
    )
    grads = [g if need else None for g, need in zip(rest, ctx.needs, strict=True)]
    return dq, dk, dv, grads, *no_gradients(ctx)


define(f"attend({ARGS}) -> (Tensor, Tensor)", _forward, _fake_forward)
define(
    f"attend_backward(Tensor do, Tensor dlse, Tensor o, Tensor lse, {ARGS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
    _backward,
    _fake_backward,
)
torch.library.register_autograd("attnlang::attend", _autograd_backward, setup_context=_setup_context, lib=LIBRARY)

attend = torch.ops.attnlang.attend
"""(q, k, v, captured, ints, floats, scale, handle) to (o, lse); arguments are in the order the program declares."""
