"""trace: FlexAttention's mask and score functions, unchanged, to programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from attnlang.ir import (
    BOOL,
    FLOAT,
    INT,
    Attend,
    Branch,
    Expr,
    InvalidProgram,
    Param,
    Program,
    Scalar,
    ScalarParam,
    Stage,
    build,
    postorder,
    verify,
)

from .errors import TraceError, location_of_code
from .hook import SIGNATURE, Hook, code_of, mod_name, run_hook
from .lift import Lifter, Reached, reach
from .state import TraceState
from .tensor import LiftedScalarUsed, wrap
from .transforms import outside_of_transforms

__all__ = ["Ask", "Traced", "trace", "trace_stages", "unwrap"]

Tensor = torch.Tensor
Mod = Callable[..., Any]
Ask: TypeAlias = Callable[[Hook], Expr]


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


MASK_ARGS = (build.b, build.h, build.q, build.k)


def unwrap(mod: Any) -> Any:
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


@dataclass(frozen=True)
class _Attempt:
    functions: tuple[Any, ...]
    make: Callable[[Ask], tuple[Stage, ...]]
    reached: Reached
    device: torch.device
    dtype: torch.dtype
    taken: frozenset[str]
    returns: tuple[str, ...]


def _once(job: _Attempt, baked: frozenset[str] | None, name: str) -> Traced:
    """Trace with every number lifted but ``baked`` (None: all baked)."""
    with TraceState(job.reached.names, job.device, job.dtype, job.taken) as state, outside_of_transforms():
        scalars = _Scalars(state, baked)
        lifter = Lifter(scalars.replace)
        roots: list[Expr] = []

        def ask(hook: Hook) -> Expr:
            if isinstance(hook.mod, Tensor):
                job.reached.names.setdefault(id(hook.mod), hook.kind)
            found = run_hook(hook, lifter.mod)
            roots.extend((found, *(e for _, e in hook.over_d or ())))
            return found

        stages = state.settled(job.make(ask))
        grids = tuple((axis, state.settled(state.grids[axis])) for axis in sorted(state.grids, reverse=True))
        roots.extend(extent for _, shape in grids for _, extent in shape)
        done, tensors, params, derived = state.finish(roots)
    used = {n.name: n.type for n in postorder(*done) if isinstance(n, Param)}
    declared = tuple(ScalarParam(n, used[n]) for n in scalars.values if n in used)
    program = _verified(Program(name, stages, declared, params, grids, returns=job.returns), job)
    return Traced(program, tensors, {p.name: scalars.values[p.name] for p in declared}, derived)


def _verified(program: Program, job: _Attempt) -> Program:
    try:
        return verify(program)
    except InvalidProgram as error:
        code = code_of(job.functions[0]) if job.functions else None
        hint = "make the function simpler" if "the limit is" in str(error) else ""
        raise TraceError(str(error), hint, location_of_code(code)) from error


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
    mask, score = unwrap(mask_mod), unwrap(score_mod)
    for kind, mod in (("mask_mod", mask), ("score_mod", score)):
        if mod is not None and not callable(mod):
            raise TraceError(f"{kind} is a {type(mod).__name__}, not a function", f"pass a function {SIGNATURE[kind]}")

    def make(ask: Ask) -> tuple[Stage, ...]:
        seen = build.TRUE if mask is None else ask(Hook("mask_mod", mask, MASK_ARGS, BOOL))
        scored = build.s if score is None else ask(Hook("score_mod", score, (build.s, *MASK_ARGS), FLOAT))
        return (Attend(branches=(Branch(seen, scored),)),)

    functions = [mod for mod in (mask, score) if mod is not None]
    return trace_stages(functions, make, name=name, device=device, dtype=dtype)


def trace_stages(
    functions: Sequence[Mod],
    make: Callable[[Ask], tuple[Stage, ...]],
    *,
    name: str | None = None,
    taken: Iterable[str] = (),
    returns: tuple[str, ...] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Traced:
    """Trace ``functions`` into the stages that ``make`` puts together.

    ``make`` gets a function that traces one :class:`Hook` and returns its expression; it may run several times, and
    must ask for the same hooks each time. ``functions`` are those it will ask for, by which captured tensors are named;
    ``taken`` are names that no parameter may have.

    Raises:
        TraceError: as :func:`trace`.
    """
    label = name or "_".join(dict.fromkeys(mod_name(m) for m in functions)) or "full"
    reached = reach(*functions)
    where = torch.device("cpu" if device is None else device)
    job = _Attempt(tuple(functions), make, reached, where, dtype, frozenset(taken), returns)
    baked: frozenset[str] = frozenset()
    while reached.may_lift:
        try:
            return _once(job, baked, label)
        except LiftedScalarUsed as error:
            baked |= error.names
        except TraceError:
            break
    return _once(job, None, label)  # perhaps a lifted number was the reason; if not, this says what is
