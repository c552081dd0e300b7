"""Gradients on the Triton backend: two generated kernels, and their sums for captured tensors brought back.

Works with ``TRITON_INTERPRET=1`` on CPU tensors, like the forward pass.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from attnlang.codegen.plan import CapturedGrad, KernelPlan
from attnlang.codegen.scatter import Scatter, place_in_row, scatter_of
from attnlang.codegen.triton_backward_arguments import KEYS, LOOP, QUERIES, belongs
from attnlang.codegen.triton_backward_tiles import candidates
from attnlang.codegen.triton_common import Config
from attnlang.codegen.triton_pull import emit_backward
from attnlang.ir import KEY_ADDRESS, Const, Index
from attnlang.passes.levels import Level

from .call import Call
from .captured_grads import Gradients, axes_of, bring_back, total
from .errors import Unavailable
from .triton_common import Kernel, Kernels, captured_arguments, check, plan_key, plan_of, table_of

__all__ = ["Gradients", "Pair", "backward", "kernels_of", "launch", "scatter", "scatter_fits"]

Tensor = torch.Tensor

BUFFER_LIMIT = 1 << 28
"""Floats a buffer of a captured gradient may take before the PyTorch fallback is used."""
MOST_PLACES = 1 << 10
"""Elements of a query in a gradient that are added one after the other; at worst a tile of pairs meets all of them."""
INSTANCES = 512
"""Program instances wanted where sums along diagonals are private to each; a constant, so that sums do not depend on
the device."""


@dataclass(frozen=True)
class Pair:
    """Both kernels of a plan."""

    plan: KernelPlan
    queries: Kernel[KernelPlan]
    keys: Kernel[KernelPlan]


_kernels: Kernels[Pair] = Kernels()


def kernels_of(call: Call, target: str, wanted: tuple[str, ...]) -> Pair:
    """The backward kernels of a call with gradients of the captured tensors ``wanted``."""

    def make() -> Pair:
        plan = plan_of(call, backward=True, captured_grads=wanted)
        queries, keys = (
            Kernel(
                call.program,
                plan,
                target,
                candidates(plan, which, target),
                functools.partial(emit_backward, kernel=which),
            )
            for which in (QUERIES, KEYS)
        )
        return Pair(plan, queries, keys)

    return _kernels.get((*plan_key(call, target), wanted), make)


def _check(call: Call) -> str:
    target = check(call)
    (term,) = call.program.attend.terms
    values = next(x.rows for x in call.program.attend.outputs if x.rows is not None)
    if term.right.address != KEY_ADDRESS or values.address != KEY_ADDRESS:
        raise Unavailable("the Triton backward pass takes the default key address only")
    if call.q.numel() == 0 or call.k.numel() == 0 or call.v.numel() == 0:
        raise Unavailable("nothing to run")
    return target


def scatter(grad: CapturedGrad) -> Scatter | None:
    """How the gradient of a load that depends on the pair is added up, None for any other."""
    return scatter_of(grad.load, grad.derivative) if grad.level is Level.PAIR else None


class _Sums:
    """The buffer of one captured gradient, and the way from it to the tensor."""

    def __init__(self, call: Call, grad: CapturedGrad, query_tiles: int, shares: int, unit: Tensor | None) -> None:
        self.call, self.grad = call, grad
        self.scatter = scatter(grad)
        batch, heads, lq, lk = (call.sizes[n] for n in ("B", "H", "Lq", "Lk"))
        shape: tuple[int, ...]
        if self.scatter is None:
            last = {Level.GRID: query_tiles, Level.ROW: lq, Level.COL: lk}[grad.level]
            shape = (batch, heads, last, call.q.shape[3]) if grad.by_feature else (batch, heads, last)
        elif self.scatter.is_diagonal:
            shape = (batch, heads, shares, lq + lk - 1)
        else:
            shape = (*self._copies(), *call.tensors[grad.load.tensor].shape)
        floats = torch.Size(shape).numel()
        if floats > BUFFER_LIMIT:
            raise Unavailable(f"the gradient of {grad.load.tensor} would need {floats * 4 >> 20} MB of buffers")
        dtype = torch.int64 if self.scatter is Scatter.FIXED else torch.float32
        self.buffer = torch.zeros(shape, dtype=dtype, device=call.q.device)
        self.unit = unit if self.scatter is Scatter.FIXED else None

    @property
    def arguments(self) -> list[Tensor]:
        """What ``launch`` takes for this gradient."""
        return [self.buffer] if self.unit is None else [self.buffer, self.unit]

    def _copies(self) -> tuple[int, int]:
        """Copies of the tensor along batch and heads, so that no two pairs store to one element."""
        if self.scatter in (Scatter.ATOMIC, Scatter.FIXED):
            return 1, 1
        apart = _apart(self.call, self.grad)
        return 1 if "b" in apart else self.call.sizes["B"], 1 if "h" in apart else self.call.sizes["H"]

    def result(self) -> Tensor:
        """Return the gradient in the shape of the tensor."""
        load, buffer = self.grad.load, self.buffer
        match self.scatter:
            case Scatter.DIFFERENCE | Scatter.SUM:
                sign = "-" if self.scatter is Scatter.DIFFERENCE else "+"
                return bring_back(self.call, load, buffer.sum(2), f"bh{sign}")
            case Scatter.FIXED:
                assert isinstance(self.grad.derivative, Const) and self.unit is not None
                return (buffer[0, 0].double() / self.unit * float(self.grad.derivative.value)).float()
            case Scatter.STORE | Scatter.ROWS | Scatter.ATOMIC:
                return buffer.sum((0, 1))
        sums = buffer.sum(2) if self.grad.level is Level.GRID else buffer
        return bring_back(self.call, load, sums, axes_of(self.grad))


def _apart(call: Call, grad: CapturedGrad) -> set[str]:
    """Return the axes along which pairs read different elements: plain indices that no clamp brings together."""
    needed = {"b": "B", "h": "H", "q": "Lq", "k": "Lk"}
    shape = call.tensors[grad.load.tensor].shape
    plain = [(i.axis, n) for i, n in zip(grad.load.indices, shape, strict=True) if isinstance(i, Index)]
    return {axis for axis, n in plain if n >= call.sizes[needed[axis]]}


def scatter_fits(call: Call, grad: CapturedGrad, deterministic: bool) -> None:
    """Refuse what only atomic additions could do, unless they are allowed."""
    kind = scatter(grad)
    meets = kind is Scatter.STORE and not {"q", "k"} <= _apart(call, grad)
    if kind is Scatter.ROWS:
        place = place_in_row(grad.load)
        assert place is not None
        meets = "q" not in _apart(call, grad) or call.tensors[grad.load.tensor].shape[place] > MOST_PLACES
    if meets or (kind is Scatter.ATOMIC and deterministic):
        raise Unavailable(f"the gradient of {grad.load.tensor} would need additions in an order that is not fixed")


def _shares(call: Call, grads: tuple[CapturedGrad, ...], query_tiles: int) -> int | None:
    """Shares of the query tiles with sums of their own, None where no sums along diagonals are wanted."""
    if not any(kind and kind.is_diagonal for kind in map(scatter, grads)):
        return None
    instances = call.sizes["B"] * call.sizes["H"]
    most = BUFFER_LIMIT // (instances * (call.sizes["Lq"] + call.sizes["Lk"]))
    return max(1, min(query_tiles, -(-INSTANCES // instances), most))


def backward(
    call: Call,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    wanted: tuple[str, ...],
    *,
    deterministic: bool = True,
) -> Gradients:
    """Differentiate a forward call of this backend.

    ``o`` and ``lse`` are what it returned, ``do`` [B, H, Lq, Dv] and ``dlse`` [B, H, Lq] the incoming gradients, and
    ``wanted`` the captured float tensors whose gradients are needed. Gradients of a tensor read through an arbitrary
    map of the pair (``table[bucket[q, k]]``) are sums of integers, unless the tensor is a factor of the score: those
    are atomic additions of floats, which ``deterministic`` forbids.

    Raises:
        Unavailable: this backend cannot run the call here.
    """
    target = _check(call)
    kernels = kernels_of(call, target, wanted)
    for grad in kernels.plan.grads:
        scatter_fits(call, grad, deterministic)
    do = do.to(call.q.dtype)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.float().contiguous()
    dq, dk, dv = (torch.empty_like(t) for t in (call.q, call.k, call.v))
    has_fixed = any(scatter(g) is Scatter.FIXED for g in kernels.plan.grads)
    unit = _unit(call, do, dlse) if has_fixed else lse.new_ones(1)
    run = functools.partial(launch, call, unit=unit)
    sums = run(QUERIES, kernels.queries, (call.q, call.k, call.v, do, o, dq, lse, delta, dlse))
    sums |= run(KEYS, kernels.keys, (call.q, call.k, call.v, do, dk, dv, lse, delta))
    parts = [sums[i].result() for i in range(len(kernels.plan.grads))]
    return Gradients(dq, dk, dv, total(call, wanted, kernels.plan.grads, parts))


def _unit(call: Call, do: Tensor, dlse: Tensor) -> Tensor:
    """Return the power of two [1] by which gradients of scores are multiplied before they are added up as int64.

    The weights of a row add up to 1 and its output is a mean of values, so the gradients of its scores add up to at
    most 2 |do| max |v| + |dlse|, with sums of sizes for |do|; the sum over all rows stays below 2**61. A bound that is
    not finite gives NaN.
    """
    size = call.v.abs().amax().float()
    rows = 2 * size * torch.linalg.vector_norm(do, ord=1, dim=-1, dtype=torch.float32) + dlse.abs()
    bound = rows.sum(dtype=torch.float64).clamp(min=1e-30)
    unit = torch.exp2(torch.floor(60 - torch.log2(bound)).clamp(-120, 120))
    return torch.where(torch.isfinite(bound), unit, torch.nan).float().reshape(1)


def launch(
    call: Call, which: str, kernel: Kernel[KernelPlan], operands: tuple[Tensor, ...], *, unit: Tensor | None = None
) -> dict[int, _Sums]:
    """Launch the queries or the keys kernel; return the sums it made, by the number of the gradient."""
    captured = captured_arguments(call, kernel.plan)
    grads = (*kernel.plan.grads, *kernel.plan.feature_grads)
    own = [i for i, g in enumerate(grads) if belongs(g, which)]
    made: dict[int, _Sums] = {}

    def arguments(config: Config) -> tuple[Any, ...]:
        tiles = -(-call.sizes["Lq"] // config.block_m)
        shares = _shares(call, grads, tiles) if which == QUERIES else None
        made.update((i, _Sums(call, grads[i], tiles, shares or 1, unit)) for i in own)
        buffers = [argument for i in own for argument in made[i].arguments] + ([] if shares is None else [shares])
        table = table_of(call, kernel.plan, config, LOOP[which])
        return (*operands, call.scale, *captured, *buffers, *table)

    kernel.run(arguments)
    return made
