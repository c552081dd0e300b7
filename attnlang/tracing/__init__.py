"""Python front end: FlexAttention's ``mask_mod`` and ``score_mod`` to programs. Imports the IR and torch only."""

from .errors import TraceError
from .trace import Traced, trace

__all__ = ["TraceError", "Traced", "trace"]
