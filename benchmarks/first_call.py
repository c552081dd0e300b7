"""How long a new process waits: from ``al.compile`` to the first output, with nothing cached and with the disk cache,
and what ``import attnlang`` adds to ``import torch``."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile

from common import save

FIRST = """
import json, time, torch, attnlang as al
q, k, v = (torch.randn(1, 8, 1024, 64) for _ in range(3))
doc = torch.arange(1024)[None] // 200
begin = time.perf_counter()
out = al.compile(al.library.causal_document)(q, k, v, doc=doc)
print(json.dumps(time.perf_counter() - begin))
"""
FLEX = """
import json, time, torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
q, k, v = (torch.randn(1, 8, 1024, 64) for _ in range(3))
doc = torch.arange(1024)[None] // 200
begin = time.perf_counter()
mask = create_block_mask(lambda b, h, i, j: (j <= i) & (doc[b, i] == doc[b, j]), 1, None, 1024, 1024, device="cpu")
out = torch.compile(flex_attention)(q, k, v, block_mask=mask)
print(json.dumps(time.perf_counter() - begin))
"""
IMPORT = """
import json, time, torch
begin = time.perf_counter()
import attnlang
attnlang.compile
print(json.dumps(time.perf_counter() - begin))
"""


def run(code: str, cache: str) -> float:
    """Return the seconds a fresh process reports."""
    folders = {"ATTNLANG_CACHE_DIR": f"{cache}/attnlang", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **folders}
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    rows = []

    def add(what: str, seconds: float) -> None:
        rows.append({"what": what, "seconds": round(seconds, 3)})
        print(f"{what:<60} {seconds:7.3f} s", flush=True)

    with tempfile.TemporaryDirectory() as cache:
        add("attnlang, nothing cached: compile to first output", run(FIRST, cache))
        add("attnlang, disk cache: compile to first output", statistics.median(run(FIRST, cache) for _ in range(5)))
        add("import attnlang, beyond import torch", statistics.median(run(IMPORT, cache) for _ in range(5)))
        add("flex_attention, nothing cached: compile to first output", run(FLEX, cache))
        add("flex_attention, disk cache: compile to first output", run(FLEX, cache))
    save("first_call", rows)


if __name__ == "__main__":
    main()
