"""Reports: counts, what each clause decides, tile efficiency and advice."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from mask_programs import exact_kinds

import attnlang.library as library
from attnlang.ir import INT, Param, Program, ScalarParam, dense_mask, simple
from attnlang.ir.build import all_of, any_of, k, op, q
from attnlang.sparsity import EMPTY, FULL, PARTIAL, analyse, clause_report, explain, propose_layouts

SIZES = {"B": 1, "H": 2, "Hkv": 1, "Lq": 512, "Lk": 512}


def test_clauses_add_up_to_what_they_decide_alone() -> None:
    causal, window = op("ge", q, k), op("lt", op("sub", q, k), 100)
    for mask in (all_of(causal, window), any_of(causal, window)):
        report = clause_report(simple("m", mask=mask), SIZES, tile=(64, 64))
        assert [c.text for c in report] == ["q >= k", "q - k < 100"]
        assert [c.without for c in report] == [report[1].counts, report[0].counts]
        for clause, expr in zip(report, (causal, window), strict=True):
            exact = exact_kinds(dense_mask(simple("c", mask=expr), {**SIZES, "H": 1}), (64, 64))
            assert (clause.empty, clause.partial, clause.full) == tuple(
                int((exact == kind).sum()) for kind in (EMPTY, PARTIAL, FULL)
            )


def test_efficiency_is_visible_over_computed_pairs() -> None:
    program = library.causal_sliding_window
    report = explain(program, SIZES, {"window": 100}, tile=(64, 64))
    visible = int(dense_mask(program, {**SIZES, "H": 1}, {"window": 100}).sum())
    _, partial, full = report.runs.counts()
    assert report.exact
    assert report.efficiency == pytest.approx(visible / ((partial + full) * 64 * 64))
    assert report.computed_pairs == 2 * (partial + full) * 64 * 64  # for both heads
    assert report.flops(32) == 4 * 32 * report.computed_pairs == report.flops(16, 48)
    assert report.operand_bytes(32, 4) == 2 * 512 * 32 * 4 * (2 + 1)  # q and o of two heads, k and v of one
    assert report.tile_bytes(32, 4) == 2 * 32 * 4 * (2 * 512 + 2 * (partial + full) * 64)


def test_cut_tiles_count_what_is_in_range() -> None:
    sizes = {**SIZES, "Lq": 500, "Lk": 413}
    report = explain(library.causal, sizes, tile=(64, 48))
    visible = int(dense_mask(library.causal, {**sizes, "H": 1}).sum())
    assert report.measured.visible == visible
    assert report.efficiency == pytest.approx(visible / (sum(report.runs.counts()[1:]) * 64 * 48))


def test_a_sample_comes_close_on_many_partial_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["attnlang.sparsity.explain"], "PAIRS", 256 * 32 * 32)
    sizes = {**SIZES, "Lq": 8192, "Lk": 8192}
    report = explain(library.causal_sliding_window, sizes, {"window": 1000}, tile=(32, 32))
    assert not report.exact
    pairs = sum(min(i, 1000) + 1 for i in range(8192))
    _, partial, full = report.runs.counts()
    truth = pairs / ((partial + full) * 32 * 32)
    assert report.measured.sampled == 256
    assert abs(report.efficiency - truth) < 3 * report.measured.error < 0.05
    assert "±" in str(report)


def test_advice_to_round_a_window_to_the_tile() -> None:
    window = Param("window", INT)
    band = all_of(op("ge", q, k), op("lt", op("sub", q, k), window))
    program = simple("band", mask=band, scalars=(ScalarParam("window", INT, 500),))
    report = explain(program, {**SIZES, "Lq": 4096, "Lk": 4096})
    assert any(text.startswith("window 500 -> 512 makes") for text in report.advice)
    better = explain(program, {**SIZES, "Lq": 4096, "Lk": 4096}, {"window": 512})
    assert not better.advice
    wide = explain(program, {**SIZES, "Lq": 4096, "Lk": 4096}, {"window": 530})
    assert any(text.startswith("window 530 -> 512 makes") for text in wide.advice)  # a multiple below is as good
    tiny = explain(program, {**SIZES, "Lq": 4096, "Lk": 4096}, {"window": 7})
    assert not any("window" in text for text in tiny.advice)  # another mask altogether


def test_advice_for_a_smaller_tile_is_what_it_would_be() -> None:
    program = library.block_diagonal
    report = explain(program, {**SIZES, "Lq": 2048, "Lk": 2048}, {"block": 64}, tile=(128, 128))
    assert report.efficiency == pytest.approx(0.5)
    assert "tile 64x64 raises efficiency from 0.50 to 1.00" in report.advice
    assert explain(program, {**SIZES, "Lq": 2048, "Lk": 2048}, {"block": 64}, tile=(64, 64)).efficiency == 1.0


def test_advice_for_an_order_of_tokens_is_what_it_would_be() -> None:
    sizes = {**SIZES, "H": 1, "Lq": 4096, "Lk": 4096}
    params = {"height": 64, "width": 64, "window": 13}
    report = explain(library.neighborhood_2d, sizes, params, tile=(64, 64))
    (text,) = (t for t in report.advice if t.startswith("tokens in"))
    best = propose_layouts(library.neighborhood_2d, sizes, params, tile=(64, 64), limit=1)[0]
    moved = explain(library.neighborhood_2d, sizes, params, tile=(64, 64), layout=best.layout)
    assert text.endswith(f"from {report.efficiency:.2f} to {moved.efficiency:.2f}")


def test_what_a_mask_depends_on_is_named() -> None:
    def depends(program: Program, tensors: dict[str, torch.Tensor]) -> object:
        return explain(program, {**SIZES, "B": 2}, {}, tensors).to_dict()["depends_on"]

    doc = torch.arange(512).expand(2, -1) // 64
    assert depends(library.causal, {}) == ["positions"]
    assert depends(library.document, {"doc": doc}) == ["positions", "the batch element", "doc"]
    flags = torch.zeros(512, dtype=torch.bool)
    assert depends(library.longformer, {"globals": flags}) == ["positions", "globals"]


def test_nested_clauses_and_what_changes_without_them() -> None:
    report = explain(library.streaming_llm, SIZES, {"sinks": 4, "window": 100}, tile=(64, 64))
    assert [(c.joined, c.depth) for c in report.clauses] == [("and", 0), ("and", 0), ("or", 1), ("or", 1)]
    causal, window = op("ge", q, k), op("lt", op("sub", q, k), 100)
    without_sinks = analyse(simple("m", mask=all_of(causal, window)), SIZES, tile=(64, 64))
    assert report.clauses[2].without == without_sinks.counts()
    assert "-" in next(line for line in str(report).splitlines() if "or k < sinks" in line).split("full")[-1]


def test_clauses_count_over_the_batch_of_the_whole_mask() -> None:
    doc = torch.arange(512).expand(2, -1) // 64
    report = explain(library.causal_document, {**SIZES, "B": 2}, {}, {"doc": doc}, tile=(64, 64))
    assert {sum(c.counts) for c in report.clauses} == {sum(report.runs.counts())} == {2 * 64}


def test_a_mask_of_many_clauses_is_reported_in_part() -> None:
    mask = any_of(*(op("eq", op("sub", q, k), i) for i in range(0, 120, 3)))
    assert len(explain(simple("many", mask=mask), SIZES).clauses) == 16


def test_the_data_is_json_and_says_what_the_text_says() -> None:
    report = explain(library.causal_sliding_window, SIZES, {"window": 100}, tile=(64, 64))
    data = json.loads(json.dumps(report.to_dict()))
    empty, partial, full = report.runs.counts()
    assert data["tiles"] == {"empty": empty, "partial": partial, "full": full}
    assert sum(data["fractions"].values()) == pytest.approx(1)
    assert data["efficiency"]["share"] == pytest.approx(report.efficiency)
    assert data["forward"]["flops"] == report.flops(64)
    assert [c["text"] for c in data["clauses"]] == [c.text for c in report.clauses]
    assert data["closed_form"][0]["full_lo"]


@pytest.mark.parametrize("lengths", [(0, 8), (8, 0), (0, 0), (1, 1)])
def test_lengths_of_nothing_are_explained(lengths: tuple[int, int]) -> None:
    report = explain(library.causal_sliding_window, {**SIZES, "Lq": lengths[0], "Lk": lengths[1]}, {"window": 3})
    assert report.efficiency <= 1 and str(report) and json.dumps(report.to_dict())


def test_the_text_names_what_matters() -> None:
    text = str(explain(library.causal_sliding_window, SIZES, {"window": 100}, tile=(64, 64)))
    for part in (
        "512 queries x 512 keys",
        "empty",
        "partial",
        "full",
        "tile efficiency",
        "clause, alone",
        "without it",
        "closed form",
    ):
        assert part in text
    doc = torch.arange(512)[None] // 64
    assert "closed form" not in str(explain(library.document, SIZES, {}, {"doc": doc}))


def test_a_contradiction_is_reported() -> None:
    never = simple("never", mask=all_of(op("gt", q, k), op("lt", q, k)))
    report = explain(never, SIZES)
    assert report.runs.always_empty and report.efficiency == 1.0
    assert any("contradicts itself" in text for text in report.advice)
    assert analyse(never, SIZES).counts() == (16, 0, 0)
