"""What an Attend stage means: every hook written out in differentiable PyTorch over some rows and some keys.

The same function serves the reference (all rows, all keys) and the blockwise executor (a block of rows and the keys
that the run map keeps), so memory is O(rows x keys) of the region. A pair that the mask excludes does not exist: no
hook is evaluated at it, so log(s) or 1 / s of a hidden pair reaches neither a value nor a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from .build import TRUE
from .evaluate import Environment, evaluate
from .nodes import Expr, Index, Input, postorder
from .stages import BODY_LEFT, BODY_RIGHT, KEY_ADDRESS, QUERY_ADDRESS, Attend, Branch, Dot, Operand, Output, Stat

__all__ = [
    "COMBINE",
    "IDENTITY",
    "Region",
    "attend_region",
    "finish",
    "is_map",
    "numbers_of",
    "output_shape",
    "reads_pair",
    "scatter",
    "term_values",
]

Tensor = torch.Tensor

NEWTON_STEPS = 100


@dataclass(frozen=True)
class Region:
    """Where a stage is evaluated: int64 vectors of batch elements, heads, rows and keys.

    The mask is known to hold for the first ``full`` keys.
    """

    batch: Tensor
    heads: Tensor
    rows: Tensor
    keys: Tensor
    full: int = 0

    @classmethod
    def whole(cls, batch: int, heads: int, rows: int, keys: int, device: torch.device | str) -> Region:
        """Every pair of these lengths."""
        vectors = [torch.arange(n, device=device) for n in (batch, heads, rows, keys)]
        return cls(vectors[0], vectors[1], vectors[2], vectors[3])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.batch), len(self.heads), len(self.rows), len(self.keys))

    def axes(self) -> dict[str, Tensor]:
        vectors = (self.batch, self.heads, self.rows, self.keys)
        return {
            a: v.view([-1 if d == i else 1 for d in range(4)])
            for i, (a, v) in enumerate(zip("bhqk", vectors, strict=True))
        }


def reads_pair(expr: Expr) -> bool:
    """Whether the value of ``expr`` may differ between the keys of a row."""
    return any(
        (isinstance(n, Index) and n.axis == "k") or (isinstance(n, Input) and "k" in n.axes) for n in postorder(expr)
    )


def is_map(output: Output) -> bool:
    """Whether an output keeps both q and k."""
    return output.over == "" and reads_pair(output.value)


class _Pairs:
    """The visible pairs of a region: everything (``points`` None), or a list of points."""

    def __init__(self, grid: Environment, region: Region, points: tuple[Tensor, ...] | None) -> None:
        self.grid = self.env = grid
        self.region, self.points = region, points
        self.group: Tensor | None = None  # of each pair, clamped into range
        self.grouped: Tensor | None = None  # whether the group is in range
        if points is not None:
            axes = grid.indices.items()
            self.env = replace(grid, indices={a: t.expand(region.shape)[points] for a, t in axes})

    def evaluate(self, expr: Expr, inputs: Mapping[str, Tensor], stats: Mapping[str, Tensor]) -> Tensor:
        """Value of ``expr`` at every pair; ``inputs`` are per pair, ``stats`` per row (and group)."""
        given = dict(inputs)
        for node in postorder(expr):
            if isinstance(node, Input) and node.name in stats and node.name not in given:
                given[node.name] = self.at_pairs(stats[node.name])
        value = evaluate(expr, replace(self.env, inputs=given))
        return value.expand(self.count)

    @property
    def count(self) -> tuple[int, ...]:
        return self.region.shape if self.points is None else (len(self.points[0]),)

    def at_pairs(self, row: Tensor) -> Tensor:
        """Read a statistic [b, h, m] or [b, h, m, groups] at every pair."""
        if row.dim() == 3:
            return row[..., None] if self.points is None else row[self.points[:3]]
        assert self.group is not None
        if self.points is None:
            return row.gather(-1, self.group.expand(self.region.shape))
        return row[(*self.points[:3], self.group)]

    def pick(self, dense: Tensor) -> Tensor:
        """Values per pair from [b, h, m, n]."""
        return dense if self.points is None else dense.expand(self.region.shape)[self.points]

    def dense(self, values: Tensor, fill: float | int) -> Tensor:
        """[b, h, m, n] from values per pair, ``fill`` where there is no pair."""
        if self.points is None:
            return values.expand(self.region.shape)
        out = torch.full(self.region.shape, fill, dtype=values.dtype, device=values.device)
        return out.index_put(self.points, values)

    def without(self, hidden: Tensor) -> _Pairs:
        """The pairs for which ``hidden`` (per pair) is False."""
        keep = ~hidden
        if self.points is None:
            return _Pairs(self.grid, self.region, keep.expand(self.region.shape).nonzero(as_tuple=True))
        return _Pairs(self.grid, self.region, tuple(p[keep] for p in self.points))


def _visible(branch: Branch, env: Environment, region: Region) -> _Pairs:
    points: tuple[Tensor, ...] | None = None
    if branch.mask is not TRUE and region.full < len(region.keys):
        tail = replace(env, indices={**env.indices, "k": env.indices["k"][..., region.full :]})
        shape = (*region.shape[:3], len(region.keys) - region.full)
        mask = evaluate(branch.mask, tail).expand(shape)
        if region.full:
            mask = torch.cat([mask.new_ones(()).expand(*shape[:3], region.full), mask], -1)
        if not bool(mask.all()):
            points = mask.nonzero(as_tuple=True)
    return _Pairs(env, region, points)


def _is_all(index: Tensor, length: int) -> bool:
    """Whether ``index`` is 0, 1, ... length - 1."""
    return len(index) == length and bool(torch.equal(index, torch.arange(length, device=index.device)))


def operand_rows(operand: Operand, env: Environment, region: Region, axis: str) -> Tensor:
    """Rows of an operand as [b, h, rows, features] of the region, in the float dtype of the environment."""
    t = env.rows(operand.source)
    vector = region.rows if axis == "q" else region.keys
    if operand.index == QUERY_ADDRESS or operand.index == KEY_ADDRESS:
        if operand.index == QUERY_ADDRESS and axis == "k":
            raise TypeError("rows of q in the place of keys")
        heads = region.heads
        if operand.index == KEY_ADDRESS and t.shape[1] != env.sizes["H"]:
            heads = heads // max(1, env.sizes["H"] // max(1, t.shape[1]))
        for axis_dim, which in enumerate((region.batch, heads, vector)):  # one batch of keys may serve all queries
            which = which.clamp(max=max(t.shape[axis_dim] - 1, 0))
            if not _is_all(which, t.shape[axis_dim]):
                t = t.index_select(axis_dim, which)
        return t.to(env.float_dtype)
    index = [evaluate(e, env) for e in operand.index]
    dim = 2 if axis == "q" else 3
    shape = [region.shape[d] if d in (0, 1, dim) else 1 for d in range(4)]
    index = [w.expand(shape).squeeze(5 - dim) for w in index]
    index = [w.clamp(0, max(n - 1, 0)) for w, n in zip(index, t.shape, strict=False)]
    if t.numel() == 0:
        return t.new_zeros((*index[0].shape, t.shape[-1]), dtype=env.float_dtype)
    return t[tuple(index)].to(env.float_dtype)


def _pair_row(operand: Operand) -> bool:
    """Whether which row it is depends on both the query and the key."""
    axes = {n.axis for e in operand.index for n in postorder(e) if isinstance(n, Index)}
    return {"q", "k"} <= axes


def _table(operand: Operand, env: Environment, region: Region) -> tuple[Tensor, Tensor]:
    """All rows [b, h, R, D] an operand of pairs may read, and which one each pair reads [b, h, m, n].

    The last index is the row; those before it may depend on b and h only.
    """
    t = env.rows(operand.source)
    lead = [evaluate(e, env).expand(*region.shape[:2], 1, 1)[..., 0, 0] for e in operand.index[:-1]]
    lead = [w.clamp(0, max(n - 1, 0)) for w, n in zip(lead, t.shape, strict=False)]
    table = t[tuple(lead)] if lead else t.expand(*region.shape[:2], *t.shape)
    rows = evaluate(operand.index[-1], env).clamp(0, max(t.shape[-2] - 1, 0))
    return table.to(env.float_dtype), rows.expand(region.shape)


def term_values(term: Dot, env: Environment, region: Region) -> Tensor:
    """One raw score term [b, h, m, n], without a scale; the indices of ``env`` are those of ``region``."""
    if term.body is None:
        for side, other, axis in ((term.right, term.left, "q"), (term.left, term.right, "k")):
            if _pair_row(side):
                table, which = _table(side, env, region)
                rows = operand_rows(other, env, region, axis)
                products = rows @ table.transpose(-1, -2)  # [b, h, m or n, R]
                if axis == "q":
                    return products.gather(-1, which)
                return products.transpose(-1, -2).gather(-2, which)
        left = operand_rows(term.left, env, region, "q")
        return left @ operand_rows(term.right, env, region, "k").transpose(-1, -2)
    left, right = operand_rows(term.left, env, region, "q"), operand_rows(term.right, env, region, "k")
    total = left.new_zeros(region.shape)
    for d in range(left.shape[-1]):
        at = {**env.indices, "d": torch.tensor(d, device=left.device)}
        inputs = {BODY_LEFT.name: left[..., d][..., :, None], BODY_RIGHT.name: right[..., d][..., None, :]}
        total = total + evaluate(term.body, replace(env, indices=at, inputs=inputs))
    return total


def _reduce(monoid: str, dense: Tensor, dim: int) -> Tensor:
    if monoid == "sum":
        return dense.sum(dim)
    if dense.shape[dim] == 0:
        shape = [n for i, n in enumerate(dense.shape) if i != dim % dense.dim()]
        return dense.new_full(shape, IDENTITY[monoid])
    return dense.amax(dim) if monoid == "max" else dense.amin(dim)


IDENTITY = {"sum": 0.0, "max": -math.inf, "min": math.inf}
"""What a monoid makes of nothing."""
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
"""What a monoid makes of two parts."""


def scatter(monoid: str, values: Tensor, index: Tensor, extent: int) -> Tensor:
    """Reduce the last dimension of ``values`` into ``extent`` buckets; an index outside adds to none."""
    inside = (index >= 0) & (index < extent)
    index = torch.where(inside, index, extent).expand(values.shape)
    out = values.new_full((*values.shape[:-1], extent + 1), IDENTITY[monoid])
    if monoid == "sum":
        out = out.scatter_add(-1, index, values)
    else:
        out = out.scatter_reduce(-1, index, values, "amax" if monoid == "max" else "amin", include_self=True)
    return out[..., :extent]


class _BranchValues:
    """Everything one branch knows about its pairs and rows."""

    def __init__(self, branch: Branch, terms: Mapping[str, Tensor], env: Environment, region: Region) -> None:
        self.branch, self.region = branch, region
        pairs = _visible(branch, env, region)
        raw = {name: pairs.pick(t) for name, t in terms.items()}
        scores = pairs.evaluate(branch.score, raw, {})
        hidden = torch.isneginf(scores)  # a score of -inf hides a pair as the mask does
        if bool(hidden.any()):
            pairs = pairs.without(hidden)
            raw = {name: pairs.pick(t) for name, t in terms.items()}
            scores = pairs.evaluate(branch.score, raw, {})
        self.pairs = pairs
        self.inputs = {**raw, "raw": raw[next(iter(raw))], "s": scores}
        self.seen = pairs.dense(torch.ones(pairs.count, dtype=torch.bool, device=scores.device), False).any(-1)
        self.rows = replace(env, indices={a: t for a, t in env.indices.items() if a != "k"})
        self.groups = 0
        if branch.group is not None:
            assert branch.groups is not None
            self.groups = int(evaluate(branch.groups, env))
            group = pairs.evaluate(branch.group, {}, {})
            pairs.grouped = (group >= 0) & (group < self.groups)
            pairs.group = group.clamp(0, max(self.groups - 1, 0))
        self.stats: dict[str, Tensor] = {}
        for found in branch.normalizer.stats:
            self.stats[found.name] = self._stat(found)
        weight = pairs.evaluate(branch.normalizer.weight, self.inputs, self.stats)
        self.inputs = {**self.inputs, "p": weight, "w": weight}
        if branch.weight is not None:
            self.inputs["w"] = pairs.evaluate(branch.weight, self.inputs, self.stats)

    def _stat(self, found: Stat) -> Tensor:
        if found.monoid == "root":
            return self._root(found)
        value = self._combined(found, self.stats)
        if found.seed is None:
            return value
        seed = self.row(found.seed)
        seed = seed[..., None] if seed.dim() < value.dim() else seed  # one for all groups
        return COMBINE[found.monoid](value, seed)

    def _combined(self, found: Stat, stats: Mapping[str, Tensor]) -> Tensor:
        monoid = "sum" if found.monoid == "root" else found.monoid
        values = self.pairs.evaluate(found.lift, self.inputs, stats)
        dense = self.pairs.dense(values, IDENTITY[monoid])
        if not found.grouped:
            return _reduce(monoid, dense, -1)
        assert self.pairs.group is not None and self.pairs.grouped is not None
        group = torch.where(self.pairs.grouped, self.pairs.group, -1)
        return scatter(monoid, dense, self.pairs.dense(group, -1), self.groups)

    def _root(self, found: Stat) -> Tensor:
        """The t with sum of lift = 1: safeguarded Newton steps, and one more through which gradients pass."""

        def excess(t: Tensor) -> Tensor:
            return self._combined(found, {**self.stats, found.name: t}) - 1.0

        def slope(t: Tensor) -> Tensor:
            with torch.no_grad():  # by a transform, since others may be at work
                return torch.func.grad(lambda x: excess(x).sum())(t.detach()).detach()

        assert found.seed is not None
        some = self.seen
        with torch.no_grad():
            low = torch.where(some, self.row(found.seed).expand(some.shape), 0.0).contiguous()
            high = low + 1.0
            for _ in range(NEWTON_STEPS):
                short = some & (excess(high) > 0)
                if not bool(short.any()):
                    break
                high = torch.where(short, high + 2 * (high - low), high)
            t = low
            for _ in range(NEWTON_STEPS):
                value = excess(t)
                low, high = torch.where(value >= 0, t, low), torch.where(value < 0, t, high)
                gradient = slope(t)
                step = t - value / torch.where(gradient < 0, gradient, -1.0)
                inside = (gradient < 0) & (step >= low) & (step <= high)
                moved = torch.where(some, torch.where(inside, step, (low + high) / 2), 0.0)
                if bool((moved - t).abs().le(torch.finfo(t.dtype).eps * (1 + t.abs())).all()):
                    t = moved
                    break
                t = moved
        gradient = slope(t)
        return torch.where(some, t - excess(t) / torch.where(gradient < 0, gradient, -1.0), 0.0)

    def row(self, expr: Expr) -> Tensor:
        """Value of a row expression as [b, h, m], or [b, h, m, groups] where it reads grouped statistics.

        Rows without visible keys read harmless statistics, so that they have no gradient either.
        """
        inputs: dict[str, Tensor] = {}
        wide = False
        for node in postorder(expr):
            if isinstance(node, Input):
                value = self.stats[node.name]
                seen = self.seen if value.dim() == 3 else self.seen[..., None]
                value = torch.where(seen, value, 1.0)
                wide = wide or value.dim() == 4
                inputs[node.name] = value if value.dim() == 4 else value[..., None]
        value = evaluate(expr, replace(self.rows, inputs=inputs))
        value = value.to(self.rows.float_dtype).expand(*self.region.shape[:3], self.groups if wide else 1)
        return value if wide else value[..., 0]


def attend_region(stage: Attend, env: Environment, region: Region, scale: float) -> dict[str, Tensor]:
    """Return what the pairs of ``region`` contribute to every output of ``stage``.

    ``env`` binds sizes, parameters and tensors: operands, earlier outputs and captured tensors by name. An output that
    keeps q has its rows of the region; one that keeps k its keys of the region. Outputs reduced over q are to be
    combined over regions by their monoid, then passed through :func:`finish`.
    """
    slots = replace(env, indices=region.axes())
    hooks = slots
    if stage.position:
        seen = {axis: evaluate(e, slots) for axis, e in stage.position}
        hooks = replace(slots, indices={**slots.indices, **seen})
    terms: dict[str, Tensor] = {}
    for term in stage.terms:
        value = term_values(term, slots, region)
        terms[term.name] = value * scale if not terms else value
    branches = [_BranchValues(branch, terms, hooks, region) for branch in stage.branches]
    return {out.name: _output(out, branches[out.branch], slots) for out in stage.outputs}


def _output(out: Output, found: _BranchValues, slots: Environment) -> Tensor:
    if out.over == "" and not is_map(out):
        value = found.row(out.value)
        seen = found.seen if value.dim() == 3 else found.seen[..., None]
        return torch.where(seen, value, out.empty)
    pairs, region = found.pairs, found.region
    values = pairs.evaluate(out.value, found.inputs, found.stats).to(slots.float_dtype)
    if out.over == "":
        return pairs.dense(values, out.empty)
    if out.monoid == "argmax":
        return _argmax(pairs, values, found.seen, region)
    dense = pairs.dense(values, IDENTITY[out.monoid])
    bucket, extents = _bucket(out, pairs, slots)
    if out.rows is not None:
        return _weighted_rows(out, dense, bucket, extents, slots, region)
    if bucket is None:
        for dim in [-1] * ("k" in out.over) + [-1 if "k" in out.over else -2] * ("q" in out.over):
            dense = _reduce(out.monoid, dense, dim)
        return dense
    if out.over == "q":
        dense, bucket = dense.transpose(-1, -2), bucket.transpose(-1, -2)
    elif out.over == "qk":
        dense, bucket = dense.flatten(-2), bucket.flatten(-2)
    total = math.prod(extents)
    return (
        scatter(out.monoid, dense, bucket, total).unflatten(-1, extents)
        if total
        else dense.new_zeros((*dense.shape[:-1], *extents))
    )


def _argmax(pairs: _Pairs, values: Tensor, seen: Tensor, region: Region) -> Tensor:
    dense = pairs.dense(values, -math.inf)
    if not dense.shape[-1]:
        return torch.full(dense.shape[:-1], -1, device=dense.device)
    return torch.where(seen, region.keys[dense.argmax(-1)], -1)


def numbers_of(exprs: Iterable[Expr], env: Environment) -> tuple[int, ...]:
    """Values of ``exprs`` over sizes and parameters alone, such as the extents of an output."""
    here = replace(env, indices={})
    return tuple(int(evaluate(e, here)) for e in exprs)


def _bucket(out: Output, pairs: _Pairs, slots: Environment) -> tuple[Tensor | None, tuple[int, ...]]:
    """Which element of the extents every pair adds to, -1 for none, as [b, h, m, n]."""
    if not out.key:
        return None, ()
    extents = numbers_of(out.extents, slots)
    flat = torch.zeros(pairs.count, dtype=torch.int64, device=slots.device)
    inside = torch.ones(pairs.count, dtype=torch.bool, device=slots.device)
    for key, extent in zip(out.key, extents, strict=True):
        at = pairs.evaluate(key, {}, {})
        inside = inside & (at >= 0) & (at < extent)
        flat = flat * extent + at
    return pairs.dense(torch.where(inside, flat, -1), -1), extents


def _weighted_rows(
    out: Output, dense: Tensor, bucket: Tensor | None, extents: tuple[int, ...], slots: Environment, region: Region
) -> Tensor:
    assert out.rows is not None
    if _pair_row(out.rows):  # a histogram over the rows of the table, times the table
        table, which = _table(out.rows, slots, region)
        return scatter("sum", dense, which, table.shape[-2]) @ table
    axis = "q" if out.over == "q" else "k"
    rows = operand_rows(out.rows, slots, region, axis)
    if axis == "q":
        dense = dense.transpose(-1, -2)
        bucket = None if bucket is None else bucket.transpose(-1, -2)
    if bucket is None:
        return dense @ rows
    parts = [torch.where(bucket == c, dense, 0.0) @ rows for c in range(math.prod(extents))]
    if not parts:
        return dense.new_zeros((*dense.shape[:-1], *extents, rows.shape[-1]))
    return torch.stack(parts, -2).unflatten(-2, extents)


def output_shape(out: Output, stage: Attend, env: Environment) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a whole output, given what ``env`` binds; float outputs have the dtype of the environment."""
    b, h = env.sizes["B"], env.sizes["H"]
    lq, lk = (int(evaluate(e, env)) for e in stage.lengths)
    shape = [b, h]
    if "q" not in out.over:
        shape.append(lq)
    if is_map(out) or out.over == "q":
        shape.append(lk)
    if out.over == "" and not is_map(out):
        branch = stage.branches[out.branch]
        grouped = {st.name for st in branch.normalizer.stats if st.grouped}
        if any(isinstance(n, Input) and n.name in grouped for n in postorder(out.value)):
            assert branch.groups is not None
            shape.append(int(evaluate(branch.groups, env)))
    shape += [int(evaluate(e, env)) for e in out.extents]
    if out.rows is not None:
        shape.append(env.rows(out.rows.source).shape[-1])
    return tuple(shape), torch.int64 if out.monoid == "argmax" else env.float_dtype


def finish(out: Output, value: Tensor) -> Tensor:
    """Turn the combination of all regions into the output: what nothing was reduced to becomes ``empty``."""
    if out.monoid in ("max", "min") and out.over:
        return torch.where(torch.isinf(value) & (value == IDENTITY[out.monoid]), out.empty, value)
    return value
