"""Programs: parameters, captured tensors and a graph of stages whose hooks are expressions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property

from .build import TRUE, any_of
from .build import s as _s
from .nodes import Expr, Scalar
from .stages import OUTPUT_NAMES, Attend, Branch, Stage
from .types import Type

__all__ = ["BUILTIN_SIZES", "HEAD_SIZES", "Program", "ScalarParam", "TensorParam", "simple"]

BUILTIN_SIZES = ("B", "H", "Hkv", "Lq", "Lk")
"""Sizes every program may read: batch, query heads, key heads, query length, key length."""
HEAD_SIZES = ("D", "Dv")
"""Features of q and k, and of v; a free size of a captured tensor may have these names and is then another size."""

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
class Program:
    """A complete attention program.

    ``scalars`` and ``tensors`` are in declaration order. ``grids`` keeps the shape of declared index grids
    (axis name to coordinate names and extents) for layouts and pictures; it does not change the meaning. ``returns``
    names the outputs that a call gives back; ``()`` stands for all outputs of the last stage.
    """

    name: str
    stages: tuple[Stage, ...] = (Attend(),)
    scalars: tuple[ScalarParam, ...] = ()
    tensors: tuple[TensorParam, ...] = ()
    grids: tuple[tuple[str, tuple[tuple[str, Expr], ...]], ...] = ()
    doc: str = field(default="", compare=False)
    returns: tuple[str, ...] = ()

    @cached_property
    def standard(self) -> bool:
        """Whether the program is one stage of softmax attention with a mask and a score."""
        return (
            len(self.stages) == 1
            and isinstance(self.stages[0], Attend)
            and self.stages[0].standard
            and self.results == OUTPUT_NAMES
        )

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the outputs a call gives back."""
        return self.returns or self.stages[-1].made

    @property
    def attend(self) -> Attend:
        """The Attend stage; the last one where there are several."""
        return [stage for stage in self.stages if isinstance(stage, Attend)][-1]

    @property
    def mask(self) -> Expr:
        """Which pairs :attr:`attend` computes: those that the mask of any branch keeps."""
        return any_of(*dict.fromkeys(branch.mask for branch in self.attend.branches))

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
