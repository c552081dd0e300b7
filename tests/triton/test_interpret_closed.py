"""Triton kernels that compute their run bounds from their program id, interpreted, forward and backward."""

from __future__ import annotations

import pytest
from backward import cases
from closed.cases import CASES, closed_call
from triton_checks import check

from attnlang.runtime import triton as forward_pass
from attnlang.runtime import triton_backward
from attnlang.runtime.call import Call

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TRAINED = ("bottom_right", "window", "ahead", "blocks", "prefix", "per_head", "some_rows", "sinks")


def call_of(name: str) -> Call:
    case = CASES[name]
    call = cases.make_call(case.program, (2, 2, 1, 37, 51, 16, 16), case.tensors, params=case.params)
    return closed_call(call, case.both)


@pytest.mark.parametrize("name", CASES)
def test_the_forward_pass_needs_no_run_table(name: str) -> None:
    check(call_of(name))


@pytest.mark.parametrize("name", TRAINED)
def test_the_backward_pass_needs_no_run_table(name: str) -> None:
    cases.check(call_of(name), forward_pass.forward, triton_backward.backward)
