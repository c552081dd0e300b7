"""Compile a plan for a GPU that is not here, and report what the kernel needs: registers, spills, shared memory.

Compilations run in a process of their own: a compiler crash must not take the caller along, and Triton has to be
imported without its interpreter. NVIDIA figures come from ``ptxas -v``, AMD figures from the assembly's metadata.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnlang.ir import AttnlangError

from .plan import KernelPlan
from .triton import KERNEL_NAME
from .triton_common import Config, padded
from .triton_stream import emit_forward, forward_arguments
from .triton_tiles import candidates, is_compiler_failure, settle, shared_limit

__all__ = ["Compiler", "CompilerFailed", "Job", "Resources", "compile_plan", "first_that_fits", "signature"]

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float64": "*fp64", "bool": "*u8"}
POINTERS |= {f"{u}int{n}": f"*{u[:1] or 'i'}{n}" for u in ("u", "") for n in (8, 16, 32, 64)}


class CompilerFailed(AttnlangError):
    """Triton or the assembler refused a generated kernel; this is a defect of attnlang."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile: ``function`` of ``source`` at the tile of ``config``; ``title`` is for people.

    ``signature`` gives the types, constants and divisibility of the parameters.
    """

    title: str
    source: str
    function: str
    config: Config
    signature: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one target. Bytes, except registers per thread and instruction counts.

    ``stack_bytes`` is local memory: what is spilled, and arrays that no registers can hold. ``mma`` counts matrix
    instructions by kind; ``serialised`` says that the assembler made asynchronous ones wait.
    """

    target: str
    config: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    mma: dict[str, int]
    serialised: bool
    triton: str
    binary_bytes: int


def signature(plan: KernelPlan, config: Config) -> dict[str, Any]:
    """Return types and divisibility of the kernel's parameters for contiguous tensors of ordinary shapes.

    The last stride of q, k, v and o is 1, like that of captured tensors; pointers and other strides divide by 16.
    """
    types: dict[str, str] = {}
    dtypes = {f"{name}_ptr": plan.dtype for name in ("q", "k", "v", "o")}
    names = forward_arguments(plan, config)
    outs = {f"{o.name}_out_": o.integer for o in plan.stream.outputs} if plan.stream is not None else {}
    blocks = _blocks(plan, config)
    dtypes |= {names.pointers[t.name]: t.dtype for t in plan.all_tensors}
    last = {f"{x}_stride_d" for x in "qkvo"} | set(names.last_strides)
    floats = {"scale", *names.float_scalars}
    constants: dict[str, int] = {}
    divisible: list[str] = []
    for name in names.kernel:
        if name in blocks:
            types[name] = f"tensordesc<{POINTERS[plan.dtype][1:]}[1,1,{blocks[name]}]>"
        elif name in dtypes:
            types[name] = POINTERS[dtypes[name]]
        elif name == "lse_ptr" or name in outs:
            types[name] = "*i64" if outs.get(name) else "*fp32"
        elif name in ("full_ptr", "full_runs", "part_ptr", "part_runs"):
            types[name] = "*i32"
        elif name in last:
            types[name] = "constexpr"
            constants[name] = 1
        else:
            types[name] = "fp32" if name in floats else "i32"
        if types[name].startswith("*") or ("stride" in name and name not in last and name not in names.loose):
            divisible.append(name)
    return {"types": types, "constants": constants, "divisible": divisible}


def _blocks(plan: KernelPlan, config: Config) -> dict[str, str]:
    """Rows and columns of the blocks of each tensor descriptor."""
    if not config.descriptors:
        return {}
    d, dv = padded(plan.head_dim), padded(plan.value_dim)
    rows = {"q_desc": (config.block_m, d), "k_desc": (config.block_n, d)}
    rows |= {"v_desc": (config.block_n, dv), "o_desc": (config.block_m, dv)}
    return {name: f"{n},{columns}" for name, (n, columns) in rows.items()}


class Compiler:
    """A worker process that compiles sources for targets; restarted when it dies. Use as a context manager."""

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def _worker(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            self._process = subprocess.Popen(
                [self._python, str(Path(__file__).with_name("offline_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        return self._process

    @property
    def version(self) -> str:
        """The version of Triton that compiles."""
        return str(self._ask({})["triton"])

    def compile(self, plan: KernelPlan, target: str, config: Config, save: Path | None = None) -> Resources:
        """Compile the forward kernel of ``plan`` at the tile of ``config``; see ``build``."""
        return self.build(_job(plan, config), target, save)

    def build(self, job: Job, target: str, save: Path | None = None) -> Resources:
        """Compile ``job`` for ``target``; the cubin or hsaco is written to ``save``.

        Raises:
            CompilerFailed: with the compiler's message.
        """
        with tempfile.TemporaryDirectory(prefix="attnlang-offline-") as folder:
            path = Path(folder) / "kernel.py"
            path.write_text(job.source, encoding="utf-8")
            request = {"path": str(path), "function": job.function, "target": target, **job.signature}
            request |= {"warps": job.config.warps, "stages": job.config.stages}
            answer = self._ask(request | {"save": None if save is None else str(save)})
        if "error" in answer:
            raise CompilerFailed(f"{job.title} for {target} at {job.config.key}: {answer['error']}")
        return Resources(target=target, config=job.config.key, **answer)

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            worker = self._worker()
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                self._process = None
                return {"error": f"the compiler died with status {worker.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def first_that_fits(
    title: str, configs: tuple[Config, ...], job: Callable[[Config], Job], target: str, compiler: Compiler
) -> Resources:
    """Compile tiles in order of preference and return what the one needs that a launch on such a chip settles on.

    Raises:
        CompilerFailed: a tile is refused, or none compiles and fits the shared memory of the target.
    """
    made: dict[Config, Resources] = {}
    failed: CompilerFailed | None = None

    def spills(config: Config) -> int | None:
        nonlocal failed
        try:
            made[config] = compiler.build(job(config), target)
        except CompilerFailed as error:
            if not is_compiler_failure(str(error)):
                raise
            failed = error
            return None
        # a launch sees the local memory of a kernel, not what is in it
        return made[config].stack_bytes if made[config].shared_bytes <= shared_limit(target) else None

    config = settle(configs, spills)
    if config is None:
        if failed is not None:
            raise failed
        raise CompilerFailed(f"no tile of {title} fits the shared memory of {target}")
    return made[config]


def _job(plan: KernelPlan, config: Config) -> Job:
    return Job(plan.program.name, emit_forward(plan, config), KERNEL_NAME, config, signature(plan, config))


def compile_plan(
    plan: KernelPlan, target: str, *, descriptors: bool = False, compiler: Compiler | None = None
) -> Resources:
    """Compile the forward kernel of ``plan`` without a GPU, at the tile that a launch on such a chip settles on.

    Targets: ``cuda:80``, ``cuda:90``, ``cuda:100``, ``hip:gfx942``.

    Raises:
        CompilerFailed: a tile is refused, or none compiles and fits the shared memory of the target.
    """
    if compiler is None:
        with Compiler() as compiler:
            return compile_plan(plan, target, descriptors=descriptors, compiler=compiler)
    configs = candidates(plan, target, descriptors=descriptors)
    return first_that_fits(plan.program.name, configs, lambda config: _job(plan, config), target, compiler)
