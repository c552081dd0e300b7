"""README.md is true: its examples run and its picture is what the command prints."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
import torch

import attnlang as al

from .conftest import Invoke

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [textwrap.dedent(b) for b in re.findall(rf"^ *```{language}\n(.*?)^ *```$", TEXT, re.M | re.S)]


def test_python_and_attn_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in blocks("attn"):
        name = re.search(r"pattern (\w+)", text)
        assert name is not None
        (tmp_path / f"{name.group(1)}.attn").write_text(text)
    space: dict[str, object] = {}
    results = []
    for text in blocks("python"):
        (tmp_path / "example.py").write_text(text)
        exec(compile(text, str(tmp_path / "example.py"), "exec"), space)
        results.append(space["out"])
    assert len(results) == 8
    torch.testing.assert_close(space["same"], results[0])
    assert all(isinstance(r, torch.Tensor) and r.isfinite().all() for r in results)


def test_picture_is_what_the_command_prints(invoke: Invoke) -> None:
    command = re.search(r"`attnlang (show streaming_llm[^`]*)`", TEXT)
    assert command is not None
    printed = invoke(*command.group(1).split()).stdout
    assert printed in TEXT


def test_tutorial_commands_work(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.attn").write_text(next(b for b in blocks("attn") if "pattern mine" in b))
    commands = re.findall(r"^ *\$ attnlang (.*mine.*)$", TEXT, re.M)
    assert len(commands) == 5
    for command in commands:
        words = command.replace("--len 2048", "--len 256").split()
        result = invoke(*words)
        assert result.exit_code == 0, result.output
    checked = invoke("check", "mine.attn").output
    assert textwrap.indent(checked.strip(), "   ") in TEXT


def test_every_named_file_exists() -> None:
    for path in re.findall(r"`((?:attnlang|codegen|grammar|runtime|tests|benchmarks|docs)/[\w/]+\.\w+)`", TEXT):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((docs/[^)#]+)[^)]*\)", TEXT):  # a link may name a section
        assert (ROOT / path).exists(), path


def test_report_writes_the_measured_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks/report.py")
    assert spec is not None and spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    (tmp_path / "docs").mkdir()
    for page in ("docs/sparsity.md", "docs/measurements.md"):
        (tmp_path / page).write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    common = {"case": "causal", "dtype": "float32", "error": 0.0, "note": ""}
    rows = [
        {**common, "implementation": "attnlang", "ms": 10.0, "gflops": 300.0, "ratio": 1.0},
        {**common, "implementation": "flex_attention", "ms": 25.0, "gflops": 120.0, "ratio": 2.5},
        {**common, "implementation": "sdpa", "ms": None, "gflops": None, "ratio": None, "note": "cannot express it"},
    ]
    (tmp_path / "results/cpu_forward.json").write_text(json.dumps({"machine": {"threads": "2"}, "rows": rows}))
    (tmp_path / "results/other.json").write_text(json.dumps({"machine": "m", "rows": [{"length": 4, "peak": 1.5}]}))
    long = {"length": 4096, "seconds": 0.5, "peak_mb": 200.4, "tensors_mb": 4.0}
    (tmp_path / "results/memory.json").write_text(json.dumps({"machine": "m", "rows": [long]}))
    step = {
        "table": "peers",
        "case": "causal, N = 4096, D = 64",
        "attnlang_ms": 10.0,
        "peer": "SDPA",
        "peer_ms": 12.0,
        "ratio": 1.2,
    }
    table = {"table": "captured", "case": "slopes", "without_ms": 10.0, "with_ms": 11.0, "added_percent": 10.0}
    (tmp_path / "results/cpu_backward.json").write_text(json.dumps({"machine": "m", "rows": [step, table]}))
    kernel = {"program": "causal", "target": "cuda:90", "head_dim": 64, "shared_bytes": 1024}
    built = [{**kernel, "registers": 168, "spill_bytes": 0}]
    built.append({**kernel, "program": "alibi", "registers": 255, "spill_bytes": 8})
    failed = {**kernel, "target": "cuda:80", "error": "no"}
    (tmp_path / "results/gpu_resources.json").write_text(json.dumps([*built, failed]))
    moved = {"table": "forward", "case": "7 x 7", "layout": "patches of 8 x 1", "ms_before": 30.0, "ms_after": 10.0}
    moved |= {"efficiency_before": 0.1, "efficiency_after": 0.4, "ratio": 3.0}
    at_million = {
        "table": "million",
        "case": "criss_cross on 1024 x 1024",
        "layout": "plain",
        "gain": 4.0,
        "runs": 1234,
        "analysis_ms": 5.0,
    }
    (tmp_path / "results/layouts.json").write_text(json.dumps({"machine": {}, "rows": [moved, at_million]}))
    tile = {"table": "million", "case": "causal", "implementation": "attnlang", "length": 1 << 20, "ms": 2.5}
    million = {**tile, "mib": 1.0, "runs": 16384}
    peer = {**million, "table": "peers", "length": 4096, "implementation": "create_block_mask", "ms": 50.0}
    asked = {**million, "implementation": "drop-in", "ms": 3.25}
    program = {**million, "table": "library", "case": "axial", "empty": 75, "partial": 24, "full": 1}
    rows = [million, asked, program, peer]
    (tmp_path / "results/sparsity.json").write_text(json.dumps({"machine": {}, "rows": rows}))
    proved = {
        "case": "causal",
        "tile": 64,
        "empty": 1000,
        "full": 1000,
        "proved": 1999,
        "share": 0.9995,
        "reason": "why",
    }
    (tmp_path / "results/sparsity_precision.json").write_text(json.dumps({"machine": {}, "rows": [proved]}))
    assert report.main() == 0
    short = (tmp_path / "README.md").read_text()
    assert "| causal, float32 | 10.0 (300 GFLOP/s) | 25.0 (2.5x) | cannot express it |" in short
    assert "| causal, N = 4096, D = 64 | 10 | SDPA: 12 (1.2x) |" in short and "slopes" not in short
    text = (tmp_path / "docs/measurements.md").read_text()
    programs = len(al.library.names(standard=True))
    assert "| causal, float32 | 10.0 (300 GFLOP/s) | 25.0 (2.5x) | cannot express it |" in text
    assert "| 4 | 1.5 |" in text
    assert "| 4,096 | 0.50 | 200 | 4 |" in text
    assert "| causal, N = 4096, D = 64 | 10 | SDPA: 12 (1.2x) |" in text and "| slopes | 10 | 11 (+10 %) |" in text
    assert f"| cuda:90, D = 64 | 2 of {programs} | 255 | 1 | 8 | 1024 |" in text
    assert f"| cuda:80, D = 64 | 0 of {programs} | 0 | 0 | 0 | 0 |" in text
    assert "| causal | 2.5 | 1.0 | 3.2 | 1.0 | 16,384 |" in text and "axial" not in text
    assert "| 64 | 1 | 2,000 | 1,999 | 99.95% |" in text
    assert "* `causal`, 64: 99.95%; why" in text
    details = (tmp_path / "docs/sparsity.md").read_text()
    assert "| `axial` | 1,048,576 | 2.5 | 1.0 | 16,384 | 24.00% | 1.00% |" in details and "old" not in details
    assert "| 7 x 7 | patches of 8 x 1 | 0.10 | 0.40 | 30.0 | 10.0 (3.0x) |" in text
    assert "| criss_cross on 1024 x 1024 | plain | 4.0x | 1,234 | 5 |" in text
    assert "| causal, 4,096 tokens | 50.0 ms, 1 MiB |" in text
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "old" not in text
