"""Emit a kernel plan as a standalone Triton source file.

The file holds the kernel and a plain ``launch`` function, and needs only torch and triton. Emission is pure and
deterministic; triton itself is not imported.
"""

from __future__ import annotations

from typing import Any

from attnlang.ir import FLOAT, Expr, Input, postorder
from attnlang.passes.levels import Level, axes_of

from .plan import KernelPlan, Section
from .triton_common import (
    KNOWN_SIZES,
    LINE,
    Arguments,
    Config,
    comment,
    kernel_context,
    lines,
    mask_text,
    padded,
    sizes_given,
    template,
    tensor_parameters,
    wrapped,
)
from .triton_helpers import helper_sources
from .triton_printer import TritonPrinter, precedence, safe_name
from .triton_rows import change_output, helpers_of, make_queries
from .triton_runs import bounds_text, table_arguments

__all__ = ["KERNEL_NAME", "Arguments", "Config", "arguments", "emit", "padded"]

KERNEL_NAME = "attention_forward"


def _operands(plan: KernelPlan, config: Config) -> list[tuple[str, str]]:
    """Kernel parameters for q, k, v, o and lse, with the host expressions that fill them."""
    names = "qkvo" if plan.before is None else "kvo"
    if config.descriptors:
        d, dv = padded(plan.head_dim), padded(plan.value_dim)
        blocks = {"q": (config.block_m, d), "k": (config.block_n, d), "v": (config.block_n, dv)}
        blocks["o"] = (config.block_m, dv)
        pairs = [(f"{t}_desc", f"descriptor({t}, {blocks[t][0]}, {blocks[t][1]})") for t in names]
        return [*pairs, ("lse_ptr", "lse")]
    pairs = [*((f"{t}_ptr", t) for t in names), ("lse_ptr", "lse")]
    return pairs + [(f"{t}_stride_{a}", f"{t}.stride({d})") for t in names for d, a in enumerate("bhnd")]


def _key_extents(plan: KernelPlan) -> list[tuple[str, int]]:
    """Extents of k that addresses are moved into, with their dimensions."""
    heads = [] if plan.default_heads else [("k_batches", 0), ("k_heads", 1)]
    return [*heads, ("k_rows", 2)] if plan.key_row is not None else heads


def arguments(plan: KernelPlan, config: Config) -> Arguments:
    """Return the parameters of the kernel of ``plan``."""
    pairs = [*_operands(plan, config), ("scale", "scale")]
    host = ["q", "k", "v", "o", "lse", "scale"]
    loose = ["scale"]
    for tensor in plan.all_tensors:
        name = safe_name(tensor.name)
        pairs += tensor_parameters(tensor)
        loose += [f"{name}_size{d}" for d in range(tensor.rank)]
        host.append(name)
    scalars = [safe_name(p.name) for p in plan.all_scalars]
    extra = sizes_given(plan)
    sizes = list(dict.fromkeys(("H", "Lq", "Lk", *plan.all_sizes)))
    pairs += [(n, n) for n in scalars]
    pairs += [(safe_name(n), safe_name(n) if n in extra else KNOWN_SIZES[n]) for n in sizes]
    pairs += [(n, f"k.shape[{d}]") for n, d in _key_extents(plan)]
    table = table_arguments(plan, "k")
    pairs += [(n, n) for n in table]
    host += [*scalars, *map(safe_name, extra), *table]
    loose += [*scalars, *map(safe_name, sizes), *(n for n, _ in _key_extents(plan)), *table[4:]]
    return Arguments(
        kernel=tuple(name for name, _ in pairs),
        host=tuple(host),
        call=tuple(text for _, text in pairs),
        loose=tuple(loose),
        pointers={t.name: f"{safe_name(t.name)}_ptr" for t in plan.all_tensors},
        last_strides=tuple(f"{safe_name(t.name)}_stride{t.rank - 1}" for t in plan.all_tensors if t.rank),
        float_scalars=tuple(safe_name(p.name) for p in plan.all_scalars if p.type is FLOAT),
    )


def _spread_root(printer: TritonPrinter, plan: KernelPlan, root: Expr) -> str:
    """Print a score as a full tile also where it does not depend on both axes."""
    text = printer.text(root, Level.PAIR)
    if plan.level(root) is Level.PAIR:
        return text
    return f"tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + {text}"


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


def _key_row(printer: TritonPrinter, row: Expr) -> str:
    """The rows of a tile of keys; one that all keys share is written out for each."""
    text = printer.text(row, Level.COL)
    return text if "k" in axes_of(row)[row] else f"tl.full([BLOCK_N], {text}, tl.int64)"


def section_text(printer: TritonPrinter, source: Section, roots: tuple[Expr | None, ...]) -> dict[str, Any]:
    """What a template needs to print one key loop that computes ``roots``."""
    printer.used.clear()
    plan = printer.plan
    early = lines(printer, plan.key_values)
    row = "" if plan.key_row is None else _key_row(printer, plan.key_row)
    col = lines(printer, (v for v in source.col if v not in plan.key_values))
    pair = lines(printer, source.pair)
    for root in roots:
        if root is not None:
            printer.text(root, Level.PAIR)
    used = {"reads_k": "k_idx" in printer.used, "distance": "k_distance" in printer.used}
    return {"key_values": early, "key_row": row, "col": col, "pair": pair, **used}


def score_text(printer: TritonPrinter, plan: KernelPlan) -> dict[str, Any]:
    """The score and the mask as a template prints them."""
    return {
        "masked": plan.mask is not None,
        "product": plan.score is None or any(isinstance(n, Input) for n in postorder(plan.score)),
        "score": None if plan.score is None else _spread_root(printer, plan, plan.score),
        "mask_lines": [] if plan.mask is None else _mask_lines(mask_text(printer, plan.mask)),
    }


def _context(plan: KernelPlan, config: Config, interpreted: bool) -> dict[str, Any]:
    printer = TritonPrinter(plan, interpreted=interpreted)
    full = section_text(printer, plan.full, (plan.score,))
    partial = section_text(printer, plan.partial, (plan.score, plan.mask))
    before = make_queries(plan.before, plan.head_dim, interpreted=interpreted)
    after = change_output(plan.after, plan.value_dim, interpreted=interpreted)
    query_row = "" if plan.query_row is None else printer.text(plan.query_row, Level.ROW)
    strides = "with any strides" if not config.descriptors else "with a last stride of 1 and 16-byte aligned rows"
    context = kernel_context(plan, config, printer, interpreted=interpreted) | {
        "layout": strides,
        "offset_bits": 64 if plan.wide else 32,
        "kernel_name": KERNEL_NAME,
        "title": comment(f"Attention forward for the program {plan.program.name}"),
        "grid_doc": "one instance for each (b, h) and tile of BLOCK_M queries.",
        **score_text(printer, plan),
        "distance": full["distance"] or partial["distance"],
        "row_values": lines(printer, plan.row),
        "query_row": query_row,
        "query_place": "q_row" if query_row else "q_local" + (".to(tl.int64)" if plan.wide else ""),
        "plan_full": full,
        "plan_partial": partial,
        "bounds": bounds_text(printer, plan.run_bounds("k")),
        "arguments": arguments(plan, config),
        "before": before,
        "after": after,
    }
    context["helpers"] = helper_sources(printer.helpers | helpers_of((before, after)))
    return context


def emit(plan: KernelPlan, config: Config, *, interpreted: bool = False) -> str:
    """Return the Triton source of the forward kernel of ``plan`` at the tile of ``config``.

    ``interpreted`` works around what Triton's interpreter cannot do; the results are the same.
    """
    if plan.maps and plan.query_row is not None:
        raise ValueError("queries that are made, and rows changed on their way, are in order")
    text = str(template("triton_forward.j2").render(**_context(plan, config, interpreted)))
    return "".join(map(wrapped, text.splitlines(keepends=True)))
