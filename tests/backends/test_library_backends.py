"""Every program of the library, called through the public API, on every backend of a CPU machine.

The other side of each comparison is the hand-written dense definition in float64, never our own reference.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from library.cases import BROAD, CASES, Instance, program_of

import attnlang as al

Tensor = torch.Tensor
RESIZABLE = [n for n, c in BROAD.items() if c.resizable]
LENGTHS = (0, 1, 7, 127, 129, 1000)
HEAD_DIMS = (8, 64, 80, 128, 192, 256)
FLOAT_TOLERANCE = 2e-5


def call(instance: Instance, operands: tuple[Tensor, ...], backend: str, scale: float) -> tuple[Tensor, Tensor]:
    program = program_of(instance)
    static = {p.name for p in program.scalars if p.static}
    fixed = {n: v for n, v in instance.params.items() if n in static}
    given = {n: v for n, v in instance.params.items() if n not in static}
    attn = al.compile(program, backend=backend, **fixed)
    return attn(*operands, return_lse=True, scale=scale, **given, **instance.captured)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def check_float32(instance: Instance, backend: str, d: int = 24, dv: int | None = None, strided: bool = False) -> None:
    operands = tuple(x.float() for x in instance.operands(d, dv, torch.float32))
    if strided:
        operands = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands)
    scale = d**-0.5
    o, lse = call(instance, operands, backend, scale)
    want, want_lse = instance.dense_attention(*(x.double() for x in operands), scale)
    assert o.dtype is torch.float32 and lse.dtype is torch.float32
    close(o, want, FLOAT_TOLERANCE)
    close(lse, want_lse, FLOAT_TOLERANCE)
    empty = torch.isneginf(want_lse)
    assert (o[empty] == 0).all() and torch.isneginf(lse[empty]).all()


@pytest.mark.parametrize("name", BROAD)
def test_float32_without_kernels(name: str) -> None:
    check_float32(CASES[name].instance("medium"), "eager", dv=40)


OPTIMISED = list(BROAD)[::3]


@pytest.mark.parametrize("name", OPTIMISED)
def test_float32(name: str) -> None:
    check_float32(CASES[name].instance("medium"), "cpp", dv=40)


@pytest.mark.usefixtures("lightly_optimised")
@pytest.mark.parametrize("name", [name for name in BROAD if name not in OPTIMISED])
def test_float32_lightly_optimised(name: str) -> None:
    check_float32(CASES[name].instance("medium"), "cpp", dv=40)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in CASES if name not in OPTIMISED])
def test_float32_of_the_others(name: str) -> None:
    check_float32(CASES[name].instance("medium"), "cpp", dv=40)


@pytest.mark.usefixtures("lightly_optimised")
@pytest.mark.parametrize("name", [name for name in CASES if name not in BROAD])
def test_float32_of_light_cases(name: str) -> None:
    check_float32(CASES[name].instance("medium"), "cpp", dv=40)


@pytest.mark.usefixtures("lightly_optimised")
@pytest.mark.parametrize("name", RESIZABLE)
def test_lengths(name: str) -> None:
    for length in LENGTHS:
        check_float32(CASES[name].at(length), "cpp", strided=length == 129)


EVERY_HEAD_DIM = [(name, HEAD_DIMS[(i + j) % 6]) for i, name in enumerate(BROAD) for j in range(6)]
"""A sixth of these pairs is run with every change, each program once; `make test-long` runs the rest."""


@pytest.mark.usefixtures("lightly_optimised")
@pytest.mark.parametrize("name, d", EVERY_HEAD_DIM[::6])
def test_head_dims(name: str, d: int) -> None:
    check_float32(CASES[name].instance("tiny"), "cpp", d)


@pytest.mark.long
@pytest.mark.usefixtures("lightly_optimised")
@pytest.mark.parametrize("name, d", [x for i, x in enumerate(EVERY_HEAD_DIM) if i % 6])
def test_other_head_dims(name: str, d: int) -> None:
    check_float32(CASES[name].instance("tiny"), "cpp", d)


def check_four_thousand_tokens(name: str) -> None:
    case = CASES[name]
    shape = replace(case.medium.shape, H=2, Hkv=2)
    instance = replace(case, medium=replace(case.medium, shape=shape)).at(4096)
    operands = tuple(x.float() for x in instance.operands(64, None, torch.float32))
    o, lse = call(instance, operands, "cpp", 0.125)
    want, want_lse = instance.dense_attention(*(x.double() for x in operands), 0.125)
    close(o, want, FLOAT_TOLERANCE)
    close(lse, want_lse, FLOAT_TOLERANCE)


@pytest.mark.parametrize("name", ["causal", "causal_document", "alibi"])
def test_four_thousand_tokens(name: str) -> None:
    check_four_thousand_tokens(name)


@pytest.mark.long
@pytest.mark.parametrize("name", RESIZABLE)
def test_four_thousand_tokens_of_every_program(name: str) -> None:
    check_four_thousand_tokens(name)


def dense_in(dtype: torch.dtype, instance: Instance, operands: tuple[Tensor, ...], scale: float) -> Tensor:
    """What a user's dense PyTorch code gives in ``dtype``: scores and weights rounded to it, sums in float32."""
    q, k, v = operands
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * scale
    if instance.case.score is not None:
        scores = instance.case.score(scores.double(), instance.points).to(dtype)
    mask = instance.dense_mask()
    scores = scores.masked_fill(~mask, -math.inf)
    empty = ~mask.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0).float(), -1).masked_fill(empty, 0.0).to(dtype)
    return weights @ v


HALF = [(name, (torch.bfloat16, torch.float16)[i % 2]) for i, name in enumerate(BROAD)]
OTHER_HALF = [(name, (torch.bfloat16, torch.float16)[(i + 1) % 2]) for i, name in enumerate(BROAD)]


@pytest.mark.usefixtures("lightly_optimised")
@pytest.mark.parametrize("name, dtype", [*HALF, *(pytest.param(*x, marks=pytest.mark.long) for x in OTHER_HALF)])
def test_half_precision_loses_at_most_twice_what_dense_pytorch_loses(name: str, dtype: torch.dtype) -> None:
    instance = CASES[name].instance("medium")
    operands = tuple(x.to(dtype) for x in instance.operands(32, None, dtype))
    scale = 32**-0.5
    o, _ = call(instance, operands, "cpp", scale)
    want, _ = instance.dense_attention(*(x.double() for x in operands), scale)
    theirs = (dense_in(dtype, instance, operands, scale).double() - want).abs().max().item()
    ours = (o.double() - want).abs().max().item()
    floor = torch.finfo(dtype).eps * max(1.0, want.abs().max().item()) / 2  # rounding of the output alone
    assert o.dtype is dtype
    assert ours <= max(2 * theirs, floor), (ours, theirs)
