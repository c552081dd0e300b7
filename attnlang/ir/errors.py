"""Base classes of everything attnlang raises on purpose."""

from __future__ import annotations

__all__ = ["AttnlangError", "ProgramError", "UsageError"]


class AttnlangError(Exception):
    """Base class: catch this to catch every error attnlang raises on purpose."""


class ProgramError(AttnlangError, ValueError):
    """A program (its text, its Python functions or its IR) is wrong."""


class UsageError(AttnlangError, ValueError):
    """A correct program was called with tensors or options that do not fit it."""
