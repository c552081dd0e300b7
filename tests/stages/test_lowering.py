"""Stages that are rewritten for kernels mean what they meant, in values and gradients."""

from __future__ import annotations

import pytest
import torch

import attnlang as al
from attnlang.ir import (
    DEFAULT_OUTPUTS,
    FLOAT,
    KEY,
    KEY_ADDRESS,
    Address,
    Attend,
    Branch,
    Dot,
    Environment,
    Input,
    Load,
    Normalizer,
    Output,
    Program,
    Size,
    TensorParam,
    reference,
)
from attnlang.ir import Operand as Rows
from attnlang.ir.build import b, const, h, k, op, q, s, size
from attnlang.ir.normalizers import entmax15, sparsemax
from attnlang.ir.stages import QUERY, VALUE, WEIGHT
from attnlang.runtime import regions
from attnlang.runtime.compiled import has_kernel
from attnlang.runtime.lowering import apart, lowered
from attnlang.runtime.stages import softmax_roles

pytestmark = pytest.mark.usefixtures("lightly_optimised")

CAUSAL = op("ge", q, k)
DISTANCE = op("to_float", op("abs", op("sub", q, k)))
NEAR = op("le", op("abs", op("sub", q, k)), 9)
OUT, LSE = DEFAULT_OUTPUTS


def relative() -> Program:
    """A score term of q with a table of distances for every head."""
    row = op("add", op("sub", k, q), op("sub", Size("R"), 1))
    score = op("add", s, op("mul", Input("t", FLOAT), 0.3))
    terms = (Dot(), Dot("t", QUERY, Rows("table", (h, row))))
    stage = Attend(terms=terms, branches=(Branch(CAUSAL, score),))
    return Program("relative", (stage,), (), (TensorParam("table", FLOAT, (Size("H"), Size("R"), Size("D"))),))


def branched() -> Program:
    """Two branches, one of them with two sums of rows."""
    outputs = (
        OUT,
        Output("squares", op("mul", WEIGHT, WEIGHT), VALUE),
        Output("near", WEIGHT, VALUE, branch=1),
        Output("reach", op("mul", WEIGHT, op("to_float", op("sub", q, k))), branch=1),
        LSE,
    )
    return Program("branched", (Attend(branches=(Branch(CAUSAL), Branch(NEAR, op("mul", s, 2.0))), outputs=outputs),))


def test_stages_are_taken_apart_by_branch_and_sum_of_rows() -> None:
    parts = apart(branched().attend)
    assert [part.made for part in parts] == [("o", "lse"), ("squares",), ("near", "reach")]
    assert apart(Attend()) == (Attend(),)


def latent() -> Program:
    """A second dot product with keys all heads share, weighed by a number of the head (multi-head latent attention)."""
    terms = (Dot(), Dot("t", Rows("more_q", QUERY.index), Rows("more_k", (b, k))))
    score = op("sub", op("add", op("mul", Input("t", FLOAT), Load("rate", (h,), FLOAT)), s), op("mul", DISTANCE, 0.05))
    stage = Attend(terms=terms, branches=(Branch(CAUSAL, score),))
    shapes = {"more_q": ("B", "H", "Lq", "R"), "more_k": ("B", "Lk", "R"), "rate": ("H",)}
    return Program("latent", (stage,), (), captured(shapes))


def chosen() -> Program:
    """Rows that take their scores from one of two products."""
    terms = (Dot(), Dot("t", Rows("more_q", QUERY.index), Rows("more_k", KEY.index)))
    score = op("where", op("lt", op("mod", q, 3), 1), op("mul", Input("t", FLOAT), 0.5), s)
    stage = Attend(terms=terms, branches=(Branch(NEAR, score),))
    shapes = {"more_q": ("B", "H", "Lq", "R"), "more_k": ("B", "Hkv", "Lk", "R")}
    return Program("chosen", (stage,), (), captured(shapes))


def elsewhere() -> Program:
    """Keys in reverse, values of another head, each from a tensor of its own number of heads."""
    back = op("sub", op("sub", size("Lk"), 1), k)
    other = Address(b, op("mod", op("add", h, 1), size("Hkv")), back)
    stage = Attend(
        terms=(Dot(right=Rows("k", Address(b, KEY_ADDRESS.head, back))),),
        branches=(Branch(CAUSAL),),
        outputs=(Output("o", WEIGHT, Rows("v", other)), LSE),
    )
    return Program("elsewhere", (stage,))


def groups() -> Program:
    """The mass every key group gets, and a group nobody is in."""
    group = op("sub", op("mod", k, 5), 1)  # the first is out of range
    mass = Output("mass", op("mul", WEIGHT, 2.0), key=(group,), extents=(const(6),))
    return Program("groups", (Attend(branches=(Branch(CAUSAL),), outputs=(OUT, mass, LSE)),))


def summaries() -> Program:
    """A second product with the first key of each block of ten, bent before it is added."""
    first = op("mul", op("floordiv", k, 10), 10)
    terms = (Dot(), Dot("t", QUERY, Rows("k", Address(b, KEY_ADDRESS.head, first))))
    score = op("add", s, op("tanh", op("mul", Input("t", FLOAT), 0.3)))
    return Program("summaries", (Attend(terms=terms, branches=(Branch(CAUSAL, score),)),))


def positioned() -> Program:
    """Queries that start later and keys in steps of two, as masks, scores and outputs see them."""
    distance = op("to_float", op("sub", q, k))
    output = Output("reach", op("mul", WEIGHT, distance), key=(op("mod", k, 3),), extents=(const(3),))
    branch = Branch(CAUSAL, op("sub", s, op("mul", distance, 0.02)))
    position = (("q", op("add", q, 20)), ("k", op("mul", k, 2)))
    return Program("positioned", (Attend(branches=(branch,), outputs=(OUT, output, LSE), position=position),))


def captured(shapes: dict[str, tuple[str, ...]]) -> tuple[TensorParam, ...]:
    return tuple(TensorParam(n, FLOAT, tuple(map(Size, shape))) for n, shape in shapes.items())


SIZES = {"B": 1, "H": 4, "Hkv": 2, "Lq": 70, "Lk": 70, "R": 70, "D": 16}
LOWERED = (relative, branched, latent, chosen, elsewhere, groups, summaries)


@pytest.mark.parametrize("make", LOWERED)
def test_rewritten_stages_have_kernels(make: object) -> None:
    program: Program = make()  # type: ignore[operator]
    torch.manual_seed(0)
    operands = {n: torch.randn(1, heads, 70, 16) for n, heads in (("q", 4), ("k", 2), ("v", 2))}
    tensors = {t.name: torch.randn([SIZES[d.name] for d in t.shape]) for t in program.tensors}  # type: ignore[attr-defined]
    env = Environment({}, SIZES, {}, tensors, {}, torch.float32, "cpu", operands)
    for part in lowered(program.attend, env, 0.25).parts:
        assert softmax_roles(part) is not None or has_kernel(part), part.name


@pytest.mark.parametrize("make", [*LOWERED, positioned])
def test_rewritten_stages_mean_the_same(make: object) -> None:
    torch.manual_seed(0)
    program: Program = make()  # type: ignore[operator]
    leaves = {n: torch.randn(1, heads, 70, 16) for n, heads in (("q", 4), ("k", 2), ("v", 2))}
    leaves |= {t.name: torch.randn([SIZES[d.name] for d in t.shape]) for t in program.tensors}  # type: ignore[attr-defined]
    found = []
    for dtype in (torch.float64, torch.float32):
        given = {n: t.to(dtype).requires_grad_() for n, t in leaves.items()}
        operands, others = [given.pop(n) for n in "qkv"], dict(given)
        if dtype is torch.float64:
            made = reference(program, *operands, SIZES, {}, others, 0.25)
        else:
            o, lse, rest = al.compile(program, backend="cpp")(*operands, **others, return_lse=True, return_aux=True)
            made = {"o": o, "lse": lse, **rest}
        loss = torch.stack([(t.double() * torch.linspace(-1, 1, t.shape[2])[:, None]).sum() if t.dim() == 4 else t.sum()
                            for t in (made[n] for n in program.results)]).sum()  # fmt: skip
        grads = torch.autograd.grad(loss, [*operands, *others.values()])
        found.append(([made[n].double() for n in program.results], [g.double() for g in grads]))
    for want, got in zip(found[0], found[1], strict=True):
        for a, found_one in zip(want, got, strict=True):
            torch.testing.assert_close(found_one, a, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("norm", [sparsemax(), entmax15()], ids=["sparsemax", "entmax"])
def test_roots_are_found_by_kernels(norm: Normalizer, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mask = op("and", CAUSAL, op("gt", op("mod", q, 7), 0))  # some rows see nothing
    program = Program("root", (Attend(branches=(Branch(mask, normalizer=norm),), outputs=(OUT,)),))
    found = []
    for dtype, backend in ((torch.float64, "eager"), (torch.float32, None)):
        torch.manual_seed(1)
        leaves = [(2 * torch.randn(1, 2, 70, 16)).to(dtype).requires_grad_() for _ in range(3)]
        if backend is None:
            monkeypatch.setattr(regions, "_forward", None)  # which is how one block of pairs would be computed
        o = al.compile(program, backend=backend)(*leaves)
        found.append([o, *torch.autograd.grad((o * torch.linspace(-1, 1, 16)).sum(), leaves)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)
