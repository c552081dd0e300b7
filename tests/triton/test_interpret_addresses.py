"""Keys and values at addresses of their own in Triton's interpreter, against the float64 executor."""

from __future__ import annotations

import pytest
import torch
from address_cases import CASES, IDS, check

import attnlang as al


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_addresses(case) -> None:
    check(case, "triton", torch.float32, 16)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_names_that_the_kernel_gives_to_tensors() -> None:
    program = al.parse("""
pattern p(page: int[P], page_ptr: int = 2, page_size0: int = 3, k_row: float[H], k_rows: int = 0):
    keys = K[b, 0, page[k // 4] * 4 + k % 4]
    values = V[b, 0, page[k // 4] * 4 + k % 4]
    mask = k <= q + page_ptr
    score = s * k_row[h] + page_size0 + k_rows
""")
    q, k, v = torch.randn(1, 2, 9, 16), torch.randn(1, 1, 20, 16), torch.randn(1, 1, 20, 16)
    given = {"page": torch.tensor([3, 1, 4]), "k_row": torch.rand(2)}
    found = al.compile(program, backend="triton")(q, k[:, :, :20], v, return_lse=True, **given)
    want = al.reference(program, q, k, v, return_lse=True, **given)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=2e-5)
