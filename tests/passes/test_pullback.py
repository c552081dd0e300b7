"""The backward pass of streaming stages, carried out densely: it gives what autograd makes of the stage's meaning."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from attnlang.ir import Attend, Environment, Load, attend_region, evaluate, finish, postorder
from attnlang.ir.build import TRUE, all_of, k, op, q, s
from attnlang.passes.pullback import DP, Pullback, pullback, saved, saving
from attnlang.passes.shifts import is_only_a_shift
from attnlang.passes.streaming import Unstreamable, streaming
from attnlang.runtime.row_gradients import row_gradients
from tests.passes.test_streaming import LK, LQ, B, D, H, given, region, stream
from tests.streaming_cases import CASES, masked

Tensor = torch.Tensor
REFUSED = {"peak", "column_peak", "least", "temperature"}
"""Stages whose gradient goes through the place of an extremum."""


def accumulators(pull: Pullback, stage: Attend, env: Environment) -> dict[str, Tensor]:
    """What a forward kernel saves: every accumulator as an output of its own."""
    found = stream(saving(pull.stream), stage, env, 64)
    return {a: found[name] for a, name in saved(pull.stream).items()}


def backward(pull: Pullback, stage: Attend, env: Environment, found: dict[str, Tensor], grads: dict[str, Tensor]):
    """The gradients of q, k, v and captured tensors that a backward kernel makes."""
    wanted = [n for n, t in env.tensors.items() if t.is_floating_point()]
    held = accumulators(pull, stage, env)
    given_rows = row_gradients(pull, env, held, found, grads, wanted)
    rows = dict(given_rows.rows)
    q_, k_, v_ = (env.operands[n] for n in "qkv")
    raw = q_ @ k_.mT
    do = torch.zeros_like(raw[..., :1]).expand(B, H, LQ, D) if given_rows.do is None else given_rows.do
    pairs = {"s": raw, DP.name: do @ v_.mT}
    columns = {n: t[..., None, :] for n, t in given_rows.columns.items()}

    def value(expr):
        spread = {n: t[..., None] for n, t in rows.items()}
        at = Environment(region().axes(), env.sizes, {}, env.tensors, {**pairs, **spread, **columns}, torch.float64)
        seen = evaluate(stage.branch.mask, at)
        return torch.where(seen, evaluate(expr, at), 0.0).expand(B, H, LQ, LK)

    for sweep in pull.sweeps:
        for name, more in [(n.name, value(e).sum(-1)) for n, e in sweep.sums]:
            rows[name] = rows[name] + more
    draw = value(pull.draw)
    out = {"q": draw @ k_, "k": draw.mT @ q_, "v": torch.zeros_like(v_)}
    if pull.weight is not None:
        out["v"] = value(pull.weight).mT @ do
    for name in wanted:
        total = given_rows.captured.get(name, torch.zeros_like(env.tensors[name]))
        for load, expr in pull.captured([name]):
            at = Environment(region().axes(), env.sizes, {}, env.tensors, {}, torch.float64)
            places = zip(load.indices, total.shape, strict=True)
            index = [evaluate(i, at).clamp(0, n - 1).expand(B, H, LQ, LK) for i, n in places]
            total = total.clone().index_put_(tuple(index), value(expr), accumulate=True)
        out[name] = total
    return out


GIVEN = {n: c for n, c in CASES.items() if n not in REFUSED}
GIVEN["temperature"] = replace(CASES["temperature"], outputs=CASES["temperature"].outputs[:1])
"""Without its lse the maximum of the tempered softmax is a shift, though no pass may run with it."""


@pytest.mark.parametrize("mask", [TRUE, all_of(op("ge", q, k), op("ne", op("mod", q, 5), 0))], ids=["all", "causal"])
@pytest.mark.parametrize("name", sorted(GIVEN))
def test_pullbacks_are_gradients(name: str, mask: object) -> None:
    check_gradients(masked(GIVEN[name], mask), name)


def check_gradients(stage: Attend, name: str) -> None:
    env = given()
    pull = pullback(stage)
    read = {n.tensor for n in postorder(*stage.roots()) if isinstance(n, Load)}
    tensors = {n: t.requires_grad_() if n in read else t for n, t in env.tensors.items()}
    leaves = {n: t.requires_grad_() for n, t in (*env.operands.items(), *tensors.items())}
    env = replace(env, tensors=tensors)
    made = attend_region(stage, env, region(), 1.0)
    outs = {o.name: finish(o, made[o.name]) for o in stage.outputs}
    generator = torch.Generator().manual_seed(1)
    grads = {
        n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in outs.items() if t.requires_grad
    }
    want = torch.autograd.grad([outs[n] for n in grads], list(leaves.values()), list(grads.values()), allow_unused=True)
    plain = replace(
        env,
        tensors={n: t.detach() for n, t in env.tensors.items()},
        operands={n: t.detach() for n, t in env.operands.items()},
    )
    got = backward(pull, stage, plain, {n: t.detach() for n, t in outs.items()}, grads)
    for leaf, expected in zip(leaves, want, strict=True):
        expected = torch.zeros_like(leaves[leaf]) if expected is None else expected
        torch.testing.assert_close(got[leaf], expected, atol=1e-8, rtol=1e-7, msg=lambda t, x=leaf: f"{name} {x}: {t}")


@pytest.mark.parametrize("name", ["entropy", "decay", "sigmoid", "columns", "cut"])
def test_scores_of_minus_infinity_hide_their_pairs(name: str) -> None:
    """One key, and every key of some rows."""
    hidden = op("or", op("eq", k, 3), op("eq", op("mod", q, 7), 2))
    found = GIVEN[name]
    branch = replace(found.branch, score=op("where", hidden, -math.inf, s))
    check_gradients(replace(found, branches=(branch,)), name)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_extrema_with_gradients_are_refused(name: str) -> None:
    with pytest.raises(Unstreamable, match="the gradient of a"):
        pullback(CASES[name])


def test_softmax_needs_one_pass_and_three_numbers_a_row() -> None:
    pull = pullback(Attend())
    assert not pull.sweeps and not pull.columns()
    assert len(pull.rows()) == 3  # the maximum, the factor 1 / sum, and the cotangent of the sum


def test_a_maximum_read_as_a_number_is_more_than_a_shift() -> None:
    from attnlang.ir import DEFAULT_OUTPUTS, Output
    from attnlang.ir.stages import stat
    from tests.streaming_cases import stage

    found = stage(outputs=(*DEFAULT_OUTPUTS, Output("top", stat("m"), over="")))
    assert not is_only_a_shift(streaming(found), "a0")
    with pytest.raises(Unstreamable, match="as a number"):
        pullback(found)
    assert is_only_a_shift(streaming(stage()), "a0")
