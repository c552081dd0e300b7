"""C++ kernels that compute their run bounds: the same bits as with a run table, and exact up to 2^31 positions."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from backward import cases
from closed.cases import CASES, Case, closed_call

from attnlang.codegen.cpp import emit
from attnlang.codegen.cpp_arguments import arguments
from attnlang.codegen.isa import COMMON_FLAGS, ISAS
from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.ir import Environment, dense_mask, evaluate
from attnlang.runtime import cpp, cpp_backward
from attnlang.runtime.toolchain import find_compiler
from attnlang.sparsity import EMPTY, FULL, PARTIAL, closed_form

pytestmark = pytest.mark.usefixtures("lightly_optimised")

ISA = ISAS["generic"]


@pytest.mark.parametrize("name", ["window", "per_head", "sinks"])
def test_bounds_and_table_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of one tile, where it does not matter which tiles are one run."""
    monkeypatch.setenv("ATTNLANG_ISA", "generic")
    assert ISA.chunk == ISA.tile
    case = CASES[name]
    for lq, lk in ((150, 150), (200, 64), (70, 331)):
        table = cases.make_call(case.program, (2, 2, 1, lq, lk, 16, 16), case.tensors, params=case.params)
        call = closed_call(table, case.both)
        o, lse = cpp.forward(call)
        for got, want in zip((o, lse), cpp.forward(table), strict=True):
            assert torch.equal(got, want)
        do = torch.randn_like(o)
        found, wanted = (cpp_backward.backward(c, o, lse, do, None, ()) for c in (call, table))
        for grad in ("q", "k", "v"):
            assert torch.equal(getattr(found, grad), getattr(wanted, grad))


class Probe:
    """The function of a kernel that finds the runs of a block, compiled without the rest of the kernel."""

    def __init__(self, plan: KernelPlan, folder: Path) -> None:
        source = emit(plan, ISA)
        blocks, runs, end = (source.index(mark) for mark in ("// ---- blocks", "// ---- runs", "// One block of"))
        probe = """
}  // namespace
extern "C" void probe(const Arguments *a, int b, int h, long long block, int *out) { runs_of(*a, b, h, block, out); }
"""
        path = folder / "probe.cpp"
        path.write_text(source[:blocks] + source[runs:end] + probe)
        flags = [f for f in COMMON_FLAGS if f != "-O3"]
        command = [*find_compiler().command, *flags, str(path), "-o", str(folder / "probe.so")]
        subprocess.run(command, check=True)
        self.entry = ctypes.CDLL(str(folder / "probe.so")).probe
        self.entry.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p)
        self.fields = arguments(plan, ISA).fields
        (runs_of_plan,) = plan.runs
        self.parts = len(runs_of_plan.parts)

    def __call__(self, case: Case, sizes: dict[str, int], b: int, h: int, block: int) -> list[list[int]]:
        """Return (start, full_start, full_end, end) of every part."""
        record = b"".join(struct.pack("=" + f.code, self._value(f.source, case, sizes)) for f in self.fields)
        out = np.zeros(6 * self.parts, np.int32)
        self.entry(record, b, h, block, out.ctypes.data)
        full, part = out[: 2 * self.parts].reshape(-1, 2), out[2 * self.parts :].reshape(-1, 4)
        assert (full == part[:, 1:3]).all()
        return part.tolist()

    @staticmethod
    def _value(source: tuple[str, ...], case: Case, sizes: dict[str, int]) -> int:
        kind, *name = source
        match kind:
            case "size":
                return sizes[name[0]]
            case "param":
                return int(case.params[name[0]])
            case "data":
                return case.tensors[name[0]].data_ptr()
            case "step":
                return case.tensors[name[0]].stride(int(name[1]))
            case "length":
                return case.tensors[name[0]].shape[int(name[1])]
        return 0


def plan_of(case: Case, wide: bool) -> KernelPlan:
    storage = {n: str(t.dtype).removeprefix("torch.") for n, t in case.tensors.items()}
    program = case.program
    plan = make_plan(program, dtype="float32", head_dim=16, value_dim=16, storage=storage, wide=wide, closed=("k",))
    assert plan.runs and not re.search(r"full_ptr|part_ptr", emit(plan, ISA))
    return plan


@pytest.mark.parametrize("name", CASES)
def test_bounds_of_a_kernel_are_those_of_the_mask(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    probe = Probe(plan_of(case, wide=False), tmp_path)
    for lq, lk in ((300, 300), (1, 70), (200, 64), (64, 331), (130, 1)):
        sizes = {"B": 2, "H": 2, "Hkv": 1, "Lq": lq, "Lk": lk}
        mask = dense_mask(case.program, sizes, case.params, case.tensors)
        for b, h, block in np.ndindex(mask.shape[0], mask.shape[1], -(-lq // ISA.rows)):
            rows = mask[b, h, block * ISA.rows : (block + 1) * ISA.rows]
            kinds = np.full(-(-lk // ISA.tile), EMPTY)
            at = 0
            for start, full_start, full_end, end in probe(case, sizes, b, h, block):
                assert at <= start <= full_start <= full_end <= (at := end) <= len(kinds)
                kinds[start:end], kinds[full_start:full_end] = PARTIAL, FULL
            for tile, kind in enumerate(kinds):
                pairs = rows[:, tile * ISA.tile : (tile + 1) * ISA.tile]
                cut = (tile + 1) * ISA.tile > lk
                want = PARTIAL if pairs.any() and (cut or not pairs.all()) else FULL if pairs.all() else EMPTY
                assert kind == want, (b, h, block, tile)


FAR = ("causal", "bottom_right", "window", "wide_window", "both_sides", "block_causal", "steep", "endless", "sinks")


@pytest.mark.parametrize("name", FAR)
def test_bounds_are_exact_up_to_the_longest_sequence(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    probe = Probe(plan_of(case, wide=True), tmp_path)
    form = closed_form(case.program)
    assert form is not None
    bounds = form.tile_bounds(ISA.tile)
    storage = {n: str(t.dtype).removeprefix("torch.") for n, t in case.tensors.items()}
    longest = 2**31 - 1
    for lq, lk in ((longest, longest), (longest, longest - 1000), (5, longest), (longest, 77)):
        sizes = {"B": 2, "H": 2, "Hkv": 1, "Lq": lq, "Lk": lk}
        assert form.holds(sizes, case.params, storage)
        blocks = -(-lq // ISA.rows)
        for block in sorted({0, blocks // 3, blocks // 2, max(0, blocks - 2), blocks - 1}):
            first, last = block * ISA.rows, min(lq, (block + 1) * ISA.rows) - 1
            inputs = {"q_first": torch.tensor(first), "q_last": torch.tensor(last)}
            env = Environment({"b": torch.tensor(0), "h": torch.tensor(1)}, sizes, case.params, case.tensors, inputs)
            want = [[int(evaluate(e, env)) for e in part.exprs] for part in bounds]
            assert probe(case, sizes, 0, 1, block) == want
