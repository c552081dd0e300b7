"""The error a function that cannot be traced raises, with the user's own line in it."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from types import CodeType, FrameType, TracebackType

import torch

from attnlang.ir import ProgramError

__all__ = ["Location", "TraceError", "current_location", "location_of_code", "location_of_error"]

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_HOOKS = os.path.join(os.path.dirname(os.path.dirname(_HERE)), "hooks") + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep

Location = tuple[str, int, str]
"""File, line and function name."""


class TraceError(ProgramError):
    """A Python mask or score function cannot be turned into a program.

    ``problem`` says what was wrong, ``hint`` what to write instead, ``filename`` and ``lineno`` where (or None).
    """

    def __init__(self, problem: str, hint: str = "", location: Location | None = None) -> None:
        self.problem = problem
        self.hint = hint
        self.filename = location[0] if location else None
        self.lineno = location[1] if location else None
        super().__init__(_render(problem, hint, location))


def _render(problem: str, hint: str, location: Location | None) -> str:
    lines = [problem]
    if location is not None:
        filename, lineno, function = location
        lines.append(f"  --> {filename}:{lineno}, in {function}")
        source = linecache.getline(filename, lineno).strip()
        if source:
            lines.append(f"   |  {source}")
    if hint:
        lines.append(f"  help: {hint}")
    return "\n".join(lines)


def _is_users(filename: str) -> bool:
    return not filename.startswith((_HERE, _HOOKS, _TORCH, "<frozen"))


def current_location() -> Location | None:
    """Return the innermost line on the stack that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_users(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
    return None


def location_of_error(trace: TracebackType | None) -> Location | None:
    """Return the innermost line of a traceback that is neither torch's nor ours."""
    for frame, lineno in reversed(list(traceback.walk_tb(trace))):
        if _is_users(frame.f_code.co_filename):
            return frame.f_code.co_filename, lineno, frame.f_code.co_name
    return None


def location_of_code(code: CodeType | None) -> Location | None:
    """Return where a function is defined."""
    return None if code is None else (code.co_filename, code.co_firstlineno, code.co_name)
