"""Rows of many tensors in another order at a time: a small C++ helper, or PyTorch where there is no compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from attnlang.codegen.cpp_rows import ENTRY, emit_rows
from attnlang.codegen.isa import COMMON_FLAGS

from .cache import Cache
from .cpp_common import LIBRARY
from .errors import Unavailable
from .team import team
from .toolchain import compile_library, find_compiler

__all__ = ["Job", "move"]

Tensor = torch.Tensor
Job = tuple[Tensor, Tensor, Tensor]

BLOCK = 256
"""Rows a thread takes at a time."""
THREAD_BYTES = 1 << 19
"""Bytes to move for which another thread is worth starting."""


def move(jobs: Sequence[Job]) -> None:
    """For every (source [L, D] or [L], target, order int64 [L]) on the CPU, let ``target[i] = source[order[i]]``.

    ``order`` is contiguous; sources and targets have one dtype and shape and share no memory. Nothing is recorded by
    autograd.
    """
    helper = _helper()
    if helper is None:
        for source, target, order in jobs:
            target.copy_(source.index_select(0, order))
        return
    keep = [(s if s.dim() == 1 or s.stride(1) == 1 else s.contiguous(), t, o) for s, t, o in jobs]
    record = np.array([_record(*job) for job in keep], np.int64)
    most = max((len(order) for _, _, order in keep), default=0)
    total = int((record[:, 3] * record[:, 6]).sum()) if keep else 0
    if not total:
        return
    arguments = np.array([record.ctypes.data, len(keep), BLOCK, -(-most // BLOCK)], np.int64)
    threads = min(torch.get_num_threads(), 1 + total // THREAD_BYTES)
    shared = team() if threads > 1 else 0
    helper(arguments.ctypes.data, torch.get_num_threads() if shared else threads, shared)


def _record(source: Tensor, target: Tensor, order: Tensor) -> tuple[int, ...]:
    size = source.element_size()
    width = source.shape[1] if source.dim() > 1 else 1
    assert target.dim() == 1 or target.stride(1) == 1
    steps = (source.stride(0) * size, target.stride(0) * size)
    return source.data_ptr(), target.data_ptr(), order.data_ptr(), len(order), *steps, width * size


@functools.cache
def _helper() -> Callable[[int, int, int], None] | None:
    """The compiled helper, built or found in the cache; None where it cannot be had."""
    text = emit_rows()

    def build(library: Path) -> None:
        path = library.with_suffix(".cpp")
        path.write_text(text)
        compile_library(compiler, path, library, ())

    try:
        compiler = find_compiler()
        recipe = "\0".join((text, *COMMON_FLAGS, compiler.identity))
        key = f"rows-{hashlib.sha256(recipe.encode()).hexdigest()[:24]}"
        found = getattr(ctypes.CDLL(str(Cache().get_or_build(key, LIBRARY, build))), ENTRY)
    except (Unavailable, OSError):
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p), None
    call: Callable[[int, int, int], None] = found
    return call
