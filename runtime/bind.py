"""Binding: checks the arguments of one call against a program and gives every name a value.

Everything that can be wrong with a call is found here, before any kernel is built, and reported with what was given,
what was expected and what to do about it.
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnlang.ir import (
    BOOL,
    BUILTIN_SIZES,
    FLOAT,
    HEAD_SIZES,
    INT,
    KEY_ADDRESS,
    Attend,
    Const,
    Environment,
    Expr,
    Index,
    Load,
    Op,
    Program,
    Scalar,
    ScalarParam,
    Size,
    TensorParam,
    Type,
    UsageError,
    evaluate,
    format_expr,
    postorder,
)

__all__ = ["Binder", "Bound", "check_scale", "suggest"]

Tensor = torch.Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KINDS: dict[Type, tuple[torch.dtype, ...]] = {
    BOOL: (torch.bool,),
    INT: (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
    FLOAT: DTYPES,
}
_CONVERSION = {BOOL: ".bool()", INT: ".long()", FLOAT: ".float()"}
_AXIS_SIZE = {"b": "B", "h": "H", "q": "Lq", "k": "Lk"}
_INT64 = 2**63


@dataclass(frozen=True)
class Bound:
    """Checked arguments: k and v have the batch of q (broadcast with stride 0 where they had 1)."""

    q: Tensor
    k: Tensor
    v: Tensor
    sizes: dict[str, int]
    params: dict[str, Scalar]
    tensors: dict[str, Tensor]
    scale: float


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean ...?)`` for a misspelt name, a list of what there is otherwise."""
    known = list(known)
    if close := difflib.get_close_matches(name, known, 1):
        return f"; did you mean {close[0]!r}?"
    return f" (there is: {', '.join(known)})" if known else " (there is none)"


def check_scale(scale: object, head_dim: int) -> float:
    """Return ``scale`` as a float, ``head_dim ** -0.5`` when it is None.

    Raises:
        UsageError: not a finite number.
    """
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise UsageError(f"scale must be a number, got {_describe(scale)}")
    if not math.isfinite(scale):
        raise UsageError(f"scale must be finite, got {scale}")
    return float(scale)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _declared(param: TensorParam) -> str:
    return f"{param.type}[{', '.join(format_expr(d) for d in param.shape)}]"


class Binder:
    """Binds calls of one specialised program; what depends on the program alone is prepared once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._scalars = {p.name: p for p in program.scalars}
        self._tensors = {p.name: p for p in program.tensors}
        operands = [o for stage in program.stages if isinstance(stage, Attend) for o in stage.operands()]
        self._grouped = any(o.source in "kv" and o.index == KEY_ADDRESS for o in operands)
        self._reaches = sorted(_reaches(program))
        terms = (t for stage in program.stages if isinstance(stage, Attend) for t in stage.terms)
        self._terms = [t for t in terms if (t.left.source, t.right.source) != ("q", "k")]

    def bind(
        self,
        q: object,
        k: object,
        v: object,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        scale: object = None,
    ) -> Bound:
        """Check a call: ``values`` are the keyword arguments, ``defaults`` what the program was traced with.

        Raises:
            UsageError: the first thing that is wrong.
        """
        q, k, v = self._operands(q, k, v)
        given = {**defaults, **values} if defaults else values
        for name in values:
            if name not in self._scalars and name not in self._tensors:
                known = [*self._tensors, *self._scalars]
                raise UsageError(f"{self.program.name} has no parameter {name!r}{suggest(name, known)}")
        sizes = {"B": q.shape[0], "H": q.shape[1], "Hkv": k.shape[1], "Lq": q.shape[2], "Lk": k.shape[2]}
        sizes |= {"D": q.shape[3], "Dv": v.shape[3]}  # a captured tensor that has such a size alone says otherwise
        params = {name: self._scalar(p, given) for name, p in self._scalars.items()}
        tensors = {name: self._tensor(p, given, q.device) for name, p in self._tensors.items()}
        self._bind_sizes(sizes, tensors)
        self._check_shapes(sizes, params, tensors)
        self._check_reach(sizes, tensors)
        self._check_features({"q": q, "k": k, "v": v, **tensors})
        if k.shape[0] != q.shape[0]:
            k, v = k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1)
        return Bound(q, k, v, sizes, params, tensors, check_scale(scale, q.shape[3]))

    def bind_sizes(
        self, sizes: Mapping[str, int], values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, int], dict[str, Scalar], dict[str, Tensor]]:
        """Like :meth:`bind` for a call that has lengths but no q, k and v (run maps, explanations).

        Raises:
            UsageError: the first thing that is wrong, negative lengths among them.
        """
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise UsageError(f"{name} must be an int, got {_describe(value)}")
            if value < 0:
                raise UsageError(f"{name} must not be negative, got {value}")
        given = {**(defaults or {}), **values}
        for name in values:
            if name not in self._scalars and name not in self._tensors:
                known = [*self._tensors, *self._scalars]
                raise UsageError(f"{self.program.name} has no parameter {name!r}{suggest(name, known)}")
        params = {name: self._scalar(p, given) for name, p in self._scalars.items()}
        tensors = {name: self._tensor(p, given, None) for name, p in self._tensors.items()}
        all_sizes = dict(sizes)
        for size in {n.name for n in postorder(self.program.mask) if isinstance(n, Size)} & {*HEAD_SIZES}:
            if not any(Size(size) in t.shape for t in self.program.tensors):
                raise UsageError(f"the mask of {self.program.name} reads {size}, which only a call knows")
        self._bind_sizes(all_sizes, tensors)
        self._check_shapes(all_sizes, params, tensors)
        self._check_reach(all_sizes, tensors)
        return all_sizes, params, tensors

    def _operands(self, q: object, k: object, v: object) -> tuple[Tensor, Tensor, Tensor]:
        for name, t in (("q", q), ("k", k), ("v", v)):
            if not isinstance(t, Tensor):
                raise UsageError(f"{name} must be a torch tensor, got {_describe(t)}")
            if t.layout is not torch.strided or t.is_nested:
                raise UsageError(f"{name} must be a dense tensor; for packed sequences use a captured document tensor")
            if t.dim() != 4:
                raise UsageError(f"{name} must have 4 dimensions [batch, heads, length, head_dim], got {_shape(t)}")
        assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
        if not q.dtype == k.dtype == v.dtype:
            raise UsageError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
        if q.dtype not in DTYPES:
            raise UsageError(f"q, k and v must be float16, bfloat16, float32 or float64, got {q.dtype}")
        if not q.device == k.device == v.device:
            raise UsageError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
        if k.shape[:3] != v.shape[:3]:
            raise UsageError(f"k and v must agree in batch, heads and length, got {_shape(k)} and {_shape(v)}")
        if k.shape[0] not in (1, q.shape[0]):
            raise UsageError(f"k and v must have the batch of q ({q.shape[0]}) or 1, got {k.shape[0]}")
        if q.shape[3] != k.shape[3]:
            raise UsageError(f"q and k must have one head dimension, got {q.shape[3]} and {k.shape[3]}")
        if q.shape[3] == 0 or v.shape[3] == 0:
            raise UsageError(f"head dimensions must be at least 1, got q {_shape(q)} and v {_shape(v)}")
        heads, kv_heads = q.shape[1], k.shape[1]
        if self._grouped and heads and (not kv_heads or heads % kv_heads):
            raise UsageError(
                f"the number of query heads must be a multiple of the number of key heads, got {heads} and {kv_heads}"
            )
        return q, k, v

    def _scalar(self, param: ScalarParam, given: Mapping[str, Any]) -> Scalar:
        value = given.get(param.name, param.default)
        if value is None:
            raise UsageError(
                f"{self.program.name} needs parameter {param.name!r} ({param.type}); pass {param.name}=... to the call"
            )
        return check_scalar(self.program.name, param, value)

    def _tensor(self, param: TensorParam, given: Mapping[str, Any], device: torch.device | None) -> Tensor:
        value = given.get(param.name)
        if value is None:
            raise UsageError(
                f"{self.program.name} needs tensor {param.name!r} ({_declared(param)}); pass {param.name}=..."
            )
        if not isinstance(value, Tensor):
            raise UsageError(f"{param.name} must be a torch tensor ({_declared(param)}), got {_describe(value)}")
        if value.layout is not torch.strided or value.is_nested:
            raise UsageError(f"{param.name} must be a dense tensor")
        if value.dim() != len(param.shape):
            raise UsageError(
                f"{param.name} must have {len(param.shape)} dimension(s) ({_declared(param)}), got {_shape(value)}"
            )
        if value.dtype not in _KINDS[param.type]:
            raise UsageError(
                f"{param.name} must hold {param.type} values ({_declared(param)}), got {value.dtype}; "
                f"convert it with {_CONVERSION[param.type]}"
            )
        if device is not None and value.device != device:
            if value.dim() == 0 and value.device.type == "cpu":
                return value.to(device)  # a number in a tensor may live anywhere, as in PyTorch
            raise UsageError(f"{param.name} is on {value.device}, q is on {device}; move it with .to({str(device)!r})")
        return value

    def _bind_sizes(self, sizes: dict[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Give every symbolic size that a dimension determines its value."""
        owner: dict[str, str] = {}
        for param in self.program.tensors:
            for extent, dim in zip(tensors[param.name].shape, param.shape, strict=True):
                name, offset = _solvable(dim)
                if name is None or name in BUILTIN_SIZES:
                    continue
                found = extent - offset
                if name in owner and sizes[name] != found:
                    raise UsageError(
                        f"size {name} is {sizes[name]} in {owner[name]} but {found} in {param.name} "
                        f"of shape {_shape(tensors[param.name])}"
                    )
                if found < 0:
                    raise UsageError(f"{param.name} needs at least {offset} elements where it has {extent}")
                sizes[name] = found
                owner[name] = param.name

    def _check_shapes(
        self, sizes: Mapping[str, int], params: Mapping[str, Scalar], tensors: Mapping[str, Tensor]
    ) -> None:
        for param in self.program.tensors:
            given = tensors[param.name].shape
            for position, (extent, dim) in enumerate(zip(given, param.shape, strict=True)):
                if isinstance(dim, Size) and sizes.get(dim.name) == extent:
                    continue
                if any(isinstance(n, Size) and n.name in HEAD_SIZES and n.name not in sizes for n in postorder(dim)):
                    continue  # lengths alone do not say how many features there are
                want = _extent(dim, sizes, params, param.name)
                if want != extent:
                    declared = ", ".join(format_expr(d) for d in param.shape)
                    raise UsageError(
                        f"{param.name} must have shape [{declared}]: dimension {position} is {format_expr(dim)} = "
                        f"{want}, got {extent} in {_shape(tensors[param.name])}"
                    )

    def _check_features(self, tensors: Mapping[str, Tensor]) -> None:
        """The two rows of a score term have the same number of features."""
        for term in self._terms:
            left, right = (tensors.get(o.source) for o in (term.left, term.right))  # None: an earlier stage makes it
            if left is not None and right is not None and left.shape[-1] != right.shape[-1]:
                raise UsageError(
                    f"term {term.name} multiplies rows of {term.left.source} and {term.right.source}, which have "
                    f"{left.shape[-1]} and {right.shape[-1]} features"
                )

    def _check_reach(self, sizes: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Find loads that are sure to be out of range: indexed by an axis that is longer than the dimension."""
        for tensor, dim, axis in self._reaches:
            name = _AXIS_SIZE[axis]
            extent = tensors[tensor].shape[dim]
            if extent < sizes[name]:
                raise UsageError(
                    f"{tensor} is indexed with {axis} on dimension {dim}, which has {extent} element(s); "
                    f"it needs at least {name} = {sizes[name]}"
                )


def check_scalar(program: str, param: ScalarParam, value: object) -> Scalar:
    """Return ``value`` as a Python number of the parameter's type.

    Raises:
        UsageError: another type, not finite, or outside int64.
    """
    where = f"parameter {param.name!r} of {program}"
    if isinstance(value, Tensor):
        raise UsageError(f"{where} must be a Python {param.type}, got {_describe(value)}; use .item()")
    if param.type is BOOL:
        if not isinstance(value, bool):
            raise UsageError(f"{where} must be a bool, got {_describe(value)}")
        return value
    if isinstance(value, bool):
        raise UsageError(f"{where} must be a number ({param.type}), got {value}")
    if param.type is INT:
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise UsageError(f"{where} must be an int, got {_describe(value)}") from None
        if not -_INT64 <= number < _INT64:
            raise UsageError(f"{where} must fit in 64 bits, got {number}")
        return number
    if not isinstance(value, numbers.Real):
        raise UsageError(f"{where} must be a float, got {_describe(value)}")
    if not math.isfinite(value):
        raise UsageError(f"{where} must be finite, got {value}")
    return float(value)


def _solvable(dim: Expr) -> tuple[str | None, int]:
    """The size and offset of a dimension of the form ``name`` or ``name + constant``."""
    match dim:
        case Size(name=name):
            return name, 0
        case Op(op="add", operands=(Size(name=name), Const(value=value))):
            return name, int(value)
        case Op(op="add", operands=(Const(value=value), Size(name=name))):
            return name, int(value)
        case Op(op="sub", operands=(Size(name=name), Const(value=value))):
            return name, -int(value)
    return None, 0


def _extent(dim: Expr, sizes: Mapping[str, int], params: Mapping[str, Scalar], tensor: str) -> int:
    if isinstance(dim, Const):
        return int(dim.value)
    if isinstance(dim, Size) and dim.name in sizes:
        return sizes[dim.name]
    for node in postorder(dim):
        if isinstance(node, Size) and node.name not in sizes:
            raise UsageError(f"size {node.name} of {tensor} is not known: no captured tensor has it as a dimension")
    return int(evaluate(dim, Environment(sizes=sizes, params=params)))


def _reaches(program: Program) -> set[tuple[str, int, str]]:
    """Loads whose index is an axis itself, as (tensor, dimension, axis)."""
    whole = [s for s in program.stages if isinstance(s, Attend) and s.lengths == Attend().lengths]
    roots = (r for stage in whole for r in stage.roots())
    known = {t.name for t in program.tensors}
    loads = (n for n in postorder(*roots) if isinstance(n, Load) and n.tensor in known)
    return {
        (n.tensor, d, i.axis)
        for n in loads
        for d, i in enumerate(n.indices)
        if isinstance(i, Index) and i.axis in _AXIS_SIZE
    }
