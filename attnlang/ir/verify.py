"""What a legal program is, as a list of checks that each name what they found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .errors import ProgramError
from .nodes import AXES, Expr, Index, Load, Op, Param, Size, postorder
from .ops import OPS, result_type
from .program import BUILTIN_SIZES, HEAD_SIZES, NAME, Program
from .stages import STAGE_INPUTS
from .types import FLOAT, INT
from .verify_stages import Made, check_stage, made_by

__all__ = ["InvalidProgram", "verify"]

MAX_NODES = 20_000
OPERANDS = dict.fromkeys(STAGE_INPUTS, Made(FLOAT, 4))


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


def _check_nodes(program: Program, roots: tuple[Expr, ...], tensors: Mapping[str, Made]) -> Iterator[str]:
    scalars = {p.name: p for p in program.scalars}
    sizes = {*BUILTIN_SIZES, *HEAD_SIZES} | {d.name for t in program.tensors for d in t.shape if isinstance(d, Size)}
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
                if len(indices) != tensors[name].rank:
                    yield f"{name} has {tensors[name].rank} dimension(s), indexed with {len(indices)}"
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
                if axis not in (*AXES, "d"):
                    yield f"unknown index {axis!r}"
    if count > MAX_NODES:
        yield f"the program has {count} nodes; the limit is {MAX_NODES}"


def _check_program(program: Program) -> Iterator[str]:
    """Check the stages in order: each may read what the earlier ones made."""
    known: dict[str, Made] = {t.name: Made(t.type, len(t.shape)) for t in program.tensors}
    yield from _check_nodes(program, tuple(d for t in program.tensors for d in t.shape), known)
    taken = {p.name for p in program.scalars} | known.keys()
    outputs: set[str] = set()
    for stage in program.stages:
        yield from _check_nodes(program, stage.roots(), OPERANDS | known)
        yield from check_stage(stage, known)
        last = stage is program.stages[-1]  # nothing reads what it makes by name, so a parameter may be called o
        for name, made in made_by(stage).items():
            if name in outputs or (name in taken and not last):
                yield f"output {name!r} has the name of something else"
            if not NAME.match(name):
                yield f"output name {name!r} is not an identifier"
            known[name] = made
            outputs.add(name)
    for name in program.results:
        if name not in outputs:
            yield f"no stage makes {name!r}, which the program returns"


def verify(program: Program) -> Program:
    """Return ``program`` unchanged.

    Raises:
        InvalidProgram: with one line for each rule that is broken.
    """
    problems = list(dict.fromkeys((*_check_names(program), *_check_program(program))))
    if problems:
        raise InvalidProgram(f"program {program.name!r} is not valid:\n" + "\n".join(f"  - {p}" for p in problems))
    return program
