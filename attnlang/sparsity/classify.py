"""Three-valued evaluation of a mask over many boxes at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attnlang.ir import BOOL, INT, Expr, Load, Program, Scalar, Type, postorder
from attnlang.passes.intervals import NARROW_LIMIT, Array, Interval, Narrow, Truth

from .captured import Captured, CapturedCells
from .cells import cells, is_large
from .domain import apply
from .terms import AXIS_BITS, Linear, Node, Terms
from .transfer import to_host

__all__ = ["EMPTY", "FULL", "PARTIAL", "Boxes", "Classifier", "classify_tile"]

EMPTY, PARTIAL, FULL = 0, 1, 2
NARROW_OPS = {"index", "load", "floordiv", "mod", "abs", "min", "max", "sign", "to_int", "where"}


@dataclass(frozen=True)
class Boxes:
    """Boxes of pairs: inclusive ranges of q and k, one b and one h each; int64 arrays of one length."""

    b: np.ndarray
    h: np.ndarray
    q: Interval
    k: Interval

    def __len__(self) -> int:
        return len(self.q.lo)


class Classifier:
    """A mask at known sizes, parameters and captured tensors, ready to classify boxes.

    ``tile`` is the smallest box it will be asked about; it only steers where refinement is worth while.
    """

    def __init__(
        self,
        mask: Expr,
        sizes: Mapping[str, int],
        params: Mapping[str, Scalar],
        tensors: Mapping[str, Captured],
        tile: tuple[int, int],
    ) -> None:
        extents = {"b": sizes.get("B", 1), "h": sizes.get("H", 1), "q": sizes["Lq"], "k": sizes["Lk"]}
        self.terms = Terms(extents, sizes, params, tensors, tile)
        self.root = self.terms.build(mask)
        self.order = self._needed()
        self.dtype = np.int32 if self._fits_int32(extents) else np.int64
        self.carrier = Narrow if self.dtype is np.int32 else Array

    @property
    def nodes(self) -> list[Node]:
        return self.terms.nodes

    @property
    def reads(self) -> int:
        """Axes that the mask depends on, as a sum of :data:`AXIS_BITS`."""
        return self.nodes[self.root].reads

    def reads_axis(self, axis: str) -> bool:
        return bool(self.reads & AXIS_BITS[axis])

    def _needed(self) -> list[int]:
        """Nodes below the root, arguments first (ids grow from arguments to users)."""
        needed, stack = set(), [self.root]
        while stack:
            ref = stack.pop()
            if ref not in needed:
                needed.add(ref)
                for arg in self.nodes[ref].args:
                    stack += [r for r, _ in arg.terms] if isinstance(arg, Linear) else [arg]
        return sorted(needed)

    def _fits_int32(self, extents: Mapping[str, int]) -> bool:
        """Whether all values, and all sums on the way to them, are small and only meet operators that keep them so."""
        if max(extents.values()) >= NARROW_LIMIT:
            return False
        for node in (self.nodes[ref] for ref in self.order):
            if node.type is INT:
                if max(-node.range.lo, node.range.hi) >= NARROW_LIMIT or node.op not in NARROW_OPS:
                    return False
                divisor = node.args[-1] if node.op in ("floordiv", "mod") else None
                if isinstance(divisor, Linear) and divisor.terms:
                    return False
            for arg in node.args:
                if isinstance(arg, Linear):
                    most = abs(arg.const)
                    for ref, c in arg.terms:
                        r = self.nodes[ref].range
                        most += abs(c) * max(abs(r.lo), abs(r.hi))
                    if most >= NARROW_LIMIT:
                        return False
        return True

    def _form(self, form: Linear, values: Mapping[int, Any]) -> Interval:
        lo: Any = form.const
        hi: Any = form.const
        first = True
        for ref, c in form.terms:
            v = values[ref]
            low, high = (v.lo, v.hi) if c > 0 else (v.hi, v.lo)
            if abs(c) != 1:
                low, high = abs(c) * low, abs(c) * high
            if first and form.const == 0 and c > 0:
                lo, hi = low, high
            else:
                lo, hi = (lo + low, hi + high) if c > 0 else (lo - low, hi - high)
            first = False
        return Interval(lo, hi)

    def values(self, boxes: Boxes) -> dict[int, Any]:
        """Return the range of every node the mask needs, over each box."""
        out: dict[int, Any] = {}
        with np.errstate(all="ignore"):
            for ref in self.order:
                node = self.nodes[ref]
                if node.op == "index":
                    at = getattr(boxes, node.data)
                    pair = at if isinstance(at, Interval) else (at, at)
                    out[ref] = Interval(*(x.astype(self.dtype, copy=False) for x in pair))
                    continue
                if node.op == "const" and node.type is BOOL:
                    out[ref] = node.range
                    continue
                args = [self._form(a, out) if isinstance(a, Linear) else out[a] for a in node.args]
                if node.op == "load":
                    found = self.terms.tensors[node.data].query(args, len(boxes))
                    if node.type is INT and self.dtype is np.int32 and not isinstance(found.lo, int):
                        found = Interval(*(x.astype(np.int32) for x in found))
                    out[ref] = found
                else:
                    out[ref] = apply(self.carrier, node, args)
        return out

    def classify(self, boxes: Boxes) -> Truth:
        """Return two bool arrays: whether a pair of the box may be visible, and whether one may be hidden."""
        return self.decide(self.values(boxes), len(boxes))

    def decide(self, values: Mapping[int, Any], count: int) -> Truth:
        true, false = values[self.root]
        return Truth(np.broadcast_to(true, (count,)), np.broadcast_to(false, (count,)))

    def _load_wish(self, node: Node, values: Mapping[int, Any]) -> Any:
        """Where flags are read at q or k itself and every tile of the box mixes them, smaller boxes tell no more."""
        axes = [d for d, a in enumerate(node.args) if isinstance(a, Linear) and self._moves(a)]
        if len(axes) != 1:
            return node.varies
        form = node.args[axes[0]]
        for axis, bit, side in (("q", 4, self.terms.tile[0]), ("k", 8, self.terms.tile[1])):
            if form == Linear(0, ((self.terms.axes[axis], 1),)):
                ranges = [self._form(a, values) for a in node.args if isinstance(a, Linear)]
                mixed = self.terms.tensors[node.data].all_mixed(ranges, axes[0], side)
                return node.varies if mixed is None else np.where(mixed, node.varies & ~bit, node.varies)
        return node.varies

    def _moves(self, form: Linear) -> bool:
        return any(self.nodes[ref].reads & 12 for ref, _ in form.terms)

    def wishes(self, values: Mapping[int, Any], count: int) -> np.ndarray:
        """Return for each undecided box the axes along which smaller boxes may be decided (4: q, 8: k)."""
        out: dict[int, Any] = {}
        for ref in self.order:
            node = self.nodes[ref]
            if node.type is not BOOL:
                continue
            parts = [a for a in node.args if not isinstance(a, Linear) and self.nodes[a].type is BOOL]
            if node.op == "load":
                out[ref] = self._load_wish(node, values)
            elif not parts:
                out[ref] = node.varies
            elif all(isinstance(out[p], int) for p in parts) and len({out[p] for p in parts}) == 1:
                out[ref] = out[parts[0]]
            else:
                wish: Any = 0
                for p in parts:
                    wish = wish | np.where(values[p].true & values[p].false, out[p], 0)
                out[ref] = wish
        return np.broadcast_to(np.asarray(out[self.root], np.int64), (count,))


def prepare(
    program: Program, params: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Scalar], dict[str, Captured]]:
    """Return parameter values as plain numbers, and summaries of the captured tensors that the mask reads.

    Whatever of them is on a device comes to the host in one copy, large tables as what their device makes of them.
    """
    read = {node.tensor for node in postorder(program.mask) if isinstance(node, Load)}
    captured = {t.name: t.type for t in program.tensors if t.name in read and t.name in tensors}
    remote = {n: v for n, v in params.items() if isinstance(v, torch.Tensor)}
    given = {name: tensors[name].detach() for name in captured}
    large = {name: cells(t, captured[name]) for name, t in given.items() if is_large(t)}
    parts = {f"{name} {part}": getattr(large[name], part) for name in large for part in ("low", "high", "nan")}
    host = to_host({**remote, **parts, **{name: t for name, t in given.items() if name not in large}})
    known = numbers({**params, **{name: host[name] for name in remote}}, program)

    def summary(name: str, type_: Type) -> Captured:
        if name not in large:
            return Captured(host[name], type_)
        low, high, nan = (host[f"{name} {part}"] for part in ("low", "high", "nan"))
        return CapturedCells(low, high, bool(nan), type_, given[name].shape)

    return known, {name: summary(name, type_) for name, type_ in captured.items()}


def numbers(params: Mapping[str, Any], program: Program) -> dict[str, Scalar]:
    """Parameter values as plain numbers, with the program's defaults."""
    given = {p.name: p.default for p in program.scalars if p.default is not None}
    given.update({n: v.item() if hasattr(v, "item") else v for n, v in params.items()})
    return given


def classify_tile(
    program: Program,
    sizes: Mapping[str, int],
    params: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    q: tuple[int, int],
    k: tuple[int, int],
    b: int = 0,
    h: int = 0,
) -> int:
    """Classify the pairs with q in [q0, q1) and k in [k0, k1): EMPTY, PARTIAL or FULL. An empty box is EMPTY."""
    q1, k1 = min(q[1], sizes["Lq"]), min(k[1], sizes["Lk"])
    if q[0] >= q1 or k[0] >= k1:
        return EMPTY
    tile = (q1 - q[0], k1 - k[0])
    classifier = Classifier(program.mask, sizes, *prepare(program, params, tensors), tile)
    one = [np.array([x], np.int64) for x in (b, h, q[0], q1 - 1, k[0], k1 - 1)]
    true, false = classifier.classify(Boxes(one[0], one[1], Interval(one[2], one[3]), Interval(one[4], one[5])))
    return PARTIAL if true[0] and false[0] else FULL if true[0] else EMPTY
