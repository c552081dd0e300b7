"""Which backend serves a call, and what happens where one cannot."""

from __future__ import annotations

import warnings

import programs
import pytest
import torch

import attnlang as al
from attnlang.runtime import Unavailable, dispatch, eager


@pytest.fixture
def used(monkeypatch):
    """Record the backends that run; those named in ``broken`` are unavailable."""
    record: list[str] = []
    record_broken: set[str] = set()

    def find(name: str):
        def run(call):
            record.append(name)
            if name in record_broken:
                raise Unavailable("no compiler was found")
            return eager.forward(call)

        return run

    monkeypatch.setattr(dispatch, "_forward", find)
    dispatch._warn_once.cache_clear()
    return record, record_broken


def run(**kwargs):
    q, k, v = programs.operands(1, 1, 1, 5, 5, dtype=kwargs.pop("dtype", torch.float32))
    return al.compile(programs.causal(), **kwargs)(q, k, v)


def test_cpu_tensors_go_to_cpp(used):
    run()
    assert used[0] == ["cpp"]


def test_a_named_backend_wins(used):
    run(backend="triton")
    q, k, v = programs.operands(1, 1, 1, 5, 5)
    al.compile(programs.causal(), backend="triton")(q, k, v, backend="eager")
    assert used[0] == ["triton", "eager"]


def test_double_precision_goes_to_eager_without_a_word(used):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(dtype=torch.float64).dtype is torch.float64
    assert used[0] == ["eager"]


def test_other_devices_go_to_eager(used):
    q, k, v = (t.to("meta") for t in programs.operands(1, 1, 1, 5, 5))
    dispatch.attend  # noqa: B018
    call = al.compile(programs.causal())._call(al.compile(programs.causal())._binder.bind(q, k, v, {}))
    assert dispatch._choose(call) == "eager"


def test_an_unavailable_backend_falls_back_and_says_so_once(used):
    record, broken = used
    broken.add("cpp")
    with pytest.warns(RuntimeWarning, match="cpp backend cannot run this call: no compiler was found") as caught:
        first, second = run(), run()
    assert len(caught) == 1
    assert record == ["cpp", "eager", "cpp", "eager"]
    assert first.shape == second.shape


def test_an_unavailable_backend_that_was_named_is_an_error(used):
    used[1].add("cpp")
    with pytest.raises(Unavailable, match="no compiler was found"):
        run(backend="cpp")
    q, k, v = programs.operands(1, 1, 1, 5, 5)
    with pytest.raises(Unavailable, match="no compiler was found"):
        al.compile(programs.causal())(q, k, v, backend="cpp")


@pytest.mark.parametrize("name", ["ccp", "CPP", "cuda", ""])
def test_unknown_backends(name):
    with pytest.raises(al.UsageError, match=f"unknown backend '{name}'"):
        al.compile(programs.causal(), backend=name)
    q, k, v = programs.operands(1, 1, 1, 5, 5)
    with pytest.raises(al.UsageError, match=f"unknown backend '{name}'"):
        al.compile(programs.causal())(q, k, v, backend=name)


def test_a_missing_package_makes_a_backend_unavailable(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(dispatch.importlib, "import_module", absent)
    with pytest.raises(Unavailable, match="triton is not installed"):
        dispatch._forward.__wrapped__("triton")


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("backend", [None, "cpp", "eager"])
def test_vmap_is_a_call_for_each_element(backend):
    q, k, v = (torch.randn(3, 1, 2, 20, 8) for _ in range(3))
    attention = al.compile(programs.causal(), backend=backend)
    got = torch.vmap(attention, in_dims=(0, None, 0))(q, k[0], v)
    want = torch.stack([attention(q[i], k[0], v[i]) for i in range(3)])
    assert torch.equal(got, want)
