"""Rewrites the tables of README.md from benchmarks/results/*.json, between its ``<!-- results -->`` marks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"

TITLES = {
    "cpu_forward": "CPU, forward, N = 4096, H = 8, D = 64: milliseconds a call, all in one run",
    "gpu": "GPU: milliseconds a call, all in one run",
    "first_call": "First call of a new process",
    "memory": "Long sequences on the CPU: causal and packed documents, H = 1, D = 64, float32",
}


def comparison(rows: list[dict[str, Any]]) -> list[str]:
    """One line a case: our time, each peer's time and how many times attnlang is as fast."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines = ["| case | dtype | " + " | ".join(f"`{n}`" for n in names) + " |", "|---|---|" + "---:|" * len(names)]
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        cells = []
        for name in names:
            found = [r for r in rows if (r["case"], r["dtype"], r["implementation"]) == (case, dtype, name)]
            cells.append(_cell(found[0], name == names[0]) if found else "")
        lines.append(f"| {case} | {dtype} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: dict[str, Any], ours: bool) -> str:
    if row["ms"] is None:
        return str(row.get("note") or "-")
    rate = f" ({row['gflops']:.0f} GFLOP/s)" if row.get("gflops") else ""
    return f"{row['ms']:.1f}{rate}" if ours else f"{row['ms']:.1f} ({row['ratio']:.1f}x)"


def plain(rows: list[dict[str, Any]]) -> list[str]:
    """Any other list of records, one column a key."""
    keys = [k for k in rows[0] if not isinstance(rows[0][k], dict | list) and k not in ("checksum", "torch")]
    lines = ["| " + " | ".join(k.replace("_", " ") for k in keys) + " |", "|" + "---:|" * len(keys)]
    for row in rows:
        cells = (f"{row.get(k):.4g}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in keys)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def section(path: Path) -> list[str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content.get("rows") or []
    if not rows:
        return []
    where = content.get("machine", "")
    if isinstance(where, dict):
        where = ", ".join(f"{name} {value}" for name, value in where.items())
    table = comparison(rows) if "implementation" in rows[0] and "case" in rows[0] else plain(rows)
    title = TITLES.get(path.stem, path.stem.replace("_", " "))
    return [f"**{title}**", "", *table, "", f"Measured by `benchmarks/{path.stem}.py` on: {where}.", ""]


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        print("README.md has no marked section for results", file=sys.stderr)
        return 1
    order = {name: i for i, name in enumerate(TITLES)}
    paths = sorted(RESULTS.glob("*.json"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
    lines = [line for path in paths for line in section(path)] or ["No results yet: `make bench` measures.", ""]
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    readme.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{tail}", encoding="utf-8")
    print(f"wrote the results of {len(paths)} benchmark(s) into {readme.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
