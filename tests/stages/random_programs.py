"""Random programs over the whole language: any score, normaliser, weight function and outputs that go together."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import torch

from attnlang.ir import (
    BOOL,
    DEFAULT_OUTPUTS,
    FLOAT,
    INT,
    Attend,
    Branch,
    Dot,
    Expr,
    Input,
    Load,
    Map,
    Normalizer,
    Operand,
    Output,
    Param,
    Pool,
    Program,
    Select,
    Size,
    Stage,
    Stat,
    dropout,
    postorder,
    stat,
)
from attnlang.ir.build import FALSE, TRUE, all_of, any_of, b, cdiv, const, h, k, op, q, s
from attnlang.ir.stages import (
    BODY_LEFT,
    BODY_RIGHT,
    KEY,
    KEY_ADDRESS,
    QUERY,
    QUERY_ADDRESS,
    RAW,
    SOFTMAX,
    VALUE,
    WEIGHT,
)

from .random_draws import COL, HEAD, OFFSET, ROW, SCALARS, TABLE, TENSORS, Choice
from .random_rows import D, epilogues, prologues, reading

OUT = DEFAULT_OUTPUTS[0]


def _mask(draw: Choice) -> Expr:
    parts = [
        op("le", k, op("add", q, draw.random.randint(-3, 9))),
        op("lt", op("abs", op("sub", q, k)), draw.random.randint(1, 12)),
        op("ne", op("mod", k, draw.random.randint(2, 4)), 1),
        op("eq", Load("doc", (b, op("min", q, op("sub", Size("Lk"), 1))), INT), Load("doc", (b, k), INT)),
        op("gt", op("add", q, h), 2),
        op("gt", COL, -0.5),
        op("le", op("sub", k, q), Param("reach", INT)),
    ]
    chosen = draw.some(parts, 3)
    return all_of(*chosen) if draw.chance(0.6) else any_of(*chosen) if chosen else TRUE


def _score(draw: Choice, two: bool) -> Expr:
    t: Expr = Input("t", FLOAT)
    score: Expr = s
    for change in draw.some(("bias", "scale", "cap", "abs", "table", "col", "heat", "term"), 3):
        if change == "bias":
            score = op("add", score, op("mul", HEAD, op("sub", k, q)))
        elif change == "scale":
            score = op("mul", score, op("add", op("sigmoid", ROW), draw.number()))
        elif change == "cap":
            score = op("mul", op("tanh", op("div", score, 3.0)), 3.0)
        elif change == "abs":
            score = op("abs", score)
        elif change == "table":
            score = op("add", score, TABLE)
        elif change == "col":
            score = op("sub", score, COL)
        elif change == "heat":
            score = op("mul", score, op("add", Load("heat", (), FLOAT), Param("strength", FLOAT)))
        elif two:
            score = op("add", score, op("mul", t, 0.3))
    return score


def _shifted() -> Expr:
    return op("exp", op("sub", s, stat("m")))


def _sink(draw: Choice) -> Normalizer:
    at = draw.one((HEAD, const(0.0), op("add", HEAD, ROW)))
    stats = (Stat("m", "max", s, at), Stat("l", "sum", _shifted(), op("exp", op("sub", at, stat("m")))))
    return Normalizer("sink", stats, op("div", _shifted(), stat("l")))


def _elementwise(draw: Choice) -> Normalizer:
    square = op("mul", op("max", s, 0.0), op("max", s, 0.0))
    basis = draw.one((op("sigmoid", op("add", s, HEAD)), op("max", s, 0.0), square, s, op("tanh", s)))
    divisor = draw.one(("none", "count", "abs", "sqrt"))
    if divisor == "none":
        return Normalizer("elementwise", (), basis)
    if divisor == "abs":
        total = Stat("l", "sum", op("abs", basis))
        return Normalizer("elementwise", (total,), op("div", basis, op("add", stat("l"), 0.5)))
    count = Stat("n", "sum", const(1.0))
    by = stat("n") if divisor == "count" else op("sqrt", stat("n"))
    return Normalizer("elementwise", (count,), op("div", basis, by))


def _moments(draw: Choice) -> Normalizer:
    stats = (Stat("n", "sum", const(1.0)), Stat("a", "sum", s), Stat("c", "sum", op("mul", s, s)))
    mean = op("div", stat("a"), stat("n"))
    variance = op("sub", op("div", stat("c"), stat("n")), op("mul", mean, mean))
    scaled = op("div", op("sub", s, mean), op("sqrt", op("add", op("max", variance, 0.0), 0.1)))
    return Normalizer("moments", stats, op("add", scaled, draw.number()))


def _spread(draw: Choice) -> Normalizer:
    """Scores between the least and the largest of their row; gradients pass through both."""
    least = Stat("least_score", "min", s, draw.one((None, ROW)))
    stats = (least, Stat("reach_up", "max", op("sub", s, stat("least_score"))))
    return Normalizer("spread", stats, op("div", op("sub", s, stat("least_score")), op("add", stat("reach_up"), 1.0)))


def _sparse(draw: Choice) -> Normalizer:
    over = op("max", op("sub", s, stat("tau")), 0.0)
    start = Stat("m", "max", s)
    if draw.chance(0.5):
        return Normalizer("sparse", (start, Stat("tau", "root", over, op("sub", stat("m"), 1.0))), over)
    half = op("max", op("sub", op("mul", s, 0.5), stat("tau")), 0.0)
    seed = op("sub", op("mul", stat("m"), 0.5), 1.0)
    return Normalizer("sparse", (start, Stat("tau", "root", op("mul", half, half), seed)), op("mul", half, half))


def _grouped(draw: Choice) -> Normalizer:
    stats = (Stat("m", "max", s), Stat("g", "sum", _shifted(), grouped=True), Stat("l", "sum", _shifted()))
    weight = op("div", op("mul", _shifted(), op("add", stat("g"), 0.5)), stat("l"))
    return Normalizer("grouped", stats, weight)


def _within(draw: Choice) -> Normalizer:
    """A softmax within every group; each pair is in one."""
    top = Stat("top", "max", s, grouped=True)
    own = op("exp", op("sub", s, stat("top")))
    part = Stat("part", "sum", own, draw.one((None, const(0.25))), grouped=True)
    return Normalizer("within", (top, part), op("div", own, stat("part")))


def _group(draw: Choice, normalizer: Normalizer) -> Expr | None:
    if not any(st.grouped for st in normalizer.stats):
        return None
    if normalizer.name == "within":
        return draw.one((op("mod", k, 3), op("min", op("floordiv", op("abs", op("sub", q, k)), 4), 2)))
    return op("sub", op("mod", k, 4), 1)


def _weight(draw: Choice) -> Expr | None:
    gate: list[Expr | None] = [
        None,
        op("mul", WEIGHT, HEAD),
        op("mul", WEIGHT, op("sign", RAW)),
        op("where", op("lt", k, 5), WEIGHT, op("mul", WEIGHT, ROW)),
        op("mul", WEIGHT, op("exp", op("mul", -0.1, op("abs", op("sub", q, k))))),
        op("mul", WEIGHT, WEIGHT),
        op("add", op("mul", 0.5, WEIGHT), op("where", op("eq", q, k), 0.5, 0.0)),
        dropout(WEIGHT, 0.3, 5),
    ]
    return draw.one(gate)


def _outputs(draw: Choice, normalizer: Normalizer, two: bool, several: bool) -> tuple[Output, ...]:
    found = [OUT] if draw.chance(0.85) else []
    row_stats = [st for st in normalizer.stats if not st.grouped]
    extra = [
        Output("received", op("mul", WEIGHT, ROW), over="q"),
        Output("energy", op("mul", WEIGHT, s)),
        Output("largest", WEIGHT, monoid="max", empty=-2.0),
        Output("least", s, monoid="min"),
        Output("best", WEIGHT, monoid="argmax"),
        Output("mass", WEIGHT, key=(op("mod", k, 4),), extents=(const(3),)),
        Output(
            "blocks", WEIGHT, over="qk", key=(op("floordiv", q, 4), op("floordiv", k, 8)), extents=(const(4), const(2))
        ),
        Output("tops", s, over="q", monoid="max", key=(op("mod", q, 3),), extents=(const(3),), empty=-5.0),
        Output("seen_rows", WEIGHT, QUERY, over="q"),
        Output("total", op("mul", op("tanh", s), WEIGHT), over="qk"),
        Output("map", WEIGHT, over=""),
        Output("near", WEIGHT, key=(op("abs", op("sub", q, k)),), extents=(const(3),)),
        Output(
            "offsets_of_rows",
            op("mul", WEIGHT, s),
            over="qk",
            key=(op("mod", q, 3), op("sub", OFFSET, 2)),
            extents=(const(2), const(4)),
        ),
        Output("bucket_rows", WEIGHT, VALUE, key=(op("mod", k, 2),), extents=(const(2),)),
    ]
    if row_stats:
        extra.append(Output("statistic", op("mul", stat(draw.one(row_stats).name), 0.5), over="", empty=3.0))
    if two:
        extra.append(Output("offsets", WEIGHT, Operand("rel", (OFFSET,))))
    found += draw.some(extra, draw.one((0, 1) if several else (0, 1, 3)))
    return tuple(found) or (OUT,)


MAKERS: tuple[Callable[[Choice], Normalizer], ...] = (
    lambda draw: SOFTMAX,
    _sink,
    _elementwise,
    _moments,
    _spread,
    _sparse,
    _grouped,
    _within,
)


def _further(draw: Choice, number: int) -> tuple[Branch, tuple[Output, ...]]:
    """Branch ``number`` of a stage, and what is summed in it."""
    normalizer = draw.one((SOFTMAX, SOFTMAX, _sink(draw), _elementwise(draw)))
    outputs = [Output(f"other{number}", WEIGHT, VALUE, branch=number)]
    if draw.chance(0.2):
        outputs.append(Output(f"energy{number}", op("mul", WEIGHT, s), branch=number))
    return Branch(_mask(draw), op("mul", s, draw.number()), normalizer), tuple(outputs)


def _term(draw: Choice) -> Dot:
    """A second term: a table by distance, one by key, or a sum over features that is no product."""
    rows = draw.one((OFFSET, OFFSET, None))
    if rows is not None:
        return Dot("t", QUERY, Operand("rel", (rows,)))
    return Dot("t", QUERY, Operand("by_key", (op("mod", k, 6),)))


def _body(draw: Choice) -> Expr:
    """What a first term that is no dot product sums over the features."""
    apart = op("sub", BODY_LEFT, BODY_RIGHT)
    both = op("mul", Load("feature", (D,), FLOAT), op("tanh", op("add", BODY_LEFT, BODY_RIGHT)))
    return draw.one((both, both, op("neg", op("abs", apart)), op("mul", -0.5, op("mul", apart, apart))))


def _address(draw: Choice) -> tuple[Expr, ...]:
    """Where rows of keys or values live: another order, a page, one head or batch element for all."""
    batch, head, row = KEY_ADDRESS
    page = op("add", op("mul", Load("page", (b, op("floordiv", k, 4)), INT), 4), op("mod", k, 4))
    return draw.one(
        (
            (batch, head, op("sub", op("sub", Size("Lk"), 1), k)),
            (batch, head, page),
            (const(0), head, row),
            (batch, const(0), row),
        )
    )


def _placed(draw: Choice, stage: Attend) -> Attend:
    """``stage`` with keys, and often values, at addresses of their own."""
    first, address = stage.terms[0], _address(draw)
    theirs = draw.one((address, address, _address(draw), KEY_ADDRESS))
    outputs = [replace(o, rows=Operand("v", theirs)) if o.rows == VALUE else o for o in stage.outputs]
    terms = (replace(first, right=Operand("k", address)), *stage.terms[1:])
    return replace(stage, terms=terms, outputs=tuple(outputs))


def _asked(draw: Choice, stage: Attend) -> Attend:
    """``stage`` with queries at addresses of their own: shifted, strided, backwards, of one head or batch element."""
    batch, head, row = QUERY_ADDRESS
    address = draw.one(
        (
            (batch, head, op("add", q, 2)),
            (batch, head, op("mul", q, 2)),
            (batch, head, op("sub", op("sub", Size("Lq"), 1), q)),
            (batch, op("sub", 1, h), row),
            (const(0), const(1), op("floordiv", q, 2)),
        )
    )
    terms = tuple(replace(t, left=Operand("q", address)) for t in stage.terms)
    outputs = tuple(replace(o, rows=Operand("q", address)) if o.rows == QUERY else o for o in stage.outputs)
    if draw.chance(0.3):  # the other terms, and sums of queries, read them as they are
        return replace(stage, terms=(terms[0], *stage.terms[1:]))
    return replace(stage, terms=terms, outputs=outputs)


def _lengths(draw: Choice) -> tuple[Expr, Expr]:
    """Fewer queries or keys than there are, perhaps none."""
    queries = draw.one((cdiv(Size("Lq"), const(2)), op("max", op("sub", Size("Lq"), 3), 0), const(1)))
    keys = draw.one((cdiv(Size("Lk"), const(2)), op("max", op("sub", Size("Lk"), 3), 0), op("min", Size("Lk"), 4)))
    return draw.one(((queries, Size("Lk")), (Size("Lq"), keys), (queries, keys)))


def _positions(draw: Choice) -> tuple[tuple[str, Expr], ...]:
    start, every = ("q", op("add", q, draw.random.randint(1, 4))), ("k", op("add", op("mul", k, 2), 1))
    return draw.one(((start,), (every,), (start, every)))


def _chosen(draw: Choice) -> tuple[tuple[Pool, Attend, Select], Expr]:
    """Stages that choose blocks of keys for every query, and the mask that sees those."""
    blocks = cdiv(Size("Lk"), const(4))
    pool = Pool("pooled", "k", const(4), draw.one(("mean", "max", "first")))
    liking = Output("liking", s, over="")
    gate = Attend("gate", (Dot("s", QUERY, Operand("pooled", KEY_ADDRESS)),), (Branch(),), (liking,))
    gate = replace(gate, lengths=(Size("Lq"), blocks))
    extents = (Size("B"), Size("H"), Size("Lq"), blocks)
    candidates, forced = (
        draw.one((TRUE, op("le", op("mul", k, 4), q))),
        draw.one((FALSE, op("eq", op("floordiv", q, 4), k))),
    )
    select = Select("chosen", extents, Load("liking", (b, h, q, k), FLOAT), candidates, forced)
    rule = draw.one(("top", "threshold", "mass"))
    if rule == "top":
        select = replace(select, top=draw.one((const(2), op("add", op("mod", q, 3), h))))
    elif rule == "threshold":
        select = replace(select, threshold=draw.one((const(0.1), HEAD, op("mul", ROW, 0.5))))
    else:
        select = replace(select, mass=draw.one((const(0.7), op("sigmoid", op("add", HEAD, ROW)))))
    return (pool, gate, select), Load("chosen", (b, h, q, op("floordiv", k, 4)), BOOL)


def random_program(seed: int) -> Program:
    """A legal program that captures :data:`TENSORS`."""
    draw = Choice(seed)
    two = draw.chance(0.4)
    several = draw.one((0,) * 28 + (1, 1, 1, 1, 2, 3))
    normalizer = SOFTMAX if several and draw.chance(0.4) else draw.one(MAKERS)(draw)
    group = _group(draw, normalizer)
    branch = Branch(
        _mask(draw),
        _score(draw, two),
        normalizer,
        _weight(draw),
        group,
        None if group is None else const(3),
    )
    outputs = _outputs(draw, normalizer, two, several > 0)
    branches: tuple[Branch, ...] = (branch,)
    for number in range(1, 1 + several):
        more, sums = _further(draw, number)
        branches, outputs = (*branches, more), (*outputs, *sums)
    first = Dot("s", QUERY, KEY, _body(draw)) if draw.chance(0.12) else Dot()
    stage = Attend(terms=(first, _term(draw)) if two else (first,), branches=branches, outputs=outputs)
    before: tuple[Stage, ...] = ()
    if draw.chance(0.1):
        stage = replace(stage, position=_positions(draw))
    elif draw.chance(0.1):
        before, seen = _chosen(draw)
        masked = [replace(branch, mask=all_of(branch.mask, seen)) for branch in stage.branches]
        stage = replace(stage, branches=tuple(masked))
    if draw.chance(0.1):
        stage = _placed(draw, stage)
    if draw.chance(0.08):
        stage = _asked(draw, stage)
    if draw.chance(0.08):
        stage = replace(stage, lengths=_lengths(draw))
    after: tuple[Map, ...] = ()
    if draw.chance(0.35):
        stage, after = epilogues(draw, stage)
    returns = tuple(out.name for out in stage.outputs)
    if after:
        read = {n.tensor for step in after for n in postorder(*step.roots()) if isinstance(n, Load)}
        kept = tuple(name for name in returns if name not in read or draw.chance(0.4))
        returns = (after[-1].name, *kept)
    stages: tuple[Stage, ...] = (*before, stage, *after)
    if draw.chance(0.2):
        maps, names = prologues(draw)
        stages = (*maps, *(reading(found, names) for found in stages))
        returns += (maps[-1].name,) if draw.chance(0.15) else ()
    return Program(f"random_{seed}", stages, SCALARS, TENSORS, returns=returns)


def arguments(seed: int, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Operands and captured tensors for :func:`random_program`; values are 4 wide as keys are, or 3."""
    generator = torch.Generator().manual_seed(seed)
    draw = random.Random(seed)
    batch, kv, lq, lk = draw.choice((1, 1, 1, 2)), draw.choice((1, 2)), draw.randint(1, 14), draw.randint(1, 17)
    shapes = ((batch, 2, lq, 4), (batch, kv, lk, 4), (batch, kv, lk, draw.choice((4, 4, 3))))
    operands = [torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes]
    sizes = {"head": (2,), "row": (lq,), "col": (batch, lk), "table": (9,), "rel": (9, 4), "heat": (), "feature": (4,)}
    sizes |= {"by_key": (6, 4), "angle": (12, 4), "gate": (batch, 2, lq, 4)}
    captured = {n: torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for n, x in sizes.items()}
    captured["doc"] = torch.randint(0, 3, (batch, lk), generator=generator)
    captured["page"] = torch.randint(0, -(-lk // 4), (batch, 5), generator=generator)
    return operands, captured
