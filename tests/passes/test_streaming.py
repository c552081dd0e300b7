"""How stages stream: what plans say is what the stage means, whatever the order and number of chunks."""

from __future__ import annotations

import math

import pytest
import torch

from attnlang.ir import Attend, Environment, Region, attend_region, evaluate, finish
from attnlang.ir.build import TRUE, all_of, k, op, q, s
from attnlang.ir.stages import SOFTMAX, WEIGHT, Normalizer, Output, Stat, stat
from attnlang.passes.factors import SHIFTED
from attnlang.passes.streaming import Streaming, Unstreamable, streaming
from tests.streaming_cases import CASES, RELU, TENSORS, masked, stage

Tensor = torch.Tensor
B, H, LQ, LK, D = 1, 2, 23, 40, 8


def given() -> Environment:
    torch.manual_seed(3)
    q_, k_, v_ = (torch.randn(B, H, n, D, dtype=torch.float64) for n in (LQ, LK, LK))
    sizes = {"B": B, "H": H, "Hkv": H, "Lq": LQ, "Lk": LK}
    shapes = {"sink": (H,), "rate": (H,), "gate": (H, LK), "noise": (LQ, LK)}
    tensors = {t.name: torch.randn(shapes[t.name], dtype=torch.float64) for t in TENSORS}
    return Environment({}, sizes, {}, tensors, {}, torch.float64, "cpu", {"q": q_, "k": k_ * 3, "v": v_})


def region(rows: int = LQ, keys: int = LK) -> Region:
    return Region(torch.arange(B), torch.arange(H), torch.arange(rows), torch.arange(keys))


def stream(found: Streaming, stage: Attend, env: Environment, chunk: int) -> dict[str, Tensor]:
    """What a kernel does, in PyTorch: chunks of keys, a running shift, row expressions at the end."""
    held: dict[str, Tensor] = {}
    raw_all = env.operands["q"] @ env.operands["k"].transpose(-1, -2)
    everything = Environment(region().axes(), env.sizes, {}, env.tensors, {}, torch.float64)
    seen_all = evaluate(stage.branch.mask, everything).expand(B, H, LQ, LK)

    def run(expr, at, **inputs):
        axes = Environment(at.axes(), env.sizes, {}, env.tensors, {**inputs, **held_rows()}, torch.float64)
        return evaluate(expr, axes)

    def held_rows():
        return {n: t[..., None] for n, t in held.items() if t.dim() == 3 and n not in running}

    for number, accumulators in enumerate(found.passes):
        running = {a.name for a in accumulators}
        for a in accumulators:
            shape = (B, H, LK) if a.over == "q" else (B, H, LQ, D) if a.rows else (B, H, LQ)
            fill = -1 if a.monoid == "argmax" else a.identity
            held[a.name] = torch.full(shape, fill, dtype=torch.float64)
        best = {a.name: torch.full((B, H, LQ), -math.inf, dtype=torch.float64) for a in accumulators}
        for first in range(0, LK, chunk):
            keys = torch.arange(first, min(first + chunk, LK))
            at = Region(torch.arange(B), torch.arange(H), torch.arange(LQ), keys)
            raw = raw_all[..., keys]
            seen = seen_all[..., keys]
            score = run(stage.branch.score, at, s=raw).expand(raw.shape)
            score = torch.where(seen, score, -math.inf)
            inputs = {"s": score, "raw": raw}
            if found.shift is not None:
                if number == 0:
                    old = held[found.shift]
                    new = torch.maximum(old, score.amax(-1))
                    held[found.shift] = new
                    base = torch.where(new == -math.inf, 0.0, new)
                    step = torch.exp(old - base)
                else:
                    base, step = run(found.settled, at)[..., 0], torch.ones(B, H, LQ, dtype=torch.float64)
                inputs[SHIFTED.name] = torch.exp(score - base[..., None])
            for a in accumulators:
                if a.name == found.shift:
                    continue
                value = run(a.value, at, **inputs).expand(raw.shape)
                if not a.vanishes:
                    value = torch.where(seen & (score != -math.inf), value, a.identity)
                elif a.monoid == "sum":
                    assert not bool(value[~seen].any())
                total = held[a.name]
                if a.power:
                    factor = step**a.power
                    total = total * (factor[..., None] if a.rows else factor)
                if a.over == "q":
                    part = value.sum(-2) if a.monoid == "sum" else value.amax(-2)
                    total = total.clone()
                    total[..., keys] = total[..., keys] + part if a.monoid == "sum" else part
                elif a.rows is not None:
                    total = total + value @ env.operands["v"][..., keys, :]
                elif a.monoid == "sum":
                    total = total + value.sum(-1)
                elif a.monoid == "argmax":
                    top, where = value.max(-1)
                    total = torch.where(top > best[a.name], keys[where].double(), total)
                    best[a.name] = torch.maximum(best[a.name], top)
                else:
                    total = torch.maximum(total, value.amax(-1)) if a.monoid == "max" else total.minimum(value.amin(-1))
                held[a.name] = total
        running = set()
    at = Region(torch.arange(B), torch.arange(H), torch.arange(LQ), torch.arange(1))
    out = {}
    for made in found.outputs:
        if made.column is not None:
            out[made.name] = torch.where(torch.isinf(held[made.column]), made.empty, held[made.column])
            continue
        value = run(made.value, at).expand(B, H, LQ, 1)
        out[made.name] = held[made.rows] * value if made.rows is not None else value[..., 0]
    return out


@pytest.mark.parametrize("mask", [TRUE, all_of(op("ge", q, k), op("ne", op("mod", q, 5), 0))], ids=["all", "causal"])
@pytest.mark.parametrize("name", CASES)
def test_streams_are_what_stages_mean(name: str, mask: object) -> None:
    found, env = masked(CASES[name], mask), given()
    want = attend_region(found, env, region(), 1.0)
    for chunk in (7, 64):
        got = stream(streaming(found), found, env, chunk)
        for out in found.outputs:
            expected = finish(out, want[out.name]).double()
            torch.testing.assert_close(got[out.name], expected, atol=1e-9, rtol=1e-9, msg=f"{name} {out.name}")


BARE = Normalizer("bare", (Stat("m", "max", s),), op("exp", op("sub", s, stat("m"))))
HALVES = [
    Output("column", WEIGHT, over="q"),
    Output("column", WEIGHT, over="q", monoid="max", empty=-1.0),
    Output("least", op("mul", WEIGHT, 0.5), monoid="min"),
]


@pytest.mark.parametrize("out", HALVES, ids=["sum", "max", "least"])
def test_what_cannot_move_with_the_maximum_waits_for_it(out: Output) -> None:
    found, env = stage(BARE, outputs=(out,)), given()
    want = finish(out, attend_region(found, env, region(), 1.0)[out.name])
    assert len(streaming(found).passes) == 2
    torch.testing.assert_close(stream(streaming(found), found, env, 7)[out.name], want, atol=1e-9, rtol=1e-9)


def test_softmax_is_two_sums_in_one_pass() -> None:
    found = streaming(Attend())
    ((top, mass, rows),) = found.passes
    assert found.shift == top.name and top.monoid == "max"
    assert mass.value is SHIFTED and rows.value is SHIFTED and rows.rows is not None
    assert mass.power == rows.power == 1 and mass.vanishes and rows.vanishes


@pytest.mark.parametrize(
    "name, passes",
    [
        ("sink", 1),
        ("sigmoid", 1),
        ("relu2_sum", 1),
        ("cog", 1),
        ("gate", 1),
        ("dropout", 1),
        ("entropy", 1),
        ("distance", 1),
        ("participation", 1),
        ("peak", 2),
        ("cut", 2),
        ("columns", 2),
        ("sigmoid_columns", 1),
        ("renormalised", 2),
    ],
)
def test_number_of_passes(name: str, passes: int) -> None:
    assert len(streaming(CASES[name]).passes) == passes


def test_elementwise_normalisers_have_no_shift() -> None:
    for name in ("sigmoid", "relu", "relu2_sum", "decay"):
        assert streaming(CASES[name]).shift is None


def test_equal_pair_parts_are_accumulated_once() -> None:
    found = streaming(CASES["entropy"])
    values = [(a.value, a.rows is None) for a in found.accumulators]
    assert len(values) == len(set(values)) == 4


def test_what_no_row_accumulates_says_so() -> None:
    root = Normalizer("sparsemax", (Stat("t", "root", op("max", op("sub", RELU, stat("t")), 0.0), RELU),), RELU)
    with pytest.raises(Unstreamable, match="iteration"):
        streaming(stage(root))
    buckets = Output("mass", RELU, key=(op("mod", k, 3),), extents=(op("add", k, 0),))
    with pytest.raises(Unstreamable, match="output mass"):
        streaming(stage(SOFTMAX, outputs=(buckets,)))
