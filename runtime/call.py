"""One checked call of a program: what a backend gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnlang.ir import Expr, Program, Scalar

if TYPE_CHECKING:
    from attnlang.sparsity import RunMap

__all__ = ["Call", "never"]


def never(loop: str) -> bool:
    """``Call.closed`` of a call whose kernels have no runs to compute."""
    return False


@dataclass(frozen=True)
class Call:
    """A specialised program with arguments that have been checked against it.

    Shapes: q [B, H, Lq, D], k [Bkv, Hkv, Lk, D], v [Bkv, Hkv, Lk, Dv], any strides, one dtype and device. ``sizes``
    binds every size the program reads, ``params`` every scalar parameter, ``tensors`` every captured tensor (on the
    device of q). ``runs(tile)`` returns the run map at a (query, key) tile; it is computed once per tile and cached by
    the caller. ``key_tile`` is the number of keys in a tile that suits the mask on a CPU, 0 where the usual one does.
    ``closed(loop)`` says whether a kernel whose inner loop is over ``"k"`` or ``"q"`` may compute its own
    run bounds and leave the run map alone; where runs come from elsewhere than the mask it may not. ``saves`` asks for
    what a backward pass starts from, beside the outputs. ``order`` says where the rows of query slot q and of key slot
    k are, as :func:`attnlang.codegen.plan.make_plan` takes it; forward kernels of softmax attention know of it.
    """

    program: Program
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sizes: Mapping[str, int]
    params: Mapping[str, Scalar]
    tensors: Mapping[str, torch.Tensor]
    scale: float
    runs: Callable[[tuple[int, int]], RunMap]
    key_tile: int = 0
    closed: Callable[[str], bool] = never
    saves: bool = False
    order: tuple[Expr | None, Expr | None] = (None, None)

    @property
    def storage(self) -> dict[str, str]:
        """dtype name of every captured tensor, as plans want it."""
        return {name: str(t.dtype).removeprefix("torch.") for name, t in self.tensors.items()}
