"""The backward pass on the C++ target: one fused kernel for dq, dk, dv and the gradients of captured tensors.

Query blocks are walked along the forward run map; weights are recomputed from the saved lse, or from what a plan with a
pullback names. The query blocks of a key head add to dk and dv in a fixed order, each waiting at a key until the one
before is past it, so gradients are the same bits whatever the number of threads and need no buffer but their own. Only
sums that meet in one element at pairs far from each other (a scatter) take turns by whole blocks, with a fixed number
of buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnlang.ir import Expr, Index, Input, Load, Op, postorder
from attnlang.passes.levels import Level
from attnlang.passes.pullback import DP, SETTLED
from attnlang.passes.widths import Width

from .cpp import kernel_text, loop_text
from .cpp_arguments import Arguments, Field, arguments
from .cpp_features import FeaturePrinter, gradients_text, scores_text
from .cpp_printer import CppPrinter, declaration
from .cpp_render import render
from .isa import Isa
from .plan import CapturedGrad, KernelPlan, Section, SweepStep

__all__ = ["ENTRY", "backward_arguments", "emit_backward", "given", "private_axes"]

ENTRY = "attnlang_backward"
"""Name of the exported function."""


@dataclass(frozen=True)
class _GradText:
    """Text for one captured gradient: where it is added up and ``value``, what a pair adds to it."""

    name: str
    level: Level
    value: str
    offset: str
    deposit: str = ""

    @property
    def is_tile(self) -> bool:
        """Whether every pair has an element of its own, so that tiles of pairs are added at once."""
        return bool(self.deposit)

    @property
    def lanes(self) -> bool:
        """Whether it is summed over keys in registers."""
        return self.level in (Level.GRID, Level.ROW)

    @property
    def is_col(self) -> bool:
        return self.level is Level.COL

    @property
    def pointer(self) -> str:
        place = {
            Level.GRID: "head * query_blocks(a) + block",
            Level.ROW: "head * a.n_Lq",
            Level.COL: "head * a.n_Lk",
            Level.PAIR: " + ".join(
                f"{of} * a.{self.name}_{axis}"
                for of, axis in (("key_batch", "b"), ("key_head", "h"), ("at % a.shares", "q"))
            ),
        }
        return f"float *{self.name} = a.{self.name} + {place[self.level]};"

    def update(self, masked: bool) -> str:
        value = f"(seen ? {self.value} : vfloat{{}})" if masked else self.value
        if self.is_tile:
            return f"{self.name}_tile[j * VECTORS + v] = {value};"
        if self.level is Level.PAIR:
            return f"scatter({self.name}, {self.offset}, {value});"
        return f"{self.name}_sum{'' if self.is_col else '[w]'} += {value};"

    @property
    def store(self) -> str:
        body = f"{self.name}[first + w * LANES + lane] = {self.name}_sum[w][lane];"
        if self.level is Level.GRID:
            return f"for (int w = 0; w < ROW_VECTORS; ++w) *{self.name} += total({self.name}_sum[w]);"
        tail = "if (first + w * LANES + lane < a.n_Lq)"
        return f"for (int w = 0; w < ROW_VECTORS; ++w) for (int lane = 0; lane < LANES; ++lane) {tail} {body}"


@dataclass(frozen=True)
class _Section:
    """Text of the key loop of one kind of tile: ``score`` and ``dscore`` of softmax, ``weight`` and ``draw`` of a last
    pass with a pullback, ``sums`` of the others."""

    col: list[str]
    pair: list[str]
    mask: str
    uses_key: bool
    columns: tuple[str, ...] = ()
    score: str = ""
    dscore: str = ""
    weight: str = ""
    draw: str = ""
    sums: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Sweep:
    """Text of a pass over the keys before the last one."""

    names: tuple[str, ...]
    full: _Section
    partial: _Section
    uses_dp: bool
    after: tuple[str, ...]


def private_axes(load: Load) -> frozenset[str]:
    """Return the axes on which two pairs may meet in one element of the tensor ``load`` reads.

    An index that is exactly ``b``, ``h`` or ``q`` keeps apart what differs there; every other axis needs buffers of its
    own for work that runs at the same time.
    """
    plain = {index.axis for index in load.indices if isinstance(index, Index)}
    return frozenset("bhq") - plain


def own_elements(load: Load) -> tuple[int, int] | None:
    """Return the dimensions that q and k index alone, where no other index of ``load`` depends on the pair."""
    plain = {index.axis: n for n, index in enumerate(load.indices) if isinstance(index, Index)}
    if not {"q", "k"} <= plain.keys():
        return None
    others = [index for n, index in enumerate(load.indices) if n not in (plain["q"], plain["k"])]
    if any(isinstance(n, Index) and n.axis in "qk" for n in postorder(*others)):
        return None
    return plain["q"], plain["k"]


def given(plan: KernelPlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the row inputs and of the column inputs that the kernel of ``plan`` reads, [B, H, Lq] and [B, H, Lk]."""
    if plan.pull is None:
        return (), ()
    wanted = {grad.load.tensor for grad in plan.grads}
    return plan.pull.rows(wanted), plan.pull.columns(wanted)


def backward_arguments(plan: KernelPlan, isa: Isa) -> Arguments:
    """Return the argument record of the backward kernel: the forward record and what gradients need."""
    base = arguments(plan, isa)
    rows, columns = given(plan)
    extra = [Field("dlse", "const float *", ("pointer", "dlse"))] if plan.pull is None else []
    extra += [Field(f"r_{name}", "const float *", ("pointer", name)) for name in (*rows, *columns)]
    extra += [
        Field("dout", "const void *", ("pointer", "dout")),
        Field("dq", "void *", ("pointer", "dq")),
        Field("dk", "float *", ("pointer", "dk")),
        Field("dv", "float *", ("pointer", "dv")),
        Field("turns", "void *", ("pointer", "turns")),
        Field("shares", "int64", ("extent", "shares", "0")),
    ]
    for i, grad in enumerate((*plan.grads, *plan.feature_grads)):
        extra.append(Field(f"d{i}", "float *", ("pointer", f"d{i}")))
        if grad.level is Level.PAIR:
            # a buffer is [batch shares, head shares, query shares, *shape]; shares that need no buffer have stride 0
            extra += [Field(f"d{i}_{axis}", "int64", ("stride", f"d{i}", str(n))) for n, axis in enumerate("bhq")]
            rank = len(grad.load.indices)
            extra += [Field(f"d{i}_s{n}", "int64", ("stride", f"d{i}", str(n + 3))) for n in range(rank)]
    return Arguments((*base.fields, *extra), base.locals)


class _Printer(FeaturePrinter):
    def input(self, node: Input, at: Level) -> str:
        return self.spread(node.name, node, at) if node.axes == "bhk" else super().input(node, at)

    def operation(self, node: Op, at: Level) -> str:
        if at is Level.PAIR and self._is_shifted(node):
            score, shift = (self.text(a, at) for a in node.args[0].args)
            return f"weight(({score} - {shift}) * UNIT)"
        return super().operation(node, at)

    def _is_shifted(self, node: Op) -> bool:
        """Whether ``node`` is the exponential of the score less its maximum, for which the forward pass has its own."""
        match node:
            case Op(op="exp", operands=(Op(op="sub", operands=(score, Input(name=name))),)):
                pull, known = self.plan.pull, score is self.plan.program.score
                return pull is not None and known and name in (pull.stream.shift, SETTLED.name)
        return False

    def offset(self, load: Load, buffer: str) -> str:
        """Offsets of the element ``load`` reads, one a lane, in a buffer with strides of its own."""
        terms = []
        for n, text in enumerate(self._places(load, Level.PAIR)):
            wide = text if self.plan.width(load.indices[n]) is Width.I64 else f"to<vint64>({text})"
            terms.append(f"{wide} * a.{buffer}_s{n}")
        return " + ".join(terms)

    def deposit(self, load: Load, buffer: str, axes: tuple[int, int]) -> str:
        """Statement that adds a tile of pairs to the buffer; ``axes`` are the dimensions of queries and of keys."""
        texts = self._places(load, Level.GRID)
        base = "".join(f" + (int64){text} * a.{buffer}_s{n}" for n, text in enumerate(texts) if n not in axes)
        places = ", ".join(f"a.{buffer}_s{n}, a.t_{load.tensor}_n{n}" for n in axes)
        rows = "first + part * PART_ROWS, a.n_Lq, start, count"
        return f"deposit({buffer}{base}, {places}, {rows}, (const float *){buffer}_tile);"

    def _places(self, load: Load, level: Level) -> list[str]:
        """The indices of ``load``, each clamped into its dimension."""
        return [
            ""
            if level is Level.GRID and self.plan.level(index) is not Level.GRID
            else self.clamped(index, level, level is Level.PAIR, f"a.t_{load.tensor}_n{n}", low, high)
            for n, (index, (low, high)) in enumerate(zip(load.indices, self.plan.load_guards(load), strict=True))
        ]


def _grad(printer: _Printer, grad: CapturedGrad, number: int) -> _GradText:
    name, offset, deposit = f"d{number}", "", ""
    if grad.level is Level.PAIR:
        axes = own_elements(grad.load)
        offset = "" if axes else printer.offset(grad.load, name)
        deposit = printer.deposit(grad.load, name, axes) if axes else ""
    value = printer.text(grad.derivative, Level.PAIR)
    return _GradText(name, grad.level, f"dlogit * ({value})" if printer.plan.pull is None else value, offset, deposit)


def _read(section: Section, *roots: Expr | None) -> set[Expr]:
    """Every expression that the statements of a section and ``roots`` contain."""
    return set(postorder(*(v.expr for v in (*section.col, *section.pair)), *(e for e in roots if e is not None)))


def _reads_key(found: set[Expr]) -> bool:
    return any(isinstance(n, Index) and n.axis == "k" for n in found)


def _section(printer: CppPrinter, partial: bool) -> _Section:
    """Text of the last pass over the keys, for tiles with hidden pairs or without."""
    plan = printer.plan
    section, mask = (plan.partial, plan.mask) if partial else (plan.full, None)
    added = tuple(e for grad in plan.grads for e in (grad.derivative, *grad.load.indices))
    if plan.pull is not None:
        weight, draw = plan.pull.weight, plan.pull.draw
        return replace(
            _pulled(printer, section, mask, partial, weight, draw, *added),
            weight="" if weight is None else printer.text(weight, Level.PAIR),
            draw=printer.text(draw, Level.PAIR),
        )
    text = loop_text(printer, section, plan.score, mask)
    dtext = "dlogit" if plan.dscore is None else f"dlogit * ({printer.text(plan.dscore, Level.PAIR)})"
    uses_key = _reads_key(_read(section, plan.score, mask, plan.dscore, *added))
    return _Section(text.col, text.pair, text.mask, uses_key, score=text.score, dscore=dtext)


def _pulled(printer: CppPrinter, section: Section, mask: Expr | None, partial: bool, *roots: Expr | None) -> _Section:
    """The statements of a section of a plan with a pullback, and its mask, which leaves out lanes without a query."""
    found = _read(section, mask, *roots)
    col, pair = ([declaration(printer, v) for v in values] for values in (section.col, section.pair))
    read = {n.name for n in found if isinstance(n, Input)}
    columns = tuple(name for name in given(printer.plan)[1] if name in read)
    text = "" if not partial else "exists[w]" if mask is None else f"exists[w] & {printer.text(mask, Level.PAIR)}"
    return _Section(col, pair, text, _reads_key(found), columns)


def _sweep(printer: CppPrinter, step: SweepStep) -> _Sweep:
    roots = tuple(value for _, value in step.sums)
    sums = tuple((name.name, printer.text(value, Level.PAIR)) for name, value in step.sums)
    full, partial = (
        replace(_pulled(printer, section, mask, hides, *roots), sums=sums)
        for section, mask, hides in ((step.full, None, False), (step.partial, printer.plan.mask, True))
    )
    after = tuple(f"{v.name}[w] = {printer.value(v)};  // {printer.source(v.expr)}" for v in step.after)
    return _Sweep(tuple(name for name, _ in sums), full, partial, DP in set(postorder(*roots)), after)


def emit_backward(plan: KernelPlan, isa: Isa) -> str:
    """Return the C++ source of the backward kernel of ``plan`` for ``isa``; equal inputs give equal text."""
    printer = _Printer(plan)
    full, partial = _section(printer, partial=False), _section(printer, partial=True)
    sweeps = [_sweep(printer, step) for step in plan.sweeps]
    grads = [_grad(printer, g, i) for i, g in enumerate(plan.grads)]
    record = backward_arguments(plan, isa)
    sizes = [line for line in record.locals if " n_" in line]
    rows, columns = given(plan)
    scores, slopes = scores_text(printer), gradients_text(printer)
    text = kernel_text(printer, isa)
    return render(
        "cpp_backward.j2",
        **text,
        arguments=record,
        size_locals=sizes,
        full=full,
        partial=partial,
        grads=grads,
        scores=scores,
        slopes=slopes,
        scatters=any(g.level is Level.PAIR for g in grads),
        softmax=plan.pull is None,
        has_values=plan.pull is None or plan.pull.weight is not None,
        given_rows=rows,
        given_columns=columns,
        sweeps=sweeps,
        sums="",  # what blocks of the forward pass hold
        held=(),
        entry=ENTRY,
    )
