"""Diagnostics of the ``.attn`` language: where, what, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lark import Token

from attnlang.ir import ProgramError

__all__ = ["CODES", "AttnError", "Diagnostic", "Source", "Span", "suggest"]

CODES = {
    "ATL100": "the file cannot be read as text",
    "ATL101": "a character that means nothing here",
    "ATL102": "a string that does not end",
    "ATL103": "indentation",
    "ATL104": "a word or sign in the wrong place",
    "ATL105": "brackets that do not match",
    "ATL106": "nested too deeply or too large",
    "ATL107": "a number out of range",
    "ATL200": "unknown name",
    "ATL201": "a name defined twice",
    "ATL202": "a name that is taken by the language",
    "ATL203": "wrong type",
    "ATL204": "wrong arguments",
    "ATL205": "a captured tensor used wrongly",
    "ATL206": "the body of a pattern",
    "ATL207": "a definition that needs itself",
    "ATL208": "a bad default value",
    "ATL209": "a grid",
    "ATL210": "a composition",
    "ATL211": "parameters of composed patterns that clash",
    "ATL212": "the shape of a captured tensor",
    "ATL213": "a value that is not known here",
    "ATL214": "a normaliser",
    "ATL215": "an output",
    "ATL216": "a score term, rows or an address",
    "ATL217": "branches and groups",
    "ATL218": "a stage",
    "ATL300": "an import path that is not allowed",
    "ATL301": "an imported file that is not there",
    "ATL302": "files that import each other",
    "ATL303": "an imported name that is not there",
}
"""What each error code is about."""

MAX_REPORTED = 20
_WINDOW = 120


class Span(NamedTuple):
    """A stretch of source text; lines and columns count from 1 and the end column is exclusive."""

    line: int
    column: int
    end_line: int
    end_column: int

    def to(self, other: Span) -> Span:
        """Return the span from the start of this one to the end of ``other``."""
        return Span(self.line, self.column, other.end_line, other.end_column)


@dataclass(frozen=True)
class Diagnostic:
    """One mistake. ``line`` is 0 where the mistake is about the file as a whole."""

    code: str
    message: str
    filename: str
    line: int = 0
    column: int = 0
    end_column: int = 0
    source_line: str = ""
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.filename}:{self.line}:{self.column}" if self.line else self.filename
        lines = [f"{place}: error[{self.code}]: {self.message}"]
        if self.line:
            text, column, width = self._window()
            gutter = f"{self.line:>4}"
            lines += [f"{gutter} | {text}", f"{' ' * len(gutter)} | {' ' * column}{'^' * width}"]
        if self.hint:
            lines.append(f"help: {self.hint}")
        return "\n".join(lines)

    def _window(self) -> tuple[str, int, int]:
        """The part of the line worth showing, the offset of the mistake in it, and its width."""
        text, column = self.source_line, self.column - 1
        start = max(0, column - _WINDOW // 2) if len(text) > _WINDOW else 0
        shown = text[start : start + _WINDOW]
        width = max(1, min(self.end_column - self.column, len(shown) - (column - start)))
        return _printable(shown), column - start, width


def _printable(text: str) -> str:
    """Replace what could move or restyle a terminal's cursor; one character stays one character."""
    return "".join(c if c.isprintable() else " " if c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


class AttnError(ProgramError):
    """One or more mistakes in ``.attn`` text. The attributes describe the first; ``diagnostics`` has them all."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        self.diagnostics = diagnostics
        first = diagnostics[0]
        self.code = first.code
        self.message = first.message
        self.filename = first.filename
        self.line = first.line
        self.column = first.column
        self.end_column = first.end_column
        self.source_line = first.source_line
        self.hint = first.hint
        super().__init__(*diagnostics)

    def __str__(self) -> str:
        shown = [str(d) for d in self.diagnostics[:MAX_REPORTED]]
        left = len(self.diagnostics) - len(shown)
        if left:
            shown.append(f"... and {left} more error{'s' * (left > 1)}")
        return "\n\n".join(shown)


class Source:
    """The text of one file, split into lines once, from which errors quote."""

    def __init__(self, text: str, filename: str) -> None:
        self.text = text
        self.filename = filename
        self.open: list[Token] = []
        """Brackets that are open where the parser stands."""
        self._lines: list[str] | None = None

    def line(self, number: int) -> str:
        if self._lines is None:
            self._lines = self.text.split("\n")
        return self._lines[number - 1] if 0 < number <= len(self._lines) else ""

    def error(self, span: Span | None, code: str, message: str, hint: str = "") -> AttnError:
        """Return (not raise) the error for a mistake at ``span``; None means the file as a whole."""
        if span is None:
            return AttnError(Diagnostic(code, message, self.filename, hint=hint))
        text = self.line(span.line)
        end = span.end_column if span.end_line == span.line else len(text) + 1
        place = (span.line, span.column, max(end, span.column + 1))
        return AttnError(Diagnostic(code, message, self.filename, *place, text, hint))


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean `x`?`` for the closest known name, or nothing."""
    if len(name) > 60:
        return ""
    by_case = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_case, 1, 0.6)
    return f"did you mean `{by_case[close[0]]}`?" if close else ""
