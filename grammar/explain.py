"""Turns what the parser could not accept into a sentence for people."""

from __future__ import annotations

import re

from lark import Token

from .errors import AttnError, Source, Span, suggest
from .layout import token_span

__all__ = ["explain_character", "explain_token"]

_EXPRESSION = frozenset({"NAME", "INT", "FLOAT", "TRUE", "FALSE", "LPAR", "MINUS", "PLUS", "TILDE", "NOT"})
_OPERATORS = frozenset(
    {"IF", "OR", "AND", "COMPARE", "PIPE", "CARET", "AMPERSAND", "SHIFT", "MULTIPLY", "POWER", "PLUS", "MINUS", "DOT"}
)
_WORDS = {
    "NEWLINE": "the end of the line",
    "INDENT": "an indented block",
    "DEDENT": "the end of the block",
    "NAME": "a name",
    "STRING": "a string in quotes",
    "INT": "an integer",
    "FLOAT": "a number",
    "$END": "the end of the file",
}
_SIGNS = {
    "LPAR": "(",
    "RPAR": ")",
    "LSQB": "[",
    "RSQB": "]",
    "COLON": ":",
    "COMMA": ",",
    "ASSIGN": "=",
    "ARROW": "->",
    "DOT": ".",
}
_KEYWORDS = frozenset(
    {"IMPORT", "FROM", "AS", "DEF", "PATTERN", "GRID", "LET", "RETURN"}
    | {"STATIC", "IF", "ELSE", "AND", "OR", "NOT", "TRUE", "FALSE"}
)
_FOREIGN = {
    "&&": "write `and`",
    "||": "write `or`",
    "!": "write `not`",
    "?": "write `a if condition else b`",
    ";": "put each statement on its own line",
    "\\": "wrap the expression in parentheses to continue it on the next line",
    "{": "the language has no braces: blocks are indented",
    "}": "the language has no braces: blocks are indented",
    "@": "the language has no decorators and no matrix product",
    "`": "names are written without quotes",
}
_PYTHON = {
    "for": "the language has no loops: a mask is written for one pair (q, k)",
    "while": "the language has no loops: a mask is written for one pair (q, k)",
    "lambda": "define a helper with `def f(x: int) = ...`",
    "class": "a file holds `import`, `def` and `pattern`",
    "elif": "write `a if c else b if d else e`",
    "assert": "the language has no statements that check",
}


_FORMS = {
    "output": "output name = sum(w, over=q)",
    "term": "term name = dot(Q, table[...])",
    "stat": "stat name = max(s)",
    "branch": "branch name:",
    "attend": "attend name:",
    "normalize": "normalize = softmax(sink=...)",
    "weight": "weights = w * ...",
    "group": "group = k // 64",
    "pool": "pool name = mean(K, block=64)",
    "select": "select name[rows, keys] = top(score, count)",
    "row": "rows name[B, H, Lq, Dv] = ...",
    "position": "position q = ...",
}
"""How statements that have a name or a block are written."""


def _word(kind: str) -> str:
    return _WORDS.get(kind) or f"`{_SIGNS.get(kind) or kind.lower()}`"


def _possible(kinds: set[str], source: Source) -> set[str]:
    """Drop what the tables list but the brackets rule out."""
    if not source.open:
        return kinds - {"RPAR", "RSQB"} - ({"COMMA"} if "NEWLINE" in kinds else set())
    return kinds - {"NEWLINE", "RSQB" if source.open[-1].type == "LPAR" else "RPAR"}


def _expected(kinds: set[str]) -> str:
    """Say what would have been accepted, shortest useful form first."""
    words: list[str] = []
    rest = set(kinds)
    if rest == {"ASSIGN", "COLON", "NAME"}:  # after the first word of a statement
        rest = {"ASSIGN"}
    if rest >= _EXPRESSION - {"NOT"}:
        rest -= _EXPRESSION
        words.append("an expression")
    elif len(rest & _OPERATORS) > 3:
        rest -= _OPERATORS | {"LPAR", "LSQB", "ELSE"}
        words.append("an operator")
    elif rest - _OPERATORS:
        rest -= _OPERATORS
    if {"PATTERN", "DEF"} <= rest:
        rest -= {"PATTERN", "DEF", "IMPORT", "FROM", "$END", "STRING", "INDENT"}
        words.append("`pattern`, `def` or `import` at the start of a line")
    if {"LET", "GRID"} <= rest:
        rest -= {"LET", "GRID", "NAME", "STRING", "DEDENT", "RETURN"}
        words.append("a statement (`let`, `mask =`, `score =`, ...)")
    words = sorted(map(_word, rest)) + words
    if len(words) > 5:
        words = [*words[:5], "..."]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1] if words else ""


def _found(token: Token) -> str:
    if token.type == "NEWLINE":
        return "unexpected end of the line"
    if token.type == "$END":
        return "unexpected end of the file"
    if token.type == "INDENT":
        return "unexpected indentation"
    if token.type == "DEDENT":
        return "the block ends too early"
    if token.type == "STRING":
        return "unexpected string"
    text = str(token)
    kind = "word " if token.type in _KEYWORDS else ""
    return f"unexpected {kind}`{text if len(text) <= 40 else text[:40] + '...'}`"


def _hint(token: Token, expected: set[str], source: Source) -> str:
    text = str(token)
    twice = source.line(token.line or 1)[max(0, (token.column or 1) - 2) :][:2]
    if twice in ("&&", "||"):
        return _FOREIGN[twice]
    if source.open and (token.line or 1) > (source.open[-1].line or 1):
        opener = source.open[-1]
        return f"the `{opener}` on line {opener.line} may be missing its `{')' if opener == '(' else ']'}`"
    line = source.line(token.line or 1)
    words = re.findall(r"[A-Za-z_]+", line[: (token.column or 1) - 1])
    if words and words[-1] in _PYTHON:
        return _PYTHON[words[-1]]
    if expected == {"COLON"}:
        return "a coordinate is `name: extent`" if words[:1] == ["grid"] else "a parameter is `name: type`"
    if expected <= {"ASSIGN", "COLON", "NAME", "LSQB"} and "ASSIGN" in expected and words[:1] != ["let"]:
        form = _FORMS.get(words[0].removesuffix("s")) if words else None
        return f"it is `{form}`" if form else "a statement is `mask = ...`, `score = ...` or `let name = ...`"
    if token.type == "STRING":
        return "expressions have no strings" if "NAME" in expected else ""
    if token.type == "IF" and not words:
        return "a choice is an expression: `a if condition else b`"
    if {"PATTERN", "DEF"} <= expected and text in ("let", "grid", "mask", "score"):
        return f"`{text}` belongs into the indented body of a `pattern`"
    if token.type == "ASSIGN":
        return "write `==` to compare, or `let name = ...` to name a value"
    if token.type == "RETURN":
        return "a pattern ends with `return name, ...`; only `def` returns a value"
    if token.type in _KEYWORDS and "NAME" in expected:
        return f"`{text}` is a word of the language; choose another name"
    if text in _PYTHON:
        return _PYTHON[text]
    if token.type in ("NEWLINE", "DEDENT") and "INDENT" in expected:
        return "indent the lines of the block"
    if token.type == "NEWLINE" and {"COLON", "ASSIGN"} <= expected:
        return "end the line with `:` and indent the body, or write `= ...`"
    if token.type in ("NEWLINE", "DEDENT") and "RETURN" in expected:
        return "the last line of a helper is `return ...`"
    if token.type == "NAME" and {"PATTERN", "DEF"} <= expected:
        return suggest(text, ("pattern", "def", "import", "from"))
    if token.type == "MULTIPLY" or token.type == "POWER":
        return "an operator needs a value on each side"
    return ""


def explain_token(token: Token, expected: set[str], source: Source) -> AttnError:
    """Return the error for a token the grammar has no place for."""
    span = token_span(token)
    first = re.match(r"\s*([A-Za-z_]+)", source.line(span.line))
    word = first.group(1) if first else ""
    before_value = len(source.line(span.line)[: span.column - 1].split()) <= 2
    if word in _PYTHON and before_value:
        span = Span(span.line, first.start(1) + 1, span.line, first.end(1) + 1) if first else span
        return source.error(span, "ATL104", f"unexpected `{word}`", _PYTHON[word])
    if token.type == "NEWLINE":  # it begins where the line ends: point just behind the last word
        text = source.line(span.line)
        end = len(re.sub(r"\s*(#.*)?$", "", text)) + 1 if '"' not in text else len(text) + 1
        span = Span(span.line, end, span.line, end + 1)
    expected = _possible(expected, source)
    code = "ATL103" if token.type in ("INDENT", "DEDENT") or expected == {"INDENT"} else "ATL104"
    wanted = _expected(expected)
    message = _found(token) + (f"; expected {wanted}" if wanted else "")
    if token.type == "INDENT":
        message = "unexpected indentation"
    return source.error(span, code, message, _hint(token, expected, source))


def explain_character(line: int, column: int, source: Source) -> AttnError:
    """Return the error for a character no token starts with."""
    rest = source.line(line)[column - 1 :]
    character = rest[:1] or "\n"
    if character in "\"'":
        return source.error(
            Span(line, column, line, len(source.line(line)) + 1),
            "ATL102",
            "this string does not end",
            "close it with the quotes it starts with",
        )
    sign = next((s for s in _FOREIGN if rest.startswith(s)), "")
    span = Span(line, column, line, column + max(1, len(sign)))
    shown = f"`{sign or character}`" if character.isprintable() else f"character U+{ord(character):04X}"
    return source.error(span, "ATL101", f"unexpected {shown}", _FOREIGN.get(sign, ""))
