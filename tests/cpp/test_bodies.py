"""Score terms that are no dot product on the C++ backend, values and gradients, against the reference in float64."""

from __future__ import annotations

import subprocess

import pytest
import torch

import attnlang as al
from attnlang.codegen.cpp import emit
from attnlang.codegen.isa import COMMON_FLAGS, ISAS
from attnlang.codegen.plan import make_plan
from attnlang.ir import Environment, Load, Program, postorder
from attnlang.passes.terms import alone
from attnlang.runtime.separate import separated
from attnlang.runtime.toolchain import find_compiler
from tests.body_cases import CASES, leaves, program

from .pulls import Launches, Problem, check, cotangents, gradients


def compare(problem: Problem, launches: Launches) -> None:
    want, got = problem.exact()[0], problem.ours()[0]
    for n, expected in want.items():
        size = max(1.0, float(expected.detach().nan_to_num(0, 0, 0).abs().max()))
        torch.testing.assert_close(got[n].double(), expected, atol=3e-5 * size, rtol=3e-5, msg=lambda t, n=n: n + t)
    check(problem)
    assert launches.count == 1, "no kernel made the gradients"


DIMS = [(24, 16), (40, 8), (16, 24), (40, 40), (16, 24), (24, 40), (7, 5)]


@pytest.mark.parametrize("name, dims", list(zip(CASES, DIMS, strict=True)))
@pytest.mark.usefixtures("lightly_optimised")
def test_values_and_gradients(name: str, dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both lengths cut tiles and blocks; two query heads share a key head."""
    compare(Problem(program(name), leaves(name, (4, 2), (101, 150), dims)), Launches(monkeypatch))


@pytest.mark.parametrize("lengths", [(1, 70), (70, 1)])
def test_short_lengths_with_the_usual_flags(lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    compare(Problem(program("l1"), leaves("l1", (2, 1), lengths, (24, 16))), Launches(monkeypatch))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("lightly_optimised")
def test_gradients_do_not_depend_on_threads(threads: int) -> None:
    problem = Problem(program("additive"), leaves("additive", (4, 2), (101, 150), (24, 16)))

    def found() -> dict[str, torch.Tensor]:
        made, given = problem.ours()
        return gradients(made, given, problem.wanted, cotangents(problem.exact()[0]))

    want, before = found(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(t, want[n]) for n, t in found().items())
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("lightly_optimised")
def test_bfloat16_is_as_near_as_its_rounding() -> None:
    made = {n: t.bfloat16() if n in "qkv" else t for n, t in leaves("additive", (4, 2), (70, 90), (24, 16)).items()}
    problem = Problem(program("additive"), made)
    want, got = problem.exact()[0]["o"], problem.ours()[0]["o"]
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), want, atol=2e-3, rtol=2**-8)


def test_a_score_of_one_term_reads_no_other() -> None:
    """Without the product of Q and K, which nothing reads, nor the scale of the call, which is for the first term."""
    stage = program("gaussian").attend
    found, scaled = alone(stage)
    assert [t.name for t in found.terms] == ["s"] and found.terms[0].body is stage.terms[1].body and not scaled
    text = "pattern p:\n    term a = dot(Q, K)\n    term b = dot(K, Q)\n    score = s + a\n"
    two = al.parse(text.replace("    term b = dot(K, Q)\n", ""), "p").attend
    assert alone(two) == (two, True)
    first = al.parse("pattern p:\n    term a = sum_d(abs(x - y), Q, K)\n    mask = k <= q\n", "p").attend
    assert [t.body for t in alone(first)[0].terms] == [None]


@pytest.mark.usefixtures("lightly_optimised")
def test_rows_at_addresses_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "pattern p(page: int[Lk]):\n    term s = sum_d(abs(x - y), Q, K[b, 0, page[k]])\n"
    text += "    values = V[b, 0, page[k]]\n    score = -s\n"
    made = leaves("l1", (2, 1), (33, 40), (8, 8)) | {"page": torch.randperm(40)}
    problem = Problem(al.parse(text, "p"), made)
    with torch.no_grad():  # a kernel that finds the rows itself; gradients start from rows that were gathered
        plain = problem.ours()[0]["o"]
    torch.testing.assert_close(plain.double(), problem.exact()[0]["o"], atol=3e-5, rtol=3e-5)
    compare(problem, Launches(monkeypatch))


PRODUCTS = {
    "weighted": "pattern weighted(u: float[H, D]):\n    term s = sum_d(-(x + u[h, d]) * y * u[h, d], Q, K)\n",
    "location": "pattern location(out: float[D], shift: float[H, Lk, D]):\n"
    "    term a = sum_d(out[d] * tanh(y), Q, shift[h, k])\n    score = 0.5 * a\n    mask = k <= q\n",
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.usefixtures("lightly_optimised")
def test_products_of_rows_are_dot_products_of_other_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in the kernels of softmax attention: no general one is launched."""
    found, launches = al.parse(PRODUCTS[name], name), Launches(monkeypatch)
    made = {n: torch.randn(2, h, 70, 16) for n, h in (("q", 4), ("k", 2), ("v", 2))}
    shapes = {"u": (4, 16), "out": (16,), "shift": (4, 70, 16)}
    problem = Problem(found, made | {t.name: torch.randn(shapes[t.name]) for t in found.tensors})
    want, got = problem.exact()[0]["o"], problem.ours()[0]["o"]
    torch.testing.assert_close(got.double(), want, atol=3e-5, rtol=3e-5)
    stage = alone(found.attend)[0]
    env = Environment({}, {"B": 2, "H": 4, "Hkv": 2, "Lq": 70, "Lk": 70}, {}, problem.leaves, {}, operands=made)
    assert [t.body for t in separated(stage, env)[0].terms] == [None]
    check(problem)
    assert launches.count == 0


def test_gradients_of_a_table_by_pair_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "pattern p(table: float[Lk + Lq, D]):\n    term s = sum_d(tanh(x + y + table[q + k, d]), Q, K)\n"
    launches = Launches(monkeypatch)
    made = leaves("l1", (2, 1), (33, 40), (8, 8))
    check(Problem(al.parse(text, "p"), {**made, "table": torch.randn(73, 8)}))
    assert launches.count == 0


@pytest.mark.parametrize("name", ["relu", "by_query", "by_pair"])
def test_sources_have_no_warnings(name: str) -> None:
    stage = alone(program(name).attend)[0]
    found = Program(name, (stage,), tensors=program(name).tensors)
    names = [n.tensor for n in postorder(*stage.roots()) if isinstance(n, Load)]
    storage = dict.fromkeys(names, "float16")
    source = emit(make_plan(found, dtype="float16", head_dim=40, value_dim=27, storage=storage), ISAS["generic"])
    flags = [f for f in COMMON_FLAGS if f not in ("-O3", "-shared")]
    command = [*find_compiler().command, *flags, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr[:2000]
