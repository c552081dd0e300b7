"""Run maps of calls: from the closed form of the mask where it has one, else analysed and remembered.

A run map is a function of the mask, the lengths, the parameters and the captured tensors the mask reads. Small tensors
on the CPU are identified by their contents; others by the tensor object and its version counter, which every in-place
operation moves. A tensor that has no version counter (made in inference mode, off the CPU) is never remembered.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import torch

from attnlang.ir import Expr, Index, Load, Param, Program, Scalar, Size, postorder

from .transforms import outside, unwrapped

if TYPE_CHECKING:
    from attnlang.sparsity import RunMap

__all__ = ["Memory", "RunMaps", "Runs", "identify", "run_maps", "warn_blind"]

Tile: TypeAlias = tuple[int, int]
Key: TypeAlias = tuple[Any, ...]
Alive: TypeAlias = "tuple[weakref.ref[torch.Tensor], ...]"
Identity: TypeAlias = "tuple[Key, Alive]"
V = TypeVar("V")

CAPACITY = 64
HASHED_BYTES = 4 << 20
"""Largest tensor, in bytes, that is identified by its contents."""


@dataclass(frozen=True)
class _Reads:
    """What a mask depends on."""

    axes: frozenset[str]
    sizes: tuple[str, ...]
    params: tuple[str, ...]
    tensors: tuple[str, ...]


def _reads(*roots: Expr) -> _Reads:
    nodes = list(postorder(*roots))
    return _Reads(
        frozenset(n.axis for n in nodes if isinstance(n, Index)),
        tuple(dict.fromkeys(n.name for n in nodes if isinstance(n, Size))),
        tuple(dict.fromkeys(n.name for n in nodes if isinstance(n, Param))),
        tuple(dict.fromkeys(n.tensor for n in nodes if isinstance(n, Load))),
    )


def _fingerprint(t: torch.Tensor) -> tuple[Key, weakref.ref[torch.Tensor] | None] | None:
    """Identify the contents of ``t``; the reference, if any, must stay alive for the key to mean anything."""
    kind = (str(t.dtype), tuple(t.shape), str(t.device))
    if t.device.type == "cpu" and t.numel() * t.element_size() <= HASHED_BYTES:
        # one element, or none, may have any stride, and then a view of its bytes is refused
        data = t.detach().contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8).numpy()
        return (*kind, hashlib.sha1(data.data, usedforsecurity=False).digest()), None
    if t.is_inference():
        return None
    return (*kind, id(t), t.data_ptr(), t.stride(), t._version), weakref.ref(t)


@dataclass(frozen=True)
class Runs:
    """The run maps of one call, as a function of the (query, key) tile."""

    find: Callable[[Tile], RunMap]
    program: Program
    sizes: Mapping[str, int]
    params: Mapping[str, Scalar]
    tensors: Mapping[str, torch.Tensor]

    def __call__(self, tile: Tile) -> RunMap:
        return self.find(tile)

    def closed(self, loop: str) -> bool:
        """Whether a kernel whose inner loop is over ``loop`` (``"k"`` or ``"q"``) may compute its own run bounds."""
        from attnlang.sparsity import closed_form

        form = closed_form(self.program, loop)
        return form is not None and form.exact and form.holds(self.sizes, self.params, _storage(self.tensors))


@functools.lru_cache(maxsize=CAPACITY)
def warn_blind(mask: Expr, name: str) -> None:
    """A mask that hides everything is more often a mistake than wanted; say so, once for each mask."""
    reason = (
        "what its captured tensors hold"
        if any(isinstance(n, Load) for n in postorder(mask))
        else "it contradicts itself"
    )
    warnings.warn(
        f"{name}: no query can see any key at these lengths ({reason}); the output is zero",
        RuntimeWarning,
        stacklevel=6,
    )


class Memory(Generic[V]):
    """A small, thread-safe memory of what was made from tensors; the least recently used is forgotten first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._made: OrderedDict[Key, tuple[V, Alive]] = OrderedDict()

    def clear(self) -> None:
        with self._lock:
            self._made.clear()

    def get(self, base: Identity | None, more: Key, make: Callable[[], V]) -> V:
        """Return what ``make`` made for this identity and ``more``, made now where there is none or no identity."""
        if base is None:
            return make()
        key = (*base[0], *more)
        with self._lock:
            if (hit := self._made.get(key)) is not None:
                if all(r() is not None for r in hit[1]):
                    self._made.move_to_end(key)
                    return hit[0]
                del self._made[key]  # another tensor now has the identity of a dead one
        made = make()
        with self._lock:
            self._made[key] = made, base[1]
            while len(self._made) > self._capacity:
                self._made.popitem(last=False)
        return made


@lru_cache(maxsize=1024)
def _known_reads(roots: tuple[Expr, ...]) -> _Reads:
    return _reads(*roots)


def identify(
    roots: tuple[Expr, ...],
    sizes: Mapping[str, int],
    params: Mapping[str, Scalar],
    tensors: Mapping[str, torch.Tensor],
) -> Identity | None:
    """Return a key for everything the values of ``roots`` depend on, and the tensors that must stay alive for it.

    None where a tensor cannot be identified.
    """
    reads = _known_reads(roots)
    prints, alive = [], []
    for name in reads.tensors:
        found = _fingerprint(tensors[name])
        if found is None:
            return None
        prints.append(found[0])
        if found[1] is not None:
            alive.append(found[1])
    lengths = [sizes["Lq"], sizes["Lk"], *(sizes[n] for n in reads.sizes)]
    lengths += [sizes[size] for axis, size in (("b", "B"), ("h", "H")) if axis in reads.axes]
    return (roots, tuple(lengths), tuple(params[n] for n in reads.params), tuple(prints)), tuple(alive)


class RunMaps:
    """A small, thread-safe cache of run maps; the least recently used one is dropped first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._memory: Memory[RunMap] = Memory(capacity)

    def provider(
        self,
        program: Program,
        sizes: Mapping[str, int],
        params: Mapping[str, Scalar],
        tensors: Mapping[str, torch.Tensor],
        warns: bool = True,
    ) -> Runs:
        """Return the run maps of a call; ``warns`` says whether a mask that hides everything is worth a warning."""
        base: list[Identity | None] = []

        def find(tile: Tile) -> RunMap:
            with outside():
                plain = {name: unwrapped(t) for name, t in tensors.items()}
                if not base:
                    base.append(identify((program.mask,), sizes, params, plain))
                found = self._memory.get(base[0], (tile,), lambda: _made(program, sizes, params, plain, tile))
            if warns and found.always_empty and found.rows and found.sizes[1]:
                warn_blind(program.mask, program.name)
            return found

        return Runs(find, program, sizes, params, tensors)

    def clear(self) -> None:
        self._memory.clear()


def _storage(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()}


def _made(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Scalar],
    tensors: Mapping[str, torch.Tensor],
    tile: Tile,
) -> RunMap:
    from attnlang.sparsity import analyse, closed_form

    form = closed_form(program)
    if form is not None and form.exact and form.holds(sizes, params, _storage(tensors)):
        return form.run_map(program, sizes, params, tensors, tile)
    return analyse(program, sizes, params, tensors, tile=tile)


run_maps = RunMaps()
"""The run maps of this process."""
