"""The argument record of a C++ kernel: one list of fields that the template declares and the runtime packs.

Every field takes eight bytes, so the record has one layout everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnlang.ir import BOOL, FLOAT, Size

from .cpp_printer import ELEMENTS, SCALARS
from .facts import Facts
from .isa import Isa
from .plan import KernelPlan

__all__ = ["Arguments", "Field", "arguments", "captured"]


TABLE = ("full_ptr", "full_runs", "part_ptr", "part_runs", "order")
"""Fields of the run table, which a kernel that computes its run bounds does not take."""


@dataclass(frozen=True)
class Field:
    """One member: ``source`` says where the value comes from, as a kind and what it is taken of."""

    name: str
    ctype: str
    source: tuple[str, ...]

    @property
    def declaration(self) -> str:
        space = "" if self.ctype.endswith("*") else " "
        return f"{self.ctype}{space}{self.name}"

    @property
    def code(self) -> str:
        """The format character of the field in :mod:`struct`."""
        return "d" if self.ctype == "double" else "q"


@dataclass(frozen=True)
class Arguments:
    """The record, and the local names a kernel gives to the fields that expressions read."""

    fields: tuple[Field, ...]
    locals: tuple[str, ...]


def _operand(name: str, const: str = "const void *") -> list[Field]:
    strides = [Field(f"{name}_s{d}", "int64", ("stride", name, str(d))) for d in range(4)]
    return [Field(name, const, ("pointer", name)), *strides]


def _outputs(plan: KernelPlan) -> list[Field]:
    """Pointers to what a forward kernel makes, or to what the backward kernel of softmax attention reads of it."""
    if plan.pull is not None:
        return []
    if plan.stream is None:
        return [Field("o", "void *", ("pointer", "o")), Field("lse", "float *", ("pointer", "lse"))]
    fields = []
    for out in plan.stream.outputs:
        ctype = "void *" if out.rows is not None else "int64 *" if out.integer else "float *"
        fields.append(Field(f"y_{out.name}", ctype, ("pointer", out.name)))
    columns = [out.name for out in plan.stream.outputs if out.column is not None]
    if columns:  # shares of the queries, each with a buffer of its own
        fields.append(Field("shares", "int64", ("extent", columns[0], "0")))
    return fields


def arguments(plan: KernelPlan, isa: Isa | None = None) -> Arguments:
    """Return the argument record of ``plan``, in the order of the record."""
    fields = [*_operand("q"), *_operand("k"), *_operand("v")]
    fields += _outputs(plan)
    names = dict.fromkeys(("B", "H", "Hkv", "Lq", "Lk", *plan.all_sizes))
    fields += [Field(f"n_{name}", "int64", ("size", name)) for name in names]
    fields += [Field("k_batches", "int64", ("extent", "k", "0")), Field("scale", "double", ("scale",))]
    if plan.key_row is not None:
        fields.append(Field("k_rows", "int64", ("extent", "k", "2")))
    if plan.run_bounds("k") is None:
        fields += [Field(name, "const int *", ("runs", name)) for name in TABLE]
        fields += [Field(name, "int64", ("runs", name)) for name in ("map_batch", "map_heads")]
    if isa is not None and isa.matrix:
        fields.append(Field("space", "void *", ("pointer", "space")))
    found, local = captured(plan)
    more = [f for m in plan.maps for f in captured(m)[0]]
    return Arguments((*fields, *dict.fromkeys((*found, *more))), local)


def captured(plan: Facts) -> tuple[list[Field], tuple[str, ...]]:
    """Members for captured tensors and parameters, and the local names of these and of sizes."""
    fields: list[Field] = []
    local: list[str] = []
    for name in plan.sizes:
        kind = SCALARS[plan.width(Size(name))]
        local.append(f"const {kind} n_{name} = ({kind})a.n_{name};")
    for tensor in plan.tensors:
        t, element = f"t_{tensor.name}", ELEMENTS[tensor.dtype]
        fields.append(Field(t, "const void *", ("data", tensor.name)))
        local.append(f"const {element} *{t} = (const {element} *)a.{t};")
        for d in range(tensor.rank):
            fields.append(Field(f"{t}_s{d}", "int64", ("step", tensor.name, str(d))))
            fields.append(Field(f"{t}_n{d}", "int64", ("length", tensor.name, str(d))))
            local.append(f"const int64 {t}_s{d} = a.{t}_s{d};")
    for scalar in plan.scalars:
        ctype = "double" if scalar.type is FLOAT else "int64"
        fields.append(Field(f"p_{scalar.name}", ctype, ("param", scalar.name)))
        width = plan.width(scalar)
        cast = f"a.p_{scalar.name} != 0" if scalar.type is BOOL else f"({SCALARS[width]})a.p_{scalar.name}"
        local.append(f"const {SCALARS[width]} p_{scalar.name} = {cast};")
    return fields, tuple(local)
