"""Gradients of stages beyond plain softmax by interpreted Triton kernels, against autograd of the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from streaming_cases import CASES, TENSORS, masked

import attnlang as al
from attnlang.ir import FLOAT, INT, Attend, Expr, Load, Program, ScalarParam, Size, TensorParam, reference
from attnlang.ir.build import TRUE, all_of, k, op, param, q, s

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Tensor = torch.Tensor
GIVEN = {n: c for n, c in CASES.items() if n not in ("softmax", "peak", "column_peak", "least", "temperature")}
"""Softmax alone has kernels of its own; the gradients of the others go to the pair that made an extremum."""
GIVEN["temperature"] = replace(CASES["temperature"], outputs=CASES["temperature"].outputs[:1])
HOLES = all_of(op("ge", op("add", q, 9), k), op("ge", q, 3), op("ne", op("mod", k, 7), 2))
"""Rows without keys, and tiles of every kind."""


def leaves(heads: tuple[int, int], lengths: tuple[int, int], dims: tuple[int, int], batch: int = 1):
    generator = torch.Generator().manual_seed(0)
    (hq, hk), (lq, lk), (d, dv) = heads, lengths, dims
    shapes = {"q": (batch, hq, lq, d), "k": (batch, hk, lk, d), "v": (batch, hk, lk, dv)}
    shapes |= {"sink": (hq,), "rate": (hq,), "gate": (hq, lk), "noise": (lq, lk)}
    found = {n: torch.randn(x, generator=generator) for n, x in shapes.items()}
    return {**found, "rate": found["rate"].abs() * 0.1}


def results(program: Program, given: dict[str, Tensor]) -> dict[str, Tensor]:
    operands, others = [given[n] for n in "qkv"], {t.name: given[t.name] for t in TENSORS}
    if given["q"].dtype is torch.float64:
        (b, h, lq, d), (_, hkv, lk, _) = given["q"].shape, given["k"].shape
        sizes = {"B": b, "H": h, "Hkv": hkv, "Lq": lq, "Lk": lk}
        return reference(program, *operands, sizes, {}, others, d**-0.5)
    attention = al.compile(program, backend="triton")
    both = {"return_lse": True} if "lse" in program.results else {}
    found = attention(*operands, **others, return_aux=True, **both)
    if isinstance(found, dict):
        return found
    return {**dict(zip(("o", "lse"), found[:-1], strict=False)), **found[-1]}


def gradients(program: Program, given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    at = {n: t.to(dtype).requires_grad_() for n, t in given.items()}
    outs = {n: t for n, t in results(program, at).items() if t.is_floating_point()}
    generator = torch.Generator().manual_seed(1)
    parts = []
    for _, t in sorted(outs.items()):
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        parts.append((t.double().nan_to_num(neginf=0.0) * weights).sum())
    found = torch.autograd.grad(torch.stack(parts).sum(), list(at.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(at.items(), found, strict=True)}


def check(
    name: str,
    made: list[bool],
    mask: Expr = TRUE,
    heads: tuple[int, int] = (2, 1),
    lengths: tuple[int, int] = (19, 35),
    dims: tuple[int, int] = (16, 16),
    batch: int = 1,
) -> None:
    program = Program(name, (masked(GIVEN[name], mask),), tensors=TENSORS)
    given = leaves(heads, lengths, dims, batch)
    want, got = gradients(program, given, torch.float64), gradients(program, given, torch.float32)
    assert made == [True], "no kernel ran"
    for n, grad in want.items():
        size = max(1e-3, float(grad.abs().max()))
        torch.testing.assert_close(
            got[n].double(), grad, atol=1e-4 * size, rtol=0, msg=lambda text, n=n: f"{name} {n}: {text}"
        )


@pytest.mark.parametrize("name", GIVEN)
def test_gradients(name: str, made: list[bool]) -> None:
    check(name, made, HOLES)


@pytest.mark.parametrize("name", ["sink", "gate", "dropout", "both_ways", "columns", "sigmoid_columns", "renormalised"])
def test_full_tiles(name: str, made: list[bool]) -> None:
    """Both lengths cut a tile, so rows and keys beyond the end must add nothing."""
    check(name, made)


@pytest.mark.parametrize(
    "name, heads, lengths, dims",
    [
        ("sink", (4, 2), (1, 37), (8, 24)),
        ("columns", (2, 1), (37, 1), (24, 8)),
        ("entropy", (2, 2), (5, 7), (80, 24)),
        ("entropy_alone", (2, 1), (33, 18), (24, 8)),
        ("cut", (2, 1), (18, 33), (24, 80)),
    ],
)
def test_every_shape(name, heads, lengths, dims, made) -> None:
    check(name, made, HOLES, heads, lengths, dims, batch=2 if name == "sink" else 1)


def test_strides_and_bounds_the_kernels_compute(made: list[bool]) -> None:
    """A causal mask has a closed form; here no run table is read. Operands lie in memory as [B, L, H, D]."""
    program = Program("columns", (masked(GIVEN["columns"], op("le", k, q)),), tensors=TENSORS)
    given = leaves((2, 1), (40, 40), (16, 24))
    turned = {n: t.transpose(1, 2).contiguous().transpose(1, 2) if n in "qkv" else t for n, t in given.items()}
    want, got = gradients(program, given, torch.float64), gradients(program, turned, torch.float32)
    assert made == [True]
    for n, grad in want.items():
        torch.testing.assert_close(got[n].double(), grad, atol=3e-5, rtol=1e-4, msg=lambda text, n=n: f"{n}: {text}")


@pytest.mark.parametrize("dtype, times", [(torch.float16, 2), (torch.bfloat16, 4)], ids=["float16", "bfloat16"])
def test_half_types_lose_no_more_than_twice_what_dense_pytorch_loses(dtype, times, made) -> None:
    """The interpreter cuts numbers off where they become bfloat16, which loses twice what rounding does."""
    program = Program("sigmoid", (GIVEN["sigmoid"],), tensors=TENSORS)
    given = {n: t.to(dtype) for n, t in leaves((1, 1), (40, 40), (32, 32)).items()}
    do = torch.randn(1, 1, 40, 32).to(dtype)

    def dense(at: torch.dtype) -> tuple[Tensor, ...]:
        operands = [given[n].to(at).requires_grad_() for n in "qkv"]
        scores = (operands[0] @ operands[1].mT) * 32**-0.5
        return torch.autograd.grad(torch.sigmoid(scores - 2) @ operands[2], operands, do.to(at))

    operands = [given[n].requires_grad_() for n in "qkv"]
    found = al.compile(program, backend="triton")(*operands, **{t.name: given[t.name] for t in TENSORS})
    ours = torch.autograd.grad(found, operands, do)
    assert made == [True]
    for mine, theirs, want in zip(ours, dense(dtype), dense(torch.float64), strict=True):
        assert mine.dtype is dtype
        assert (mine - want).abs().max() <= times * (theirs - want).abs().max()


def test_gradients_are_the_same_bits_in_every_run(made: list[bool]) -> None:
    program = Program("columns", (masked(GIVEN["columns"], HOLES),), tensors=TENSORS)
    given = leaves((2, 1), (21, 35), (16, 16))
    first, second = (gradients(program, given, torch.float32) for _ in range(2))
    assert made == [True, True]
    assert all(torch.equal(first[n], second[n]) for n in first)


def scored(found: Attend, score: Expr) -> Attend:
    return replace(found, branches=(replace(found.branch, score=score),))


@pytest.mark.parametrize(
    "index, runs",
    [
        ((op("add", op("sub", q, k), 40),), True),
        ((op("add", q, k),), True),
        ((), True),
        ((Load("bucket", (q, k), INT),), False),
    ],
    ids=["difference", "sum", "number", "bucket"],
)
def test_captured_tensors_read_by_pair(index: tuple[Expr, ...], runs: bool, made: list[bool]) -> None:
    """A sink needs the general kernels; additions in an order that is not fixed are left to the blockwise executor."""
    tensors = (
        TensorParam("t", FLOAT, (Size("n"),) if index else ()),
        TensorParam("bucket", INT, (Size("Lq"), Size("Lk"))),
        *TENSORS,
    )
    score = op("add", s, op("mul", Load("t", index, FLOAT), s))
    program = Program("table", (masked(scored(GIVEN["sink"], score), HOLES),), tensors=tensors)
    given = leaves((2, 1), (21, 35), (16, 16))
    bucket = torch.randint(80, (21, 35))
    learned = torch.randn(80 if index else ())

    def gradient(dtype: torch.dtype) -> Tensor:
        t = learned.to(dtype).requires_grad_()
        others = {n: x.to(dtype) for n, x in given.items()}
        operands, rest = [others.pop(n) for n in "qkv"], {**others, "t": t, "bucket": bucket}
        if dtype is torch.float64:
            sizes = {"B": 1, "H": 2, "Hkv": 1, "Lq": 21, "Lk": 35, "n": 80}
            o = reference(program, *operands, sizes, {}, rest, 0.25)["o"]
        else:
            o = al.compile(program, backend="triton")(*operands, **rest, scale=0.25)
        weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return torch.autograd.grad((o.double() * weights).sum(), t)[0]

    torch.testing.assert_close(gradient(torch.float32).double(), gradient(torch.float64), atol=1e-4, rtol=1e-4)
    assert made == [runs]


def test_names_of_the_kernels_are_free_for_programs(made: list[bool]) -> None:
    """Captured tensors and scalars with names that kernels have for what they know of a row."""
    names = ("a0", "d_a1", "factor", "dp", "dot", "draw", "weight", "seen", "row_")
    score = s
    for name in names[:4]:
        score = op("add", score, Load(name, (k,), FLOAT))
    for name in names[4:]:
        score = op("mul", score, param(name, FLOAT))
    tensors = (*TENSORS, *(TensorParam(n, FLOAT, (Size("Lk"),)) for n in names[:4]))
    scalars = tuple(ScalarParam(n, FLOAT, 1.0 + i / 8) for i, n in enumerate(names[4:]))
    program = Program("names", (scored(GIVEN["columns"], score),), scalars, tensors)
    given = {**leaves((1, 1), (9, 33), (16, 16)), **{n: torch.randn(33) for n in names[:4]}}

    def gradient(dtype: torch.dtype) -> tuple[Tensor, ...]:
        at = {n: t.to(dtype).requires_grad_() for n, t in given.items()}
        operands, rest = [at[n] for n in "qkv"], {t.name: at[t.name] for t in tensors}
        if dtype is torch.float64:
            sizes = {"B": 1, "H": 1, "Hkv": 1, "Lq": 9, "Lk": 33}
            found = reference(program, *operands, sizes, {x.name: x.default for x in scalars}, rest, 0.25)
        else:
            found = al.compile(program, backend="triton")(*operands, **rest, scale=0.25, return_aux=True)[1]
        return torch.autograd.grad(found["column"].square().sum(), [at[n] for n in ("q", "k", *names[:4])])

    for mine, want in zip(gradient(torch.float32), gradient(torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), want, atol=1e-4 * float(want.abs().max()), rtol=1e-4)
    assert made == [True]
