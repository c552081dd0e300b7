"""What the command line is made of: made-up values, peers, measurements, the blockwise reference."""

from __future__ import annotations

import math

import pytest
import torch

import attnlang as al
from attnlang.cli_work import Job
from attnlang.ir import Index, UsageError, build, dense_mask, reference_attention
from attnlang.made import make_values
from attnlang.measure import interleaved, peak_memory
from attnlang.peers import Bindings, CannotExpress, dense_bias, flex, sdpa, torch_function
from attnlang.report import bindings, reference_in_blocks

CPU = torch.device("cpu")
SIZES = {"B": 2, "H": 4, "Hkv": 2, "Lq": 64, "Lk": 64}
EXTRA = {
    "prefix": 8,
    "visual": 16,
    "context": 32,
    "short": 2,
    "frames": 4,
    "frame": 16,
    "height": 4,
    "width": 4,
    "prompt": 32,
    "references": 16,
    "pixels": 16,
    "channels": 4,
    "content": 32,
    "since": 8,
}
"""Scalars that library programs cannot do without and that no grid gives."""


def job(name: str, sizes: dict[str, int] = SIZES) -> Job:
    program = getattr(al.library, name)
    given = {p.name: EXTRA[p.name] for p in program.scalars if p.default is None and p.name in EXTRA}
    made = make_values(program, sizes, given)
    q = torch.randn(sizes["B"], sizes["H"], sizes["Lq"], 8)
    k, v = (torch.randn(sizes["B"], sizes["Hkv"], sizes["Lk"], 8) for _ in range(2))
    return Job(program, q, k, v, made.values, made.notes)


@pytest.mark.parametrize("name", al.library.names(standard=True))
def test_made_values_fit_every_library_program(name: str) -> None:
    """Made values bind, and as plain torch functions the mask and the score mean what the reference says."""
    made = job(name)
    bound, _ = bindings(al.compile(made.program), made)
    program = al.compile(made.program).program
    axes = [
        torch.arange(SIZES[n]).view([-1 if d == i else 1 for d in range(4)])
        for i, n in enumerate(("B", "H", "Lq", "Lk"))
    ]
    want = dense_mask(program, bound.sizes, bound.params, bound.tensors)
    got = torch_function(program.mask, ("b", "h", "q", "k"), bound)(*axes)
    assert torch.equal(got.expand(want.shape), want)


def test_made_values_are_reproducible_and_depend_on_the_seed() -> None:
    program = al.library.causal_document
    first, again, other = (make_values(program, SIZES, {}, seed=s).values["doc"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.diff(dim=-1) >= 0).all()


def test_offsets_and_sequences_agree() -> None:
    values = make_values(al.library.jagged, SIZES, {}).values
    offsets, sequence = values["offsets"], values["sequence"]
    assert offsets[0] == 0
    assert offsets[-1] == SIZES["Lk"]
    assert int(sequence.max()) + 1 < len(offsets)


def test_made_values_refuse_unknown_names() -> None:
    with pytest.raises(UsageError, match="no parameter 'windw'"):
        make_values(al.library.sliding_window, SIZES, {"windw": 3})
    with pytest.raises(UsageError, match="--set prefix="):
        make_values(al.library.shared_prefix, SIZES, {})


@pytest.mark.parametrize("name", ["causal_document", "alibi", "softcap", "full", "causal_alibi", "t5_causal"])
def test_peers_agree_with_the_reference(name: str) -> None:
    made = job(name)
    attention = al.compile(made.program)
    bound, scale = bindings(attention, made)
    want, _ = reference_attention(
        attention.program, made.q, made.k, made.v, bound.sizes, bound.params, bound.tensors, scale
    )
    with torch.compiler.set_stance("force_eager"):
        got = flex(attention.program, bound, scale, CPU)(made.q, made.k, made.v)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)
    try:
        dense = sdpa(attention.program, bound, scale, torch.float32, CPU)
    except CannotExpress:
        assert name == "softcap"
    else:
        torch.testing.assert_close(dense(made.q, made.k, made.v).double(), want, atol=2e-5, rtol=0)


def test_dense_bias_of_a_mask_alone_is_bool() -> None:
    made = job("causal")
    bound, _ = bindings(al.compile(made.program), made)
    bias = dense_bias(made.program, bound, torch.float32, CPU)
    assert bias is not None
    assert bias.dtype is torch.bool
    assert bias.shape == (1, 1, 64, 64)


def test_torch_function_of_numbers_is_a_tensor() -> None:
    bound = Bindings(SIZES, {}, {})
    assert bool(torch_function(build.TRUE, ("q",), bound)(torch.tensor(3)))
    folded = build.op("add", build.const(1), build.const(2))
    assert int(torch_function(folded, ("q",), bound)(torch.tensor(0))) == 3
    assert int(torch_function(Index("q"), ("q",), bound)(torch.tensor(5))) == 5


@pytest.mark.parametrize("name", ["causal_document", "causal_alibi", "prefix_lm"])
def test_blockwise_reference_is_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import attnlang.report

    monkeypatch.setattr(attnlang.report, "BLOCK", 64 * 20)
    made = job(name)
    attention = al.compile(made.program)
    bound, scale = bindings(attention, made)
    want, want_lse = reference_attention(
        attention.program, made.q, made.k, made.v, bound.sizes, bound.params, bound.tensors, scale
    )
    seen = 0
    for b, h, rows, out, lse, _ in reference_in_blocks(attention.program, made.q, made.k, made.v, bound, scale):
        torch.testing.assert_close(out, want[b, h, rows], atol=1e-12, rtol=0)
        torch.testing.assert_close(lse, want_lse[b, h, rows], atol=1e-12, rtol=0)
        seen += out.shape[0]
    assert seen == 2 * 4 * 64


def test_blockwise_reference_of_rows_without_keys() -> None:
    made = job("causal_bottom_right", {**SIZES, "Lk": 32})
    attention = al.compile(made.program)
    bound, scale = bindings(attention, made)
    blocks = list(reference_in_blocks(attention.program, made.q, made.k, made.v, bound, scale))
    out, lse = blocks[0][3], blocks[0][4]
    assert (out[:32] == 0).all()
    assert (lse[:32] == -math.inf).all()
    assert lse[32:].isfinite().all()


def test_interleaved_times_everything_equally_often() -> None:
    order: list[str] = []
    times = interleaved({n: lambda n=n: order.append(n) for n in "ab"}, CPU, rounds=3)
    assert order == ["a", "b"] * 4
    assert times["a"].calls == times["b"].calls == 3
    assert times["a"].low <= times["a"].median <= times["a"].high


def test_peak_memory_sees_a_large_allocation() -> None:
    size = 64 << 20
    found = peak_memory(lambda: torch.ones(size // 4).sum(), CPU)
    assert float(found.result) == size // 4
    assert size * 0.8 < found.bytes < size * 2
