"""The tests of soundness have teeth: break any one rule of the domain, and one of them fails.

Each mutation makes one rule a little too sure of itself. Rules of the two operator tables are judged by the tests of
single rules; what lies above them (linear forms, congruences, cases, captured summaries) by random programs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest
import test_float_intervals
import test_intervals
from mask_programs import Maker, brute_force, violations

import attnlang.passes.float_intervals as floats
import attnlang.passes.intervals as ints
from attnlang.passes.intervals import Interval, Truth
from attnlang.sparsity import analyse, captured, terms

PROGRAMS = 2500
Patch = Callable[[pytest.MonkeyPatch], None]


def narrower(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule with its upper bound one too low wherever the interval has room."""

    def broken(*args: Any) -> Any:
        lo, hi = rule(*args)
        return Interval(lo, hi - (hi > lo))

    return broken


def higher(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The float rule with its lower bound moved up wherever the range has room."""

    def broken(*args: Any) -> Any:
        lo, hi, nan = rule(*args)
        with np.errstate(all="ignore"):
            middle = np.where(np.isfinite(lo) & np.isfinite(hi), (lo + hi) / 2, lo)
        return floats.FloatRange(np.where(lo < hi, middle, lo), hi, nan)

    return broken


def surer(rule: Callable[..., Truth]) -> Callable[..., Truth]:
    """The comparison that is never undecided."""

    def broken(*args: Any) -> Truth:
        true, false = rule(*args)
        return Truth(true, false & (true == False))  # noqa: E712 - elementwise on arrays

    return broken


def item(table: dict[str, Any], name: str, wrap: Callable[..., Any]) -> Patch:
    return lambda patch: patch.setitem(table, name, wrap(table[name]))


def attribute(owner: Any, name: str, wrap: Callable[..., Any]) -> Patch:
    return lambda patch: patch.setattr(owner, name, wrap(getattr(owner, name)))


def no_clamp(old: Any) -> Any:
    return staticmethod(lambda r, n: Interval(np.minimum(np.abs(r.lo), n - 1), np.minimum(np.abs(r.hi), n - 1)))


def wrong_step(old: Any) -> Any:
    return lambda self, form: (old(self, form)[0], old(self, form)[1] + (old(self, form)[0] > 1))


def lossy_combine(old: Any) -> Any:
    def combine(self: Any, a: Any, b: Any, scale: int) -> Any:
        out = old(self, a, b, scale)
        return out._replace(const=out.const - 1) if out is not None and len(out.terms) > 1 else out

    return combine


def always_rising(old: Any) -> Any:
    return lambda self, axis: 1


def swapped_cases(old: Any) -> Any:
    return lambda self, form, ref, c: (old(self, form, ref, c)[0],) * 2


def forgetful_negation(old: Any) -> Any:
    return lambda self, ref: ref if self.nodes[ref].op in ("and", "or") else old(self, ref)


def shorter_counts(old: Any) -> Any:
    return lambda self, axis: np.minimum(old(self, axis), 3)


def quotient_of_the_low_end(old: Any) -> Any:
    return lambda xp, a, b: old(xp, Interval(a.lo, a.lo), b)


RULES: dict[str, tuple[Patch, Callable[[], None]]] = {
    **{
        f"int {name}": (item(ints.RULES, name, narrower), partial(test_intervals.check_rule, name))
        for name in ints.RULES
        if name != "where"
    },
    **{
        f"int {name}": (item(ints.COMPARISONS, name, surer), partial(test_intervals.check_comparison, name))
        for name in ints.COMPARISONS
    },
    **{
        f"float {name}": (item(floats.FLOAT_RULES, name, higher), partial(test_float_intervals.check_rule, name))
        for name in floats.FLOAT_RULES
        if name != "tan"  # gives everything already
    },
    **{
        f"float {name}": (
            item(floats.FLOAT_COMPARISONS, name, surer),
            partial(test_float_intervals.check_comparison, name),
        )
        for name in floats.FLOAT_COMPARISONS
    },
}

PARTS: dict[str, Patch] = {
    **{f"int {name}": item(ints.RULES, name, narrower) for name in ("floordiv", "mod", "abs", "min", "mul", "where")},
    "clamped load": attribute(captured.Captured, "_clamp", no_clamp),
    "monotone": attribute(captured.Captured, "_monotone", always_rising),
    "any and all": attribute(captured.Captured, "_counts", shorter_counts),
    "block minima": attribute(captured._Line, "query", lambda old: lambda s, r, lo, hi: old(s, r, lo, lo)),
    "boxes of flags": attribute(
        captured.Captured, "_sums", lambda old: lambda s, r: old(s, [Interval(x.lo, x.lo) for x in r])
    ),
    "boxes of numbers": attribute(
        captured.Captured, "_cell_query", lambda old: lambda s, side, r: old(s, side, [Interval(x.lo, x.lo) for x in r])
    ),
    "congruence": attribute(terms.Terms, "step", wrong_step),
    "linear form": attribute(terms.Terms, "_combine", lossy_combine),
    "cases of abs, min, max, where": attribute(terms.Terms, "_cases", swapped_cases),
    "negation": attribute(terms.Terms, "negate", forgetful_negation),
}


@pytest.mark.parametrize("name", list(RULES))
def test_a_broken_rule_fails_its_own_test(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, check = RULES[name]
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("name", list(PARTS))
def test_a_broken_part_is_found_by_random_programs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PARTS[name](monkeypatch)
    for seed in range(PROGRAMS):
        problem = Maker(Random(seed)).problem()
        try:
            claimed = analyse(*problem.arguments, problem.tile).dense_kinds()
        except Exception:
            return  # a mutant that crashes is found, too
        if violations(claimed, brute_force(problem)):
            return
    pytest.fail(f"{PROGRAMS} random programs did not notice the broken part")
