"""Which rows stages a kernel of attention can take in: rows of q before its keys, rows of its output after them.

Queries are read once, by one block, so whatever makes a row of them may be done there. Rows of an output are changed on
their way to memory, where the stage reads each element, or sums over its row, at its own place. Keys and values are
read by many blocks: what makes these is done once, before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from attnlang.ir import (
    FLOAT,
    KEY_ADDRESS,
    QUERY_ADDRESS,
    Attend,
    Expr,
    Index,
    Input,
    Load,
    Map,
    Pool,
    Program,
    map_record,
    postorder,
)
from attnlang.ir.nodes import substitute
from attnlang.ir.stages import Stage

__all__ = ["INNER", "Fusion", "fusions", "here", "in_place", "loads_of", "on_rows_at_hand", "statistics"]

INNER = Input("inner", FLOAT, "bhqd")
"""An element of the rows at hand, in a stage that changes rows on their way."""

_HERE = "_of_row"
_PLACE = tuple(Index(axis) for axis in "bhqd")


@dataclass(frozen=True)
class Fusion:
    """What an Attend stage may take in: ``before`` makes its queries, ``after`` changes one of the outputs ``rows``.

    It is the ``last`` where no stage reads what it makes.
    """

    before: Map | None = None
    after: Map | None = None
    rows: tuple[str, ...] = ()
    last: bool = False


@functools.lru_cache(maxsize=256)
def loads_of(stage: Stage) -> frozenset[str]:
    """Names of the tensors that expressions of ``stage`` read."""
    return frozenset(n.tensor for n in postorder(*stage.roots()) if isinstance(n, Load))


def _reads(stage: Stage) -> list[str]:
    """Names of everything a stage reads, as often as it has a use for it."""
    found = list(loads_of(stage))
    if isinstance(stage, Attend):
        found += [o.source for o in stage.operands()]
    return [*found, stage.source] if isinstance(stage, Pool) else found


@functools.lru_cache(maxsize=256)
def fusions(program: Program) -> dict[str, Fusion]:
    """What each Attend stage of ``program`` may take in, by the name of the stage."""
    readers: dict[str, list[Stage]] = {}
    for stage in program.stages:
        for name in _reads(stage):
            readers.setdefault(name, []).append(stage)
    maps = {stage.name: stage for stage in program.stages if isinstance(stage, Map)}
    found: dict[str, Fusion] = {}
    taken: set[str] = set()
    for number, stage in enumerate(program.stages):
        if not isinstance(stage, Attend) or stage.lengths != Attend().lengths or stage.position:
            continue
        before = _before(stage, {name: m for name, m in maps.items() if name not in taken}, readers, program)
        later = {name for s in program.stages[number + 1 :] for name in s.made}
        after: Map | None = None
        rows: tuple[str, ...] = ()
        for candidate in program.stages[number + 1 :]:
            if isinstance(candidate, Map) and candidate.name not in taken and not loads_of(candidate) & later:
                rows = tuple(
                    out.name
                    for out in stage.outputs
                    if out.rows is not None and out.over == "k" and not out.key
                    if out.name not in program.results and readers.get(out.name) == [candidate]
                    if in_place(candidate, out.name)
                )
                if rows:
                    after = candidate
                    taken.add(candidate.name)
                    break
        last = after is not None and after.name not in readers
        found[stage.name] = Fusion(before, after, rows, last)
    return found


def _before(stage: Attend, maps: dict[str, Map], readers: dict[str, list[Stage]], program: Program) -> Map | None:
    term = stage.terms[0]
    found = maps.get(term.left.source)
    if found is None or len(stage.terms) > 1 or term.body is not None or term.left.index != QUERY_ADDRESS:
        return None
    if any(o.index != KEY_ADDRESS for o in stage.operands() if o is not term.left):
        return None
    return found if readers[found.name] == [stage] and found.name not in program.results else None


@functools.lru_cache(maxsize=256)
def in_place(stage: Map, name: str, rank: int = 4) -> bool:
    """Whether a stage reads a tensor of ``rank`` dimensions, and at its own place only."""
    loads = [n for n in postorder(*stage.roots()) if isinstance(n, Load) and n.tensor == name]
    return bool(loads) and all(n.indices == _PLACE[:rank] for n in loads)


@functools.lru_cache(maxsize=256)
def on_rows_at_hand(stage: Map, name: str, statistics: tuple[tuple[str, str], ...]) -> Map:
    """``stage`` with the rows ``name`` at hand, and with what the kernel makes beside them of a row: ``statistics`` are
    the names that ``stage`` has for its outputs, and its own."""
    found: dict[Expr, Expr] = {Load(name, _PLACE, FLOAT): INNER}
    found |= {Load(theirs, _PLACE[:3], FLOAT): here(own) for theirs, own in statistics}
    return map_record(stage, lambda e: substitute(e, found))


def here(name: str) -> Input:
    """What a kernel makes of the row at hand, in a stage that it takes in."""
    return Input(f"{name}{_HERE}", FLOAT, "bhq")


def statistics(stage: Map) -> tuple[str, ...]:
    """Outputs of the kernel that ``stage`` reads of the row at hand."""
    found = [n.name for n in postorder(*stage.roots()) if isinstance(n, Input) and n.name.endswith(_HERE)]
    return tuple(dict.fromkeys(name.removesuffix(_HERE) for name in found))
