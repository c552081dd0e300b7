"""Text to syntax tree. The LALR tables are built at the first parse and kept, on disk too where a folder is given."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lark import Lark, Token, UnexpectedCharacters, UnexpectedToken
from lark.exceptions import VisitError

from . import syntax as ast
from .builder import Builder
from .errors import AttnError, Source
from .explain import explain_character, explain_token
from .layout import layout

__all__ = ["MAX_BYTES", "keep_tables", "parse_source"]

MAX_BYTES = 1_000_000

_GRAMMAR = Path(__file__).with_name("attnlang.lark")
_lock = threading.Lock()
_lark: Lark | None = None
_folder: Path | None = None


def keep_tables(folder: Path) -> None:
    """Keep the tables, which take longer to build than a program to parse, in a folder only its user can write.

    A folder that cannot be used costs time and nothing else.
    """
    global _folder
    _folder = folder


def _file(grammar: str) -> str | None:
    """Where the tables of ``grammar`` are kept, None for nowhere."""
    if _folder is None:
        return None
    try:
        _folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(_folder / f"grammar-{hashlib.sha256(grammar.encode()).hexdigest()[:16]}.tables")


class _Callbacks:
    """Stands in for the transformer when the tables are built and forwards to the builder of the running parse."""

    def __init__(self) -> None:
        self.running = threading.local()

    def __getattr__(self, rule: str) -> Any:
        if rule.startswith("_") or not hasattr(Builder, rule):
            raise AttributeError(rule)
        return lambda children: getattr(self.running.builder, rule)(children)


class _Postlex:
    """Applies the layout of the running parse to the token stream."""

    always_accept = ("NEWLINE",)

    def __init__(self, callbacks: _Callbacks) -> None:
        self.callbacks = callbacks

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        return layout(stream, self.callbacks.running.builder.source)


_callbacks = _Callbacks()


def _parser() -> Lark:
    global _lark
    with _lock:
        if _lark is None:
            grammar = _GRAMMAR.read_text(encoding="utf-8")
            _lark = Lark(
                grammar,
                cache=_file(grammar) or False,
                parser="lalr",
                lexer="basic",
                keep_all_tokens=True,
                maybe_placeholders=False,
                transformer=_callbacks,
                postlex=_Postlex(_callbacks),
            )
        return _lark


def parse_source(text: str, filename: str) -> tuple[ast.SourceFile, Source]:
    """Parse ``text`` without resolving a single name.

    Raises:
        AttnError: the text does not follow the grammar.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.endswith("\n"):
        text += "\n"
    source = Source(text, filename)
    if len(text) > MAX_BYTES + 1:
        raise source.error(None, "ATL100", f"the text is longer than {MAX_BYTES} characters")
    if "\0" in text:
        raise source.error(None, "ATL100", "this is not a text: it contains NUL characters")
    parser = _parser()
    _callbacks.running.builder = Builder(source)
    try:
        return parser.parse(text), source  # type: ignore[return-value]
    except UnexpectedToken as error:
        raise explain_token(error.token, set(error.expected), source) from None
    except UnexpectedCharacters as error:
        raise explain_character(error.line, error.column, source) from None
    except VisitError as error:
        if isinstance(error.orig_exc, AttnError):
            raise error.orig_exc from None
        raise
    finally:
        del _callbacks.running.builder
