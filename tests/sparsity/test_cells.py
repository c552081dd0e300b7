"""Tables in cells: what they say of a box holds of its elements, and is exact for boxes of whole cells."""

from __future__ import annotations

import fuzz
import numpy as np
import pytest
import torch
from cell_patch import small_cells

import attnlang as al
from attnlang.ir import BOOL, FLOAT, INT, Type
from attnlang.passes.intervals import Interval
from attnlang.sparsity import analyse, classify
from attnlang.sparsity.captured import Captured, CapturedCells
from attnlang.sparsity.cells import SIDE, cells


def table(kind: Type, shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    if kind is BOOL:
        return torch.rand(shape, generator=g) < 0.97
    if kind is INT:
        return torch.randint(-50, 50, shape, generator=g, dtype=torch.int16)
    found = torch.randn(shape, generator=g)
    found.view(-1)[::97] = torch.nan
    return found


def summary(t: torch.Tensor, kind: Type) -> CapturedCells:
    made = cells(t, kind)
    return CapturedCells(made.low, made.high, bool(made.nan), kind, t.shape)


@pytest.mark.parametrize("shape", [(40, 64), (3, 37, 61), (2, 2, 16, 9)], ids=str)
@pytest.mark.parametrize("kind", [BOOL, INT, FLOAT], ids=["bool", "int", "float"])
def test_ranges_hold_and_are_exact_for_whole_cells(kind: Type, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(len(shape))
    t = table(kind, shape, g)
    found, exact = summary(t, kind), Captured(t, kind)
    random = np.random.default_rng(0)
    for whole in (False, True):
        ranges = []
        for d, n in enumerate(shape):
            lo = random.integers(-3, n + 3, 200)
            hi = lo + random.integers(0, n, 200)
            if d < len(shape) - 2:
                lo, hi = np.clip(lo, 0, n - 1), np.clip(lo, 0, n - 1)
            elif whole:  # a power of two of cells for numbers, any for flags
                size = SIDE * (2 ** random.integers(0, 3, 200) if kind is not BOOL else random.integers(1, 6, 200))
                lo = random.integers(0, n, 200) // size * size
                hi = np.minimum(lo + size, n) - 1
            ranges.append(Interval(lo, hi))
        got = found.query(ranges, 200)
        for i in range(200):
            at = tuple(
                slice(int(np.clip(r.lo[i], 0, n - 1)), int(np.clip(r.hi[i], 0, n - 1)) + 1)
                for r, n in zip(ranges, shape, strict=True)
            )
            part = t[at]
            if kind is BOOL:
                assert bool(got.true[i]) >= bool(part.any()) and bool(got.false[i]) >= bool((~part).any())
                if whole:
                    assert (got.true[i], got.false[i]) == (part.any(), (~part).any())
                continue
            numbers = part[~part.isnan()] if kind is FLOAT else part
            if not numbers.numel():
                continue
            low, high = numbers.min().item(), numbers.max().item()
            assert got.lo[i] <= low and got.hi[i] >= high
            if whole:
                assert (got.lo[i], got.hi[i]) == (low, high)
    assert found.nan == exact.nan
    assert tuple(found.whole)[:2] == tuple(exact.whole)[:2]


def test_tiles_of_a_dense_mask_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    program = al.parse("pattern p(m: bool[Lq, Lk]): mask = m[q, k] and k <= q")
    m = torch.ones(200, 300, dtype=torch.bool).triu(-40)
    m[64:128, 32:64] = False
    sizes = {"B": 1, "H": 1, "Hkv": 1, "Lq": 200, "Lk": 300}
    want = analyse(program, sizes, {}, {"m": m}, (32, 16)).dense_kinds()
    small_cells(monkeypatch)
    assert np.array_equal(analyse(program, sizes, {}, {"m": m}, (32, 16)).dense_kinds(), want)


def test_large_tables_are_sent_as_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    to_host = classify.to_host
    monkeypatch.setattr(classify, "to_host", lambda given: sent.append(given) or to_host(given))
    m = torch.ones(2100, 2100, dtype=torch.bool).tril_()
    program = al.parse("pattern p(m: bool[Lq, Lk]): mask = m[q, k]")
    sizes = {"B": 1, "H": 1, "Hkv": 1, "Lq": 2100, "Lk": 2100}
    found = analyse(program, sizes, {}, {"m": m}, (128, 128))
    assert sum(t.numel() for t in sent[0].values()) < m.numel() / 25
    assert found.counts() == analyse(al.library.causal, sizes, {}, {}, (128, 128)).counts()


def test_random_masks_stay_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    small_cells(monkeypatch)
    done, _, _, bad = fuzz.run(range(1 << 41, (1 << 41) + 1500))
    assert done == 1500
    assert not bad, bad
