"""Value types of the IR.

A type says what a value *is*, not how wide a backend stores it: ``INT`` is a mathematical integer that the reference
holds in int64 and kernels hold in int32 where that is proved to be enough.
"""

from __future__ import annotations

import enum

__all__ = ["BOOL", "FLOAT", "INT", "Type", "join"]


class Type(enum.Enum):
    """Scalar value type; the order of the members is the order of promotion."""

    BOOL = 0
    INT = 1
    FLOAT = 2

    def __repr__(self) -> str:
        return self.name.lower()

    __str__ = __repr__


BOOL = Type.BOOL
INT = Type.INT
FLOAT = Type.FLOAT


def join(*types: Type) -> Type:
    """Return the smallest type every argument promotes to."""
    return max(types, key=lambda t: t.value)
