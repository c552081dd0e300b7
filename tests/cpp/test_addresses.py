"""C++ kernels find keys and values at addresses of their own, without a copy of them."""

from __future__ import annotations

import pytest
import torch
from address_cases import CASES, IDS, TEXT, check

import attnlang as al
from attnlang.runtime import gathers


@pytest.fixture
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("rows were gathered")

    monkeypatch.setattr(gathers, "operand_rows", refuse)


@pytest.mark.usefixtures("no_copies", "lightly_optimised")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_addresses(case, dtype) -> None:
    check(case, "cpp", dtype, 24)


def test_rows_are_gathered_for_gradients() -> None:
    """Backward kernels read rows at the usual addresses; every cached row gets the sum of what its readers send."""
    program = al.parse(TEXT, "pages")
    page = torch.tensor([[2, 2, 0], [1, 0, 3]])
    found = []
    for dtype, backend in ((torch.float64, "eager"), (torch.float32, "cpp")):
        torch.manual_seed(4)
        shapes = ((2, 2, 20, 16), (2, 1, 40, 16), (2, 1, 40, 16))
        leaves = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
        o = al.compile(program, backend=backend)(*leaves, page=page)
        found.append([o, *torch.autograd.grad((o * torch.linspace(-1, 1, 16)).sum(), leaves)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("lightly_optimised")
def test_nothing_to_read() -> None:
    program = al.parse(TEXT, "pages")
    q, k = torch.randn(2, 2, 5, 16), torch.randn(2, 1, 0, 16)
    o = al.compile(program)(q, k, k, page=torch.zeros(2, 3, dtype=torch.int64))
    want = al.compile(program, backend="eager")(q, k, k, page=torch.zeros(2, 3, dtype=torch.int64))
    torch.testing.assert_close(o, want)
