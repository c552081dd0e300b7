"""Gradients of the generated Triton backward kernels, interpreted, against autograd through the float64 reference."""

from __future__ import annotations

import functools

import pytest
import torch
from backward import cases, scores
from backward.cases import CAUSAL, LEARNABLE, N, bias, learnable, make_call

from attnlang.ir import FLOAT, INT, Load, ScalarParam, Size, TensorParam, simple
from attnlang.ir.build import TRUE, all_of, b, h, k, op, param, q, s
from attnlang.runtime import triton as forward_pass
from attnlang.runtime import triton_backward
from attnlang.runtime.errors import Unavailable

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

both = functools.partial(cases.both, forward=forward_pass.forward, backward=triton_backward.backward)
check = functools.partial(cases.check, forward=forward_pass.forward, backward=triton_backward.backward)

WINDOW = op("le", op("abs", op("sub", q, k)), 20)
BUCKET = Load("bucket", (q, k), INT)


@pytest.mark.parametrize("program, dims", LEARNABLE)
def test_learnable_captures(program, dims):
    tensors = {"t": torch.rand(dims) + 0.5} if program.tensors else {}
    batch = 2 if any(dim == Size("B") for t in program.tensors for dim in t.shape) else 1
    check(make_call(program, (batch, 4, 2, 37, 45, 16, 16), tensors))


FULL_TILES = [
    learnable("relative", op("add", s, bias(h, op("add", op("sub", q, k), N))), ("H", "n"), (2, 2 * N), mask=TRUE),
    learnable("sum", op("add", s, bias(op("add", q, k))), ("n",), (N,), mask=TRUE),
    learnable("short_table", op("mul", s, bias(op("mul", op("sub", k, q), 2))), ("n",), (7,), mask=TRUE),
    learnable("rows_and_columns", op("mul", op("add", s, bias(q)), bias(k)), ("n",), (N,), mask=TRUE),
    learnable("pair", op("mul", s, bias(q, k)), ("m", "n"), (N, N), mask=TRUE),
    learnable("head", op("add", s, op("mul", bias(h), op("sub", k, q))), ("H",), (2,), mask=TRUE),
    learnable("coarse", op("mul", s, bias(h, q, op("floordiv", k, 8))), ("H", "m", "n"), (2, N, 19), mask=TRUE),
]


@pytest.mark.parametrize("program, dims", FULL_TILES)
def test_captures_in_full_tiles(program, dims):
    """Both lengths cut a tile, so rows and keys beyond the end must add nothing."""
    check(make_call(program, (1, 2, 2, 41, 75, 16, 16), {"t": torch.rand(dims) * 0.5 + 0.5}))


@pytest.mark.parametrize("lq, lk", [(1, 1), (7, 70), (64, 64), (33, 65), (50, 1), (17, 31)])
def test_lengths(lq, lk):
    check(make_call(simple("window", mask=WINDOW), (1, 2, 2, lq, lk, 16, 16), {}))


@pytest.mark.parametrize("d, dv", [(1, 8), (24, 40), (64, 16)])
def test_head_dims(d, dv):
    check(make_call(simple("causal", mask=CAUSAL), (1, 2, 1, 40, 40, d, dv), {}))


@pytest.mark.parametrize("batch, heads, kv_heads", [(1, 1, 1), (2, 6, 2), (1, 3, 3)])
def test_head_groups(batch, heads, kv_heads):
    """Masks of their own for each head, keys shared by a group."""
    mask = op("le", op("sub", q, k), op("mul", op("add", h, b), 9))
    check(make_call(simple("heads", mask=mask), (batch, heads, kv_heads, 50, 50, 16, 16), {}))


def test_full_attention_without_a_score():
    check(make_call(simple("full"), (1, 2, 2, 40, 70, 16, 16), {}))


@pytest.mark.parametrize("index", [(), (q,), (k,), (h,)])
def test_scores_that_ignore_the_product(index):
    program = simple("ignore", score=op("exp", bias(*index)), tensors=cases.tensor(*("n" for _ in index)))
    check(make_call(program, (1, 2, 2, 40, 70, 16, 16), {"t": torch.rand((80,) * len(index))}))


def test_softcap():
    score = op("mul", op("tanh", op("div", s, 5.0)), 5.0)
    check(make_call(simple("softcap", mask=CAUSAL, score=score), (1, 2, 2, 50, 50, 16, 16), {}))


def test_strides_and_documents():
    doc = torch.randint(4, (90,)).sort().values
    same = op("eq", Load("doc", (q,), INT), Load("doc", (k,), INT))
    program = simple("doc", mask=all_of(same, CAUSAL), tensors=(TensorParam("doc", INT, (Size("Lq"),)),))
    check(make_call(program, (2, 2, 2, 90, 90, 16, 16), {"doc": doc}, strided=True))


def test_rows_without_keys_have_zero_gradients():
    program = simple("late", mask=op("ge", q, 30), score=op("div", s, op("sub", op("to_float", q), 3)))
    call = make_call(program, (1, 2, 2, 60, 50, 16, 16), {})
    ours, _ = both(call)
    assert (ours["q"][:, :, :30] == 0).all()
    check(call)


def test_names_of_the_template_are_free_for_programs():
    names = ("dq", "delta", "p", "do")
    score = s
    for name in names:
        score = op("add", score, Load(name, (q,), FLOAT))
    score = op("mul", score, param("base", FLOAT))
    program = simple(
        "names",
        mask=CAUSAL,
        score=score,
        scalars=(ScalarParam("base", FLOAT),),
        tensors=tuple(TensorParam(name, FLOAT, (Size("ds"),)) for name in names),
    )
    call = make_call(program, (1, 1, 1, 40, 40, 16, 16), {n: torch.rand(40) for n in names}, params={"base": 0.7})
    check(call)


def test_gradient_of_the_lse_alone():
    call = make_call(simple("causal", mask=CAUSAL), (1, 2, 2, 40, 40, 16, 16), {})
    o, lse = forward_pass.forward(call)
    got = triton_backward.backward(call, o, lse, torch.zeros_like(o), torch.ones_like(lse), ())
    assert (got.v == 0).all()
    assert got.q.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_dense(dtype):
    call = make_call(simple("causal", mask=CAUSAL), (1, 1, 1, 70, 70, 32, 32), {}, dtype)
    ours, want = both(call)
    eps = torch.finfo(dtype).eps
    for name, reference in want.items():
        error = (ours[name] - reference).abs().max() / reference.abs().max()
        assert error < 2 * eps, (name, error)


@pytest.mark.parametrize("program, dims", LEARNABLE[:1] + LEARNABLE[5:6])
def test_gradients_are_the_same_bits_in_every_run(program, dims):
    call = make_call(program, (1, 4, 1, 50, 50, 16, 16), {"t": torch.rand(dims)})
    o, lse = forward_pass.forward(call)
    do = torch.randn_like(o)
    runs = [triton_backward.backward(call, o, lse, do, None, ("t",)) for _ in range(3)]
    for other in runs[1:]:
        pairs = [(runs[0].q, other.q), (runs[0].k, other.k), (runs[0].v, other.v)]
        pairs.append((runs[0].captured["t"], other.captured["t"]))
        assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("seed", range(4))
def test_random_scores(seed):
    """Eight random scores a kernel, one a head."""
    found = scores.batch(seed, 8, 37, 45, scatters=False)
    scores.check(found, forward_pass.forward, triton_backward.backward)


def test_logarithms_of_hidden_scores_stay_away():
    check(cases.logarithm_call(40))


def bucketed(combine):
    """t[bucket[q, k]] added to the score or multiplied with it."""
    tensors = (TensorParam("t", FLOAT, (Size("n"),)), TensorParam("bucket", INT, (Size("Lq"), Size("Lk"))))
    program = simple("bucketed", mask=CAUSAL, score=op(combine, s, bias(BUCKET)), tensors=tensors)
    captured = {"t": torch.rand(5), "bucket": torch.randint(5, (40, 40))}
    return make_call(program, (1, 2, 2, 40, 40, 16, 16), captured)


def test_a_term_read_through_any_map_has_integer_sums():
    call = bucketed("add")
    check(call)
    o, lse = forward_pass.forward(call)
    huge = triton_backward.backward(call, o, lse, torch.full_like(o, 1e30), None, ("t",)).captured["t"]
    assert torch.isfinite(huge).all()
    broken = triton_backward.backward(call, o, lse, torch.full_like(o, torch.nan), None, ("t",)).captured["t"]
    assert broken.isnan().all()


def test_a_factor_read_through_any_map_is_refused_by_default():
    with pytest.raises(Unavailable, match="gradient of t"):
        both(bucketed("mul"))


def test_a_factor_read_through_any_map_is_served_by_atomic_additions_where_allowed():
    backward = functools.partial(triton_backward.backward, deterministic=False)
    cases.check(bucketed("mul"), forward_pass.forward, backward)


def test_a_clamped_pair_bias_is_refused_by_default():
    call = make_call(LEARNABLE[8].values[0], (1, 2, 2, 40, 40, 16, 16), {"t": torch.rand(20, 40)})
    with pytest.raises(Unavailable, match="gradient of t"):
        both(call)
