"""The catalogue: 278 documented attention patterns, and which programs of the library compute each.

``catalogue.jsonl`` beside this module has one row a line. ``python -m attnlang.library.catalogue`` prints the table of
``docs/patterns.md``.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Row", "markdown", "rows"]

_FILE = Path(__file__).with_name("catalogue.jsonl")


@dataclass(frozen=True)
class Row:
    """One documented pattern.

    ``kind`` is ``pattern`` (a mask, score or normaliser), ``select`` (keys chosen by the data), ``control`` (attention
    read or edited from outside), ``linear`` or ``system``. ``hooks`` is what it asks of an attention kernel, beyond its
    own arithmetic. ``confidence`` says what the row was read from: the ``paper``, its ``abstract``, or a ``guess``.
    ``programs`` compute what the row does inside attention, together where there are several; ``note`` says what is
    outside, captured or left out.
    """

    id: str
    name: str
    paper: str
    kind: str
    confidence: str
    hooks: tuple[str, ...]
    programs: tuple[str, ...] = ()
    note: str = ""

    @property
    def works(self) -> bool:
        return bool(self.programs)


@cache
def rows() -> tuple[Row, ...]:
    """Return all rows in the order of the catalogue."""
    found = []
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        hooks, programs = tuple(fields.pop("hooks", ())), tuple(fields.pop("programs", ()))
        found.append(Row(kind=fields.pop("class"), hooks=hooks, programs=programs, **fields))
    return tuple(found)


_HEAD = """\
# Documented patterns

{total} attention patterns from papers, and the programs of `attnlang.library` that compute them: **{works} work**.
This page is written by `python -m attnlang.library.catalogue`; the rows are in `attnlang/library/catalogue.jsonl`, and
`tests/library/test_catalogue.py` keeps both true.

`works` means that the programs named compute what the paper does *inside* attention: which keys a query sees, how
scores become weights, what is summed. Each is tested against a dense PyTorch definition written from the paper's
formula, with gradients where it has them. Projections, convolutions and losses around attention are the model's. A row
read from an abstract, or guessed, says so; what it computes is then the reading, not the paper.

| class | rows | work |
|---|---:|---:|
{classes}

| row | paper | class | read from | hooks | status | programs | note |
|---|---|---|---|---|---|---|---|
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _line(row: Row) -> str:
    programs = ", ".join(f"`{name}`" for name in row.programs)
    status = "works" if row.works else "-"
    cells = (f"`{row.id}`", row.paper, row.kind, row.confidence, ", ".join(row.hooks), status, programs, row.note)
    return "| " + " | ".join(_cell(c) for c in cells) + " |"


def markdown() -> str:
    """Return the text of ``docs/patterns.md``."""
    works = Counter(r.kind for r in rows() if r.works)
    classes = "\n".join(
        f"| {kind} | {n} | {works[kind]} |" for kind, n in Counter(r.kind for r in rows()).most_common()
    )
    head = _HEAD.format(total=len(rows()), works=works.total(), classes=classes)
    return head + "\n".join(map(_line, rows())) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
