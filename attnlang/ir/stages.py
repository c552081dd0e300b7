"""Stages: the records a program is a graph of.

``Attend`` is the one stage in which pairs of tokens meet; ``Map``, ``Pool`` and ``Select`` work on rows before and
after it. Every stage names its outputs; a later stage reads them by name, as rows of an operand or as a captured
tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from .build import FALSE, TRUE, op, size
from .build import b as _b
from .build import h as _h
from .build import k as _k
from .build import q as _q
from .build import s as _s
from .nodes import Expr, Input
from .types import FLOAT

__all__ = [
    "BODY_LEFT",
    "BODY_RIGHT",
    "DEFAULT_OUTPUTS",
    "INNER",
    "KEY",
    "KEY_ADDRESS",
    "OUTPUT_NAMES",
    "PLAIN",
    "QUERY",
    "QUERY_ADDRESS",
    "RAW",
    "SOFTMAX",
    "STAGE_INPUTS",
    "VALUE",
    "WEIGHT",
    "Address",
    "Attend",
    "Branch",
    "Dot",
    "Map",
    "Normalizer",
    "Operand",
    "Output",
    "Pool",
    "Select",
    "Stage",
    "Stat",
    "stat",
]

STAGE_INPUTS = ("q", "k", "v")
"""Names by which stages read the operands of the call, each [batch, heads, rows, features]."""
OUTPUT_NAMES = ("o", "lse")
"""Outputs every call knows: the attention output and the logarithm of the softmax sum."""


class Address(NamedTuple):
    """Where a row of an operand lives, as expressions over the indices b, h and the row index (q or k)."""

    batch: Expr
    head: Expr
    row: Expr


QUERY_ADDRESS = Address(_b, _h, _q)
KEY_ADDRESS = Address(_b, op("floordiv", _h, op("floordiv", size("H"), size("Hkv"))), _k)
"""Grouped-query attention is this map: query head h reads key head h // (H // Hkv)."""


@dataclass(frozen=True)
class Operand:
    """Rows of a tensor: ``source`` is an operand of the call (``q k v``), the output of an earlier stage, or a float
    captured tensor whose last dimension is the features. ``index`` addresses all dimensions but the last; for
    operands of the call it is an :class:`Address`."""

    source: str
    index: tuple[Expr, ...]

    @property
    def address(self) -> Address:
        """The index of rows [batch, heads, rows, features].

        Raises:
            TypeError: the operand has another number of dimensions.
        """
        return Address(*self.index)


QUERY = Operand("q", QUERY_ADDRESS)
KEY = Operand("k", KEY_ADDRESS)
VALUE = Operand("v", KEY_ADDRESS)

BODY_LEFT, BODY_RIGHT = Input("x", FLOAT, "bhqd"), Input("y", FLOAT, "bhqkd")
"""What the body of a term reads: one feature of the left and of the right row."""


@dataclass(frozen=True)
class Dot:
    """A score term: the sum over features d of ``body``, which is ``x * y`` (a dot product) where it is None.

    ``name`` is the input it defines for score, normaliser, weight and outputs. The first term of a stage is multiplied
    by the scale of the call; further terms are not. ``body`` is an expression over :data:`BODY_LEFT`,
    :data:`BODY_RIGHT` and loads indexed by ``d`` (additive, L1 and squared-distance scores).
    """

    name: str = "s"
    left: Operand = QUERY
    right: Operand = KEY
    body: Expr | None = None


def stat(name: str) -> Input:
    """A row statistic, as normalisers, weights and outputs read it."""
    return Input(name, FLOAT, "bhq")


RAW, WEIGHT, PLAIN = Input("raw", FLOAT), Input("w", FLOAT), Input("p", FLOAT)
"""Per pair: the first term before the score function, the final weight, and the weight before the weight function."""
INNER = ("raw", "w", "p")


@dataclass(frozen=True)
class Stat:
    """A row statistic: a ``monoid`` over the visible keys of ``lift``, combined with ``seed`` where there is one.

    ``max``, ``min`` and ``sum`` are what they say. ``root`` is the number t with ``sum of lift = 1``, where ``lift``
    reads the statistic's own name for t and falls with t; the search starts at ``seed``, where the sum is at least 1.
    ``lift`` may read the modified score ``s``, the raw terms, indices, captured tensors and earlier statistics;
    ``seed`` whatever a row knows and earlier statistics. ``grouped`` statistics have one value per group of the branch.
    """

    name: str
    monoid: str
    lift: Expr
    seed: Expr | None = None
    grouped: bool = False


@dataclass(frozen=True)
class Normalizer:
    """Turns modified scores into weights: row statistics, and ``weight`` of a pair given its row's statistics.

    A row without visible keys has weights of nobody: its outputs are what their ``empty`` says.
    """

    name: str
    stats: tuple[Stat, ...]
    weight: Expr


def _softmax() -> Normalizer:
    shifted = op("exp", op("sub", _s, stat("m")))
    stats = (Stat("m", "max", _s), Stat("l", "sum", shifted))
    return Normalizer("softmax", stats, op("div", shifted, stat("l")))


SOFTMAX = _softmax()


@dataclass(frozen=True)
class Branch:
    """One way of turning the shared score terms into weights; branches of a stage share one pass over the keys.

    ``score`` reads the terms by name. ``weight``, where given, replaces the normaliser's weight ``w`` (it also reads
    ``s``, ``raw``, terms and statistics). ``group`` numbers the group of a pair, from 0 to ``groups`` - 1; a pair
    outside takes part in no grouped statistic.
    """

    mask: Expr = TRUE
    score: Expr = _s
    normalizer: Normalizer = SOFTMAX
    weight: Expr | None = None
    group: Expr | None = None
    groups: Expr | None = None


@dataclass(frozen=True)
class Output:
    """An output of a stage: the ``monoid`` over axes ``over`` of ``value``, times ``rows`` of an operand if given.

    Its shape is [B, H], then the axes of q and k that are not reduced, then ``extents``, then the features of ``rows``.
    ``value`` reads ``w``, ``p``, ``s``, ``raw``, terms, statistics, indices and captured tensors. ``key`` are int
    expressions that say which element of ``extents`` a pair adds to; out of range it adds to none. Monoids are ``sum``,
    ``max``, ``min`` and ``argmax`` (the k of the largest value, int64). An output over nothing whose value does not
    read the pair is a function of a row; one that does is the map itself. ``empty`` is what nothing reduces to.

    ``o`` is the sum over k of w times rows of v; ``lse``, column sums, masses of key groups, entropy, block maxima and
    chosen rows are the same record.
    """

    name: str
    value: Expr
    rows: Operand | None = None
    over: str = "k"
    monoid: str = "sum"
    key: tuple[Expr, ...] = ()
    extents: tuple[Expr, ...] = ()
    branch: int = 0
    empty: float = 0.0


LSE = op("add", stat("m"), op("log", stat("l")))
DEFAULT_OUTPUTS = (Output("o", WEIGHT, VALUE), Output("lse", LSE, over="", empty=float("-inf")))


@dataclass(frozen=True)
class Attend:
    """The stage in which pairs of tokens meet (see docs/architecture.md, section 2).

    ``position`` maps an axis to the position that hooks see when it differs from the slot that loops and addresses use
    (token permutations, gathered tokens, strided queries). ``lengths`` are the numbers of queries and keys.
    """

    name: str = "attend"
    terms: tuple[Dot, ...] = (Dot(),)
    branches: tuple[Branch, ...] = (Branch(),)
    outputs: tuple[Output, ...] = DEFAULT_OUTPUTS
    position: tuple[tuple[str, Expr], ...] = ()
    lengths: tuple[Expr, Expr] = (size("Lq"), size("Lk"))

    @property
    def branch(self) -> Branch:
        """The branch of a stage that has exactly one."""
        (branch,) = self.branches
        return branch

    @property
    def made(self) -> tuple[str, ...]:
        """Names of the tensors the stage makes."""
        return tuple(o.name for o in self.outputs)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the operands it reads."""
        return tuple(dict.fromkeys(o.source for o in self.operands()))

    @property
    def standard(self) -> bool:
        """Whether this is softmax attention of q, k and v with a mask and a score, rows in their order.

        Which batch element and which head of k and v serve a query may be any map that both share.
        """
        if len(self.terms) != 1 or len(self.branches) != 1 or len(self.outputs) != 2:
            return False
        (term,), branch, (o, lse) = self.terms, self.branch, self.outputs
        return (
            (term.name, term.left, term.right.source, term.body) == ("s", QUERY, "k", None)
            and len(term.right.index) == 3
            and term.right.index[2] is _k
            and branch == Branch(branch.mask, branch.score)
            and (replace(o, rows=VALUE), lse) == DEFAULT_OUTPUTS
            and o.rows == Operand("v", term.right.index)
            and not self.position
            and self.lengths == Attend().lengths
        )

    def operands(self) -> tuple[Operand, ...]:
        """Every operand the stage reads, in a fixed order."""
        both = [o for t in self.terms for o in (t.left, t.right)]
        return (*both, *(o.rows for o in self.outputs if o.rows is not None))

    def roots(self) -> tuple[Expr, ...]:
        """Every hook expression of the stage, in a fixed order."""
        hooks: list[Expr | None] = []
        for branch in self.branches:
            norm = branch.normalizer
            hooks += [branch.score, branch.mask, norm.weight, branch.weight, branch.group, branch.groups]
            hooks += [e for st in norm.stats for e in (st.lift, st.seed)]
        hooks += [t.body for t in self.terms]
        hooks += [e for operand in self.operands() for e in operand.index]
        for output in self.outputs:
            hooks += [output.value, *output.key, *output.extents]
        hooks += [e for _, e in self.position]
        if self.lengths != (size("Lq"), size("Lk")):
            hooks += self.lengths
        return tuple(e for e in hooks if e is not None)


@dataclass(frozen=True)
class Map:
    """Rows made point by point from other tensors: prologues (RoPE, norms) and epilogues (gates, sums of branches).

    The result ``name`` has the given ``extents`` [B, H, L, D]; ``value`` is an expression over b, h, q (the row) and d
    (the feature) that loads from operands of the call, earlier outputs and captured tensors by full index. ``lets`` are
    reductions over d, in order: (name, monoid, expression), read as ``Input(name, FLOAT, "bhq")``; monoids are ``sum``,
    ``max`` and ``mean``.
    """

    name: str
    extents: tuple[Expr, Expr, Expr, Expr]
    value: Expr
    lets: tuple[tuple[str, str, Expr], ...] = ()

    @property
    def made(self) -> tuple[str, ...]:
        return (self.name,)

    def roots(self) -> tuple[Expr, ...]:
        return (*self.extents, *(e for _, _, e in self.lets), self.value)


@dataclass(frozen=True)
class Pool:
    """One row for each block of ``block`` rows of ``source`` [B, H, L, D], a block starting every ``stride`` rows.

    ``how`` is ``mean``, ``max``, ``min``, ``sum``, ``first`` or ``last`` of the rows that exist; blocks start at 0,
    ``stride``, ... while they begin inside the rows.
    """

    name: str
    source: str
    block: Expr
    how: str = "mean"
    stride: Expr | None = None

    @property
    def made(self) -> tuple[str, ...]:
        return (self.name,)

    def roots(self) -> tuple[Expr, ...]:
        return (self.block, *((self.stride,) if self.stride is not None else ()))


@dataclass(frozen=True)
class Select:
    """Chooses keys for every row: a bool tensor ``name`` of ``extents`` [B, H, rows, keys] for later masks to read.

    ``score`` is evaluated over b, h, q (the row) and k (what is chosen); pairs outside ``candidates`` are never chosen,
    pairs in ``forced`` always (and count towards ``top``). Exactly one rule is given: ``top``, the largest scores, ties
    to the first; ``threshold``, scores at least that; ``mass``, the fewest largest scores whose softmax over the
    candidates sums to at least that. Where there are fewer candidates than ``top``, all are chosen. A choice passes no
    gradient.
    """

    name: str
    extents: tuple[Expr, Expr, Expr, Expr]
    score: Expr
    candidates: Expr = TRUE
    forced: Expr = FALSE
    top: Expr | None = None
    threshold: Expr | None = None
    mass: Expr | None = None

    @property
    def made(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def rules(self) -> tuple[Expr, ...]:
        """The rules that are given; a legal stage has one."""
        return tuple(e for e in (self.top, self.threshold, self.mass) if e is not None)

    def roots(self) -> tuple[Expr, ...]:
        return (*self.extents, self.score, self.candidates, self.forced, *self.rules)


Stage: TypeAlias = Attend | Map | Pool | Select
"""Union of the stage kinds."""
