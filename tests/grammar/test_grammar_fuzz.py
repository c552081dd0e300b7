"""Random texts never raise anything but AttnError; random expressions print and parse back to the same node."""

import random
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnlang import ir
from attnlang.grammar import AttnError, Module, load, parse

VOCABULARY = (
    "pattern def let grid mask score return static import from as if else and or not true false q k b h s H N Lk "
    "int float bool p f x y t causal exp min where inf weights normalize output term stat branch attend pool select "
    "rows group groups keys values queries position lengths w m l Q K V over key sum max dot softmax none d "
    "1 2.5 0 1e3 99999999999999999999 ( ) [ ] , : = == < <= "
    '<< -> - + * / // % ** & | ^ ~ . # "x.attn" """doc""" " \n \n\n \n\x20\x20\x20\x20 \t \\ ! é'
)
WORDS = VOCABULARY.split(" ")

SEED = """def f(x: int) = x + 1
pattern causal: mask = k <= q
pattern p(x: int = 3, t: float[H, 2 * N - 1], y: int[N], static n: int = 2):
    \"\"\"Doc.\"\"\"
    let d = abs(q - k)
    grid q, k = (y: x, x: n)
    mask = d < x and causal() or not q.y == k.y
    score = s + t[h, f(d) % N] * (1.0 if y[k % N] > 0 else 2 ** -d)
pattern z = causal & p(x=4) & ~causal
"""

BEYOND = """pattern p(gate: float[H], rel: float[9, D], static n: int = 2):
    term t = dot(Q, rel[clamp(k - q + 4, 0, 8)])
    term a = sum_d((x - y) ** 2 * d, Q, K[b, h // 2, k])
    values = V[b, 0, k]
    position q = q + 1
    group = k // 4
    groups = cdiv(Lk, 4)
    score = s + t - a
    normalize:
        let x = exp(s)
        stat m = max(s, seed=gate[h])
        stat l = sum(x, by=group)
        weight = exp(s - m) / l
    weights = dropout(w, 0.5, n) if k < 4 else w
    output c = sum(w * Q, over=q, key=k // 4, extent=cdiv(Lk, 4), empty=-inf)
    output e = each(m, empty=1.0)
pattern z:
    pool kp = mean(K, block=4, stride=2)
    attend g:
        lengths = (Lq, cdiv(Lk, 2))
        keys = kp
        output gs = s
    select sel[Lq, cdiv(Lk, 2)] = top(gs[b, h, q, k], 2, candidates=k <= q, forced=q == k)
    branch a: mask = sel[b, h, q, k // 2]
    branch c:
        normalize = softmax(sink=0)
    output oa = sum(w * V, over=k, branch=a)
    rows o[Lq, Dv] = oa[b, h, q, d] * rsqrt(mean_d(oa[b, h, q, d] ** 2))
    return o, oa
"""

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def survives(text):
    try:
        module = parse(text)
    except AttnError as error:
        assert str(error) and all(d.code and d.message for d in error.diagnostics)
    else:
        assert isinstance(module, Module)
        for program in module.patterns.values():
            assert ir.verify(program) is program
            assert ir.format_program(program)


@quick
@given(st.text(max_size=60))
def test_random_characters(text):
    survives(text)
    survives("pattern p:\n    mask = " + text)


@quick
@given(st.binary(max_size=60))
def test_random_bytes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.attn"
    path.write_bytes(data)
    try:
        load(path)
    except AttnError as error:
        assert str(error)


@quick
@given(st.lists(st.sampled_from(WORDS), max_size=40))
def test_token_soup(words):
    survives(" ".join(words))
    survives("pattern p(x: int, t: float[H, N]):\n    mask = " + " ".join(words[:12]))


@pytest.mark.parametrize("seed", [SEED, BEYOND])
def test_programs_with_a_few_edits(seed):
    """Delete, repeat, swap and replace words of a program that is right: the errors people make."""
    rng = random.Random(7)
    tokens = seed.replace("(", " ( ").replace(")", " ) ").replace("\n", " \n ").split(" ")
    for _ in range(600):
        words = list(tokens)
        for _ in range(rng.randint(1, 4)):
            i, j = rng.randrange(len(words)), rng.randrange(len(words))
            edit = rng.randrange(4)
            if edit == 0:
                del words[i]
            elif edit == 1:
                words.insert(i, words[j])
            elif edit == 2:
                words[i], words[j] = words[j], words[i]
            else:
                words[i] = rng.choice(WORDS)
        survives(" ".join(words))


def test_the_seed_of_the_edits_is_right():
    assert list(parse(SEED).patterns) == ["causal", "p", "z"]
    assert list(parse(BEYOND).patterns) == ["p", "z"]


HEADER = "pattern p(x: int, y: float, c: bool, t: float[H, Lk], n: int[Lk], z: float[]):\n    score = "

LEAVES = "q k b h s x y c z[] t[h,k] n[k] Lq H 0 1 7 2.5 1e-3 1e22 inf nan pi true false -3 -2.5"
_leaves = st.sampled_from(LEAVES.split(" "))


def _infix(signs, form, inner):
    """Expressions ``form`` with {0} and {1} operands and {sign} drawn from ``signs``."""
    parts = st.tuples(st.sampled_from(signs.split(" ")), inner, inner)
    return parts.map(lambda o: form.format(o[1], o[2], sign=o[0]))


def _grow(inner):
    three = st.tuples(inner, inner, inner)
    return st.one_of(
        _infix("+ - * / // % **", "({0}) {sign} ({1})", inner),
        _infix("and or", "bool({0}) {sign} (({1}) < 1)", inner),
        _infix("& | ^ << >>", "int({0}) {sign} int({1})", inner),
        _infix("< <= == != > >=", "({0}) {sign} ({1})", inner),
        _infix("min max", "{sign}({0}, {1}, 3)", inner),
        three.map(lambda o: f"({o[0]}) if bool({o[1]}) else ({o[2]})"),
        three.map(lambda o: f"where(bool({o[0]}), {o[1]}, {o[2]})"),
        st.tuples(st.sampled_from(["-", "+", "~int", "not bool"]), inner).map(lambda o: f"{o[0]}({o[1]})"),
        st.tuples(st.sampled_from(["exp", "sqrt", "round", "abs", "sign", "float"]), inner).map(
            lambda o: f"{o[0]}({o[1]})"
        ),
        inner.map(lambda o: f"n[abs(int({o}))]"),
    )


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.recursive(_leaves, _grow, max_leaves=12))
def test_printed_expressions_parse_back_to_the_same_node(text):
    node = parse(HEADER + f"float({text})\n").default.score
    printed = ir.format_expr(node)
    if not printed.endswith("..."):
        assert parse(HEADER + printed + "\n").default.score is node, printed


def test_printed_programs_parse_back():
    for program in parse(SEED).patterns.values():
        again = parse(ir.format_program(program)).default
        assert again.mask is program.mask and again.score is program.score
        assert again.scalars == program.scalars and again.tensors == program.tensors


def test_threads():
    """The parser's tables are shared by all threads; a parse is not."""
    wrong = []

    def work(i):
        for _ in range(10):
            text = f"pattern p{i}(w: int = {i}): mask = q - k < w and q < {i}"
            program = parse(text).default
            if program.name != f"p{i}" or program.scalar("w").default != i:
                wrong.append(program)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
