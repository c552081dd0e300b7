"""A stage of two score terms in Triton's interpreter, values and gradients, against the float64 reference."""

from __future__ import annotations

import functools

import pytest
import torch

import attnlang as al

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_values_and_gradients() -> None:
    leaves = {"q": torch.randn(1, 2, 9, 16), "k": torch.randn(1, 1, 19, 16), "v": torch.randn(1, 1, 19, 16)}
    leaves["rho"] = torch.randn(1, 2, 9, 16) * 0.05
    found = []
    kernels = al.compile(al.library.local_linear, backend="triton")
    for run, dtype in ((functools.partial(al.reference, kernels), torch.float64), (kernels, torch.float32)):
        at = {n: t.to(dtype).requires_grad_() for n, t in leaves.items()}
        o = run(**at)
        weights = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape)
        found.append([o, *torch.autograd.grad((o.double() * weights).sum(), list(at.values()))])
    for want, got in zip(*found, strict=True):
        size = max(1e-3, float(want.detach().abs().max()))
        torch.testing.assert_close(got.double(), want, atol=1e-4 * size, rtol=0)
