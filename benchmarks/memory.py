"""Peak memory of a long causal, packed forward pass on the CPU.

Runs ``causal_document`` at N = 262144, H = 1, D = 64 in a fresh process and reports the growth of the process's peak
resident set over what it was before q, k and v were made, and the whole peak. Writes ``results/memory.json``.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory.json"
LENGTHS = (4096, 16384, 65536, 262144)
HEAD_DIM = 64


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(length: int) -> dict[str, float | int | str]:
    """Run one forward pass in this process and return its figures."""
    import torch

    import attnlang as al

    torch.manual_seed(0)
    cuts = torch.randint(1, length, (length // 4096,)).sort().values
    doc = torch.searchsorted(cuts, torch.arange(length), right=True)[None]
    attn = al.compile(al.library.causal_document)
    small = torch.randn(1, 1, 256, HEAD_DIM)
    attn(small, small, small, doc=doc[:, :256])  # build the kernel outside the measurement
    before = peak_mb()
    q, k, v = (torch.randn(1, 1, length, HEAD_DIM) for _ in range(3))
    start = time.perf_counter()
    out = attn(q, k, v, doc=doc)
    seconds = time.perf_counter() - start
    return {
        "length": length,
        "seconds": seconds,
        "peak_mb": peak_mb(),
        "growth_mb": peak_mb() - before,
        "tensors_mb": 4 * q.numel() * q.element_size() / 2**20,
        "checksum": float(out.double().abs().mean()),
        "torch": torch.__version__,
    }


def main() -> None:
    if len(sys.argv) == 2:
        print(json.dumps(measure(int(sys.argv[1]))))
        return
    rows = []
    for length in LENGTHS:
        done = subprocess.run([sys.executable, __file__, str(length)], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(
            "{length:>8} tokens  {seconds:8.2f} s  peak {peak_mb:7.0f} MB  (q, k, v, o: {tensors_mb:.0f} MB)".format(
                **rows[-1]
            )
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": platform.processor() or platform.machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
