"""Time and memory of proving a mask's block structure: a million tokens, every library program, and PyTorch's way.

Four tables: eleven masks at 1,048,576 tokens in tiles of 128, analysed as programs and asked for through the drop-in
``create_block_mask``, from the function to the finished map with nothing remembered; what share of the truly empty and
full tiles of every library program is proved at 2048; time and memory of every program at a million tokens (8192 where
a captured table of its own is quadratic); and PyTorch's ``create_block_mask``, eager and compiled, in the same run at
4k, 16k and 32k. ``--quick`` leaves out the peers at 32k and saves nothing.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import save
from mods import mods
from torch.nn.attention import flex_attention

import attnlang as al
from attnlang import flex
from attnlang.ir import BUILTIN_SIZES, Program, Size, dense_mask
from attnlang.made import make_values
from attnlang.measure import interleaved, peak_memory
from attnlang.runtime.runs import run_maps
from attnlang.sparsity import RunMap, analyse

CPU = torch.device("cpu")
MILLION = 1 << 20
LONGEST_TABLE = 16384
TILE = 128
VALUES: dict[str, dict[str, Any]] = {
    "circular_window": {"height": 32, "width": 64},
    "compensation": {"prompt": 1500},
    "epipolar": {"width": 16, "pixels": 256},
    "foveal": {"width": 64},
    "isolation": {"references": 500},
    "multivariate_parallel": {"channels": 4},
    "radial": {"frames": 8, "frame": 256},
    "references": {"pixels": 512},
    "region_queries": {"height": 32, "width": 64},
    "shared_prefix": {"prefix": 300},
    "short_long_heads": {"short": 1},
    "sparse_videogen": {"frames": 8, "frame": 256},
    "style_share": {"content": 1500},
    "text_over_visual": {"visual": 500},
    "tree_ancestors": {"context": 1000},
}
"""Values that cannot be guessed, for the table of precision at 2048 tokens."""


REASONS = {
    "epipolar": "a distance in floats, from a captured matrix: sums of products whose ranges are taken one by one",
}
"""Why tiles of a program are left partial that are not."""


@dataclass(frozen=True)
class Row:
    """One map: median milliseconds, peak MiB beyond what was held before, and what was found."""

    table: str
    case: str
    implementation: str
    length: int
    ms: float
    mib: float
    empty: int | None = None
    partial: int | None = None
    full: int | None = None
    runs: int | None = None
    map_kib: float | None = None
    time_ratio: float | None = None
    memory_ratio: float | None = None


@dataclass(frozen=True)
class Problem:
    """Arguments of one analysis."""

    program: Program
    sizes: Mapping[str, int]
    params: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    def run(self) -> RunMap:
        return analyse(self.program, self.sizes, self.params, self.tensors, (TILE, TILE))


def documents(length: int, count: int) -> torch.Tensor:
    """Ids of ``count`` documents of random length, int64 [1, length]."""
    cuts = torch.randperm(length - 1, generator=torch.Generator().manual_seed(0))[: count - 1] + 1
    return torch.searchsorted(cuts.sort().values, torch.arange(length), right=True)[None]


def problem(program: Program, length: int, values: Mapping[str, Any]) -> Problem:
    sizes = {"B": 1, "H": 1, "Hkv": 1, "Lq": length, "Lk": length}
    known = dict(make_values(program, sizes, values).values)
    tensors = {t.name: known[t.name] for t in program.tensors}
    for tensor in program.tensors:
        for dim, extent in zip(tensor.shape, tensors[tensor.name].shape, strict=True):
            if isinstance(dim, Size) and dim.name not in BUILTIN_SIZES:
                sizes[dim.name] = extent
    return Problem(program, sizes, {s.name: known.get(s.name, s.default) for s in program.scalars}, tensors)


def million() -> list[tuple[str, Problem, Callable[..., Any]]]:
    """The masks of the table, each as a program with its values and as a function for FlexAttention."""
    flags = torch.zeros(MILLION, dtype=torch.bool)
    flags[torch.randperm(MILLION, generator=torch.Generator().manual_seed(1))[:64]] = True
    first = torch.zeros(MILLION, dtype=torch.bool)
    first[:64] = True
    doc = documents(MILLION, 1000)
    functions = mods(doc[0], first, flags)
    library = al.library
    cases: list[tuple[str, Program, dict[str, Any]]] = [
        ("causal", library.causal, {}),
        ("causal window 4096", library.causal_sliding_window, {"window": 4096}),
        ("1000 documents", library.document, {"doc": doc}),
        ("1000 causal documents", library.causal_document, {"doc": doc}),
        ("prefix LM", library.prefix_lm, {"prefix": torch.tensor([5000])}),
        ("Longformer, 64 first tokens", library.longformer, {"globals": first}),
        ("Longformer, 64 scattered tokens", library.longformer, {"globals": flags}),
        ("dilated window", library.dilated_window, {"window": 256, "dilation": 8}),
        ("Swin 1024x1024", library.shifted_window, {"height": 1024, "width": 1024, "window": 8, "shift": 4}),
        ("2-D neighbourhood 1024x1024", library.neighborhood_2d, {"height": 1024, "width": 1024}),
        ("3-D neighbourhood 64x128x128", library.neighborhood_3d, {"frames": 64, "height": 128, "width": 128}),
    ]
    return [(name, problem(program, MILLION, values), functions[name]) for name, program, values in cases]


def drop_in(mod: Callable[..., Any], length: int) -> RunMap:
    """The map of a mask function through ``create_block_mask``, as if this process had never seen it."""
    run_maps.clear()
    flex._attention.cache_clear()
    return al.create_block_mask(mod, None, None, length, length, BLOCK_SIZE=TILE).run_map()


def measure(table: str, name: str, run: Callable[[], RunMap], by: str = "attnlang", rounds: int = 5) -> Row:
    """Median time over ``rounds`` and peak memory of one more."""
    run()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        runs = run()
        times.append((time.perf_counter() - begin) * 1e3)
    peak = peak_memory(run, CPU)
    empty, partial, full = runs.counts()
    return Row(
        table, name, by, runs.sizes[0], statistics.median(times), peak.bytes / 2**20,
        empty, partial, full, len(runs.start), runs.memory_bytes / 1024,
    )  # fmt: skip


def show(row: Row) -> None:
    found = "" if row.runs is None else f"  {row.runs:>8,} runs  {row.partial:>10,} partial  {row.full:>12,} full"
    ratio = "" if row.time_ratio is None else f"  x{row.time_ratio:8.1f} time  x{row.memory_ratio or 0:8.1f} memory"
    text = f"{row.case:<34}{row.implementation:<28}{row.length:>9,} {row.ms:>10.2f} ms {row.mib:>9.1f} MiB"
    print(text + found + ratio, flush=True)


def library(length: int) -> list[Row]:
    """Every library program with made-up values; one whose own table would be quadratic is measured at 8192 tokens."""
    rows = []
    for name in al.library.names(standard=True):
        program = getattr(al.library, name)
        axes = [sum(dim in (Size("Lq"), Size("Lk")) for dim in t.shape) for t in program.tensors]
        n = 8192 if any(count > 1 for count in axes) else length
        try:
            row = measure("library", name, problem(program, n, {}).run, rounds=1)
        except (al.UsageError, MemoryError) as error:
            print(f"{name:<34}left out: {str(error).splitlines()[0][:80]}")
            continue
        show(row)
        rows.append(row)
    return rows


def peers(lengths: tuple[int, ...]) -> list[Row]:
    """Ours, from the same Python function to the finished map, against create_block_mask, eager and compiled."""
    rows = []
    compiled = torch.compile(flex_attention.create_block_mask)
    for length in lengths:
        doc = documents(length, max(2, length // 1024))[0]

        def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
            return q >= k

        def document(b: Any, h: Any, q: Any, k: Any, doc: torch.Tensor = doc) -> Any:
            return (q >= k) & (doc[q] == doc[k])

        table = torch.ones(length, length, dtype=torch.bool).tril_() if length <= LONGEST_TABLE else None

        def dense(b: Any, h: Any, q: Any, k: Any, table: torch.Tensor | None = table) -> Any:
            assert table is not None
            return table[q, k]

        masks = [("causal", causal), ("causal document", document)]
        for name, mod in (*masks, ("dense table", dense)) if table is not None else masks:
            calls: dict[str, Callable[[], Any]] = {
                "attnlang": functools.partial(drop_in, mod, length),
                "create_block_mask": functools.partial(
                    flex_attention.create_block_mask, mod, None, None, length, length, "cpu"
                ),
                "compiled create_block_mask": functools.partial(compiled, mod, None, None, length, length, "cpu"),
            }
            times = interleaved(calls, CPU, rounds=3, seconds=20.0)
            memory = {key: peak_memory(call, CPU).bytes / 2**20 for key, call in calls.items()}
            mine, mib = times["attnlang"].median, max(memory["attnlang"], 0.1)
            for key in calls:
                row = Row(
                    "peers", name, key, length, times[key].median, memory[key],
                    time_ratio=times[key].median / mine, memory_ratio=memory[key] / mib,
                )  # fmt: skip
                show(row)
                rows.append(row)
    return rows


def exact_counts(given: Problem, side: int) -> tuple[int, int]:
    """Numbers of truly empty and truly full tiles, by looking at every pair."""
    mask = dense_mask(given.program, given.sizes, given.params, given.tensors)
    pad = -mask.shape[2] % side, -mask.shape[3] % side
    tiles = []
    for fill in (False, True):  # padding must neither make a tile visible nor hide anything of it
        whole = torch.nn.functional.pad(mask, (0, pad[1], 0, pad[0]), value=fill)
        tiles.append(whole.unflatten(2, (-1, side)).unflatten(4, (-1, side)))
    return int((~tiles[0].any(5).any(3)).sum()), int(tiles[1].all(5).all(3).sum())


def precision(length: int = 2048) -> list[dict[str, Any]]:
    """For every library program: truly empty and full tiles of 128 and of 64, and how many of them are proved.

    No proof is ever wrong (tests/sparsity), so equal numbers mean that every such tile was found.
    """
    rows = []
    for name in al.library.names(standard=True):
        try:
            given = problem(getattr(al.library, name), length, VALUES.get(name, {}))
        except al.UsageError as error:
            print(f"{name:<34}left out: {str(error).splitlines()[0][:80]}")
            continue
        for side in (128, 64):
            runs = analyse(given.program, given.sizes, given.params, given.tensors, (side, side))
            copies = given.sizes["B"] * given.sizes["H"] // (runs.batch * runs.heads)
            empty, full = exact_counts(given, side)
            proved = (runs.counts()[0] * copies, runs.counts()[2] * copies)
            share = sum(proved) / (empty + full) if empty + full else 1.0
            found = {"empty": empty, "full": full, "proved": sum(proved), "share": share}
            rows.append({"case": name, "tile": side, **found, "reason": "" if share == 1 else REASONS.get(name, "")})
    worst = min(rows, key=lambda r: r["share"])
    print(
        f"precision at {length}: {len(rows)} maps, least {worst['share']:.4f} ({worst['case']}, tile {worst['tile']})"
    )
    return rows


def main() -> None:
    quick = "--quick" in sys.argv
    rows = []
    for name, given, mod in million():
        rows.append(measure("million", name, given.run))
        show(rows[-1])
        rows.append(measure("million", name, functools.partial(drop_in, mod, MILLION), by="drop-in"))
        show(rows[-1])
        assert rows[-1].full == rows[-2].full and rows[-1].partial == rows[-2].partial, "the two masks differ"
    exact = precision()
    rows += library(MILLION)
    rows += peers((4096, 16384) if quick else (4096, 16384, 32768))
    if not quick:
        save("sparsity", rows, CPU)
        save("sparsity_precision", exact, CPU)


if __name__ == "__main__":
    main()
