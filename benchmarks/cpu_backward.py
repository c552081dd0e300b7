"""Training steps on the CPU: forward and backward against SDPA, and against dense autograd for masks SDPA lacks.

Also what gradients of captured tensors add to the backward pass, and memory as the length grows. flex_attention is not
in the table because its backward pass refuses to run on a CPU. ``--quick`` takes N = 512 and saves nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import save
from torch import Tensor

import attnlang as al
from attnlang.measure import interleaved, peak_memory

HEADS = 8
CPU = torch.device("cpu")
OURS = "attnlang"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

LEARNABLE = """
pattern relative_bias(t: float[H, W]):
    mask = k <= q
    score = s + t[h, min(max(q - k, 0), W - 1)]

pattern slopes(t: float[H]):
    mask = k <= q
    score = s + t[h] * (k - q)

pattern pair_table(t: float[H, Lq, Lk]):
    mask = k <= q
    score = s + t[h, q, k]
"""


def step(attend: Attend, operands: list[Tensor], do: Tensor) -> Callable[[], object]:
    """One forward and backward pass."""
    return lambda: torch.autograd.grad(attend(*operands), operands, do)


def dense(mask: Tensor, bias: Tensor | None = None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores if bias is None else scores + bias
        return torch.softmax(scores.masked_fill(~mask, -math.inf), -1) @ v

    return attend


def against_peers(length: int, dim: int) -> list[dict[str, object]]:
    q, k, v, do = (torch.randn(1, HEADS, length, dim) for _ in range(4))
    operands = [t.requires_grad_() for t in (q, k, v)]
    at = torch.arange(length)
    distance = at[:, None] - at[None]
    doc = torch.arange(length)[None] // (length // 8)
    same = doc[0][:, None] == doc[0][None]
    slope = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS)
    alibi = slope[:, None, None] * -distance
    library = al.library
    cases: list[tuple[str, Attend, str, Attend]] = [
        ("full", al.compile(library.full), "SDPA", F.scaled_dot_product_attention),
        ("causal", al.compile(library.causal), "SDPA", lambda *x: F.scaled_dot_product_attention(*x, is_causal=True)),
    ]
    window, packed, slopes = (
        al.compile(p) for p in (library.causal_sliding_window, library.causal_document, library.causal_alibi)
    )
    cases += [
        ("window 512", lambda *x: window(*x, window=512), "dense", dense((distance >= 0) & (distance <= 512))),
        ("document", lambda *x: packed(*x, doc=doc), "dense", dense((distance >= 0) & same)),
        ("alibi", lambda *x: slopes(*x, slope=slope), "dense", dense(distance >= 0, alibi)),
    ]
    rows: list[dict[str, object]] = []
    for name, ours, peer_name, peer in cases:
        times = interleaved({OURS: step(ours, operands, do), peer_name: step(peer, operands, do)}, CPU, rounds=5)
        mine, theirs = times[OURS].median, times[peer_name].median
        rows.append(
            {
                "table": "peers",
                "case": f"{name}, N = {length}, D = {dim}",
                "attnlang_ms": mine,
                "peer": peer_name,
                "peer_ms": theirs,
                "ratio": theirs / mine,
            }
        )
        print(
            "{case:<28} attnlang {attnlang_ms:8.1f} ms   {peer:>5} {peer_ms:8.1f} ms   x{ratio:.2f}".format(**rows[-1])
        )
    return rows


def captured(length: int, dim: int) -> list[dict[str, object]]:
    """Time of the backward pass with and without the gradient of the captured tensor."""
    q, k, v, do = (torch.randn(1, HEADS, length, dim) for _ in range(4))
    operands = [t.requires_grad_() for t in (q, k, v)]
    shapes = {"relative_bias": (HEADS, length), "slopes": (HEADS,), "pair_table": (HEADS, length, length)}
    rows: list[dict[str, object]] = []
    for name, shape in shapes.items():
        attn = al.compile(al.parse(LEARNABLE, name))
        table = torch.randn(shape) * 0.1
        learned = table.clone().requires_grad_()

        def run(t: Tensor, inputs: list[Tensor], attn: al.Attention = attn) -> tuple[Callable[[], object], ...]:
            out = attn(*operands, t=t)
            return (lambda: torch.autograd.grad(out, inputs, do, retain_graph=True),)

        (plain,), (with_grad,) = run(table, operands), run(learned, [*operands, learned])
        times = interleaved({"without": plain, "with": with_grad}, CPU, rounds=7)
        base, full = times["without"].median, times["with"].median
        rows.append(
            {
                "table": "captured",
                "case": f"{name}, N = {length}, D = {dim}",
                "without_ms": base,
                "with_ms": full,
                "added_percent": 100 * (full / base - 1),
            }
        )
        print(
            "{case:<32} backward {without_ms:8.1f} ms, with gradient {with_ms:8.1f} ms (+{added_percent:.0f} %)".format(
                **rows[-1]
            )
        )
    return rows


def memory(lengths: tuple[int, ...], dim: int = 64) -> list[dict[str, object]]:
    """Peak memory of one step of causal attention with a window, one head."""
    attn = al.compile(al.library.causal_sliding_window)
    warm = [torch.randn(1, 1, 1024, dim, requires_grad=True) for _ in range(3)]
    step(lambda *x: attn(*x, window=512), warm, warm[0].detach())()  # builds the kernels and starts threads
    rows: list[dict[str, object]] = []
    for length in lengths:
        operands = [torch.randn(1, 1, length, dim, requires_grad=True) for _ in range(3)]
        do = torch.randn(1, 1, length, dim)
        one = step(lambda *x: attn(*x, window=512), operands, do)
        peak = peak_memory(one, CPU)
        tensors = 4 * length * dim * 4
        rows.append(
            {"table": "memory", "case": f"N = {length}", "peak_mib": peak.bytes / 2**20, "one_set_mib": tensors / 2**20}
        )
        print(
            "{case:<12} peak {peak_mib:8.1f} MiB beyond the inputs (q, k, v and o: {one_set_mib:.1f} MiB)".format(
                **rows[-1]
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="N = 512, nothing is saved")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for length in (512,) if quick else (2048, 4096):
        for dim in (64, 128):
            rows += against_peers(length, dim)
    rows += captured(512 if quick else 2048, 64)
    rows += memory((1024, 2048) if quick else (4096, 16384, 65536))
    if not quick:
        save("cpu_backward", rows, CPU)


if __name__ == "__main__":
    main()
