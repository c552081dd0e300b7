"""Attend stages beyond plain softmax, by name: what passes and kernels are compared with the reference on."""

from __future__ import annotations

from dataclasses import replace

from attnlang.ir import DEFAULT_OUTPUTS, FLOAT, SOFTMAX, Attend, Branch, Expr, Load, Normalizer, Output, Stat
from attnlang.ir import TensorParam as Tensor
from attnlang.ir.build import TRUE, h, k, op, q, s, size
from attnlang.ir.stages import RAW, WEIGHT, stat

__all__ = ["CASES", "TENSORS", "stage"]

m, z, w = stat("m"), stat("l"), WEIGHT
SINK, RATE, GATE = Load("sink", (h,), FLOAT), Load("rate", (h,), FLOAT), Load("gate", (h, k), FLOAT)
NOISE = Load("noise", (q, k), FLOAT)
TENSORS = (
    Tensor("sink", FLOAT, (size("H"),)),
    Tensor("rate", FLOAT, (size("H"),)),
    Tensor("gate", FLOAT, (size("H"), size("Lk"))),
    Tensor("noise", FLOAT, (size("Lq"), size("Lk"))),
)
OUT, LSE = DEFAULT_OUTPUTS
ROWS = (OUT,)


def exp(x: Expr) -> Expr:
    return op("exp", x)


def sub(x: Expr, y: Expr) -> Expr:
    return op("sub", x, y)


def mul(*factors: Expr | float) -> Expr:
    out = factors[0]
    for factor in factors[1:]:
        out = op("mul", out, factor)
    return out  # type: ignore[return-value]


def stage(
    norm: Normalizer = SOFTMAX, weight: Expr | None = None, score: Expr = s, outputs: tuple[Output, ...] = (OUT, LSE)
) -> Attend:
    return Attend(branches=(Branch(TRUE, score, norm, weight),), outputs=outputs)


def _seeded(sink: Expr, name: str) -> Normalizer:
    """Softmax with one more logit that has no value."""
    stats = (Stat("m", "max", s, sink), Stat("l", "sum", exp(sub(s, m)), exp(sub(sink, m))))
    return Normalizer(name, stats, op("div", exp(sub(s, m)), z))


def _plain(name: str, weight: Expr, *stats: Stat) -> Normalizer:
    return Normalizer(name, stats, weight)


RELU = op("max", s, 0.0)
RELU2 = mul(RELU, RELU)
LOG_W = op("log", w)
DISTANCE = op("to_float", op("abs", sub(q, k)))
VISIBLE = op("to_float", op("add", q, 1))
TEMPERED = exp(op("div", sub(s, m), 2.5))
ENTROPY = Output("entropy", op("neg", mul(w, LOG_W)))

CASES: dict[str, Attend] = {
    "softmax": stage(),
    "sink": stage(_seeded(SINK, "sink")),
    "off_by_one": stage(_seeded(op("mul", SINK, 0.0), "off_by_one")),
    "sigmoid": stage(_plain("sigmoid", op("sigmoid", sub(s, 2.0))), outputs=ROWS),
    "relu": stage(_plain("relu", RELU), outputs=ROWS),
    "relu2_sum": stage(_plain("relu2", op("div", RELU2, op("add", z, 1e-3)), Stat("l", "sum", RELU2)), outputs=ROWS),
    "relu2_length": stage(_plain("relu2", op("div", RELU2, VISIBLE)), outputs=ROWS),
    "decay": stage(_plain("identity", s), mul(w, exp(mul(op("neg", RATE), DISTANCE))), outputs=ROWS),
    "cog": stage(weight=mul(w, op("sign", RAW)), score=op("abs", s)),
    "gate": stage(weight=mul(w, op("sigmoid", GATE))),
    "dropout": stage(weight=op("where", op("gt", NOISE, -0.5), op("div", w, 0.7), 0.0)),
    "entropy": stage(outputs=(OUT, LSE, ENTROPY)),
    "entropy_alone": stage(outputs=(ENTROPY,)),
    "distance": stage(outputs=(OUT, Output("distance", mul(w, DISTANCE)))),
    "peak": stage(outputs=(OUT, Output("peak", w, monoid="max"), Output("place", s, monoid="argmax"), LSE)),
    "least": stage(outputs=(Output("least", s, monoid="min", empty=-7.0), OUT)),
    "participation": stage(outputs=(OUT, Output("ratio", mul(w, w)))),
    "temperature": stage(
        Normalizer("tempered", (Stat("m", "max", s), Stat("l", "sum", TEMPERED)), op("div", TEMPERED, z)),
        score=mul(op("tanh", s), 4.0),
    ),
    "cut": stage(weight=op("where", op("gt", w, 0.05), w, 0.0)),
    "renormalised": stage(
        Normalizer(
            "cut",
            (*SOFTMAX.stats, Stat("cut", "sum", op("max", sub(op("div", exp(sub(s, m)), z), 0.002), 0.0))),
            op("div", op("max", sub(op("div", exp(sub(s, m)), z), 0.002), 0.0), op("add", stat("cut"), 1e-6)),
        ),
        outputs=ROWS,
    ),
    "both_ways": stage(_seeded(SINK, "sink"), weight=mul(w, op("sigmoid", RAW)), outputs=(OUT, LSE, ENTROPY)),
    "columns": stage(outputs=(OUT, LSE, Output("column", w, over="q"))),
    "column_peak": stage(outputs=(Output("column", w, over="q", monoid="max", empty=-1.0),)),
    "sigmoid_columns": stage(_plain("sigmoid", op("sigmoid", s)), outputs=(Output("column", w, over="q"), OUT)),
}
"""No stage has a mask; :func:`masked` gives it one."""


def masked(found: Attend, mask: Expr) -> Attend:
    """``found`` with a mask."""
    return replace(found, branches=(replace(found.branch, mask=mask),))
