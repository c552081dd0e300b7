"""Stages with groups and keyed outputs in interpreted Triton kernels, values and gradients."""

from __future__ import annotations

import pytest
from bucket_cases import PROGRAMS, SMOOTH, compare, leaves

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("name", SMOOTH)
def test_values_and_gradients(name: str, made: list[bool]) -> None:
    compare(PROGRAMS[name], leaves(PROGRAMS[name], 35, (2, 1)), "triton")
    assert all(made), "no kernel ran"
