"""What an order of tokens does for masks over grids: tile efficiency, and time of a forward call on the CPU.

Every case runs in the order the tokens come in and under ``layout="auto"``, which moves q, k, v and o inside the call;
both are timed in turn in one run. H = 8, D = 64, float32; 2-D cases on 64 x 64 to 128 x 128, 3-D ones on 16 x 32 x 32.
Then, at 1,048,576 tokens, what masks that are hopeless in row-major order compute under the proposed one.
``--quick`` takes the smallest case of each kind and saves nothing.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import save

import attnlang as al
from attnlang.measure import interleaved
from attnlang.sparsity import analyse, explain, lay_out, propose_layouts

HEADS, DIM = 8, 64
CPU = torch.device("cpu")
TILE = (64, 64)


@dataclass(frozen=True)
class Case:
    """A program of the library over a grid; ``values`` are its parameters."""

    name: str
    program: str
    grid: tuple[int, ...]
    values: dict[str, Any]

    @property
    def tokens(self) -> int:
        return int(torch.tensor(self.grid).prod())

    @property
    def params(self) -> dict[str, Any]:
        names = ("height", "width") if len(self.grid) == 2 else ("frames", "height", "width")
        return {**dict(zip(names, self.grid, strict=True)), **self.values}

    @property
    def sizes(self) -> dict[str, int]:
        return {"B": 1, "H": HEADS, "Hkv": HEADS, "Lq": self.tokens, "Lk": self.tokens}


def _images() -> list[Case]:
    cases = []
    for side in (64, 96, 128):
        for window in (7, 13):
            name = f"{window} x {window} on {side} x {side}"
            cases.append(Case(name, "neighborhood_2d", (side, side), {"window": window}))
    cases.append(Case("9 x 9 on 100 x 90", "neighborhood_2d", (100, 90), {"window": 9}))
    for side, dilation in ((64, 2), (128, 4)):
        name = f"7 x 7 dilated by {dilation} on {side} x {side}"
        cases.append(Case(name, "dilated_neighborhood_2d", (side, side), {"window": 7, "dilation": dilation}))
    cases.append(Case("axial on 96 x 96", "axial", (96, 96), {}))
    return cases


def _videos() -> list[Case]:
    grid = (16, 32, 32)
    return [
        Case("3 x 7 x 7 on 16 x 32 x 32", "neighborhood_3d", grid, {"window_t": 3, "window": 7}),
        Case("5 x 5 x 5 dilated by 2 on 16 x 32 x 32", "dilated_neighborhood_3d", grid, {"window": 5, "dilation": 2}),
        Case("tiles of 4 on 16 x 32 x 32", "sliding_tile", grid, {"tile": 4}),
    ]


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Efficiency and time of one case, as it comes and under the proposed layout."""
    program = getattr(al.library, case.program)
    plain, laid = al.compile(program), al.compile(program, layout="auto")
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, case.tokens, DIM, generator=random) for _ in range(3))
    started = time.perf_counter()
    layout = laid.layout_of(case.tokens, case.tokens, H=HEADS, **case.params)
    proposing = time.perf_counter() - started
    tile = (TILE[0], (layout and layout.key_tile) or TILE[1])
    before = explain(program, case.sizes, case.params, tile=TILE)
    after = explain(program, case.sizes, case.params, tile=tile, layout=layout)
    calls = {"plain": lambda: plain(q, k, v, **case.params), "laid": lambda: laid(q, k, v, **case.params)}
    error = float((calls["plain"]() - calls["laid"]()).abs().max())
    times = interleaved(calls, CPU, rounds=rounds, seconds=60.0)
    return {
        "table": "forward",
        "case": case.name,
        "layout": layout.name if layout else "none",
        "key_tile": tile[1],
        "efficiency_before": before.efficiency,
        "efficiency_after": after.efficiency,
        "ms_before": times["plain"].median,
        "ms_after": times["laid"].median,
        "ratio": times["plain"].median / times["laid"].median,
        "proposing_ms": proposing * 1e3,
        "error": error,
    }


def million(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The size and time of a run map at a million tokens under the proposed layout."""
    case = Case(name, name, (1024, 1024), values)
    program = getattr(al.library, name)
    started = time.perf_counter()
    best = propose_layouts(program, case.sizes, case.params, tile=(128, 128), limit=1)
    proposing = time.perf_counter() - started
    started = time.perf_counter()
    if best:
        laid = lay_out(program, best[0].layout, case.sizes, case.params)
        runs = analyse(laid.program, laid.sizes, case.params, laid.tensors)
    else:
        runs = analyse(program, case.sizes, case.params)
    return {
        "table": "million",
        "case": f"{name} on 1024 x 1024",
        "layout": best[0].layout.name if best else "none",
        "gain": best[0].gain if best else 1.0,
        "runs": len(runs.start),
        "analysis_ms": (time.perf_counter() - started) * 1e3,
        "proposing_ms": proposing * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases, nothing is saved")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    cases = [*_images(), *_videos()]
    if options.quick:
        cases = [cases[0], cases[-1]]
    rows = []
    for case in cases:
        row = measure(case, options.rounds)
        print(
            f"{row['case']:<40} {row['efficiency_before']:.3f} -> {row['efficiency_after']:.3f}  "
            f"{row['ms_before']:8.1f} -> {row['ms_after']:8.1f} ms  x{row['ratio']:.2f}  {row['layout']}, "
            f"key tile {row['key_tile']}, proposed in {row['proposing_ms']:.0f} ms, differs {row['error']:.1e}",
            flush=True,
        )
        rows.append(row)
    if options.quick:
        return
    for name, values in (
        ("axial", {}),
        ("criss_cross", {}),
        ("cswin", {"stripe": 7}),
        ("cyclic_window", {"shift_y": 100, "shift_x": 37}),
    ):
        row = million(name, values)
        print(
            f"{row['case']:<40} {row['gain']:.1f} times fewer pairs, {row['runs']:,} runs in {row['analysis_ms']:.0f} "
            f"ms, {row['layout']}, proposed in {row['proposing_ms']:.0f} ms",
            flush=True,
        )
        rows.append(row)
    save("layouts", rows, CPU)


if __name__ == "__main__":
    main()
