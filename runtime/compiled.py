"""Compiled kernels for Attend stages that are not softmax attention in disguise.

What a stage must be for that is decided by :mod:`attnlang.passes.streaming`, and for its gradients by
:mod:`attnlang.passes.pullback`, not by names. Where there is no kernel for gradients the blockwise executor makes them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from attnlang.ir import KEY_ADDRESS, QUERY_ADDRESS, Attend, Environment, Operand, Program
from attnlang.passes.pullback import Pullback, pullback, saved
from attnlang.passes.streaming import Unstreamable, streaming

from .addresses import fits, readable
from .call import Call
from .captured_grads import Gradients
from .errors import Unavailable
from .regions import Work
from .row_gradients import RowGradients, VanishingFactor, row_gradients

__all__ = [
    "DEVICES",
    "StageKernel",
    "has_gradient",
    "has_kernel",
    "kernel_call",
    "kernel_of",
    "outputs_of",
    "rows_of",
    "why_none",
]

Tensor = torch.Tensor


DEVICES = {"cpu": "cpp", "cuda": "triton"}
"""The backend of each kind of device."""


@functools.cache
def outputs_of(backend: str) -> Callable[[Call], dict[str, Tensor]]:
    """Return the function that computes every output of a call by name.

    Raises:
        Unavailable: the backend is not installed.
    """
    try:
        found: Callable[[Call], dict[str, Tensor]] = importlib.import_module(f"attnlang.runtime.{backend}").outputs
    except ImportError as error:  # Triton is an optional dependency
        raise Unavailable(f"{error.name or backend} is not installed") from error
    return found


@functools.cache
def _gradients(backend: str) -> Callable[[Call, Pullback, RowGradients, tuple[str, ...]], Gradients]:
    module = importlib.import_module(f"attnlang.runtime.{backend}_pull")
    found: Callable[[Call, Pullback, RowGradients, tuple[str, ...]], Gradients] = module.pull
    return found


def rows_of(backend: str | None) -> Callable[[Call, tuple[int, ...]], Tensor]:
    """Return the function of ``backend`` that makes the rows of a Map, in float32, given their extents.

    Raises:
        Unavailable: there is no such backend, or it is not installed.
    """
    try:
        found: Callable[[Call, tuple[int, ...]], Tensor] = importlib.import_module(
            f"attnlang.runtime.{backend}_rows"
        ).make
    except ImportError as error:
        raise Unavailable(f"{backend} makes no rows") from error
    return found


@functools.lru_cache(maxsize=256)
def _rows(stage: Attend) -> Operand | None:
    """The operand whose rows the kernel sums, None where it sums none.

    Raises:
        Unavailable: no kernel of ours can run the stage; the reason says why.
    """
    try:
        found = streaming(stage).rows
    except Unstreamable as error:
        raise Unavailable(str(error)) from error
    (term,) = stage.terms
    if term.left.index != QUERY_ADDRESS or not readable(term.right):
        raise Unavailable("its score reads rows at addresses of their own")
    if found is not None and found.index != term.right.index:
        raise Unavailable("it sums rows at addresses of their own")
    return found


def has_kernel(stage: Attend) -> bool:
    """Whether :func:`kernel_of` has a kernel for such a stage."""
    return not why_none(stage)


def why_none(stage: Attend) -> str:
    """Return why there is no kernel for such a stage, or nothing where there is one."""
    try:
        _rows(stage)
    except Unavailable as error:
        return error.reason
    return ""


@functools.lru_cache(maxsize=256)
def _pull(stage: Attend) -> Pullback | None:
    """The backward pass of the stage for kernels, None where they have none."""
    if any(x.index != KEY_ADDRESS for x in (stage.terms[0].right, _rows(stage)) if x is not None):
        return None
    try:
        return pullback(stage)
    except Unstreamable:
        return None


def has_gradient(stage: Attend) -> bool:
    """Whether a kernel makes the gradients of such a stage."""
    return _pull(stage) is not None


@dataclass(frozen=True)
class StageKernel:
    """The kernels of one Attend stage on one backend. ``strict`` raises where the backend cannot run a call.

    All methods may be given the same work on other tensors, and return None where the kernel cannot run it.
    """

    call: Call
    program: Program
    stage: Attend
    backend: str
    strict: bool

    @property
    def saved(self) -> tuple[str, ...]:
        """What :meth:`saving` saves, by name."""
        pull = _pull(self.stage)
        return () if pull is None else tuple(saved(pull.stream))

    def _bound(self, work: Work) -> Call:
        call = replace(self.call, program=self.program, sizes=work.env.sizes, tensors=work.env.tensors)
        return kernel_call(call, self.stage, work.env)

    def outputs(self, work: Work) -> dict[str, Tensor] | None:
        """Every output by name."""
        try:
            return outputs_of(self.backend)(self._bound(work))
        except Unavailable:
            if self.strict:
                raise
            return None

    def saving(self, work: Work) -> dict[str, Tensor] | None:
        """Every output by name, and after them what :meth:`gradients` starts from, in the order of :attr:`saved`, under
        names that no output has."""
        pull = _pull(self.stage)
        if pull is None:
            return None
        try:
            made = outputs_of(self.backend)(replace(self._bound(work), saves=True))
        except Unavailable:
            return None
        names = [out.name for out in self.stage.outputs]
        return {n: made[n] for n in names} | {f"saved {a}": made[name] for a, name in saved(pull.stream).items()}

    def gradients(
        self,
        work: Work,
        held: Mapping[str, Tensor],
        finals: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        wanted: Iterable[str],
    ) -> dict[str, Tensor] | None:
        """Gradients of the tensors ``wanted``, by their names in :meth:`Work.floats`.

        ``held`` is what :meth:`saving` saved, ``finals`` are the outputs and ``grads`` gradients of some of them.
        """
        pull = _pull(self.stage)
        if pull is None:
            return None
        (term,), values = self.stage.terms, pull.operand
        captured = [n.removeprefix("t.") for n in wanted if n.startswith("t.")]
        try:
            call = self._bound(work)
            rows = row_gradients(pull, replace(work.env, sizes=call.sizes), held, finals, grads, captured)
            made = _gradients(self.backend)(call, pull, rows, tuple(n for n in captured if n in pull.tensors))
        except (Unavailable, VanishingFactor):
            return None
        found: dict[str, Tensor] = {}

        def add(name: str, part: Tensor) -> None:
            found[name] = found[name] + part if name in found else part

        def rows_of(operand: Operand, part: Tensor) -> None:
            add(f"{'o' if operand.source in work.env.operands else 't'}.{operand.source}", part)

        rows_of(term.left, made.q)
        rows_of(term.right, made.k)
        if values is not None:
            rows_of(values, made.v)
        for parts in (made.captured, rows.captured):
            for name, part in parts.items():
                add(f"t.{name}", part)
        return found


def kernel_call(call: Call, stage: Attend, here: Environment, queries: str = "") -> Call:
    """Return ``call``, whose program is ``stage`` alone, with its rows of q, k and v; ``queries`` names an operand in
    place of the rows of q.

    Raises:
        Unavailable: there is no kernel for such a stage, or not for these operands.
    """
    values, (term,) = _rows(stage), stage.terms
    names = (queries or term.left.source, term.right.source, term.right.source if values is None else values.source)
    q, k, v = (here.rows(name).to(call.q.dtype) for name in names)
    _check(q, k, v, call.sizes, term.right)
    return replace(call, q=q, k=k, v=v, sizes={**call.sizes, "Hkv": k.shape[1]})


def kernel_of(call: Call, alone: Program, work: Work, backend: str | None) -> StageKernel:
    """Return the kernels for ``work``, on the backend that is named or else on that of the device.

    ``alone`` is the stage as a program of its own.

    Raises:
        Unavailable: there is no kernel for such a stage, or not for the device and dtype of ``call``.
    """
    _rows(work.stage)
    chosen = backend or DEVICES.get(call.q.device.type)
    if chosen is None:
        raise Unavailable(f"no compiled backend runs on {call.q.device}")
    if call.q.dtype is torch.float64:
        raise Unavailable("kernels compute in float32")
    return StageKernel(call, alone, work.stage, chosen, backend is not None)


def _check(q: Tensor, k: Tensor, v: Tensor, sizes: Mapping[str, int], keys: Operand) -> None:
    b, h, lq = (sizes[n] for n in ("B", "H", "Lq"))
    if q.shape[:3] != (b, h, lq) or v.shape[:3] != k.shape[:3] or not fits(keys, k, sizes):
        raise Unavailable("its operands have other shapes than the stage")
    if q.shape[3] != k.shape[3]:
        raise Unavailable("its operands do not fit each other")
