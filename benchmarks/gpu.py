"""Forward on the GPU that is present against compiled flex_attention and SDPA in one run; correctness comes first,
also that of gradients beyond softmax.

Without a GPU it says so and ends well. ``--length N`` and ``--head-dim D`` change the shape (default 8192 and 64, 128).
"""

from __future__ import annotations

import argparse
import functools

import torch
from common import Case, compare, print_rows, save

import attnlang as al

HEADS = 16


def correct(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether a small packed causal call agrees with the reference within the error of ``dtype``."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 1000, head_dim, generator=random).to(device, dtype) for _ in range(3))
    doc = (torch.arange(1000, device=device) // 230).expand(2, -1)
    program = al.library.causal_document
    out = al.compile(program)(q, k, v, doc=doc)
    error = float((out.double() - al.reference(program, q, k, v, doc=doc)).abs().max())
    print(f"D = {head_dim}, {dtype}: greatest difference from the reference {error:.1e}")
    return error < (2e-2 if dtype is torch.bfloat16 else 4e-3 if dtype is torch.float16 else 2e-4)


def correct_beyond(device: torch.device) -> bool:
    """Whether stages beyond a mask and a score agree with the reference, outputs and gradients, in float32."""
    random = torch.Generator().manual_seed(0)
    given = [torch.randn(2, heads, 300, 64, generator=random).to(device) for heads in (4, 2, 2)]
    worst = 0.0
    for program in (al.library.cog, al.library.causal_received, al.library.rectified):
        found = []
        for make, dtype in ((al.compile(program), torch.float32), (functools.partial(al.reference, program), None)):
            leaves = [x.to(dtype or torch.float64).requires_grad_() for x in given]
            made = make(*leaves, return_aux=True)
            outs = [t for _, t in sorted((made if isinstance(made, dict) else {"o": made[0], **made[-1]}).items())]
            smooth = [t for t in outs if t.is_floating_point()]
            grads = torch.autograd.grad([t.square().sum() for t in smooth], leaves, allow_unused=True)
            found.append([*(t.detach() for t in smooth), *(g for g in grads if g is not None)])
        errors = [(a - b).abs().max() / b.abs().max().clamp(min=1e-3) for a, b in zip(*found, strict=True)]
        worst = max(worst, *map(float, errors))
    print(f"beyond softmax: greatest relative difference from the reference {worst:.1e}")
    return worst < 1e-3


def cases(device: torch.device, length: int, head_dim: int, dtype: torch.dtype) -> list[Case]:
    batch = max(1, 16384 // length)
    doc = (torch.arange(length, device=device) // max(1, length // 8)).expand(batch, -1)
    slope = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1, device=device) / HEADS)
    square, triangle = batch * HEADS * length * length, batch * HEADS * length * (length + 1) // 2
    shape = {"batch": batch, "heads": HEADS, "length": length, "head_dim": head_dim, "dtype": dtype}
    label = f", D = {head_dim}"
    return [
        Case("full" + label, al.library.full, **shape, pairs=square),
        Case("causal" + label, al.library.causal, **shape, pairs=triangle),
        Case("window 1024" + label, al.library.causal_sliding_window, **shape, values={"window": 1024}),
        Case("document" + label, al.library.causal_document, **shape, values={"doc": doc}),
        Case("alibi" + label, al.library.causal_alibi, **shape, values={"slope": slope}, pairs=triangle),
        Case("softcap" + label, al.library.softcap, **shape, values={"cap": 50.0}, pairs=square),
    ]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--length", type=int, default=8192)
    options.add_argument("--head-dim", type=int, action="append")
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is false): nothing to measure.")
        return 0
    device = torch.device("cuda")
    dtype = torch.bfloat16
    dims = given.head_dim or [64, 128]
    if not all(correct(device, d, dtype) for d in dims) or not correct_beyond(device):
        print("attnlang is wrong here; nothing is timed")
        return 1
    rows = []
    for head_dim in dims:
        for case in cases(device, given.length, head_dim, dtype):
            done = compare(case, device, rounds=20)
            print_rows(done)
            rows += done
    save("gpu", rows, device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
