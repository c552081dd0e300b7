"""Tensors that exist in a call only: operands, and what earlier stages make. Inside of a hook they can be indexed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnlang.ir import BOOL, FLOAT, INT, Const, Expr, Index, Load, Type, postorder
from attnlang.ir.build import op

from .errors import TraceError, current_location
from .scalars import wrap_index
from .state import current
from .tensor import TracedTensor, pull_of, wrap

__all__ = ["NamedTensor"]

_FEATURE = Index("d")


class NamedTensor:
    """A tensor known by name, element type and symbolic ``shape``; indexed in all dimensions it is a traced value.

    Fewer indices leave a tensor of the dimensions that follow. Indices are ints and int tensors without dimensions;
    negative ones count from the end.
    """

    def __init__(self, name: str, type_: Type, shape: Sequence[Expr], label: str = "", at: Sequence[Expr] = ()) -> None:
        self.name = name
        self.type = type_
        self.sizes = tuple(shape)
        self.label = label or name
        self._at = tuple(at)

    @property
    def left(self) -> int:
        """The number of dimensions that have no index yet."""
        return len(self.sizes) - len(self._at)

    def __getitem__(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > self.left:
            raise TraceError(
                f"{len(keys)} indices for {self.label}, which has {self.left} dimension(s)",
                f"write {self.example()}",
                current_location(),
            )
        start = len(self._at)
        found = [self._index(k, size) for k, size in zip(keys, self.sizes[start:], strict=False)]
        part = NamedTensor(self.name, self.type, self.sizes, self.label, (*self._at, *found))
        return part if part.left else part._element()

    def _index(self, key: Any, size: Expr) -> Expr:
        if isinstance(key, torch.Tensor):
            array = pull_of(key)
            if not array.shape and array.type is INT:
                return wrap_index(array.at(()), size)
            kind = f"a {array.type} value" if not array.shape else f"a tensor of shape {list(array.shape)}"
        elif isinstance(key, int) and not isinstance(key, bool):
            return Const(key, INT) if key >= 0 else op("add", size, key)
        else:
            kind = f"a {type(key).__name__}"
        raise TraceError(
            f"{self.label} is indexed with {kind}; it can be indexed with ints and int tensors without dimensions",
            f"write {self.example()}",
            current_location(),
        )

    def _element(self) -> TracedTensor:
        dtypes = {FLOAT: current().score_dtype, BOOL: torch.bool, INT: torch.int64}
        return wrap(Load(self.name, self._at, self.type), dtypes[self.type])

    def row(self) -> Load | None:
        """The load of feature d, if all dimensions but the last have an index, and it is a float tensor."""
        if self.left != 1 or self.type is not FLOAT or any(n is _FEATURE for n in postorder(*self._at)):
            return None
        return Load(self.name, (*self._at, _FEATURE), FLOAT)

    def example(self) -> str:
        """How its elements are written."""
        axes = ("bhqd" if self.type is FLOAT else "bhqk")[: len(self.sizes)]
        return f"{self.label}[{', '.join(axes)}{', ...' * (len(self.sizes) > 4)}]"

    def refused(self) -> TraceError:
        """The error for its use as a value."""
        return TraceError(
            f"{self.label} has {self.left} dimension(s) without an index, and is used as a value",
            f"index all of them, for example {self.example()}",
            current_location(),
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TraceError(
            f"{self.label} has no `.{name}` here: it exists in a call only",
            f"index all its dimensions, for example {self.example()}; a length is a parameter of the function, "
            "for example `lambda Lk: ...`",
            current_location(),
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [a for a in (*args, *(kwargs or {}).values()) if type(a) is NamedTensor]
        if given:
            raise given[0].refused()
        return NotImplemented


def _refuse(self: NamedTensor, *_: Any) -> Any:
    raise self.refused()


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_OTHER = ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert", "bool", "int", "float", "len", "iter")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHER):
    setattr(NamedTensor, f"__{_name}__", _refuse)
NamedTensor.__hash__ = object.__hash__  # type: ignore[method-assign]
