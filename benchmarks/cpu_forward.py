"""Forward on the CPU against compiled flex_attention and SDPA in one run: N = 4096, H = 8, D = 64, float32.

The five cases are full, causal, causal window of 512, causal inside packed documents, and causal with ALiBi.
``--dtype bfloat16`` (or float16) measures another type; ``--quick`` shortens N to 1024 and saves nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from common import OURS, Case, compare, geometric_mean, print_rows, save
from peak import peak_gflops

import attnlang as al

HEADS, LENGTH = 8, 4096
CPU = torch.device("cpu")


def cases(length: int, dtype: torch.dtype) -> list[Case]:
    doc = torch.arange(length)[None] // (length // 8)
    slope = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS)
    triangle = HEADS * length * (length + 1) // 2
    window = 512
    outside = HEADS * max(0, length - window - 1) * (length - window) // 2
    made = [
        Case("full", al.library.full, length=length, pairs=HEADS * length * length),
        Case("causal", al.library.causal, length=length, pairs=triangle),
        Case(
            "window 512",
            al.library.causal_sliding_window,
            length=length,
            values={"window": window},
            pairs=triangle - outside,
        ),
        Case("document", al.library.causal_document, length=length, values={"doc": doc}),
        Case("alibi", al.library.causal_alibi, length=length, values={"slope": slope}, pairs=triangle),
    ]
    return [replace(case, dtype=dtype) for case in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="N = 1024, nothing is saved")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    options = parser.parse_args()
    quick, dtype = options.quick, options.dtype
    peak = peak_gflops(torch.get_num_threads())
    print(f"peak of multiply-adds in float32, measured: {peak:.0f} GFLOP/s")
    rows = []
    for case in cases(1024 if quick else LENGTH, getattr(torch, dtype)):
        done = compare(case, CPU)
        print_rows(done)
        rows += done
    ratios = [r.ratio for r in rows if r.implementation == "flex_attention" and r.ratio is not None]
    if ratios:
        print(f"{OURS} against flex_attention: geometric mean x{geometric_mean(ratios):.2f}, least x{min(ratios):.2f}")
    if not quick:
        name = "cpu_forward" if dtype == "float32" else f"cpu_forward_{dtype}"
        save(name, rows, CPU, peak_gflops=round(peak))


if __name__ == "__main__":
    main()
