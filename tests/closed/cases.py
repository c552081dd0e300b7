"""Programs whose kernels compute their own run bounds, and calls of them that have no run map to fall back to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from attnlang.ir import BOOL, INT, Expr, Load, Param, Program, ScalarParam, Size, TensorParam, simple
from attnlang.ir.build import TRUE, all_of, any_of, b, h, k, op, q
from attnlang.runtime.call import Call
from attnlang.runtime.runs import RunMaps

W, C = Param("w", INT), Param("c", INT)
BEHIND = op("sub", q, k)
CAUSAL = op("le", k, q)


@dataclass(frozen=True)
class Case:
    """A mask with values for what it reads; ``both`` says that the transposed mask has a closed form, too."""

    mask: Expr
    both: bool = True
    params: dict[str, int | bool] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        kinds = {n: BOOL if isinstance(v, bool) else INT for n, v in self.params.items()}
        dims = {1: (Size("B"),), 2: (Size("B"), Size("H"))}
        return simple(
            "closed",
            mask=self.mask,
            scalars=tuple(ScalarParam(n, kind) for n, kind in kinds.items()),
            tensors=tuple(TensorParam(n, INT, dims[t.dim()]) for n, t in self.tensors.items()),
        )


def _load(name: str, *index: Expr) -> Expr:
    return Load(name, index, INT)


NEAR = op("lt", BEHIND, W)
CHUNK = op("floordiv", k, C), op("floordiv", q, C)
PER_HEAD = torch.tensor([[3, 40], [17, 200]], dtype=torch.int32)
CASES = {
    "none": Case(TRUE),
    "never": Case(op("lt", q, -1)),
    "causal": Case(CAUSAL),
    "anti_causal": Case(op("ge", k, q)),
    "bottom_right": Case(op("le", op("sub", k, Size("Lk")), op("sub", q, Size("Lq")))),
    "window": Case(all_of(CAUSAL, NEAR), params={"w": 21}),
    "no_window": Case(all_of(CAUSAL, NEAR), params={"w": -3}),
    "wide_window": Case(all_of(CAUSAL, NEAR), params={"w": 2**27}),
    "both_sides": Case(op("le", op("abs", BEHIND), W), params={"w": 12}),
    "ahead": Case(op("gt", op("sub", k, q), W), params={"w": 30}),
    "block_causal": Case(op("le", *CHUNK), params={"c": 24}),
    "blocks": Case(op("eq", *CHUNK), params={"c": 17}),
    "chunks": Case(all_of(CAUSAL, op("eq", *CHUNK)), params={"c": 40}),
    "steep": Case(op("le", op("mul", k, 3), op("add", q, 5))),
    "prefix": Case(any_of(CAUSAL, op("lt", k, _load("n", b))), tensors={"n": torch.tensor([30, 5])}),
    "lengths": Case(op("lt", k, _load("n", b)), tensors={"n": torch.tensor([0, 50])}),
    "endless": Case(all_of(CAUSAL, op("lt", k, _load("n", b))), tensors={"n": torch.tensor([2**63 - 1, -(2**63)])}),
    "per_head": Case(all_of(CAUSAL, op("lt", BEHIND, _load("n", b, h))), tensors={"n": PER_HEAD}),
    "some_rows": Case(all_of(op("lt", q, 20), CAUSAL)),
    "sinks": Case(all_of(CAUSAL, any_of(op("lt", k, C), NEAR)), False, params={"c": 5, "w": 20}),
    "long_sinks": Case(all_of(CAUSAL, any_of(op("lt", k, C), NEAR)), False, params={"c": 40, "w": 9}),
    "globals": Case(any_of(op("lt", k, C), op("le", op("abs", BEHIND), W)), False, params={"c": 33, "w": 10}),
    "switched": Case(any_of(Param("on", BOOL), CAUSAL), params={"on": True}),
}


def closed_call(call: Call, both: bool) -> Call:
    """The same call where kernels must not ask for a run map (of keys, or of keys and queries)."""
    runs = RunMaps().provider(call.program, call.sizes, call.params, call.tensors)
    assert runs.closed("k") and (runs.closed("q") or not both)

    def refuse(tile: tuple[int, int]) -> None:
        raise AssertionError("the kernel computes its own run bounds")

    return replace(call, runs=refuse if both else runs, closed=runs.closed)  # type: ignore[arg-type]
