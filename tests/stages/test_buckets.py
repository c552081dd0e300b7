"""Stages with groups and keyed outputs run in kernels, in both directions, and mean what the reference says."""

from __future__ import annotations

import pytest
from bucket_cases import PROGRAMS, SHARP, SMOOTH, compare, leaves

from attnlang.grammar import parse
from attnlang.runtime import buckets, regions

LENGTH = 70


@pytest.fixture
def no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be left to the blockwise executor."""
    monkeypatch.setattr(regions, "_forward", None)
    monkeypatch.setattr(regions, "_backward", None)


@pytest.mark.usefixtures("unoptimised", "no_blocks")
@pytest.mark.parametrize("name", SMOOTH)
def test_values_and_gradients(name: str) -> None:
    compare(PROGRAMS[name], leaves(PROGRAMS[name], LENGTH), "cpp")


@pytest.mark.usefixtures("unoptimised", "no_blocks")
@pytest.mark.parametrize("name", SHARP)
def test_extrema(name: str) -> None:
    compare(PROGRAMS[name], leaves(PROGRAMS[name], LENGTH), "cpp", wanted=False)


@pytest.mark.usefixtures("unoptimised", "no_blocks")
def test_buckets_may_run_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "MOST", 1)
    compare(PROGRAMS["softmax_in_groups"], leaves(PROGRAMS["softmax_in_groups"], LENGTH), "cpp")


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize(("name", "length"), [("softmax_in_groups", 0), ("block_sums", 0), ("softmax_in_groups", 1)])
def test_short_rows(name: str, length: int) -> None:
    compare(PROGRAMS[name], leaves(PROGRAMS[name], length), "")


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("backend", ["", "cpp"])
def test_gradients_of_extrema(backend: str) -> None:
    """They are made by the blockwise executor: in one pass, or where kernels are asked for bucket by bucket."""
    compare(PROGRAMS["block_maxima"], leaves(PROGRAMS["block_maxima"], LENGTH), backend)


SCATTERED = """
pattern scattered:
    output mass = sum(w, over=k, key=(7 * q + 5 * k) % 24, extent=24)

pattern bands:
    output mass = sum(w, over=k, key=(q - k + 960) // 80, extent=24)
"""


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize(("name", "in_kernels"), [("scattered", False), ("bands", True)])
def test_many_passes_are_left_to_the_blockwise_executor(
    name: str, in_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty-four buckets, all of which have pairs in every tile, or each along a few diagonals."""
    program, ran = parse(SCATTERED).patterns[name], []
    forward = regions._forward
    monkeypatch.setattr(regions, "_forward", lambda work: ran.append(work) or forward(work))
    compare(program, leaves(program, 960, (1, 1)), "", wanted=False)
    assert bool(ran) != in_kernels
