"""Random numbers of a pair: a hash of counters in ordinary operators, so every backend draws the same bits."""

from __future__ import annotations

from .build import Like, const, op
from .build import b as _b
from .build import h as _h
from .build import k as _k
from .build import q as _q
from .nodes import Expr
from .normalizers import ratio

__all__ = ["LOW", "MULTIPLIERS", "SHIFTS", "dropout", "random"]

LOW = 2**32 - 1
SHIFTS = (16, 15, 15)
MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)
"""A bijection of 32 bits: shift, multiply, shift, multiply, shift. No product needs more than 63 bits."""


def _mix(x: Expr) -> Expr:
    for shift, factor in zip(SHIFTS, MULTIPLIERS, strict=False):
        x = op("bitxor", x, op("shr", x, shift))
        x = op("bitand", op("mul", x, factor), LOW)
    return op("bitxor", x, op("shr", x, SHIFTS[-1]))


def random(seed: Like, *counters: Like) -> Expr:
    """A float in [0, 1) of 24 bits, a function of the low 32 bits of ints; equal counters give equal numbers."""
    x = _mix(op("bitand", seed, LOW))
    for counter in counters:
        x = _mix(op("bitxor", x, op("bitand", counter, LOW)))
    return op("mul", op("to_float", op("shr", x, 8)), 2.0**-24)


def dropout(value: Like, share: Like, seed: Like) -> Expr:
    """0 for a random ``share`` of all pairs, ``value / (1 - share)`` for the others."""
    kept = ratio(const(value), op("sub", 1.0, share))
    return op("where", op("ge", random(seed, _b, _h, _q, _k), share), kept, 0.0)
