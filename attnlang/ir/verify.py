"""What a legal program is, as a list of checks that each name what they found."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import ProgramError
from .nodes import AXES, Expr, Index, Input, Load, Op, Param, Size, postorder
from .ops import OPS, result_type
from .program import BUILTIN_SIZES, DEFAULT_OUTPUTS, NAME, SOFTMAX, Program
from .types import BOOL, FLOAT, INT

__all__ = ["InvalidProgram", "verify"]

MAX_NODES = 20_000


class InvalidProgram(ProgramError):
    """A program breaks a rule of the IR; the message lists every broken rule."""


def _check_names(program: Program) -> Iterator[str]:
    names = [p.name for p in program.scalars] + [t.name for t in program.tensors]
    for name in names:
        if not NAME.match(name):
            yield f"parameter name {name!r} is not an identifier"
        if names.count(name) > 1:
            yield f"parameter {name!r} is declared twice"
        if name in BUILTIN_SIZES or name in AXES or name == "s":
            yield f"parameter {name!r} hides a built-in name"


def _check_nodes(program: Program) -> Iterator[str]:
    scalars = {p.name: p for p in program.scalars}
    tensors = {p.name: p for p in program.tensors}
    sizes = set(BUILTIN_SIZES) | {d.name for t in program.tensors for d in t.shape if isinstance(d, Size)}
    roots = [r for stage in program.stages for r in stage.roots()]
    roots += [d for t in program.tensors for d in t.shape]
    count = 0
    for node in postorder(*roots):
        count += 1
        match node:
            case Op(op=name, type=type_):
                if name not in OPS:
                    yield f"unknown operator {name!r}"
                    continue
                try:
                    want = result_type(name, tuple(a.type for a in node.args))
                except TypeError as error:
                    yield str(error)
                    continue
                if want is not type_:
                    yield f"{name} has type {type_}, expected {want}"
            case Load(tensor=name, indices=indices, type=type_):
                if name not in tensors:
                    yield f"load of undeclared tensor {name!r}"
                    continue
                if len(indices) != len(tensors[name].shape):
                    yield f"{name} has {len(tensors[name].shape)} dimension(s), indexed with {len(indices)}"
                if type_ is not tensors[name].type:
                    yield f"load of {name} has type {type_}, declared {tensors[name].type}"
                if any(i.type is not INT for i in indices):
                    yield f"{name} is indexed with something that is not an int"
            case Param(name=name, type=type_):
                if name not in scalars:
                    yield f"unknown parameter {name!r}"
                elif scalars[name].type is not type_:
                    yield f"parameter {name!r} has type {type_}, declared {scalars[name].type}"
            case Size(name=name):
                if name not in sizes:
                    yield f"unknown size {name!r}"
            case Index(axis=axis):
                if axis not in AXES:
                    yield f"unknown index {axis!r}"
    if count > MAX_NODES:
        yield f"the program has {count} nodes; the limit is {MAX_NODES}"


def _inputs(expr: Expr) -> set[str]:
    return {n.name for n in postorder(expr) if isinstance(n, Input)}


def _check_stages(program: Program) -> Iterator[str]:
    if len(program.stages) != 1:
        yield f"programs of {len(program.stages)} stages are reserved: exactly one Attend stage can be compiled so far"
    for stage in program.stages:
        terms = {t.name for t in stage.terms}
        for branch in stage.branches:
            if branch.mask.type is not BOOL:
                yield f"mask has type {branch.mask.type}, expected bool"
            if branch.score.type is not FLOAT:
                yield f"score has type {branch.score.type}, expected float"
            if extra := _inputs(branch.mask):
                yield f"a mask cannot read {', '.join(sorted(extra))}"
            if extra := _inputs(branch.score) - terms:
                yield f"a score cannot read {', '.join(sorted(extra))}"
        for what, used in (
            ("several branches", len(stage.branches) != 1),
            ("several score terms", len(stage.terms) != 1),
            ("weights after normalisation", any(x.weight is not None for x in stage.branches)),
            ("groups", any(x.group is not None for x in stage.branches)),
            ("normalisers other than softmax", any(x.normalizer != SOFTMAX for x in stage.branches)),
            ("outputs other than o and lse", stage.outputs != DEFAULT_OUTPUTS),
            ("positions that differ from slots", bool(stage.position)),
        ):
            if used:
                yield f"{what} are reserved in the IR but cannot be compiled yet"


def verify(program: Program) -> Program:
    """Return ``program`` unchanged.

    Raises:
        InvalidProgram: with one line for each rule that is broken.
    """
    problems = list(dict.fromkeys((*_check_names(program), *_check_nodes(program), *_check_stages(program))))
    if problems:
        raise InvalidProgram(f"program {program.name!r} is not valid:\n" + "\n".join(f"  - {p}" for p in problems))
    return program
