"""Whole attention mechanisms on the CPU beside the PyTorch they replace, interleaved in one process; and their memory.

No program is of the library, so that what is measured is the compiler and not an entry of it. ``--quick`` takes
short sequences and saves nothing; ``--only NAME`` one mechanism; ``--memory`` the memory table alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import save
from torch import Tensor

import attnlang as al
from attnlang.ir import (
    BOOL,
    DEFAULT_OUTPUTS,
    FLOAT,
    INT,
    KEY_ADDRESS,
    Address,
    Attend,
    Branch,
    Dot,
    Expr,
    Input,
    Load,
    Map,
    Normalizer,
    Operand,
    Output,
    Pool,
    Program,
    ScalarParam,
    Select,
    Size,
    Stat,
    TensorParam,
    simple,
    stat,
)
from attnlang.ir.build import all_of, b, const, h, k, op, param, q, s
from attnlang.ir.nodes import Index
from attnlang.ir.stages import QUERY, WEIGHT
from attnlang.measure import interleaved, peak_memory

CPU = torch.device("cpu")
OURS = "attnlang"
HEADS, DIM = 8, 64
CAUSAL = op("ge", q, k)
OUT, LSE = DEFAULT_OUTPUTS


@dataclass(frozen=True)
class Mechanism:
    """A program and what one writes without it; both are called on q, k, v and the captured tensors by name.

    ``alike`` neighbouring queries are nearly the same, as those of one passage are; independent ones would each choose
    other blocks, and tiles of 64 queries would need the blocks of all.
    """

    name: str
    program: Program
    peer: str
    compose: Callable[..., Tensor]
    captured: dict[str, Any]
    length: int
    heads: int = HEADS
    keys: int | None = None
    result: str = "o"
    alike: int = 1


def sigmoid(n: int) -> Mechanism:
    bias = -math.log(n)
    norm = Normalizer("sigmoid", (), op("sigmoid", op("add", s, bias)))
    program = Program("sigmoid", (Attend(branches=(Branch(normalizer=norm),), outputs=(OUT,)),))

    def compose(q_: Tensor, k_: Tensor, v_: Tensor) -> Tensor:
        return torch.sigmoid(q_ @ k_.mT / math.sqrt(DIM) + bias) @ v_

    return Mechanism("sigmoid", program, "dense", compose, {}, n)


def sink(n: int) -> Mechanism:
    logit, m = Load("sink", (h,), FLOAT), stat("m")
    e = op("exp", op("sub", s, m))
    stats = (Stat("m", "max", s, logit), Stat("l", "sum", e, op("exp", op("sub", logit, m))))
    norm = Normalizer("sink", stats, op("div", e, stat("l")))
    mask = all_of(CAUSAL, op("lt", op("sub", q, k), 128))
    tensors = (TensorParam("sink", FLOAT, (Size("H"),)),)
    program = Program("sink_window", (Attend(branches=(Branch(mask, normalizer=norm),), outputs=(OUT,)),), (), tensors)

    def compose(q_: Tensor, k_: Tensor, v_: Tensor, sink: Tensor) -> Tensor:
        at = torch.arange(n)
        seen = (at[:, None] >= at) & (at[:, None] - at < 128)
        scores = (q_ @ k_.mT / math.sqrt(DIM)).masked_fill(~seen, -math.inf)
        more = sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, more], -1), -1)[..., :-1] @ v_

    return Mechanism("sink + window 128", program, "dense", compose, {"sink": torch.randn(HEADS)}, n)


def columns(n: int) -> Mechanism:
    program = Program("columns", (Attend(outputs=(Output("column", WEIGHT, over="q"),)),))

    def compose(q_: Tensor, k_: Tensor, v_: Tensor) -> Tensor:
        return torch.softmax(q_ @ k_.mT / math.sqrt(DIM), -1).sum(-2)

    return Mechanism("column sums", program, "dense", compose, {}, n, result="column")


def moba(n: int) -> Mechanism:
    size, blocks = const(512), const(-(-n // 512))
    seen = op("le", op("mul", k, size), q)
    gate = Attend(
        "gate",
        terms=(Dot("s", QUERY, Operand("means", Address(*KEY_ADDRESS))),),
        branches=(Branch(seen),),
        outputs=(Output("g", s, over="", empty=-math.inf),),
        lengths=(Size("Lq"), blocks),
    )
    select = Select(
        "chosen",
        (Size("B"), Size("H"), Size("Lq"), blocks),
        Load("g", (b, h, q, k), FLOAT),
        candidates=seen,
        forced=op("eq", op("floordiv", q, size), k),
        top=const(3),
    )
    mask = op("and", CAUSAL, Load("chosen", (b, h, q, op("floordiv", k, size)), BOOL))
    stages = (Pool("means", "k", size), gate, select, Attend("main", branches=(Branch(mask),)))

    def compose(q_: Tensor, k_: Tensor, v_: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q_, k_, v_, is_causal=True)

    return Mechanism("MoBA, top 3 of 512", Program("moba", stages), "SDPA, causal", compose, {}, n, heads=1, alike=256)


def relative(n: int) -> Mechanism:
    """A term per head with a table of distances (Music Transformer); the peer shifts rows of q E^T into place."""
    row = op("add", op("sub", k, q), op("sub", Size("R"), 1))
    stage = Attend(
        terms=(Dot(), Dot("t", QUERY, Operand("table", (h, row)))),
        branches=(Branch(CAUSAL, op("add", s, op("mul", Input("t", FLOAT), DIM**-0.5))),),
        outputs=(OUT,),
    )
    program = Program("relative", (stage,), (), (TensorParam("table", FLOAT, (Size("H"), Size("R"), Size("D"))),))

    def compose(q_: Tensor, k_: Tensor, v_: Tensor, table: Tensor) -> Tensor:
        skewed = F.pad(q_ @ table.mT, (1, 0)).reshape(*q_.shape[:2], n + 1, n)[:, :, 1:]
        scores = (q_ @ k_.mT + skewed) / math.sqrt(DIM)
        return torch.softmax(scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -math.inf), -1) @ v_

    return Mechanism("relative positions", program, "dense, skewed", compose, {"table": torch.randn(HEADS, n, DIM)}, n)


def decoupled(n: int) -> Mechanism:
    """Text and image keys, each with a softmax of its own, added with a factor."""
    text = op("lt", k, param("text", INT))
    stage = Attend(
        branches=(Branch(text), Branch(op("not", text))),
        outputs=(Output("a", WEIGHT, OUT.rows), Output("c", WEIGHT, OUT.rows, branch=1)),
    )
    at: tuple[Expr, ...] = (b, h, q, Index("d"))
    mixed = op("add", Load("a", at, FLOAT), op("mul", Load("c", at, FLOAT), 0.6))
    merge = Map("o", (Size("B"), Size("H"), Size("Lq"), const(DIM)), mixed)
    program = Program("decoupled", (stage, merge), (ScalarParam("text", INT, 77),))

    def compose(q_: Tensor, k_: Tensor, v_: Tensor) -> Tensor:
        one = F.scaled_dot_product_attention(q_, k_[:, :, :77], v_[:, :, :77])
        return one + 0.6 * F.scaled_dot_product_attention(q_, k_[:, :, 77:], v_[:, :, 77:])

    return Mechanism("decoupled cross-attention", program, "2 x SDPA", compose, {}, n, keys=77 + 257)


TURNED = """\
{x}[b, h, q, d] * cos[q, d] + sin[q, d] * ({x}[b, h, q, d - half] if d >= half else -{x}[b, h, q, d + half])"""
ROTARY = f"""
pattern rotary(cos: float[N, F], sin: float[N, F], gate: float[B, H, Lq], window: int = 128):
    let half = D // 2
    rows turned[Lq, D] = {TURNED.format(x="Q")}
    rows keys_[B, Hkv, Lk, D] = {TURNED.format(x="K")}
    attend inner:
        queries = turned
        keys = keys_
        mask = k <= q and q - k < window
    rows o[Lq, Dv] = inner[b, h, q, d] * rsqrt(mean_d(inner[b, h, q, d] ** 2) + 1e-6) * sigmoid(gate[b, h, q])
"""


def rotary(n: int, window: int) -> Mechanism:
    """Queries and keys turned by position, a norm of the result and a gate; the peer is all of it compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    angle = torch.arange(n)[:, None] * 10000.0 ** (-2 * torch.arange(DIM // 2) / DIM).repeat(2)
    blocks = create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < window), 1, 1, n, n, device="cpu")

    def compose(q_: Tensor, k_: Tensor, v_: Tensor, cos: Tensor, sin: Tensor, gate: Tensor, window: int) -> Tensor:
        def turn(x: Tensor) -> Tensor:
            one, two = x.chunk(2, -1)
            return x * cos + torch.cat([-two, one], -1) * sin

        made: Any = flex_attention(turn(q_), turn(k_), v_, block_mask=blocks)
        return made * torch.rsqrt(made.square().mean(-1, keepdim=True) + 1e-6) * gate.sigmoid()[..., None]

    captured = {"cos": angle.cos(), "sin": angle.sin(), "gate": torch.randn(1, HEADS, n), "window": window}
    name = f"rotary, norm, gate; {'causal' if window >= n else f'window {window}'}"
    return Mechanism(name, al.parse(ROTARY), "flex, all compiled", torch.compile(compose), captured, n)


CASES: dict[str, tuple[Callable[[int], Mechanism], int]] = {
    "sigmoid": (sigmoid, 4096),
    "sink": (sink, 4096),
    "columns": (columns, 4096),
    "moba": (moba, 32768),
    "relative": (relative, 2048),
    "decoupled": (decoupled, 4096),
    "rotary": (lambda n: rotary(n, n), 2048),
    "rotary-window": (lambda n: rotary(n, 128), 8192),
}


def _result(made: Any, name: str) -> Tensor:
    found = made[name] if isinstance(made, dict) else made
    assert isinstance(found, Tensor)
    return found


def measure(case: Mechanism, rounds: int) -> dict[str, object]:
    random = torch.Generator().manual_seed(0)
    lk = case.keys or case.length
    q_, k_, v_ = (torch.randn(1, case.heads, n, DIM, generator=random) for n in (case.length, lk, lk))
    if case.alike > 1:
        passages = torch.randn(1, case.heads, -(-case.length // case.alike), DIM, generator=random)
        q_ = passages.repeat_interleave(case.alike, 2)[:, :, : case.length] + 0.1 * q_
    attention = al.compile(case.program)
    ours = lambda: _result(attention(q_, k_, v_, **case.captured), case.result)  # noqa: E731
    peer = lambda: case.compose(q_, k_, v_, **case.captured)  # noqa: E731
    with torch.no_grad():
        found, want = ours(), peer()
        error = float((found - want).abs().max() / want.abs().max()) if "MoBA" not in case.name else math.nan
        times = interleaved({OURS: ours, case.peer: peer}, CPU, rounds=rounds, seconds=40.0)
    mine, theirs = times[OURS].median, times[case.peer].median
    print(f"{case.name:<28} {mine:9.1f} ms  {case.peer}: {theirs:9.1f} ms  x{theirs / mine:5.2f}  differs {error:.1e}")
    row = {"table": "time", "case": case.name, "length": case.length, "attnlang_ms": mine, "peer": case.peer}
    return {**row, "peer_ms": theirs, "ratio": theirs / mine, "error": None if math.isnan(error) else error}


MEMORY = (4096, 16384, 65536)
"""Lengths of the memory table; a dense map of the last would take 16 GiB a head."""


def normalisers() -> Iterator[tuple[str, Program]]:
    yield "softmax", simple("softmax", mask=op("and", CAUSAL, op("lt", op("sub", q, k), 1024)))
    near = op("and", CAUSAL, op("lt", op("sub", q, k), 1024))
    for name, found in (("sigmoid", sigmoid(4)), ("sink", sink(4)), ("column sums", columns(4))):
        stage = found.program.attend
        (branch,) = stage.branches
        inner = Attend(branches=(Branch(near, branch.score, branch.normalizer),), outputs=stage.outputs)
        yield name, Program(found.program.name, (inner,), found.program.scalars, found.program.tensors)
    entropy = Output("entropy", op("mul", WEIGHT, op("sub", LSE.value, s)))
    yield "entropy", Program("entropy", (Attend(branches=(Branch(near),), outputs=(OUT, entropy)),))


def peak(name: str, length: int, train: bool) -> dict[str, object]:
    """Peak memory of one call in this process (with ``train`` of a call and its gradients), beyond its operands."""
    program = dict(normalisers())[name]
    attention = al.compile(program)
    captured = {t.name: torch.zeros(1) for t in program.tensors}
    small = torch.randn(1, 1, 512, DIM, requires_grad=train)
    first = attention(small, small, small, **captured)
    if train:  # kernels are built outside the measurement
        outputs = first.values() if isinstance(first, dict) else (first,)
        torch.autograd.backward([o.sum() for o in outputs if o.requires_grad])
    q_, k_, v_ = (torch.randn(1, 1, length, DIM) for _ in range(3))
    q_.requires_grad_(train), k_.requires_grad_(train), v_.requires_grad_(train)

    def call() -> None:
        made = attention(q_, k_, v_, **captured)
        if train:
            outputs = made.values() if isinstance(made, dict) else (made,)
            torch.autograd.backward([o.sum() for o in outputs if o.requires_grad])

    grown = peak_memory(call, CPU).bytes / 2**20
    return {"table": "memory", "case": name, "length": length, "train": train, "growth_mb": grown}


def memory() -> Iterator[dict[str, object]]:
    for name, _ in normalisers():
        for train, length in itertools.product((False, True), MEMORY):
            command = [sys.executable, __file__, "--peak", name, str(length), *(["--train"] if train else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            what = "with gradients" if train else "forward"
            print(f"{name:<14} {length:>7} tokens  {what:<14}  +{row['growth_mb']:.1f} MB")
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "LENGTH"))
    parser.add_argument("--train", action="store_true", help="of --peak: gradients too")
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.peak[0], int(args.peak[1]), args.train)))
        return
    rows: list[dict[str, object]] = []
    if not args.memory:
        for name, (make, length) in CASES.items():
            if args.only in (None, name):
                rows.append(measure(make(length // 8 if args.quick else length), 2 if args.quick else 7))
    if args.memory or not (args.quick or args.only):
        rows += memory()
    if not (args.quick or args.only or args.memory):
        save("mechanisms", rows, CPU)


if __name__ == "__main__":
    main()
