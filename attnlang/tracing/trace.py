"""trace: FlexAttention's mask and score functions, unchanged, to programs."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnlang.ir import (
    BOOL,
    FLOAT,
    INT,
    Attend,
    Branch,
    Expr,
    Index,
    InvalidProgram,
    Load,
    Param,
    Program,
    Scalar,
    ScalarParam,
    Stage,
    Type,
    build,
    postorder,
    verify,
)

from .errors import TraceError, location_of_code, location_of_error
from .lift import Lifter, Reached, reach
from .mode import TraceMode
from .scalars import to
from .state import TraceState
from .tensor import LiftedScalarUsed, TracedTensor, pull_of, wrap

__all__ = ["Hook", "Traced", "trace", "trace_hooks"]

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


@dataclass(frozen=True)
class Hook:
    """A function to trace: what it is called in messages, its arguments, and what it must return.

    ``kind`` is ``mask_mod``, ``score_mod`` or a name of the caller's. ``want`` is a type, or ``"rows"`` for a vector of
    features that is a row of a captured tensor (the result is then the load of its feature d). A tensor in the place of
    the function is read with as many of ``args`` as it has dimensions, a number is that number.
    """

    kind: str
    mod: Any
    args: tuple[Expr, ...]
    want: Type | str


MASK_ARGS = (build.b, build.h, build.q, build.k)


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


def _row_of(value: Any, kind: str, mod: Any) -> Expr:
    """The load of feature d of the row that a function returned."""
    where = location_of_code(_code(mod))
    array = pull_of(value) if isinstance(value, Tensor) else None
    if array is not None and len(array.shape) == 1 and array.type is FLOAT:
        d = Index("d")
        expr = array.at((d,))
        whole = isinstance(expr, Load) and expr.indices and expr.indices[-1] is d
        if whole and not any(n is d for n in postorder(*expr.args[:-1])):
            return expr
    raise TraceError(
        f"{kind} `{mod_name(mod)}` must return a row of a float tensor: all dimensions indexed but the last",
        "for example `table[h, k - q + reach]`",
        where,
    )


def _result(value: Any, hook: Hook, mod: Any) -> Expr:
    kind = hook.kind
    if hook.want == "rows":
        return _row_of(value, kind, mod)
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
    if hook.want is FLOAT:
        return to(expr, FLOAT)
    if hook.want is INT:
        if expr.type is FLOAT:
            raise TraceError(f"{kind} `{mod_name(mod)}` returned a float; it must be an int", "use .long()", where)
        return to(expr, INT)
    if expr.type is not BOOL:
        raise TraceError(
            f"mask_mod `{mod_name(mod)}` returned a value of type {expr.type}; a mask must be bool",
            "return a comparison, for example `value != 0` (a score that is added belongs in score_mod)",
            where,
        )
    return expr


def _plain(hook: Hook) -> Expr | None:
    """The value of a hook that is a number or a tensor instead of a function."""
    if isinstance(hook.mod, (bool, int, float)):
        return to(build.const(hook.mod), hook.want) if isinstance(hook.want, Type) else build.const(hook.mod)
    if not isinstance(hook.mod, Tensor):
        return None
    array = pull_of(hook.mod)
    count = len(array.shape) - (hook.want == "rows")
    if count > len(hook.args):
        message = f"{hook.kind} is a tensor of {count} dimensions; it is read with {len(hook.args)} at most"
        raise TraceError(message, "give a function instead")
    where = (*hook.args[:count], *([Index("d")] if hook.want == "rows" else []))
    expr = array.at(where)
    return to(expr, hook.want) if isinstance(hook.want, Type) else expr


def _call(mod: Any, hook: Hook, args: tuple[TracedTensor, ...]) -> Expr:
    """Run one mod on traced values.

    Raises:
        TraceError: whatever went wrong inside, with the user's line.
    """
    kind, original = hook.kind, hook.mod
    try:
        with TraceMode():
            value = mod(*args)
        return _result(value, hook, original)
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
                hint = f"a {kind} takes {_SIGNATURE[kind]}" if kind in _SIGNATURE else ""
        text = f"{kind} `{mod_name(original)}` failed while it was traced: {type(error).__name__}: {error}"
        raise TraceError(text, hint, where) from error


@dataclass(frozen=True)
class _Attempt:
    hooks: tuple[Hook, ...]
    assemble: Callable[[tuple[Expr, ...]], tuple[Stage, ...]]
    reached: Reached
    device: torch.device
    dtype: torch.dtype


def _once(job: _Attempt, baked: frozenset[str] | None, name: str) -> Traced:
    """Trace with every number lifted but ``baked`` (None: all baked)."""
    with TraceState(job.reached.names, job.device, job.dtype) as state:
        scalars = _Scalars(state, baked)
        lifter = Lifter(scalars.replace)
        roots: list[Expr] = []
        for hook in job.hooks:
            found = _plain(hook)
            if found is None:
                args = tuple(wrap(e, job.dtype if e.type is FLOAT else torch.int64) for e in hook.args)
                found = _call(lifter.mod(hook.mod), hook, args)
            roots.append(found)
        done, tensors, params, derived = state.finish(roots)
    used = {n.name: n.type for n in postorder(*done) if isinstance(n, Param)}
    declared = tuple(ScalarParam(n, used[n]) for n in scalars.values if n in used)
    program = _verified(Program(name, job.assemble(done), declared, params), job)
    return Traced(program, tensors, {p.name: scalars.values[p.name] for p in declared}, derived)


def _verified(program: Program, job: _Attempt) -> Program:
    try:
        return verify(program)
    except InvalidProgram as error:
        code = _code(job.hooks[0].mod) if job.hooks else None
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
    hooks = [Hook("mask_mod", mask, MASK_ARGS, BOOL)] if mask is not None else []
    hooks += [Hook("score_mod", score, (build.s, *MASK_ARGS), FLOAT)] if score is not None else []

    def assemble(found: tuple[Expr, ...]) -> tuple[Stage, ...]:
        given = dict(zip((hook.kind for hook in hooks), found, strict=True))
        return (Attend(branches=(Branch(given.get("mask_mod", build.TRUE), given.get("score_mod", build.s)),)),)

    return trace_hooks(hooks, assemble, name=name, device=device, dtype=dtype)


def trace_hooks(
    hooks: Sequence[Hook],
    assemble: Callable[[tuple[Expr, ...]], tuple[Stage, ...]],
    *,
    name: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Traced:
    """Trace ``hooks`` together; ``assemble`` makes stages of their values, in order.

    Raises:
        TraceError: as :func:`trace`.
    """
    functions = [hook.mod for hook in hooks if callable(hook.mod) and not isinstance(hook.mod, Tensor)]
    label = name or "_".join(dict.fromkeys(mod_name(m) for m in functions)) or "full"
    reached = reach(*functions)
    for hook in hooks:
        if isinstance(hook.mod, Tensor):
            reached.names.setdefault(id(hook.mod), hook.kind)
    job = _Attempt(tuple(hooks), assemble, reached, torch.device("cpu" if device is None else device), dtype)
    baked: frozenset[str] = frozenset()
    while reached.may_lift:
        try:
            return _once(job, baked, label)
        except LiftedScalarUsed as error:
            baked |= error.names
        except TraceError:
            break
    return _once(job, None, label)  # perhaps a lifted number was the reason; if not, this says what is
