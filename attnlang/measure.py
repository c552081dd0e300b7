"""Fair measurements: several ways of computing one thing, interleaved in one process, medians of wall-clock time."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["PeakMemory", "Timing", "interleaved", "peak_memory", "synchronise"]


@dataclass(frozen=True)
class Timing:
    """Median, least and largest time of one call in milliseconds, and how many calls were timed."""

    median: float
    low: float
    high: float
    calls: int


def synchronise(device: torch.device) -> None:
    """Wait until everything queued on ``device`` has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int = 7,
    seconds: float = 20.0,
    on_call: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Time every call once a round, in turn, so that drifts of the machine hit all alike.

    The first round warms caches and is not counted. Stops after ``rounds``, or earlier, though never before two counted
    rounds, once ``seconds`` have passed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for number in range(rounds + 1):
        if number > 2 and time.perf_counter() - started > seconds:
            break
        for name, call in calls.items():
            if on_call is not None:
                on_call(name)
            synchronise(device)
            begin = time.perf_counter()
            call()
            synchronise(device)
            if number:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: Timing(statistics.median(t), min(t), max(t), len(t)) for name, t in times.items()}


@dataclass(frozen=True)
class PeakMemory:
    """What a call returned and the most memory, in bytes, it held beyond what was held before."""

    result: Any
    bytes: int


def peak_memory(call: Callable[[], Any], device: torch.device) -> PeakMemory:
    """Run ``call`` and measure the memory it needs at its peak, its result included.

    On a GPU this is what torch's allocator reports; elsewhere the resident memory of the process is sampled every
    millisecond, which needs /proc (without it the answer is 0).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        synchronise(device)
        return PeakMemory(result, torch.cuda.max_memory_allocated(device) - before)
    _return_free_memory()
    before = peak = _resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = call()
    finally:
        done.set()
        watcher.join()
    return PeakMemory(result, max(peak, _resident()) - before)


def _return_free_memory() -> None:
    """Ask the C library to give freed memory back, so that a call that reuses it is not measured as needing none."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
