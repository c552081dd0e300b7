"""The library: documented attention patterns as programs, written in the ``.attn`` language.

``attnlang.library.causal`` is an :class:`attnlang.ir.Program`. The ``.attn`` files beside this module hold one family
each; a file is read when one of its programs is first asked for, so importing the library costs next to nothing.
"""

from __future__ import annotations

import difflib
import re
import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnlang import Program

__all__ = ["names", "path"]

_FOLDER = Path(__file__).parent
_HEADER = re.compile(r"^pattern\s+([A-Za-z_]\w*)", re.MULTILINE)
_loaded: dict[str, Program] = {}
_lock = threading.RLock()


@cache
def _index() -> dict[str, Path]:
    """Map each program to its file from the headers alone: nothing is parsed."""
    files = sorted(_FOLDER.glob("*.attn"))
    return {name: file for file in files for name in _HEADER.findall(file.read_text(encoding="utf-8"))}


def names(*, standard: bool = False) -> tuple[str, ...]:
    """Return the names of all programs, sorted.

    With ``standard`` only those that are softmax attention with a mask and a score, which reads every file.
    """
    found = sorted(_index())
    return tuple(n for n in found if not standard or __getattr__(n).standard)


def path(name: str) -> Path:
    """Return the ``.attn`` file that holds program ``name``.

    Raises:
        AttributeError: there is no such program; the message suggests near names.
    """
    if name not in _index():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise AttributeError(f"the library has no program {name!r}{hint} (attnlang.library.names() lists all)")
    return _index()[name]


def __getattr__(name: str) -> Program:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _lock:
        if name not in _loaded:
            file = path(name)
            from attnlang.api import load_all  # here, because the language costs a parser

            _loaded.update(load_all(file))
        return _loaded[name]


def __dir__() -> list[str]:
    return sorted((*__all__, *names()))
