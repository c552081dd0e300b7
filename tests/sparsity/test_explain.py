"""Reports: counts, what each clause decides, tile efficiency and advice."""

from __future__ import annotations

import pytest
import torch
from mask_programs import exact_kinds

import attnlang.library as library
from attnlang.ir import INT, Param, ScalarParam, dense_mask, simple
from attnlang.ir.build import all_of, any_of, k, op, q
from attnlang.sparsity import EMPTY, FULL, PARTIAL, analyse, clause_report, explain

SIZES = {"B": 1, "H": 2, "Hkv": 1, "Lq": 512, "Lk": 512}


def test_clauses_add_up_to_what_they_decide_alone() -> None:
    causal, window = op("ge", q, k), op("lt", op("sub", q, k), 100)
    for mask in (all_of(causal, window), any_of(causal, window)):
        report = clause_report(simple("m", mask=mask), SIZES, tile=(64, 64))
        assert [c.text for c in report] == ["q >= k", "q - k < 100"]
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
    assert report.flops(32) == 4 * 32 * report.computed_pairs


def test_a_sample_comes_close_on_many_partial_tiles() -> None:
    sizes = {**SIZES, "Lq": 8192, "Lk": 8192}
    report = explain(library.causal_sliding_window, sizes, {"window": 1000}, tile=(32, 32))
    assert not report.exact
    pairs = sum(min(i, 1000) + 1 for i in range(8192))
    _, partial, full = report.runs.counts()
    assert report.efficiency == pytest.approx(pairs / ((partial + full) * 32 * 32), rel=0.03)


def test_advice_to_round_a_window_to_the_tile() -> None:
    window = Param("window", INT)
    band = all_of(op("ge", q, k), op("lt", op("sub", q, k), window))
    program = simple("band", mask=band, scalars=(ScalarParam("window", INT, 500),))
    report = explain(program, {**SIZES, "Lq": 4096, "Lk": 4096})
    assert any(text.startswith("window 500 -> 512 makes") for text in report.advice)
    better = explain(program, {**SIZES, "Lq": 4096, "Lk": 4096}, {"window": 512})
    assert not better.advice


def test_the_text_names_what_matters() -> None:
    text = str(explain(library.causal_sliding_window, SIZES, {"window": 100}, tile=(64, 64)))
    for part in (
        "512 queries x 512 keys",
        "empty",
        "partial",
        "full",
        "tile efficiency",
        "clauses joined",
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
