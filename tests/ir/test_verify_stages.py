"""Rules of stages that are broken are named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnlang.ir import (
    FLOAT,
    Attend,
    Branch,
    Dot,
    InvalidProgram,
    Load,
    Normalizer,
    Operand,
    Output,
    Pool,
    Program,
    Select,
    Size,
    Stat,
    TensorParam,
    verify,
)
from attnlang.ir.build import const, h, k, op, q, s
from attnlang.ir.stages import BODY_LEFT, BODY_RIGHT, QUERY, WEIGHT

ROW = op("min", op("max", op("sub", k, q), 0), 8)
TABLE = TensorParam("rel", FLOAT, (const(9), Size("D")))
EXTENTS = (Size("B"), Size("H"), Size("Lq"), Size("Lk"))


def attend(**change: object) -> Program:
    return Program("p", (replace(Attend(), **change),), tensors=(TABLE,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            attend(terms=(Dot("s", QUERY, Operand("rel", (ROW,)), op("abs", op("sub", BODY_LEFT, BODY_RIGHT))),)),
            "which row of rel it reads depends on the pair",
        ),
        (attend(terms=(Dot("s", QUERY, Operand("none", (k,))),)), "rows of 'none', which nothing makes"),
        (attend(terms=(Dot("s", QUERY, Operand("rel", (h, k))),)), "has 2 dimension"),
        (attend(branches=(Branch(normalizer=Normalizer("n", (), op("div", s, WEIGHT))),)), "cannot read w"),
        (attend(branches=(Branch(normalizer=Normalizer("n", (Stat("s", "sum", s),), s)),)), "name that is taken"),
        (attend(branches=(Branch(normalizer=Normalizer("n", (Stat("t", "root", s),), s)),)), "needs a seed"),
        (attend(branches=(Branch(group=k),)), "a group needs the number of groups"),
        (attend(outputs=(Output("a", WEIGHT, over="z"),)), "reduces over 'z'"),
        (attend(outputs=(Output("a", WEIGHT, branch=1),)), "reads branch 1, and there are 1"),
        (attend(outputs=(Output("a", WEIGHT), Output("a", WEIGHT))), "two outputs of one name"),
        (Program("p", (Attend(), Pool("o", "q", const(4)))), "has the name of something else"),
        (Program("p", (Pool("a", "q", const(4), "median"),)), "pools by 'median'"),
        (Program("p", (Select("a", EXTENTS, const(1.0)),)), "exactly one of top, threshold and mass"),
        (Program("p", (Attend(),), returns=("z",)), "no stage makes 'z'"),
        (
            Program("p", (Attend(), Attend("b", outputs=(Output("x", Load("y", (q,), FLOAT)),)))),
            "load of undeclared tensor 'y'",
        ),
    ],
)
def test_broken_rules_are_named(program: Program, message: str) -> None:
    with pytest.raises(InvalidProgram, match=message):
        verify(program)
