"""The system's C++ compiler and what the processor can do."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from attnlang.codegen.isa import COMMON_FLAGS

from .errors import Unavailable

__all__ = ["Compiler", "compile_library", "find_compiler", "matrix_registers", "processor_features"]

TIMEOUT = 120.0
"""Seconds after which a compiler run is given up."""


class Compiler:
    """A compiler command with an ``identity`` that changes when the compiler does."""

    def __init__(self, command: tuple[str, ...], identity: str) -> None:
        self.command = command
        self.identity = identity


def find_compiler() -> Compiler:
    """Return the compiler ``CXX`` names, or else the first of c++, g++ and clang++ on the path.

    Raises:
        Unavailable: there is none, or it does not run.
    """
    return _find(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@functools.lru_cache(maxsize=16)
def _find(chosen: str, path: str) -> Compiler:
    if chosen.strip():
        command = tuple(shlex.split(chosen))
        if shutil.which(command[0], path=path) is None:
            raise Unavailable(f"the C++ compiler CXX={chosen!r} is not found")
    else:
        found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name, path=path)), None)
        if found is None:
            raise Unavailable("there is no C++ compiler (c++, g++ or clang++) on the path; install one or set CXX")
        command = (found,)
    try:
        run = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"the C++ compiler {shlex.join(command)!r} does not run: {error}") from error
    return Compiler(command, f"{shlex.join(command)}|{run.stdout.strip().splitlines()[0] if run.stdout else ''}")


def compile_library(compiler: Compiler, source: Path, library: Path, flags: tuple[str, ...]) -> None:
    """Compile ``source`` to the shared library ``library``.

    Raises:
        Unavailable: the compiler fails; the reason quotes its first error.
    """
    command = [*compiler.command, *COMMON_FLAGS, *flags, str(source), "-o", str(library), "-lm"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"the C++ compiler does not run: {error}") from error
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise Unavailable(f"the C++ compiler failed: {first.strip()}")


@functools.cache
def processor_features() -> frozenset[str]:
    """Return the features of this processor under the names Linux gives them; empty where they cannot be read."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


@functools.cache
def matrix_registers() -> bool:
    """Ask the kernel for the matrix registers of x86 (a process has to, once) and return whether it may use them."""
    try:
        return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0  # arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
    except (OSError, AttributeError):
        return False
