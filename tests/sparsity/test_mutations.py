"""The tests of soundness have teeth: break any one rule of the domain, and one of them fails.

Each mutation makes one rule a little too sure of itself. Rules of the two operator tables are judged by the tests of
single rules; what lies above them (linear forms, congruences, cases, captured summaries) by random programs.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from random import Random
from typing import Any

import numpy as np
import pytest
import test_float_intervals
import test_intervals
from cell_patch import small_cells
from mask_programs import Maker, Problem, brute_force, violations
from mutants import HARMLESS, MUTANTS, OWNERS, narrower, surer

import attnlang.passes.float_intervals as floats
import attnlang.passes.intervals as ints
from attnlang.ir import FLOAT, INT, Load, Size
from attnlang.ir.build import cast, const, k, op, q
from attnlang.passes.intervals import Truth
from attnlang.sparsity import analyse, domain

PROGRAMS = 2500
PROPERTIES = (property, cached_property, staticmethod)
Patch = Callable[[pytest.MonkeyPatch], None]


def higher(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The float rule with its lower bound moved up wherever the range has room."""

    def broken(*args: Any) -> Any:
        lo, hi, nan = rule(*args)
        with np.errstate(all="ignore"):
            middle = np.where(np.isfinite(lo) & np.isfinite(hi), (lo + hi) / 2, lo)
        return floats.FloatRange(np.where(lo < hi, middle, lo), hi, nan)

    return broken


def item(table: dict[str, Any], name: str, wrap: Callable[..., Any]) -> Patch:
    return lambda patch: patch.setitem(table, name, wrap(table[name]))


def check_truth(name: str) -> None:
    """Assert that a rule of TRUTH_RULES allows what some values give, and for ints or bools nothing else."""
    truths = [Truth(True, False), Truth(False, True), Truth(True, True)]
    arity = {"and": 3, "or": 3, "ite": 3, "xor": 2, "not": 1}.get(name)
    if arity is None:
        operands = test_intervals.INTERVALS
        compare = {
            "lt0": lambda x: x < 0,
            "eq0": lambda x: x == 0,
            "nonzero": lambda x: x != 0,
            "lt": lambda x, y: x < y,
            "le": lambda x, y: x <= y,
            "eq": lambda x, y: x == y,
        }[name]
        arity = 2 if name in ("lt", "le", "eq") else 1
        inside = lambda i: range(i.lo, i.hi + 1)  # noqa: E731
    else:
        operands = truths
        compare = {
            "and": lambda *x: all(x),
            "or": lambda *x: any(x),
            "ite": lambda c, x, y: x if c else y,
            "xor": lambda x, y: x != y,
            "not": lambda x: not x,
        }[name]
        inside = lambda t: [v for v, may in ((True, t.true), (False, t.false)) if may]  # noqa: E731
    for args in itertools.product(operands, repeat=arity):
        got = {bool(compare(*values)) for values in itertools.product(*map(inside, args))}
        given = [floats.FloatRange(float(a.lo), float(a.hi), False) for a in args] if name == "nonzero" else args
        out = domain.TRUTH_RULES[name](*given)
        assert (bool(out.true), bool(out.false)) == (True in got, False in got), (name, args)


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
    **{
        f"truth {name}": (item(domain.TRUTH_RULES, name, surer), partial(check_truth, name))
        for name in domain.TRUTH_RULES
    },
}


@pytest.mark.parametrize("name", list(RULES))
def test_a_broken_rule_fails_its_own_test(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, check = RULES[name]
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("name", list(domain.TRUTH_RULES))
def test_truth_rules_are_exact(name: str) -> None:
    check_truth(name)


def test_every_part_of_the_domain_has_a_broken_version_or_a_reason() -> None:
    parts = set()
    for owner, where in OWNERS.items():
        for name, value in vars(where).items():
            own = getattr(value, "__module__", "").startswith("attnlang.sparsity") or isinstance(value, PROPERTIES)
            here = not inspect.ismodule(where) or getattr(value, "__module__", None) == where.__name__
            if own and here and not name.startswith("__") and not inspect.isclass(value):
                parts.add(f"{owner}.{name}")
    assert parts == set(MUTANTS) | set(HARMLESS)
    assert not set(MUTANTS) & set(HARMLESS)


RARE = [  # what random programs hold once in thousands
    op("eq", op("floordiv", op("floordiv", q, 3), 5), op("floordiv", op("floordiv", k, 3), 5)),
    op("eq", op("mod", op("mod", q, 12), 4), op("mod", op("mod", k, 12), 4)),
    op("ge", Load("doc", (k,), INT), 7),
    op("ge", Load("bias", (k,), FLOAT), -100.0),  # hides NaN
    op("ge", cast(op("ge", q, k), FLOAT), 0.5),
    op("ge", op("where", op("ge", q, k), const(1.0), const(-1.0)), 0.0),
    op("ge", op("where", op("ge", q, k), q, 5), op("add", k, 2)),
    op("ge", k, op("sub", Size("Lk"), 3)),
    op("eq", op("mul", q, 2), op("mul", k, 2)),
    op("ge", op("mul", q, k), 20),
]


@functools.cache
def program(seed: int, rare: bool) -> tuple[Problem, np.ndarray]:
    """A program and its exact tiles, shared by all mutants."""
    problem = Maker(Random(seed)).problem(RARE[seed % len(RARE)] if rare else None)
    return problem, brute_force(problem)


def programs() -> Iterator[tuple[Problem, np.ndarray]]:
    for seed in range(PROGRAMS):
        yield program(seed, False)
        if seed < 40 * len(RARE):
            yield program(seed, True)


OF_CELLS = [name for name in MUTANTS if "ells" in name]  # judged with every table in cells
AGAIN = [f"int {name}" for name in ("floordiv", "mod", "abs", "min", "mul", "where")]


@pytest.mark.parametrize("name", [*MUTANTS, *AGAIN])
def test_a_broken_part_is_found_by_random_programs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in OF_CELLS:
        small_cells(monkeypatch)
    if name in MUTANTS:
        owner, _, attribute = name.partition(".")
        old = vars(OWNERS[owner])[attribute]
        for where in (OWNERS[owner], *filter(inspect.ismodule, OWNERS.values())):  # and whoever imported it by name
            if vars(where).get(attribute) is old:
                monkeypatch.setattr(where, attribute, MUTANTS[name](old))
    else:
        monkeypatch.setitem(ints.RULES, name.removeprefix("int "), narrower(ints.RULES[name.removeprefix("int ")]))
    for problem, exact in programs():
        try:
            claimed = analyse(*problem.arguments, problem.tile).dense_kinds()
        except Exception:
            return  # a mutant that crashes is found, too
        if violations(claimed, exact):
            return
    pytest.fail(f"{PROGRAMS} random programs did not notice the broken part")
