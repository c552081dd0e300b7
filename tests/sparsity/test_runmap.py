"""Run maps: construction, other forms, facts, and exchange with PyTorch's BlockMask."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from attnlang.ir import UsageError, simple
from attnlang.ir.build import all_of, k, op, q
from attnlang.sparsity import EMPTY, FULL, PARTIAL, RunMap, analyse


def random_kinds(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    r = np.random.default_rng(seed)
    coarse = r.integers(0, 3, (*shape[:-1], max(1, shape[-1] // 3)))
    return np.repeat(coarse, 4, axis=-1)[..., : shape[-1]].astype(np.uint8)


SHAPES = [(1, 1, 5, 7), (2, 3, 4, 9), (1, 1, 1, 1), (1, 2, 6, 1), (1, 1, 0, 4), (1, 1, 4, 0), (2, 2, 13, 40)]


def make(seed: int, shape: tuple[int, ...], tile: tuple[int, int] = (16, 8), cut: int = 3) -> tuple[RunMap, np.ndarray]:
    kinds = random_kinds(seed, shape)
    sizes = tuple(max(0, n * t - (cut if n else 0)) for n, t in zip(shape[2:], tile, strict=True))
    return RunMap.from_tiles(kinds, tile, sizes), kinds  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_round_trip_through_runs_and_transpose(shape: tuple[int, ...], seed: int) -> None:
    runs, kinds = make(seed, shape)
    assert (runs.dense_kinds() == kinds).all()
    assert (runs.transpose().dense_kinds() == np.swapaxes(kinds, 2, 3)).all()
    assert (runs.transpose().transpose().dense_kinds() == kinds).all()
    assert runs.counts() == tuple(int((kinds == c).sum()) for c in (EMPTY, PARTIAL, FULL))
    assert (runs.row_tiles() == (kinds != EMPTY).sum(-1).reshape(-1)).all()
    assert (runs.rows_maybe_empty() == ~(kinds == FULL).any(-1).reshape(-1)).all()


@pytest.mark.parametrize("seed", range(3))
def test_runs_are_ordered_disjoint_and_joined(seed: int) -> None:
    runs, _ = make(seed, (2, 2, 9, 30))
    for row in runs:
        for (_, end, kind), (start, _, following) in pairwise(row):
            assert end < start or (end == start and kind != following)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cut", [0, 3])
def test_launch_table_splits_kinds_and_demotes_the_cut_edge(seed: int, cut: int) -> None:
    runs, kinds = make(seed, (1, 2, 6, 11), cut=cut)
    table = runs.launch_table()
    want = kinds.copy()
    if cut:
        edge = want[..., -1]
        edge[edge == FULL] = PARTIAL
    got = np.zeros((12, 11), np.uint8)
    for kind, ptr, pairs in ((FULL, table.full_ptr, table.full_runs), (PARTIAL, table.part_ptr, table.part_runs)):
        assert ptr.dtype is torch.int32 and pairs.dtype is torch.int32 and pairs.shape[1] == 2
        for row in range(12):
            for a, e in pairs[int(ptr[row]) : int(ptr[row + 1])].tolist():
                assert a < e and not got[row, a:e].any()
                got[row, a:e] = kind
    assert (got == want.reshape(12, 11)).all()
    assert runs.launch_table() is table
    assert runs.launch_table(edge_demote=False).full_runs.shape[0] >= 0


@pytest.mark.parametrize("tile", [(4, 4), (16, 8), (5, 3), (32, 8), (24, 20), (100, 100)])
def test_retile_keeps_exactly_what_follows_from_the_old_tiles(tile: tuple[int, int]) -> None:
    for seed in range(6):
        runs, kinds = make(seed, (2, 1, 5, 9), cut=Random(seed).choice([0, 3]))
        lq, lk = runs.sizes
        pairs = np.repeat(np.repeat(kinds, 16, axis=2), 8, axis=3)[:, :, :lq, :lk]
        got = runs.retile(tile).dense_kinds()
        for i in range(got.shape[2]):
            for j in range(got.shape[3]):
                part = pairs[:, :, i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
                low, high = part.min((2, 3)), part.max((2, 3))
                want = np.where(high == EMPTY, EMPTY, np.where(low == FULL, FULL, PARTIAL))
                assert (got[:, :, i, j] == want).all()


def test_pictures_are_downsampled_soundly() -> None:
    runs, kinds = make(1, (1, 1, 37, 53))
    small = runs.tile_kinds(limit=10)
    assert small.shape == (10, 9)
    for i in range(10):
        for j in range(9):
            part = kinds[0, 0, 4 * i : 4 * i + 4, 6 * j : 6 * j + 6]
            assert small[i, j] == (EMPTY if not part.any() else FULL if (part == FULL).all() else PARTIAL)
    assert (runs.tile_kinds() == kinds[0, 0]).all()


NAMES = [f"{a}{b}_{c}" for a in ("", "full_") for b in ("kv", "q") for c in ("num_blocks", "indices")]


@pytest.mark.parametrize("n", [256, 300])
def test_tensors_equal_those_of_pytorch(n: int) -> None:
    block = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 150), 1, 1, n, n, device="cpu", BLOCK_SIZE=64)
    program = simple("w", mask=all_of(op("ge", q, k), op("lt", op("sub", q, k), 150)))
    runs = analyse(program, {"Lq": n, "Lk": n}, tile=(64, 64))
    ours = runs.to_block_mask_tensors()
    for name in NAMES:
        theirs = getattr(block, name)
        assert ours[name].dtype is theirs.dtype
        assert torch.equal(ours[name], theirs), name
    assert runs.sparsity() == pytest.approx(block.sparsity())
    assert torch.equal(runs.to_dense(), block.to_dense().to(torch.int32))
    assert runs.to_block_mask_tensors() is ours


def test_import_of_a_block_mask_gives_the_same_map() -> None:
    runs, kinds = make(5, (2, 3, 6, 7), tile=(32, 32), cut=0)
    t = runs.to_block_mask_tensors()
    block = BlockMask.from_kv_blocks(
        t["kv_num_blocks"], t["kv_indices"], t["full_kv_num_blocks"], t["full_kv_indices"], BLOCK_SIZE=32
    )
    back = RunMap.from_block_mask(
        block.kv_num_blocks, block.kv_indices, block.full_kv_num_blocks, block.full_kv_indices, (32, 32)
    )
    assert (back.dense_kinds() == kinds).all()
    assert (back.start == runs.start).all() and (back.ptr == runs.ptr).all()
    none = RunMap.from_block_mask(block.kv_num_blocks, block.kv_indices, None, None, (32, 32))
    assert (none.dense_kinds() == np.where(kinds == PARTIAL, PARTIAL, EMPTY)).all()


def test_a_block_listed_twice_is_partial() -> None:
    num = torch.ones(1, 1, 1, dtype=torch.int32)
    index = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    assert RunMap.from_block_mask(num, index, num, index, (8, 8)).runs(0) == [(0, 1, PARTIAL)]


@pytest.mark.parametrize(
    ("num", "index", "part"),
    [
        (torch.ones(1, 1, 1), torch.zeros(1, 1, 2, 1), "expected kv_num_blocks"),
        (torch.full((1, 1, 1), 3), torch.zeros(1, 1, 1, 2), "must lie between"),
        (torch.ones(1, 1, 1), torch.full((1, 1, 1, 2), 9), "only 2 key blocks"),
    ],
)
def test_broken_block_lists_are_refused(num: torch.Tensor, index: torch.Tensor, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        RunMap.from_block_mask(num.int(), index.int(), None, None, (8, 8))


def test_a_dense_map_of_a_million_tokens_is_refused() -> None:
    runs = analyse(simple("all"), {"Lq": 2**25, "Lk": 2**25})
    with pytest.raises(UsageError, match="tile_kinds"):
        runs.to_dense()
    with pytest.raises(UsageError, match="tiles"):
        RunMap.from_tiles(np.zeros((2, 2)), (8, 8), (8, 8))


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_every_form_of_a_map_without_tiles(lengths: tuple[int, int]) -> None:
    runs = analyse(simple("all"), {"Lq": lengths[0], "Lk": lengths[1]}, tile=(4, 4))
    assert runs.counts() == (0, 0, 0) and runs.sparsity() == 0.0 and runs.always_empty
    table = runs.launch_table()
    assert table.full_runs.shape == table.part_runs.shape == (0, 2)
    assert table.full_ptr.tolist() == [0] * (runs.nq + 1)
    assert runs.transpose().sizes == (lengths[1], lengths[0])
    assert runs.retile((2, 3)).counts() == (0, 0, 0)
    assert runs.tile_kinds().shape == (runs.nq, runs.nk)
    assert runs.to_block_mask_tensors()["kv_indices"].shape == (1, 1, runs.nq, runs.nk)
    assert runs.row_tiles().tolist() == [0] * runs.nq
