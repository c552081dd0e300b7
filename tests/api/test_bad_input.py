"""Hostile and degenerate input through the public functions: an error that names it, or what the reference says."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import attnlang as al

TEXT = """
pattern far(window: int, stride: int):
    mask = q - k < window and k * stride <= q * stride + stride

pattern late(start: int):
    mask = k + start >= q + start or q * start > k

pattern same(doc: int[N]):
    mask = doc[q // 2] == doc[k // 2]

pattern direct(doc: int[N]):
    mask = doc[q] == doc[k]

pattern table(row: int[Lq], seen: bool[R, Lk]):
    mask = seen[row[q], k]

pattern gated(gate: float[Lk], bias: float[Lk]):
    mask = gate[k] >= gate[q] or k == q
    score = s + bias[k]

pattern never(gap: int = 0):
    mask = q > k + gap and q < k

pattern padded(length: int[B]):
    mask = k < length[b]
"""
BACKENDS = ("cpp", "eager")
LAST = 2**31 - 1


def compiled(name: str) -> al.Attention:
    return al.compile(al.parse(TEXT, name))


def operands(q_len: int, kv_len: int | None = None, heads: int = 2) -> tuple[torch.Tensor, ...]:
    kv_len = q_len if kv_len is None else kv_len
    return tuple(torch.randn(2, heads, n, 16) for n in (q_len, kv_len, kv_len))


def agree(attention: al.Attention, q_len: int, kv_len: int | None = None, **captured: object) -> None:
    """Output and lse of every backend are the reference's."""
    q, k, v = operands(q_len, kv_len)
    want, want_lse = al.reference(attention, q, k, v, return_lse=True, **captured)
    for backend in BACKENDS:
        out, lse = attention(q, k, v, return_lse=True, backend=backend, **captured)
        torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("window", [LAST, -LAST - 1, 2**33, 2**62, -(2**63), 40])
@pytest.mark.parametrize("stride", [2**28, 2**31, -(2**40), 3])
def test_numbers_beyond_int32_do_not_wrap(window: int, stride: int) -> None:
    agree(compiled("far"), 70, window=window, stride=stride)


@pytest.mark.parametrize("start", [LAST - 64, LAST, -LAST, 2**61, 2**63 - 1, 1])
def test_indices_pushed_over_the_edge_of_an_integer(start: int) -> None:
    agree(compiled("late"), 70, start=start)


def test_lengths_at_the_edge_of_int32() -> None:
    causal = al.compile(al.library.causal)
    runs = causal.run_map(1, 1, LAST, LAST, tile=(2**20, 2**20))
    assert runs.counts() == (2048 * 2047 // 2, 2048, 2048 * 2047 // 2)
    with pytest.raises(al.UsageError, match=r"lengths go up to 2\^31 - 1"):
        causal.run_map(1, 1, 2**31, 64)
    assert "2147483647 queries" in str(causal.explain(LAST, 16, tile=(2**20, 16)))


def test_a_tensor_shorter_than_what_indexes_it_is_found_before_launch() -> None:
    q, k, v = operands(40)
    with pytest.raises(al.UsageError, match=r"doc is indexed with . on dimension 0, which has 30 element"):
        compiled("direct")(q, k, v, doc=torch.zeros(30, dtype=torch.int64))
    with pytest.raises(al.UsageError, match=r"doc is indexed with"):
        compiled("direct").run_map(1, 1, 40, 40, doc=torch.zeros(30, dtype=torch.int64))
    with pytest.raises(al.UsageError, match=r"gate must have shape"):
        compiled("gated")(q, k, v, gate=torch.zeros(39), bias=torch.zeros(40))


@pytest.mark.parametrize("length", [1, 9, 20])
def test_where_that_cannot_be_known_reads_stay_inside(length: int) -> None:
    agree(compiled("same"), 40, doc=torch.arange(length) // 3)


@pytest.mark.parametrize("ids", [[-1, 0, 7, 8], [-(2**63), 2**63 - 1, 0, 3], [-3, -2, -1, -1]])
def test_ids_that_are_negative_or_too_large_as_values_and_as_indices(ids: list[int]) -> None:
    row = torch.tensor(ids).repeat_interleave(10)
    agree(compiled("direct"), 40, doc=row)
    seen = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    agree(compiled("table"), 40, row=row, seen=seen)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_floats_that_are_no_numbers_decide_masks_as_in_the_reference(value: float) -> None:
    gate = torch.linspace(-1, 1, 130)
    gate[[3, 64, 65, 129]] = value
    agree(compiled("gated"), 130, gate=gate, bias=torch.zeros(130))
    everywhere = torch.full((130,), value)
    agree(compiled("gated"), 130, gate=everywhere, bias=torch.zeros(130))


@pytest.mark.parametrize("tile", [(1, 1), (4096, 4096), (LAST, LAST), (3, 1 << 20)])
@pytest.mark.parametrize("lengths", [(5, 5), (1, 9), (0, 4), (4, 0), (0, 0)])
def test_tiles_larger_than_the_sequence_and_sides_of_nothing(tile: tuple[int, int], lengths: tuple[int, int]) -> None:
    causal = al.compile(al.library.causal)
    runs = causal.run_map(1, 1, *lengths, tile=tile)
    dense = torch.arange(lengths[1]) <= torch.arange(lengths[0])[:, None]
    kinds = runs.dense_kinds()[0, 0]
    for i, row in enumerate(kinds):
        for j, kind in enumerate(row):
            part = dense[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
            assert kind == (2 if part.all() else 1 if part.any() else 0)
    assert str(causal.explain(*lengths, tile=tile))


@pytest.mark.parametrize("lengths", [(0, 4), (4, 0), (0, 0), (1, 1)])
def test_calls_with_sides_of_nothing(lengths: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to see is no contradiction
        agree(al.compile(al.library.causal), *lengths)


def test_tiles_and_lengths_that_are_none_are_named() -> None:
    causal = al.compile(al.library.causal)
    for tile in ((0, 8), (8, -1)):
        with pytest.raises(al.UsageError, match="tile sides must be at least 1"):
            causal.run_map(1, 1, 8, 8, tile=tile)
    with pytest.raises(al.UsageError, match="Lq must not be negative, got -1"):
        causal.run_map(1, 1, -1, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_contradicts_itself_warns_once_and_gives_zeros(backend: str) -> None:
    attention = al.compile(
        al.parse(f"pattern never_{backend}(gap: int = 0):\n    mask = q > k + gap and q < k", f"never_{backend}")
    )
    q, k, v = (t.requires_grad_() for t in operands(70))
    with pytest.warns(
        RuntimeWarning, match="no query can see any key at these lengths .it contradicts itself."
    ) as caught:
        out, lse = attention(q, k, v, return_lse=True, backend=backend)
        attention(q, k, v, backend=backend)
        attention(*operands(50), backend=backend)
    assert len(caught) == 1
    assert not out.any() and bool((lse == -math.inf).all())
    out.sum().backward()
    assert not any(t.grad.any() for t in (q, k, v))


def test_lengths_that_hide_everything_warn_and_give_zeros() -> None:
    attention = compiled("padded")
    with pytest.warns(RuntimeWarning, match="what its captured tensors hold"):
        out = attention(*operands(40), length=torch.zeros(2, dtype=torch.int64))
    assert not out.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(attention, 40, length=torch.tensor([0, 7]))  # some rows hidden is what lengths are for


@pytest.mark.parametrize("target", ["cpu", "cuda:90"])
def test_source_of_what_is_not_one_kernel(target: str) -> None:
    with pytest.raises(al.UsageError, match="moba has 4 stages and is not one kernel"):
        al.compile(al.library.moba).source(target)
    branched = al.parse("""
pattern two(more_q: float[B, H, Lq, R], more_k: float[B, 1, Lk, R]):
    term t = dot(more_q, more_k[b, 0, k])
    score = s + t
""")
    with pytest.raises(al.UsageError, match="two is not one kernel: it has several score terms"):
        al.compile(branched).source(target)
    with pytest.raises(al.UsageError, match="no part of two is a kernel without its operands: attend: it has several"):
        al.compile(branched).sources(target)


@pytest.mark.parametrize("target", ["cpu", "cuda:90"])
def test_sources_of_the_parts_of_a_program(target: str) -> None:
    made = al.compile(al.library.anchor).sources(target, head_dim=32)
    assert list(made) == ["near", "best_row", "read"]
    assert len(set(made.values())) == 3
    assert list(al.compile(al.library.gated_duo).sources(target)) == ["attend_0", "attend_1"]
    causal = al.compile(al.parse("pattern p: mask = k <= q"))
    assert causal.sources(target) == {"attend": causal.source(target)}


def test_parts_are_not_confused_with_other_stages() -> None:
    program = al.parse("""
pattern two:
    attend a:
        branch near:
            mask = k <= q
        branch far:
            mask = k > q
        output x = sum(w * V, over=k, branch=near)
        output y = sum(w * V, over=k, branch=far)
    attend a_1:
        normalize = elementwise(sigmoid(s))
    rows o[B, H, Lq, Dv] = a_1[b, h, q, d] + x[b, h, q, d] + y[b, h, q, d]
""")
    made = al.compile(program).sources("cpu")
    assert list(made) == ["a_0", "a_1_", "a_1"]
    assert len(set(made.values())) == 3
