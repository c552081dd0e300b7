"""Rewrites the tables of README.md from benchmarks/results/*.json, between its ``<!-- results -->`` marks.

A benchmark without an entry in ``TABLES`` is shown as it is, one column a field.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"
LONGEST = 16
"""Rows of a benchmark without a table of its own that are still shown."""

Rows: TypeAlias = list[dict[str, Any]]


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others are numbers."""
    headings = list(headings)
    rule = "|---|" + "---:|" * (len(headings) - 1)
    return ["| " + " | ".join(headings) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def comparison(rows: Rows) -> list[str]:
    """One line a case: our time, each peer's time and how many times attnlang is as fast."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines = []
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        found = {r["implementation"]: r for r in rows if (r["case"], r["dtype"]) == (case, dtype)}
        lines.append([f"{case}, {dtype}", *(_cell(found.get(name), name == names[0]) for name in names)])
    return table(["case", *(f"`{n}`" for n in names)], lines)


def _cell(row: dict[str, Any] | None, ours: bool) -> str:
    if row is None or row["ms"] is None:
        return str((row or {}).get("note") or "-")
    rate = f" ({row['gflops']:.0f} GFLOP/s)" if row.get("gflops") else ""
    return f"{row['ms']:.1f}{rate}" if ours else f"{row['ms']:.1f} ({row['ratio']:.1f}x)"


def plain(rows: Rows) -> list[str]:
    """A list of records as it is, one column a field."""
    keys = [k for k in rows[0] if not isinstance(rows[0][k], dict | list) and k not in ("checksum", "torch")]
    return table([k.replace("_", " ") for k in keys], [[number(row.get(k, "")) for k in keys] for row in rows])


def sparsity(rows: Rows) -> list[str]:
    """What finding the block structure costs: at a million tokens, and beside PyTorch's create_block_mask."""
    large = [r for r in rows if r["table"] == "million"]
    lines = table(
        ["mask, 1,048,576 tokens", "ms", "peak MiB", "runs"],
        [[r["case"], f"{r['ms']:.1f}", f"{r['mib']:.1f}", f"{r['runs']:,}"] for r in large],
    )
    beside = [r for r in rows if r["table"] == "peers"]
    names = list(dict.fromkeys(r["implementation"] for r in beside))
    cells = []
    for case, length in dict.fromkeys((r["case"], r["length"]) for r in beside):
        found = {r["implementation"]: r for r in beside if (r["case"], r["length"]) == (case, length)}
        shown = [f"{found[n]['ms']:.1f} ms, {found[n]['mib']:.0f} MiB" if n in found else "-" for n in names]
        cells.append([f"{case}, {length:,} tokens", *shown])
    return [*lines, "", *table(["mask", *(f"`{n}`" for n in names)], cells)] if beside else lines


def training(rows: Rows) -> list[str]:
    """Training steps beside a peer, and what gradients of captured tensors add to the backward pass."""
    steps = [
        [r["case"], f"{r['attnlang_ms']:.0f}", f"{r['peer']}: {r['peer_ms']:.0f} ({r['ratio']:.1f}x)"]
        for r in rows
        if r["table"] == "peers"
    ]
    added = [
        [r["case"], f"{r['without_ms']:.0f}", f"{r['with_ms']:.0f} (+{max(0.0, r['added_percent']):.0f} %)"]
        for r in rows
        if r["table"] == "captured"
    ]
    head = table(["forward and backward, ms", "`attnlang`", "peer"], steps)
    return [*head, "", *table(["backward, ms", "without its gradient", "with it"], added)]


def memory(rows: Rows) -> list[str]:
    """Time and resident memory as the length grows."""
    cells = [[f"{r['length']:,}", f"{r['seconds']:.2f}", f"{r['peak_mb']:.0f}", f"{r['tensors_mb']:.0f}"] for r in rows]
    return table(["tokens", "seconds", "peak of the process, MB", "q, k, v and o alone, MB"], cells)


def layouts(rows: Rows) -> list[str]:
    """Tile efficiency and time with and without another order of tokens."""
    forward = [
        [
            r["case"],
            r["layout"],
            *(f"{r[f'efficiency_{when}']:.2f}" for when in ("before", "after")),
            f"{r['ms_before']:.1f}",
            f"{r['ms_after']:.1f} ({r['ratio']:.1f}x)",
        ]
        for r in rows
        if r["table"] == "forward"
    ]
    headings = ["mask", "order", "efficiency as it comes", "in this order", "ms as it comes", "in this order"]
    large = [
        [r["case"], r["layout"], f"{r['gain']:.1f}x", f"{r['runs']:,}", f"{r['analysis_ms']:.0f}"]
        for r in rows
        if r["table"] == "million"
    ]
    more = table(["mask, 1,048,576 tokens", "order", "fewer pairs", "runs", "analysis, ms"], large)
    return [*table(headings, forward), *(["", *more] if large else [])]


def resources(rows: Rows) -> list[str]:
    """What the GPU kernels of the library need, at most, for each target and head dimension."""
    lines = []
    for target, dim in dict.fromkeys((r["target"], r["head_dim"]) for r in rows):
        found = [r for r in rows if (r["target"], r["head_dim"]) == (target, dim)]
        built = [r for r in found if "error" not in r]
        spill = sum(1 for r in built if r["spill_bytes"])
        most = [str(max((r[k] for r in built), default=0)) for k in ("registers", "spill_bytes", "shared_bytes")]
        lines.append([f"{target}, D = {dim}", f"{len(built)} of {len(found)}", most[0], str(spill), *most[1:]])
    return table(["target", "compile", "registers, at most", "spill", "spilled bytes", "shared bytes"], lines)


TABLES: dict[str, tuple[str, Callable[[Rows], list[str]]]] = {
    "cpu_forward": ("Forward on the CPU, N = 4096, H = 8, D = 64: milliseconds a call", comparison),
    "cpu_forward_bfloat16": ("The same in bfloat16", comparison),
    "cpu_backward": ("Training steps on the CPU, H = 8 (flex_attention refuses to train there)", training),
    "gpu": ("Forward on a GPU: milliseconds a call", comparison),
    "first_call": ("The first call of a new process", plain),
    "sparsity": ("Finding the block structure of a mask", sparsity),
    "layouts": ('Masks over grids with layout="auto": forward on the CPU, H = 8, D = 64', layouts),
    "memory": ("Long sequences on the CPU: causal and packed documents, H = 1, D = 64, float32", memory),
    "gpu_resources": (
        "Kernels of library programs compiled for GPUs that need not be here, so far",
        resources,
    ),
}


def section(path: Path) -> list[str]:
    """The lines of one results file, none if there is nothing to show."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows, where = (content, "") if isinstance(content, list) else (content.get("rows") or [], content.get("machine"))
    if not rows or (path.stem not in TABLES and len(rows) > LONGEST):
        return []
    if isinstance(where, dict):
        where = ", ".join(f"{name} {value}" for name, value in where.items())
    title, render = TABLES.get(path.stem, (path.stem.replace("_", " "), plain))
    place = f" on: {where}" if where else ""
    command = content.get("command") if isinstance(content, dict) else None
    return [
        f"**{title}**",
        "",
        *render(rows),
        "",
        f"Measured by `{command or f'benchmarks/{path.stem}.py'}`{place}.",
        "",
    ]


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        print("README.md has no marked section for results", file=sys.stderr)
        return 1
    order = {name: i for i, name in enumerate(TABLES)}
    paths = sorted(RESULTS.glob("*.json"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
    lines = [line for path in paths for line in section(path)] or ["No results yet: `make bench` measures.", ""]
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    readme.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{tail}", encoding="utf-8")
    print(f"wrote the results of {len(paths)} benchmark(s) into {readme.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
