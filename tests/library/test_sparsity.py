"""The proved run maps of the library's programs against their dense masks: no tile is wrongly empty or full."""

from __future__ import annotations

import pytest
import torch
from library.cases import CASES, bind, program_of

from attnlang.sparsity import EMPTY, FULL, analyse

Tensor = torch.Tensor


def tiles(mask: Tensor, side: int) -> Tensor:
    """Cut [B, H, Lq, Lk] into [B, H, nq, nk, side * side]; what lies outside is False."""
    lq, lk = mask.shape[-2:]
    mask = torch.nn.functional.pad(mask, (0, -lk % side, 0, -lq % side))
    return mask.unfold(-2, side, side).unfold(-2, side, side).flatten(-2)


@pytest.mark.parametrize("side", [16, 48])
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.mask is not None])
def test_run_maps_are_sound(name: str, side: int) -> None:
    instance = CASES[name].instance("medium")
    program = program_of(instance)
    sizes, params = bind(program, instance)
    runs = analyse(program, sizes, params, instance.captured, (side, side))
    mask = instance.dense_mask()
    seen, inside = tiles(mask, side), tiles(torch.ones_like(mask), side)
    kinds = torch.from_numpy(runs.dense_kinds()).expand(seen.shape[:-1])
    assert not (seen.any(-1) & (kinds == EMPTY)).any()
    assert not ((inside & ~seen).any(-1) & (kinds == FULL)).any()


EXACT = ("causal", "causal_sliding_window", "document", "sparse_transformer_fixed", "streaming_llm", "log_sparse")
EXACT += (
    "neighborhood_1d",
    "neighborhood_2d",
    "circular_window",
    "cswin",
    "halo",
    "duo_attention",
    "prefix_lm",
    "jagged",
)


@pytest.mark.parametrize("name", EXACT)
def test_empty_tiles_of_these_are_all_found(name: str) -> None:
    """Programs whose text is written so that the analysis misses nothing; a rewrite must not lose that."""
    instance = CASES[name].instance("medium")
    program = program_of(instance)
    sizes, params = bind(program, instance)
    runs = analyse(program, sizes, params, instance.captured, (16, 16))
    seen = tiles(instance.dense_mask(), 16)
    kinds = torch.from_numpy(runs.dense_kinds()).expand(seen.shape[:-1])
    assert torch.equal(kinds == EMPTY, ~seen.any(-1))
