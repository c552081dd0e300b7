"""Programs: parameters, captured tensors and a graph of stages whose hooks are expressions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from .build import TRUE, op
from .build import b as _b
from .build import h as _h
from .build import k as _k
from .build import q as _q
from .build import s as _s
from .nodes import Expr, Input, Scalar, Size
from .types import FLOAT, Type

__all__ = [
    "BUILTIN_SIZES",
    "DEFAULT_OUTPUTS",
    "KEY",
    "KEY_ADDRESS",
    "QUERY",
    "QUERY_ADDRESS",
    "SOFTMAX",
    "VALUE",
    "Address",
    "Attend",
    "Branch",
    "Dot",
    "Normalizer",
    "Operand",
    "Output",
    "Program",
    "ScalarParam",
    "Stage",
    "Stat",
    "TensorParam",
    "simple",
]

BUILTIN_SIZES = ("B", "H", "Hkv", "Lq", "Lk")
"""Sizes every program may read: batch, query heads, key heads, query length, key length."""

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass(frozen=True)
class ScalarParam:
    """A number the program is parameterised by.

    ``static`` parameters must be given when the program is compiled; others are arguments of the kernel. ``default`` is
    None where the caller must give a value.
    """

    name: str
    type: Type
    default: Scalar | None = None
    static: bool = False


@dataclass(frozen=True)
class TensorParam:
    """A captured tensor: element type and symbolic shape (``()`` for a 0-d tensor).

    A dimension is an int expression over sizes, parameters and constants. A dimension that is a lone ``Size`` not among
    :data:`BUILTIN_SIZES` is bound to what the tensor has; every other dimension is checked.
    """

    name: str
    type: Type
    shape: tuple[Expr, ...]


@dataclass(frozen=True)
class Address:
    """Where a row of an operand lives, as expressions over the indices b, h and the row index (q or k)."""

    batch: Expr
    head: Expr
    row: Expr


QUERY_ADDRESS = Address(_b, _h, _q)
KEY_ADDRESS = Address(_b, op("floordiv", _h, op("floordiv", Size("H"), Size("Hkv"))), _k)
"""Grouped-query attention is this map: query head h reads key head h // (H // Hkv)."""


@dataclass(frozen=True)
class Operand:
    """Rows of a tensor: ``source`` is a program input (``q k v``) or the output of an earlier stage."""

    source: str
    address: Address


QUERY = Operand("q", QUERY_ADDRESS)
KEY = Operand("k", KEY_ADDRESS)
VALUE = Operand("v", KEY_ADDRESS)


@dataclass(frozen=True)
class Dot:
    """A score term ``scale * <left_i, right_j>``; ``name`` is the input it defines for score and weight."""

    name: str = "s"
    left: Operand = QUERY
    right: Operand = KEY


@dataclass(frozen=True)
class Stat:
    """A row statistic: a ``monoid`` (``max``, ``sum``) over the visible keys of ``lift``, starting from ``seed``.

    ``shift`` names the running statistic that ``lift`` is taken relative to; when that statistic moves, the core
    rescales this one. Merging two partial rows (split keys, several segments) follows from the monoids.
    """

    name: str
    monoid: str
    lift: Expr
    shift: str = ""
    seed: Expr | None = None


@dataclass(frozen=True)
class Normalizer:
    """Turns modified scores into weights ``basis(s, running statistics) * coef(final statistics)``.

    ``basis`` is what the streaming loop accumulates, ``coef`` what the epilogue multiplies with. ``empty_row`` says
    what a row without visible keys gives (``zero``; ``pass_through`` and ``unmask`` are reserved).
    """

    name: str
    stats: tuple[Stat, ...]
    basis: Expr
    coef: Expr
    empty_row: str = "zero"


def running(name: str) -> Input:
    """A row statistic as known inside the key loop."""
    return Input(name, FLOAT, "bhq")


def final(name: str) -> Input:
    """A row statistic as known after the key loop."""
    return Input(name, FLOAT, "bhq", True)


def _softmax() -> Normalizer:
    shifted = op("exp", op("sub", _s, running("m")))
    stats = (Stat("m", "max", _s), Stat("l", "sum", shifted, shift="m"))
    return Normalizer("softmax", stats, shifted, op("div", 1.0, final("l")))


SOFTMAX = _softmax()


@dataclass(frozen=True)
class Branch:
    """One way of turning the shared score terms into weights; branches of a stage share one pass over the keys.

    ``score`` and ``weight`` read the terms by name (a weight also reads ``w``); ``group`` partitions the keys into
    separate accumulators.
    """

    mask: Expr = TRUE
    score: Expr = _s
    normalizer: Normalizer = SOFTMAX
    weight: Expr | None = None
    group: Expr | None = None


@dataclass(frozen=True)
class Output:
    """An output of a stage: the ``monoid`` over axes ``over`` of ``value``, times ``rows`` of an operand if given.

    ``o`` is the sum over k of w times rows of v; ``lse`` is a function of final statistics; column sums, masses per key
    group (``key`` is the bucket) and gradients of captured tensors are the same record.
    """

    name: str
    value: Expr | None = None
    rows: Operand | None = None
    over: str = "k"
    monoid: str = "sum"
    key: tuple[Expr, ...] = ()
    branch: int = 0


WEIGHT = Input("w", FLOAT)
LSE = op("add", final("m"), op("log", final("l")))
DEFAULT_OUTPUTS = (Output("o", WEIGHT, VALUE), Output("lse", LSE, over=""))


@dataclass(frozen=True)
class Attend:
    """The stage in which pairs of tokens meet (see docs/architecture.md, section 2).

    ``position`` maps an axis to the position that hooks see when it differs from the slot that loops and addresses use
    (token permutations, gathered tokens, strided queries).
    """

    name: str = "attend"
    terms: tuple[Dot, ...] = (Dot(),)
    branches: tuple[Branch, ...] = (Branch(),)
    outputs: tuple[Output, ...] = DEFAULT_OUTPUTS
    position: tuple[tuple[str, Expr], ...] = ()

    @property
    def branch(self) -> Branch:
        """The branch of a stage that has exactly one."""
        (branch,) = self.branches
        return branch

    def operands(self) -> tuple[Operand, ...]:
        """Every operand the stage reads, in a fixed order."""
        both = [o for t in self.terms for o in (t.left, t.right)]
        return (*both, *(o.rows for o in self.outputs if o.rows is not None))

    def roots(self) -> tuple[Expr, ...]:
        """Every hook expression of the stage, in a fixed order."""
        hooks: list[Expr | None] = []
        for branch in self.branches:
            norm = branch.normalizer
            hooks += [branch.score, branch.mask, norm.basis, norm.coef, branch.weight, branch.group]
            hooks += [e for stat in norm.stats for e in (stat.lift, stat.seed)]
        for operand in self.operands():
            hooks += [operand.address.batch, operand.address.head, operand.address.row]
        for output in self.outputs:
            hooks += [output.value, *output.key]
        hooks += [e for _, e in self.position]
        return tuple(e for e in hooks if e is not None)


Stage: TypeAlias = Attend
"""Union of the stage kinds; Map, Pool, Select and Merge join it as they are built."""


@dataclass(frozen=True)
class Program:
    """A complete attention program.

    ``scalars`` and ``tensors`` are in declaration order. ``grids`` keeps the shape of declared index grids
    (axis name to coordinate names and extents) for layouts and pictures; it does not change the meaning.
    """

    name: str
    stages: tuple[Stage, ...] = (Attend(),)
    scalars: tuple[ScalarParam, ...] = ()
    tensors: tuple[TensorParam, ...] = ()
    grids: tuple[tuple[str, tuple[tuple[str, Expr], ...]], ...] = ()
    doc: str = field(default="", compare=False)

    @property
    def attend(self) -> Attend:
        """The Attend stage of a program that has exactly one."""
        (stage,) = self.stages
        return stage

    @property
    def mask(self) -> Expr:
        """The mask of a program with one stage and one branch."""
        return self.attend.branch.mask

    @property
    def score(self) -> Expr:
        """The score of a program with one stage and one branch."""
        return self.attend.branch.score

    def scalar(self, name: str) -> ScalarParam:
        return next(p for p in self.scalars if p.name == name)

    def tensor(self, name: str) -> TensorParam:
        return next(p for p in self.tensors if p.name == name)

    def with_hooks(self, *, mask: Expr | None = None, score: Expr | None = None) -> Program:
        """Return the program with the mask or score of its only branch replaced."""
        stage, old = self.attend, self.attend.branch
        branch = replace(old, mask=old.mask if mask is None else mask, score=old.score if score is None else score)
        return replace(self, stages=(replace(stage, branches=(branch,)),))


def simple(
    name: str,
    *,
    mask: Expr = TRUE,
    score: Expr = _s,
    scalars: tuple[ScalarParam, ...] = (),
    tensors: tuple[TensorParam, ...] = (),
    doc: str = "",
) -> Program:
    """Build the common program: one Attend stage with a mask, a score and softmax."""
    return Program(name, (Attend(branches=(Branch(mask, score),)),), scalars, tensors, doc=doc)
