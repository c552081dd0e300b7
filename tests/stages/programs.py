"""Programs beyond mask and score, each with the same formula written by hand in dense PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from attnlang.ir import (
    BOOL,
    DEFAULT_OUTPUTS,
    FLOAT,
    INT,
    KEY_ADDRESS,
    Address,
    Attend,
    Branch,
    Dot,
    Expr,
    Index,
    Input,
    Load,
    Map,
    Normalizer,
    Operand,
    Output,
    Pool,
    Program,
    Select,
    Size,
    Stat,
    TensorParam,
    stat,
)
from attnlang.ir.build import b, const, h, k, op, q, s
from attnlang.ir.stages import BODY_LEFT, BODY_RIGHT, QUERY, RAW, WEIGHT

Tensor = torch.Tensor
B, H, HKV, LQ, LK, D, DV = 2, 4, 2, 37, 45, 6, 5
SCALE = D**-0.5
CAUSAL = op("le", k, op("add", q, 8))
OUT, LSE = DEFAULT_OUTPUTS


def causal() -> Tensor:
    return torch.arange(LK)[None, :] <= torch.arange(LQ)[:, None] + 8


@dataclass(frozen=True)
class Formula:
    """A program, its captured tensors, and every result as a function of (q, k, v, captured); k, v have all heads."""

    program: Program
    dense: Callable[..., dict[str, Tensor]]
    captured: dict[str, Tensor] = field(default_factory=dict)


def operands(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((B, H, LQ, D), (B, HKV, LK, D), (B, HKV, LK, DV))
    made = [torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes]
    return made[0], made[1], made[2]


def heads(t: Tensor) -> Tensor:
    return t.repeat_interleave(H // HKV, 1)


def scores(q_: Tensor, k_: Tensor) -> Tensor:
    return q_ @ heads(k_).transpose(-1, -2) * SCALE


def hide(x: Tensor) -> Tensor:
    return x.masked_fill(~causal(), -math.inf)


def one(
    name: str, *, outputs: tuple[Output, ...] = (OUT,), tensors: tuple[TensorParam, ...] = (), **branch: object
) -> Program:
    """A program of one stage and one branch with the causal mask of these tests."""
    stage = Attend(branches=(Branch(**{"mask": CAUSAL, **branch}),), outputs=outputs)  # type: ignore[arg-type]
    return Program(name, (stage,), tensors=tensors)


def per_head(name: str) -> TensorParam:
    return TensorParam(name, FLOAT, (Size("H"),))


def elementwise(weight: Expr) -> Normalizer:
    return Normalizer("elementwise", (), weight)


def exp_shifted() -> Expr:
    return op("exp", op("sub", s, stat("m")))


def sink() -> Formula:
    at = Load("sink", (h,), FLOAT)
    stats = (Stat("m", "max", s, at), Stat("l", "sum", exp_shifted(), op("exp", op("sub", at, stat("m")))))
    norm = Normalizer("sink", stats, op("div", exp_shifted(), stat("l")))

    def dense(q_, k_, v_, sink):
        full = torch.cat([hide(scores(q_, k_)), sink[None, :, None, None].expand(B, H, LQ, 1)], -1)
        return {"o": full.softmax(-1)[..., :-1] @ heads(v_), "lse": full.logsumexp(-1)}

    value = torch.randn(H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Formula(
        one("sink", normalizer=norm, outputs=(OUT, LSE), tensors=(per_head("sink"),)), dense, {"sink": value}
    )


def sigmoid() -> Formula:
    program = one("sigmoid", normalizer=elementwise(op("sigmoid", op("sub", s, 2.0))))
    return Formula(
        program, lambda q_, k_, v_: {"o": (scores(q_, k_) - 2).sigmoid().masked_fill(~causal(), 0) @ heads(v_)}
    )


def relu_sum() -> Formula:
    basis = op("max", s, 0.0)
    total = op("max", stat("l"), 1e-6)
    norm = Normalizer("relu", (Stat("l", "sum", basis),), op("div", basis, total))

    def dense(q_, k_, v_):
        w = scores(q_, k_).clamp(min=0).masked_fill(~causal(), 0)
        return {"o": w @ heads(v_) / w.sum(-1, keepdim=True).clamp(min=1e-6)}

    return Formula(one("relu", normalizer=norm), dense)


def mean_subtracted() -> Formula:
    count, total = Stat("n", "sum", const(1.0)), Stat("t", "sum", s)
    mean = op("div", stat("t"), stat("n"))
    norm = Normalizer("inline", (count, total), op("add", op("sub", s, mean), op("div", 1.0, stat("n"))))

    def dense(q_, k_, v_):
        x = scores(q_, k_).masked_fill(~causal(), 0)
        n = causal().sum(-1, keepdim=True).double()
        w = (x - x.sum(-1, keepdim=True) / n + 1 / n).masked_fill(~causal(), 0)
        return {"o": w @ heads(v_)}

    return Formula(one("inline", normalizer=norm), dense)


def sparsemax() -> Formula:
    over = op("max", op("sub", s, stat("t")), 0.0)
    stats = (Stat("m", "max", s), Stat("t", "root", over, op("sub", stat("m"), 1.0)))

    def dense(q_, k_, v_):
        z = hide(scores(q_, k_))
        ordered = z.sort(-1, descending=True).values
        count = torch.arange(1, LK + 1)
        sums = ordered.masked_fill(ordered.isinf(), 0).cumsum(-1)
        n = ((1 + count * ordered > sums) & ordered.isfinite()).sum(-1, keepdim=True)
        return {"o": (z - (sums.gather(-1, n - 1) - 1) / n).clamp(min=0) @ heads(v_)}

    return Formula(one("sparsemax", normalizer=Normalizer("sparsemax", stats, over)), dense)


def cog() -> Formula:
    program = one("cog", score=op("abs", s), weight=op("mul", WEIGHT, op("sign", RAW)))

    def dense(q_, k_, v_):
        x = scores(q_, k_)
        return {"o": (hide(x.abs()).softmax(-1) * x.sign()) @ heads(v_)}

    return Formula(program, dense)


def lightning() -> Formula:
    decay = op("exp", op("mul", op("neg", Load("slope", (h,), FLOAT)), op("sub", op("add", q, 8), k)))
    program = one("lightning", normalizer=elementwise(s), weight=op("mul", WEIGHT, decay), tensors=(per_head("slope"),))

    def dense(q_, k_, v_, slope):
        distance = torch.arange(LQ)[:, None] + 8 - torch.arange(LK)
        decay = torch.exp(-slope[:, None, None] * distance)
        return {"o": (scores(q_, k_) * decay).masked_fill(~causal(), 0) @ heads(v_)}

    return Formula(program, dense, {"slope": torch.linspace(0.1, 0.4, H, dtype=torch.float64)})


def gated_threshold() -> Formula:
    """A weight hook that is not linear in w."""
    program = one("threshold", weight=op("where", op("gt", WEIGHT, 0.05), op("mul", WEIGHT, WEIGHT), WEIGHT))

    def dense(q_, k_, v_):
        w = hide(scores(q_, k_)).softmax(-1)
        return {"o": torch.where(w > 0.05, w * w, w) @ heads(v_)}

    return Formula(program, dense)


def outputs() -> Formula:
    """Reductions of the weights that never form the map."""
    found = (
        OUT,
        Output("received", op("mul", WEIGHT, Load("r", (q,), FLOAT)), over="q"),
        Output("entropy", op("neg", op("mul", WEIGHT, op("log", WEIGHT)))),
        Output("top", WEIGHT, monoid="max"),
        Output("best", WEIGHT, monoid="argmax"),
        Output("mass", WEIGHT, key=(Load("segment", (k,), INT),), extents=(Size("S"),)),
        Output(
            "blocks",
            s,
            over="qk",
            monoid="max",
            key=(op("floordiv", q, 16), op("floordiv", k, 16)),
            extents=(const(3), const(3)),
            empty=-9.0,
        ),
        Output("distance", op("mul", WEIGHT, op("abs", op("sub", q, k)))),
        Output("l", op("log", stat("l")), over=""),
        Output("column_rows", WEIGHT, rows=QUERY, over="q"),
        Output("rows", WEIGHT, over="q", key=(Load("slot", (q,), INT),), extents=(const(2),)),
    )
    tensors = (
        TensorParam("r", FLOAT, (Size("Lq"),)),
        TensorParam("segment", INT, (Size("Lk"),)),
        TensorParam("names", FLOAT, (Size("S"),)),
        TensorParam("slot", INT, (Size("Lq"),)),
    )
    segment = torch.arange(LK) % 4 - 1  # -1 is nobody's
    slot = torch.full((LQ,), -1).index_put((torch.tensor([3, 20]),), torch.tensor([0, 1]))

    def dense(q_, k_, v_, r, segment, names, slot):
        x = hide(scores(q_, k_))
        w = x.softmax(-1)
        logs = torch.where(causal(), torch.log(torch.where(causal(), w, 1.0)), 0.0)
        mass = torch.stack([torch.where(segment == c, w, 0.0).sum(-1) for c in range(len(names))], -1)
        padded = torch.full((B, H, 48, 48), -math.inf, dtype=x.dtype)
        padded[:, :, :LQ, :LK] = x
        blocks = padded.view(B, H, 3, 16, 3, 16).amax((3, 5))
        apart = (torch.arange(LQ)[:, None] - torch.arange(LK)).abs()
        return {
            "o": w @ heads(v_),
            "received": (w * r[:, None]).sum(-2),
            "entropy": -(w * logs).sum(-1),
            "top": w.amax(-1),
            "best": w.argmax(-1),
            "mass": mass,
            "blocks": torch.where(blocks.isinf(), -9.0, blocks),
            "distance": (w * apart).sum(-1),
            "l": torch.log(torch.exp(x - x.amax(-1, keepdim=True)).sum(-1)),
            "column_rows": w.transpose(-1, -2) @ q_,
            "rows": torch.stack([w[:, :, 3], w[:, :, 20]], -1),
        }

    captured = {"r": torch.rand(LQ, dtype=torch.float64), "segment": segment, "slot": slot}
    captured["names"] = torch.zeros(3, dtype=torch.float64)
    return Formula(one("outputs", outputs=found, tensors=tensors), dense, captured)


def relative_table() -> Formula:
    """Query x table terms, and a table of values by offset (Shaw et al., 2018; Music Transformer)."""
    row = op("min", op("max", op("add", op("sub", k, q), 5), 0), 10)
    term = Dot("t", QUERY, Operand("rel", (row,)))
    stage = Attend(
        terms=(Dot(), term),
        branches=(Branch(CAUSAL, op("add", s, op("mul", Input("t", FLOAT), 0.5))),),
        outputs=(OUT, Output("ov", WEIGHT, Operand("values", (row,)))),
    )
    tensors = (TensorParam("rel", FLOAT, (const(11), Size("D"))), TensorParam("values", FLOAT, (const(11), Size("E"))))

    def dense(q_, k_, v_, rel, values):
        at = (torch.arange(LK) - torch.arange(LQ)[:, None] + 5).clamp(0, 10)
        w = hide(scores(q_, k_) + 0.5 * torch.einsum("bhqd,qkd->bhqk", q_, rel[at])).softmax(-1)
        return {"o": w @ heads(v_), "ov": torch.einsum("bhqk,qkd->bhqd", w, values[at])}

    generator = torch.Generator().manual_seed(3)
    captured = {n: torch.randn(11, w, generator=generator, dtype=torch.float64) for n, w in (("rel", D), ("values", 4))}
    return Formula(Program("relative", (stage,), tensors=tensors), dense, captured)


def additive() -> Formula:
    """A score of tanh(query + key) features that uses no product (Bahdanau et al., 2015)."""
    body = op("mul", Load("wf", (Index("d"),), FLOAT), op("tanh", op("add", BODY_LEFT, BODY_RIGHT)))
    stage = Attend(terms=(Dot("s", body=body),), branches=(Branch(CAUSAL),), outputs=(OUT,))
    program = Program("additive", (stage,), tensors=(TensorParam("wf", FLOAT, (Size("F"),)),))

    def dense(q_, k_, v_, wf):
        features = torch.tanh(q_[..., :, None, :] + heads(k_)[..., None, :, :])
        return {"o": hide((features @ wf) * SCALE).softmax(-1) @ heads(v_)}

    return Formula(program, dense, {"wf": torch.linspace(-1, 2, D, dtype=torch.float64)})


def groups() -> Formula:
    """A softmax within each group of keys and one over the groups (Landmark attention without landmarks)."""
    block = op("floordiv", k, 15)
    stats = (
        Stat("m", "max", s),
        Stat("g", "sum", exp_shifted(), grouped=True),
        Stat("z", "sum", exp_shifted()),
    )
    weight = op("div", op("mul", exp_shifted(), op("sqrt", stat("g"))), stat("z"))
    found = (OUT, Output("masses", op("div", stat("g"), stat("z")), over=""))
    program = one("groups", normalizer=Normalizer("groups", stats, weight), group=block, groups=const(3), outputs=found)

    def dense(q_, k_, v_):
        x = hide(scores(q_, k_))
        e = torch.exp(x - x.amax(-1, keepdim=True))
        g = e.view(B, H, LQ, 3, 15).sum(-1)
        w = e * g.clamp(min=1e-300).sqrt().repeat_interleave(15, -1) / e.sum(-1, keepdim=True)
        return {"o": w @ heads(v_), "masses": g / e.sum(-1, keepdim=True)}

    return Formula(program, dense)


def branches() -> Formula:
    """Two masks over one product, merged by a gate in an epilogue."""
    near = op("le", op("abs", op("sub", q, k)), 4)
    two = (Branch(CAUSAL), Branch(near, op("mul", s, 2.0)))
    stage = Attend(
        branches=two,
        outputs=(
            Output("a", WEIGHT, Operand("v", KEY_ADDRESS)),
            Output("c", WEIGHT, Operand("v", KEY_ADDRESS), branch=1),
        ),
    )
    at = (b, h, q, Index("d"))
    gate = op("sigmoid", Load("gate", (h,), FLOAT))
    mixed = op("add", op("mul", gate, Load("a", at, FLOAT)), op("mul", op("sub", 1.0, gate), Load("c", at, FLOAT)))
    epilogue = Map("o", (Size("B"), Size("H"), Size("Lq"), const(DV)), mixed)
    program = Program("branches", (stage, epilogue), tensors=(per_head("gate"),))

    def dense(q_, k_, v_, gate):
        x = scores(q_, k_)
        close = (torch.arange(LQ)[:, None] - torch.arange(LK)).abs() <= 4
        a = hide(x).softmax(-1) @ heads(v_)
        c = (2 * x).masked_fill(~close, -math.inf).softmax(-1) @ heads(v_)
        g = gate.sigmoid()[:, None, None]
        return {"o": g * a + (1 - g) * c}

    return Formula(program, dense, {"gate": torch.linspace(-1, 1, H, dtype=torch.float64)})


def routed() -> Formula:
    """Pooled keys, a gate per query and block, top-2 with the own block forced (MoBA)."""
    blocks = const(5)
    pooled = Pool("means", "k", const(10))
    seen = op("le", op("mul", k, 10), op("add", q, 8))
    gate = Attend(
        "gate",
        terms=(Dot("s", QUERY, Operand("means", Address(*KEY_ADDRESS))),),
        branches=(Branch(seen),),
        outputs=(Output("g", s, over="", empty=-math.inf),),
        lengths=(Size("Lq"), blocks),
    )
    own = op("eq", op("floordiv", op("add", q, 8), 10), k)
    select = Select(
        "chosen",
        (Size("B"), Size("H"), Size("Lq"), blocks),
        Load("g", (b, h, q, k), FLOAT),
        candidates=seen,
        forced=own,
        top=const(2),
    )
    mask = op("and", CAUSAL, Load("chosen", (b, h, q, op("floordiv", k, 10)), BOOL))
    program = Program("routed", (pooled, gate, select, Attend("main", branches=(Branch(mask),))))

    def dense(q_, k_, v_):
        starts = torch.arange(0, LK, 10)
        means = torch.stack([k_[:, :, i : i + 10].mean(2) for i in starts.tolist()], 2)
        rows = torch.arange(LQ)[:, None] + 8
        g = (q_ @ heads(means).transpose(-1, -2)).masked_fill(starts > rows, -math.inf)
        g = g.masked_fill(rows // 10 == torch.arange(5), math.inf)
        best = g.topk(2, -1)
        chosen = torch.zeros_like(g, dtype=torch.bool).scatter(-1, best.indices, best.values > -math.inf)
        x = hide(scores(q_, k_)).masked_fill(~chosen.repeat_interleave(10, -1)[..., :LK], -math.inf)
        return {"o": x.softmax(-1) @ heads(v_), "lse": x.logsumexp(-1)}

    return Formula(program, dense)


def paged() -> Formula:
    """Keys and values behind a page table, from one batch element."""
    row = op("add", op("mul", Load("page", (op("floordiv", k, 5),), INT), 5), op("mod", k, 5))
    address = Address(const(0), op("mod", h, Size("Hkv")), row)
    stage = Attend(
        terms=(Dot(right=Operand("k", address)),),
        branches=(Branch(CAUSAL),),
        outputs=(Output("o", WEIGHT, Operand("v", address)), LSE),
    )
    page = torch.randperm(LK // 5, generator=torch.Generator().manual_seed(2))

    def dense(q_, k_, v_, page):
        at = page.repeat_interleave(5) * 5 + torch.arange(LK) % 5
        k_, v_ = (t[:1, :, at].repeat(1, H // HKV, 1, 1) for t in (k_, v_))
        x = hide(q_ @ k_.transpose(-1, -2) * SCALE)
        return {"o": x.softmax(-1) @ v_, "lse": x.logsumexp(-1)}

    return Formula(Program("paged", (stage,), tensors=(TensorParam("page", INT, (Size("P"),)),)), dense, {"page": page})


def empty_rows() -> Formula:
    """Rows that see nothing have output 0, their declared empty value, and no gradient."""
    mask = op("and", CAUSAL, op("ne", op("mod", q, 3), 1))
    found = (OUT, LSE, Output("inverse", op("div", 1.0, stat("l")), over="", empty=7.0))
    stage = Attend(branches=(Branch(mask, op("log", op("abs", s))),), outputs=found)

    def dense(q_, k_, v_):
        blind = (torch.arange(LQ) % 3 == 1)[:, None]
        hidden = ~causal() | blind
        x = torch.where(hidden, -math.inf, torch.where(hidden, 1.0, scores(q_, k_)).abs().log())
        x = torch.where(blind, 0.0, x)
        rows, lse = blind[:, 0], x.logsumexp(-1)
        return {
            "o": torch.where(blind, 0.0, x.softmax(-1)) @ heads(v_),
            "lse": torch.where(rows, -math.inf, lse),
            "inverse": torch.where(rows, 7.0, torch.exp(x.amax(-1) - lse)),
        }

    return Formula(Program("empty_rows", (stage,)), dense)


def norms() -> Formula:
    """A prologue that normalises rows of q before the product."""
    at = (b, h, q, Index("d"))
    row = Load("q", at, FLOAT)
    size_d = Size("D")
    lets = (("ms", "mean", op("mul", row, row)),)
    unit = op("mul", op("mul", row, op("rsqrt", op("add", stat("ms"), 1e-6))), Load("gain", (Index("d"),), FLOAT))
    prologue = Map("qn", (Size("B"), Size("H"), Size("Lq"), size_d), unit, lets)
    stage = Attend(terms=(Dot("s", Operand("qn", (b, h, q))),), branches=(Branch(CAUSAL),))
    program = Program("norms", (prologue, stage), tensors=(TensorParam("gain", FLOAT, (size_d,)),))

    def dense(q_, k_, v_, gain):
        q_ = q_ * torch.rsqrt((q_ * q_).mean(-1, keepdim=True) + 1e-6) * gain
        x = hide(scores(q_, k_))
        return {"o": x.softmax(-1) @ heads(v_), "lse": x.logsumexp(-1)}

    return Formula(program, dense, {"gain": torch.linspace(0.5, 1.5, D, dtype=torch.float64)})


FORMULAS = (
    sink,
    sigmoid,
    relu_sum,
    mean_subtracted,
    sparsemax,
    cog,
    lightning,
    gated_threshold,
    outputs,
    relative_table,
    additive,
    groups,
    branches,
    routed,
    paged,
    empty_rows,
    norms,
)
