"""Every program of the library against its hand-written dense definition, in float64."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from library.bias_cases import t5_bucket
from library.cases import CALLS, CASES, bind, program_of
from library.studies import STUDIES

import attnlang as al
from attnlang import ir, library


def test_every_program_has_a_case() -> None:
    studied = {study.program for study in STUDIES.values()}
    assert {case.program for case in CASES.values()} | studied == set(library.names())
    assert all(getattr(library, case.program).standard for case in CASES.values())


@pytest.mark.parametrize("name", library.names())
def test_programs_are_documented_and_valid(name: str) -> None:
    program = getattr(library, name)
    assert program.name == name
    assert ir.verify(program) is program
    summary = program.doc.partition("\n\n")[0]
    assert re.search(r"\b(19|20)\d\d\b", program.doc), "the docstring names no paper and year"
    reserved = {"scale", "backend", "return_lse", *vars(al.Attention)}
    assert not reserved & {p.name for p in (*program.scalars, *program.tensors)}, "hidden by an argument of the call"
    assert summary.rstrip().endswith(".") and len(summary) > 30


@pytest.mark.parametrize("name, size", CALLS)
def test_instances_fit_the_program(name: str, size: str) -> None:
    instance = CASES[name].instance(size)
    program = program_of(instance)
    assert set(instance.captured) == {t.name for t in program.tensors}
    assert set(instance.params) <= {p.name for p in program.scalars}
    assert {p.name for p in program.scalars if p.default is None} <= set(instance.params)
    kinds = {ir.FLOAT: torch.float32, ir.INT: torch.int32, ir.BOOL: torch.bool}
    for tensor in program.tensors:
        assert instance.captured[tensor.name].dtype is kinds[tensor.type], tensor.name


@pytest.mark.parametrize("name, size", CALLS)
def test_mask_is_the_dense_one(name: str, size: str) -> None:
    instance = CASES[name].instance(size)
    program = program_of(instance)
    sizes, params = bind(program, instance)
    ours = ir.dense_mask(program, sizes, params, instance.captured)
    want = instance.dense_mask()
    wrong = (ours != want).nonzero()
    assert not len(wrong), f"{len(wrong)} pairs differ, the first at b, h, q, k = {wrong[0].tolist()}"
    share = want.double().mean().item()
    assert instance.case.mask is None or 0.0 < share < 1.0, "this case hides nothing or everything"


@pytest.mark.parametrize("name, size", CALLS)
def test_attention_is_the_dense_one(name: str, size: str) -> None:
    instance = CASES[name].instance(size)
    program = program_of(instance)
    sizes, params = bind(program, instance)
    q, k, v = instance.operands(d=8, dv=6)
    out, lse = ir.reference_attention(program, q, k, v, sizes, params, instance.captured, 8**-0.5)
    want_out, want_lse = instance.dense_attention(q, k, v)
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [0, 1, 7, 65])
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.resizable])
def test_other_lengths(name: str, length: int) -> None:
    instance = CASES[name].at(length)
    program = program_of(instance)
    sizes, params = bind(program, instance)
    assert torch.equal(ir.dense_mask(program, sizes, params, instance.captured), instance.dense_mask())
    q, k, v = instance.operands(d=4)
    got = ir.reference_attention(program, q, k, v, sizes, params, instance.captured, 0.5)
    for ours, want in zip(got, instance.dense_attention(q, k, v), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "buckets, farthest", [(32, 128), (16, 64), (64, 256), (32, 512), (32, 2048), (32, 20), (8, 100)]
)
def test_t5_buckets_at_long_distances(buckets: int, farthest: int) -> None:
    """The buckets are those that float32 logarithms give in the released models, at every distance."""
    table = torch.arange(buckets, dtype=torch.float32).view(-1, 1)
    n = torch.arange(3000)
    zero = torch.zeros(1, dtype=torch.int64)
    for program, bidirectional, q, k in (
        (library.t5_causal, False, n, zero),
        (library.t5_bidirectional, True, n, zero),
        (library.t5_bidirectional, True, zero, n),
    ):
        environment = ir.Environment(
            {"q": q, "k": k, "h": zero},
            {"N": buckets, "H": 1},
            {"max_distance": farthest},
            {"table": table},
            {"s": torch.zeros(len(n))},
        )
        assert torch.equal(
            ir.evaluate(program.score, environment).long(), t5_bucket(k - q, bidirectional, buckets, farthest)
        )


def test_sliding_windows_compose_and_nest() -> None:
    """Gemma 2's local layers see ``window`` keys with the query's own; the generic window is one key wider."""
    sizes = {"B": 1, "H": 1, "Hkv": 1, "Lq": 40, "Lk": 40}
    gemma = ir.dense_mask(library.gemma2_local, sizes, {"window": 8, "cap": 50.0})
    generic = ir.dense_mask(library.causal_sliding_window, sizes, {"window": 7})
    assert torch.equal(gemma, generic)
    assert gemma[0, 0, -1].sum() == 8


def test_every_neighborhood_has_the_same_number_of_keys() -> None:
    sizes = {"B": 1, "H": 1, "Hkv": 1, "Lq": 15 * 17, "Lk": 15 * 17}
    mask = ir.dense_mask(library.neighborhood_2d, sizes, {"height": 15, "width": 17, "window": 7})
    assert (mask.sum(-1) == 49).all()


def test_names_and_dir_list_the_same_programs() -> None:
    assert set(library.names()) <= set(dir(library))
    assert list(library.names()) == sorted(library.names())
    assert library.causal is library.causal


def test_names_are_unique_over_files() -> None:
    headers = [
        name
        for file in library.path("causal").parent.glob("*.attn")
        for name in re.findall(r"^pattern\s+(\w+)", file.read_text(), re.MULTILINE)
    ]
    assert sorted(headers) == list(library.names())


def test_unknown_program_suggests_near_names() -> None:
    with pytest.raises(AttributeError, match=r"no program 'slidng_window'; did you mean sliding_window"):
        _ = library.slidng_window
    with pytest.raises(AttributeError, match=r"names\(\) lists all"):
        _ = library.zzzzzz
    assert not hasattr(library, "__wrapped__")


def test_import_reads_nothing() -> None:
    """Neither the import nor the list of names loads the language."""
    code = (
        "import sys, attnlang.library as library; library.names(); dir(library);"
        "assert not [m for m in sys.modules if m.startswith(('lark', 'attnlang.grammar'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
