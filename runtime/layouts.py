"""Calls under a layout: tokens are put in order on the way in and back on the way out.

The slots of the call that a kernel sees hold the tokens in the order of the layout; what the mask and the score know of
a token comes from tables (``attnlang.sparsity.layout``). Tables, orders and run maps are made once for everything they
depend on and remembered.

Where nothing is differentiated on a CPU, a few heads are moved at a time, through buffers that stay in the cache: fresh
pages for whole copies of q, k, v and o would take as long as the attention itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from attnlang.ir import (
    INT,
    KEY_ADDRESS,
    OUTPUT_NAMES,
    Expr,
    Index,
    Param,
    Program,
    Scalar,
    ScalarParam,
    Size,
    UsageError,
    rewrite,
)
from attnlang.ir.build import op

from . import autograd, dispatch
from .call import Call
from .runs import Memory, identify

if TYPE_CHECKING:
    from attnlang.sparsity import Layout, RunMap

    from .rows import Job

__all__ = ["Choice", "attend", "choose", "gradients", "run"]

Tensor = torch.Tensor
Tile = tuple[int, int]
CPU = torch.device("cpu")

Choice = Any
"""What a person may ask for: a Layout, a text (see ``sparsity.layout_text``), ``"auto"``, or None."""

CPU_TILE, CPU_KEY_TILES = (64, 64), (32, 16)
TILE = (128, 128)
BUFFER_BYTES = 12 << 20
"""Size of the moved q, k, v and o of the heads that are worked on together."""
THREAD_ROWS = 1024
"""Queries that a thread has to be given at a time, so that all finish together."""


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

    def runs_of(self, call: Call, batch: int, heads: slice) -> Callable[[Tile], RunMap]:
        """The run maps of one batch element and some heads."""

        def runs(tile: Tile) -> RunMap:
            whole = self.runs(call)(tile)
            if whole.batch == whole.heads == 1:
                return whole
            b, some = batch if whole.batch > 1 else 0, heads if whole.heads > 1 else slice(0, 1)
            key = (tile, b, some.start, some.stop)
            if key not in self.maps:
                self.maps[key] = whole.part(b, some)
            return self.maps[key]

        return runs


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
    groups = _groups(call)
    if groups and (here.q or here.k) and _can_copy(call):
        return _by_parts(call, here, groups, backend)
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


def _can_copy(call: Call) -> bool:
    """Whether heads may be copied one by one: on a CPU, where nothing records what is done."""
    return call.q.device.type == "cpu" and not autograd.wants_gradients(call) and not dispatch.is_batched(call)


def _roots(program: Program) -> tuple[Expr, ...]:
    """Everything that run maps and tables depend on: the mask, and what tables of the score hold."""
    from attnlang.passes.tabulate import tabulate

    return (program.mask, *(t.expr for t in tabulate(program).tables))


def _arrange(call: Call, layout: Layout) -> _Arranged:
    device = call.q.device

    def make() -> _Arranged:
        from attnlang.sparsity import lay_out

        with torch.no_grad():
            laid = lay_out(call.program, layout, call.sizes, call.params, call.tensors, device)
            axes = [_Axis.of(layout.tokens(axis)) for axis in "qk"]
        q, k = (axis and axis.to(device) for axis in axes)
        return _Arranged(layout, laid.program, laid.sizes, laid.tables, q, k)

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
    return replace(
        call,
        program=here.program,
        q=q,
        k=k,
        v=v,
        sizes=here.sizes,
        tensors=here.tensors(call),
        runs=here.runs(call),
        key_tile=here.layout.key_tile,
    )


# --- a few heads at a time


_FIRST: dict[Expr, str] = {Index("b"): "first_batch", Index("h"): "first_head"}
_ALL: dict[Expr, str] = {Size("B"): "all_batches", Size("H"): "all_heads", Size("Hkv"): "all_key_heads"}


@lru_cache(maxsize=256)
def _part_program(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The program of some batch elements and heads, and its new parameters: the first of each, the number of each."""
    taken = {p.name for p in program.scalars} | {t.name for t in program.tensors}
    names: list[str] = []
    moved: dict[Expr, Expr] = {}
    for node, name in (*_FIRST.items(), *_ALL.items()):
        while name in taken:
            name += "_"
        names.append(name)
        param = Param(name, INT)
        moved[node] = op("add", node, param) if isinstance(node, Index) else param
    mask, score = rewrite((program.mask, program.score), lambda node: moved.get(node, node))
    scalars = (*program.scalars, *(ScalarParam(name, INT) for name in names))
    return replace(program.with_hooks(mask=mask, score=score), scalars=scalars), tuple(names)


def _groups(call: Call) -> int:
    """How many key heads to move at a time; 0 where all may be moved at once."""
    (batch, heads, lq, dim), (_, shared, lk, _), dv = call.q.shape, call.k.shape, call.v.shape[3]
    addresses = (o.address for o in call.program.attend.operands() if o.source in ("k", "v"))
    if not shared or heads % shared or not lq or any(a != KEY_ADDRESS for a in addresses):
        return 0
    group = heads // shared
    fit = BUFFER_BYTES // max(1, (group * lq + lk) * (dim + dv) * call.q.element_size())
    busy = -(-THREAD_ROWS * torch.get_num_threads() // (group * lq))
    groups = max(1, fit, busy)
    return groups if groups < shared or (batch > 1 and groups == shared) else 0


def _by_parts(call: Call, here: _Arranged, groups: int, backend: str | None) -> tuple[Tensor, Tensor]:
    from .rows import move

    batch, heads, lq, _ = call.q.shape
    shared = call.k.shape[1]
    group = heads // shared
    o = call.q.new_empty((batch, heads, lq, call.v.shape[3]))
    lse = call.q.new_empty((batch, heads, lq), dtype=torch.float64 if o.dtype is torch.float64 else torch.float32)
    program, names = _part_program(here.program)
    tensors = here.tensors(call)
    orders, key_orders = here.heads or (0,) * heads, _heads(here.heads, shared) or (0,) * shared
    space: dict[str, Tensor] = {}
    jobs: list[Job] = []

    def take(name: str, x: Tensor, axis: _Axis | None, b: int, part: slice, which: tuple[int, ...]) -> Tensor:
        """Some heads of one batch element, which the jobs put in order."""
        if axis is None:
            return x[b : b + 1, part]
        shape = (1, part.stop - part.start, *x.shape[2:])
        if name not in space or space[name].shape != shape:
            space[name] = x.new_empty(shape)
        heads = range(part.start, part.stop)
        jobs.extend((x[b, h], space[name][0, i], axis.tokens[which[h]]) for i, h in enumerate(heads))
        return space[name]

    for b in range(batch):
        for first in range(0, shared, groups):
            keys = slice(first, min(shared, first + groups))
            rows = slice(first * group, keys.stop * group)
            part = replace(
                call,
                program=program,
                q=take("q", call.q, here.q, b, rows, orders),
                k=take("k", call.k, here.k, b, keys, key_orders),
                v=take("v", call.v, here.k, b, keys, key_orders),
                sizes={**here.sizes, "B": 1, "H": rows.stop - rows.start, "Hkv": keys.stop - keys.start},
                params={**call.params, **dict(zip(names, (b, rows.start, batch, heads, shared), strict=True))},
                tensors=tensors,
                runs=here.runs_of(call, b, rows),
                key_tile=here.layout.key_tile,
            )
            move(jobs)
            found, found_lse = dispatch.attend(part, backend)
            jobs.clear()
            if here.q is None:
                o[b, rows], lse[b, rows] = found[0], found_lse[0]
                continue
            for i, h in enumerate(range(rows.start, rows.stop)):
                slots = here.q.slots[orders[h]]
                jobs += [(found[0, i], o[b, h], slots), (found_lse[0, i], lse[b, h], slots)]
            move(jobs)
            jobs.clear()
    return o, lse
