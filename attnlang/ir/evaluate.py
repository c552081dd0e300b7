"""Evaluation of expressions on torch tensors: the meaning of the IR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .nodes import Const, Expr, Index, Input, Load, Op, Param, Scalar, Size, postorder
from .ops import OPS
from .types import BOOL, INT, Type

__all__ = ["Environment", "evaluate"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Environment:
    """Values for the leaves of an expression.

    ``indices``: int64 tensors for the axes, shaped so that they broadcast against each other and against ``inputs``.
    ``sizes``, ``params``: numbers (a param may be a 0-d tensor). ``tensors``: captured tensors of any dtype and outputs
    of earlier stages. ``operands``: q, k and v of the call, for stages. ``float_dtype``: dtype of every float value.
    """

    indices: Mapping[str, Tensor] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, Scalar | Tensor] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    float_dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"
    operands: Mapping[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """The tensor a load reads; a captured tensor may have the name of an operand."""
        return self.tensors[name] if name in self.tensors else self.operands[name]

    def rows(self, source: str) -> Tensor:
        """The tensor whose rows an operand of a stage reads."""
        return self.operands[source] if source in self.operands else self.tensors[source]

    def dtype(self, type_: Type) -> torch.dtype:
        return torch.bool if type_ is BOOL else torch.int64 if type_ is INT else self.float_dtype

    def scalar(self, value: Scalar | Tensor, type_: Type) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(dtype=self.dtype(type_), device=self.device)
        return torch.tensor(value, dtype=self.dtype(type_), device=self.device)


def _load(node: Load, env: Environment, done: Mapping[Expr, Tensor]) -> Tensor:
    tensor = env.tensor(node.tensor)
    index = [done[i].clamp(0, max(n - 1, 0)) for i, n in zip(node.indices, tensor.shape, strict=True)]
    if tensor.numel() == 0:
        shape = torch.broadcast_shapes(*(i.shape for i in index))
        return torch.zeros(shape, dtype=env.dtype(node.type), device=tensor.device)
    value = tensor[tuple(index)] if index else tensor
    return value.to(env.dtype(node.type))


def evaluate(expr: Expr, env: Environment) -> Tensor:
    """Return the value of ``expr``, broadcast over whatever indices and inputs it reads (0-d if it reads none)."""
    done: dict[Expr, Tensor] = {}
    for node in postorder(expr):
        match node:
            case Const(value=value, type=type_):
                done[node] = env.scalar(value, type_)
            case Index(axis=axis):
                done[node] = env.indices[axis]
            case Size(name=name):
                done[node] = env.scalar(env.sizes[name], INT)
            case Param(name=name, type=type_):
                done[node] = env.scalar(env.params[name], type_)
            case Input(name=name, type=type_):
                done[node] = env.inputs[name].to(env.dtype(type_))
            case Load():
                done[node] = _load(node, env, done)
            case Op(op="to_float"):
                done[node] = done[node.args[0]].to(env.float_dtype)
            case Op(op=name):
                done[node] = OPS[name].evaluate(*(done[a] for a in node.args))
    return done[expr]
