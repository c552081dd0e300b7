"""What the Triton kernels of both directions share: tiles, parameter names, pieces of text and the templates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from attnlang.ir import Expr, format_program
from attnlang.passes.levels import Level

from .facts import Facts
from .plan import KernelPlan, Value
from .plan_parts import TensorArg
from .printer import Plan
from .triton_printer import TritonExpressions, TritonPrinter, precedence, safe_name

__all__ = [
    "KNOWN_SIZES",
    "LINE",
    "RUN_TABLE",
    "Arguments",
    "Config",
    "Line",
    "as_tensor",
    "comment",
    "kernel_context",
    "lines",
    "mask_text",
    "padded",
    "program_lines",
    "sizes_given",
    "template",
    "tensor_parameters",
    "wrapped",
]

LINE = 120
"""Longest line of code, where it can be broken."""
WIDTH = 110
"""Longest comment line of a program's text."""

KNOWN_SIZES = {"B": "q.shape[0]", "H": "q.shape[1]", "Lq": "q.shape[2]", "Hkv": "k.shape[1]", "Lk": "k.shape[2]"}
"""Sizes that the shapes of q and k give, with the host expressions that read them."""


def sizes_given(plan: KernelPlan) -> list[str]:
    """Return the sizes that a launch is told, since the shapes of q and k do not say them."""
    moved = ["Lk"] if plan.key_row is not None else []  # then k has rows, and not a row for each key
    return [*moved, *(n for n in plan.all_sizes if n not in KNOWN_SIZES)]


def tensor_parameters(tensor: TensorArg) -> list[tuple[str, str]]:
    """Return the kernel parameters of a captured tensor (pointer, strides, extents), and their values on the host."""
    name, dims = safe_name(tensor.name), range(tensor.rank)
    strides = [(f"{name}_stride{d}", f"{name}.stride({d})") for d in dims]
    return [(f"{name}_ptr", name), *strides, *((f"{name}_size{d}", f"{name}.size({d})") for d in dims)]


RUN_TABLE = ("full_ptr", "full_runs", "part_ptr", "part_runs", "map_batch", "map_heads", "first_tile", "tile_step")
"""Parameters that hold the run map: four int32 tensors, then numbers."""


@dataclass(frozen=True)
class Config:
    """Tile and launch parameters: queries and keys of a tile, warps, pipeline stages.

    ``descriptors`` reads and writes q, k, v and o through tensor descriptors (TMA) and not through pointers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool = False

    @property
    def tile(self) -> tuple[int, int]:
        """The (query, key) tile whose run map the kernel walks."""
        return self.block_m, self.block_n

    @property
    def key(self) -> str:
        return f"m{self.block_m}n{self.block_n}w{self.warps}s{self.stages}" + "d" * self.descriptors


@dataclass(frozen=True)
class Arguments:
    """Parameters of the kernel and of ``launch``, in the fixed order of a plan.

    ``call`` holds the host expression for each kernel parameter. ``loose`` parameters are not specialised on their
    value. ``pointers`` maps captured tensors to their pointer parameter.
    """

    kernel: tuple[str, ...]
    host: tuple[str, ...]
    call: tuple[str, ...]
    loose: tuple[str, ...]
    pointers: Mapping[str, str]
    last_strides: tuple[str, ...]
    float_scalars: tuple[str, ...]


def padded(dim: int) -> int:
    """Return the block size that holds ``dim`` columns: a power of two, at least 16 for the matrix units."""
    return max(16, 1 << (dim - 1).bit_length())


@dataclass(frozen=True)
class Line:
    """One statement, and where its expression comes from."""

    name: str
    text: str
    comment: str


def comment(text: str) -> str:
    """Return ``text`` as one harmless comment line."""
    one = " ".join(text.split())
    clean = "".join(c if c.isprintable() else "?" for c in one)
    return clean if len(clean) <= WIDTH else clean[: WIDTH - 3] + "..."


def program_lines(plan: Facts) -> list[str]:
    """Return the text of the program of a plan as comment lines."""
    lines = format_program(plan.program).splitlines()
    return [(" " * (len(line) - len(line.lstrip())) + comment(line)) for line in lines if line.strip()]


def lines(printer: TritonExpressions[Plan], values: Iterable[Value]) -> list[Line]:
    """Print statements."""
    return [Line(printer.value_name(v.name), printer.value(v), comment(v.comment)) for v in values]


def mask_text(printer: TritonPrinter, mask: Expr) -> str:
    """Print a mask as an operand of ``&``."""
    text = printer.text(mask, Level.PAIR)
    return text if precedence(text) >= precedence("a & b") else f"({text})"


def as_tensor(text: str) -> str:
    """Make sure that a (b, h)-level address is a tensor, so that it can be widened."""
    return f"tl.full([], {text}, tl.int32)" if text.lstrip("-").isdigit() else text


def _clamped(plan: KernelPlan, text: str, extent: str) -> str:
    if plan.default_heads or plan.stream is None:
        return text
    return f"tl.minimum(tl.maximum({text}, 0), {extent} - 1).to(tl.int32)"


def wrapped(line: str) -> str:
    """Break a long assignment of one call after its opening bracket."""
    match = re.fullmatch(r"( *)([\w, ]+ = [\w.]+\()(.*)\)\n", line)
    if len(line) <= LINE + 1 or match is None:
        return line
    indent, head, inside = match.groups()
    one_call = all(depth >= 0 for depth in accumulate((c in "([") - (c in ")]") for c in inside))
    if not one_call or len(indent) + 4 + len(inside) > LINE:
        return line
    return f"{indent}{head}\n{indent}    {inside}\n{indent})\n"


def kernel_context(plan: KernelPlan, config: Config, printer: TritonPrinter, *, interpreted: bool) -> dict[str, Any]:
    """Return what the templates of every kernel need: dimensions, casts, and the key head of a query head."""
    block_d, block_dv = padded(plan.head_dim), padded(plan.value_dim)
    return {
        "config": config,
        "head_dim": plan.head_dim,
        "value_dim": plan.value_dim,
        "block_d": block_d,
        "block_dv": block_dv,
        "d_columns": "d_mask[None, :]" if block_d != plan.head_dim else "",
        "dv_columns": "dv_mask[None, :]" if block_dv != plan.value_dim else "",
        "precision": ', input_precision="ieee"' if plan.dtype == "float32" else "",
        # the interpreter multiplies the bits of bfloat16
        "operand": ".to(tl.float32)" if interpreted and plan.dtype == "bfloat16" else "",
        "wide": ".to(tl.int64)" if plan.wide else "",
        "program_text": program_lines(plan),
        "dtype": plan.dtype,
        "about": f"{plan.dtype}, head dimension {plan.head_dim}, value dimension {plan.value_dim}.",
        "key_batch": _clamped(plan, as_tensor(printer.text(plan.key_batch, Level.GRID)), "k_batches"),
        "key_head": _clamped(plan, as_tensor(printer.text(plan.key_head, Level.GRID)), "k_heads"),
        "key_rows_doc": "Lk" if plan.key_row is None else "rows",
        "scored": plan.score is not None,
        "grid_values": lines(printer, plan.grid),
    }


@cache
def template(name: str) -> Any:
    """Return a template of the folder ``templates``."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    return environment.get_template(name)
