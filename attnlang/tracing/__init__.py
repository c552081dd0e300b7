"""Python front end: FlexAttention's ``mask_mod`` and ``score_mod`` to programs. Imports the IR and torch only."""

from .errors import TraceError
from .grids import on_grid
from .hook import Hook, over_features
from .named import NamedTensor
from .state import captured_shapes
from .tensor import TracedTensor, wrap
from .trace import Ask, Traced, trace, trace_stages, unwrap

__all__ = [
    "Ask",
    "Hook",
    "NamedTensor",
    "TraceError",
    "Traced",
    "TracedTensor",
    "captured_shapes",
    "on_grid",
    "over_features",
    "trace",
    "trace_stages",
    "unwrap",
    "wrap",
]
