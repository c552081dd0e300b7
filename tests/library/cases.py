"""All cases of the library, by name: the program, or ``program/variant`` for further calls of the same one.

Executors are tested on these: ``case.instance("tiny")`` fits Triton's interpreter, ``"medium"`` has odd lengths of two
hundred and more, ``case.at(length)`` has any length where the case is ``resizable``. An instance gives ``shape``,
``params``, ``captured``, ``operands(...)``, ``dense_mask()`` and ``dense_attention(q, k, v)``.
"""

from __future__ import annotations

from library import (
    basic_cases,
    bias_cases,
    choice_cases,
    region_cases,
    sequence_cases,
    steering_cases,
    video_cases,
    vision_cases,
    windows_cases,
)
from library.records import Case, Instance, Setup, Shape

from attnlang import ir
from attnlang import library as programs

__all__ = ["BROAD", "CALLS", "CASES", "Case", "Instance", "Setup", "Shape", "bind", "program_of"]

CASES: dict[str, Case] = {
    **basic_cases.CASES,
    **sequence_cases.CASES,
    **bias_cases.CASES,
    **vision_cases.CASES,
    **video_cases.CASES,
    **windows_cases.CASES,
    **region_cases.CASES,
    **choice_cases.CASES,
    **steering_cases.CASES,
}
BROAD = {name: case for name, case in CASES.items() if not case.light}
CALLS = tuple((name, size) for size in ("tiny", "medium") for name in (CASES if size == "tiny" else BROAD))


def program_of(instance: Instance) -> ir.Program:
    """Return the library's program that an instance calls."""
    program = getattr(programs, instance.case.program)
    assert isinstance(program, ir.Program)
    return program


def bind(program: ir.Program, instance: Instance) -> tuple[dict[str, int], dict[str, ir.Scalar]]:
    """Return the sizes of a call, those of captured tensors included, and its scalar parameters with defaults."""
    params = {p.name: p.default for p in program.scalars if p.default is not None} | dict(instance.params)
    sizes = instance.shape.sizes()
    for tensor in program.tensors:
        have = instance.captured[tensor.name].shape
        assert len(have) == len(tensor.shape)
        for want, n in zip(tensor.shape, have, strict=True):
            if isinstance(want, ir.Size):
                assert sizes.setdefault(want.name, n) == n, f"{tensor.name}: {want} is {sizes[want.name]}, not {n}"
    for tensor in program.tensors:
        values = [int(ir.evaluate(d, ir.Environment(sizes=sizes, params=params))) for d in tensor.shape]
        assert values == list(instance.captured[tensor.name].shape), tensor.name
    return sizes, params
