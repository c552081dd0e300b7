"""Calls on batches of ``torch.vmap``: a call of its own for each element, on whatever runs such a call.

Kernels know nothing of batches, and much of what surrounds them depends on what tensors hold: run maps, lists of
visible pairs, when a search ends. So a batch is taken apart, and the results are put together again. Derivatives of
such a call, of any order, are calls on more tensors, and are taken apart in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from .autograd import differentiable
from .bind import Bound
from .transforms import Kind, innermost, under_vmap

__all__ = ["for_elements"]

Tensor = torch.Tensor
Run: TypeAlias = Callable[..., tuple[Tensor, ...]]


def for_elements(run: Callable[[Bound], tuple[Tensor, ...]], bound: Bound) -> tuple[Tensor, ...]:
    """Return ``run(bound)``, where ``run`` never sees a batch of vmap, at whatever level of transforms that is."""
    if not under_vmap():
        return run(bound)
    names = tuple(bound.tensors)

    def of_tensors(q: Tensor, k: Tensor, v: Tensor, *captured: Tensor) -> tuple[Tensor, ...]:
        return run(replace(bound, q=q, k=k, v=v, tensors=dict(zip(names, captured, strict=True))))

    return _apart(of_tensors, (bound.q, bound.k, bound.v, *bound.tensors.values()))


def _apart(run: Run, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not under_vmap():
        return run(*tensors)
    made: tuple[Tensor, ...] = _Elements.apply(run, *tensors)
    return made


@dataclass(frozen=True)
class _Derivative:
    """A function of all ``count`` tensors and of more that concerns those at ``places``."""

    run: Run
    count: int
    places: tuple[int, ...]

    def split(self, given: tuple[Tensor, ...]) -> tuple[_Partial, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The float results as a function of the tensors at ``places``, these tensors, and what is given beyond all."""
        tensors, more = given[: self.count], given[self.count :]
        return _Partial(self.run, tensors, self.places), tuple(tensors[i] for i in self.places), more


class _Pull(_Derivative):
    """Gradients of the tensors at ``places`` from all tensors and the gradients of float results."""

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        run, wanted, grads = self.split(given)
        if innermost() is not Kind.NONE or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
            found = differentiable(lambda inputs: run(*inputs), wanted, [True] * len(wanted), grads)
            return tuple(t for t in found if t is not None)
        with torch.enable_grad():  # nobody differentiates further: kernels make these gradients
            leaves = [t.detach().requires_grad_() for t in wanted]
            pairs = [(t, g) for t, g in zip(run(*leaves), grads, strict=True) if t.requires_grad]
        if not pairs:
            return tuple(map(torch.zeros_like, leaves))
        return torch.autograd.grad(
            [t for t, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, materialize_grads=True
        )


class _Push(_Derivative):
    """Tangents of float results from all tensors and the tangents of those at ``places``."""

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        run, wanted, tangents = self.split(given)
        made: tuple[Tensor, ...] = torch.func.jvp(run, wanted, tangents)[1]
        return made


@dataclass(frozen=True)
class _Partial:
    """The float results as a function of the tensors at ``places``."""

    run: Run
    tensors: tuple[Tensor, ...]
    places: tuple[int, ...]

    def __call__(self, *wanted: Tensor) -> tuple[Tensor, ...]:
        tensors = list(self.tensors)
        for i, t in zip(self.places, wanted, strict=True):
            tensors[i] = t
        return tuple(t for t in self.run(*tensors) if t.is_floating_point())


class _Elements(torch.autograd.Function):
    @staticmethod
    def forward(run: Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _apart(run, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.run, *tensors = inputs
        ctx.floats = [t.is_floating_point() for t in output]
        ctx.mark_non_differentiable(*(t for t in output if not t.is_floating_point()))
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        places = tuple(i for i, need in enumerate(ctx.needs_input_grad[1:]) if need)
        given = [g for g, is_float in zip(grads, ctx.floats, strict=True) if is_float]
        found = _apart(_Pull(ctx.run, len(tensors), places), (*tensors, *given))
        made: list[Tensor | None] = [None] * (1 + len(tensors))
        for i, g in zip(places, found, strict=True):
            made[1 + i] = g
        return tuple(made)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        places = tuple(i for i, t in enumerate(tangents) if t is not None and tensors[i].is_floating_point())
        given = [t for t in (tangents[i] for i in places) if t is not None]
        found = iter(_apart(_Push(ctx.run, len(tensors), places), (*tensors, *given)))
        return tuple(next(found) if is_float else None for is_float in ctx.floats)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], run: Run, *tensors: Tensor) -> Any:
        dims = in_dims[1:]

        def element(i: int) -> tuple[Tensor, ...]:
            return _apart(run, [t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)])

        if info.batch_size:
            made = [element(i) for i in range(info.batch_size)]
            results = tuple(map(torch.stack, zip(*made, strict=True)))
        else:  # of what shape the results would be
            one = [
                t if d is None else t.new_zeros([n for i, n in enumerate(t.shape) if i != d])
                for t, d in zip(tensors, dims, strict=True)
            ]
            results = tuple(t.new_empty((0, *t.shape)) for t in _apart(run, one))
        return results, (0,) * len(results)
