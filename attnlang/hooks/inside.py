"""Functions for use inside of the functions that are traced: random numbers, and reductions over features."""

from __future__ import annotations

from typing import Any, overload

import torch

from attnlang.ir import UsageError
from attnlang.ir.random import LOW, MULTIPLIERS, SHIFTS
from attnlang.tracing import NamedTensor, TracedTensor, over_features

from .specs import TermSpec, Value

__all__ = ["dropout", "max_d", "mean_d", "random", "sum_d"]


def random(seed: Any, *counters: Any) -> Any:
    """A number in [0, 1) that depends on ints alone, as ``random`` of the language; for use inside of hooks.

    Arguments are ints or int64 tensors, 0-d inside of hooks; the result is float32.
    """

    def mix(x: Any) -> Any:
        for shift, factor in zip(SHIFTS, MULTIPLIERS, strict=False):
            x = x ^ (x >> shift)
            x = (x * factor) & LOW
        return x ^ (x >> SHIFTS[-1])

    x = mix(seed & LOW)
    for counter in counters:
        x = mix(x ^ (counter & LOW))
    return (x >> 8) * 2.0**-24


def dropout(value: Any, share: Any, seed: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    """0 for a random ``share`` of all pairs, ``value / (1 - share)`` for the others; for use inside of hooks."""
    return torch.where(random(seed, b, h, q, k) >= share, value / (1 - share), 0.0)


@overload
def sum_d(body: TracedTensor) -> TracedTensor: ...
@overload
def sum_d(body: Value, left: Value = "Q", right: Value = "K") -> TermSpec: ...
def sum_d(body: Value, left: Value = "Q", right: Value = "K") -> TermSpec | TracedTensor:
    """A sum over features ``d``.

    Of a function: a score term, the sum of ``body``, which reads ``x`` and ``y``, one feature of each of two rows
    (``"Q"``, ``"K"``, the name of rows that a stage makes, or functions that return a row of a tensor). Of a value
    inside of the function of :func:`rows`: its sum over the features of the row.
    """
    return over_features("sum", body) if isinstance(body, (TracedTensor, NamedTensor)) else TermSpec(left, right, body)


def mean_d(value: Any) -> Any:
    """The mean of ``value`` over the features of the row; for use inside of the function of :func:`rows`."""
    return _over("mean", value)


def max_d(value: Any) -> Any:
    """The maximum of ``value`` over the features of the row; for use inside of the function of :func:`rows`."""
    return _over("max", value)


def _over(monoid: str, value: Any) -> TracedTensor:
    if not isinstance(value, (TracedTensor, NamedTensor)):
        kind = type(value).__name__
        raise UsageError(f"{monoid}_d of a {kind}: it reduces a value of feature d, in the function of rows(...)")
    return over_features(monoid, value)
