"""Errors name the user's line and say what to write instead."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from attnlang import ir
from attnlang.tracing import TraceError, trace


def line_of(marker: str) -> int:
    """Return the line of this file that ends in the comment ``# marker``."""
    with open(__file__, encoding="utf-8") as file:
        (found,) = [n for n, text in enumerate(file, 1) if text.rstrip().endswith(f"# {marker}")]
    return found


def branch(b: Any, h: Any, q: Any, k: Any) -> Any:
    if q >= k:  # branch
        return k > 2
    return k > 3


def both(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k and k > 2  # both


def chained(b: Any, h: Any, q: Any, k: Any) -> Any:
    return 0 <= q - k < 3  # chained


def loop(b: Any, h: Any, q: Any, k: Any) -> Any:
    while k > q:  # loop
        k = k - 1
    return k == q


def asserts(b: Any, h: Any, q: Any, k: Any) -> Any:
    assert q > 0  # asserts
    return q >= k


def item(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q.item() >= k  # item


def as_int(b: Any, h: Any, q: Any, k: Any) -> Any:
    return int(q) >= k  # as_int


def counts(b: Any, h: Any, q: Any, k: Any) -> Any:
    for _ in range(q):  # counts
        pass
    return q >= k


TABLE = [1, 2, 3]


def lists(b: Any, h: Any, q: Any, k: Any) -> Any:
    return TABLE[q] >= k  # lists


def formats(b: Any, h: Any, q: Any, k: Any) -> Any:
    return len(f"{q}") >= k  # formats


def raises(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= undefined_name  # type: ignore[name-defined]  # noqa: F821  # raises


def too_few(b: Any, h: Any, q: Any) -> Any:  # too_few
    return q >= b


def nothing(b: Any, h: Any, q: Any, k: Any) -> Any:  # nothing
    q >= k  # noqa: B015


def not_bool(b: Any, h: Any, q: Any, k: Any) -> Any:  # not_bool
    return q - k


def not_scalar(b: Any, h: Any, q: Any, k: Any) -> Any:  # not_scalar
    return torch.ones(3)[None, k] > torch.zeros(3)


def unknown(b: Any, h: Any, q: Any, k: Any) -> Any:
    return torch.special.bessel_j0(q) > 0  # unknown


COMPLEX = torch.zeros(8, dtype=torch.complex64)
BIG = torch.zeros(8, 300)
BOOLS = torch.zeros(8, dtype=torch.bool)


def complex_(b: Any, h: Any, q: Any, k: Any) -> Any:
    return COMPLEX[q].real > 0  # complex


def long_sum(b: Any, h: Any, q: Any, k: Any) -> Any:
    return BIG[q].sum() > 0  # long_sum


def many_indices(b: Any, h: Any, q: Any, k: Any) -> Any:
    return BIG[b, h, q] > 0  # many_indices


def out_of_range(b: Any, h: Any, q: Any, k: Any) -> Any:
    return BIG[q, 300] > 0  # out_of_range


def bool_index(b: Any, h: Any, q: Any, k: Any) -> Any:
    return BIG[q > 2].any()  # bool_index


def float_index(b: Any, h: Any, q: Any, k: Any) -> Any:
    return BOOLS[q / 2]  # float_index


def assigns(b: Any, h: Any, q: Any, k: Any) -> Any:
    BIG[q] = 1.0  # assigns
    return q >= k


def in_place(b: Any, h: Any, q: Any, k: Any) -> Any:
    BIG.add_(q)  # in_place
    return q >= k


def numpy_(b: Any, h: Any, q: Any, k: Any) -> Any:
    return np.maximum(q, 3) >= 2  # numpy


def shape_error(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (BIG[q] + torch.zeros(7)).any()  # shape_error


def helper(x: Any) -> Any:
    return x * 2 if x > 0 else x  # nested


def nested(b: Any, h: Any, q: Any, k: Any) -> Any:
    return helper(q - k) > 3


CASES: list[tuple[Callable[..., Any], str, str, str]] = [
    (branch, "branch", "whether a traced value is true", "torch.where(cond, a, b)"),
    (both, "both", "`and`", "`&`, `|` and `~`"),
    (chained, "chained", "chained comparison", "(a < q) & (q < b)"),
    (loop, "loop", "`while`", "torch.where"),
    (asserts, "asserts", "whether a traced value is true", "torch.where"),
    (item, "item", ".item()", "keep it a tensor"),
    (as_int, "as_int", "int()", ".to(dtype)"),
    (counts, "counts", "a range", "keep it a tensor"),
    (lists, "lists", "an index", "index captured *tensors*"),
    (formats, "formats", "format string", "keep it a tensor"),
    (raises, "raises", "NameError: name 'undefined_name'", ""),
    (too_few, "too_few", "TypeError", "(b, h, q_idx, kv_idx)"),
    (nothing, "nothing", "is a `return` missing?", "return one 0-d tensor"),
    (not_bool, "not_bool", "a mask must be bool", "value != 0"),
    (not_scalar, "not_scalar", "returned a tensor of shape [3]", "bias[h, q_idx]"),
    (unknown, "unknown", "special_bessel_j0", "capture the result"),
    (complex_, "complex", "complex64", "before the function is defined"),
    (long_sum, "long_sum", "a sum over a dimension of length 300", "before the function is defined"),
    (many_indices, "many_indices", "3 indices for a tensor of 2", "remove an index"),
    (out_of_range, "out_of_range", "index 300 is out of range for a dimension of length 300", "use an index inside"),
    (bool_index, "bool_index", "traced bool", "torch.where(mask, a, b)"),
    (float_index, "float_index", "traced float", ".to(torch.int64)"),
    (assigns, "assigns", "assigned inside a mod", "torch.where(cond, new, old)"),
    (in_place, "in_place", "in-place", "x = x + y"),
    (numpy_, "numpy", "a NumPy array", "use torch operations"),
    (shape_error, "shape_error", "RuntimeError", ""),
    (nested, "nested", "whether a traced value is true", "torch.where"),
]


@pytest.mark.parametrize(("mod", "marker", "problem", "hint"), CASES, ids=[c[1] for c in CASES])
def test_error_names_the_line_and_the_remedy(mod: Callable[..., Any], marker: str, problem: str, hint: str) -> None:
    with pytest.raises(TraceError) as caught:
        trace(mod)
    error = caught.value
    assert problem in error.problem
    assert hint in error.hint
    assert (error.filename, error.lineno) == (__file__, line_of(marker))
    assert f"{__file__}:{error.lineno}" in str(error)
    assert f"# {marker}" in str(error), "the source line is shown"
    assert isinstance(error, ir.ProgramError)


def test_the_users_exception_is_chained() -> None:
    with pytest.raises(TraceError) as caught:
        trace(raises)
    assert isinstance(caught.value.__cause__, NameError)


def test_score_functions_report_too() -> None:
    with pytest.raises(TraceError, match="float\\(\\)"):
        trace(score_mod=lambda s, b, h, q, k: math.exp(s))
    with pytest.raises(TraceError, match=r"score_mod takes \(score, b, h, q_idx, kv_idx\)"):
        trace(score_mod=lambda s, b, h, q: s)
    with pytest.raises(TraceError, match="returned a str"):
        trace(score_mod=lambda s, b, h, q, k: "s")


def test_something_that_is_not_a_function() -> None:
    with pytest.raises(TraceError, match="mask_mod is a int"):
        trace(3)  # type: ignore[arg-type]


def test_too_large_a_program() -> None:
    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        for n in range(30_000):
            s = s + n
        return s

    with pytest.raises(TraceError, match="more than 10000 operations"):
        trace(score_mod=score)


def test_a_value_kept_after_the_trace_is_refused() -> None:
    kept: list[Any] = []

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        kept.append(q)
        return q >= k

    trace(mask)
    with pytest.raises(TraceError, match="after its trace had ended"):
        kept[0] + 1


def test_meta_and_sparse_tensors_are_refused() -> None:
    meta, sparse = torch.zeros(8, device="meta"), torch.eye(8).to_sparse()
    with pytest.raises(TraceError, match="a meta tensor"):
        trace(lambda b, h, q, k: meta[q] > 0)
    with pytest.raises(TraceError, match="sparse"):
        trace(lambda b, h, q, k: sparse[q, k] > 0)


def test_threads_trace_independently() -> None:
    digests: list[str] = []

    def work(n: int) -> None:
        table = torch.arange(n + 1)
        for _ in range(20):
            digests.append(ir.digest(trace(lambda b, h, q, k: (table[q] == table[k]) & (q - k < n)).program))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 80
    assert len(set(digests)) == 1
