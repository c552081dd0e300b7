"""Python front end: FlexAttention's ``mask_mod`` and ``score_mod`` to programs. Imports the IR and torch only."""

from .errors import TraceError
from .trace import Hook, Traced, trace, trace_hooks

__all__ = ["Hook", "TraceError", "Traced", "trace", "trace_hooks"]
