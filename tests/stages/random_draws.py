"""What random programs are drawn with and read: choices from a seed, captured tensors, numbers of heads and rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from attnlang.ir import FLOAT, INT, Load, ScalarParam, Size, TensorParam
from attnlang.ir.build import b, const, h, k, op, q

T = TypeVar("T")
TENSORS = (
    TensorParam("head", FLOAT, (Size("H"),)),
    TensorParam("row", FLOAT, (Size("Lq"),)),
    TensorParam("col", FLOAT, (Size("B"), Size("Lk"))),
    TensorParam("table", FLOAT, (const(9),)),
    TensorParam("rel", FLOAT, (const(9), Size("D"))),
    TensorParam("doc", INT, (Size("B"), Size("Lk"))),
    TensorParam("heat", FLOAT, ()),
    TensorParam("feature", FLOAT, (Size("D"),)),
    TensorParam("by_key", FLOAT, (const(6), Size("D"))),
    TensorParam("page", INT, (Size("B"), const(5))),
    TensorParam("angle", FLOAT, (const(12), Size("D"))),
    TensorParam("gate", FLOAT, (Size("B"), Size("H"), Size("Lq"), Size("D"))),
)
SCALARS = (ScalarParam("reach", INT, 6), ScalarParam("strength", FLOAT, 0.4))
HEAD, ROW, COL = Load("head", (h,), FLOAT), Load("row", (q,), FLOAT), Load("col", (b, k), FLOAT)
OFFSET = op("min", op("max", op("add", op("sub", k, q), 4), 0), 8)
TABLE = Load("table", (OFFSET,), FLOAT)


class Choice:
    """Draws the parts of one program from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def some(self, options: Sequence[T], most: int) -> list[T]:
        return self.random.sample(list(options), self.random.randint(0, min(most, len(options))))

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def number(self) -> float:
        return self.random.choice((-1.5, -0.5, 0.25, 0.5, 1.0, 2.0))
