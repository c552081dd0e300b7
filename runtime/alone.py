"""A stage of attention as a program of its own."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from attnlang.ir import (
    DEFAULT_OUTPUTS,
    FLOAT,
    KEY_ADDRESS,
    QUERY_ADDRESS,
    SOFTMAX,
    Attend,
    Branch,
    Environment,
    Expr,
    Program,
    Size,
    TensorParam,
    Type,
    evaluate,
    substitute,
)
from attnlang.ir.types import BOOL, INT
from attnlang.passes.simplify import map_program

__all__ = ["as_program", "program_of", "softmax_roles"]

Tensor = torch.Tensor


def softmax_roles(stage: Attend) -> tuple[str, str, str, str, str | None] | None:
    """(query, key, value operand, output, lse output) of a stage that is plain softmax attention, else None.

    Such a stage has one dot product, one branch with softmax and no further hooks, and sums weighted rows.
    """
    if len(stage.terms) != 1 or len(stage.branches) != 1 or stage.position:
        return None
    (term,), branch = stage.terms, stage.branch
    plain = Branch(branch.mask, branch.score)
    if branch != plain or branch.normalizer != SOFTMAX or term.body is not None or term.name != "s":
        return None
    if term.left.index != QUERY_ADDRESS or term.right.index != KEY_ADDRESS:
        return None
    out, lse = DEFAULT_OUTPUTS
    values = [o for o in stage.outputs if o.rows is not None]
    others = [o for o in stage.outputs if o.rows is None]
    if len(values) != 1 or len(others) > 1:
        return None
    if values[0] != replace(out, name=values[0].name, rows=values[0].rows):
        return None
    if any(o != replace(lse, name=o.name) for o in others):
        return None
    rows = values[0].rows
    if rows is None or rows.index != KEY_ADDRESS:
        return None
    name = others[0].name if others else None
    return term.left.source, term.right.source, rows.source, values[0].name, name


def _made(program: Program, env: Environment) -> tuple[TensorParam, ...]:
    """What earlier stages made, with the shapes it has."""
    known = {t.name for t in program.tensors}
    return tuple(
        TensorParam(name, _type(t), tuple(Size(f"{name}_{d}") for d in range(t.dim())))
        for name, t in env.tensors.items()
        if name not in known
    )


def _type(t: Tensor) -> Type:
    return BOOL if t.dtype is torch.bool else FLOAT if t.is_floating_point() else INT


def _sizes(env: Environment, tensors: tuple[TensorParam, ...]) -> dict[str, int]:
    found = dict(env.sizes)
    for t in tensors:
        for dim, extent in zip(t.shape, env.tensors[t.name].shape, strict=True):
            if isinstance(dim, Size):
                found.setdefault(dim.name, extent)
    return found


def as_program(program: Program, stage: Attend, env: Environment) -> tuple[Program, dict[str, int]]:
    """``stage`` as a program of its own over its own lengths; sizes of the whole program get other names."""
    made = _made(program, env)
    sizes = _sizes(env, (*program.tensors, *made))
    lengths = dict(zip(("Lq", "Lk"), (int(evaluate(e, env)) for e in stage.lengths), strict=True))
    changed = tuple(name for name, length in lengths.items() if length != sizes[name])
    for name in changed:
        sizes[f"{name}_program"], sizes[name] = sizes[name], lengths[name]
    return program_of(program, stage, made, changed), sizes


@functools.lru_cache(maxsize=256)
def program_of(program: Program, stage: Attend, made: tuple[TensorParam, ...], changed: tuple[str, ...]) -> Program:
    """The same object for the same stage, since kernels are remembered by program."""
    alone = Program(program.name, (stage,), program.scalars, (*program.tensors, *made))
    renamed: dict[Expr, Expr] = {Size(name): Size(f"{name}_program") for name in changed}
    alone = map_program(alone, lambda e: substitute(e, renamed)) if renamed else alone
    alone = replace(alone, stages=(replace(alone.attend, lengths=Attend().lengths),))
    if softmax_roles(alone.attend) is not None:
        alone = replace(alone, stages=(Attend(branches=alone.attend.branches),))
    return alone
