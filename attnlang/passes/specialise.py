"""Turn parameters with values known at compile time into constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attnlang.ir import Const, Expr, Param, Program, Scalar, UsageError, substitute

from .simplify import map_program, simplify

__all__ = ["specialise"]


def specialise(program: Program, values: Mapping[str, Scalar]) -> Program:
    """Return ``program`` with the named scalar parameters replaced by ``values`` and simplified.

    Static parameters that are not named take their default.

    Raises:
        UsageError: an unknown parameter, a value of the wrong type, or a static parameter without value.
    """
    chosen: dict[str, Scalar] = {}
    known = {p.name: p for p in program.scalars}
    for name, value in values.items():
        if name not in known:
            choices = ", ".join(known) or "none"
            raise UsageError(f"{program.name} has no scalar parameter {name!r} (it has: {choices})")
        chosen[name] = value
    for param in program.scalars:
        if param.static and param.name not in chosen:
            if param.default is None:
                raise UsageError(f"{program.name} needs a value for static parameter {param.name!r} when compiled")
            chosen[param.name] = param.default
    nodes: dict[Expr, Expr] = {Param(n, known[n].type): Const(v, known[n].type) for n, v in chosen.items()}
    bound = map_program(program, lambda e: simplify(substitute(e, nodes)))
    tensors = tuple(replace(t, shape=tuple(simplify(substitute(d, nodes)) for d in t.shape)) for t in bound.tensors)
    grids = tuple((a, tuple((n, simplify(substitute(e, nodes))) for n, e in dims)) for a, dims in bound.grids)
    scalars = tuple(p for p in bound.scalars if p.name not in chosen)
    return replace(bound, scalars=scalars, tensors=tensors, grids=grids)
