"""Generated kernels compiled for chips that are not here: they assemble, keep their registers and fit shared memory."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from attnlang import library
from attnlang.codegen.offline import Compiler, CompilerFailed, Resources, compile_plan
from attnlang.codegen.plan import KernelPlan, make_plan
from attnlang.codegen.triton import Config, emit
from attnlang.codegen.triton_printer import RESERVED
from attnlang.codegen.triton_tiles import candidates, settle, shared_bytes, shared_limit
from attnlang.ir import BOOL, FLOAT, INT, Program, ScalarParam, simple
from attnlang.ir.build import k, op, param, q
from attnlang.passes.specialise import specialise

STORAGE = {FLOAT: "float32", INT: "int32", BOOL: "bool"}


def plan_of(program: Program | str, dim: int, dtype: str = "bfloat16") -> KernelPlan:
    program = specialise(getattr(library, program) if isinstance(program, str) else program, {})
    storage = {t.name: STORAGE[t.type] for t in program.tensors}
    return make_plan(program, dtype=dtype, head_dim=dim, value_dim=dim, storage=storage)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as made:
        yield made


def check(made: Resources, target: str) -> None:
    assert made.spill_bytes == 0
    assert made.stack_bytes == 0
    assert made.shared_bytes <= shared_limit(target)
    assert not made.serialised


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["causal", "causal_document", "gemma2_local"])
def test_hopper(compiler, name, dim):
    made = compile_plan(plan_of(name, dim), "cuda:90", descriptors=True, compiler=compiler)
    check(made, "cuda:90")
    assert made.mma.keys() == {"wgmma"}
    assert made.config.startswith("m128")


@pytest.mark.parametrize(
    ("target", "unit", "descriptors"),
    [
        ("cuda:80", "mma", False),
        ("cuda:90", "wgmma", False),
        ("cuda:100", "tcgen05", True),
        ("hip:gfx942", "mfma", False),
    ],
)
def test_every_target_uses_its_matrix_units(compiler, target, unit, descriptors):
    made = compile_plan(plan_of("causal_alibi", 128, "float16"), target, descriptors=descriptors, compiler=compiler)
    check(made, target)
    assert unit in made.mma


@pytest.mark.parametrize("dims", [(80, "bfloat16"), (256, "bfloat16"), (64, "float32")])
def test_other_head_dimensions_and_float32(compiler, dims):
    made = compile_plan(plan_of("causal", *dims), "cuda:80", compiler=compiler)
    check(made, "cuda:80")
    assert ("mma" in made.mma) == (dims[1] != "float32"), "float32 must not lose precision to tensor cores"


def test_a_defect_is_reported(compiler, monkeypatch):
    monkeypatch.setattr("attnlang.codegen.offline.emit_forward", lambda plan, config: "attention_forward = 1")
    with pytest.raises(CompilerFailed, match="causal for cuda:80"):
        compiler.compile(plan_of("causal", 64), "cuda:80", Config(64, 64, 4, 2))


@pytest.mark.parametrize("target", ["cuda:80", "cuda:86", "cuda:90", "cuda:100", "hip:gfx942", "hip:gfx1100"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_table_fits_shared_memory(target, dtype):
    # float32 rows of 512 do not fit the 64 KiB of AMD chips in any tile: such calls fall back to eager
    widest = () if target.startswith("hip:") and dtype == "float32" else (512,)
    for dim in (8, 64, 128, 256, *widest):
        for name in ("causal", "pair_bias", "causal_document"):
            plan = plan_of(name, dim, dtype)
            for config in candidates(plan, target):
                assert shared_bytes(plan, config) <= shared_limit(target), (dim, name, config)


def test_settling_takes_the_first_tile_without_spills():
    first, second, third = (Config(m, 64, 4, 2) for m in (128, 64, 32))
    configs = (first, second, third)
    assert settle(configs, {first: None, second: 0, third: 0}.get) is second
    assert settle(configs, {first: 8, second: 4, third: 6}.get) is second
    assert settle(configs, {}.get) is None


def sources() -> dict[str, str]:
    return {
        f"{name}_{'d' if descriptors else 'p'}": emit(plan, candidates(plan, "cuda:90", descriptors=descriptors)[0])
        for name in library.names(standard=True)
        for plan in [plan_of(name, 80)]
        for descriptors in (False, True)
    }


def test_sources_are_python_without_unknown_or_unused_names(tmp_path):
    for name, source in sources().items():
        ast.parse(source)
        (tmp_path / f"{name}.py").write_text(source)
    ruff = shutil.which("ruff", path=os.path.dirname(sys.executable)) or shutil.which("ruff")
    if ruff is not None:
        command = [ruff, "check", "--isolated", "--select", "F,E9", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_simple_sources_are_formatted(tmp_path):
    ruff = shutil.which("ruff", path=os.path.dirname(sys.executable)) or shutil.which("ruff")
    if ruff is None:
        return
    for name in ("full", "causal", "causal_alibi", "softcap", "sliding_window", "gemma2_local"):
        for dim in (64, 80):
            plan = plan_of(name, dim)
            for descriptors in (False, True):
                config = candidates(plan, "cuda:90", descriptors=descriptors)[0]
                (tmp_path / f"{name}{dim}{descriptors}.py").write_text(emit(plan, config))
    command = [ruff, "format", "--isolated", "--line-length", "120", "--diff", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_sources_do_not_depend_on_the_process():
    code = "\n".join(
        (
            "from attnlang import library",
            "from attnlang.codegen.plan import make_plan",
            "from attnlang.codegen.triton import Config, emit",
            "p = library.t5_causal",
            "plan = make_plan(p, dtype='float16', head_dim=64, value_dim=64, storage={'table': 'float32'})",
            "print(emit(plan, Config(128, 64, 8, 3)), end='')",
        )
    )
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        outputs.add(
            subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment).stdout
        )
    assert len(outputs) == 1
    assert b"def attention_forward" in outputs.pop()


def test_names_of_the_template_are_reserved():
    for descriptors in (False, True):
        plan = plan_of("full", 80)
        tree = ast.parse(emit(plan, Config(128, 64, 8, 3, descriptors)))
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
            n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)
        }
        capitals = {n for n in used if n.isupper() or n in ("H", "Lq", "Lk", "Hkv")}
        # sizes cannot be names of parameters, and helper functions have names of their own
        inside = {
            "a",
            "b",
            "safe",
            "quotient",
            "low",
            "new_max",
            "shift",
            "weights",
            "rows",
            "columns",
            "tensor",
            "strides",
            "n",
            "s",
        }
        assert used - capitals - inside - {"zip", "list"} <= RESERVED


def test_program_text_cannot_leave_its_comment():
    hostile = ScalarParam("x", INT, 1)
    program = simple('name\n"""\nimport os', mask=op("le", k, op("add", q, param("x", INT))), scalars=(hostile,))
    source = emit(plan_of(program, 64), Config(64, 64, 4, 2))
    assert not [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) and n.names[0].name == "os"]
