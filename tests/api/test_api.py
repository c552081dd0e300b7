"""The public functions: programs in, callables out, errors for people."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch

import attnlang as al

WINDOW = """
pattern near(window: int = 50):
    mask = abs(q - k) <= window

pattern biased(slope: float[H], window: int):
    mask = q - k <= window and q >= k
    score = s + slope[h] * (k - q)
"""


def operands(length: int = 200, heads: int = 4):
    return tuple(torch.randn(2, heads, length, 16) for _ in range(3))


def close(got, want, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance)


def test_everything_public_is_there():
    for name in al.__all__:
        assert getattr(al, name) is not None
        assert name in dir(al)
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        al.flash  # noqa: B018


def test_from_python_to_output():
    doc = torch.arange(200) // 60
    program = al.program(mask=lambda b, h, q, k: (q >= k) & (doc[q] == doc[k]), score=lambda s, b, h, q, k: s - q + k)
    attention = al.compile(program)
    q, k, v = operands()
    out, lse = attention(q, k, v, return_lse=True)
    want, want_lse = al.reference(program, q, k, v, return_lse=True)
    close(out, want)
    close(lse, want_lse)
    assert out.dtype is torch.float32 and want.dtype is torch.float64


def test_from_text_to_output(tmp_path):
    q, k, v = operands()
    near = al.compile(al.parse(WINDOW, "near"))
    close(near(q, k, v), al.reference(al.parse(WINDOW, "near"), q, k, v))
    close(near(q, k, v, window=3), al.reference(al.program(mask=lambda b, h, q, k: (q - k).abs() <= 3), q, k, v))
    path = tmp_path / "window.attn"
    path.write_text(WINDOW)
    given = {"slope": torch.randn(4), "window": 20}
    last = al.load(path)
    assert last.name == "biased"
    close(al.compile(last)(q, k, v, **given), al.reference(last, q, k, v, **given))


def test_from_the_library():
    q, k, v = operands()
    close(al.compile(al.library.causal)(q, k, v), al.reference(al.library.causal, q, k, v))


def test_captured_values_can_be_replaced():
    doc = torch.zeros(200, dtype=torch.int64)
    attention = al.compile(al.program(mask=lambda b, h, q, k: doc[q] == doc[k]))
    q, k, v = operands()
    other = torch.arange(200) // 7
    close(attention(q, k, v), al.reference(al.program(), q, k, v))
    close(
        attention(q, k, v, doc=other), al.reference(al.program(mask=lambda b, h, q, k: other[q] == other[k]), q, k, v)
    )
    doc.copy_(other)
    close(attention(q, k, v), attention(q, k, v, doc=other))


def test_static_parameters():
    program = al.parse(WINDOW, "near")
    fixed = al.compile(program, window=5)
    q, k, v = operands()
    close(fixed(q, k, v), al.compile(program)(q, k, v, window=5))
    assert "window" not in fixed.source()
    with pytest.raises(al.UsageError, match="no parameter 'window'"):
        fixed(q, k, v, window=6)


@pytest.mark.parametrize(
    ("static", "message"),
    [
        ({"windo": 5}, "near has no parameter 'windo'; did you mean 'window'"),
        ({"window": 2.5}, "must be an int, got float 2.5"),
    ],
)
def test_wrong_static_parameters(static, message):
    with pytest.raises(al.UsageError, match=message):
        al.compile(al.parse(WINDOW, "near"), **static)


def test_a_tensor_is_not_a_static_parameter():
    with pytest.raises(al.UsageError, match="'slope' is a captured tensor of biased; pass it to the call"):
        al.compile(al.parse(WINDOW, "biased"), slope=1.0)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ("causal", "expected a program, got str"),
        (lambda b, h, q, k: q >= k, "got function; trace Python functions with attnlang.program"),
        (None, "expected a program, got NoneType"),
    ],
)
def test_what_is_no_program(thing, message):
    with pytest.raises(al.UsageError, match=message):
        al.compile(thing)


def test_repr_shows_the_program():
    text = repr(al.compile(al.parse(WINDOW, "near"), backend="eager"))
    assert text.startswith("Attention(") and "backend='eager'" in text
    assert "pattern near(window: int = 50):" in text and "mask = abs(q - k) <= window" in text


@pytest.mark.parametrize("target", ["cpu", "cpu:generic", "cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_source(target):
    attention = al.compile(al.parse(WINDOW, "biased"))
    text = attention.source(target, head_dim=64, value_dim=32, dtype="bfloat16")
    assert text == attention.source(target, head_dim=64, value_dim=32, dtype="bfloat16")
    assert "slope" in text and "window" in text and "q - k <= window" in text
    if target.partition(":")[0] in ("cuda", "hip"):
        compile(text, "kernel.py", "exec")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target": "cuda90"}, "unknown target 'cuda90'; did you mean 'cuda:90'"),
        ({"target": "tpu"}, "unknown target 'tpu'"),
        ({"target": None}, "unknown target None"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"head_dim": 0}, "head_dim must be an int from 1 to 512, got 0"),
        ({"value_dim": 513}, "value_dim must be an int from 1 to 512, got 513"),
        ({"head_dim": 64.0}, "head_dim must be an int"),
    ],
)
def test_wrong_sources(kwargs, message):
    with pytest.raises(al.UsageError, match=message):
        al.compile(al.library.causal).source(**kwargs)


def test_run_map_and_explain():
    attention = al.compile(al.parse(WINDOW, "near"))
    run_map = attention.run_map(1, 1, 1024, 1024, tile=(128, 128), window=200)
    assert run_map.counts()[0] > 0
    assert attention.run_map(1, 1, 1024, 1024, window=200) is run_map
    assert str(attention.explain(1024, 1024, window=200))
    with pytest.raises(al.UsageError, match="Lq must not be negative, got -5"):
        attention.explain(-5, 10)


def test_one_kernel_for_all_lengths_and_values(monkeypatch):
    from attnlang.runtime import cpp_common

    built = []
    build = cpp_common._built
    monkeypatch.setattr(cpp_common, "_built", lambda *args: built.append(args) or build(*args))
    attention = al.compile(al.program(mask=lambda b, h, q, k: q - k < 17))
    for length, heads in ((100, 1), (300, 4), (1000, 2)):
        attention(*operands(length, heads))
    assert len(built) == 1


def test_threads_share_an_attention():
    attention = al.compile(al.library.causal)
    inputs = [operands(100 + 10 * i) for i in range(6)]
    want = [attention(*x) for x in inputs]
    got: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        for _ in range(5):
            got[i] = attention(*inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, w in enumerate(want):
        assert torch.equal(got[i], w)


def test_operands_are_not_kept_alive():
    attention = al.compile(al.library.causal)
    q, k, v = operands()
    q.requires_grad_()
    out = attention(q, k, v)
    alive = weakref.ref(k)
    del k, v, q, out
    gc.collect()
    assert alive() is None


def test_no_compiler_falls_back_and_says_so_once(tmp_path):
    code = """
import os, warnings, torch, attnlang as al
q, k, v = (torch.randn(1, 2, 50, 16) for _ in range(3))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    causal = al.compile(al.library.causal)
    outs = [causal(q, k, v) for _ in range(3)]
assert (outs[0] - al.reference(al.library.causal, q, k, v)).abs().max() < 1e-5
ours = [w for w in caught if "eager" in str(w.message)]
assert len(ours) == 1, [str(w.message) for w in caught]
print(ours[0].message)
"""
    environment = {
        "PATH": str(tmp_path),
        "ATTNLANG_CACHE_DIR": str(tmp_path / "cache"),
        "CXX": "",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "compiler" in done.stdout


@pytest.mark.parametrize("state", ["file", "damaged"])
def test_a_bad_cache_directory_costs_time_and_not_correctness(tmp_path, state):
    cache = tmp_path / "cache"
    code = """
import torch, attnlang as al
q, k, v = (torch.randn(1, 2, 50, 16) for _ in range(3))
assert (al.compile(al.library.causal)(q, k, v) - al.reference(al.library.causal, q, k, v)).abs().max() < 1e-5
"""

    def run() -> str:
        environment = {**os.environ, "ATTNLANG_CACHE_DIR": str(cache)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    if state == "file":
        cache.write_text("")
        assert "cannot be used" in run()
        return
    run()
    for path in cache.rglob("*"):
        if path.is_file() and path.suffix == ".so":
            path.write_bytes(path.read_bytes()[:100])
    run()
    assert all(p.stat().st_size > 1000 for p in cache.rglob("*.so"))


def test_an_attention_can_be_copied_and_pickled():
    attention = al.compile(al.parse(WINDOW, "near"), backend="eager")
    q, k, v = operands()
    want = attention(q, k, v)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(other(q, k, v), want)


def test_reference_reports_the_same_errors():
    q, k, v = operands()
    with pytest.raises(al.UsageError, match="needs tensor 'slope'"):
        al.reference(al.parse(WINDOW, "biased"), q, k, v, window=3)
    with pytest.raises(al.UsageError, match="must have 4 dimensions"):
        al.reference(al.library.causal, q[0], k, v)


def test_every_error_is_an_attnlang_error_and_a_value_error():
    for kind in (al.UsageError, al.ProgramError):
        assert issubclass(kind, al.AttnlangError) and issubclass(kind, ValueError)
    assert issubclass(al.Unavailable, al.AttnlangError)
