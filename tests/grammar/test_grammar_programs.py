"""Text to programs, checked against the same pattern written with torch."""

import re

import torch
from grammar_support import SIZES, axes, mask_of, score_of

from attnlang import ir
from attnlang.grammar import builtin_functions, parse
from attnlang.ir import build

CAUSAL = "pattern causal:\n    mask = k <= q\n"
WINDOW = "pattern sliding_window(window: int = 4):\n    mask = q - k < window\n"
SOFTCAP = "pattern softcap(cap: float = 30.0):\n    score = cap * tanh(s / cap)\n"
ALIBI = "pattern alibi(slope: float[H]):\n    score = s + slope[h] * (k - q)\n"
LIBRARY = CAUSAL + WINDOW + SOFTCAP + ALIBI


def value(expression, params="", **given):
    """The value of an int, float or bool expression of parameters, as a Python number."""
    program = parse(f"pattern p({params}):\n    score = float({expression})\n").default
    env = ir.Environment(params={p.name: p.default for p in program.scalars} | given)
    return ir.evaluate(program.score, env).item()


def test_longformer():
    program = parse(
        "pattern longformer(window: int = 3, globals: bool[Lk]):\n"
        '    """Sliding window plus global tokens."""\n'
        "    let d = q - k\n"
        "    mask = abs(d) <= window or globals[q] or globals[k]\n"
    ).default
    assert program.name == "longformer" and program.doc == "Sliding window plus global tokens."
    assert program.scalars == (ir.ScalarParam("window", ir.INT, 3),)
    assert program.tensors == (ir.TensorParam("globals", ir.BOOL, (ir.Size("Lk"),)),)
    chosen = torch.arange(SIZES["Lk"]) % 7 == 0
    _, _, q, k = axes()
    want = ((q - k).abs() <= 3) | chosen[q] | chosen[k]
    assert torch.equal(mask_of(program, tensors={"globals": chosen}), want.expand(2, 4, 12, 16))


def test_alibi_builds_the_same_nodes_as_the_constructors():
    program = parse(ALIBI).default
    slope = ir.Load("slope", (build.h,), ir.FLOAT)
    assert program.score is build.op("add", build.s, build.op("mul", slope, build.op("sub", build.k, build.q)))
    assert program.mask is build.TRUE


def test_composition_joins_masks_and_chains_scores():
    text = LIBRARY + (
        "pattern gemma(window: int = 5, cap: float = 50.0) = causal & sliding_window(window) & softcap(cap)\n"
        '    """Local layers."""\n'
        "pattern chained = alibi & softcap\n"
        "pattern other_order = softcap & alibi\n"
        "pattern band = ~causal | sliding_window(window=2)\n"
    )
    module = parse(text)
    gemma = module.patterns["gemma"]
    assert gemma.doc == "Local layers."
    assert [p.name for p in gemma.scalars] == ["window", "cap"] and gemma.scalar("window").default == 5
    _, h, q, k = axes()
    assert torch.equal(mask_of(gemma), ((k <= q) & (q - k < 5)).expand(2, 4, 12, 16))
    got, s = score_of(gemma)
    assert torch.allclose(got, 50 * torch.tanh(s / 50))

    slope = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)
    got, s = score_of(module.patterns["chained"], {"cap": 2.0}, {"slope": slope})
    biased = s + slope[h] * (k - q)
    assert torch.allclose(got, 2 * torch.tanh(biased / 2))
    got, s = score_of(module.patterns["other_order"], {"cap": 2.0}, {"slope": slope})
    assert torch.allclose(got, 2 * torch.tanh(s / 2) + slope[h] * (k - q))
    assert torch.equal(mask_of(module.patterns["band"]), ((k > q) | (q - k < 2)).expand(2, 4, 12, 16))


def test_parameters_left_open_become_parameters():
    program = parse(LIBRARY + "pattern a = causal & alibi & sliding_window\n").default
    assert program.scalars == (ir.ScalarParam("window", ir.INT, 4),)
    assert program.tensors == (ir.TensorParam("slope", ir.FLOAT, (ir.Size("H"),)),)


def test_open_parameter_merges_with_a_declared_one_and_takes_its_default():
    program = parse(LIBRARY + "pattern a(window: int = 9) = causal & sliding_window\n").default
    assert program.scalars == (ir.ScalarParam("window", ir.INT, 9),)


def test_tensor_passed_by_another_name_renames_the_load_and_binds_its_sizes():
    program = parse(
        "pattern table(t: float[H, N], n: int[2 * N]):\n    score = s + t[h, q % N] + n[k]\n"
        "pattern outer(bias: float[H, 2 * M - 1], rows: int[M], m2: int[2 * (2 * M - 1)]) = table(bias, m2)\n"
    ).default
    assert [t.name for t in program.tensors] == ["bias", "rows", "m2"]
    assert program.score is not build.s and "bias[h, q % (2 * M - 1)]" in ir.format_expr(program.score)


def test_arguments_may_be_any_expression_of_the_point():
    program = parse(WINDOW + "pattern per_head(w: int[H], n: int) = sliding_window(w[h] * n)\n").default
    w = torch.tensor([1, 2, 3, 4])
    _, h, q, k = axes()
    got = mask_of(program, {"n": 2}, {"w": w})
    assert torch.equal(got, (q - k < w[h] * 2).expand(2, 4, 12, 16))


def test_pattern_called_inside_an_expression():
    program = parse(
        LIBRARY + "pattern p(doc: int[Lk]):\n    mask = causal() and (sliding_window(window=3) or doc[q] == doc[k])\n"
    ).default
    doc = torch.arange(16) // 5
    _, _, q, k = axes()
    want = (k <= q) & ((q - k < 3) | (doc[q] == doc[k]))
    assert torch.equal(mask_of(program, tensors={"doc": doc}), want.expand(2, 4, 12, 16))


def test_helpers_inline_with_conversion():
    program = parse(
        "def same(a: int, b: int) = a == b\n"
        "def half(x: float) -> float:\n    let y = x / 2\n    return y + 0.5\n"
        "def at(t: int[N], i: int) = t[min(i, N - 1)]\n"
        "pattern p(doc: int[Lk]):\n"
        "    mask = same(at(doc, q), at(doc, i=k))\n    score = s * half(q)\n"
    ).default
    doc = torch.arange(16) // 3
    _, _, q, k = axes()
    assert torch.equal(mask_of(program, tensors={"doc": doc}), (doc[q] == doc[k]).expand(2, 4, 12, 16))
    got, s = score_of(program, tensors={"doc": doc})
    assert torch.allclose(got, s * (q / 2 + 0.5))


def test_helper_arguments_may_be_called_q_k_and_s():
    program = parse(
        "def f(q: int, k: int, s: float) = s * (q - 2 * k)\npattern p:\n    score = f(k, q, s + 1)\n"
    ).default
    _, _, q, k = axes()
    got, s = score_of(program)
    assert torch.allclose(got, (s + 1) * (k - 2 * q))


def test_definitions_may_come_in_any_order():
    program = parse("pattern a = b & c\npattern b: mask = f(q) < k\npattern c: mask = k < 9\ndef f(x: int) = x // 2\n")
    assert list(program.patterns) == ["a", "b", "c"] and program.default.name == "c"
    assert ir.format_expr(program.patterns["a"].mask) == "q // 2 < k and k < 9"


def test_grids():
    program = parse(
        "pattern n(height: int, width: int, radius: int = 1):\n"
        "    grid q, k = (y: height, x: width)\n"
        "    mask = abs(q.y - k.y) <= radius and abs(q.x - k.x) <= radius\n"
    ).default
    assert [axis for axis, _ in program.grids] == ["q", "k"]
    assert [name for name, _ in program.grids[0][1]] == ["y", "x"]
    sizes = {**SIZES, "Lq": 12, "Lk": 12}
    _, _, q, k = axes(sizes)
    want = ((q // 4 - k // 4).abs() <= 1) & ((q % 4 - k % 4).abs() <= 1)
    assert torch.equal(mask_of(program, {"height": 3, "width": 4}, sizes=sizes), want.expand(2, 4, 12, 12))


def test_grids_of_one_and_three_dimensions_and_unlike_axes():
    program = parse(
        "pattern p(static w: int = 3):\n"
        "    grid q = (t: Lq)\n    grid k = (t: 4, y: 2, x: w - 1)\n"
        "    mask = q.t == k.t + k.y * k.x\n"
    ).default
    _, _, q, k = axes()
    want = q == k // 4 + (k // 2 % 2) * (k % 2)
    assert torch.equal(mask_of(program), want.expand(2, 4, 12, 16))
    assert program.scalars == (ir.ScalarParam("w", ir.INT, 3, True),)


def test_free_sizes_are_known_in_expressions():
    program = parse(
        "pattern p(t: float[H, 2 * N - 1], pos: int[N]):\n    score = s + t[h, pos[q % N] + N - 1]\n"
    ).default
    assert ir.Size("N") in set(ir.postorder(program.score))
    assert program.tensors[0].shape[1] is build.op("sub", build.op("mul", 2, ir.Size("N")), 1)


def test_zero_dimensional_tensor():
    program = parse("pattern p(t: float[]):\n    score = s * t + t[]\n").default
    got, s = score_of(program, tensors={"t": torch.tensor(2.0)})
    assert torch.allclose(got, s * 2 + 2)


def test_operators_mean_what_they_mean_in_python():
    for text in (
        "7 // -2", "-7 % 3", "7 / 2", "2 ** 10", "2 ** -1", "-3 ** 2", "2 ** 3 ** 2", "1 << 5 >> 2", "6 & 3 | 8 ^ 1",
        "~5", "+3", "1 < 2 < 3", "3 > 2 == 2", "1 if 2 > 3 else 4 if 0 > 1 else 5", "not 1 > 2",
        "1 > 2 or 3 > 2 and 1 > 0",
        "0x1F + 0b11 + 1_000", "1e-3 + .5 + 2.", "7.5 // 2", "-7.5 % 2", "min(3, 1, 2) + max(1, 2)", "abs(-3)",
        "2 - 3 - 4",
        "(1 > 0) + (2 > 1)", "(1 > 0) != (1 > 2)", "(1 > 0) == (2 > 1)",
    ):  # fmt: skip
        assert value(text) == float(eval(text)), text  # the texts above, not a user's


def test_bits_are_logical_on_bools():
    assert value("(1 > 0) & ~(1 > 2) | (1 > 3)") == 1.0
    assert value("(1 > 0) ^ (2 > 1)") == 0.0
    assert parse("pattern p:\n    mask = (q > k) & (q > 3) | ~(k > 1)\n").default.mask is (
        parse("pattern p:\n    mask = (q > k) and (q > 3) or not (k > 1)\n").default.mask
    )


def test_integer_powers_stay_integers():
    program = parse("pattern p:\n    mask = q ** 3 < k ** 0 + (k > 2) ** 2\n").default
    assert not any(n.type is ir.FLOAT for n in ir.postorder(program.mask))


def test_constants_and_functions():
    assert value("pi") == torch.pi and value("inf") == torch.inf and value("-inf") == -torch.inf
    assert value("isnan(nan)") == 1.0 and value("isnan(1)") == 0.0
    assert value("int(-2.7)") == -2 and value("bool(3)") == 1 and value("float(true)") == 1
    assert value("clamp(9, 0, 4)") == 4 and value("where(1 > 2, 3, 4.5)") == 4.5
    x = torch.tensor(0.7, dtype=torch.float64)
    for name in ("softplus", "silu", "gelu", "relu"):
        assert abs(value(f"{name}(0.7)") - getattr(torch.nn.functional, name)(x).item()) < 1e-12
    assert value("softplus(1000.0)") == 1000.0


def test_every_function_of_the_table_can_be_called_as_its_signature_says():
    for function in builtin_functions():
        args = ", ".join(["1 > 0", "0.5", "0.25"][-function.least :]) if function.name == "where" else None
        types = re.findall(r": (int|float)", function.signature.split("->")[0])
        numbers = ["3" if kind == "int" else "0.5" for kind in types] or ["0.5", "0.25", "0.75"]
        args = args or ", ".join(numbers[: function.least])
        parse(f"pattern p:\n    score = s + {function.name}({args})\n")
        assert function.signature.startswith(function.name + "(") and function.meaning


def test_defaults_may_be_any_constant_expression():
    program = parse("pattern p(a: float = 1, x: float = log2(8.0) / 2, c: int = 2 * 3, d: bool = true,"
                    " e: float = -inf):\n    mask = q < a + x + c or d or e < 0\n").default  # fmt: skip
    assert [p.default for p in program.scalars] == [1.0, 1.5, 6, True, float("-inf")]
    assert type(program.scalars[0].default) is float and type(program.scalars[2].default) is int


def test_layout_of_long_definitions():
    program = parse(
        "# a comment\n\n"
        "pattern p(\n    a: int,   # first\n    t: float[\n        H,\n        Lk,\n    ],\n):\n"
        "\n    # inside\n    mask = (\n  q < a\n      or k > 3\n    )\n\n\n    score = s + t[\n h, k]\n\n# the end"
    ).default
    assert [p.name for p in program.scalars + program.tensors] == ["a", "t"]
    assert parse("pattern p:\r\n\tmask = q < k\r\n").default.mask is parse("pattern p: mask = q < k").default.mask


def test_module():
    module = parse(
        '"""About this file."""\ndef f(x: int) = x\npattern a: mask = q < k\npattern b = a\n', filename="x.attn"
    )
    assert module.doc == "About this file." and module.helpers == ("f",)
    assert list(module.patterns) == ["a", "b"] and module.default is module.patterns["b"] and not module.imported
    assert module.filename == "x.attn"


def test_scores_and_masks_default():
    module = parse("pattern a: mask = q < k\npattern b: score = q\n")
    assert module.patterns["a"].score is build.s
    assert module.patterns["b"].mask is build.TRUE and module.patterns["b"].score.type is ir.FLOAT


def test_value_names_and_callable_names_do_not_meet():
    program = parse(
        "pattern window(window: int): mask = q - k < window\npattern p(window: int) = window(window)\n"
    ).default
    assert ir.format_expr(program.mask) == "q - k < window"
