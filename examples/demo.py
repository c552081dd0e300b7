"""What `make demo` runs: one program from its text to checked and timed kernels, on the CPU or on a GPU.

examples/demo.attn is compiled, called from PyTorch in float32 and bfloat16, checked against dense PyTorch written by
hand, and timed in turn with PyTorch's own flex_attention (compiled) and scaled_dot_product_attention.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import attnlang as al
from attnlang.measure import interleaved, peak_memory

BATCH, HEADS, LENGTH, HEAD_DIM = 2, 8, 4096, 64
DOCUMENTS = 8
HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out"

Tensor = torch.Tensor
console = Console() if sys.stdout.isatty() else Console(width=112)


def say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def command(*words: str) -> None:
    """Run an attnlang command in front of the reader."""
    say(f"\n$ attnlang {' '.join(words)}")
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "attnlang.cli", *words], check=True, cwd=HERE.parent)


def target_here() -> str:
    """The compile target of this machine."""
    if not torch.cuda.is_available():
        return "cpu"
    if torch.version.hip:
        return "hip:" + torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:{major}{minor}"


def documents(device: torch.device) -> Tensor:
    """Document ids [BATCH, LENGTH]: rows packed with documents of different lengths."""
    random = torch.Generator().manual_seed(0)
    starts = torch.rand(BATCH, LENGTH, generator=random).argsort(1)[:, : DOCUMENTS - 1].sort(1).values
    return torch.searchsorted(starts, torch.arange(LENGTH).repeat(BATCH, 1), right=True).to(device)


def dense(q: Tensor, k: Tensor, v: Tensor, doc: Tensor, slope: Tensor) -> Tensor:
    """The same attention written by hand in float64, one batch element and head at a time."""
    position = torch.arange(LENGTH, device=q.device)
    distance = (position[None, :] - position[:, None]).double()
    out = torch.empty(v.shape, dtype=torch.float64, device=q.device)
    for b in range(BATCH):
        visible = (distance <= 0) & (doc[b][:, None] == doc[b][None, :])
        for h in range(HEADS):
            score = q[b, h].double() @ k[b, h].double().T * HEAD_DIM**-0.5 + slope[h].double() * distance
            out[b, h] = score.masked_fill(~visible, float("-inf")).softmax(-1) @ v[b, h].double()
    return out


def with_attnlang(doc: Tensor, slope: Tensor) -> Callable[..., Tensor]:
    attention = al.compile(al.load(HERE / "demo.attn"))
    return lambda q, k, v: attention(q, k, v, doc=doc, slope=slope)


def with_flex(doc: Tensor, slope: Tensor) -> Callable[..., Tensor]:
    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (doc[b, q] == doc[b, k])

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + slope[h] * (k - q)

    block_mask = create_block_mask(mask_mod, BATCH, None, LENGTH, LENGTH, device=str(doc.device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, score_mod=score_mod, block_mask=block_mask)


def with_sdpa(doc: Tensor, slope: Tensor, dtype: torch.dtype) -> Callable[..., Tensor]:
    position = torch.arange(LENGTH, device=doc.device)
    distance = position[None, :] - position[:, None]
    visible = (distance <= 0) & (doc[:, None, :, None] == doc[:, None, None, :])
    bias = torch.where(visible, slope[None, :, None, None] * distance, float("-inf")).to(dtype)
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=bias)


def measure(dtype: torch.dtype, device: torch.device, doc: Tensor, slope: Tensor) -> bool:
    """Check and time all three in ``dtype``, print the table, and return whether ours is right."""
    name = str(dtype).removeprefix("torch.")
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM, generator=random).to(device, dtype) for _ in range(3))
    say(f"\n{name}: dense PyTorch in float64, the truth to compare with")
    truth = dense(q, k, v, doc, slope)
    makers: dict[str, Callable[[], Callable[..., Tensor]]] = {
        "attnlang": lambda: with_attnlang(doc, slope),
        "flex_attention, compiled": lambda: with_flex(doc, slope),
        "scaled_dot_product_attention": lambda: with_sdpa(doc, slope, dtype),
    }
    calls: dict[str, Callable[[], Tensor]] = {}
    rows: dict[str, tuple[float, float, int]] = {}
    for label, make in makers.items():
        say(f"{name}: first call of {label}")
        try:
            begin = time.perf_counter()
            run = make()
            run(q, k, v)
            first = time.perf_counter() - begin
            peak = peak_memory(lambda make=make: make()(q, k, v), device)
        except Exception as error:
            if label == "attnlang":
                raise
            say(f"  it does not run here and is left out: {str(error).strip().splitlines()[0][:120]}")
            continue
        rows[label] = first, float((peak.result.double() - truth).abs().max()), peak.bytes
        calls[label] = lambda run=run: run(q, k, v)
    say(f"{name}: timing all of them in turn")
    times = interleaved(calls, device, rounds=7, seconds=15.0)
    table = Table(
        title=f"{name}, B={BATCH} H={HEADS} N={LENGTH} D={HEAD_DIM} on {machine(device)}", title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for heading in ("ms a call", "attnlang is", "first call", "peak memory", "greatest error"):
        table.add_column(heading, justify="right")
    for label, (first, error, held) in rows.items():
        ratio = times[label].median / times["attnlang"].median
        faster = "" if label == "attnlang" else f"{ratio:.1f}x as fast"
        memory = f"{held / 2**20:.0f} MiB"
        table.add_row(label, f"{times[label].median:.1f}", faster, f"{first:.2f} s", memory, f"{error:.1e}")
    console.print(table)
    allowed = 2e-5 if dtype is torch.float32 else 2 * rows.get("scaled_dot_product_attention", (0, 1e-2, 0))[1]
    error = rows["attnlang"][1]
    verdict = "right" if error <= allowed else "WRONG"
    say(f"{name}: attnlang is {verdict}: greatest difference from dense PyTorch {error:.1e}, allowed {allowed:.1e}")
    return error <= allowed


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def main() -> int:
    OUT.mkdir(exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say("This demo compiles one small program and compares it with what PyTorch has.")
    say("The program, examples/demo.attn:\n")
    say((HERE / "demo.attn").read_text().rstrip())
    target = target_here()
    suffix = ".cpp" if target == "cpu" else ".py"
    command("compile", "examples/demo.attn", "-o", f"out/demo_{target.replace(':', '_')}{suffix}", "--target", target)
    if target == "cpu":
        say("No GPU is needed to compile for one; this is the same program for an H100:")
        command("compile", "examples/demo.attn", "-o", "out/demo_h100.py", "--target", "cuda:90")

    doc = documents(device)
    slope = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1, device=device) / HEADS)
    torch.save({"doc": doc.cpu(), "slope": slope.cpu()}, OUT / "demo_tensors.pt")
    shape = ("--len", str(LENGTH), "--batch", str(BATCH), "--heads", str(HEADS))
    command("show", "examples/demo.attn", *shape, "--tensors", "out/demo_tensors.pt", "--png", "out/demo.png")

    runs = al.compile(al.load(HERE / "demo.attn")).run_map(BATCH, HEADS, LENGTH, LENGTH, doc=doc, slope=slope)
    empty, partial, full = runs.counts()
    total = empty + partial + full
    share = f"{empty} of {total} tiles of 128 x 128 ({empty / total:.0%})"
    say(f"\nOver the whole batch {share} are proved empty and skipped,")
    say(f"{full} are proved full and run without mask code, {partial} evaluate the mask.")
    passed = [measure(dtype, device, doc, slope) for dtype in (torch.float32, torch.bfloat16)]
    say("\nThe picture is in out/demo.png, the generated kernels are beside it.")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
