"""Keys and values at addresses of their own in Triton's interpreter, against the float64 executor."""

from __future__ import annotations

import pytest
import torch
from address_cases import CASES, IDS, check


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_addresses(case) -> None:
    check(case, "triton", torch.float32, 16)
