"""Compiled kernels of a program for a named target, without a device of that kind."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attnlang.ir import Program

from .errors import Unavailable
from .source import isa_for, plan_for

__all__ = ["Binary", "binary"]


@dataclass(frozen=True)
class Binary:
    """A shared library, cubin or hsaco: its bytes, the suffix of its file, and what it needs in words."""

    data: bytes
    suffix: str
    needs: str


def binary(
    program: Program,
    target: str,
    head_dim: int,
    value_dim: int,
    dtype: str,
    storage: Mapping[str, str] | None = None,
) -> Binary:
    """Compile the kernel that :func:`attnlang.runtime.source.source` shows for the same arguments.

    Raises:
        UsageError: unknown target or dtype, or a head dimension outside 1 to 512.
        Unavailable: there is no C++ compiler, or triton is not installed.
        CompilerFailed: the compiler refuses the kernel.
    """
    plan = plan_for(program, target, head_dim, value_dim, dtype, storage)
    with tempfile.TemporaryDirectory(prefix="attnlang-") as folder:
        out = Path(folder) / "kernel.bin"
        if target.startswith("cpu"):
            from attnlang.codegen.cpp import emit

            from .toolchain import compile_library, find_compiler

            isa = isa_for(target)
            text = Path(folder) / "kernel.cpp"
            text.write_text(emit(plan, isa), encoding="utf-8")
            compile_library(find_compiler(), text, out, isa.flags)
            return Binary(out.read_bytes(), ".so", f"a processor with {isa.name}")
        if importlib.util.find_spec("triton") is None:
            raise Unavailable("triton is not installed; pip install triton")
        from attnlang.codegen.offline import Compiler
        from attnlang.codegen.triton_tiles import candidates

        with Compiler() as compiler:
            found = compiler.compile(plan, target, candidates(plan, target)[0], out)
        suffix = ".hsaco" if target.startswith("hip") else ".cubin"
        needs = f"{found.registers} registers, {found.spill_bytes} bytes spilled, {found.shared_bytes} bytes shared"
        return Binary(out.read_bytes(), suffix, needs)
