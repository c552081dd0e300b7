"""Emit a kernel plan as a standalone Triton source file.

The file holds the kernel and a plain ``launch`` function, and needs only torch and triton. Emission is pure and
deterministic; triton itself is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from attnlang.ir import Expr, Index, format_program, postorder
from attnlang.passes.levels import Level

from .plan import KernelPlan, Section, TensorArg, Value
from .triton_helpers import helper_sources
from .triton_printer import TritonPrinter, safe_name

__all__ = ["Config", "emit", "padded"]

KERNEL_NAME = "attention_forward"
WIDTH = 110
"""Longest comment line of a program's text."""


@dataclass(frozen=True)
class Config:
    """Tile and launch parameters: queries and keys of a tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    @property
    def tile(self) -> tuple[int, int]:
        """The (query, key) tile whose run map the kernel walks."""
        return self.block_m, self.block_n

    @property
    def key(self) -> str:
        return f"m{self.block_m}n{self.block_n}w{self.warps}s{self.stages}"


def padded(dim: int) -> int:
    """Return the block size that holds ``dim`` columns: a power of two, at least 16 for the matrix units."""
    return max(16, 1 << (dim - 1).bit_length())


@dataclass(frozen=True)
class _Line:
    name: str
    text: str
    comment: str


def _comment(text: str) -> str:
    """Return ``text`` as one harmless comment line."""
    one = " ".join(text.split())
    clean = "".join(c if c.isprintable() else "?" for c in one)
    return clean if len(clean) <= WIDTH else clean[: WIDTH - 3] + "..."


def _program_lines(plan: KernelPlan) -> list[str]:
    lines = format_program(plan.program).splitlines()
    return [(" " * (len(line) - len(line.lstrip())) + _comment(line)) for line in lines if line.strip()]


def _lines(printer: TritonPrinter, values: Iterable[Value]) -> list[_Line]:
    return [_Line(printer.value_name(v.name), printer.value(v), _comment(v.comment)) for v in values]


def _tensor_arguments(tensor: TensorArg) -> tuple[list[str], list[str]]:
    """Kernel parameters of a captured tensor and the host expressions that fill them."""
    name = safe_name(tensor.name)
    dims = range(tensor.rank)
    params = [f"{name}_ptr", *(f"{name}_stride{d}" for d in dims), *(f"{name}_size{d}" for d in dims)]
    values = [name, *(f"{name}.stride({d})" for d in dims), *(f"{name}.size({d})" for d in dims)]
    return params, values


def _arguments(plan: KernelPlan) -> dict[str, list[str]]:
    """Kernel parameters, host parameters and the launch call, in the fixed order of a plan."""
    axes = ("b", "h", "n", "d")
    kernel = ["q_ptr", "k_ptr", "v_ptr", "o_ptr", "lse_ptr", *(f"{t}_stride_{a}" for t in "qkvo" for a in axes)]
    call = ["q", "k", "v", "o", "lse", *(f"{t}.stride({d})" for t in "qkvo" for d in range(4))]
    host = ["q", "k", "v", "o", "lse", "scale"]
    loose = ["scale"]
    kernel.append("scale")
    call.append("scale")
    for tensor in plan.tensors:
        params, values = _tensor_arguments(tensor)
        kernel += params
        call += values
        host.append(safe_name(tensor.name))
        loose += [p for p in params if "_size" in p]
    for param in plan.scalars:
        name = safe_name(param.name)
        kernel.append(name)
        call.append(name)
        host.append(name)
        loose.append(name)
    known = {"H": "q.shape[1]", "Lq": "q.shape[2]", "Lk": "k.shape[2]", "B": "q.shape[0]", "Hkv": "k.shape[1]"}
    for size in dict.fromkeys(("H", "Lq", "Lk", *plan.sizes)):
        name = safe_name(size)
        kernel.append(name)
        call.append(known.get(size, name))
        loose.append(name)
        if size not in known:
            host.append(name)
    table = ["full_ptr", "full_runs", "part_ptr", "part_runs", "map_batch", "map_heads", "first_tile", "tile_step"]
    loose += table[4:]
    return {"arguments": kernel + table, "host_arguments": host + table, "launch_arguments": call + table} | {
        "unspecialised": loose
    }


def _spread_root(printer: TritonPrinter, plan: KernelPlan, root: Expr) -> str:
    """Print a score as a full tile also where it does not depend on both axes."""
    text = printer.text(root, Level.PAIR)
    if plan.level(root) is Level.PAIR:
        return text
    return f"tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + {text}"


def _mask_text(printer: TritonPrinter, mask: Expr) -> str:
    text = printer.text(mask, Level.PAIR)
    if text in ("True", "False"):
        return f"({text})"
    return text if re.fullmatch(r"[\w.]+(\[[^ ]*, [^ ]*\])?", text) else f"({text})"


def _scalar(text: str) -> str:
    """Make sure that a (b, h)-level address is a tensor, so that it can be widened."""
    return f"tl.full([], {text}, tl.int32)" if text.lstrip("-").isdigit() else text


def _reads_k(plan: KernelPlan) -> bool:
    roots = [e for e in (plan.score,) if e is not None]
    return any(isinstance(n, Index) and n.axis == "k" for n in postorder(*roots))


def _context(plan: KernelPlan, config: Config, interpreted: bool) -> dict[str, Any]:
    printer = TritonPrinter(plan)
    block_d, block_dv = padded(plan.head_dim), padded(plan.value_dim)
    pad_d, pad_dv = block_d != plan.head_dim, block_dv != plan.value_dim

    def section(source: Section) -> dict[str, list[_Line]]:
        return {"col": _lines(printer, source.col), "pair": _lines(printer, source.pair)}

    context: dict[str, Any] = {
        "config": config,
        "head_dim": plan.head_dim,
        "value_dim": plan.value_dim,
        "block_d": block_d,
        "block_dv": block_dv,
        "pad_d": pad_d,
        "pad_dv": pad_dv,
        "k_and": " & d_mask[None, :]" if pad_d else "",
        "v_and": " & dv_mask[None, :]" if pad_dv else "",
        "precision": ', input_precision="ieee"' if plan.dtype == "float32" else "",
        # the interpreter multiplies the bits of bfloat16
        "operand": ".to(tl.float32)" if interpreted and plan.dtype == "bfloat16" else "",
        "wide": ".to(tl.int64)" if plan.wide else "",
        "offset_bits": 64 if plan.wide else 32,
        "kernel_name": KERNEL_NAME,
        "title": _comment(f"Attention forward for the program {plan.program.name}"),
        "program_text": _program_lines(plan),
        "about": f"{plan.dtype}, head dimension {plan.head_dim}, value dimension {plan.value_dim}.",
        "grid_doc": "one instance for each (b, h) and tile of BLOCK_M queries.",
        "key_batch": _scalar(printer.text(plan.key_batch, Level.GRID)),
        "key_head": _scalar(printer.text(plan.key_head, Level.GRID)),
        "scored": plan.score is not None,
        "masked": plan.mask is not None,
        "score": None if plan.score is None else _spread_root(printer, plan, plan.score),
        "mask": None if plan.mask is None else _mask_text(printer, plan.mask),
        "reads_k": _reads_k(plan),
        "distance": False,
        "grid_values": _lines(printer, plan.grid),
        "row_values": _lines(printer, plan.row),
        "plan_full": section(plan.full),
        "plan_partial": section(plan.partial),
        **_arguments(plan),
    }
    context["helpers"] = helper_sources(printer.helpers)
    return context


@cache
def _template() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    return environment.get_template("triton_forward.j2")


def emit(plan: KernelPlan, config: Config, *, interpreted: bool = False) -> str:
    """Return the Triton source of the forward kernel of ``plan`` at the tile of ``config``.

    ``interpreted`` works around what Triton's interpreter cannot do; the results are the same.
    """
    return str(_template().render(**_context(plan, config, interpreted)))
