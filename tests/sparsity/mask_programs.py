"""Random mask programs over every int and bool operator and captured tensors, and exact tile kinds to judge them by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch

from attnlang.ir import (
    BOOL,
    FLOAT,
    INT,
    Expr,
    Load,
    Param,
    Program,
    ScalarParam,
    Size,
    TensorParam,
    dense_mask,
    rewrite,
    simple,
)
from attnlang.ir.build import b, cast, const, h, k, op, q
from attnlang.sparsity import EMPTY, FULL, PARTIAL

SCALARS = (ScalarParam("w", INT), ScalarParam("on", BOOL), ScalarParam("x", FLOAT))
TENSORS = (
    TensorParam("doc", INT, (Size("Lk"),)),
    TensorParam("rnd", INT, (Size("Lk"),)),
    TensorParam("flag", BOOL, (Size("Lk"),)),
    TensorParam("len", INT, (Size("B"),)),
    TensorParam("perhead", INT, (Size("H"), Size("Lk"))),
    TensorParam("table", BOOL, (Size("T0"), Size("T1"))),
    TensorParam("grid", INT, (Size("T0"), Size("T1"))),
    TensorParam("bias", FLOAT, (Size("Lk"),)),
)
ARITY = {t.name: len(t.shape) for t in TENSORS}


@dataclass(frozen=True)
class Problem:
    """A program with everything it needs to be evaluated."""

    program: Program
    sizes: Mapping[str, int]
    params: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    tile: tuple[int, int]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.program, self.sizes, self.params, self.tensors


class Maker:
    """Draws expressions from a random source; ``random`` may be hypothesis's, so that failures shrink."""

    def __init__(self, random: Random) -> None:
        self.r = random

    def pick(self, options: Any) -> Any:
        return options[self.r.randrange(len(options))]

    def number(self) -> Expr:
        return const(self.pick((0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 31, -1, -2, -5, -8)))

    def index(self) -> Expr:
        return self.pick((q, k, q, k, q, k, b, h))

    def load(self, names: tuple[str, ...], depth: int) -> Expr:
        name = self.pick(names)
        kind = next(t.type for t in TENSORS if t.name == name)
        if name == "len" and self.r.random() < 0.7:
            return Load(name, (b,), kind)
        at = [self.index() if self.r.random() < 0.6 else self.integer(depth - 1) for _ in range(ARITY[name])]
        if name == "perhead" and self.r.random() < 0.7:
            at[0] = h
        return Load(name, tuple(at), kind)

    def integer(self, depth: int) -> Expr:
        if depth <= 0:
            return self.pick((self.index(), self.index(), self.number(), Param("w", INT), Size("Lk")))
        kind = self.r.randrange(14)
        one = lambda: self.integer(depth - 1)  # noqa: E731
        match kind:
            case 0 | 1 | 2:
                return op(self.pick(("add", "sub", "sub")), one(), one())
            case 3:
                return op("mul", one(), self.number() if self.r.random() < 0.7 else one())
            case 4 | 5:
                return op(self.pick(("floordiv", "mod")), one(), self.number() if self.r.random() < 0.8 else one())
            case 6:
                return op(self.pick(("abs", "neg", "sign", "bitnot")), one())
            case 7:
                return op(self.pick(("min", "max")), one(), one())
            case 8:
                return op(self.pick(("bitand", "bitor", "bitxor", "shl", "shr")), one(), one())
            case 9:
                return op("where", self.boolean(depth - 1), one(), one())
            case 10 | 11:
                return self.load(("doc", "rnd", "len", "perhead", "grid", "doc"), depth)
            case 12:
                return cast(self.boolean(depth - 1) if self.r.random() < 0.5 else self.real(depth - 1), INT)
        return self.integer(0)

    def real(self, depth: int) -> Expr:
        if depth <= 0:
            return self.pick((Param("x", FLOAT), const(0.5), const(-2.0), Load("bias", (self.pick((q, k)),), FLOAT)))
        match self.r.randrange(5):
            case 0 | 1:
                return cast(self.integer(depth - 1), FLOAT)
            case 2:
                name = self.pick(("add", "sub", "mul", "div", "min", "max", "mod", "floordiv"))
                return op(name, self.real(depth - 1), self.real(depth - 1))
            case 3:
                names = ("abs", "neg", "floor", "ceil", "round", "trunc", "sqrt", "exp", "log", "tanh", "sigmoid",
                         "exp2", "log2", "log1p", "rsqrt", "sin", "atan", "sign")  # fmt: skip
                return op(self.pick(names), self.real(depth - 1))
        return op("where", self.boolean(depth - 1), self.real(depth - 1), self.real(depth - 1))

    def compare(self, depth: int) -> Expr:
        name = self.pick(("lt", "le", "gt", "ge", "eq", "ne"))
        if self.r.random() < 0.12:
            return op(name, self.real(depth), self.real(depth))
        left = self.integer(depth)
        if self.r.random() < 0.3:  # the same function of q and of k: what people write
            swap = {q: k, k: q}
            right = left
            (right,) = rewrite((left,), lambda n: swap.get(n, n))
            return op(name, left, right)
        return op(name, left, self.integer(depth - 1))

    def boolean(self, depth: int) -> Expr:
        if depth <= 0:
            return self.compare(0) if self.r.random() < 0.8 else self.load(("flag",), 0)
        match self.r.randrange(10):
            case 0 | 1 | 2:
                return op("and", self.boolean(depth - 1), self.boolean(depth - 1))
            case 3 | 4:
                return op("or", self.boolean(depth - 1), self.boolean(depth - 1))
            case 5:
                return op("not", self.boolean(depth - 1))
            case 6:
                return self.load(("flag", "table"), depth) if self.r.random() < 0.7 else Param("on", BOOL)
            case 7:
                if self.r.random() < 0.5:
                    return op("xor", self.boolean(depth - 1), self.boolean(depth - 1))
                return op("where", self.boolean(depth - 1), self.boolean(depth - 1), self.boolean(depth - 1))
        return self.compare(depth - 1)

    def problem(self, mask: Expr | None = None) -> Problem:
        lq, lk = self.r.randrange(1, 60), self.r.randrange(1, 60)
        if self.r.random() < 0.5:
            lk = lq
        sizes = {
            "B": 2,
            "H": 2,
            "Hkv": 1,
            "Lq": lq,
            "Lk": lk,
            "T0": self.r.randrange(1, 9),
            "T1": self.r.randrange(1, 9),
        }
        g = np.random.default_rng(self.r.randrange(1 << 30))
        ordered = np.sort(g.integers(-2, 8, lk))
        tensors = {
            "doc": torch.from_numpy(ordered if self.r.random() < 0.8 else ordered[::-1].copy()),
            "rnd": torch.from_numpy(g.integers(-6, 40, lk).astype(np.int32)),
            "flag": torch.from_numpy(g.random(lk) < self.pick((0.05, 0.5, 0.95))),
            "len": torch.from_numpy(g.integers(0, lk + 1, 2)),
            "perhead": torch.from_numpy(np.sort(g.integers(0, 6, (2, lk)), axis=self.r.randrange(2))),
            "table": torch.from_numpy(g.random((sizes["T0"], sizes["T1"])) < 0.5),
            "grid": torch.from_numpy(g.integers(-3, 9, (sizes["T0"], sizes["T1"]))),
            "bias": torch.from_numpy(g.normal(size=lk).astype(np.float32)),
        }
        if g.random() < 0.2:
            tensors["bias"][int(g.integers(lk))] = float(g.choice([np.nan, np.inf, -np.inf]))
        params = {"w": self.r.randrange(-3, 20), "on": self.r.random() < 0.5, "x": self.pick((0.0, 0.1, -1.5, 3.0))}
        tile = (self.r.randrange(1, 24), self.r.randrange(1, 24))
        program = simple("random", mask=self.boolean(4) if mask is None else mask, scalars=SCALARS, tensors=TENSORS)
        return Problem(program, sizes, params, tensors, tile)


def exact_kinds(mask: torch.Tensor, tile: tuple[int, int]) -> np.ndarray:
    """Kinds of tiles uint8 [B, H, nq, nk] of a dense mask [B, H, lq, lk], by looking at every pair."""
    lq, lk = mask.shape[2:]
    bm, bn = tile
    nq, nk = -(-lq // bm), -(-lk // bn)
    some = np.zeros((*mask.shape[:2], nq * bm, nk * bn), bool)
    every = np.ones_like(some)
    some[:, :, :lq, :lk] = every[:, :, :lq, :lk] = mask.numpy()
    split = (*mask.shape[:2], nq, bm, nk, bn)
    some, every = some.reshape(split).any((3, 5)), every.reshape(split).all((3, 5))
    return np.where(every, FULL, np.where(some, PARTIAL, EMPTY)).astype(np.uint8)


def brute_force(problem: Problem) -> np.ndarray:
    """Exact kinds of a problem's tiles."""
    return exact_kinds(dense_mask(*problem.arguments), problem.tile)


def violations(claimed: np.ndarray, exact: np.ndarray) -> int:
    """Number of tiles called empty that hold a True, or full that hold a False. ``claimed`` may have B or H of 1."""
    claimed = np.broadcast_to(claimed, exact.shape)
    return int(((claimed == EMPTY) & (exact != EMPTY)).sum() + ((claimed == FULL) & (exact != FULL)).sum())


def missed(claimed: np.ndarray, exact: np.ndarray) -> tuple[int, int]:
    """Numbers of truly empty and truly full tiles that were left partial."""
    claimed = np.broadcast_to(claimed, exact.shape)
    return tuple(int(((exact == kind) & (claimed != kind)).sum()) for kind in (EMPTY, FULL))  # type: ignore[return-value]
