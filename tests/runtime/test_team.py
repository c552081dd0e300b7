"""Kernels on PyTorch's threads: the same bits as on threads of their own, and only where these are to be had."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import attnlang as al
from attnlang.runtime import cpp_common
from attnlang.runtime.team import team

pytestmark = pytest.mark.skipif(
    "OpenMP" not in torch.__config__.parallel_info() or not sys.platform.startswith("linux"),
    reason="PyTorch runs on other threads here",
)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def results() -> list[torch.Tensor]:
    torch.manual_seed(0)
    leaves = [torch.randn(1, 4, 700, 32, requires_grad=True) for _ in range(3)]
    o = al.compile(al.library.causal)(*leaves)
    return [o.detach(), *torch.autograd.grad(o.square().sum(), leaves)]


@pytest.mark.usefixtures("two_threads")
def test_the_same_bits_on_either_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(cpp_common, "team", lambda: asked.append(1) or team())
    shared = results()
    assert asked
    monkeypatch.setattr(cpp_common, "team", lambda: 0)
    for a, b in zip(shared, results(), strict=True):
        assert torch.equal(a, b)


def answer(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


ASK = "import torch; torch.zeros(1); from attnlang.runtime.team import team; print(team() != 0)"


def test_only_threads_with_the_usual_stack() -> None:
    assert answer(ASK) == "True"
    assert answer(ASK, OMP_STACKSIZE="256k") == "False"


FORK = """
import os, torch, attnlang as al
torch.set_num_threads(2)
q = torch.randn(1, 4, 700, 32)
attn = al.compile(al.library.causal)
want = attn(q, q, q)
torch.randn(2000, 2000).exp_()  # PyTorch has its threads now, which a fork leaves behind: its own operations would wait
child = os.fork()
if not child:
    os._exit(0 if attn(q, q, q)[0, 3, 600].tolist() == want[0, 3, 600].tolist() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_threads_of_its_own() -> None:
    assert answer(FORK) == "0"
