"""`compile`, `run`, `bench` and `explain`."""

from __future__ import annotations

import ast
import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from .conftest import Invoke, said

SMALL = ("--len", "64", "--batch", "1", "--heads", "2", "--head-dim", "16")


# --- compile


def test_compile_to_cpp(invoke: Invoke, good: Path, tmp_path: Path) -> None:
    out = tmp_path / "kernel.cpp"
    result = invoke("compile", f"{good}:packed", "-o", out)
    assert result.exit_code == 0, result.output
    text = out.read_text()
    assert 'extern "C"' in text
    assert "packed" in text
    assert "wrote" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.attn", "kernel.cpp"]


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_compile_for_gpus_gives_python_that_needs_only_torch_and_triton(
    invoke: Invoke, good: Path, tmp_path: Path, target: str
) -> None:
    out = tmp_path / "kernel.py"
    result = invoke("compile", good, "-o", out, "--target", target, "--head-dim", 128)
    assert result.exit_code == 0, result.output
    tree = ast.parse(out.read_text())
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names <= {"torch", "triton", "math", "typing", "__future__"}


@pytest.mark.parametrize(
    ("target", "suffix", "magic"),
    [("cpu", ".so", None), ("cuda:90", ".cubin", b"\x7fELF"), ("hip:gfx942", ".hsaco", b"\x7fELF")],
)
def test_compile_to_a_binary_without_a_device(
    invoke: Invoke, good: Path, tmp_path: Path, target: str, suffix: str, magic: bytes | None
) -> None:
    result = invoke("compile", f"{good}:packed", "-o", tmp_path / "kernel.src", "--target", target, "--binary")
    assert result.exit_code == 0, result.output
    data = (tmp_path / f"kernel{suffix}").read_bytes()
    assert len(data) > 1000
    assert magic is None or data.startswith(magic)
    assert {p.name for p in tmp_path.iterdir()} == {"good.attn", "kernel.src", f"kernel{suffix}"}


def test_compile_prints_and_is_deterministic(invoke: Invoke, good: Path) -> None:
    first, second = (invoke("compile", good, "-o", "-", "--set", "width=3") for _ in range(2))
    assert first.exit_code == 1, "packed has no width"
    first, second = (invoke("compile", f"{good}:band", "-o", "-", "--set", "width=3") for _ in range(2))
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout
    assert 'extern "C"' in first.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--target", "cuda:banana"], ["cuda:banana"]),
        (["--target", "abacus"], ["abacus"]),
        (["--dtype", "float7"], ["float7", "bfloat16"]),
        (["--set", "nonsense=3"], ["nonsense"]),
        (["--storage", "doc=float32"], ["doc", "int32"]),
        (["--storage", "dok=int32"], ["dok", "doc"]),
        (["--binary"], []),
    ],
)
def test_compile_refuses(invoke: Invoke, good: Path, words: list[str], expected: list[str]) -> None:
    result = invoke("compile", good, "-o", "-", *words)
    assert result.exit_code == 1, result.output
    said(result, *expected)


def test_storage_of_captured_tensors(invoke: Invoke, good: Path) -> None:
    usual, narrow = (invoke("compile", good, "-o", "-", *words).stdout for words in ([], ["--storage", "doc=int32"]))
    assert usual != narrow


def test_compile_keeps_the_old_file_when_it_fails(invoke: Invoke, broken: Path, tmp_path: Path) -> None:
    out = tmp_path / "kernel.cpp"
    out.write_text("precious")
    assert invoke("compile", broken, "-o", out).exit_code == 1
    assert out.read_text() == "precious"
    said(invoke("compile", "causal", "-o", tmp_path / "no" / "kernel.cpp"), "cannot write")
    for program in ("causal", "anchor"):
        said(invoke("compile", program, "-o", "."), ". is a folder; give the name of a file")


def test_compile_onto_a_full_or_locked_disk(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "kernel.cpp"

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    said(invoke("compile", "causal", "-o", out), "cannot write", "No space left")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("tempfile.mkstemp", full)
    assert invoke("compile", "causal", "-o", out).exit_code == 1


# --- run


def test_run_checks_against_the_reference(invoke: Invoke, good: Path) -> None:
    result = invoke("run", good, *SMALL, "--check")
    assert result.exit_code == 0, result.output
    assert "passed" in result.output
    assert "8 sorted segments" in result.output


@pytest.mark.parametrize("dtype", ["float16", "bf16", "float64"])
def test_run_in_other_dtypes(invoke: Invoke, dtype: str) -> None:
    result = invoke("run", "causal", *SMALL, "--dtype", dtype, "--check")
    assert result.exit_code == 0, result.output


def test_run_with_grouped_heads_and_lengths_that_differ(invoke: Invoke) -> None:
    shape = ("--heads", 4, "--kv-heads", 2, "--q-len", 33, "--kv-len", 65, "--head-dim", 16, "--value-dim", 24)
    result = invoke("run", "causal", *shape, "--check", "--backend", "eager")
    assert result.exit_code == 0, result.output
    assert "Hkv = 2, Lq = 33, Lk = 65, D = 16, Dv = 24" in result.output


def test_run_of_empty_lengths(invoke: Invoke) -> None:
    for words in (("--len", 0), ("--kv-len", 0), ("--batch", 0)):
        result = invoke("run", "causal", *SMALL, *words, "--check")
        assert result.exit_code == 0, result.output


def test_a_failed_check_exits_with_1(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    import attnlang.report

    class Wrong(attnlang.report.Agreement):
        @property
        def passed(self) -> bool:
            return False

    monkeypatch.setattr(attnlang.report, "compare", lambda *_: Wrong(1.0, 1.0, 1e-5, 1e-5))
    result = invoke("run", "causal", *SMALL, "--check")
    assert result.exit_code == 1
    assert "FAILED" in result.output


def test_tensors_from_files(invoke: Invoke, good: Path, tmp_path: Path) -> None:
    doc, slope = torch.arange(64).expand(1, 64) // 20, torch.rand(2)
    torch.save({"doc": doc, "slope": slope}, tmp_path / "given.pt")
    np.savez(tmp_path / "given.npz", doc=doc.numpy(), slope=slope.numpy())
    for name in ("given.pt", "given.npz"):
        result = invoke("run", good, *SMALL, "--tensors", tmp_path / name, "--check")
        assert result.exit_code == 0, result.output
        assert "made up" not in result.output
    q = torch.randn(1, 2, 40, 8)
    torch.save({"q": q, "k": q, "v": q}, tmp_path / "qkv.pt")
    result = invoke("run", "causal", "--tensors", tmp_path / "qkv.pt")
    assert "Lq = 40, Lk = 40, D = 8" in result.output


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"doc": torch.zeros(1, 63, dtype=torch.long)}, ["doc", "63"]),
        ({"doc": torch.zeros(1, 64)}, ["doc", "int"]),
        ({"dok": torch.zeros(1, 64)}, ["dok", "doc"]),
        ({"q": torch.zeros(1, 2, 64, 16)}, ["q, k and v together"]),
        ({"q": torch.zeros(3), "k": torch.zeros(3), "v": torch.zeros(3)}, ["4 dimensions"]),
        ([1, 2], ["a list"]),
        ({"doc": "text"}, ["str"]),
    ],
)
def test_tensor_files_that_do_not_fit(
    invoke: Invoke, good: Path, tmp_path: Path, content: object, expected: list[str]
) -> None:
    torch.save(content, tmp_path / "given.pt")
    result = invoke("run", good, *SMALL, "--tensors", tmp_path / "given.pt")
    assert result.exit_code == 1, result.output
    said(result, *expected)


def test_tensor_files_that_are_no_tensor_files(invoke: Invoke, good: Path, tmp_path: Path) -> None:
    for name in ("bad.pt", "bad.npz"):
        (tmp_path / name).write_bytes(b"\x00 this is not a tensor file")
        result = invoke("run", good, *SMALL, "--tensors", tmp_path / name)
        assert result.exit_code == 1
        said(result, "cannot be read as tensors")


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--backend", "abacus"], 1, ["abacus"]),
        (["--device", "banana"], 1, ["banana"]),
        (["--kv-heads", "3"], 1, ["multiple"]),
        (["--dtype", "int8"], 1, ["int8"]),
        (["--head-dim", "0"], 2, []),
    ],
)
def test_run_refuses(invoke: Invoke, words: list[str], code: int, expected: list[str]) -> None:
    result = invoke("run", "causal", *SMALL, *words)
    assert result.exit_code == code, result.output
    said(result, *expected)


def test_what_this_machine_lacks_exits_with_3(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    import attnlang.runtime.dispatch
    from attnlang.runtime import Unavailable

    def missing(_: object) -> None:
        raise Unavailable("no such chip")

    monkeypatch.setattr(attnlang.runtime.dispatch, "_forward", lambda _: missing)
    result = invoke("run", "causal", *SMALL, "--backend", "triton")
    assert result.exit_code == 3
    said(result, "no such chip")


# --- bench and explain


def test_bench_shows_peers_and_goes_on_without_one(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    import attnlang.report

    def refuse(*_: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(attnlang.report, "flex", refuse)
    result = invoke("bench", "causal", *SMALL, "--rounds", 2)
    assert result.exit_code == 0, result.output
    for words in ("attnlang", "flex_attention", "does not run here: no compiler here", "as fast"):
        assert words in result.output
    capped = invoke("bench", "softcap", *SMALL, "--rounds", 2)
    assert "cannot express" in capped.output


def test_explain(invoke: Invoke, good: Path) -> None:
    result = invoke("explain", good, "--len", 512)
    assert result.exit_code == 0, result.output
    assert "doc" in result.output
    said(invoke("explain", good, "--set", "x=1"), "'x'")
