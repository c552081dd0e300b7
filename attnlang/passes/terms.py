"""Score terms that nothing reads are left out, so that a stage whose score is one term is a stage of one term."""

from __future__ import annotations

import functools
from dataclasses import replace

from attnlang.ir import FLOAT, Attend, Branch, Dot, Expr, Input, input_names, map_record, substitute
from attnlang.ir.build import s as SCORE
from attnlang.ir.stages import RAW

__all__ = ["alone"]


def _names(*roots: Expr | None) -> set[str]:
    return input_names(*(e for e in roots if e is not None))


def _others(stage: Attend) -> list[Expr | None]:
    """Every expression of pairs but scores: there ``s`` is the modified score, and ``raw`` the first term."""
    found: list[Expr | None] = [e for out in stage.outputs for e in (out.value, *out.key)]
    for branch in stage.branches:
        norm = branch.normalizer
        found += [branch.weight, norm.weight, *(e for st in norm.stats for e in (st.lift, st.seed))]
    return found


def _read(stage: Attend) -> list[Dot]:
    first = stage.terms[0]
    scores, others = _names(*(b.score for b in stage.branches)), _names(*_others(stage))
    return [
        t
        for t in stage.terms
        if t.name in scores or (t.name in others and t.name != SCORE.name) or (t is first and RAW.name in others)
    ]


@functools.lru_cache(maxsize=256)
def alone(stage: Attend) -> tuple[Attend, bool]:
    """``stage`` with the one term that anything reads as its first, and whether the scale of the call multiplies it.

    A stage in which more terms are read, or none, is given back as it is.
    """
    read = _read(stage)
    if len(stage.terms) == 1 or len(read) != 1 or stage.terms[0].name != SCORE.name:
        return stage, True
    (term,) = read
    if term is stage.terms[0]:
        return replace(stage, terms=(term,)), True
    here = Input(term.name, FLOAT)

    def in_score(expr: Expr) -> Expr:
        return substitute(expr, {here: SCORE})

    def elsewhere(expr: Expr) -> Expr:
        return substitute(expr, {here: RAW})

    def moved(branch: Branch) -> Branch:
        return replace(map_record(branch, elsewhere), score=in_score(branch.score))

    return replace(
        stage,
        terms=(replace(term, name=SCORE.name),),
        branches=tuple(map(moved, stage.branches)),
        outputs=tuple(map_record(out, elsewhere) for out in stage.outputs),
    ), False
