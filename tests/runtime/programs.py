"""Small programs and random operands for the tests of the runtime."""

from __future__ import annotations

from typing import Any

import torch

from attnlang.ir import (
    DEFAULT_OUTPUTS,
    FLOAT,
    INT,
    Address,
    Attend,
    Branch,
    Dot,
    Load,
    Operand,
    Output,
    Param,
    Program,
    ScalarParam,
    Size,
    TensorParam,
    build,
    simple,
)
from attnlang.runtime.call import Call
from attnlang.runtime.runs import run_maps

op, b, h, q, k, s = build.op, build.b, build.h, build.q, build.k, build.s


def full() -> Program:
    return simple("full")


def causal() -> Program:
    return simple("causal", mask=op("ge", q, k))


def empty() -> Program:
    return simple("empty", mask=op("lt", op("add", q, k), 0))


def window() -> Program:
    """Sliding window with a head offset, so that the run map differs by head and has gaps."""
    near = op("le", op("abs", op("sub", op("sub", q, k), op("mul", h, 40))), Param("w", INT))
    return simple("window", mask=near, scalars=(ScalarParam("w", INT, 50),))


def some_rows() -> Program:
    """Queries below a boundary per batch element see nothing."""
    return simple("some_rows", mask=op("ge", q, op("add", op("mul", b, 70), 30)))


def documents() -> Program:
    same = op("eq", Load("doc", (b, q), INT), Load("doc", (b, k), INT))
    bias = op("mul", Load("slope", (h,), FLOAT), op("sub", k, q))
    tensors = (TensorParam("doc", INT, (Size("B"), Size("Lk"))), TensorParam("slope", FLOAT, (Size("H"),)))
    return simple("documents", mask=build.all_of(op("ge", q, k), same), score=op("add", s, bias), tensors=tensors)


def biased() -> Program:
    """Two indexings of one learnable table, a gate and a softcap."""
    near = op("max", op("min", op("sub", q, k), 3), -3)
    bias = op("add", Load("table", (h, op("add", near, 3)), FLOAT), Load("table", (h, build.const(0)), FLOAT))
    capped = op("mul", 2.0, op("tanh", op("div", op("add", s, bias), 2.0)))
    gated = op("mul", capped, op("sigmoid", Load("gate", (q,), FLOAT)))
    tensors = (TensorParam("table", FLOAT, (Size("H"), Size("T"))), TensorParam("gate", FLOAT, (Size("Lq"),)))
    return simple("biased", mask=op("le", op("abs", op("sub", q, k)), 60), score=gated, tensors=tensors)


def poisonous() -> Program:
    """A score that is finite on visible pairs only: log(q - k), s / 0 and the log of a captured tensor."""
    distance = op("log", op("to_float", op("sub", q, k)))
    inverse = op("div", 1.0, op("to_float", op("max", op("sub", q, k), 0)))
    table = op("log", Load("c", (k,), FLOAT))
    score = op("add", op("add", op("mul", s, inverse), distance), table)
    mask = build.all_of(op("gt", q, k), op("gt", Load("c", (k,), FLOAT), 0.25))
    return simple("poisonous", mask=mask, score=score, tensors=(TensorParam("c", FLOAT, (Size("Lk"),)),))


def first_batch_call() -> tuple[Program, Call]:
    """Keys of batch element 0 serve everyone, heads are shared crosswise: address maps of their own.

    The verifier does not let such programs through to kernels yet, so the call is made by hand.
    """
    address = Address(build.const(0), op("mod", h, Size("Hkv")), k)
    rows = Operand("v", address)
    outputs = (Output("o", DEFAULT_OUTPUTS[0].value, rows), DEFAULT_OUTPUTS[1])
    term = Dot(right=Operand("k", address))
    program = Program("first_batch", (Attend(terms=(term,), branches=(Branch(op("ge", q, k)),), outputs=outputs),))
    tensors = operands(batch=3, heads=4, kv_heads=3)
    sizes = {"B": 3, "H": 4, "Hkv": 3, "Lq": 200, "Lk": 200}
    return program, Call(program, *tensors, sizes, {}, {}, 0.25, run_maps.provider(program, sizes, {}, {}))


def operands(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    lq: int = 200,
    lk: int = 200,
    dim: int = 16,
    value_dim: int = 8,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    return (
        rand(batch, heads, lq, dim),
        rand(batch, kv_heads, lk, dim),
        rand(batch, kv_heads, lk, value_dim),
    )


def captured(program: Program, batch: int = 2, heads: int = 4, lq: int = 200, lk: int = 200) -> dict[str, Any]:
    """Values of the captured tensors of the programs above."""
    documents = torch.arange(lk) // 70 + torch.arange(batch)[:, None] * (torch.arange(lk) // 33)
    column = torch.linspace(0.5, 2.0, lk)
    column[::3] = 0.0
    known = {
        "doc": documents,
        "slope": -torch.rand(heads),
        "table": torch.randn(heads, 7),
        "gate": torch.randn(lq),
        "c": column,
    }
    return {t.name: known[t.name] for t in program.tensors}


ALL = (full, causal, empty, window, some_rows, documents, biased, poisonous)
