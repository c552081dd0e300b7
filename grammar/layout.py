"""Layout: turns line ends into NEWLINE, INDENT and DEDENT tokens, and checks brackets while it is at it."""

from __future__ import annotations

from collections.abc import Iterator

from lark import Token

from .errors import Source, Span

__all__ = ["MAX_NESTING", "MAX_TOKENS", "layout", "token_span"]

MAX_NESTING = 200
MAX_TOKENS = 100_000

_CLOSER = {"LPAR": ")", "LSQB": "]"}
_STATEMENT_WORDS = frozenset({"PATTERN", "DEF", "LET", "GRID", "RETURN", "IMPORT", "FROM"})


def token_span(token: Token) -> Span:
    line, column = token.line or 1, token.column or 1
    return Span(line, column, token.end_line or line, token.end_column or column + max(1, len(token)))


class _Layout:
    """State of one pass over the tokens of one file."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.indents = [0]
        self.character = ""
        self.open = source.open

    def _width(self, token: Token, indent: str) -> int:
        """Return the width of the indentation that follows line end ``token``."""
        line = (token.line or 1) + token.count("\n")
        span = Span(line, 1, line, len(indent) + 1)
        used = set(indent)
        if len(used) > 1 or (used and self.character and used != {self.character}):
            raise self.source.error(
                span, "ATL103", "indentation mixes tabs and spaces", "indent the whole file with spaces"
            )
        self.character = self.character or indent[:1]
        if len(indent) not in self.indents and len(indent) < self.indents[-1]:
            raise self.source.error(
                span,
                "ATL103",
                "this indentation matches no block above",
                f"the blocks above are indented by {', '.join(map(str, self.indents))} characters",
            )
        return len(indent)

    def line_end(self, token: Token) -> Iterator[Token]:
        indent = token.rsplit("\n", 1)[1]
        width = self._width(token, indent)
        yield token
        if width > self.indents[-1]:
            self.indents.append(width)
            if len(self.indents) > MAX_NESTING:
                raise self._too_deep(token_span(token))
            line = (token.line or 1) + token.count("\n")
            yield Token("INDENT", indent, 0, line, 1, line, width + 1)
        while width < self.indents[-1]:
            self.indents.pop()
            yield Token.new_borrow_pos("DEDENT", "", token)

    def bracket(self, token: Token) -> None:
        if token.type in _CLOSER:
            self.open.append(token)
            if len(self.open) > MAX_NESTING:
                raise self._too_deep(token_span(token))
        elif not self.open:
            raise self.source.error(token_span(token), "ATL105", f"`{token}` closes nothing", "remove it")
        elif (want := _CLOSER[self.open.pop().type]) != token:
            raise self.source.error(token_span(token), "ATL105", f"`{token}` where `{want}` was expected")

    def never_closed(self) -> Exception:
        opener = self.open[-1]
        return self.source.error(
            token_span(opener), "ATL105", f"`{opener}` is never closed", f"add the missing `{_CLOSER[opener.type]}`"
        )

    def _too_deep(self, span: Span) -> Exception:
        return self.source.error(
            span, "ATL106", f"nested more than {MAX_NESTING} levels deep", "name a part of it with `let`"
        )


def layout(tokens: Iterator[Token], source: Source) -> Iterator[Token]:
    """Yield ``tokens`` with layout tokens; line ends inside brackets vanish.

    Raises:
        AttnError: indentation or brackets are wrong, or the file has too many tokens.
    """
    state = _Layout(source)
    first = True
    count = 0
    for token in tokens:
        count += 1
        if count > MAX_TOKENS:
            raise source.error(token_span(token), "ATL106", f"the file has more than {MAX_TOKENS} words and signs")
        if token.type == "NEWLINE":
            if first:
                if not token.endswith("\n"):
                    line = (token.line or 1) + token.count("\n")
                    width = len(token) - token.rindex("\n")
                    raise source.error(Span(line, 1, line, width), "ATL103", "the first definition is indented")
            elif not state.open:
                yield from state.line_end(token)
            continue
        if first and (token.column or 1) > 1 and not source.text.startswith("\n") and token.line == 1:
            raise source.error(Span(1, 1, 1, token.column or 2), "ATL103", "the first definition is indented")
        first = False
        if token.type in ("LPAR", "LSQB", "RPAR", "RSQB"):
            state.bracket(token)
        elif state.open and token.type in _STATEMENT_WORDS:
            raise state.never_closed()
        yield token
    if state.open:
        raise state.never_closed()
