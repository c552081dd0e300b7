"""What names mean at one place of a file, and the records that definitions leave behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from attnlang.ir import AXES, BUILTIN_SIZES, Expr, Input, Program, ScalarParam, TensorParam, Type, build, postorder
from attnlang.ir.verify import MAX_NODES

from . import syntax as ast
from .errors import AttnError, Source, Span
from .functions import CONSTANTS

__all__ = ["RESERVED_VALUES", "TYPES", "Budget", "Names", "Poisoned", "Scope", "Template", "Value"]

TYPES = {"bool": Type.BOOL, "int": Type.INT, "float": Type.FLOAT}

RESERVED_VALUES = frozenset({*AXES, *BUILTIN_SIZES, *CONSTANTS, *TYPES, "s", "mask", "score"})
"""Names that no parameter, `let` or coordinate can take."""


class Poisoned(Exception):
    """A name whose definition has been reported already is used: stay silent."""


class Budget:
    """Bounds the work of one call of ``parse``, so that definitions that multiply cannot run for minutes."""

    LIMIT = 600_000

    def __init__(self) -> None:
        self.spent = 0

    def charge(self, amount: int, source: Source, span: Span) -> None:
        self.spent += amount
        if self.spent > self.LIMIT:
            raise source.error(
                span,
                "ATL106",
                f"the definitions of this file expand to more than {self.LIMIT} steps",
                "a helper or pattern that uses another twice doubles its size",
            )

    def count(self, roots: tuple[Expr, ...], source: Source, span: Span) -> int:
        """Charge for every node below ``roots`` and return how many there are.

        Raises:
            AttnError: more nodes than one program may have.
        """
        size = 0
        for _ in postorder(*roots):
            size += 1
            if size > MAX_NODES:
                raise source.error(
                    span,
                    "ATL106",
                    f"this expands to more than {MAX_NODES} operations",
                    "put constant tables into a captured tensor",
                )
        self.charge(size, source, span)
        return size


@dataclass(frozen=True)
class Template:
    """A lowered helper or pattern, ready to be applied to arguments by substitution.

    ``order`` has the names of all parameters as declared. A helper has ``value``, a pattern ``program``.
    """

    name: str
    scalars: tuple[ScalarParam, ...]
    tensors: tuple[TensorParam, ...]
    order: tuple[str, ...]
    size: int
    value: Expr | None = None
    program: Program | None = None

    def param(self, name: str) -> ScalarParam | TensorParam:
        both: tuple[ScalarParam | TensorParam, ...] = (*self.scalars, *self.tensors)
        return next(p for p in both if p.name == name)

    @property
    def kind(self) -> str:
        return "helper" if self.program is None else "pattern"


@dataclass(frozen=True)
class Names:
    """Callable names of a file: its definitions, imported ones, and imported files. None marks a broken definition."""

    templates: dict[str, Template | None] = field(default_factory=dict)
    modules: dict[str, Mapping[str, Template | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """A scalar that has a name; ``reads`` are the inputs (scores, weights, statistics) it depends on."""

    expr: Expr
    reads: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Scope:
    """What an expression may read.

    ``values``: scalars and captured tensors by name, None where the definition was wrong. ``later``: names defined
    further down and their line. ``inputs``: what the core computes and hooks may read (scores, weights, statistics),
    ``known`` those that can be read here, None for all. ``axes``: the indices that are known here; ``tensors``: whether
    captured tensors are, ``elements`` whether those of `Q K V` are. ``over_d`` gathers reductions over the features
    where there can be any. ``what`` says in words where "here" is.
    """

    source: Source
    names: Names
    budget: Budget
    what: str
    values: dict[str, Value | TensorParam | None] = field(default_factory=dict)
    sizes: set[str] = field(default_factory=lambda: set(BUILTIN_SIZES))
    statics: set[str] = field(default_factory=set)
    grids: dict[str, dict[str, Expr]] = field(default_factory=dict)
    later: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Input] = field(default_factory=lambda: {"s": build.s})
    known: frozenset[str] | None = frozenset()
    axes: str = "bhqk"
    tensors: bool = True
    elements: bool = False
    over_d: dict[tuple[str, Expr], Input] | None = None

    def restricted(self, what: str, *, axes: str = "bhqk", known: Iterable[str] = (), tensors: bool = True) -> Scope:
        """Return this scope as seen from ``what``; the tables are shared."""
        return replace(self, what=what, axes=axes, known=frozenset(known), tensors=tensors)

    def error(self, at: ast.Node | Span, code: str, message: str, hint: str = "") -> AttnError:
        return self.source.error(at.span if isinstance(at, ast.Node) else at, code, message, hint)
