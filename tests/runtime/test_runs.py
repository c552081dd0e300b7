"""Run maps are remembered exactly as long as nothing they depend on has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnlang.ir import INT, Load, Param, Program, ScalarParam, Size, TensorParam, build, simple
from attnlang.runtime import runs as module
from attnlang.runtime.runs import RunMaps

TILE = (128, 128)
SIZES = {"B": 2, "H": 4, "Hkv": 4, "Lq": 512, "Lk": 512}


def causal() -> Program:
    return simple("causal", mask=build.op("ge", build.q, build.k))


def window() -> Program:
    near = build.op("lt", build.op("sub", build.q, build.k), Param("w", INT))
    unused = build.op("mul", build.s, Param("gain", INT))
    scalars = (ScalarParam("w", INT), ScalarParam("gain", INT))
    return simple("window", mask=near, score=unused, scalars=scalars)


def documents(*, by_batch: bool = False) -> Program:
    index = (build.b,) if by_batch else ()
    shape = (Size("B"), Size("Lk")) if by_batch else (Size("Lk"),)
    same = build.op("eq", Load("doc", (*index, build.q), INT), Load("doc", (*index, build.k), INT))
    return simple("documents", mask=same, tensors=(TensorParam("doc", INT, shape),))


@pytest.fixture
def maps(monkeypatch):
    """A fresh cache whose ``made`` counts the maps that were not remembered."""
    make = module._made
    cache = RunMaps()
    cache.made = 0  # type: ignore[attr-defined]

    def counted(*args: Any):
        cache.made += 1  # type: ignore[attr-defined]
        return make(*args)

    monkeypatch.setattr(module, "_made", counted)
    return cache


def get(maps, program, sizes=SIZES, params=None, tensors=None, tile=TILE):
    return maps.provider(program, sizes, params or {}, tensors or {})(tile)


def test_an_equal_call_is_remembered(maps):
    first = get(maps, causal())
    assert get(maps, causal()) is first
    assert get(maps, causal(), {**SIZES, "B": 7, "H": 9}) is first, "the mask reads neither b nor h"
    assert maps.made == 1


@pytest.mark.parametrize("change", [{"Lq": 500}, {"Lk": 500}])
def test_other_lengths_are_other_maps(maps, change):
    first = get(maps, causal())
    assert get(maps, causal(), {**SIZES, **change}) is not first


def test_other_tiles_are_other_maps(maps):
    assert get(maps, causal()) is not get(maps, causal(), tile=(64, 128))


def test_only_parameters_the_mask_reads_matter(maps):
    first = get(maps, window(), params={"w": 10, "gain": 1})
    assert get(maps, window(), params={"w": 10, "gain": 2}) is first
    assert get(maps, window(), params={"w": 11, "gain": 1}) is not first


def test_the_batch_matters_where_the_mask_reads_it(maps):
    doc = torch.stack([torch.arange(512) // 100, torch.arange(512) // 50])
    first = get(maps, documents(by_batch=True), tensors={"doc": doc})
    other = get(maps, documents(by_batch=True), {**SIZES, "B": 1}, tensors={"doc": doc[:1]})
    assert first.batch == 2 and other.batch == 1


@pytest.mark.parametrize("hashed_bytes", [1 << 20, 0], ids=["by content", "by version"])
@pytest.mark.parametrize(
    "change",
    [
        lambda doc: doc.add_(torch.arange(512)),
        lambda doc: doc[256:].fill_(3),
        lambda doc: doc.view(2, 256)[1].fill_(3),
        lambda doc: doc.copy_(torch.arange(512)),
    ],
)
def test_in_place_changes_are_seen(maps, monkeypatch, hashed_bytes, change):
    monkeypatch.setattr(module, "HASHED_BYTES", hashed_bytes)
    doc = torch.zeros(512, dtype=torch.int64)
    before = get(maps, documents(), tensors={"doc": doc})
    assert get(maps, documents(), tensors={"doc": doc}) is before
    change(doc)
    after = get(maps, documents(), tensors={"doc": doc})
    assert after is not before
    assert before.counts()[0] == 0 and after.counts() != before.counts()


def test_changes_behind_the_back_of_autograd_are_seen_in_small_tensors(maps):
    doc = torch.zeros(512, dtype=torch.int64)
    before = get(maps, documents(), tensors={"doc": doc})
    doc.numpy()[256:] = 5
    assert get(maps, documents(), tensors={"doc": doc}).counts() != before.counts()


def test_equal_contents_are_one_map(maps):
    doc = torch.arange(512) // 100
    strided = torch.stack([doc, doc], 1)[:, 0]
    assert get(maps, documents(), tensors={"doc": doc}) is get(maps, documents(), tensors={"doc": strided})


def test_a_dead_tensor_is_not_mistaken_for_a_new_one(maps, monkeypatch):
    monkeypatch.setattr(module, "HASHED_BYTES", 0)
    for i in range(6):  # the allocator and the interpreter hand the same addresses out again
        doc = torch.full((512,), 0)
        doc.numpy()[:] = torch.arange(512).numpy() // (100 + i)
        found = get(maps, documents(), tensors={"doc": doc})
        fresh = RunMaps().provider(documents(), SIZES, {}, {"doc": doc})(TILE)
        assert found.counts() == fresh.counts()
        del doc


def test_tensors_without_version_are_not_remembered(maps, monkeypatch):
    monkeypatch.setattr(module, "HASHED_BYTES", 0)
    with torch.inference_mode():
        doc = torch.zeros(512, dtype=torch.int64)
        first = get(maps, documents(), tensors={"doc": doc})
        assert get(maps, documents(), tensors={"doc": doc}) is not first


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int32, torch.uint8])
@pytest.mark.parametrize("length", [0, 512])
def test_captured_dtypes_and_empty_tensors(maps, dtype, length):
    sizes = {**SIZES, "Lq": length, "Lk": length}
    flags = torch.zeros(length, dtype=dtype)
    get(maps, documents(), sizes, tensors={"doc": flags})
    get(maps, documents(), sizes, tensors={"doc": flags})
    assert maps.made == 1


@pytest.mark.parametrize("length", [0, 1])
def test_a_tensor_of_one_element_may_have_any_stride(maps, length):
    sizes = {**SIZES, "Lq": length, "Lk": length}
    get(maps, documents(), sizes, tensors={"doc": torch.arange(9)[::4][:length]})
    get(maps, documents(), sizes, tensors={"doc": torch.zeros(length, dtype=torch.int64)})
    assert maps.made == 1


def test_the_least_recently_used_map_goes_first(monkeypatch):
    maps = RunMaps(capacity=2)
    one, two = get(maps, causal(), {**SIZES, "Lq": 1}), get(maps, causal(), {**SIZES, "Lq": 2})
    assert get(maps, causal(), {**SIZES, "Lq": 1}) is one
    get(maps, causal(), {**SIZES, "Lq": 3})
    assert get(maps, causal(), {**SIZES, "Lq": 1}) is one
    assert get(maps, causal(), {**SIZES, "Lq": 2}) is not two
