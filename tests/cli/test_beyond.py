"""Commands on programs that are more than a mask and a score: they work, or say in a sentence why not."""

import subprocess

import pytest

from attnlang.codegen.isa import COMMON_FLAGS
from attnlang.runtime.source import isa_for
from attnlang.runtime.toolchain import find_compiler

TEXT = """
pattern watched(gate: float[H]):
    mask = k <= q
    weights = w * gate[h]
    output received = sum(w, over=q)
pattern routed:
    pool means = mean(K, block=16)
    attend like:
        lengths = (Lq, cdiv(Lk, 16))
        keys = means
        output liking = s
    select chosen[Lq, cdiv(Lk, 16)] = top(liking[b, h, q, k], 2, candidates=k * 16 <= q)
    mask = chosen[b, h, q, k // 16] and k <= q
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "beyond.attn"
    path.write_text(TEXT)
    return path


def test_check_names_the_patterns(invoke, file):
    found = invoke("check", file)
    assert found.exit_code == 0 and "watched(gate: float[H])" in found.output and "routed()" in found.output


def test_run_shows_and_checks_every_result(invoke, file):
    found = invoke("run", f"{file}:watched", "--len", 32, "--heads", 2, "--backend", "eager", "--check")
    assert found.exit_code == 0, found.output
    assert "received" in found.output and "passed" in found.output


def test_what_only_a_call_knows_is_refused(invoke, file):
    for command in ("show", "bench"):
        found = invoke(command, file, "--len", 32)
        assert found.exit_code != 0 and "routed" in found.output + found.stderr
    assert "a stage of it makes" in invoke("show", file, "--len", 32).stderr


def test_compile_writes_the_kernels_of_all_parts(invoke, tmp_path):
    text = tmp_path / "two.attn"
    text.write_text("""pattern two(size: int = 4):
    attend near: mask = abs(q - k) < size
    attend far:
        mask = q - k >= size
        normalize = elementwise(sigmoid(s))
    rows o[Lq, Dv] = near[b, h, q, d] + far[b, h, q, d]
""")
    found = invoke("compile", text, "-o", tmp_path / "kernel.cpp", "--head-dim", 16)
    assert found.exit_code == 0, found.stderr
    files = sorted(tmp_path.glob("kernel*"))
    assert [file.name for file in files] == ["kernel_far.cpp", "kernel_near.cpp"]
    for written in files:
        words = [*find_compiler().command, *COMMON_FLAGS, *isa_for("cpu").flags, "-fsyntax-only", written]
        assert subprocess.run(words, capture_output=True, check=False).returncode == 0
    assert "far" in found.stderr and "near" in found.stderr
    assert "for programs of one kernel" in invoke("compile", text, "-o", tmp_path / "k.cpp", "--binary").stderr
    assert invoke("compile", text, "-o", "-").stdout.count('extern "C"') >= 2
