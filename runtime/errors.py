"""What a backend raises when it cannot run here."""

from __future__ import annotations

from attnlang.ir import AttnlangError

__all__ = ["Unavailable"]


class Unavailable(AttnlangError):
    """A backend cannot run this call on this machine; ``reason`` says why in one clause.

    The dispatcher catches it and uses the eager executor instead, so it reaches a caller only when a backend was asked
    for by name.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
