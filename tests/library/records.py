"""Records of the library's test cases: what to call a program with, and a dense PyTorch definition to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import torch

Tensor = torch.Tensor
Params = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """Lengths of one call: batch, query heads, key heads, query length, key length."""

    B: int
    H: int
    Hkv: int
    Lq: int
    Lk: int

    def sizes(self) -> dict[str, int]:
        return {"B": self.B, "H": self.H, "Hkv": self.Hkv, "Lq": self.Lq, "Lk": self.Lk}


@dataclass(frozen=True)
class Setup:
    """A shape and the scalar parameters that go with it."""

    shape: Shape
    params: Params = field(default_factory=dict)


@dataclass(frozen=True)
class Points:
    """What a dense definition is given: the shape, index grids that broadcast to [B, H, Lq, Lk], parameters, tensors.

    ``tensors`` holds the captured tensors and, under names that start with an underscore, facts they were made from.
    """

    shape: Shape
    params: Params
    tensors: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.params[name]

    @property
    def b(self) -> Tensor:
        return torch.arange(self.shape.B).view(-1, 1, 1, 1)

    @property
    def h(self) -> Tensor:
        return torch.arange(self.shape.H).view(1, -1, 1, 1)

    @property
    def q(self) -> Tensor:
        return torch.arange(self.shape.Lq).view(1, 1, -1, 1)

    @property
    def k(self) -> Tensor:
        return torch.arange(self.shape.Lk).view(1, 1, 1, -1)

    def rows(self, visible: Callable[[int], Iterable[int]]) -> Tensor:
        """Build a mask [Lq, Lk] from the set of keys each query sees; keys out of range are ignored."""
        mask = torch.zeros(self.shape.Lq, self.shape.Lk, dtype=torch.bool)
        for i in range(self.shape.Lq):
            keys = [j for j in visible(i) if 0 <= j < self.shape.Lk]
            mask[i, keys] = True
        return mask

    def pairs(self, axes: str, value: Callable[..., Any]) -> Tensor:
        """Evaluate ``value(*axes, i, j)`` for each pair, ``axes`` some of "bh"; [B or 1, H or 1, Lq, Lk]."""
        s = self.shape
        lead = [range(n) if axis in axes else range(1) for axis, n in (("b", s.B), ("h", s.H))]
        own = [[x for axis, x in zip("bh", at, strict=True) if axis in axes] for at in product(*lead)]
        values = [[[value(*at, i, j) for j in range(s.Lk)] for i in range(s.Lq)] for at in own]
        return torch.tensor(values).view(len(lead[0]), len(lead[1]), s.Lq, s.Lk)

    def listed(self, name: str) -> Any:
        """A captured tensor as nested lists."""
        return self.tensors[name].tolist()

    def floats(self, *names: str) -> Any:
        """Captured float tensors in float64, on the graph of the instance's leaves."""
        found = [self.tensors[name].double() for name in names]
        return found[0] if len(found) == 1 else found

    def tril(self) -> Tensor:
        """The causal mask [Lq, Lk]."""
        return torch.ones(self.shape.Lq, self.shape.Lk, dtype=torch.bool).tril()

    def false(self, *lead: int) -> Tensor:
        """An empty mask [*lead, Lq, Lk]."""
        return torch.zeros(*lead, self.shape.Lq, self.shape.Lk, dtype=torch.bool)


MaskFn = Callable[[Points], Tensor]
ScoreFn = Callable[[Tensor, Points], Tensor]
TensorsFn = Callable[[Setup, torch.Generator], dict[str, Any]]


def no_tensors(setup: Setup, generator: torch.Generator) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Case:
    """One program with a small and a middle-sized call and its dense definition.

    ``mask`` returns a bool tensor that broadcasts to [B, H, Lq, Lk]; ``score`` maps the float64 scores [B, H, Lq, Lk].
    ``resizable`` cases make sense at any number of tokens; the others have a grid or halves. ``magnitude`` scales q and
    k, for programs that multiply scores by much. A ``light`` case has one small call, and is not run at every head
    size, dtype and length: what it adds is a formula, not a way through the compiler.
    """

    program: str
    tiny: Setup
    medium: Setup
    mask: MaskFn | None = None
    score: ScoreFn | None = None
    tensors: TensorsFn = no_tensors
    resizable: bool = True
    magnitude: float = 1.0

    @property
    def light(self) -> bool:
        return self.medium is self.tiny

    def instance(self, size: str, seed: int = 0) -> Instance:
        """Make the call named ``tiny`` or ``medium``."""
        setup: Setup = getattr(self, size)
        made = self.tensors(setup, torch.Generator().manual_seed(seed))
        return Instance(self, setup, made, seed)

    def at(self, length: int, seed: int = 0) -> Instance:
        """Make the medium call with another number of tokens.

        Raises:
            ValueError: the case is not ``resizable``: its lengths follow from a grid.
        """
        if not self.resizable:
            raise ValueError(f"{self.program} has lengths that follow from its parameters")
        setup = replace(self.medium, shape=replace(self.medium.shape, Lq=length, Lk=length))
        return Instance(self, setup, self.tensors(setup, torch.Generator().manual_seed(seed)), seed)


@dataclass(frozen=True, eq=False)
class Instance:
    """One concrete call of a case."""

    case: Case
    setup: Setup
    made: Mapping[str, Any]
    seed: int

    @property
    def shape(self) -> Shape:
        return self.setup.shape

    @property
    def params(self) -> Params:
        """Scalar parameters as the case gives them."""
        return self.setup.params

    @cached_property
    def captured(self) -> dict[str, Tensor]:
        """Captured tensors by name (float32, int32 and bool)."""
        return {name: value for name, value in self.made.items() if not name.startswith("_")}

    @cached_property
    def points(self) -> Points:
        return Points(self.shape, self.setup.params, self.made)

    def operands(self, d: int = 8, dv: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Return q [B, H, Lq, d], k [B, Hkv, Lk, d], v [B, Hkv, Lk, dv] with values that ``dtype`` holds exactly."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        s = self.shape
        shapes = ((s.B, s.H, s.Lq, d), (s.B, s.Hkv, s.Lk, d), (s.B, s.Hkv, s.Lk, dv or d))
        q, k, v = (torch.randn(x, generator=generator).to(dtype) for x in shapes)
        return q * self.case.magnitude, k * self.case.magnitude, v

    def dense_mask(self) -> Tensor:
        """Return the mask [B, H, Lq, Lk]."""
        s = self.shape
        mask = torch.ones((), dtype=torch.bool) if self.case.mask is None else self.case.mask(self.points)
        return mask.expand(s.B, s.H, s.Lq, s.Lk)

    def dense_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Return output [B, H, Lq, Dv] and natural-log lse [B, H, Lq] in float64; empty rows give 0 and -inf."""
        groups = self.shape.H // self.shape.Hkv
        k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), k) * scale
        if self.case.score is not None:
            scores = self.case.score(scores, self.points)
        mask = self.dense_mask()
        scores = scores.masked_fill(~mask, -math.inf)
        empty = ~mask.any(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        return weights @ v, torch.logsumexp(scores, -1)


def light(program: str, setup: Setup, mask: MaskFn | None = None, score: ScoreFn | None = None, **rest: Any) -> Case:
    """A case with one small call."""
    return Case(program, setup, setup, mask, score, **{"resizable": False, **rest})


def small(lq: int, lk: int | None = None, **params: Any) -> Setup:
    """Two batch elements, two heads on one key head."""
    return Setup(Shape(2, 2, 1, lq, lq if lk is None else lk), params)


def square(length: int, **params: Any) -> Setup:
    """Self-attention of ``length`` tokens, two batch elements, four heads on two key heads."""
    return Setup(Shape(2, 4, 2, length, length), params)


def cross(lq: int, lk: int, **params: Any) -> Setup:
    """Queries and keys of different lengths."""
    return Setup(Shape(2, 4, 2, lq, lk), params)


def groups_mask(length: int, groups: Iterable[Tensor]) -> Tensor:
    """Return the mask [length, length] in which the members of each group see each other; -1 is nobody."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for group in groups:
        members = group.reshape(-1)
        members = members[members >= 0]
        mask[members[:, None], members[None, :]] = True
    return mask


def split_lengths(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """Cut ``total`` tokens into ``parts`` random lengths; some may be 0."""
    cuts = torch.randint(0, total + 1, (parts - 1,), generator=generator).sort().values.tolist()
    edges = [0, *cuts, total]
    return [b - a for a, b in pairwise(edges)]


def ids_of(lengths: Iterable[int]) -> Tensor:
    """Number consecutive segments from 0: lengths (2, 0, 1) give 0 0 2."""
    lengths = list(lengths)
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(torch.int32)


def ints(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random integers from ``low`` to ``high - 1``; ``low`` where that is empty."""
    return torch.randint(low, max(high, low + 1), shape, generator=generator, dtype=torch.int32)


def floats(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def flags(shape: tuple[int, ...], share: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) < share
