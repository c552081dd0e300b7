"""What the two tables of GPU resources share: plans of library programs, and a table that is only compiled once.

Every row keeps the figures of each tile that was compiled for it, with a digest of the kernel, so a later run compiles
only kernels whose code, signature or compiler changed. Rows are sorted, and equal inputs give an equal file.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attnlang import library
from attnlang.codegen.offline import Compiler, CompilerFailed, Job, Resources
from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.ir import BOOL, FLOAT, INT
from attnlang.passes.specialise import specialise

__all__ = ["Case", "Rows", "Table", "options", "plan_of"]

Rows: TypeAlias = list[dict[str, Any]]
Case: TypeAlias = tuple[dict[str, Any], Callable[[Compiler], Resources]]
"""What names a row, and how its kernel is compiled."""

STORAGE = {FLOAT: "float32", INT: "int32", BOOL: "bool"}
FIGURES = tuple(f.name for f in fields(Resources))


def plan_of(name: str, dim: int, *, backward: bool = False) -> KernelPlan:
    """Plan a library program in bfloat16 with captured tensors of 4-byte elements.

    A static parameter without default becomes 2. A backward plan gives gradients of all float captured tensors.
    """
    program = getattr(library, name)
    missing = {
        p.name: {INT: 2, FLOAT: 2.0, BOOL: True}[p.type] for p in program.scalars if p.static and p.default is None
    }
    return make_plan(
        specialise(program, missing),
        dtype="bfloat16",
        head_dim=dim,
        value_dim=dim,
        storage={t.name: STORAGE[t.type] for t in program.tensors},
        backward=backward,
        captured_grads=[t.name for t in program.tensors if t.type is FLOAT] if backward else (),
    )


def _code(source: str) -> str:
    """Return what of a generated source reaches the compiler: no comments, no docstrings, nothing of the host."""
    kept = [node for node in ast.parse(source).body if not isinstance(node, ast.FunctionDef) or node.decorator_list]
    for node in (n for root in kept for n in ast.walk(root) if isinstance(n, ast.FunctionDef)):
        first = node.body[0]
        if len(node.body) > 1 and isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            del node.body[0]
    return ast.unparse(ast.Module(kept, []))


class _Remembering(Compiler):
    """Compiles what it does not know; ``tried`` lists what was asked for since it was last cleared."""

    def __init__(self, python: str, known: dict[str, dict[str, Any]]) -> None:
        super().__init__(python)
        self._known = known
        self._triton = self.version
        self.tried: Rows = []

    def build(self, job: Job, target: str, save: Path | None = None) -> Resources:
        parts = (target, self._triton, job.config.key, _code(job.source), json.dumps(job.signature, sort_keys=True))
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        if digest not in self._known:
            self._known[digest] = asdict(super().build(job, target, save))
        found = {name: self._known[digest][name] for name in FIGURES}
        self.tried.append({"digest": digest, **found})
        return Resources(**found)


class Table:
    """The rows of a results file; ``order`` names the fields that name a row, most significant first."""

    def __init__(self, path: Path, order: tuple[str, ...]) -> None:
        self.path, self.order = path, order
        found: Rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self.rows = {self._key(row): row for row in found if row["program"] in library.names()}
        tried = (one for row in self.rows.values() for one in (row, *row.get("rejected", ())))
        self.known = {one["digest"]: one for one in tried if "digest" in one}

    def _key(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.order)

    def save(self) -> None:
        """Write the file: one row a line, sorted."""
        lines = ",\n".join(json.dumps(self.rows[key]) for key in sorted(self.rows))
        draft = self.path.with_suffix(".draft")
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        os.replace(draft, self.path)

    def fill(self, cases: Iterable[Case], total: int, python: str) -> None:
        """Compile the cases, saving on the way, and say which of them fail or spill."""
        shown, seen = _progress(), []
        with _Remembering(python, self.known) as compiler, shown:
            task = shown.add_task("", total=total)
            for names, compile_case in cases:
                key = tuple(names[name] for name in self.order)
                shown.update(task, description=" ".join(map(str, key)))
                before = len(self.known)
                row = self.rows[key] = _row(names, compile_case, compiler)
                seen.append(row)
                shown.advance(task)
                if len(self.known) > before or "error" in row:
                    shown.console.print(_line(row, key), highlight=False, soft_wrap=True)
                    self.save()
        self.save()
        bad = [row for row in seen if "error" in row or row["spill_bytes"]]
        print(f"{len(seen)} kernels, {len(bad)} that spill or fail; table in {self.path}")
        for row in bad:
            print(" ", _line(row, self._key(row)))


def _row(
    names: dict[str, Any], compile_case: Callable[[Compiler], Resources], compiler: _Remembering
) -> dict[str, Any]:
    """Compile one case; the tiles a launch would try and leave are kept beside the figures of the one it takes."""
    compiler.tried.clear()
    try:
        chosen = asdict(compile_case(compiler))
    except CompilerFailed as error:
        return {**names, "error": str(error), "rejected": list(compiler.tried)}
    index = next(i for i, one in enumerate(compiler.tried) if one["config"] == chosen["config"])
    rejected = [one for i, one in enumerate(compiler.tried) if i != index]
    return {**names, **compiler.tried[index], "rejected": rejected}


def _line(row: dict[str, Any], key: tuple[Any, ...]) -> str:
    if "error" in row:
        return f"{' '.join(map(str, key))}: {row['error']}"
    spilled = f", {row['spill_bytes']} bytes spilled" if row["spill_bytes"] else ""
    tiles = "".join(f"{one['config']} " for one in row["rejected"])
    left = f" (not {tiles.strip()})" if tiles else ""
    return f"{' '.join(map(str, key))}: {row['config']}{left}, {row['registers']} registers{spilled}"


def _progress() -> Progress:
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=Console(file=sys.stdout))


def options(about: str | None, targets: Iterable[str], dims: Iterable[int], results: Path) -> argparse.Namespace:
    """Parse the command line of either table; lists come back as lists."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=list(targets), type=_words)
    parser.add_argument("--dims", default=list(dims), type=lambda text: [int(word) for word in _words(text)])
    parser.add_argument("--programs", default=library.names(standard=True), type=_words)
    parser.add_argument("--python", default=sys.executable, help="interpreter whose Triton compiles")
    parser.add_argument("--output", type=Path, default=results)
    return parser.parse_args()


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]
