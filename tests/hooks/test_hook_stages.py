"""Branches, groups, stages, positions and lengths from Python: the same records, results and gradients as from text."""

import pytest
import torch

import attnlang as al
from attnlang import mean_d

torch.manual_seed(0)
B, H, HKV, LQ, LK, D = 2, 4, 2, 12, 16, 8
gate, cos, sin = torch.rand(H), torch.rand(LK, D), torch.rand(LK, D)
page = torch.stack([torch.randperm(4) for _ in range(B)])
other = torch.randn(B, 1, 6, D)
CAPTURED = {"gate": gate, "cos": cos, "sin": sin, "page": page, "other": other}


def moba(block, count):
    def blocks(Lk):
        return (Lk + block - 1) // block

    return al.program(
        mask=lambda b, h, q, k, chosen: chosen[b, h, q, k // block] & (k <= q),
        stages={
            "mean_key": al.pool("K", "mean", block=lambda: block),
            "gate": al.attend(
                lengths=("Lq", blocks), keys="mean_key", outputs={"liking": al.output(lambda s: s, over="")}
            ),
            "chosen": al.select(
                ("Lq", blocks),
                lambda b, h, q, k, liking: liking[b, h, q, k],
                top=lambda: count,
                candidates=lambda q, k: k * block <= q,
                forced=lambda q, k: q // block == k,
            ),
        },
    )


def turned(b, h, q, d, Q, D):
    half = D // 2
    return Q[b, h, q, d] * cos[q, d] + sin[q, d] * torch.where(d >= half, Q[b, h, q, d - half], -Q[b, h, q, d + half])


def decode(start):
    return al.program(mask=lambda q, k: k <= q, position={"q": lambda q: q + start})


SAME = {
    "branches": (
        "pattern p(gate: float[H]):\n"
        "    branch near:\n        mask = abs(q - k) < 4\n"
        "    branch far:\n        mask = abs(q - k) >= 4\n"
        "        normalize = elementwise(sigmoid(s), divisor=count)\n"
        "        output far_mass = sum(w, over=k)\n"
        "    output o_near = sum(w * V, over=k, branch=near)\n"
        "    output o_far = sum(w * V, over=k, branch=far)\n"
        "    rows o[Lq, Dv] = gate[h] * o_near[b, h, q, d] + (1 - gate[h]) * o_far[b, h, q, d]\n"
        "    return o, far_mass",
        lambda: al.program(
            branches={
                "near": al.branch(lambda q, k: (q - k).abs() < 4),
                "far": al.branch(
                    lambda q, k: (q - k).abs() >= 4,
                    normalize=al.elementwise(lambda s: torch.sigmoid(s), divisor="count"),
                ),
            },
            outputs={
                "far_mass": al.output(lambda w: w, branch="far"),
                "o_near": al.output(lambda w: w, rows="V", branch="near"),
                "o_far": al.output(lambda w: w, rows="V", branch="far"),
            },
            stages={
                "o": al.rows(
                    ("Lq", "Dv"),
                    lambda b, h, q, d, o_near, o_far: gate[h] * o_near[b, h, q, d] + (1 - gate[h]) * o_far[b, h, q, d],
                )
            },
            returns=("o", "far_mass"),
        ),
    ),
    "branches start from the stage": (
        "pattern p(gate: float[H]):\n    mask = k <= q + 4\n    score = s + gate[h]\n    weights = w * 2\n"
        "    branch one: score = s\n    branch two: mask = k > q\n"
        "    output a = sum(w * V, over=k, branch=one)\n    output b2 = sum(w, over=q, branch=two)",
        lambda: al.program(
            lambda q, k: k <= q + 4,
            lambda s, h: s + gate[h],
            weights=lambda w: w * 2.0,
            branches={"one": al.branch(score=lambda s: s), "two": al.branch(lambda q, k: k > q)},
            outputs={
                "a": al.output(lambda w: w, rows="V", branch="one"),
                "b2": al.output(lambda w: w, over="q", branch="two"),
            },
        ),
    ),
    "groups": (
        "pattern landmark:\n    group = k // 4\n    groups = cdiv(Lk, 4)\n    normalize:\n        stat m = max(s)\n"
        "        stat all = sum(exp(s - m))\n        stat own = sum(exp(s - m), by=group)\n"
        "        weight = exp(s - m) / own * (own / all)\n    output shares = own / all",
        lambda: al.program(
            group=lambda k: k // 4,
            groups="cdiv(Lk, 4)",
            normalize=al.normalizer(
                {
                    "m": al.stat("max", lambda s: s),
                    "all": al.stat("sum", lambda s, m: torch.exp(s - m)),
                    "own": al.stat("sum", lambda s, m: torch.exp(s - m), by="group"),
                },
                weight=lambda s, m, own, all: torch.exp(s - m) / own * (own / all),
            ),
            outputs={"shares": al.output(lambda own, all: own / all, over="")},
        ),
    ),
    "blocks of keys chosen": (
        "pattern moba:\n    pool mean_key = mean(K, block=4)\n    attend gate:\n"
        "        lengths = (Lq, cdiv(Lk, 4))\n        keys = mean_key\n        output liking = s\n"
        "    select chosen[Lq, cdiv(Lk, 4)] = "
        "top(liking[b, h, q, k], 2, candidates=k * 4 <= q, forced=q // 4 == k)\n"
        "    mask = chosen[b, h, q, k // 4] and k <= q",
        lambda: al.program(
            mask=lambda b, h, q, k, chosen: chosen[b, h, q, k // 4] & (k <= q),
            stages={
                "mean_key": al.pool("K", "mean", block=4),
                "gate": al.attend(
                    lengths=("Lq", "cdiv(Lk, 4)"), keys="mean_key", outputs={"liking": al.output(lambda s: s, over="")}
                ),
                "chosen": al.select(
                    ("Lq", "cdiv(Lk, 4)"),
                    lambda b, h, q, k, liking: liking[b, h, q, k],
                    top=2,
                    candidates=lambda q, k: k * 4 <= q,
                    forced=lambda q, k: q // 4 == k,
                ),
            },
        ),
    ),
    "threshold of elements": (
        "pattern p(gate: float[H]):\n    pool last = last(V, block=4, stride=2)\n"
        "    select chosen[B, H, Lq, Lk] = threshold(Q[b, h, q, 0] * K[b, h // 2, k, 1], gate[h])\n"
        "    mask = chosen[b, h, q, k] or k == 0\n    score = s + last[b, h // 2, k // 2, 0] / Lk\n"
        "    output o = sum(w * V, over=k)\n"
        "    output pooled = sum(w * last[b, h // 2, k // 2], over=k)",
        lambda: al.program(
            lambda b, h, i, j, chosen: chosen[b, h, i, j] | (j == 0),
            lambda s, b, h, i, j, last, Lk: s + last[b, h // 2, j // 2, 0] / Lk,
            outputs={
                "o": al.output(lambda w: w, rows="V"),
                "pooled": al.output(lambda w: w, rows=lambda b, h, k, last: last[b, h // 2, k // 2]),
            },
            stages={
                "last": al.pool("V", "last", block=4, stride=2),
                "chosen": al.select(
                    ("B", "H", "Lq", "Lk"),
                    lambda b, h, q, k, Q, K: Q[b, h, q, 0] * K[b, h // 2, k, 1],
                    threshold=lambda h: gate[h],
                ),
            },
        ),
    ),
    "turned queries": (
        "pattern rope(cos: float[N, F], sin: float[N, F]):\n    let half = D // 2\n"
        "    rows turned[Lq, D] = Q[b, h, q, d] * cos[q, d]"
        " + sin[q, d] * (Q[b, h, q, d - half] if d >= half else -Q[b, h, q, d + half])\n"
        "    queries = turned\n    mask = k <= q",
        lambda: al.program(
            mask=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
            queries="turned",
            stages={"turned": al.rows(("Lq", "D"), turned)},
        ),
    ),
    "normed output": (
        "pattern p(gate: float[H]):\n    attend inner:\n        mask = k <= q\n"
        "    rows o[Lq, Dv] = (inner[b, h, q, d] - sum_d(inner[b, h, q, d]) / Dv)"
        " * rsqrt(mean_d(inner[b, h, q, d] ** 2) + 1e-6) * gate[h] / max_d(abs(inner[b, h, q, d]))\n"
        "    return o, inner_lse",
        lambda: al.program(
            stages={
                "inner": al.attend(lambda q, k: k <= q),
                "o": al.rows(
                    ("Lq", "Dv"),
                    lambda b, h, q, d, inner, Dv: (
                        (inner[b, h, q, d] - al.sum_d(inner[b, h, q, d]) / Dv)
                        * torch.rsqrt(al.mean_d(inner[b, h, q, d] ** 2) + 1e-6)
                        * gate[h]
                        / al.max_d(inner[b, h, q, d].abs())
                    ),
                ),
            },
            returns=("o", "inner_lse"),
        ),
    ),
    "position of a query": (
        "pattern decode(start: int):\n    position q = q + start\n    mask = k <= q",
        lambda: decode(4),
    ),
    "pages": (
        "pattern paged(page: int[B, P]):\n    let row = page[b, k // 4] * 4 + k % 4\n"
        "    keys = K[b, 0, row]\n    values = V[b, 0, row]\n    position k = k + 1\n    mask = k <= q",
        lambda: al.program(
            mask=lambda q, k: k <= q,
            keys=lambda b, k, K: K[b, 0, page[b, k // 4] * 4 + k % 4],
            values=(lambda b: b, 0, lambda b, k: page[b, k // 4] * 4 + k % 4),
            position={"k": lambda k: k + 1},
        ),
    ),
    "other rows and lengths": (
        "pattern p(other: float[N, 1, M, D]):\n    lengths = (Lq, 6)\n    keys = other[b, 0, k]\n"
        "    values = other[b, 0, k]\n    output back = sum(w * Q, over=q)",
        lambda: al.program(
            lengths=("Lq", 6),
            keys=lambda b, k: other[b, 0, k],
            values=lambda b, k: other[b, 0, k],
            outputs={"back": al.output(lambda w: w, over="q", rows="Q")},
        ),
    ),
    "output summed over replaced values": (
        "pattern p:\n    values = V[b, 0, k]\n    output halved = sum(w / 2 * V, over=k)",
        lambda: al.program(
            values=lambda b, k, V: V[b, 0, k],
            outputs={"halved": al.output(lambda w: w / 2.0, rows="V")},
        ),
    ),
}
EQUAL = [n for n in SAME if n not in ("turned queries", "normed output", "position of a query", "pages")]
"""Those in which Python adds nothing: no index that may be negative, square or lifted number."""


def measured(function, named, scalars):
    """All results by name, and the gradients of a fixed function of them in q, k, v and what was captured."""
    given = torch.Generator().manual_seed(1)
    shapes = ((B, H, LQ, D), (B, HKV, LK, D), (B, HKV, LK, D))
    leaves = [torch.randn(x, generator=given, dtype=torch.float64).requires_grad_() for x in shapes]
    captured = {n: t.double().requires_grad_() if t.is_floating_point() else t for n, t in named.items()}
    found = function(*leaves, return_aux=True, **captured, **scalars)
    aux = found if isinstance(found, dict) else found[1] | {"o": found[0]}
    weights = {n: torch.rand(t.shape, generator=given, dtype=torch.float64) for n, t in sorted(aux.items())}
    loss = sum((t.masked_fill(t.isinf(), 0) * weights[n]).sum() for n, t in aux.items() if t.requires_grad)
    wanted = {"q": leaves[0], "k": leaves[1], "v": leaves[2]}
    wanted |= {n: t for n, t in captured.items() if t.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return {n: t.detach() for n, t in aux.items()} | {f"grad {n}": g for n, g in zip(wanted, grads, strict=True)}


@pytest.mark.parametrize("name", SAME)
def test_python_text_and_reference_agree(name):
    text, make = SAME[name]
    stated, traced = al.parse(text), make()
    assert stated.results == traced.program.results
    assert {t.name for t in stated.tensors} == set(traced.tensors)
    named = {t.name: CAPTURED[t.name] for t in stated.tensors}
    want = measured(lambda *x, **n: al.reference(stated, *x, **n), named, {p.name: 4 for p in stated.scalars})
    found = measured(lambda *x, **n: al.compile(traced)(*x, backend="eager", **n), named, {})
    torch.testing.assert_close(found, want, equal_nan=True)


@pytest.mark.parametrize("name", EQUAL)
def test_the_stages_are_equal(name):
    text, make = SAME[name]
    stated, traced = al.parse(text), make().program
    assert (traced.stages, traced.returns) == (stated.stages, stated.returns)


@pytest.mark.parametrize("name", ["branches", "turned queries"])
def test_kernels_run_them(name, unoptimised):
    text, make = SAME[name]
    stated, traced = al.parse(text), make()
    named = {t.name: CAPTURED[t.name] for t in stated.tensors}
    want = measured(lambda *x, **n: al.reference(stated, *x, **n), named, {})

    def kernel(*leaves, **given):
        floats = [t.float() for t in leaves]
        captured = {
            n: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in given.items()
        }
        return al.compile(traced)(*floats, backend="cpp", **captured)

    found = measured(kernel, named, {})
    torch.testing.assert_close({n: t.double() for n, t in found.items()}, want, atol=2e-5, rtol=2e-5)


def test_a_number_is_one_parameter_in_sizes_and_functions():
    traced = moba(4, 2)
    assert traced.scalars == {"block": 4, "count": 2}
    attention = al.compile(traced)
    q, k, v = (torch.randn(B, n, length, D, dtype=torch.float64) for n, length in ((H, LQ), (HKV, LK), (HKV, LK)))
    found = attention(q, k, v, backend="eager", block=3, count=1)
    torch.testing.assert_close(found, al.compile(moba(3, 1))(q, k, v, backend="eager"))
    torch.testing.assert_close(found, al.reference(attention, q, k, v, block=3, count=1))


def test_reductions_imported_by_name_leave_numbers_parameters():
    def normed(eps):
        def o(b, h, q, d, inner):
            return inner[b, h, q, d] * torch.rsqrt(mean_d(inner[b, h, q, d] ** 2) + eps)

        return al.program(stages={"inner": al.attend(), "o": al.rows(("Lq", "Dv"), o)})

    assert normed(0.5).scalars == {"eps": 0.5}


def test_names_of_stages_are_not_given_to_captured_tensors():
    inner = torch.rand(H)
    table = {"x": inner}
    traced = al.program(
        lambda q, k: k <= q,
        lambda s, h: s * inner[h],
        stages={"inner": al.rows(("Lq", "D"), lambda b, h, q, d, Q: Q[b, h, q, d] * 2.0)},
        queries="inner",
    )
    assert list(traced.tensors) == ["inner_1"] and traced.tensors["inner_1"] is table["x"]


def test_negative_indices_count_from_the_end():
    traced = al.program(
        values="last",
        stages={"last": al.rows(("Lk", "Dv"), lambda b, h, q, d, V: V[b, h // 2, q - 1, -d - 1])},
    )
    q, k, v = (torch.randn(B, n, length, D, dtype=torch.float64) for n, length in ((H, LQ), (HKV, LK), (HKV, LK)))
    moved = v.roll(1, 2).flip(3)
    want = al.reference(al.program(), q, k, moved)
    torch.testing.assert_close(al.compile(traced)(q, k, v, backend="eager"), want)


def test_masks_read_by_position_or_by_name():
    want = al.parse("pattern p: mask = q + h < k + Lk").attend.branch.mask
    add = 3
    for mask in (
        lambda b, h, q, k, Lk: q + h < k + Lk,
        lambda B, H, i, j, Lk: i + H < j + Lk,
        lambda batch, head, q_idx, kv_idx, Lk: q_idx + head < kv_idx + Lk,
        lambda Lk, h, q, k: q + h < k + Lk,
        lambda h, q, k, Lk: q + h < k + Lk,
        lambda b, h, k, Lk, q: q + h < k + Lk,
    ):
        assert al.program(mask).program.attend.branch.mask == want
    captured = al.program(lambda q, k, by=add, twice=2: q + by < k * twice)
    assert captured.scalars == {"by": 3, "twice": 2}


def test_the_main_stage_runs_where_it_is_first_read():
    traced = al.program(
        lambda q, k: k <= q,
        stages={
            "before": al.pool("V", "max", block=2),
            "after": al.rows(("Lq", "Dv"), lambda b, h, q, d, o, before: o[b, h, q, d] + before[b, h // 2, q, d]),
        },
    )
    assert [s.name for s in traced.program.stages] == ["before", "attend", "after"]


SHAPE = ("Lq", "Dv")
MISTAKES = {
    "unknown tensor": (
        lambda: al.program(
            lambda b, h, q, k, chosn: chosn[b, h, q, k],
            stages={"chosen": al.select(("Lq", "Lk"), lambda q, k: q - k, top=3)},
        ),
        "mask_mod reads 'chosn'; did you mean 'chosen'?",
    ),
    "later stage": (
        lambda: al.program(
            stages={"a": al.rows(SHAPE, lambda b, h, q, d, c: c[b, h, q, d]), "c": al.rows(SHAPE, lambda d: d)}
        ),
        "stage 'c' makes it, and has not run at that point",
    ),
    "its own result": (
        lambda: al.program(stages={"a": al.rows(SHAPE, lambda b, h, q, d, a: a[b, h, q, d])}),
        "stage 'a' makes it",
    ),
    "stage for output": (
        lambda: al.program(
            stages={
                "gate": al.attend(outputs={"liking": al.output(lambda s: s, over="")}),
                "o": al.rows(SHAPE, lambda b, h, q, d, gate: gate[b, h, q, d]),
            }
        ),
        "that is a stage, which makes liking",
    ),
    "too few indices": (
        lambda: al.program(stages={"a": al.rows(SHAPE, lambda b, h, q, d, Q: Q[b, h, q])}),
        "for example Q[b, h, q, d]",
    ),
    "too many indices": (
        lambda: al.program(stages={"a": al.rows(SHAPE, lambda b, h, q, d, Q: Q[b, h, q, d, d])}),
        "5 indices for Q, which has 4 dimension(s)",
    ),
    "used whole": (
        lambda: al.program(stages={"a": al.rows(SHAPE, lambda b, h, Q: Q[b, h] * 2)}),
        "Q has 2 dimension(s) without an index",
    ),
    "whole in torch": (
        lambda: al.program(stages={"a": al.rows(SHAPE, lambda b, Q: torch.exp(Q[b]))}),
        "Q has 3 dimension(s) without an index",
    ),
    "slice": (lambda: al.program(stages={"a": al.rows(SHAPE, lambda b, Q: Q[b, :])}), "indexed with a slice"),
    "float index": (
        lambda: al.program(stages={"a": al.rows(SHAPE, lambda b, h, q, d, Q: Q[b, h, q * 0.5, d])}),
        "indexed with a float value",
    ),
    "shape": (
        lambda: al.program(stages={"a": al.rows(SHAPE, lambda b, Q: Q.shape[2])}),
        "a length is a parameter of the function",
    ),
    "elements in a mask": (lambda: al.program(lambda b, h, q, k, Q: Q[b, h, q, k] > 0), "rows(...) and select(...)"),
    "mean of a score": (lambda: al.program(score=lambda s: mean_d(s)), "the features of a row"),
    "mean of a row": (
        lambda: al.program(stages={"a": al.rows(SHAPE, lambda b, h, q, Q: mean_d(Q[b, h, q]))}),
        "Q has 1 dimension(s) without an index",
    ),
    "mean outside": (lambda: mean_d(3.0), "mean_d of a float"),
    "no outputs": (lambda: al.program(branches={"a": al.branch()}), "has no output"),
    "output of no branch": (
        lambda: al.program(branches={"a": al.branch()}, outputs={"x": al.output(lambda w: w)}),
        "does not say which branch it reads; add it, such as output(..., branch='a')",
    ),
    "output of an unknown branch": (
        lambda: al.program(branches={"near": al.branch()}, outputs={"x": al.output(lambda w: w, branch="naer")}),
        "did you mean 'near'?",
    ),
    "branch without branches": (
        lambda: al.program(outputs={"x": al.output(lambda w: w, branch="near")}),
        "the stage has no branches",
    ),
    "function as a branch": (lambda: al.program(branches={"a": lambda q: q}), "make it with branch(...)"),
    "group without groups": (lambda: al.program(group=lambda k: k // 4), "group is given without groups"),
    "groups without group": (lambda: al.program(groups=4), "groups is given without group"),
    "by group without groups": (
        lambda: al.program(normalize=al.normalizer({"a": al.stat("sum", lambda s: s, by="group")}, lambda a: a)),
        "there are no groups; give group=",
    ),
    "by head": (lambda: al.stat("sum", lambda s: s, by="head"), "by='head'"),
    "root by group": (lambda: al.stat("root", lambda s: s, seed=0.0, by="group"), "cannot be by group"),
    "returns": (lambda: al.program(returns="lsee"), "did you mean 'lse'?"),
    "returned twice": (lambda: al.program(returns=("o", "o")), "'o' twice"),
    "stage called q": (lambda: al.program(stages={"q": al.pool("K", block=4)}), "can be called 'q'"),
    "one name twice": (
        lambda: al.program(lambda q, k: k <= q, stages={"o": al.pool("K", block=4)}),
        "two stages make 'o'",
    ),
    "no stage": (lambda: al.program(stages={"x": 3}), "make it with attend(...)"),
    "a list of stages": (lambda: al.program(stages=[al.pool("K", block=4)]), "stages are a dict"),
    "empty block": (lambda: al.program(stages={"a": al.pool("K", block=0)}), "is at least 1, got 0"),
    "unknown pooling": (lambda: al.pool("K", "median", block=4), "'median'"),
    "unknown source": (lambda: al.program(stages={"a": al.pool("KK", block=4)}), "there is 'Q', 'K', 'V'"),
    "pooled choice": (
        lambda: al.program(
            stages={"c": al.select(("Lq", "Lk"), lambda q, k: q - k, mass=0.5), "a": al.pool("c", block=2)}
        ),
        "which holds bool values",
    ),
    "two rules": (lambda: al.select(("Lq", "Lk"), lambda q: q, top=3, mass=0.5), "one of top, threshold and mass"),
    "choice of none": (
        lambda: al.program(stages={"a": al.select(("Lq", "Lk"), lambda q, k: q - k, top=0)}),
        "is at least 1, got 0",
    ),
    "one dimension": (lambda: al.rows("Lq", lambda d: d), "a shape of 2 or 4 dimensions"),
    "position of b": (lambda: al.program(position={"b": lambda b: b}), "'b' has no position"),
    "position of the other": (lambda: al.program(position={"q": lambda k: k}), "position of q reads 'k'"),
    "another order": (lambda: al.program(lambda b, h, k, q: k <= q), "the order is (b, h, q, k)"),
    "one length": (lambda: al.program(lengths="Lq"), "lengths are two"),
    "unknown size": (lambda: al.program(lengths=("Lq", "Lkk")), "did you mean `Lk`?"),
    "size of a pair": (lambda: al.program(lengths=("Lq", lambda k: k)), "a size reads sizes"),
    "normalizer": (lambda: al.program(normalize="softmax"), "make it with softmax()"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_stages_are_explained(name):
    make, message = MISTAKES[name]
    with pytest.raises((al.UsageError, al.ProgramError)) as caught:
        make()
    assert message in str(caught.value)
