"""Interpreter mode for this folder only.

Triton decides at import whether its language runs in the interpreter. It is imported here in that mode, and the switch
is set while a test of this folder runs, so that the rest of the session sees an ordinary environment. Where something
else imported Triton first, the interpreted tests are left to ``test_subprocess.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if "triton" not in sys.modules:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton  # noqa: F401

    if before is None:
        del os.environ["TRITON_INTERPRET"]

INTERPRETED = type(sys.modules["triton"].language.max).__name__ == "InterpretedFunction"

if not INTERPRETED:
    collect_ignore_glob = ["test_interpret*.py"]


@pytest.fixture(scope="session", autouse=True)
def _hurry() -> Iterator[None]:
    """Interpreted kernels share what does not differ between them."""
    if not INTERPRETED:
        yield
        return
    from triton_interpreter import hurried

    with hurried():
        yield


@pytest.fixture(autouse=True)
def _interpret(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.path.name.startswith("test_interpret"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let Triton 3.6's interpreter turn one-element arrays into numbers, which newer NumPy announces to refuse."""
    mark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(mark)


@pytest.fixture
def in_process() -> bool:
    """Whether the interpreted tests run in this process."""
    return INTERPRETED


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every backward pass so far, whether kernels made the gradients."""
    from attnlang.runtime import compiled

    found: list[bool] = []
    original = compiled.StageKernel.gradients

    def gradients(self, *args):
        result = original(self, *args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(compiled.StageKernel, "gradients", gradients)
    return found
