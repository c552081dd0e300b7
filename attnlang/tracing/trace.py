"""trace: FlexAttention's mask and score functions, unchanged, to programs."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnlang.ir import (
    BOOL,
    FLOAT,
    INT,
    Expr,
    InvalidProgram,
    Param,
    Program,
    Scalar,
    ScalarParam,
    build,
    postorder,
    simple,
    verify,
)

from .errors import TraceError, location_of_code, location_of_error
from .lift import Lifter, Reached, reach
from .mode import TraceMode
from .scalars import to
from .state import TraceState
from .tensor import LiftedScalarUsed, TracedTensor, pull_of, wrap

__all__ = ["Traced", "trace"]

Tensor = torch.Tensor
Mod = Callable[..., Any]

_SIGNATURE = {"mask_mod": "(b, h, q_idx, kv_idx)", "score_mod": "(score, b, h, q_idx, kv_idx)"}


@dataclass(frozen=True)
class Traced:
    """A program with the values its functions had captured.

    ``program`` depends on the code of the functions and on the dtype kinds and ranks of what they captured, not on
    values. ``tensors`` and ``scalars`` bind its parameters. ``derived`` names the tensors that the functions computed
    from others while they were traced (``bias[0]``, ``table.exp()``): these belong to this trace, so trace again before
    each call when what they were computed from may have changed.
    """

    program: Program
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Scalar]
    derived: tuple[str, ...] = ()


def _unwrap(mod: Any) -> Any:
    """Return the mod itself without torch.compile, or None for torch's noop."""
    while True:
        inner = getattr(mod, "_torchdynamo_orig_callable", None) or getattr(mod, "_orig_mod", None)
        if inner is None:
            break
        mod = inner
    module, name = getattr(mod, "__module__", "") or "", getattr(mod, "__name__", "")
    if module.startswith("torch.nn.attention") and name in ("noop_mask", "_identity"):
        return None
    return mod


def mod_name(mod: Any) -> str:
    """Return a readable name for a callable."""
    while isinstance(mod, functools.partial):
        mod = mod.func
    name = getattr(mod, "__name__", None) or type(mod).__name__
    return "lambda_" if name == "<lambda>" else name


def _code(mod: Any) -> types.CodeType | None:
    while isinstance(mod, functools.partial):
        mod = mod.func
    for candidate in (mod, getattr(type(mod), "forward", None), vars(type(mod)).get("__call__")):
        code = getattr(candidate, "__code__", None)
        if isinstance(code, types.CodeType):
            return code
    return None


class _Scalars:
    """Numbers lifted in one attempt, except those in ``baked``."""

    def __init__(self, state: TraceState, baked: frozenset[str] | None) -> None:
        self._state = state
        self._baked = baked
        self.values: dict[str, Scalar] = {}

    def replace(self, value: Any, name: str) -> Any:
        if self._baked is None:
            return value
        own = self._state.fresh(name)
        if own in self._baked:
            return value
        self.values[own] = value
        kind = FLOAT if type(value) is float else INT
        dtype = self._state.score_dtype if kind is FLOAT else torch.int64
        number = wrap(Param(own, kind), dtype)
        number._lifted = True
        return number


def _result(value: Any, kind: str, mod: Any) -> Expr:
    where = location_of_code(_code(mod))
    if isinstance(value, Tensor):
        array = pull_of(value)
        if any(n != 1 for n in array.shape):
            raise TraceError(
                f"{kind} `{mod_name(mod)}` returned a tensor of shape {list(array.shape)}; it must return one value",
                "index or reduce every dimension of the captured tensors, such as bias[h, q_idx] instead of bias[h]",
                where,
            )
        expr = array.at((build.const(0),) * len(array.shape))
    elif isinstance(value, (bool, int, float)):
        expr = build.const(value)
    else:
        missing = "nothing (is a `return` missing?)" if value is None else f"a {type(value).__name__}"
        raise TraceError(f"{kind} `{mod_name(mod)}` returned {missing}", "return one 0-d tensor", where)
    if kind == "score_mod":
        return to(expr, FLOAT)
    if expr.type is not BOOL:
        raise TraceError(
            f"mask_mod `{mod_name(mod)}` returned a value of type {expr.type}; a mask must be bool",
            "return a comparison, for example `value != 0` (a score that is added belongs in score_mod)",
            where,
        )
    return expr


def _call(mod: Any, kind: str, original: Any, args: tuple[TracedTensor, ...]) -> Expr:
    """Run one mod on traced values.

    Raises:
        TraceError: whatever went wrong inside, with the user's line.
    """
    try:
        with TraceMode():
            value = mod(*args)
        return _result(value, kind, original)
    except TraceError as error:
        if error.filename is None and not isinstance(error, LiftedScalarUsed):
            raise TraceError(error.problem, error.hint, location_of_code(_code(original))) from error
        raise
    except RecursionError as error:
        raise TraceError(
            f"{kind} `{mod_name(original)}` is too deeply nested to trace",
            "compute long chains of tensor operations before the function is defined",
            location_of_code(_code(original)),
        ) from error
    except Exception as error:
        where = location_of_error(error.__traceback__)
        hint = ""
        if where is None:  # raised by the call itself
            where = location_of_code(_code(original))
            if isinstance(error, TypeError):
                hint = f"a {kind} takes {_SIGNATURE[kind]}"
        text = f"{kind} `{mod_name(original)}` failed while it was traced: {type(error).__name__}: {error}"
        raise TraceError(text, hint, where) from error


@dataclass(frozen=True)
class _Attempt:
    mask: Any
    score: Any
    reached: Reached
    device: torch.device
    dtype: torch.dtype


def _once(job: _Attempt, baked: frozenset[str] | None, name: str) -> Traced:
    """Trace with every number lifted but ``baked`` (None: all baked)."""
    with TraceState(job.reached.names, job.device, job.dtype) as state:
        scalars = _Scalars(state, baked)
        lifter = Lifter(scalars.replace)
        index = tuple(wrap(e, torch.int64) for e in (build.b, build.h, build.q, build.k))
        mask: Expr = build.TRUE
        score: Expr = build.s
        if job.mask is not None:
            mask = _call(lifter.mod(job.mask), "mask_mod", job.mask, index)
        if job.score is not None:
            score = _call(lifter.mod(job.score), "score_mod", job.score, (wrap(build.s, job.dtype), *index))
        (mask, score), tensors, params, derived = state.finish((mask, score))
    used = {n.name: n.type for n in postorder(mask, score) if isinstance(n, Param)}
    declared = tuple(ScalarParam(n, used[n]) for n in scalars.values if n in used)
    program = _verified(simple(name, mask=mask, score=score, scalars=declared, tensors=params), job)
    return Traced(program, tensors, {p.name: scalars.values[p.name] for p in declared}, derived)


def _verified(program: Program, job: _Attempt) -> Program:
    try:
        return verify(program)
    except InvalidProgram as error:
        code = _code(job.mask if job.mask is not None else job.score)
        raise TraceError(str(error), "make the function simpler", location_of_code(code)) from error


def trace(
    mask_mod: Mod | None = None,
    score_mod: Mod | None = None,
    *,
    name: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Traced:
    """Trace FlexAttention's functions into a program.

    Args:
        mask_mod: ``mask_mod(b, h, q_idx, kv_idx) -> bool``; None keeps every pair.
        score_mod: ``score_mod(score, b, h, q_idx, kv_idx) -> score``; None is the identity.
        name: of the program; the functions' names if not given.
        device: what ``q_idx.device`` says inside the functions (cpu if not given).
        dtype: what ``score.dtype`` says inside the functions.

    Numbers in closures, defaults, partial arguments and attributes become runtime scalars of the program. Those whose
    values Python needs while the function runs (``if``, ``range``, a shape, a list index) become constants.

    Raises:
        TraceError: the functions use something that has no meaning in a kernel; the message has the user's line.
    """
    mask, score = _unwrap(mask_mod), _unwrap(score_mod)
    for kind, mod in (("mask_mod", mask), ("score_mod", score)):
        if mod is not None and not callable(mod):
            raise TraceError(f"{kind} is a {type(mod).__name__}, not a function", f"pass a function {_SIGNATURE[kind]}")
    given = [m for m in (mask, score) if m is not None]
    label = name or "_".join(dict.fromkeys(mod_name(m) for m in given)) or "full"
    reached = reach(*given)
    job = _Attempt(mask, score, reached, torch.device("cpu" if device is None else device), dtype)
    baked: frozenset[str] = frozenset()
    while reached.may_lift:
        try:
            return _once(job, baked, label)
        except LiftedScalarUsed as error:
            baked |= error.names
        except TraceError:
            break
    return _once(job, None, label)  # perhaps a lifted number was the reason; if not, this says what is
