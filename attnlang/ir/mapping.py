"""Rebuilding records of the IR with every expression in them changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

from .nodes import Expr
from .stages import Address

__all__ = ["map_record"]

T = TypeVar("T")


def map_record(value: T, change: Callable[[Expr], Expr]) -> T:
    """Return ``value``, a stage or a part of one, with ``change`` applied to every expression."""
    if isinstance(value, Expr):
        return change(value)  # type: ignore[return-value]
    if isinstance(value, Address):
        return Address(*(map_record(v, change) for v in value))  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(map_record(v, change) for v in value)  # type: ignore[return-value]
    if is_dataclass(value):
        changed = {f.name: map_record(getattr(value, f.name), change) for f in fields(value)}
        return replace(value, **changed)  # type: ignore[type-var]
    return value
