"""The backward pass on the Triton target: two kernels, each the only writer of what it computes.

The queries kernel walks the run map row by row and gives dq, delta and the gradients of captured tensors that are sums
over keys; the keys kernel walks the transposed map and gives dk, dv and sums over queries, over all query heads of a
group. Weights are recomputed from the saved lse. Neither needs atomic additions, so gradients are the same bits in
every run; a captured tensor read through an arbitrary map of the pair is the exception (``Scatter.FIXED``, ``ATOMIC``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from attnlang.ir import FLOAT, Expr, Load, Op
from attnlang.passes.levels import Level

from .plan import CapturedGrad, KernelPlan, Section, TensorArg, Value
from .scatter import scatter_of
from .triton import LINE, Config, _comment, _mask_text, _program_lines, _scalar, _wrapped, padded
from .triton_helpers import helper_sources
from .triton_printer import TritonPrinter, safe_name
from .triton_runs import TABLE, bounds_text, table_arguments

__all__ = [
    "KEYS",
    "QUERIES",
    "BackwardArguments",
    "backward_arguments",
    "emit_keys",
    "emit_queries",
    "has_diagonals",
    "kernel_name",
    "own_name",
]

QUERIES, KEYS = "queries", "keys"

_OWN_NAMES = """
attention_backward_keys attention_backward_queries base delta delta_ptr dk dk_base dk_inside dk_offsets dk_ptr dk_to
dlogit dlse dlse_ptr do do_base do_offsets do_ptr dp dq dq_base dq_inside dq_offsets dq_ptr dq_to ds dv dv_base
dv_inside dv_offsets dv_ptr dv_to group high high_mask high_sum key_inside low low_sum member num_k_tiles p place row
seen shares skew start_k tile_k turn turned wraps
"""
_CLASHES = re.compile(
    rf"(?<![\w.])({'|'.join(_OWN_NAMES.split())}"
    r"|(?:q|k|v|o|do|dq|dk|dv)_stride_[bhnd]|grad\d+(?:_ptr|_sum|_to|_at|_part|_unit|_stride(?:\d+|_[bh]))?)(?!\w)"
)
"""Names of the backward templates that the forward template does not have."""


def own_name(name: str) -> bool:
    """Whether the backward templates use ``name`` for themselves, beside the names of the forward template."""
    return _CLASHES.fullmatch(name) is not None


def _rename(text: str) -> str:
    """Add an underscore to names of the program that a backward template uses for itself."""
    return _CLASHES.sub(r"\1_", text)


class _Printer(TritonPrinter):
    """Pairs are [queries, keys], or [keys, queries] where ``flipped``."""

    def __init__(self, plan: KernelPlan, *, interpreted: bool, flipped: bool) -> None:
        super().__init__(plan, interpreted=interpreted)
        self.flipped = flipped

    def text(self, node: Expr, at: Level) -> str:
        return _rename(super().text(node, at))

    def value(self, value: Value) -> str:
        return _rename(super().value(value))

    def value_name(self, name: str) -> str:
        return _rename(super().value_name(name))

    def _spread(self, text: str, have: Level, at: Level) -> str:
        out = super()._spread(text, have, at)
        if not self.flipped or out == text:
            return out
        for old, new in (("[:, None]", "[None, :]"), ("[None, :]", "[:, None]")):
            if out.endswith(old):
                return out.removesuffix(old) + new
        return out

    def _distance(self, node: Expr, at: Level) -> str | None:
        text = super()._distance(node, at)
        if text is None or not self.flipped or (isinstance(node, Op) and node.op == "abs"):
            return text
        return text.replace("[:, None]", "[?]").replace("[None, :]", "[:, None]").replace("[?]", "[None, :]")

    def offsets(self, load: Load, buffer: str) -> list[str]:
        """Offsets of the elements ``load`` reads in a buffer with strides of its own, one term a dimension."""
        terms = []
        for dim, (index, guard) in enumerate(zip(load.indices, self.plan.load_guards(load), strict=True)):
            level = self.plan.level(index)
            text = _rename(self._position(index, f"{safe_name(load.tensor)}_size{dim}", guard, level))
            terms.append(f"{self._spread(f'({text})', level, Level.PAIR)} * {buffer}_stride{dim}")
        return terms


@dataclass(frozen=True)
class _Line:
    name: str
    text: str
    comment: str


def _lines(printer: _Printer, values: Iterable[Value]) -> list[_Line]:
    return [_Line(printer.value_name(v.name), printer.value(v), _comment(v.comment)) for v in values]


@dataclass(frozen=True)
class _Grad:
    """Text for one captured gradient: ``kind`` is row, grid, col, store, difference, sum, fixed or atomic."""

    name: str
    kind: str
    value: str
    offsets: list[str]
    comment: str

    @property
    def summed(self) -> bool:
        """Whether it is summed in registers along the inner axis."""
        return self.kind in ("row", "grid", "col")


@dataclass(frozen=True)
class _Loop:
    """Text of the inner loop of one kind of tile; ``outer`` and ``inner`` are the statements of either vector axis."""

    outer: list[_Line]
    inner: list[_Line]
    pair: list[_Line]
    score: str
    dscore: str
    mask: str
    reads_outer: bool
    reads_inner: bool
    distance: bool


def _kind(grad: CapturedGrad) -> str:
    return scatter_of(grad.load, grad.derivative).value if grad.level is Level.PAIR else grad.level.value


def _belongs(grad: CapturedGrad, kernel: str) -> bool:
    return (grad.level is Level.COL) == (kernel == KEYS)


@dataclass(frozen=True)
class BackwardArguments:
    """Parameters of one backward kernel and of its ``launch``.

    ``call`` holds the host expression for each kernel parameter, ``loose`` the parameters that are not specialised on
    their value; ``types`` the element types of pointers and floats, ``last`` the strides that are usually 1.
    """

    kernel: tuple[str, ...]
    host: tuple[str, ...]
    call: tuple[str, ...]
    loose: tuple[str, ...]
    types: dict[str, str]
    last: frozenset[str]


_SIZES = {"B": "q.shape[0]", "H": "q.shape[1]", "Lq": "q.shape[2]", "Hkv": "k.shape[1]", "Lk": "k.shape[2]"}
_LOOP = {QUERIES: "k", KEYS: "q"}
"""Axis of the inner loop."""
_SCATTERED = ("store", "fixed", "atomic")


def has_diagonals(plan: KernelPlan) -> bool:
    """Whether the queries kernel sums gradients along diagonals."""
    return any(g.level is Level.PAIR and scatter_of(g.load, g.derivative).is_diagonal for g in plan.grads)


def kernel_name(kernel: str) -> str:
    """Return the name of the Triton function of the ``queries`` or the ``keys`` kernel."""
    return f"attention_backward_{kernel}"


class _Parameters:
    """Collects the parameters of a kernel in order."""

    def __init__(self) -> None:
        self.kernel: dict[str, str] = {}
        self.host: list[str] = []
        self.loose: list[str] = []
        self.types: dict[str, str] = {}
        self.last: set[str] = set()

    def add(self, name: str, text: str = "", type: str = "", *, loose: bool = False) -> None:
        """Add a kernel parameter that ``launch`` fills with ``text``; ``type`` as in ``BackwardArguments``."""
        self.kernel[name] = text or name
        self.loose += [name] if loose else []
        self.types |= {name: type} if type else {}

    def operands(self, types: dict[str, str], rows: tuple[str, ...]) -> None:
        """Add tensors; ``rows`` are those [B, H, L, D] with strides."""
        self.host += types
        for name, type_ in types.items():
            self.add(f"{name}_ptr", name, type_)
        for name in rows:
            for d, axis in enumerate("bhnd"):
                self.add(f"{name}_stride_{axis}", f"{name}.stride({d})")
        self.last |= {f"{name}_stride_d" for name in rows}

    def captured(self, tensor: TensorArg) -> None:
        """Add a captured tensor."""
        name = safe_name(tensor.name)
        own = _rename(name)
        self.host.append(own)
        self.add(_rename(f"{name}_ptr"), own, tensor.dtype)
        for d in range(tensor.rank):
            self.add(_rename(f"{name}_stride{d}"), f"{own}.stride({d})")
        for d in range(tensor.rank):
            self.add(_rename(f"{name}_size{d}"), f"{own}.size({d})", loose=True)
        self.last |= {_rename(f"{name}_stride{tensor.rank - 1}")} if tensor.rank else set()

    def gradient(self, name: str, kind: str, rank: int) -> None:
        """Add the buffer of a captured gradient; one that is scattered to is [batch or 1, heads or 1, *shape]."""
        self.host.append(name)
        self.add(f"{name}_ptr", name, "int64" if kind == "fixed" else "float32")
        if kind == "fixed":
            self.host.append(f"{name}_unit")
            self.add(f"{name}_unit", type="float32")
        if kind not in _SCATTERED:
            return
        for d, axis in enumerate("bh"):
            self.add(f"{name}_stride_{axis}", f"{name}.stride({d}) if {name}.shape[{d}] > 1 else 0", loose=True)
        for d in range(rank):
            self.add(f"{name}_stride{d}", f"{name}.stride({d + 2})", loose=True)


def backward_arguments(plan: KernelPlan, kernel: str) -> BackwardArguments:
    """Return the parameters of the ``queries`` or ``keys`` kernel of a backward plan.

    ``launch`` takes the tensors, scale, captured tensors, scalars, sizes the shapes of q and k do not give, the buffers
    of the captured gradients of this kernel, ``shares`` where sums along diagonals are private to a share of the
    queries, and the run table.
    """
    made = _Parameters()
    rows = ("q", "k", "v", "do", *(("o", "dq") if kernel == QUERIES else ("dk", "dv")))
    flat = ("lse", "delta", "dlse") if kernel == QUERIES else ("lse", "delta")
    made.operands(dict.fromkeys(rows, plan.dtype) | dict.fromkeys(flat, "float32"), rows)
    made.host.append("scale")
    made.add("scale", type="float", loose=True)
    for tensor in plan.tensors:
        made.captured(tensor)
    for param in plan.scalars:
        name = _rename(safe_name(param.name))
        made.host.append(name)
        made.add(name, type="float" if param.type is FLOAT else "", loose=True)
    for size in dict.fromkeys(("H", "Hkv", "Lq", "Lk", *plan.sizes)):
        name = _rename(safe_name(size))
        made.host += [] if size in _SIZES else [name]
        made.add(name, _SIZES.get(size, name), loose=True)
    for i, grad in enumerate(plan.grads):
        if _belongs(grad, kernel):
            made.gradient(f"grad{i}", _kind(grad), len(grad.load.indices))
    if kernel == QUERIES and has_diagonals(plan):
        made.host.append("shares")
        made.add("shares", loose=True)
    table = table_arguments(plan, _LOOP[kernel])
    made.host += table
    for name in table:
        made.add(name, type="int32" if name in TABLE[:4] else "", loose=name in TABLE[4:])
    names, texts = tuple(made.kernel), tuple(made.kernel.values())
    return BackwardArguments(names, tuple(made.host), texts, tuple(made.loose), made.types, frozenset(made.last))


def _times(first: str, factor: str) -> str:
    return first if factor == "1.0" else f"{first} * ({factor})"


def _loop(printer: _Printer, section: Section, plan: KernelPlan, mask: Expr | None) -> _Loop:
    printer.used.clear()
    row, col, pair = (_lines(printer, part) for part in (section.row, section.col, section.pair))
    score = "" if plan.score is None else printer.text(plan.score, Level.PAIR)
    if plan.score is not None and plan.level(plan.score) is not Level.PAIR:
        score += f" + tl.zeros([{'BLOCK_N, BLOCK_M' if printer.flipped else 'BLOCK_M, BLOCK_N'}], tl.float32)"
    dscore = "dlogit" if plan.dscore is None else f"dlogit * ({printer.text(plan.dscore, Level.PAIR)})"
    hidden = "" if mask is None else _mask_text(printer, mask)
    for grad in plan.grads:
        printer.text(grad.derivative, Level.PAIR)
        if grad.level is Level.PAIR:
            printer.offsets(grad.load, "grad")
    outer, inner = (col, row) if printer.flipped else (row, col)
    reads = [name in printer.used for name in ("q_idx", "k_idx")]
    reads_outer, reads_inner = reversed(reads) if printer.flipped else reads
    distance = "k_distance" in printer.used
    return _Loop(outer, inner, pair, score, dscore, hidden, reads_outer, reads_inner, distance)


def _grads(printer: _Printer, plan: KernelPlan, kernel: str) -> list[_Grad]:
    out = []
    for i, grad in enumerate(plan.grads):
        if _belongs(grad, kernel):
            kind = _kind(grad)
            offsets = printer.offsets(grad.load, f"grad{i}") if kind in _SCATTERED else []
            value = _times("dlogit", printer.text(grad.derivative, Level.PAIR))
            out.append(_Grad(f"grad{i}", kind, value, offsets, _comment(str(grad.load.tensor))))
    return out


def _context(plan: KernelPlan, config: Config, kernel: str, interpreted: bool) -> dict[str, Any]:
    printer = _Printer(plan, interpreted=interpreted, flipped=kernel == KEYS)
    block_d, block_dv = padded(plan.head_dim), padded(plan.value_dim)
    full = _loop(printer, plan.full, plan, None)
    partial = _loop(printer, plan.partial, plan, plan.mask)
    grads = _grads(printer, plan, kernel)
    context: dict[str, Any] = {
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
        "kernel_name": kernel_name(kernel),
        "title": _comment(f"Attention backward over {kernel} for the program {plan.program.name}"),
        "program_text": _program_lines(plan),
        "about": f"{plan.dtype}, head dimension {plan.head_dim}, value dimension {plan.value_dim}.",
        "key_batch": _scalar(printer.text(plan.key_batch, Level.GRID)),
        "key_head": _scalar(printer.text(plan.key_head, Level.GRID)),
        "scored": plan.score is not None,
        "distance": full.distance or partial.distance,
        "grid_values": _lines(printer, plan.grid),
        "full": full,
        "partial": partial,
        "grads": grads,
        "diagonal": [g for g in grads if g.kind in ("difference", "sum")],
        "scattered": [g for g in grads if not g.summed],
        "bounds": bounds_text(printer, plan.run_bounds(_LOOP[kernel])),
        "arguments": backward_arguments(plan, kernel),
    }
    context["helpers"] = helper_sources(printer.helpers)
    return context


@cache
def _template(kernel: str) -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    return environment.get_template(f"triton_backward_{kernel}.j2")


def _split(line: str) -> str:
    """Give every argument of a long assigned call a line of its own."""
    match = re.fullmatch(r"( *)([\w, ]+ = [\w.]+\()(.*)\)\n", line)
    if len(line) <= LINE + 1 or match is None:
        return line
    indent, head, inside = match.groups()
    depths = list(accumulate((c in "([") - (c in ")]") for c in inside))
    if min(depths) < 0:
        return line
    starts = [0, *(i + 2 for i, c in enumerate(inside) if c == "," and depths[i] == 0), len(inside) + 2]
    parts = [inside[a : b - 2] for a, b in pairwise(starts)]
    if len(parts) == 1:
        return line
    return f"{indent}{head}\n" + "".join(f"{indent}    {part},\n" for part in parts) + f"{indent})\n"


def _emit(plan: KernelPlan, config: Config, kernel: str, interpreted: bool) -> str:
    text = str(_template(kernel).render(c=(context := _context(plan, config, kernel, interpreted)), **context))
    return "".join(_split(_wrapped(line)) for line in text.splitlines(keepends=True))


def emit_queries(plan: KernelPlan, config: Config, *, interpreted: bool = False) -> str:
    """Return the Triton source of the kernel for dq, delta and sums over keys; equal inputs give equal text.

    ``config.block_m`` must be at most ``config.block_n`` where gradients are summed along diagonals.
    """
    return _emit(plan, config, QUERIES, interpreted)


def emit_keys(plan: KernelPlan, config: Config, *, interpreted: bool = False) -> str:
    """Return the Triton source of the kernel for dk, dv and sums over queries; it reads the transposed run map."""
    return _emit(plan, config, KEYS, interpreted)
