"""The blockwise executor in PyTorch: any device, no compiler, differentiable any number of times.

It walks the run map like every kernel: FULL tiles without the mask, PARTIAL tiles with it, EMPTY tiles not at all.
Scores are combined with the online softmax of FlashAttention, so memory is O(block of queries x block of keys). It is
the fallback that never fails, so it is written for correctness first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from attnlang.ir import KEY_ADDRESS, QUERY_ADDRESS, Address, Environment, evaluate
from attnlang.ir.build import TRUE, s

from .call import Call
from .transforms import outside

__all__ = ["TILE", "Block", "KeyChunk", "blocks", "chunk_scores", "expand_rows", "forward", "forward_stats"]

Tensor = torch.Tensor

TILE = (128, 128)
BUDGET = 1 << 22
"""Scores evaluated at once; bounds the memory of temporaries."""


@dataclass(frozen=True)
class KeyChunk:
    """Keys of one block that are processed together; ``masked`` of them, at the end, need the mask.

    ``index`` is int64 [n]; ``span`` is (start, end) when the keys are consecutive.
    """

    index: Tensor
    masked: int
    span: tuple[int, int] | None

    def rows(self, t: Tensor) -> Tensor:
        """Rows of ``t`` [..., L, D] for these keys."""
        return t[..., self.span[0] : self.span[1], :] if self.span else t.index_select(-2, self.index)


@dataclass(frozen=True)
class Block:
    """One block of queries of some batch elements and heads that share a row of the run map."""

    batch: slice
    heads: slice
    rows: slice
    chunks: tuple[KeyChunk, ...]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores are float32, and float64 for float64 inputs."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def expand_rows(t: Tensor, address: Address, call: Call, axis: str) -> Tensor:
    """Return the rows of an operand as [B, heads, L, D], differentiably.

    Rows of the default grouped-query map keep their Hkv heads; any other map is gathered to H heads.
    """
    if address in (KEY_ADDRESS, QUERY_ADDRESS):
        return t
    length = call.sizes["Lk" if axis == "k" else "Lq"]
    shape = (call.sizes["B"], call.sizes["H"], length)
    grid = {
        name: torch.arange(n, device=t.device).view([-1 if d == i else 1 for d in range(3)])
        for i, (name, n) in enumerate(zip(("b", "h", axis), shape, strict=True))
    }
    env = Environment(grid, call.sizes, call.params, call.tensors, {}, torch.float64, t.device)
    if t.numel() == 0:
        return t.new_zeros((*shape, t.shape[-1]))
    where = [evaluate(e, env).expand(shape) for e in (address.batch, address.head, address.row)]
    return t[tuple(w.clamp(0, n - 1) for w, n in zip(where, t.shape, strict=False))]


def _slabs(call: Call, batch: int, heads: int, bm: int, bn: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Yield (map batch, map head, batch slice, head slice) so that one tile of a slab fits the budget."""
    room = max(1, BUDGET // (bm * bn))
    b_all, h_all = call.sizes["B"], call.sizes["H"]
    h_step = h_all if heads == 1 and h_all <= room else 1
    b_step = max(1, room // max(1, h_step)) if batch == 1 else 1
    for b0 in range(0, b_all, b_step):
        for h0 in range(0, h_all, max(1, h_step)):
            yield b0 % batch, h0 % heads, slice(b0, min(b0 + b_step, b_all)), slice(h0, min(h0 + h_step, h_all))


def _chunks(
    full: list[tuple[int, int]], part: list[tuple[int, int]], size: int, device: torch.device
) -> list[KeyChunk]:
    """Cut runs of keys (in keys, not tiles) into chunks of at most ``size`` keys; masked keys come last in a chunk."""
    out: list[KeyChunk] = []
    pieces: list[tuple[int, int, bool]] = []
    held = 0

    def close() -> None:
        nonlocal pieces, held
        if not pieces:
            return
        index = torch.cat([torch.arange(a, b, device=device) for a, b, _ in pieces])
        whole = all(x[1] == y[0] for x, y in itertools.pairwise(pieces))
        masked = sum(b - a for a, b, m in pieces if m)
        out.append(KeyChunk(index, masked, (pieces[0][0], pieces[-1][1]) if whole else None))
        pieces, held = [], 0

    for masked, runs in ((False, full), (True, part)):
        for start, end in runs:
            while start < end:
                take = min(end - start, size - held)
                pieces.append((start, start + take, masked))
                start, held = start + take, held + take
                if held == size:
                    close()
    close()
    return out


def blocks(call: Call, tile: tuple[int, int] = TILE) -> Iterator[Block]:
    """Yield the blocks of a call in a fixed order; together they cover every query row once."""
    bm, bn = tile
    run_map = call.runs(tile)
    with outside():
        table = run_map.launch_table()
        full_ptr, full_runs = table.full_ptr.tolist(), table.full_runs.tolist()
        part_ptr, part_runs = table.part_ptr.tolist(), table.part_runs.tolist()
    lq, lk = call.sizes["Lq"], call.sizes["Lk"]
    nq = -(-lq // bm)
    device = call.q.device

    def keys(ptr: list[int], runs: list[list[int]], row: int) -> list[tuple[int, int]]:
        return [(a * bn, min(b * bn, lk)) for a, b in runs[ptr[row] : ptr[row + 1]]]

    for mb, mh, batch, heads in _slabs(call, run_map.batch, run_map.heads, bm, bn):
        rows = (batch.stop - batch.start) * (heads.stop - heads.start) * bm
        size = max(bn, BUDGET // max(1, rows) // bn * bn)
        for block in range(nq):
            row = (mb * run_map.heads + mh) * nq + block
            chunks = _chunks(keys(full_ptr, full_runs, row), keys(part_ptr, part_runs, row), size, device)
            yield Block(batch, heads, slice(block * bm, min((block + 1) * bm, lq)), tuple(chunks))


def pick_heads(t: Tensor, block: Block, heads: int) -> Tensor:
    """Select batch and heads of ``block`` from rows [B, Hkv, L, D]: all Hkv, or the one a single query head reads."""
    t = t[block.batch]
    group = heads // max(1, t.shape[1])
    count = block.heads.stop - block.heads.start
    if count == heads or group == 1:
        return t if count == heads else t[:, block.heads]
    first = block.heads.start // group
    return t[:, first : first + 1]  # a slab holds all heads or one


def grouped(t: Tensor, heads: int) -> Tensor:
    """View [B, H, M, X] as [B, heads, H // heads * M, X], so that the rows of a group meet their key head."""
    return t.reshape(t.shape[0], heads, -1, t.shape[-1]) if t.shape[1] != heads else t


def _environment(call: Call, block: Block, chunk: KeyChunk, dtype: torch.dtype) -> Environment:
    def along(start: int, stop: int, dim: int) -> Tensor:
        return torch.arange(start, stop, device=call.q.device).view([-1 if d == dim else 1 for d in range(4)])

    axes = {
        "b": along(block.batch.start, block.batch.stop, 0),
        "h": along(block.heads.start, block.heads.stop, 1),
        "q": along(block.rows.start, block.rows.stop, 2),
        "k": chunk.index.view(1, 1, 1, -1),
    }
    return Environment(axes, call.sizes, call.params, call.tensors, {}, dtype, call.q.device)


def chunk_scores(call: Call, block: Block, chunk: KeyChunk, raw: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return modified scores [b, h, m, n] with -inf where masked, and the mask (None where nothing is masked).

    A masked pair does not exist: its raw score is replaced by a harmless one before the score function sees it, and
    where captured tensors want gradients the score function is evaluated at visible pairs only.
    """
    env = _environment(call, block, chunk, raw.dtype)
    program = call.program
    mask: Tensor | None = None
    if chunk.masked and program.mask is not TRUE:
        n = chunk.index.numel()
        tail = replace(env, indices={**env.indices, "k": env.indices["k"][..., n - chunk.masked :]})
        mask = evaluate(program.mask, tail).expand(*raw.shape[:3], chunk.masked)
        if chunk.masked < n:
            mask = torch.cat([mask.new_ones(()).expand(*raw.shape[:3], n - chunk.masked), mask], -1)
    if program.score is s:
        return (raw if mask is None else raw.masked_fill(~mask, -math.inf)), mask
    if mask is None:
        return evaluate(program.score, replace(env, inputs={"s": raw})).expand(raw.shape), None
    if torch.is_grad_enabled() and any(t.requires_grad for t in call.tensors.values()):
        return _scores_at_points(call, env, raw, mask), mask
    harmless = torch.where(mask, raw, 1.0)
    scores = evaluate(program.score, replace(env, inputs={"s": harmless}))
    return torch.where(mask, scores, -math.inf), mask


def _scores_at_points(call: Call, env: Environment, raw: Tensor, mask: Tensor) -> Tensor:
    points = mask.nonzero(as_tuple=True)
    indices = {axis: index.flatten()[point] for (axis, index), point in zip(env.indices.items(), points, strict=True)}
    values = evaluate(call.program.score, replace(env, indices=indices, inputs={"s": raw[points]}))
    return torch.full_like(raw, -math.inf).index_put(points, values.expand(points[0].shape))


def forward_stats(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return o [B, H, Lq, Dv] in the dtype of q, and lse and row maximum [B, H, Lq] in the compute dtype.

    Differentiable in q, k, v and float captured tensors (not through the maximum), with O(Lq * visible keys) memory
    when gradients are recorded.
    """
    with torch.autocast(call.q.device.type, enabled=False):
        return _forward_stats(call)


def _forward_stats(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(call.q.dtype)
    (term,) = call.program.attend.terms
    values = next(o.rows for o in call.program.attend.outputs if o.rows is not None)
    q = expand_rows(call.q, term.left.address, call, "q").to(dtype)
    k = expand_rows(call.k, term.right.address, call, "k").to(dtype)
    v = expand_rows(call.v, values.address, call, "k").to(dtype)
    b_all, h_all, lq = (call.sizes[n] for n in ("B", "H", "Lq"))
    parts: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for block in blocks(call):
        parts.setdefault((block.batch.start, block.heads.start), []).append(_block(call, block, q, k, v))
    if not parts or not b_all or not h_all:
        empty = q.new_full((b_all, h_all, lq), -math.inf)
        return q.new_zeros((b_all, h_all, lq, v.shape[-1])).to(call.q.dtype), empty, empty
    out = []
    for i in range(3):
        rows = {place: torch.cat([x[i] for x in found], 2) for place, found in parts.items()}
        starts = sorted({b for b, _ in rows})
        out.append(torch.cat([torch.cat([t for (b, _), t in rows.items() if b == start], 1) for start in starts], 0))
    return out[0].to(call.q.dtype), out[1], out[2]


def _block(call: Call, block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Online softmax over the chunks of one block of queries."""
    rows = q[block.batch, block.heads, block.rows]
    heads = call.sizes["H"]
    k, v = pick_heads(k, block, heads), pick_heads(v, block, heads)
    shape = rows.shape[:3]
    top = rows.new_full(shape, -math.inf)
    total = rows.new_zeros(shape)
    acc = rows.new_zeros((*shape, v.shape[-1]))
    for chunk in block.chunks:
        keys, vals = chunk.rows(k), chunk.rows(v)
        raw = (grouped(rows, keys.shape[1]) @ keys.transpose(-1, -2)).reshape(*shape, -1) * call.scale
        scores, _ = chunk_scores(call, block, chunk, raw)
        new_top = torch.maximum(top, scores.detach().amax(-1))
        base = torch.where(torch.isneginf(new_top), 0.0, new_top)  # a row without visible keys so far
        weights = torch.exp(scores - base[..., None])
        keep = torch.exp(top - base)
        total = total * keep + weights.sum(-1)
        acc = acc * keep[..., None] + (grouped(weights, vals.shape[1]) @ vals).reshape(*shape, -1)
        top = new_top
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, torch.where(empty, 0.0, top) + torch.log(safe))
    return acc / safe[..., None], lse, top


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return o [B, H, Lq, Dv] in the dtype of q and the natural-log lse [B, H, Lq] (float32; float64 for float64).

    A row without visible keys gives 0 and -inf.
    """
    return forward_stats(call)[:2]
