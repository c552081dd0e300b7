"""Corners of a tile that a mask hides cost no products, and nothing else: any outline, on every instruction set."""

from __future__ import annotations

import pytest
import torch

import attnlang as al
from attnlang.codegen.isa import ISAS
from attnlang.runtime.toolchain import processor_features

PLAIN = """
pattern plain(seen: bool[Lq, Lk]):
    mask = seen[q, k]
    score = s + 0.01 * (q - k)
"""
MORE = """
pattern more(seen: bool[Lq, Lk], gate: float[Lk]):
    mask = seen[q, k]
    normalize = softmax(sink=0.5)
    weights = w * tanh(raw) + gate[k] * w
    output received = sum(w * raw, over=q)
    output best = argmax(s, over=k)
"""


def outlines(lq: int, lk: int) -> dict[str, torch.Tensor]:
    q, k = torch.arange(lq)[:, None], torch.arange(lk)
    one = torch.zeros(lq, lk, dtype=torch.bool)
    one[37 % lq, 41 % lk] = True
    two = one.clone()
    two[3 % lq, 90 % lk] = True
    return {
        "below": k <= q,
        "above": k >= q,
        "band": (q - k).abs() <= 5,
        "corner": (q % 64 >= 32) & (k % 64 < 32),
        "blocks": q // 24 == k // 24,
        "one pair": one,
        "two pairs": two,
        "stripes": (q + k) % 3 == 0,
        "late": (k >= lk - 3).expand(lq, lk),
    }


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("isa", list(ISAS))
@pytest.mark.parametrize("text", [PLAIN, MORE], ids=["plain", "more"])
def test_outlines(text: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ISAS[isa].needs <= processor_features():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("ATTNLANG_ISA", isa)
    program = al.parse(text)
    attention = al.compile(program, backend="cpp")
    torch.manual_seed(0)
    for lq, lk in ((130, 150), (37, 3), (64, 99)):
        q, k, v = torch.randn(1, 1, lq, 24), torch.randn(1, 1, lk, 24), torch.randn(1, 1, lk, 40)
        captured = {"gate": torch.randn(lk)} if "gate" in text else {}
        for name, seen in outlines(lq, lk).items():
            got = attention(q, k, v, seen=seen, **captured, return_aux=True)
            want = al.reference(program, q, k, v, seen=seen, **captured, return_aux=True)
            found, exact = ({"o": x[0]} | x[1] if isinstance(x, tuple) else x for x in (got, want))
            for out, value in exact.items():
                message = f"{name} {lq} x {lk} {out}"
                if value.dtype is torch.int64:
                    assert torch.equal(found[out], value), message
                else:
                    torch.testing.assert_close(
                        found[out].double(), value, rtol=2e-5, atol=2e-5, msg=lambda m, w=message: f"{w}: {m}"
                    )
