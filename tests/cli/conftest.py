"""What the tests of the command line share: a runner, and files to run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

GOOD = '''
"""Two patterns."""

def near(a: int, b: int, n: int) = abs(a - b) <= n

pattern band(width: int = 16):
    """A band."""
    mask = near(q, k, width)

pattern packed(doc: int[B, Lk], slope: float[H]):
    """Packed rows with a bias."""
    mask = k <= q and doc[b, q] == doc[b, k]
    score = s + slope[h] * (k - q)
'''

BROKEN = """
pattern band(width: int = 16):
    mask = abs(q - k) <= widht
"""

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the command line in this process."""
    from attnlang.cli import app

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERMINAL_WIDTH", "120")
    monkeypatch.delenv("ATTNLANG_DEBUG", raising=False)
    return lambda *words: CliRunner().invoke(app, [str(w) for w in words])


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.attn"
    path.write_text(GOOD)
    return path


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.attn"
    path.write_text(BROKEN)
    return path


def said(result: Result, *words: str) -> str:
    """The messages of a command that failed for a person: no traceback, and every one of ``words`` is in it."""
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output, result.output
    return result.output
