"""Stages with groups and keyed outputs run in kernels, in both directions, and mean what the reference says."""

from __future__ import annotations

import pytest
from bucket_cases import PROGRAMS, SHARP, SMOOTH, compare, leaves

from attnlang.runtime import regions

LENGTH = 70


@pytest.fixture
def no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be left to the blockwise executor."""
    monkeypatch.setattr(regions, "_forward", None)
    monkeypatch.setattr(regions, "_backward", None)


@pytest.mark.usefixtures("lightly_optimised", "no_blocks")
@pytest.mark.parametrize("name", SMOOTH)
def test_values_and_gradients(name: str) -> None:
    compare(PROGRAMS[name], leaves(PROGRAMS[name], LENGTH), "cpp")


@pytest.mark.usefixtures("lightly_optimised", "no_blocks")
@pytest.mark.parametrize("name", SHARP)
def test_extrema(name: str) -> None:
    compare(PROGRAMS[name], leaves(PROGRAMS[name], LENGTH), "cpp", wanted=False)
