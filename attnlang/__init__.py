"""attnlang: a compiler for attention.

Write a mask or a score function, in Python or in the ``.attn`` language, and get a fused kernel::

    import attnlang as al

    causal = al.compile(al.program(mask=lambda b, h, q, k: q >= k))
    out = causal(q, k, v)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import library
    from .api import Attention, compile, load, parse, reference
    from .flex import (
        AuxOutput,
        AuxRequest,
        BlockMask,
        and_masks,
        create_block_mask,
        create_mask,
        flex_attention,
        noop_mask,
        not_mask,
        or_masks,
    )
    from .hooks import (
        attend,
        branch,
        dot,
        dropout,
        elementwise,
        entmax15,
        grid,
        max_d,
        mean_d,
        normalizer,
        output,
        pool,
        program,
        random,
        rows,
        select,
        softmax,
        sparsemax,
        stat,
        sum_d,
    )
    from .ir import AttnlangError, Program, ProgramError, UsageError
    from .runtime import Unavailable

__version__ = "0.1.0"

_HOOKS = (
    "attend",
    "branch",
    "dot",
    "dropout",
    "elementwise",
    "entmax15",
    "grid",
    "max_d",
    "mean_d",
    "normalizer",
    "output",
    "pool",
    "program",
    "random",
    "rows",
    "select",
    "softmax",
    "sparsemax",
    "stat",
    "sum_d",
)
_HOME = {
    **dict.fromkeys(("Attention", "compile", "load", "parse", "reference"), "api"),
    **dict.fromkeys(_HOOKS, "hooks"),
    **dict.fromkeys(
        (
            "AuxOutput",
            "AuxRequest",
            "BlockMask",
            "and_masks",
            "create_block_mask",
            "create_mask",
            "flex_attention",
            "noop_mask",
            "not_mask",
            "or_masks",
        ),
        "flex",
    ),
    **dict.fromkeys(("AttnlangError", "Program", "ProgramError", "UsageError"), "ir"),
    "Unavailable": "runtime",
}

__all__ = [
    "Attention",
    "AttnlangError",
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "Program",
    "ProgramError",
    "Unavailable",
    "UsageError",
    "and_masks",
    "attend",
    "branch",
    "compile",
    "create_block_mask",
    "create_mask",
    "dot",
    "dropout",
    "elementwise",
    "entmax15",
    "flex_attention",
    "grid",
    "library",
    "load",
    "max_d",
    "mean_d",
    "noop_mask",
    "normalizer",
    "not_mask",
    "or_masks",
    "output",
    "parse",
    "pool",
    "program",
    "random",
    "reference",
    "rows",
    "select",
    "softmax",
    "sparsemax",
    "stat",
    "sum_d",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that importing attnlang costs next to nothing."""
    if name == "library":
        return importlib.import_module(".library", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
