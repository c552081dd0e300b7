"""Calls under a layout: tokens are put in order on the way in and back on the way out.

The slots of the call that a kernel sees hold the tokens in the order of the layout; what the mask and the score know of
a token comes from tables (``attnlang.sparsity.layout``). Tables, orders and run maps are made once for everything they
depend on and remembered.

Where nothing is differentiated, kernels read and write the rows of their slots where they are, and nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from attnlang.ir import (
    INT,
    OUTPUT_NAMES,
    Expr,
    Index,
    Load,
    Program,
    Scalar,
    Size,
    TensorParam,
    UsageError,
)

from . import autograd, dispatch
from .call import Call
from .compiled import DEVICES
from .errors import Unavailable
from .runs import Memory, identify
from .transforms import Kind, innermost, without_kernels

if TYPE_CHECKING:
    from attnlang.sparsity import Layout, RunMap

__all__ = ["Choice", "attend", "choose", "gradients", "run"]

Tensor = torch.Tensor
Tile = tuple[int, int]
CPU = torch.device("cpu")

Choice = Any
"""What a person may ask for: a Layout, a text (see ``sparsity.layout_text``), ``"auto"``, or None."""

CPU_TILE, CPU_KEY_TILES = (64, 64), (32, 16)
TILE = (128, 128)

Order = tuple[Expr | None, Expr | None]


@dataclass(frozen=True)
class _Axis:
    """The order of one axis: the token in each slot and the slot of each token, int64 [orders, L]; None if plain."""

    tokens: Tensor
    slots: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> _Axis | None:
        count = tokens.shape[-1]
        if torch.equal(tokens, torch.arange(count).expand_as(tokens)):
            return None
        return cls(tokens, tokens.argsort(-1))

    def to(self, device: torch.device) -> _Axis:
        return _Axis(self.tokens.to(device), self.slots.to(device))

    @cached_property
    def table(self) -> Tensor:
        """The tokens as kernels read them."""
        found = self.tokens if len(self.tokens) > 1 else self.tokens[0]
        return found.to(torch.int32) if self.tokens.shape[-1] < 2**31 else found

    def back(self) -> _Axis:
        return _Axis(self.slots, self.tokens)


@dataclass(frozen=True, eq=False)
class _Arranged:
    """A laid out program on one device, with its tables, its orders and the run maps it was asked for."""

    layout: Layout
    program: Program
    sizes: dict[str, int]
    tables: dict[str, Tensor]
    q: _Axis | None
    k: _Axis | None
    which: tuple[str, str]
    maps: dict[Any, RunMap] = field(default_factory=dict)

    @property
    def heads(self) -> tuple[int, ...]:
        return self.layout.heads if self.layout.per_head else ()

    def tensors(self, call: Call) -> dict[str, Tensor]:
        return {**call.tensors, **self.tables}

    def runs(self, call: Call) -> Callable[[Tile], RunMap]:
        def runs(tile: Tile) -> RunMap:
            if tile not in self.maps:
                from attnlang.sparsity import analyse

                self.maps[tile] = analyse(self.program, self.sizes, call.params, self.tensors(call), tile)
            return self.maps[tile]

        return runs

    def laid(self, call: Call) -> Call:
        """The call over slots, whose rows are yet where they were."""
        return replace(
            call,
            program=self.program,
            sizes=self.sizes,
            tensors=self.tensors(call),
            runs=self.runs(call),
            key_tile=self.layout.key_tile,
        )

    def read_in_order(self, call: Call) -> Call:
        """The call as a kernel sees it that finds the row of a slot itself."""
        program, order, names = _placed(self.program, *self.which, self.q is not None, self.k is not None)
        tokens = {n: axis.table for n, axis in zip(names, (self.q, self.k), strict=True) if axis is not None}
        laid = self.laid(call)
        return replace(laid, program=program, tensors={**laid.tensors, **tokens}, order=order)


@lru_cache(maxsize=256)
def _placed(program: Program, which: str, orders: str, q: bool, k: bool) -> tuple[Program, Order, tuple[str, str]]:
    """The program with tables of the token in each slot, the rows of slots read from them, and the tables' names."""
    taken = {p.name for p in program.scalars} | {t.name for t in program.tensors}
    params: list[TensorParam] = []
    order: list[Expr | None] = []
    names: list[str] = []
    lead, orders_of = ((Load(which, (Index("h"),), INT),), (Size(orders),)) if which else ((), ())
    for axis, moved, length in (("q", q, "Lq"), ("k", k, "Lk")):
        name = f"token_of_{axis}"
        while name in taken:
            name += "_"
        names.append(name)
        order.append(Load(name, (*lead, Index(axis)), INT) if moved else None)
        params += [TensorParam(name, INT, (*orders_of, Size(length)))] if moved else []
    return replace(program, tensors=(*program.tensors, *params)), (order[0], order[1]), (names[0], names[1])


_arranged: Memory[_Arranged] = Memory(16)
_chosen: Memory[Any] = Memory(64)


def choose(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Scalar],
    tensors: Mapping[str, Tensor],
    choice: Choice,
    device: torch.device = CPU,
) -> Layout | None:
    """Return the layout that ``choice`` means for these arguments, None for the order the tokens are in.

    ``device`` is where the call will run; layouts are chosen for the tiles of its kernels.

    Raises:
        UsageError: the choice does not fit the program or the lengths.
    """
    from attnlang.sparsity import Layout
    from attnlang.sparsity.layout_text import parse_layout
    from attnlang.sparsity.propose import grids_of, propose_layouts

    if choice is None or isinstance(choice, Layout):
        return choice
    if not isinstance(choice, str):
        raise UsageError(f"a layout is a Layout, a tensor, a text or None, got {type(choice).__name__}")
    cpu = device.type == "cpu"

    def find() -> Layout | None:
        if choice != "auto":
            return parse_layout(choice, grids_of(program, sizes, params))
        tile, smaller = (CPU_TILE, CPU_KEY_TILES) if cpu else (TILE, ())
        found = propose_layouts(program, sizes, params, tensors, tile, 1, smaller)
        return found[0].layout if found else None

    base = identify(_roots(program), sizes, params, tensors)
    return _chosen.get(base, (choice, cpu, sizes["H"], sizes["Hkv"], program), find)


def run(call: Call, choice: Choice, backend: str | None = None) -> dict[str, Tensor]:
    """Return every result of the program of ``call`` by name, computed under a layout.

    Raises:
        UsageError: the layout does not fit the call, or the program is more than softmax attention.
        Unavailable: ``backend`` was named and cannot run this call.
    """
    if choice is None:
        return dispatch.run(call, backend)
    if not call.program.standard:
        raise UsageError(
            f"{call.program.name} is more than one stage of softmax attention, which layouts are for so far"
        )
    return dict(zip(OUTPUT_NAMES, attend(call, choice, backend), strict=True))


def attend(call: Call, choice: Choice, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Return o [B, H, Lq, Dv] and lse [B, H, Lq] of ``call``, in the caller's order of tokens, under a layout.

    Differentiable as :func:`attnlang.runtime.dispatch.attend` is.

    Raises:
        UsageError: the layout does not fit the call.
        Unavailable: ``backend`` was named and cannot run this call.
    """
    layout = choose(call.program, call.sizes, call.params, call.tensors, choice, call.q.device)
    if layout is None:
        return dispatch.attend(call, backend)
    here = _arrange(call, layout)
    forward = _in_place(call, backend)
    if (here.q or here.k) and forward is not None:
        with suppress(Unavailable):  # which the way below explains
            return forward(here.read_in_order(call))
    o, lse = dispatch.attend(_moved(call, here), backend)
    return _put(o, here.q and here.q.back(), here.heads), _put(lse, here.q and here.q.back(), here.heads)


def gradients(
    call: Call,
    choice: Choice,
    backend: str | None,
    needs: tuple[bool, ...],
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
) -> list[Tensor | None]:
    """Return gradients of q, k, v and the captured tensors of ``call``, as :func:`autograd.gradients` does."""
    layout = choose(call.program, call.sizes, call.params, call.tensors, choice, call.q.device)
    if layout is None:
        return autograd.gradients(call, dispatch.backward_of(call, backend), needs, o, lse, do, dlse)
    here = _arrange(call, layout)
    moved = _moved(call, here)
    rows = [_put(x, here.q, here.heads) for x in (o, lse, do, dlse)]
    wanted = (*needs, *(False for _ in range(len(moved.tensors) - len(call.tensors))))
    found = autograd.gradients(moved, dispatch.backward_of(moved, backend), wanted, *rows)
    axes = (here.q, here.k, here.k)
    back = [
        g if g is None else _put(g, axis and axis.back(), _heads(here.heads, g.shape[1]))
        for g, axis in zip(found, axes, strict=False)
    ]
    return [*back, *found[3 : len(needs)]]


def _in_place(call: Call, backend: str | None) -> Callable[[Call], tuple[Tensor, Tensor]] | None:
    """What runs a kernel that finds rows where they are; None where rows have to be in order.

    That is so where somebody records what is done, for the eager executor, and for matrix units that want rows packed.
    """
    chosen = backend or DEVICES.get(call.q.device.type)
    if chosen not in DEVICES.values() or autograd.wants_gradients(call) or innermost() is Kind.GRAD:
        return None
    if without_kernels((call.q, call.k, call.v, *call.tensors.values())):
        return None
    if chosen == "triton":
        try:
            from . import triton
        except ImportError:
            return None
        return triton.forward
    from . import cpp

    return None if cpp.prefers_order(call) else cpp.forward


def _roots(program: Program) -> tuple[Expr, ...]:
    """Everything that run maps and tables depend on: the mask, and what tables of the score hold."""
    from attnlang.passes.tabulate import tabulate

    return (program.mask, *(t.expr for t in tabulate(program).tables))


def _arrange(call: Call, layout: Layout) -> _Arranged:
    device = call.q.device

    def make() -> _Arranged:
        from attnlang.passes.tabulate import tabulate
        from attnlang.sparsity import lay_out

        with torch.no_grad():
            laid = lay_out(call.program, layout, call.sizes, call.params, call.tensors, device)
            axes = [_Axis.of(layout.tokens(axis)) for axis in "qk"]
        q, k = (axis and axis.to(device) for axis in axes)
        names = tabulate(call.program, layout.per_head)
        return _Arranged(layout, laid.program, laid.sizes, laid.tables, q, k, (names.order_of_head, names.orders))

    base = identify(_roots(call.program), call.sizes, call.params, call.tensors)
    shared = (call.sizes["B"], call.sizes["H"], call.sizes["Hkv"])
    return _arranged.get(base, (layout, str(device), shared, call.program), make)


def _heads(heads: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The orders of ``count`` heads of keys, of those of the query heads."""
    return heads[:: len(heads) // count] if heads and count else heads


def _index(x: Tensor, tokens: Tensor, heads: tuple[int, ...]) -> Tensor:
    if not heads:
        return x.index_select(2, tokens[0])
    which = torch.tensor(heads, device=x.device)
    return x[:, torch.arange(len(heads), device=x.device)[:, None], tokens[which]]


class _Move(torch.autograd.Function):
    """Rows of x [B, H, L, ...] in another order; the gradient is moved back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, tokens: Tensor, slots: Tensor, heads: tuple[int, ...]) -> Tensor:
        return _index(x, tokens, heads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, tokens, slots, ctx.heads = inputs
        ctx.save_for_backward(tokens, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tokens, slots = ctx.saved_tensors
        return _Move.apply(grad, slots, tokens, ctx.heads), None, None, None


def _put(x: Tensor, axis: _Axis | None, heads: tuple[int, ...]) -> Tensor:
    """Return rows of ``x`` [B, H, L] or [B, H, L, D] in the order of ``axis``."""
    if axis is None:
        return x
    moved: Tensor = _Move.apply(x, axis.tokens, axis.slots, heads)
    return moved


def _moved(call: Call, here: _Arranged) -> Call:
    """The call as a kernel sees it."""
    q = _put(call.q, here.q, here.heads)
    k, v = (_put(x, here.k, _heads(here.heads, x.shape[1])) for x in (call.k, call.v))
    return replace(here.laid(call), q=q, k=k, v=v)
