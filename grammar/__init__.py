"""The ``.attn`` language: text to programs, with errors for people.

The language is described in docs/language.md. To add a built-in function, add a row to ``functions.py``; to add a sign
or a statement, start at ``attnlang.lark``.
"""

from .errors import CODES, AttnError, Diagnostic
from .functions import CONSTANTS, Function, builtin_functions
from .modules import Module, load, parse

__all__ = ["CODES", "CONSTANTS", "AttnError", "Diagnostic", "Function", "Module", "builtin_functions", "load", "parse"]
