"""Running out of shared memory is never the user's problem: a smaller tile, and at last the eager executor, serve."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from triton.runtime.errors import OutOfResources
from triton_checks import make_call, qkv

import attnlang as al
from attnlang.codegen.triton_tiles import candidates, shared_bytes, shared_limit
from attnlang.ir import simple
from attnlang.ir.build import k, op, q
from attnlang.runtime import Unavailable, dispatch, triton_common
from attnlang.runtime import triton as forward_pass
from attnlang.runtime import triton_backward as backward_pass

CAUSAL = simple("causal", mask=op("le", k, q))
TILES = (forward_pass.Config(64, 32, 4, 1), forward_pass.Config(32, 32, 4, 1), forward_pass.Config(16, 16, 4, 1))


class Chip:
    """A made-up GPU: launches whose query tile is larger than ``limit`` run out of shared memory, and its compiler
    fails on a query tile of ``fails``."""

    def __init__(self) -> None:
        self.limit = 0
        self.fails = 0
        self.tried: list[int] = []
        self.configs: dict[Callable[..., object], int] = {}


@pytest.fixture
def chip(monkeypatch) -> Chip:
    """Serve CPU tensors with kernels that have three tiles, on a chip that is too small for some of them."""
    made, load, launch = Chip(), triton_common.Kernel._launcher, triton_common._launch

    def launcher(self, config):
        found = load(self, config)
        made.configs[found] = config.block_m
        return found

    def run(launcher, arguments):
        made.tried.append(made.configs[launcher])
        if made.configs[launcher] > made.limit:
            raise OutOfResources(1 << 20, 1 << 16, "shared memory")
        if made.configs[launcher] == made.fails:
            raise RuntimeError("failed to translate module to LLVM IR")
        return launch(launcher, arguments)

    monkeypatch.setattr(triton_common.Kernel, "_launcher", launcher)
    monkeypatch.setattr(triton_common, "_launch", run)
    monkeypatch.setattr(forward_pass, "candidates", lambda *_, **__: TILES)
    monkeypatch.setattr(backward_pass, "candidates", lambda *_: TILES)
    monkeypatch.setitem(dispatch._OF_DEVICE, "cpu", "triton")
    for module in (forward_pass, backward_pass):
        monkeypatch.setattr(module, "_kernels", triton_common.Kernels())
    dispatch._warn_once.cache_clear()
    return made


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=2e-5, rtol=2e-5)


def test_the_largest_tile_that_fits_serves_and_is_remembered(chip):
    chip.limit = 32
    call = make_call(CAUSAL, *qkv(lq=70, lk=70))
    want, _ = al.reference(CAUSAL, call.q, call.k, call.v, return_lse=True)
    for tried in ([64, 32], [64, 32, 32]):
        close(forward_pass.forward(call)[0], want)
        assert chip.tried == tried


def test_where_no_tile_fits_the_eager_executor_serves_with_one_warning(chip):
    attention, operands = al.compile(CAUSAL), qkv(lq=70, lk=70)
    want = al.reference(CAUSAL, *operands)
    message = (
        "the triton backend cannot run this call: no tile of causal with head dimensions 16 and 16 in float32 fits"
    )
    with pytest.warns(RuntimeWarning, match=message) as caught:
        for _ in range(3):
            close(attention(*operands), want)
    assert len(caught) == 1
    assert chip.tried == [64, 32, 16], "a kernel that fits nowhere must not be tried again"


def test_a_named_backend_says_that_no_tile_fits(chip):
    with pytest.raises(Unavailable, match=r"no tile of causal .* fits interpret"):
        al.compile(CAUSAL, backend="triton")(*qkv(lq=20, lk=20))


def test_a_tile_on_which_the_compiler_fails_is_left(chip):
    chip.limit, chip.fails = 64, 64
    operands = qkv(lq=40, lk=40)
    close(al.compile(CAUSAL)(*operands), al.compile(CAUSAL, backend="eager")(*operands))
    assert chip.tried == [64, 32]


def test_where_the_compiler_fails_on_every_tile_the_error_says_so(chip):
    chip.limit, chip.fails = 16, 16
    with pytest.raises(Unavailable, match="Triton's compiler fails: failed to translate module"):
        al.compile(CAUSAL, backend="triton")(*qkv(lq=20, lk=20))


@pytest.mark.parametrize("forward_fits", [True, False])
def test_gradients_where_no_tile_of_the_backward_pass_fits(chip, forward_fits):
    operands = [t.requires_grad_() for t in qkv(lq=40, lk=40)]
    wanted = torch.autograd.grad(al.compile(CAUSAL, backend="eager")(*operands).square().sum(), operands)
    chip.limit = 64 if forward_fits else 0
    with warnings.catch_warnings():
        # the backward pass falls back without a word
        warnings.simplefilter("error" if forward_fits else "ignore", RuntimeWarning)
        out = al.compile(CAUSAL)(*operands)
        chip.limit = 0
        found = torch.autograd.grad(out.square().sum(), operands)
    assert chip.tried[-3:] == [64, 32, 16]
    for got, want in zip(found, wanted, strict=True):
        close(got, want)


def test_gradients_at_a_smaller_tile(chip):
    operands = [t.requires_grad_() for t in qkv(lq=40, lk=40)]
    wanted = torch.autograd.grad(al.compile(CAUSAL, backend="eager")(*operands).square().sum(), operands)
    chip.limit = 16
    found = torch.autograd.grad(al.compile(CAUSAL)(*operands).square().sum(), operands)
    assert chip.tried == [64, 32, 16] * 3
    for got, want in zip(found, wanted, strict=True):
        close(got, want)


def test_float32_rows_of_512_on_amd_chips_fit_no_tile():
    call = make_call(CAUSAL, *qkv(dim=512))
    plan = triton_common.plan_of(call)
    target = "hip:gfx942"
    left = candidates(plan, target)
    assert left, "a launch still has to try, as the model only estimates"
    assert all(shared_bytes(plan, config) > shared_limit(target) for config in left)
