"""The kernel plan: everything about a kernel that does not depend on the target.

An Attend stage becomes statements in single assignment form, each at the outermost level where it can be computed, in
two sections: what a FULL tile needs (the score) and what a PARTIAL tile needs (score and mask). Emitters print a plan;
they decide tiles, registers and instructions, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from attnlang.ir import (
    FLOAT,
    KEY_ADDRESS,
    Const,
    Expr,
    Index,
    Input,
    Load,
    Map,
    Param,
    Program,
    Size,
    canonical,
    format_expr,
    postorder,
    substitute,
)
from attnlang.ir.build import TRUE
from attnlang.ir.build import s as RAW_SCORE
from attnlang.passes.bodies import Body, body_of, per_feature
from attnlang.passes.columns import column_values
from attnlang.passes.derivatives import derivatives
from attnlang.passes.levels import Level, levels
from attnlang.passes.pullback import Pullback, Sweep, pullback, saving
from attnlang.passes.simplify import map_program, simplify
from attnlang.passes.streaming import Accumulator, Streaming, streaming
from attnlang.passes.widths import Width, assumptions, widths

from .facts import Facts
from .features import body_roots, feature_grads, statements
from .naming import names as value_names
from .plan_parts import CapturedGrad, Section, Step, SweepStep, TensorArg, Value
from .rows import Covered, RowsPlan, rows_plan
from .runs import RunBounds, forms_of, ranges_of, run_bounds

__all__ = ["CapturedGrad", "KernelPlan", "Section", "Step", "SweepStep", "TensorArg", "Value", "make_plan"]


@dataclass(frozen=True)
class KernelPlan(Facts):
    """One pass over the pairs of an Attend stage, target-free.

    ``outer`` and ``loop`` name the axes of the parallel and the sequential loop. ``grid`` values are computed once per
    (b, h), ``row`` values once per query; ``full`` and ``partial`` inside the key loop. ``score`` is None where the
    score is the raw score, ``mask`` None where every pair is visible. ``sizes`` lists the sizes expressions read, in
    argument order; ``scalars`` likewise. Key and value addresses are GRID-level expressions for batch and head, and in
    forward plans a COL-level one for the row, ``key_row``, None where key k is row k; ``key_values`` are the statements
    that it needs. ``query_row`` is the ROW-level row of a query and of what is made for it, None where that is q.

    ``runs`` holds the bounds a kernel computes its runs from, by the axis of its inner loop; a kernel over an axis
    without them reads a run table.

    A forward plan says in ``stream`` what is accumulated and made of it, and in ``steps`` the statements of every pass.

    A backward plan of softmax attention has ``dscore``, the derivative of the modified score with respect to the raw
    one (None where it is 1). Any other has ``pull``, whose expressions say all there is about a pair, and ``sweeps``,
    the passes before the last; ``score`` is then None. Both have ``grads``, one entry for each load of a captured
    tensor that needs a gradient.

    ``body`` says how the raw score comes of the features of two rows, None where it is their dot product. ``features``
    are the statements of the loop over features, at the levels they have elsewhere (those that do not differ between
    features are among ``row`` as well). ``feature_grads`` are the gradients of what the body reads of captured tensors.

    ``before`` makes the rows of q that the kernel starts from, ``after`` the rows that it writes from those it has.

    A plan of the sums over queries has in ``columns`` what a pair brings to each; the rows are known by then.
    """

    program: Program
    dtype: str
    head_dim: int
    value_dim: int
    tensors: tuple[TensorArg, ...]
    scalars: tuple[Param, ...]
    sizes: tuple[str, ...]
    grid: tuple[Value, ...]
    row: tuple[Value, ...]
    full: Section
    partial: Section
    score: Expr | None
    mask: Expr | None
    key_batch: Expr
    key_head: Expr
    key_row: Expr | None = None
    key_values: tuple[Value, ...] = ()
    query_row: Expr | None = None
    dscore: Expr | None = None
    grads: tuple[CapturedGrad, ...] = ()
    runs: tuple[RunBounds, ...] = ()
    stream: Streaming | None = None
    steps: tuple[Step, ...] = ()
    pull: Pullback | None = None
    sweeps: tuple[SweepStep, ...] = ()
    columns: tuple[tuple[Accumulator, Expr], ...] = ()
    body: Body | None = None
    features: tuple[Value, ...] = ()
    feature_grads: tuple[CapturedGrad, ...] = ()
    before: RowsPlan | None = None
    after: RowsPlan | None = None
    direction: str = "forward"
    wide: bool = False
    outer: str = "q"
    loop: str = "k"
    names: Mapping[Expr, str] = field(default_factory=dict, compare=False, repr=False)
    node_levels: Mapping[Expr, Level] = field(default_factory=dict, compare=False, repr=False)
    node_widths: Mapping[Expr, Width] = field(default_factory=dict, compare=False, repr=False)
    bounds: Mapping[Expr, tuple[int | None, int | None]] = field(default_factory=dict, compare=False, repr=False)

    def run_bounds(self, loop: str) -> RunBounds | None:
        """The bounds of runs along ``loop``, None where a kernel over that axis reads a run table."""
        return next((r for r in self.runs if r.loop == loop), None)

    def run_values(self, runs: RunBounds) -> tuple[Value, ...]:
        """Statements that the bounds need, once for each block of rows, beside those of ``grid``."""
        known = {v.expr for v in self.grid}
        needed = (n for n in postorder(*runs.exprs) if n in self.names and n not in known)
        return tuple(Value(self.names[n], n, Level.GRID) for n in needed)

    @property
    def plain(self) -> bool:
        """Whether a forward kernel that knows nothing but the two sums of softmax, o and lse can run this plan."""
        return self.stream is not None and self.program.standard

    @property
    def softmax(self) -> bool:
        """Whether such a kernel can run this plan if it makes its queries and changes its rows as the plan says."""
        return self.stream is not None and self.program.attend.standard

    @property
    def maps(self) -> tuple[RowsPlan, ...]:
        """The rows stages that the kernel takes in."""
        return tuple(m for m in (self.before, self.after) if m is not None)

    @property
    def all_tensors(self) -> tuple[TensorArg, ...]:
        """The captured tensors of the kernel and of ``maps``."""
        return tuple(dict.fromkeys((*self.tensors, *(t for m in self.maps for t in m.tensors))))

    @property
    def all_scalars(self) -> tuple[Param, ...]:
        """The parameters of the kernel and of ``maps``."""
        return tuple(dict.fromkeys((*self.scalars, *(p for m in self.maps for p in m.scalars))))

    @property
    def all_sizes(self) -> tuple[str, ...]:
        """The sizes that expressions of the kernel and of ``maps`` read."""
        return tuple(dict.fromkeys((*self.sizes, *(name for m in self.maps for name in m.sizes))))

    @property
    def in_order(self) -> bool:
        """Whether query q is row q and key k is row k."""
        return self.query_row is None and self.key_row is None

    @property
    def default_heads(self) -> bool:
        """Whether batch element and head of keys are the usual ones, which exist."""
        return (self.key_batch, self.key_head) == (KEY_ADDRESS.batch, simplify(KEY_ADDRESS.head))

    @property
    def binary(self) -> bool:
        """Whether kernels may hold scores times log2(e): nothing but the shift and its exponential reads them."""
        if self.pull is not None:
            return False
        if self.score is not None or self.stream is None:
            return self.score is None
        values = [a.value for a in self.stream.accumulators if a.name != self.stream.shift]
        reads = any(isinstance(n, Input) and n.name in ("s", "raw") for n in postorder(*values))
        return self.stream.shift is not None and len(self.steps) == 1 and not reads

    @property
    def digest(self) -> str:
        """Stable hash of everything the plan says, for cache keys."""
        dtypes = ",".join(f"{t.name}:{t.dtype}:{t.rank}" for t in self.tensors)
        wanted = ",".join(format_expr(g.load) for g in (*self.grads, *self.feature_grads))
        kind = f"{self.direction}:{wanted}|{self.dtype}|{self.head_dim}|{self.value_dim}|{dtypes}|{self.wide}"
        rows = "|".join("" if e is None else format_expr(e) for e in (self.query_row, self.key_row))
        maps = "|".join("" if p is None else p.digest for p in (self.before, self.after))
        text = f"{canonical(self.program)}|{kind}|{'|'.join(map(str, self.runs))}|{rows}|{maps}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _find(kind: type, *roots: Expr) -> list[Expr]:
    return [n for n in postorder(*roots) if isinstance(n, kind)]


def _pulled_grads(pull: Pullback, wanted: Iterable[str]) -> tuple[CapturedGrad, ...]:
    found = pull.captured(wanted)
    level_of = levels(*(load for load, _ in found))
    return tuple(CapturedGrad(load, value, level_of[load]) for load, value in found)


def _captured_grads(program: Program, wanted: Iterable[str]) -> tuple[CapturedGrad, ...]:
    loads = [n for n in _find(Load, program.score) if isinstance(n, Load) and n.tensor in set(wanted)]
    partials = derivatives(program.score, loads)
    level_of = levels(*loads)
    return tuple(CapturedGrad(n, partials[n], level_of[n]) for n in loads)


def _pair_roots(stream: Streaming) -> tuple[Expr, ...]:
    return tuple(a.value for a in stream.accumulators)


def _row_roots(stream: Streaming) -> tuple[Expr, ...]:
    settled = () if stream.settled is None or len(stream.passes) == 1 else (stream.settled,)
    return (*settled, *(out.value for out in stream.outputs))


def _passes(stream: Streaming | None, pull: Pullback | None, nodes: Iterable[Expr]) -> dict[Expr, int]:
    """After how many passes each row value is known; 0 for everything that streams by."""
    found = {a.name: i + 1 for i, step in enumerate(stream.passes if stream else ()) for a in step}
    found |= {name.name: i + 1 for i, sweep in enumerate(pull.sweeps if pull else ()) for name, _ in sweep.sums}
    level_of = levels(*nodes)
    out: dict[Expr, int] = {}
    for node in postorder(*nodes):
        if isinstance(node, Input):
            out[node] = found.get(node.name, 0)
        else:
            out[node] = max((out[a] for a in node.args), default=0)
    return {n: out[n] if level_of[n] is Level.ROW else 0 for n in nodes}


def make_plan(
    program: Program,
    *,
    dtype: str,
    head_dim: int,
    value_dim: int,
    storage: Mapping[str, str],
    wide: bool = False,
    backward: bool = False,
    saves: bool = False,
    columns: bool = False,
    captured_grads: Iterable[str] = (),
    closed: Iterable[str] = (),
    order: tuple[Expr | None, Expr | None] = (None, None),
    covered: frozenset[Covered] = frozenset(),
) -> KernelPlan:
    """Plan the forward (or backward) pass of a specialised program with one Attend stage.

    In a forward pass a rows stage before it makes the queries, and one after it changes the rows of its output;
    ``covered`` as :func:`.rows.rows_plan` takes it.

    ``dtype`` is that of q, k, v and the output; ``storage`` maps captured tensors to dtype names (``"int64"``).
    ``wide`` allows lengths and int parameters of 2**30 and above at some cost. ``captured_grads`` names the captured
    float tensors a backward pass must give gradients for; with ``saves`` a forward pass also gives what a backward pass
    that is not softmax attention's starts from. ``columns`` asks instead for the sums over queries alone, by a kernel
    with keys outside that starts from the same. ``closed`` names the loop axes along which kernels compute
    their run bounds where the mask has a closed form; whoever launches them checks that it holds. ``order`` says for a
    forward pass where the rows of query slot q and of key slot k are, None where they are in order.

    Raises:
        Unstreamable: the stage has something that :mod:`attnlang.passes.streaming` cannot accumulate.
    """
    program, captured_grads = map_program(program, simplify), tuple(captured_grads)
    (term,) = program.attend.terms
    score, mask = program.score, program.mask
    batch, head, row = term.right.address
    addresses = (batch, simplify(head))
    query_row, place = order
    row = row if place is None else substitute(row, {Index("k"): place})
    key_row = None if row is Index("k") or backward or columns else simplify(row)
    pull = pullback(program.attend) if backward and not program.standard else None
    dscore = derivatives(score, (RAW_SCORE,))[RAW_SCORE] if backward and pull is None else None
    sums = column_values(streaming(program.attend), score) if columns else ()
    grads: tuple[CapturedGrad, ...] = ()
    score_roots: tuple[Expr, ...] = tuple(value for _, value in sums)
    if sums:
        score = RAW_SCORE
    elif pull is None:
        grads = _captured_grads(program, captured_grads) if backward else ()
        score_roots = (score, *((dscore,) if dscore is not None else ()), *(g.derivative for g in grads))
    else:
        score, grads = RAW_SCORE, _pulled_grads(pull, captured_grads)
        score_roots = (pull.draw, *(() if pull.weight is None else (pull.weight,)), *(g.derivative for g in grads))
    # the indices of a scattered gradient are needed as values, like any other pair expression
    score_roots += tuple(i for g in grads if g.level is Level.PAIR for i in g.load.indices)
    swept = () if pull is None else tuple(e for sweep in pull.sweeps for _, e in sweep.sums)
    hooks = (*score_roots, *swept, mask)
    stream = None if backward or columns else streaming(program.attend)
    if stream is not None and saves:
        stream = saving(stream)
    made = () if stream is None else (*_pair_roots(stream), *_row_roots(stream))
    moved = tuple(e for e in (key_row, query_row) if e is not None)
    body = body_of(term)
    through = feature_grads(body, captured_grads) if backward else ()
    inner = body_roots(body, through, backward=backward)
    roots = (*hooks, *made, *addresses, *moved, *inner)
    forms = forms_of(program, closed)
    bounds = assumptions((*roots, *(e for form in forms for e in form.exprs)), storage, wide=wide)
    if forms:
        bounds |= ranges_of(forms, bounds, wide=wide)
    runs = tuple(run_bounds(form, bounds) for form in forms)
    ends = tuple(e for r in runs for e in r.exprs)
    roots = (*roots, *ends)
    level_of = levels(*roots)

    used = {n.tensor for n in _find(Load, *roots) if isinstance(n, Load)}
    read = {n.name for n in _find(Param, *roots) if isinstance(n, Param)}
    tensors = tuple(TensorArg(t.name, t.type, storage[t.name], len(t.shape)) for t in program.tensors if t.name in used)
    scalars = tuple(Param(p.name, p.type) for p in program.scalars if p.name in read)
    sizes = tuple(dict.fromkeys(n.name for n in _find(Size, *roots) if isinstance(n, Size)))

    taken = (*(t.name for t in tensors), *(p.name for p in scalars), *sizes)
    named = (*hooks, *made, *moved, *inner)
    inside = per_feature(*inner)
    names = value_names(taken, named, runs, level_of)
    known_after = _passes(stream, pull, names)

    stages = program.stages
    at = stages.index(program.attend)
    before, after = (
        (
            rows_plan(program, stage, storage, wide=wide, covered=covered) if isinstance(stage, Map) else None
            for stage in (stages[at - 1] if at else None, stages[at + 1] if at + 1 < len(stages) else None)
        )
        if not (backward or columns)
        else (None, None)
    )

    def values(level: Level, of: tuple[Expr, ...], after: int | None = 0) -> tuple[Value, ...]:
        needed = set(postorder(*of))
        return tuple(
            Value(name, node, level)
            for node, name in names.items()
            if level_of[node] is level and node in needed and node not in inside and after in (None, known_after[node])
        )

    def section(of: tuple[Expr, ...]) -> Section:
        col, pair = (values(x, of) for x in (Level.COL, Level.PAIR))
        return Section(col, pair, values(Level.ROW, of, 0 if pull is None else None))

    def sweep(number: int, found: Sweep) -> SweepStep:
        of = tuple(e for _, e in found.sums)
        return SweepStep(found.sums, section(of), section((*of, mask)), values(Level.ROW, hooks, number + 1))

    def step(number: int, found: tuple[Accumulator, ...]) -> Step:
        of = tuple(a.value for a in found)
        return Step(found, section(of), values(Level.ROW, made, number + 1))

    return KernelPlan(
        program=program,
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim,
        tensors=tensors,
        scalars=scalars,
        sizes=sizes,
        grid=values(Level.GRID, named),
        row=values(Level.ROW, named),
        full=section(score_roots),
        partial=section((*score_roots, mask)),
        score=None if score is RAW_SCORE else score,
        mask=None if mask is TRUE else mask,
        key_batch=addresses[0],
        key_head=addresses[1],
        key_row=key_row,
        key_values=values(Level.COL, moved),
        query_row=query_row,
        dscore=None if dscore is Const(1.0, FLOAT) else dscore,
        grads=grads,
        runs=runs,
        stream=stream,
        steps=() if stream is None else tuple(step(i, found) for i, found in enumerate(stream.passes)),
        pull=pull,
        sweeps=() if pull is None else tuple(sweep(i, found) for i, found in enumerate(pull.sweeps)),
        columns=sums,
        body=body,
        features=statements(inner, names, level_of),
        feature_grads=through,
        before=before,
        after=after,
        direction="backward" if backward else "columns" if columns else "saving" if saves else "forward",
        wide=wide,
        names=names,
        node_levels=level_of,
        node_widths=widths(roots, bounds),
        bounds=bounds,
    )
