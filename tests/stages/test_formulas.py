"""The reference and the blockwise executor against formulas written by hand in PyTorch, gradients included."""

from __future__ import annotations

import pytest
import torch

import attnlang as al
from attnlang.ir import verify
from attnlang.runtime import regions

from . import programs

IDS = [f.__name__ for f in programs.FORMULAS]


def leaves(formula: programs.Formula):
    q, k, v = programs.operands(torch.Generator().manual_seed(0))
    captured = {n: t.clone() for n, t in formula.captured.items()}
    wanted = [q, k, v, *(t for t in captured.values() if t.is_floating_point())]
    for t in wanted:
        t.requires_grad_()
    return (q, k, v), captured, wanted


def everything(result, names):
    """Results by name from what a call with lse and aux returns."""
    if isinstance(result, dict):
        return result
    *known, aux = result
    return dict(zip([n for n in ("o", "lse") if n in names], known, strict=True)) | aux


def call(run, formula, operands, captured, **options):
    names = verify(formula.program).results
    lse = {"return_lse": True} if "lse" in names else {}
    return everything(run(*operands, **captured, return_aux=True, **lse, **options), names)


@pytest.mark.parametrize("make", programs.FORMULAS, ids=IDS)
@pytest.mark.parametrize("executor", ["reference", "blockwise"])
def test_values_and_gradients(make, executor, monkeypatch):
    monkeypatch.setattr(regions, "TILE", (16, 16))
    formula = make()
    operands, captured, wanted = leaves(formula)
    if executor == "reference":
        got = call(lambda *a, **c: al.reference(formula.program, *a, **c), formula, operands, captured)
    else:
        got = call(al.compile(formula.program), formula, operands, captured, backend="eager")
    want = formula.dense(*operands, **captured)
    assert list(got) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, check_dtype=False)
    smooth = [n for n, t in want.items() if t.requires_grad]
    cotangents = [torch.randn(want[n].shape, dtype=torch.float64) for n in smooth]
    for n, g in zip(smooth, cotangents, strict=True):
        g[~torch.isfinite(want[n])] = 0.0
    ours = torch.autograd.grad([got[n] for n in smooth], wanted, cotangents, allow_unused=True)
    theirs = torch.autograd.grad([want[n] for n in smooth], wanted, cotangents, allow_unused=True)
    for a, c in zip(ours, theirs, strict=True):
        a = torch.zeros(()) if a is None else a
        torch.testing.assert_close(a, torch.zeros_like(a) if c is None else c, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("make", programs.FORMULAS, ids=IDS)
def test_single_precision(make):
    formula = make()
    operands, captured, _ = leaves(formula)
    with torch.no_grad():
        want = formula.dense(*operands, **captured)
        cast = {n: t.float() if t.is_floating_point() else t for n, t in captured.items()}
        got = call(al.compile(formula.program), formula, [t.float() for t in operands], cast)
    for name, value in want.items():
        if value.is_floating_point():
            torch.testing.assert_close(got[name].double(), value, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "make", [programs.sink, programs.sigmoid, programs.lightning], ids=["sink", "sigmoid", "lightning"]
)
def test_second_derivatives(make):
    formula = make()
    operands, captured, _ = leaves(formula)
    q, k, v = (t.detach()[:1, :, :6].requires_grad_() for t in operands)
    attention = al.compile(formula.program, backend="eager")
    assert torch.autograd.gradgradcheck(lambda *a: attention(*a, **captured), (q, k, v))


def test_a_backend_that_has_no_kernel_names_one_that_has():
    program = al.parse("pattern p:\n    mask = k <= q\n    output probabilities = w")
    operands = [torch.randn(1, 2, 9, 16) for _ in range(3)]
    with pytest.raises(al.AttnlangError, match="backend='eager' runs p"):
        al.compile(program, backend="cpp")(*operands, return_aux=True)


def test_no_lse_says_so():
    formula = programs.sigmoid()
    operands, _, _ = leaves(formula)
    with pytest.raises(al.UsageError, match="has no lse"):
        al.compile(formula.program)(*operands, return_lse=True)
