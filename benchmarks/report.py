"""Rewrites the tables of README.md, docs/measurements.md and docs/sparsity.md from benchmarks/results/*.json, between
their ``<!-- results -->`` marks.

README.md shows few of them. A benchmark without an entry in ``TABLES`` is shown in docs/measurements.md as it is, one
column a field.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"
LONGEST = 16
"""Rows of a benchmark without a table of its own that are still shown."""

Rows: TypeAlias = list[dict[str, Any]]
Tables: TypeAlias = dict[str, tuple[str, Callable[[Rows], list[str]]]]
"""Titles and renderers of results, by the name of the benchmark."""


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


def _cost(row: dict[str, Any] | None) -> tuple[str, str]:
    return (f"{row['ms']:.1f}", f"{row['mib']:.1f}") if row else ("-", "-")


def sparsity(rows: Rows) -> list[str]:
    """What finding the block structure costs: at a million tokens, and beside PyTorch's create_block_mask."""
    large = [r for r in rows if r["table"] == "million" and r["implementation"] == "attnlang"]
    asked = {r["case"]: r for r in rows if r["table"] == "million" and r["implementation"] == "drop-in"}
    lines = table(
        ["mask, 1,048,576 tokens", "program, ms", "peak MiB", "`attnlang.create_block_mask`, ms", "peak MiB", "runs"],
        [[r["case"], *_cost(r), *_cost(asked.get(r["case"])), f"{r['runs']:,}"] for r in large],
    )
    beside = [r for r in rows if r["table"] == "peers"]
    names = list(dict.fromkeys(r["implementation"] for r in beside))
    cells = []
    for case, length in dict.fromkeys((r["case"], r["length"]) for r in beside):
        found = {r["implementation"]: r for r in beside if (r["case"], r["length"]) == (case, length)}
        shown = [f"{found[n]['ms']:.1f} ms, {found[n]['mib']:.0f} MiB" if n in found else "-" for n in names]
        cells.append([f"{case}, {length:,} tokens", *shown])
    return [*lines, "", *table(["mask", *(f"`{n}`" for n in names)], cells)] if beside else lines


def precision(rows: Rows) -> list[str]:
    """What share of the truly empty and full tiles is proved, over the whole library, by the side of a tile."""
    cells = []
    for side in dict.fromkeys(r["tile"] for r in rows):
        found = [r for r in rows if r["tile"] == side]
        true, proved = sum(r["empty"] + r["full"] for r in found), sum(r["proved"] for r in found)
        cells.append([f"{side}", f"{len(found)}", f"{true:,}", f"{proved:,}", f"{min(r['share'] for r in found):.2%}"])
    head = ["side of a tile", "programs", "empty or full tiles", "proved", "least share of a program"]
    missed = [
        f"* `{r['case']}`, {r['tile']}: {r['share']:.2%}; {r.get('reason') or 'no reason known'}"
        for r in rows
        if r["share"] < 1
    ]
    return [*table(head, cells), *(["", *missed] if missed else [])]


def library_maps(rows: Rows) -> list[str]:
    """Every library program at a million tokens: what its map costs and how large it is."""
    cells = [
        [
            f"`{r['case']}`",
            f"{r['length']:,}",
            *_cost(r),
            f"{r['runs']:,}",
            _share(r["partial"], r),
            _share(r["full"], r),
        ]
        for r in rows
        if r["table"] == "library"
    ]
    return table(["program", "tokens", "ms", "peak MiB", "runs", "partial tiles", "full tiles"], cells)


def _share(count: int, row: dict[str, Any]) -> str:
    return f"{count / max(1, row['empty'] + row['partial'] + row['full']):.2%}"


def steps(rows: Rows) -> list[str]:
    """Training steps beside a peer."""
    cells = [
        [r["case"], f"{r['attnlang_ms']:.0f}", f"{r['peer']}: {r['peer_ms']:.0f} ({r['ratio']:.1f}x)"]
        for r in rows
        if r["table"] == "peers"
    ]
    return table(["forward and backward, ms", "`attnlang`", "peer"], cells)


def longest_steps(rows: Rows) -> list[str]:
    """The last case of each mask: the longest sequences with the narrowest heads."""
    narrow = {}
    for r in rows:
        if r["table"] == "peers" and r["case"].endswith("D = 64"):
            narrow[r["case"].partition(",")[0]] = r
    return steps(list(narrow.values()))


def training(rows: Rows) -> list[str]:
    """Training steps beside a peer, and what gradients of captured tensors add to the backward pass."""
    added = [
        [r["case"], f"{r['without_ms']:.0f}", f"{r['with_ms']:.0f} (+{max(0.0, r['added_percent']):.0f} %)"]
        for r in rows
        if r["table"] == "captured"
    ]
    needed = [
        [r["case"].removeprefix("N = "), f"{r['peak_mib']:.0f}", f"{r['one_set_mib']:.0f}"]
        for r in rows
        if r["table"] == "memory"
    ]
    parts = [steps(rows), table(["backward, ms", "without its gradient", "with it"], added)]
    parts.append(table(["tokens, H = 1, D = 64", "peak of a step, MiB", "q, k, v and o alone, MiB"], needed))
    return [line for part in parts for line in (*part, "")][:-1]


def compositions(rows: Rows) -> list[str]:
    """Whole mechanisms beside what they replace."""
    cells = [
        [
            f"{r['case']}, N = {r['length']:,}",
            f"{r['attnlang_ms']:.1f}",
            f"{r['peer']}: {r['peer_ms']:.1f} ({r['ratio']:.1f}x)",
        ]
        for r in rows
        if r["table"] == "time"
    ]
    return table(["forward, ms", "`attnlang`", "composition"], cells)


def mechanisms(rows: Rows) -> list[str]:
    """Whole mechanisms beside what they replace, and memory as the length grows."""
    grown = [r for r in rows if r["table"] == "memory"]
    lengths = list(dict.fromkeys(r["length"] for r in grown))
    cells = []
    for case, train in dict.fromkeys((r["case"], r["train"]) for r in grown):
        found = {r["length"]: r for r in grown if (r["case"], r["train"]) == (case, train)}
        cells.append(
            [
                f"{case}, {'with gradients' if train else 'forward'}",
                *(f"{found[n]['growth_mb']:.0f}" if n in found else "-" for n in lengths),
            ]
        )
    times = compositions(rows)
    if not cells:
        return times
    return [*times, "", *table(["memory added by a call, MB", *(f"N = {n:,}" for n in lengths)], cells)]


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
    """What the GPU kernels of the library need, at most, for each target and head dimension.

    Every line is out of the kernels of all programs of a mask and a score, so a line that is not complete shows it.
    """
    from attnlang import library

    lines = []
    kernels = len(library.names(standard=True)) * len({r.get("kernel") for r in rows if "error" not in r})
    places = {(r["target"], r["head_dim"]) for r in rows}
    for target, dim in sorted(places, key=lambda place: (place[0].partition(":")[0], len(place[0]), place)):
        built = [r for r in rows if (r["target"], r["head_dim"]) == (target, dim) and "error" not in r]
        spill = sum(1 for r in built if r["spill_bytes"])
        most = [str(max((r[k] for r in built), default=0)) for k in ("registers", "spill_bytes", "shared_bytes")]
        lines.append([f"{target}, D = {dim}", f"{len(built)} of {kernels}", most[0], str(spill), *most[1:]])
    return table(["target", "compiled", "registers, at most", "spill", "spilled bytes", "shared bytes"], lines)


TABLES: Tables = {
    "cpu_forward": ("Forward on the CPU, N = 4096, H = 8, D = 64: milliseconds a call", comparison),
    "cpu_forward_bfloat16": ("The same in bfloat16", comparison),
    "cpu_backward": ("Training steps on the CPU, H = 8 (flex_attention refuses to train there)", training),
    "mechanisms": ("Whole mechanisms on the CPU, float32, D = 64", mechanisms),
    "gpu": ("Forward on a GPU: milliseconds a call", comparison),
    "first_call": ("The first call of a new process", plain),
    "sparsity": ("Finding the block structure of a mask", sparsity),
    "layouts": ('Masks over grids with layout="auto": forward on the CPU, H = 8, D = 64', layouts),
    "sparsity_precision": (
        "Share of the truly empty and full tiles that is proved, all library programs at 2048",
        precision,
    ),
    "memory": ("Long sequences on the CPU: causal and packed documents, H = 1, D = 64, float32", memory),
    "gpu_resources": ("Kernels of library programs compiled for GPUs that need not be here, so far", resources),
    "gpu_backward_resources": (
        "The two backward kernels of each of them, with gradients of captured tensors",
        resources,
    ),
}


HEADLINES: Tables = {
    "cpu_forward": TABLES["cpu_forward"],
    "cpu_backward": ("Training steps on the CPU, H = 8 (flex_attention refuses to train there)", longest_steps),
    "mechanisms": ("Whole mechanisms on the CPU, float32, D = 64", compositions),
    "gpu": TABLES["gpu"],
    "first_call": TABLES["first_call"],
}

MAPS: Tables = {
    "sparsity": ("The maps of all library programs in tiles of 128", library_maps),
}


class Page(NamedTuple):
    """A page with tables between marks; ``others`` says that benchmarks without a table of their own are shown too."""

    path: str
    tables: Tables
    others: bool = False


PAGES = (
    Page("README.md", HEADLINES),
    Page("docs/measurements.md", TABLES, others=True),
    Page("docs/sparsity.md", MAPS),
)


def section(path: Path, page: Page) -> list[str]:
    """The lines of one results file, none if there is nothing to show."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows, where = (content, "") if isinstance(content, list) else (content.get("rows") or [], content.get("machine"))
    if not rows or (path.stem not in page.tables and not (page.others and len(rows) <= LONGEST)):
        return []
    if isinstance(where, dict):
        where = ", ".join(f"{name} {value}" for name, value in where.items())
    title, render = page.tables.get(path.stem, (path.stem.replace("_", " "), plain))
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


def rewrite(page: Page) -> bool:
    """Put the tables between the marks of a page; False where it has none."""
    file = ROOT / page.path
    text = file.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        print(f"{file.name} has no marked section for results", file=sys.stderr)
        return False
    order = {name: i for i, name in enumerate(page.tables)}
    paths = sorted(RESULTS.glob("*.json"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
    sections = [lines for path in paths if (lines := section(path, page))]
    lines = [line for lines in sections for line in lines] or ["No results yet: `make bench` measures.", ""]
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    file.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{tail}", encoding="utf-8")
    print(f"wrote the results of {len(sections)} benchmark(s) into {file.name}")
    return True


def main() -> int:
    done = [rewrite(page) for page in PAGES]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
