"""Shared pytest set-up: hypothesis profiles and a private kernel cache per test session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep compiled kernels of a test run out of the user's cache (one folder a worker)."""
    root = tmp_path_factory.mktemp("kernel-cache")
    os.environ.setdefault("ATTNLANG_CACHE_DIR", str(root))
    yield root


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _optimise(level: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    from attnlang.runtime import cpp_common, toolchain

    flags = (*(level if f == "-O3" else f for f in toolchain.COMMON_FLAGS), *more)
    monkeypatch.setattr(toolchain, "COMMON_FLAGS", flags)
    monkeypatch.setattr(cpp_common, "COMMON_FLAGS", flags)


@pytest.fixture
def lightly_optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile C++ kernels in half the time. For tests whose program has a test with the usual flags as well."""
    _optimise("-O1", monkeypatch)


@pytest.fixture
def unoptimised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile C++ kernels in a quarter of the time; for random programs, which are many."""
    _optimise("-O0", monkeypatch, "-nostdlib")  # to link what a kernel does not need takes a sixth of the time
