"""The process in which generated kernels are compiled: reads one job a line, answers with one line of JSON.

Run as a file, so that it needs triton and nothing of attnlang.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# beside this file lies a module called triton, which must not be found first
sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

MMA = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"(?<!wgmma\.)\bmma\.sync",
    "mfma": r"\bv_mfma",
}


def _kernel(path: str, function: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"kernel_{abs(hash(path))}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    kind, _, arch = target.partition(":")
    return GPUTarget("hip", arch, 64) if kind == "hip" else GPUTarget("cuda", int(arch), 32)


def _ptxas(log: str, ptx: str, arch: int) -> tuple[int, int, int, bool]:
    """Return registers, spill bytes, stack bytes and whether asynchronous matrix instructions were serialised.

    ``log`` is what ptxas said when Triton called it; a Triton that does not pass it on has ptxas run again.
    """
    if "registers" not in log:
        log = _run_ptxas(ptx, arch)
    figures = [re.search(p, log) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes stack")]
    registers, spills, stack = (int(f.group(1)) if f else 0 for f in figures)
    return registers, spills, stack, "serialized" in log


def _run_ptxas(ptx: str, arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(arch).path
    name = re.search(r"^\.target (\w+)", ptx, re.M)
    assert name is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={name.group(1)}", str(path), "-o", str(path.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _amd(text: str) -> tuple[int, int, int, bool]:
    def read(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    # where accumulation registers share one file with the others (gfx90a and later), .vgpr_count is the sum of both
    registers = max(read("vgpr_count"), read("agpr_count"))
    # vector registers spill to accumulation registers as well as to memory, scalar ones to lanes of vector registers
    stack = read("private_segment_fixed_size")
    return registers, min(4 * read("vgpr_spill_count"), stack), stack, False


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one job and return its figures; a job without a path asks for Triton's version alone."""
    import triton

    if "path" not in job:
        return {"triton": triton.__version__}
    from triton.compiler import ASTSource

    fn, target = _kernel(job["path"], job["function"]), _gpu(job["target"])
    attrs = {(fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in job["divisible"]}
    source = ASTSource(fn=fn, signature=job["types"], constexprs=job["constants"], attrs=attrs)
    options = {"num_warps": job["warps"], "num_stages": job["stages"], "enable_fp_fusion": True}
    with contextlib.redirect_stdout(io.StringIO()) as log:
        done = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        text, binary = done.asm["amdgcn"], done.asm["hsaco"]
        figures = _amd(text)
    else:
        text, binary = done.asm["ptx"], done.asm["cubin"]
        figures = _ptxas(log.getvalue(), text, target.arch)
    if job.get("save"):
        Path(job["save"]).write_bytes(binary)
    registers, spills, stack, serialised = figures
    return {
        "registers": registers,
        "spill_bytes": spills,
        "stack_bytes": stack,
        "shared_bytes": done.metadata.shared,
        "mma": {name: n for name, pattern in MMA.items() if (n := len(re.findall(pattern, text)))},
        "serialised": serialised,
        "triton": triton.__version__,
        "binary_bytes": len(binary),
    }


def main() -> None:
    # figures come from the log of the assembler, which a cached kernel does not have
    os.environ["TRITON_ALWAYS_COMPILE"] = os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                result = answer(json.loads(line))
        except Exception as error:  # the parent reports it as the defect of one kernel
            result = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        out.write(json.dumps(result) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
