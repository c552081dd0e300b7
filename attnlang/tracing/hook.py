"""Hooks: functions to trace, what they are called with, and the expression that one of them gives."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnlang.ir import BOOL, FLOAT, INT, Expr, Index, Input, Load, Type, build, postorder

from .errors import TraceError, current_location, location_of_code, location_of_error
from .mode import TraceMode
from .named import NamedTensor
from .scalars import to
from .state import current
from .tensor import LiftedScalarUsed, TracedTensor, pull_of, wrap

__all__ = ["SIGNATURE", "Hook", "code_of", "mod_name", "over_features", "run_hook"]

Tensor = torch.Tensor
Mod = Callable[..., Any]

SIGNATURE = {"mask_mod": "(b, h, q_idx, kv_idx)", "score_mod": "(score, b, h, q_idx, kv_idx)"}


@dataclass(frozen=True)
class Hook:
    """A function to trace: what it is called in messages, its arguments, and what it must return.

    ``kind`` is ``mask_mod``, ``score_mod`` or a name of the caller's. ``want`` is a type, or ``"rows"`` for a vector of
    features that is a row of a tensor (the result is then the load of its feature d). A tensor in the place of the
    function is read with as many of ``args`` as it has dimensions, a number is that number. ``over_d``, where given,
    gathers what :func:`over_features` is asked for: the input that stands for each (monoid, expression).
    """

    kind: str
    mod: Any
    args: tuple[Expr | NamedTensor, ...]
    want: Type | str
    over_d: dict[tuple[str, Expr], Input] | None = None


def mod_name(mod: Any) -> str:
    """Return a readable name for a callable."""
    while isinstance(mod, functools.partial):
        mod = mod.func
    name = getattr(mod, "__name__", None) or type(mod).__name__
    return "lambda_" if name == "<lambda>" else name


def code_of(mod: Any) -> types.CodeType | None:
    """Return the code of a callable, to say where it is."""
    while isinstance(mod, functools.partial):
        mod = mod.func
    for candidate in (mod, getattr(type(mod), "forward", None), vars(type(mod)).get("__call__")):
        code = getattr(candidate, "__code__", None)
        if isinstance(code, types.CodeType):
            return code
    return None


def _row_of(value: Any, kind: str, mod: Any) -> Expr:
    """The load of feature d of the row that a function returned."""
    if type(value) is NamedTensor and (row := value.row()) is not None:
        return row
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
        location_of_code(code_of(mod)),
    )


def _result(value: Any, hook: Hook) -> Expr:
    kind, mod = hook.kind, hook.mod
    if hook.want == "rows":
        return _row_of(value, kind, mod)
    where = location_of_code(code_of(mod))
    if type(value) is NamedTensor:  # isinstance would look at the class that a lifted number pretends to have
        raise TraceError(
            f"{kind} `{mod_name(mod)}` returned {value.label} with {value.left} dimension(s) that have no index",
            f"index all of them, for example {value.example()}",
            where,
        )
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
            f"{kind} `{mod_name(mod)}` returned a value of type {expr.type}; a mask must be bool",
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
    args = [a for a in hook.args[:count] if isinstance(a, Expr)]
    expr = array.at((*args, *([Index("d")] if hook.want == "rows" else [])))
    return to(expr, hook.want) if isinstance(hook.want, Type) else expr


def run_hook(hook: Hook, rebuilt: Callable[[Any], Any]) -> Expr:
    """Return the expression of ``hook`` within the current trace; ``rebuilt`` lifts the numbers of a function.

    Raises:
        TraceError: whatever went wrong inside, with the user's line.
    """
    found = _plain(hook)
    if found is not None:
        return found
    state = current()
    dtypes = {BOOL: torch.bool, INT: torch.int64, FLOAT: state.score_dtype}
    args = tuple(a if isinstance(a, NamedTensor) else wrap(a, dtypes[a.type]) for a in hook.args)
    state.over_d = hook.over_d
    return _call(rebuilt(hook.mod), hook, args)


def _call(mod: Any, hook: Hook, args: tuple[TracedTensor | NamedTensor, ...]) -> Expr:
    kind, original = hook.kind, hook.mod
    try:
        with TraceMode():
            value = mod(*args)
        return _result(value, hook)
    except TraceError as error:
        if error.filename is None and not isinstance(error, LiftedScalarUsed):
            raise TraceError(error.problem, error.hint, location_of_code(code_of(original))) from error
        raise
    except RecursionError as error:
        raise TraceError(
            f"{kind} `{mod_name(original)}` is too deeply nested to trace",
            "compute long chains of tensor operations before the function is defined",
            location_of_code(code_of(original)),
        ) from error
    except Exception as error:
        where = location_of_error(error.__traceback__)
        hint = ""
        if where is None:  # raised by the call itself
            where = location_of_code(code_of(original))
            if isinstance(error, TypeError):
                hint = f"a {kind} takes {SIGNATURE[kind]}" if kind in SIGNATURE else ""
        text = f"{kind} `{mod_name(original)}` failed while it was traced: {type(error).__name__}: {error}"
        raise TraceError(text, hint, where) from error


def over_features(monoid: str, value: Tensor | NamedTensor) -> TracedTensor:
    """The ``sum``, ``mean`` or ``max`` over the features of the row of a traced ``value``.

    Raises:
        TraceError: the hook makes no rows, or ``value`` has dimensions.
    """
    state = current()
    if state.over_d is None:
        message = f"{monoid}_d reduces over the features of a row, which only the function of `rows` has"
        raise TraceError(message, "make rows of it first: stages={'name': rows(...)}", current_location())
    if type(value) is NamedTensor:
        raise value.refused()
    array = pull_of(value)
    if array.shape:
        message = f"{monoid}_d is given a tensor of shape {list(array.shape)}"
        raise TraceError(message, "give it the value of feature d, such as x[b, h, q, d]", current_location())
    expr = to(array.at(()), FLOAT)
    found = state.over_d.setdefault((monoid, expr), Input(f"{monoid}_{len(state.over_d)}", FLOAT, "bhq"))
    return wrap(found, state.score_dtype)
