"""Emit a kernel plan as a standalone Triton source file.

The file holds the kernel and a plain ``launch`` function, and needs only torch and triton. Emission is pure and
deterministic; triton itself is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from attnlang.ir import FLOAT, Expr, format_program
from attnlang.passes.levels import Level

from .plan import KernelPlan, Section, Value
from .triton_helpers import helper_sources
from .triton_printer import TritonPrinter, precedence, safe_name
from .triton_runs import bounds_text, table_arguments

__all__ = ["Arguments", "Config", "arguments", "emit", "padded"]

KERNEL_NAME = "attention_forward"
LINE = 120
"""Longest line of code, where it can be broken."""
WIDTH = 110
"""Longest comment line of a program's text."""


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


_KNOWN_SIZES = {"B": "q.shape[0]", "H": "q.shape[1]", "Lq": "q.shape[2]", "Hkv": "k.shape[1]", "Lk": "k.shape[2]"}


def _operands(plan: KernelPlan, config: Config) -> list[tuple[str, str]]:
    """Kernel parameters for q, k, v, o and lse, with the host expressions that fill them."""
    if config.descriptors:
        d, dv = padded(plan.head_dim), padded(plan.value_dim)
        blocks = {"q": (config.block_m, d), "k": (config.block_n, d), "v": (config.block_n, dv)}
        blocks["o"] = (config.block_m, dv)
        pairs = [(f"{t}_desc", f"descriptor({t}, {rows}, {columns})") for t, (rows, columns) in blocks.items()]
        return [*pairs, ("lse_ptr", "lse")]
    pairs = [("q_ptr", "q"), ("k_ptr", "k"), ("v_ptr", "v"), ("o_ptr", "o"), ("lse_ptr", "lse")]
    return pairs + [(f"{t}_stride_{a}", f"{t}.stride({d})") for t in "qkvo" for d, a in enumerate("bhnd")]


def arguments(plan: KernelPlan, config: Config) -> Arguments:
    """Return the parameters of the kernel of ``plan``."""
    pairs = [*_operands(plan, config), ("scale", "scale")]
    host = ["q", "k", "v", "o", "lse", "scale"]
    loose = ["scale"]
    for tensor in plan.tensors:
        name = safe_name(tensor.name)
        pairs.append((f"{name}_ptr", name))
        pairs += [(f"{name}_stride{d}", f"{name}.stride({d})") for d in range(tensor.rank)]
        pairs += [(f"{name}_size{d}", f"{name}.size({d})") for d in range(tensor.rank)]
        loose += [f"{name}_size{d}" for d in range(tensor.rank)]
        host.append(name)
    scalars = [safe_name(p.name) for p in plan.scalars]
    extra = [n for n in plan.sizes if n not in _KNOWN_SIZES]
    sizes = list(dict.fromkeys(("H", "Lq", "Lk", *plan.sizes)))
    pairs += [(n, n) for n in scalars]
    pairs += [(safe_name(n), _KNOWN_SIZES.get(n, safe_name(n))) for n in sizes]
    table = table_arguments(plan, "k")
    pairs += [(n, n) for n in table]
    host += [*scalars, *map(safe_name, extra), *table]
    loose += [*scalars, *map(safe_name, sizes), *table[4:]]
    return Arguments(
        kernel=tuple(name for name, _ in pairs),
        host=tuple(host),
        call=tuple(text for _, text in pairs),
        loose=tuple(loose),
        pointers={t.name: f"{safe_name(t.name)}_ptr" for t in plan.tensors},
        last_strides=tuple(f"{safe_name(t.name)}_stride{t.rank - 1}" for t in plan.tensors if t.rank),
        float_scalars=tuple(safe_name(p.name) for p in plan.scalars if p.type is FLOAT),
    )


def _spread_root(printer: TritonPrinter, plan: KernelPlan, root: Expr) -> str:
    """Print a score as a full tile also where it does not depend on both axes."""
    text = printer.text(root, Level.PAIR)
    if plan.level(root) is Level.PAIR:
        return text
    return f"tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + {text}"


def _mask_text(printer: TritonPrinter, mask: Expr) -> str:
    """Print a mask as an operand of ``&``."""
    text = printer.text(mask, Level.PAIR)
    return text if precedence(text) >= precedence("a & b") else f"({text})"


def _mask_lines(text: str) -> list[str]:
    """Split a mask that is too long for one line at its conjunctions."""
    head = "            visible = inside[None, :] & "
    if len(head) + len(text) <= LINE or precedence(text) != precedence("a & b"):
        return [f"visible = inside[None, :] & {text}"]
    terms, depth = [""], 0
    for char in text:
        depth += (char in "([") - (char in ")]")
        if char == "&" and depth == 0:
            terms.append("")
        else:
            terms[-1] += char
    terms = [t.strip() for t in terms]
    return [f"visible = inside[None, :] & {terms[0]}", *(f"visible = visible & {t}" for t in terms[1:])]


def _scalar(text: str) -> str:
    """Make sure that a (b, h)-level address is a tensor, so that it can be widened."""
    return f"tl.full([], {text}, tl.int32)" if text.lstrip("-").isdigit() else text


def _section(printer: TritonPrinter, source: Section, roots: tuple[Expr | None, ...]) -> dict[str, Any]:
    """What a template needs to print one key loop that computes ``roots``."""
    printer.used.clear()
    col, pair = _lines(printer, source.col), _lines(printer, source.pair)
    for root in roots:
        if root is not None:
            printer.text(root, Level.PAIR)
    return {"col": col, "pair": pair, "reads_k": "k_idx" in printer.used, "distance": "k_distance" in printer.used}


def _context(plan: KernelPlan, config: Config, interpreted: bool) -> dict[str, Any]:
    printer = TritonPrinter(plan, interpreted=interpreted)
    block_d, block_dv = padded(plan.head_dim), padded(plan.value_dim)
    full = _section(printer, plan.full, (plan.score,))
    partial = _section(printer, plan.partial, (plan.score, plan.mask))
    strides = "with any strides" if not config.descriptors else "with a last stride of 1 and 16-byte aligned rows"
    context: dict[str, Any] = {
        "config": config,
        "head_dim": plan.head_dim,
        "value_dim": plan.value_dim,
        "block_d": block_d,
        "block_dv": block_dv,
        "d_columns": "d_mask[None, :]" if block_d != plan.head_dim else "",
        "dv_columns": "dv_mask[None, :]" if block_dv != plan.value_dim else "",
        "layout": strides,
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
        "mask_lines": [] if plan.mask is None else _mask_lines(_mask_text(printer, plan.mask)),
        "distance": full["distance"] or partial["distance"],
        "grid_values": _lines(printer, plan.grid),
        "row_values": _lines(printer, plan.row),
        "plan_full": full,
        "plan_partial": partial,
        "bounds": bounds_text(printer, plan.run_bounds("k")),
        "arguments": arguments(plan, config),
    }
    context["helpers"] = helper_sources(printer.helpers)
    return context


def _wrapped(line: str) -> str:
    """Break a long assignment of one call after its opening bracket."""
    match = re.fullmatch(r"( *)([\w, ]+ = [\w.]+\()(.*)\)\n", line)
    if len(line) <= LINE + 1 or match is None:
        return line
    indent, head, inside = match.groups()
    one_call = all(depth >= 0 for depth in accumulate((c in "([") - (c in ")]") for c in inside))
    if not one_call or len(indent) + 4 + len(inside) > LINE:
        return line
    return f"{indent}{head}\n{indent}    {inside}\n{indent})\n"


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
    text = str(_template().render(**_context(plan, config, interpreted)))
    return "".join(map(_wrapped, text.splitlines(keepends=True)))
