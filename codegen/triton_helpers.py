"""The helper functions a generated Triton source may contain, by name, in a fixed order."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["HELPERS", "helper_sources"]

_FILE = Path(__file__).parent / "templates" / "triton_helpers.j2"


def _read() -> dict[str, str]:
    blocks = _FILE.read_text(encoding="utf-8").strip().split("\n\n\n")
    named = ((re.search(r"^def (\w+)\(", block, re.M), block) for block in blocks)
    return {match.group(1): block for match, block in named if match}


HELPERS: dict[str, str] = _read()
"""Name of each helper to its source."""


def helper_sources(names: Iterable[str]) -> list[str]:
    """Return the sources of the named helpers in file order."""
    wanted = set(names)
    return [source for name, source in HELPERS.items() if name in wanted]
