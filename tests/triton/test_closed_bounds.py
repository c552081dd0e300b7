"""The arithmetic of run bounds in Triton sources never leaves the width it is done in, up to 2^31 positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closed.cases import CASES

from attnlang.codegen.plan import make_plan
from attnlang.codegen.triton import Config, emit
from attnlang.codegen.triton_backward import emit_keys
from attnlang.codegen.triton_helpers import helper_sources
from attnlang.codegen.triton_printer import TritonPrinter, safe_name
from attnlang.codegen.triton_runs import bounds_text
from attnlang.ir import Environment, evaluate
from attnlang.sparsity import closed_form

CONFIG = Config(128, 64, 4, 2)
LONGEST = 2**31 - 1
FAR = (
    "none", "causal", "bottom_right", "window", "wide_window", "both_sides", "ahead", "block_causal", "chunks", "steep",
    "sinks", "globals",
)  # fmt: skip


class Number:
    """An int of 32 or 64 bits as Triton has it: division truncates, and a result that does not fit is an error."""

    def __init__(self, value: int, bits: int = 32) -> None:
        if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
            raise OverflowError(f"{value} does not fit {bits} bits")
        self.value, self.bits = value, bits

    def to(self, bits: int) -> Number:
        return Number(self.value, bits)

    def _with(self, other: Any, result: Any) -> Number:
        bits = max(self.bits, other.bits) if isinstance(other, Number) else self.bits
        return Number(result(self.value, int(other)), bits)

    def __int__(self) -> int:
        return self.value

    def __add__(self, other: Any) -> Number:
        return self._with(other, lambda a, b: a + b)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Number:
        return self._with(other, lambda a, b: a - b)

    def __rsub__(self, other: int) -> Number:
        return Number(other, self.bits) - self

    def __mul__(self, other: Any) -> Number:
        return self._with(other, lambda a, b: a * b)

    __rmul__ = __mul__

    def __neg__(self) -> Number:
        return Number(-self.value, self.bits)

    def __floordiv__(self, other: Any) -> Number:
        return self._with(other, lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1))

    def __rshift__(self, other: int) -> Number:
        return self._with(other, lambda a, b: a >> b)

    def __lt__(self, other: Any) -> bool:
        return self.value < int(other)

    def __le__(self, other: Any) -> bool:
        return self.value <= int(other)

    def __gt__(self, other: Any) -> bool:
        return self.value > int(other)

    def __ge__(self, other: Any) -> bool:
        return self.value >= int(other)


def widest(*values: Any) -> list[Any]:
    bits = max([v.bits for v in values if isinstance(v, Number)], default=32)
    return [Number(int(v), bits) for v in values]


class Language:
    """What the statements use of ``triton.language``."""

    int32, int64 = 32, 64

    @staticmethod
    def minimum(a: Any, b: Any) -> Number:
        return min(widest(a, b), key=int)

    @staticmethod
    def maximum(a: Any, b: Any) -> Number:
        return max(widest(a, b), key=int)

    @staticmethod
    def where(c: Any, a: Any, b: Any) -> Number:
        return widest(a, b)[0 if c else 1]


def run(source: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the statements of a kernel that make its bounds known."""
    start = source.index("# tiles that these rows meet")
    lines = source[start : source.index("# FULL tiles", start)].splitlines()
    text = "\n".join(line.strip() for line in lines)
    for helper in ("floor_div", "floor_div_positive"):
        exec(helper_sources([helper])[0].replace("@triton.jit", ""), names)
    exec(text, names)
    return names


@pytest.mark.parametrize("loop", ["k", "q"])
@pytest.mark.parametrize("name", FAR)
def test_bounds_are_exact_up_to_the_longest_sequence(name: str, loop: str) -> None:
    case = CASES[name]
    if loop == "q" and not case.both:
        return
    options: dict[str, Any] = {"dtype": "float16", "head_dim": 64, "value_dim": 64, "storage": {}, "wide": True}
    plan = make_plan(case.program, **options, closed=("k", "q"), backward=loop == "q")
    source = emit(plan, CONFIG) if loop == "k" else emit_keys(plan, CONFIG)
    form, text = closed_form(case.program, loop), bounds_text(TritonPrinter(plan), plan.run_bounds(loop))
    assert form is not None and text is not None and "_ptr + map_row" not in source
    block, tile = (CONFIG.block_m, CONFIG.block_n) if loop == "k" else (CONFIG.block_n, CONFIG.block_m)
    bounds = form.tile_bounds(tile)
    for lq, lk in ((LONGEST, LONGEST), (LONGEST, LONGEST - 1000), (5, LONGEST), (LONGEST, 77)):
        sizes = {"B": 1, "H": 1, "Hkv": 1, "Lq": lq, "Lk": lk}
        assert form.holds(sizes, case.params, {})
        rows = lq if loop == "k" else lk
        count = -(-rows // block)
        for row in sorted({0, count // 3, max(0, count - 2), count - 1}):
            start = {"start_q" if loop == "k" else "start_k": Number(row * block)}
            given = {safe_name(n): Number(v) for n, v in {**sizes, **case.params}.items()}
            tiles = {"BLOCK_M": CONFIG.block_m, "BLOCK_N": CONFIG.block_n}
            found = run(source, {"tl": Language, **tiles, **given, **start})
            ends = {form.first.name: row * block, form.last.name: min(rows, (row + 1) * block) - 1}
            env = Environment({}, sizes, case.params, {}, {n: torch.tensor(v) for n, v in ends.items()})
            want = [tuple(int(evaluate(e, env)) for e in part.exprs) for part in bounds]
            pairs = {
                "full": [p[1:3] for p in want],
                "part": [pair for p in want for pair in (p[:2], p[2:])],
            }
            for kind, ranges in (("full", text.full), ("part", text.part)):
                got = [tuple(int(eval(end, dict(found))) for end in pair) for pair in ranges]
                assert [p for p in got if p[0] < p[1]] == [p for p in pairs[kind] if p[0] < p[1]]
