"""Programs beyond a mask and a score: records of calls with named results, and dense definitions of all of them.

A definition is given a :class:`Given` and returns the results by name; gradients follow from it by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from library.records import Setup, Shape
from library.region_cases import draw

Tensor = torch.Tensor
Results = dict[str, Tensor]
Builder = Callable[[Setup, torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Given:
    """What a definition reads: operands with one key head per query head, everything captured, and parameters."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    values: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.values:
            raise AttributeError(name)
        return self.values[name]

    @property
    def s(self) -> Tensor:
        """Scaled scores [B, H, Lq, Lk]."""
        return self.q @ self.k.mT * self.scale

    @property
    def i(self) -> Tensor:
        return torch.arange(self.q.shape[2])[:, None]

    @property
    def j(self) -> Tensor:
        return torch.arange(self.k.shape[2])[None, :]

    @property
    def causal(self) -> Tensor:
        return self.j <= self.i


def softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over keys; rows without any give 0."""
    if mask is None:
        return torch.softmax(scores, -1)
    mask = mask.expand(scores.shape)
    empty = ~mask.any(-1, keepdim=True)
    hidden = scores.masked_fill(~mask, -torch.inf).masked_fill(empty, 0.0)
    return torch.softmax(hidden, -1).masked_fill(empty, 0.0)


def onehot(x: Tensor, n: int) -> Tensor:
    """Labels as float64 rows; labels outside 0 .. n - 1 give zeros."""
    inside = (x >= 0) & (x < n)
    return torch.nn.functional.one_hot(torch.where(inside, x, 0).long(), n).double() * inside[..., None]


def heads(x: Tensor) -> Tensor:
    """[H] or [B, H] to broadcast over [B, H, Lq, Lk]."""
    return x[..., None, None]


@dataclass(frozen=True)
class Study:
    """One call of a program that has a definition of all its results.

    ``fixed`` names float tensors that choose rather than weigh, and so have no gradient. ``positive`` queries and keys
    are those of a feature map.
    """

    program: str
    shape: Shape
    dense: Callable[[Given], Results]
    captured: Builder = field(default_factory=draw)
    params: Mapping[str, Any] = field(default_factory=dict)
    dim: int = 6
    value_dim: int = 5
    scale: float | None = None
    fixed: frozenset[str] = frozenset()
    positive: bool = False

    def make(self, seed: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Operands and captured tensors, floats in float64."""
        g = torch.Generator().manual_seed(seed)
        s = self.shape
        sizes = ((s.B, s.H, s.Lq, self.dim), (s.B, s.Hkv, s.Lk, self.dim), (s.B, s.Hkv, s.Lk, self.value_dim))
        operands = [torch.randn(x, generator=g, dtype=torch.float64) for x in sizes]
        if self.positive:
            operands[:2] = [x.abs() for x in operands[:2]]
        made = self.captured(Setup(s, dict(self.params)), g)
        return operands, {n: x.double() if x.is_floating_point() else x for n, x in made.items()}

    def define(self, operands: list[Tensor], captured: Mapping[str, Tensor]) -> Results:
        q, k, v = operands
        groups = self.shape.H // self.shape.Hkv
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return self.dense(Given(q, k, v, scale, {**captured, **self.params}))


SHAPE = Shape(2, 2, 1, 13, 13)
CROSS = Shape(2, 2, 1, 11, 9)
