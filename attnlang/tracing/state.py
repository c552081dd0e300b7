"""What one trace has found so far: captured tensors, their names and sizes, constants made inside the function."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from typing import TypeVar

import torch

from attnlang.ir import (
    AXES,
    BOOL,
    BUILTIN_SIZES,
    FLOAT,
    INT,
    STAGE_INPUTS,
    Const,
    Expr,
    Input,
    Load,
    Size,
    TensorParam,
    Type,
    map_record,
    postorder,
    rewrite,
)
from attnlang.ir import build as ir

from .arrays import Pull, Where
from .errors import TraceError, current_location

__all__ = ["TraceState", "captured_shapes", "current", "ir_type"]

Tensor = torch.Tensor
T = TypeVar("T")

_RESERVED = frozenset((*AXES, *BUILTIN_SIZES, *STAGE_INPUTS, "s"))
MAX_OPERATIONS = 10_000

_local = threading.local()


def current() -> TraceState:
    """Return the trace this thread is in the middle of."""
    state = getattr(_local, "state", None)
    if state is None:
        raise TraceError("a traced value was used after its trace had ended", "do not keep the arguments of a mod")
    return state


def captured_shapes() -> dict[str, tuple[Expr, ...]]:
    """Return the symbolic shapes of the captured tensors that the current trace has read so far, by name."""
    return current().shapes()


def ir_type(dtype: torch.dtype) -> Type:
    """Return the IR type of a torch dtype.

    Raises:
        TraceError: complex and quantised tensors.
    """
    if dtype is torch.bool:
        return BOOL
    if dtype.is_floating_point:
        return FLOAT
    if dtype.is_complex or str(dtype).startswith(("torch.q", "torch.bits")):
        raise TraceError(
            f"a tensor of dtype {dtype} is used in a mod, but only bool, integer and real float tensors can be",
            "convert it before the function is defined (for example with .real, .abs() or .dequantize())",
            current_location(),
        )
    return INT


class TraceState:
    """Mutable state of one trace; entered as a context manager, one per thread at a time."""

    def __init__(
        self, names: dict[int, str], device: torch.device, score_dtype: torch.dtype, taken: Iterable[str] = ()
    ) -> None:
        self.device = device
        self.score_dtype = score_dtype
        self.over_d: dict[tuple[str, Expr], Input] | None = None
        """Reductions over the features of a row, where the hook that is being traced may ask for them."""
        self.grids: dict[str, tuple[tuple[str, Expr], ...]] = {}
        """Coordinates and extents of the grids that the axes were first said to count the points of."""
        self.keep: list[object] = []  # ids stay unique only while their objects live
        self._wanted = names
        self._used: set[str] = set(taken)
        self._pulls: dict[int, Pull] = {}
        self._constants: dict[int, Tensor] = {}
        self._params: dict[str, tuple[Tensor, tuple[Expr, ...]]] = {}
        self._baked: dict[Expr, Expr] = {}
        self._operations = 0
        self._derived: set[str] = set()
        self._owners: dict[Expr, tuple[str, Tensor, tuple[Expr, ...]]] = {}
        self._outer: TraceState | None = None

    def __enter__(self) -> TraceState:
        self._outer = getattr(_local, "state", None)
        _local.state = self
        return self

    def __exit__(self, *_: object) -> None:
        _local.state = self._outer

    def count(self) -> None:
        """Count one operation.

        Raises:
            TraceError: there are more than any kernel should have, as in a long Python loop.
        """
        self._operations += 1
        if self._operations > MAX_OPERATIONS:
            raise TraceError(
                f"the function does more than {MAX_OPERATIONS} operations for one pair of tokens",
                "replace long Python loops by a table that is computed before and indexed here",
                current_location(),
            )

    def fresh(self, wanted: str) -> str:
        """Return ``wanted`` as an identifier that nothing else in the program has."""
        base = re.sub(r"\W", "_", wanted) or "x"
        if base[0].isdigit() or base in _RESERVED:
            base = f"c_{base}"
        name, count = base, 0
        while name in self._used:
            count += 1
            name = f"{base}_{count}"
        self._used.add(name)
        return name

    def bake(self, size: Expr, length: int) -> None:
        """Declare that the program is only right where ``size`` is ``length``."""
        if isinstance(size, Size):
            self._baked[size] = Const(length, INT)

    def mark_constant(self, tensor: Tensor) -> None:
        """Remember a small CPU tensor made inside the function out of numbers only."""
        if tensor.device.type == "cpu" and tensor.numel() <= 64 and tensor.layout is torch.strided:
            self.keep.append(tensor)
            self._constants[id(tensor)] = tensor

    def is_constant(self, tensor: Tensor) -> bool:
        return id(tensor) in self._constants

    def capture(self, tensor: Tensor) -> Pull:
        """Return a real tensor as an array; it becomes a parameter of the program where an element is read."""
        found = self._pulls.get(id(tensor))
        if found is not None:
            return found
        self.keep.append(tensor)
        type_ = ir_type(tensor.dtype)
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise TraceError(
                f"a {'meta' if tensor.is_meta else tensor.layout} tensor is used in a mod",
                "capture an ordinary dense tensor",
                current_location(),
            )
        wanted = self._wanted.get(id(tensor))
        if wanted is None and tensor._base is not None and id(tensor._base) in self._wanted:
            wanted = self._wanted[id(tensor._base)] + "_view"
        constant = self._constants.get(id(tensor))
        name = "" if constant is not None and constant.dim() == 0 else self.fresh(wanted or "t")
        sizes = tuple(Size(self.fresh(f"{name}_{d}")) for d in range(tensor.dim())) if name else ()

        def load(where: Where) -> Expr:
            if constant is not None and all(isinstance(i, Const) for i in where):
                item = constant[tuple(i.value for i in where)].item()  # type: ignore[attr-defined]
                return ir.cast(item, type_) if not isinstance(item, float) else ir.const(item)
            self._params.setdefault(name, (tensor, sizes))
            if id(tensor) not in self._wanted:
                self._derived.add(name)
            return Load(name, where, type_)

        pull = self._pulls[id(tensor)] = Pull(tensor.shape, type_, load, sizes)
        self._owners |= dict.fromkeys(sizes, (name, tensor, sizes))
        return pull

    def settled(self, value: T) -> T:
        """Return records of the IR, or expressions, with baked sizes replaced."""
        baked = self._baked
        if not baked:
            return value
        return map_record(value, lambda expr: rewrite((expr,), lambda node: baked.get(node, node))[0])

    def shapes(self) -> dict[str, tuple[Expr, ...]]:
        """Return the symbolic shapes of the captured tensors that have been read so far."""
        return {name: sizes for name, (_, sizes) in self._params.items()}

    def finish(
        self, roots: Iterable[Expr]
    ) -> tuple[tuple[Expr, ...], dict[str, Tensor], tuple[TensorParam, ...], tuple[str, ...]]:
        """Return ``roots`` with baked sizes replaced, and the captured tensors they read, in order of first use."""
        baked = self._baked
        done = self.settled(tuple(roots))
        tensors: dict[str, Tensor] = {}
        params: list[TensorParam] = []
        for node in postorder(*done):
            if isinstance(node, Load) and node.tensor in self._params:  # others are made in the call
                name = node.tensor
                tensor, sizes = self._params[name]
            elif isinstance(node, Size) and node in self._owners:
                name, tensor, sizes = self._owners[node]
            else:
                continue
            if name not in tensors:
                tensors[name] = tensor
                params.append(TensorParam(name, ir_type(tensor.dtype), tuple(baked.get(s, s) for s in sizes)))
        return done, tensors, tuple(params), tuple(n for n in tensors if n in self._derived)
