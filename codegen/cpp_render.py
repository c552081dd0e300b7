"""Templates of the C++ target, and what every file that is made of them needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.bccache import Bucket

__all__ = ["keep_templates", "needs", "render"]

_POLYNOMIALS = {
    # minimax fits, lowest power first, relative error in parentheses; float32 rounding comes on top
    "exp2": ("1.0", "0.693147004", "0.240222424", "0.0555073358", "0.00967151299", "0.00132647238"),  # 9e-8
    "exp2_long": (  # 2e-9
        "1.0",
        "0.693147182",
        "0.240226477",
        "0.0555033237",
        "0.00961843692",
        "0.0013398875",
        "0.000153533605",
    ),
    "exp": ("0.49999994", "0.166665211", "0.041668389", "0.00836871006", "0.00138146136"),  # 3e-9
    "log": ("0.666666627", "0.400003344", "0.285373092", "0.235821575"),  # 1e-11 before rounding
    "tanh": ("-0.333332837", "0.133314908", "-0.0537434928", "0.0206505749", "-0.00571703259"),  # 4e-9
}

_NEEDS = {
    **dict.fromkeys(("floor", "ceil", "round", "trunc"), ("whole",)),
    **dict.fromkeys(("exp", "exp2"), ("scaled",)),
    **dict.fromkeys(("tanh", "sigmoid"), ("exp", "scaled")),
    **dict.fromkeys(("log", "log2"), ("logarithm",)),
    **dict.fromkeys(("floordiv", "mod"), ("divide",)),
    "rsqrt": ("sqrt",),
}
"""Helpers that the definition of an operator stands on."""


class _Compiled(jinja2.FileSystemBytecodeCache):
    """Compiled templates on disk; a folder that cannot be used costs time and nothing else."""

    def load_bytecode(self, bucket: Bucket) -> None:
        with contextlib.suppress(OSError):
            super().load_bytecode(bucket)

    def dump_bytecode(self, bucket: Bucket) -> None:
        with contextlib.suppress(OSError):
            super().dump_bytecode(bucket)


_compiled: _Compiled | None = None


def keep_templates(folder: Path) -> None:
    """Keep compiled templates, before any is rendered, in a folder only its user can write."""
    global _compiled
    if _compiled is None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            _compiled = _Compiled(str(folder))


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        bytecode_cache=_compiled,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )


def render(template: str, **text: Any) -> str:
    """Render a template of the target; a name it misses is an error."""
    return _environment().get_template(template).render(poly=_POLYNOMIALS, **text)


def needs(helpers: Iterable[str]) -> set[str]:
    """Operators that a file must define which uses ``helpers``."""
    found = set(helpers)
    return found | {need for name in found for need in _NEEDS.get(name, ())}
