"""Python hooks: what the language and Python can both say is one program; mistakes are explained."""

import pytest
import torch

import attnlang as al

torch.manual_seed(0)
gate, table, ints = torch.rand(4), torch.randn(9, 8), torch.randint(0, 8, (16,))
row = torch.randn(8)

SAME = {
    "sink": (
        "pattern p(gate: float[H]):\n    mask = k <= q\n    normalize = softmax(sink=gate[h])",
        lambda: al.program(lambda b, h, q, k: k <= q, normalize=al.softmax(sink=lambda h: gate[h])),
    ),
    "off by one": (
        "pattern p: normalize = softmax(sink=0)",
        lambda: al.program(normalize=al.softmax(sink=0)),
    ),
    "elementwise": (
        "pattern p: normalize = elementwise(sigmoid(s), divisor=count)",
        lambda: al.program(normalize=al.elementwise(lambda s: torch.sigmoid(s), divisor="count")),
    ),
    "sparsemax": ("pattern p: normalize = sparsemax()", lambda: al.program(normalize=al.sparsemax())),
    "entmax": ("pattern p: normalize = entmax15()", lambda: al.program(normalize=al.entmax15())),
    "stated": (
        "pattern p(gate: float[H]):\n    normalize:\n        stat m = max(s, seed=gate[h])\n"
        "        stat l = sum(exp(s - m), seed=exp(gate[h] - m))\n        weight = exp(s - m) / l",
        lambda: al.program(
            normalize=al.normalizer(
                {
                    "m": al.stat("max", lambda s: s, seed=lambda h: gate[h]),
                    "l": al.stat("sum", lambda s, m: torch.exp(s - m), seed=lambda h, m: torch.exp(gate[h] - m)),
                },
                lambda s, m, l: torch.exp(s - m) / l,  # noqa: E741
            )
        ),
    ),
    "weights": (
        "pattern p(gate: float[H]):\n    weights = w * gate[h] if k < 4 else w",
        lambda: al.program(weights=lambda w, s, b, h, q, k: torch.where(k < 4, w * gate[h], w)),
    ),
    "outputs": (
        "pattern p(ints: int[Lk]):\n    output received = sum(w, over=q)\n"
        "    output entropy = sum(-w * log(w), over=k)\n"
        "    output mass = sum(w, over=k, key=ints[k], extent=8)\n"
        "    output blocks = max(s, over=(q, k), key=(q // 4, k // 4), extent=(cdiv(Lq, 4), cdiv(Lk, 4)), empty=-inf)\n"
        "    output best = argmax(w, over=k)\n    output top = m",
        lambda: al.program(
            outputs={
                "received": al.output(lambda w: w, "q"),
                "entropy": al.output(lambda w: -w * torch.log(w)),
                "mass": al.output(lambda w: w, key=lambda k: ints[k], extent=8),
                "blocks": al.output(
                    lambda s: s, "qk", monoid="max", key=(lambda q: q // 4, lambda k: k // 4),
                    extent=("cdiv(Lq, 4)", "cdiv(Lk, 4)"), empty=-float("inf"),
                ),
                "best": al.output(lambda w: w, monoid="argmax"),
                "top": al.output(lambda m: m, ""),
            }
        ),
    ),
    "terms": (
        "pattern p(table: float[9, D]):\n    term t = dot(Q, table[clamp(k - q + 4, 0, 8)])\n    score = s + t",
        lambda: al.program(
            score=lambda s, t: s + t,
            terms={"t": al.dot("Q", lambda q, k: table[(k - q + 4).clamp(0, 8)])},
        ),
    ),
    "additive": (
        "pattern p(row: float[D]):\n    term t = sum_d(row[d] * tanh(x + y), Q, K)\n    score = t",
        lambda: al.program(
            score=lambda t: t, terms={"t": al.sum_d(lambda x, y, d: row[d] * torch.tanh(x + y))}
        ),
    ),
    "addresses": (
        "pattern p(ints: int[Lk]):\n    keys = K[0, h // 2, ints[k]]\n    values = V[0, h // 2, ints[k]]",
        lambda: al.program(
            keys=(0, lambda h: h // 2, lambda k: ints[k]), values=(0, lambda h: h // 2, lambda k: ints[k])
        ),
    ),
    "no values": (
        "pattern p:\n    values = none\n    mask = k <= q\n    output x = max(s, over=q)",
        lambda: al.program(
            lambda b, h, i, j: j <= i, values="none", outputs={"x": al.output(lambda s: s, "q", monoid="max")}
        ),
    ),
    "rows": (
        "pattern p(table: float[9, F]):\n    output x = sum(w * table[clamp(k - q + 4, 0, 8)], over=k)",
        lambda: al.program(
            outputs={"x": al.output(lambda w: w, rows=lambda q, k: table[(k - q + 4).clamp(0, 8)])}
        ),
    ),
}  # fmt: skip


def operands(dtype=torch.float64):
    given = torch.Generator().manual_seed(1)
    return [torch.randn(2, heads, 16, 8, generator=given, dtype=dtype) for heads in (4, 2, 2)]


@pytest.mark.parametrize("name", SAME)
def test_python_and_text_are_one_program(name):
    text, make = SAME[name]
    stated, traced = al.parse(text), make()
    assert stated.results == traced.program.results
    names = {"gate": gate.double(), "table": table.double(), "ints": ints, "row": row.double()}
    given = {t.name: names[t.name] for t in stated.tensors}
    q, k, v = operands()
    # float32 tensors that functions closed over are given anew, in float64
    again = {t.name: names[t.name] for t in traced.program.tensors}
    a = al.compile(stated)(q, k, v, return_aux=True, backend="eager", **given)
    b = al.compile(traced)(q, k, v, return_aux=True, backend="eager", **again)
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["sink", "off by one", "sparsemax", "entmax", "stated", "addresses"])
def test_the_records_are_equal(name):
    text, make = SAME[name]
    assert make().program.stages == al.parse(text).stages


def test_dropout_draws_the_same_pairs_in_text_and_python():
    text = al.compile(al.parse("pattern p(share: float, seed: int): weights = dropout(w, share, seed)"))
    share, seed = 0.5, 7
    python = al.compile(al.program(weights=lambda w, b, h, q, k: al.dropout(w, share, seed, b, h, q, k)))
    q, k, v = operands()
    found = text(q, k, v, share=0.5, seed=7, backend="eager")
    torch.testing.assert_close(python(q, k, v, backend="eager"), found)
    assert not torch.allclose(text(q, k, v, share=0.5, seed=8, backend="eager"), found)


def test_random_numbers_are_even():
    counters = torch.arange(1000)
    drawn = al.random(3, counters[:, None], counters)
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, 16, 0, 1)
    assert (counts - 62500).abs().max() < 1500
    rows = drawn - drawn.mean()
    assert (rows[:-1] * rows[1:]).mean().abs() < 1e-3 and (rows[:, :-1] * rows[:, 1:]).mean().abs() < 1e-3


def test_numbers_become_parameters():
    low = 0.25
    program = al.program(weights=lambda w: torch.where(w > low, w, 0.0))
    assert program.scalars == {"low": 0.25}


MISTAKES = {
    "unknown input": (lambda: al.program(weights=lambda w, x: w * x), al.UsageError, "reads 'x'"),
    "key in a sink": (lambda: al.program(normalize=al.softmax(sink=lambda k: 1.0 * k)), al.UsageError, "reads 'k'"),
    "no function": (lambda: al.program(weights="w"), al.UsageError, "a function, a tensor or a number"),
    "monoid": (lambda: al.output(lambda w: w, monoid="mean"), al.UsageError, "'mean'"),
    "over": (lambda: al.output(lambda w: w, "h"), al.UsageError, "'h'"),
    "extents": (lambda: al.output(lambda w: w, key=lambda k: k), al.UsageError, "1 key(s) and 0 extent(s)"),
    "root": (lambda: al.stat("root", lambda s: s), al.UsageError, "needs a seed"),
    "stat": (lambda: al.normalizer({"m": 3}, lambda s: s), al.UsageError, "make it with stat"),
    "divisor": (lambda: al.elementwise(lambda s: s, divisor="mean"), al.UsageError, "'mean'"),
    "no row": (lambda: al.program(terms={"t": al.dot("Q", lambda k: table[k, 0])}), al.ProgramError, "return a row"),
    "operand": (lambda: al.program(terms={"t": al.dot("X")}), al.UsageError, "'X'"),
    "float key": (
        lambda: al.program(outputs={"x": al.output(lambda w: w, key=lambda k: k * 0.5, extent=3)}),
        al.ProgramError, "must be an int",
    ),
    "address": (lambda: al.program(keys=(0, lambda k: k)), al.UsageError, "three functions"),
    "no row of keys": (lambda: al.program(keys=lambda k: k), al.ProgramError, "must return a row"),
    "term called w": (lambda: al.program(terms={"w": al.dot()}), al.UsageError, "'w'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(name):
    make, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=None) as caught:
        make()
    assert message in str(caught.value)
