"""The examples and the benchmarks run, at small sizes."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def without_compiling() -> Iterator[None]:
    """Peers run eagerly: what is tested is the example, not torch.compile."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/quickstart.py"))
    assert float(capsys.readouterr().out.split()[-1]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_demo_measures_and_checks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], without_compiling: None
) -> None:
    demo = load("examples/demo.py")
    monkeypatch.setattr(demo, "LENGTH", 256)
    monkeypatch.setattr(demo, "HEADS", 4)
    cpu = torch.device("cpu")
    assert demo.measure(dtype, cpu, demo.documents(cpu), torch.tensor([0.5, 0.25, 0.125, 0.0625]))
    out = capsys.readouterr().out
    assert "attnlang is right" in out
    assert "flex_attention" in out


def test_demo_goes_on_where_flex_attention_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = load("examples/demo.py")

    def refuse(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(demo, "with_flex", refuse)
    monkeypatch.setattr(demo, "LENGTH", 128)
    cpu = torch.device("cpu")
    assert demo.measure(torch.float32, cpu, demo.documents(cpu), torch.full((8,), 0.1))
    assert "is left out: no compiler" in capsys.readouterr().out


def test_demo_documents_are_sorted_and_cover_the_row() -> None:
    demo = load("examples/demo.py")
    doc = demo.documents(torch.device("cpu"))
    assert doc.shape == (demo.BATCH, demo.LENGTH)
    assert (doc.diff(dim=1) >= 0).all()
    assert int(doc.max()) == demo.DOCUMENTS - 1


def test_cpu_benchmark_cases_count_their_pairs(monkeypatch: pytest.MonkeyPatch, without_compiling: None) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    common, benchmark = load("benchmarks/common.py"), load("benchmarks/cpu_forward.py")
    import attnlang as al

    for case in benchmark.cases(640, torch.float32):
        attention = al.compile(case.program)
        q = torch.randn(1, 8, 640, 16)
        bound = attention._binder.bind(q, q, q, dict(case.values or {}))
        bindings = common.Bindings(bound.sizes, bound.params, bound.tensors)
        counted = common._pairs(attention, bindings, torch.device("cpu"))
        assert case.pairs in (None, counted), case.name


def test_comparison_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without_compiling: None) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    common = load("benchmarks/common.py")
    import attnlang as al

    case = common.Case("softcap", al.library.softcap, length=64, heads=2, head_dim=16)
    rows = common.compare(case, torch.device("cpu"), rounds=2)
    assert [r.implementation for r in rows] == ["attnlang", "flex_attention", "scaled_dot_product_attention"]
    assert rows[0].ratio == 1.0
    assert rows[1].error is not None and rows[1].error < 2e-5
    assert rows[2].ms is None and "cannot express" in rows[2].note
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    path = common.save("trial", rows, torch.device("cpu"))
    assert '"processor"' in path.read_text()


def test_gpu_benchmark_without_a_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = load("benchmarks/gpu.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 0
    assert "no GPU here" in capsys.readouterr().out
