"""Random differentiable scores that read captured tensors through many index maps, and calls that run many at once.

Compiling a kernel costs more than checking it, so one kernel runs many scores: head ``h`` takes the score of number
``h``. Every function is kept off its poles, because in float32 nothing near a pole can be compared; kinks are allowed,
see :func:`check`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import torch

from attnlang.ir import FLOAT, INT, Const, Expr, Load, Program, Size, TensorParam, format_expr, postorder, simple
from attnlang.ir.build import TRUE, all_of, clamp, h, k, op, q, s
from attnlang.runtime.call import Call

from .cases import CAUSAL, cotangents, exact, make_call, measured

Tensor = torch.Tensor
BUCKETS = 11

LOADS: dict[str, tuple[tuple[str, ...], tuple[Expr, ...]]] = {
    # shape and index; tensors without H are shared by all scores
    "row": (("H", "Lq"), (h, q)),
    "col": (("H", "Lk"), (h, k)),
    "gate": (("H",), (h,)),
    "shared_row": (("Lq",), (q,)),
    "shared_col": (("Lk",), (k,)),
    "number": ((), ()),
    "distance": (("H", "n_distance"), (h, op("add", op("sub", q, k), Size("Lk")))),
    "near": (("H", "n_near"), (h, clamp(op("add", op("sub", k, q), 6), 0, 12))),
    "sum": (("H", "n_distance"), (h, op("add", q, k))),
    "pair": (("H", "Lq", "Lk"), (h, q, k)),
    "flipped": (("H", "Lk", "Lq"), (h, k, q)),
}
SCATTERS: dict[str, tuple[tuple[str, ...], tuple[Expr, ...]]] = {
    "hashed": (("H", "n_hashed"), (h, op("mod", op("add", op("mul", q, 3), k), BUCKETS))),
    "bucket": (("n_hashed",), (Load("bucket_of", (q, k), INT),)),
    "short": (("H", "n_near", "Lk"), (h, q, k)),
}
"""Reads that only a scatter can differentiate; a GPU kernel refuses some of them."""


class Maker:
    """Draws scores from a seeded generator; ``loads`` are the reads of captured tensors it may use."""

    def __init__(self, random: Random, loads: dict[str, tuple[tuple[str, ...], tuple[Expr, ...]]]) -> None:
        self.random, self.loads = random, loads

    def score(self) -> Expr:
        """A score that depends on the product of query and key, most of the time."""
        inner = self._float(self.random.randint(1, 3))
        return op("add", inner, s) if self.random.random() < 0.7 else inner

    def _float(self, depth: int) -> Expr:
        if depth == 0 or self.random.random() < 0.15:
            return self._leaf()
        return self.random.choice((self._unary, self._binary, self._binary, self._choice))(depth)

    def _leaf(self) -> Expr:
        kind = self.random.random()
        if kind < 0.4:
            return s
        if kind < 0.85:
            name = self.random.choice(list(self.loads))
            return Load(name, self.loads[name][1], FLOAT)
        if kind < 0.93:
            return op("mul", op("to_float", op("sub", q, k)), 0.03)
        return Const(round(self.random.uniform(-2, 2), 2), FLOAT)

    def _unary(self, depth: int) -> Expr:
        x = self._float(depth - 1)
        square = op("mul", x, x)
        small = op("tanh", x)
        return self.random.choice(
            [op(name, x) for name in ("neg", "abs", "tanh", "sigmoid", "sin", "cos", "atan", "erf")]
            + [op(name, small) for name in ("exp", "exp2", "expm1", "tan")]
            + [op(name, op("add", square, 0.5)) for name in ("log", "log2", "sqrt", "rsqrt")]
            + [op("log1p", square), op("min", op("max", x, -1.2), 1.3)]
        )

    def _binary(self, depth: int) -> Expr:
        x, y = self._float(depth - 1), self._float(depth - 1)
        positive = op("add", op("mul", y, y), 0.5)
        exponent = op("tanh", x) if self.random.random() < 0.5 else Const(self.random.choice((-1.0, 0.5, 2.0)), FLOAT)
        return self.random.choice(
            [op(name, x, y) for name in ("add", "sub", "min", "max")]
            + [op("mul", op("tanh", x), y)] * 2
            + [op("div", x, positive), op("pow", positive, exponent)]
        )

    def _choice(self, depth: int) -> Expr:
        x, y = self._float(depth - 1), self._float(depth - 1)
        condition = self.random.choice(
            (
                op("eq", op("mod", q, 3), op("mod", k, 3)),
                op("lt", op("abs", op("sub", q, k)), 9),
                op("gt", s, round(self.random.uniform(-1, 1), 3)),
                op("eq", op("mod", op("add", h, k), 2), 0),
            )
        )
        return op("where", condition, x, y)

    def mask(self) -> Expr:
        return self.random.choice(
            (
                TRUE,
                CAUSAL,
                op("le", op("abs", op("sub", q, k)), self.random.randint(3, 60)),
                all_of(CAUSAL, op("ge", q, self.random.randint(1, 30))),  # rows without keys
                op("ne", op("mod", op("add", q, h), 3), op("mod", k, 4)),
                op("lt", op("sub", q, k), op("add", h, 5)),
            )
        )


@dataclass(frozen=True)
class Batch:
    """A call that runs ``scores``, one a head."""

    seed: int
    scores: tuple[Expr, ...]
    call: Call


def batch(seed: int, count: int, lq: int, lk: int, *, scatters: bool = True) -> Batch:
    """``count`` random scores under one random mask, equal for equal arguments."""
    random = Random(seed)
    loads = LOADS | (SCATTERS if scatters else {})
    maker = Maker(random, dict(random.sample(sorted(loads.items()), 6)))  # each load costs compile time
    scores = tuple(maker.score() for _ in range(count))
    chosen = functools.reduce(
        lambda rest, i: op("where", op("eq", h, i), scores[i], rest), reversed(range(count - 1)), scores[-1]
    )
    shapes = {"bucket_of": ("Lq", "Lk")} | {n: shape for n, (shape, _) in loads.items()}
    extents = {"H": count, "Lq": lq, "Lk": lk, "n_distance": lq + lk + 1, "n_near": 13, "n_hashed": BUCKETS}
    generator = torch.Generator().manual_seed(seed)
    params, tensors = [], {}
    for name, shape in shapes.items():
        kind = INT if name == "bucket_of" else FLOAT
        size = [extents[n] for n in shape]
        params.append(TensorParam(name, kind, tuple(Size(n) for n in shape)))
        integers = torch.randint(BUCKETS, size, generator=generator)
        tensors[name] = integers if kind is INT else torch.randn(size, generator=generator) * 0.7
    program = simple(f"seed_{seed}", mask=maker.mask(), score=chosen, tensors=tuple(params))
    program, tensors = _only_read(program, tensors)
    kv_heads = random.choice([n for n in (1, 2, 5, count) if count % n == 0])
    dims = random.choice(((8, 8), (5, 16), (16, 3)))
    return Batch(seed, scores, make_call(program, (1, count, kv_heads, lq, lk, *dims), tensors))


def _only_read(program: Program, tensors: dict[str, Tensor]) -> tuple[Program, dict[str, Tensor]]:
    read = {n.tensor for n in postorder(program.score) if isinstance(n, Load)}
    kept = tuple(p for p in program.tensors if p.name in read)
    return replace(program, tensors=kept), {p.name: tensors[p.name] for p in kept}


def check(found: Batch, forward: Callable, backward: Callable, tolerance: float = 1e-4) -> None:
    """Compare gradients with autograd through the float64 reference.

    float32 scores may fall on the other side of a kink, or lose digits to cancellation. Where a gradient differs by
    more than ``tolerance``, it may still differ by a few times what the exact gradients change when the operands change
    by one part in a million.
    """
    call = found.call
    do, dlse = cotangents(call)
    ours, want = measured(call, forward, backward, do, dlse), exact(call, do, dlse)
    errors = {n: _distance(ours[n], w) for n, w in want.items()}
    if all((e < tolerance).all() for e in errors.values()):
        return
    slack = {n: torch.zeros_like(e) for n, e in errors.items()}
    for attempt in range(6):
        moved = exact(_moved(call, attempt), do, dlse)
        slack = {n: torch.maximum(x, _distance(moved[n], want[n])) for n, x in slack.items()}
    for name, error in errors.items():
        allowed = tolerance + 4 * slack[name]
        bad = (~(error < allowed)).nonzero().flatten().tolist()
        assert not bad, _report(found, name, bad, error, allowed)


def _distance(x: Tensor, want: Tensor) -> Tensor:
    """Largest difference in each slice along the first dimension of more than one, relative to the slice."""
    if not want.numel():
        return torch.zeros(1, dtype=torch.float64)
    while want.dim() > 1 and want.shape[0] == 1:
        x, want = x[0], want[0]
    x, want = (t.reshape(len(want), -1) if want.dim() > 1 else t.reshape(1, -1) for t in (x, want))
    size = want.abs().amax(1)
    return (x - want).abs().amax(1) / torch.maximum(size, 0.02 * size.max() + 1e-6)


def _moved(call: Call, attempt: int) -> Call:
    generator = torch.Generator().manual_seed(attempt)
    step = lambda t: t.double() * (1 + 1e-6 * torch.randn(t.shape, generator=generator, dtype=torch.float64))  # noqa: E731
    tensors = {n: step(t) if t.is_floating_point() else t for n, t in call.tensors.items()}
    return replace(call, q=step(call.q), k=step(call.k), tensors=tensors)


def _report(found: Batch, name: str, bad: list[int], error: Tensor, allowed: Tensor) -> str:
    worst = max(bad, key=lambda i: float(error[i] / allowed[i]))
    lines = [f"seed {found.seed}: gradient of {name} is wrong by {error[worst]:.2e} (allowed {allowed[worst]:.2e})"]
    lines += [f"mask {format_expr(found.call.program.mask)}"]
    lines += [
        f"score {i}: {format_expr(x)}" for i, x in enumerate(found.scores) if name not in ("q", "gate") or i in bad
    ]
    return "\n".join(lines)
