"""Gradients of the generated Triton backward kernels, interpreted, against autograd through the float64 reference."""

from __future__ import annotations

import functools

import pytest
import torch
from attnlang.runtime import triton as forward_pass
from attnlang.runtime import triton_backward
from backward import cases
from backward.cases import LEARNABLE, make_call

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

both = functools.partial(cases.both, forward=forward_pass.forward, backward=triton_backward.backward)
check = functools.partial(cases.check, forward=forward_pass.forward, backward=triton_backward.backward)


@pytest.mark.parametrize("program, dims", LEARNABLE)
def test_learnable_captures(program, dims):
    tensors = {"t": torch.rand(dims) + 0.5} if program.tensors else {}
    check(make_call(program, (2, 4, 2, 37, 45, 16, 16), tensors))
