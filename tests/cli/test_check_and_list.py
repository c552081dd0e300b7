"""`check`, `list`, help, and how commands fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Invoke, said


def test_check_names_every_pattern_of_a_file(invoke: Invoke, good: Path) -> None:
    result = invoke("check", good)
    assert result.exit_code == 0, result.output
    assert "band(width: int = 16)" in result.output
    assert "packed(doc: int[B, Lk], slope: float[H])" in result.output


def test_check_of_one_pattern_and_of_a_library_program(invoke: Invoke, good: Path) -> None:
    result = invoke("check", f"{good}:band", "causal", "library:document")
    assert result.exit_code == 0, result.output
    assert result.output.count("ok ") == 3
    assert "packed" not in result.output


def test_check_points_at_the_mistake(invoke: Invoke, broken: Path, good: Path) -> None:
    result = invoke("check", broken, good)
    assert result.exit_code == 1
    said(result, "broken.attn:3:26", "widht", "^^^^^", "width")
    assert "packed" in result.output, "the other files are still checked"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x00\xff\xfe\x01" * 100, "UTF-8"),
        (b"", "no pattern"),
        (b"pattern", "error"),
        (b"def f(x: int) = x\n", "no pattern"),
    ],
)
def test_check_of_files_that_are_no_programs(invoke: Invoke, tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "odd.attn"
    path.write_bytes(content)
    result = invoke("check", path)
    assert result.exit_code == 1
    said(result, words)


def test_missing_file_suggests_its_neighbours(invoke: Invoke, good: Path) -> None:
    result = invoke("check", good.with_name("goood.attn"))
    assert result.exit_code == 1
    said(result, "there is no file", "did you mean good.attn")


def test_unknown_names_suggest_near_ones(invoke: Invoke, good: Path) -> None:
    said(invoke("check", "casual"), "casual", "causal")
    result = invoke("show", f"{good}:bnad")
    assert result.exit_code == 1
    said(result, "bnad", "band")
    assert invoke("check", good.parent).exit_code == 1
    assert invoke("check", f"{good}:").exit_code == 1


def test_list_shows_documentation_and_filters(invoke: Invoke) -> None:
    result = invoke("list")
    assert result.exit_code == 0
    for name in ("causal", "sliding_window", "causal_document", "alibi", "neighborhood_2d"):
        assert name in result.output
    few = invoke("list", "longformer")
    assert few.exit_code == 0
    assert "longformer" in few.output
    assert "transfusion" not in few.output
    none = invoke("list", "xyzzy")
    assert none.exit_code == 1


def test_every_command_has_help_with_an_example(invoke: Invoke) -> None:
    from attnlang.cli import app

    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        result = invoke(name, "--help")
        assert result.exit_code == 0
        assert "Example" in result.output, name


def test_wrong_command_lines_exit_with_2(invoke: Invoke) -> None:
    assert invoke("nonsense").exit_code == 2
    assert invoke("show").exit_code == 2
    assert invoke("show", "causal", "--len", "-5").exit_code == 2
    assert invoke("show", "causal", "--at", "7,99").exit_code == 2
    assert invoke("show", "causal", "--at", "x").exit_code == 2


def test_version(invoke: Invoke) -> None:
    import attnlang

    assert invoke("--version").output.strip() == f"attnlang {attnlang.__version__}"


def test_a_defect_is_reported_as_one(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    import attnlang.cli_work

    def fail(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(attnlang.cli_work, "draw", fail)
    result = invoke("show", "causal")
    assert result.exit_code == 70
    said(result, "a defect, not your mistake", "surprise", "ATTNLANG_DEBUG=1")


def test_out_of_memory_is_a_message(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    import attnlang.cli_work

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(attnlang.cli_work, "draw", fail)
    result = invoke("show", "causal")
    assert result.exit_code == 1
    said(result, "not enough memory")


# --- real processes


def process(*words: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "attnlang.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_help_does_not_load_torch() -> None:
    code = "import sys, attnlang.cli; print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_process_fails_with_a_message_on_stderr(broken: Path) -> None:
    done = process("check", str(broken))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error[" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(good: Path) -> None:
    command = f"'{sys.executable}' -m attnlang.cli compile causal -o - | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "0", done.stderr
