"""The threads of PyTorch's OpenMP library, for kernels to run on.

Its threads go on spinning for some milliseconds after an operation of PyTorch. Threads of our own would share the
processors with them; run on the same ones, a kernel between two operations starts at once, up to twice as fast.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

__all__ = ["team"]

LEAST_STACK = 2 << 20
"""Bytes of stack that kernels expect of a thread of the team."""
_SETTINGS = ("OMP_STACKSIZE", "GOMP_STACKSIZE", "KMP_STACKSIZE")


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def team() -> int:
    """Return the address of ``GOMP_parallel`` in the library PyTorch runs on, 0 where kernels make their own threads.

    That is so where PyTorch uses another kind of threads, or ones with less stack than usual, and in a process that was
    forked, in which the threads are not.
    """
    return 0 if _forked else _found()


@functools.cache
def _found() -> int:
    if any(name in os.environ for name in _SETTINGS) or not _enough_stack():
        return 0
    for path in _loaded():
        try:
            library = ctypes.CDLL(path)
            most, run = library.omp_get_max_threads(), library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        if most == torch.get_num_threads():
            return ctypes.cast(run, ctypes.c_void_p).value or 0
    return 0


def _enough_stack() -> bool:
    try:
        import resource
    except ImportError:
        return False
    limit, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return limit == resource.RLIM_INFINITY or limit >= LEAST_STACK


def _loaded() -> list[str]:
    """OpenMP libraries this process has loaded, those that come with PyTorch first."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line}
    found = [p for p in paths if Path(p).name.startswith(("libgomp", "libiomp", "libomp"))]
    home = str(Path(torch.__file__).parent)
    return sorted(found, key=lambda p: (not p.startswith(home), p))
