"""Tables for people: the results of running, checking and timing a program."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attnlang
from attnlang.ir import Environment, Program, UsageError, evaluate

from .cli_options import progress
from .measure import interleaved
from .peers import Bindings, CannotExpress, flex, sdpa

if TYPE_CHECKING:
    from .api import Attention
    from .cli_work import Job

__all__ = ["Agreement", "compare", "print_bench", "print_library", "print_run", "reference_in_blocks"]

Tensor = torch.Tensor
BLOCK = 1 << 24
"""Pairs evaluated at once by the blockwise reference."""


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=110)


# --- checking


@dataclass(frozen=True)
class Agreement:
    """Greatest differences of a result from the reference, and what is allowed."""

    output: float
    lse: float
    allowed: float
    allowed_lse: float

    @property
    def passed(self) -> bool:
        return self.output <= self.allowed and self.lse <= self.allowed_lse


def reference_in_blocks(
    program: Program, q: Tensor, k: Tensor, v: Tensor, bound: Bindings, scale: float
) -> Iterator[tuple[int, int, slice, Tensor, Tensor, float]]:
    """Yield (b, h, rows, o, lse, largest finite score) of the float64 reference, one block of queries at a time."""
    (term,) = program.attend.terms
    values = next(o.rows for o in program.attend.outputs if o.rows is not None)
    lq, lk = bound.sizes["Lq"], bound.sizes["Lk"]
    step = max(1, BLOCK // max(1, lk))
    keys = torch.arange(lk, device=q.device)[None]
    for b in range(bound.sizes["B"]):
        for h in range(bound.sizes["H"]):
            at = {"b": torch.tensor(b, device=q.device), "h": torch.tensor(h, device=q.device)}

            def env(rows: Tensor, inputs: dict[str, Tensor] | None = None, at: dict[str, Tensor] = at) -> Environment:
                axes = {**at, "q": rows[:, None], "k": keys}
                tensors, params = bound.tensors, bound.params
                return Environment(axes, bound.sizes, params, tensors, inputs or {}, torch.float64, q.device)

            first = env(torch.zeros(1, dtype=torch.long, device=q.device))
            kb, kh = (int(evaluate(e, first)) for e in (term.right.address.batch, term.right.address.head))
            vb, vh = (int(evaluate(e, first)) for e in (values.address.batch, values.address.head))
            kk, vv = k[min(kb, k.shape[0] - 1), kh].double(), v[min(vb, v.shape[0] - 1), vh].double()
            for start in range(0, lq, step):
                rows = slice(start, min(start + step, lq))
                index = torch.arange(rows.start, rows.stop, device=q.device)
                raw = (q[b, h, rows].double() @ kk.T) * scale
                mask = evaluate(program.mask, env(index)).expand(raw.shape)
                score = evaluate(program.score, env(index, {"s": raw})).expand(raw.shape)
                score = torch.where(mask, score, -math.inf)
                lse = torch.logsumexp(score, -1) if lk else score.new_full((len(index),), -math.inf)
                weights = torch.exp(score - torch.where(lse.isinf(), 0.0, lse)[:, None])
                finite = score[mask]
                largest = float(finite.abs().max()) if finite.numel() else 0.0
                yield b, h, rows, weights @ vv, lse, largest


def compare(
    program: Program, q: Tensor, k: Tensor, v: Tensor, bound: Bindings, scale: float, out: Tensor, lse: Tensor
) -> Agreement:
    """Compare a result with the reference, blockwise, with a progress bar.

    What is allowed follows from the dtype: 2e-5 in float32 and a few units in the last place of a half, more where
    scores are large, because exp(s) cannot be more accurate than s.
    """
    worst, worst_lse, largest = 0.0, 0.0, 1.0
    blocks = (
        bound.sizes["B"]
        * bound.sizes["H"]
        * max(1, -(-bound.sizes["Lq"] // max(1, BLOCK // max(1, bound.sizes["Lk"]))))
    )
    console = Console(stderr=True)
    steps = reference_in_blocks(program, q, k, v, bound, scale)
    for b, h, rows, want, want_lse, score in track(
        steps, "checking", total=blocks, console=console, transient=True, disable=not console.is_terminal
    ):
        got, got_lse = out[b, h, rows].double(), lse[b, h, rows].double()
        worst = max(worst, _worst(got, want))
        worst_lse = max(worst_lse, _worst(got_lse, want_lse))
        largest = max(largest, score)
    magnitude = max(1.0, float(v.abs().max()) / 8 if v.numel() else 1.0)
    unit = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[q.dtype]
    rounding = max(1.0, largest / 16)
    return Agreement(worst, worst_lse, unit * magnitude * rounding, max(2e-5, unit / 10) * rounding)


def _worst(got: Tensor, want: Tensor) -> float:
    """Greatest difference; infinities must agree, and a NaN is infinitely wrong."""
    if not got.numel():
        return 0.0
    both = (got == want) & want.isinf()
    difference = torch.where(both, 0.0, (got - want).abs())
    return float(torch.nan_to_num(difference, nan=math.inf, posinf=math.inf).max())


# --- run


def print_run(job: Job, backend: str | None, check: bool, layout: str | None = None) -> bool:
    """Run a job, print a table, and return whether the check (if any) passed."""
    attention = attnlang.compile(job.program, backend=backend, layout=layout)
    if not job.program.standard:
        return _print_results(job, attention, check)
    with progress(f"compiling and running {job.program.name}"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        begin = time.perf_counter()
        out, lse = attention(job.q, job.k, job.v, return_lse=True, **job.values)
        first = time.perf_counter() - begin
        timing = interleaved({"run": lambda: attention(job.q, job.k, job.v, **job.values)}, job.q.device, seconds=5.0)
    for message in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)):
        Console(stderr=True).print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
    sizes = job.sizes
    table = Table(title=job.program.name, show_header=False, title_justify="left")
    table.add_row(
        "shape", ", ".join(f"{n} = {v}" for n, v in sizes.items()) + f", D = {job.q.shape[3]}, Dv = {job.v.shape[3]}"
    )
    table.add_row("tensors", f"{str(job.q.dtype).removeprefix('torch.')} on {job.q.device}")
    if layout is not None:
        n = job.sizes
        chosen = attention.layout_of(n["Lq"], n["Lk"], B=n["B"], H=n["H"], Hkv=n["Hkv"], **job.values)
        table.add_row("order of tokens", chosen.name if chosen else "as they come")
    table.add_row("tiles", tiles_of(attention, job))
    table.add_row("first call", f"{first * 1e3:.1f} ms, compilation included")
    table.add_row("a call", f"{timing['run'].median:.2f} ms (median of {timing['run'].calls})")
    table.add_row("rows without visible keys", str(int((lse == -math.inf).sum())))
    passed = True
    if check:
        bound, scale = bindings(attention, job)
        agreement = compare(attention.program, job.q, job.k, job.v, bound, scale, out, lse)
        passed = agreement.passed
        table.add_row("difference of o", f"{agreement.output:.2e} (allowed {agreement.allowed:.1e})")
        table.add_row("difference of lse", f"{agreement.lse:.2e} (allowed {agreement.allowed_lse:.1e})")
        table.add_row("check", "passed" if passed else "FAILED")
    _console().print(table)
    return passed


ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative to the largest magnitude of a result."""


def _print_results(job: Job, attention: Attention, check: bool) -> bool:
    """Run a program with results of its own, and print their shapes and, with ``check``, how far they are off."""

    def results(run: Callable[..., Any]) -> dict[str, torch.Tensor]:
        found = run(job.q, job.k, job.v, return_aux=True, **job.values)
        found = found if isinstance(found, tuple) else (found,)
        made = {} if isinstance(found[0], dict) else {"o": found[0]}
        return made | (found[-1] if isinstance(found[-1], dict) else {})

    with progress(f"compiling and running {job.program.name}"):
        begin = time.perf_counter()
        made = results(attention)
        first = time.perf_counter() - begin
        timing = interleaved({"run": lambda: results(attention)}, job.q.device, seconds=5.0)
    table = Table(title=job.program.name, show_header=False, title_justify="left")
    table.add_row("tensors", f"{str(job.q.dtype).removeprefix('torch.')} on {job.q.device}")
    table.add_row("first call", f"{first * 1e3:.1f} ms, compilation included")
    table.add_row("a call", f"{timing['run'].median:.2f} ms (median of {timing['run'].calls})")
    for name, t in made.items():
        table.add_row(name, f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}")
    passed = True
    if check:
        want = results(partial(attnlang.reference, attention))
        allowed = ALLOWED[job.q.dtype]
        for name, t in made.items():
            off, size = _difference(t, want[name])
            passed &= off <= allowed * (1 + size)
            table.add_row(f"difference of {name}", f"{off:.2e} (allowed {allowed * (1 + size):.1e})")
        table.add_row("check", "passed" if passed else "FAILED")
    _console().print(table)
    return passed


def _difference(found: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Largest difference where both are finite (infinite where one is and they differ), and the largest magnitude."""
    a, b = found.double(), want.double()
    if not a.numel():
        return 0.0, 0.0
    finite = a.isfinite() & b.isfinite()
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(finite, (a - b).abs(), torch.where(same, 0.0, math.inf))
    return float(off.max()), float(torch.where(finite, b.abs(), 0.0).max())


def bindings(attention: Attention, job: Job) -> tuple[Bindings, float]:
    """Return the checked values of a job, and its scale."""
    bound = attention._binder.bind(job.q, job.k, job.v, job.values)
    return Bindings(bound.sizes, bound.params, bound.tensors), bound.scale


def tiles_of(attention: Attention, job: Job, tile: tuple[int, int] = (128, 128)) -> str:
    """Return in words which tiles of the job's mask are computed."""
    n = job.sizes
    run_map = attention.run_map(n["B"], n["H"], n["Lq"], n["Lk"], Hkv=n["Hkv"], tile=tile, **job.values)
    empty, partial, full = run_map.counts()
    total = max(1, empty + partial + full)
    return f"{full} full, {partial} partial, {empty} skipped ({empty / total:.1%}) of {tile[0]} x {tile[1]}"


# --- bench


def print_bench(job: Job, rounds: int) -> None:
    """Time a job against its peers and print a table.

    Raises:
        UsageError: the program is more than softmax with a mask and a score.
    """
    if not job.program.standard:
        raise UsageError(f"{job.program.name} is more than a mask and a score, which is what peers can run; see `run`")
    attention = attnlang.compile(job.program)
    bound, scale = bindings(attention, job)
    device = job.q.device
    ours = lambda: attention(job.q, job.k, job.v, **job.values)  # noqa: E731
    makers: dict[str, Callable[[], Any]] = {
        "attnlang": lambda: lambda q, k, v: attention(q, k, v, **job.values),
        "flex_attention (compiled)": lambda: flex(attention.program, bound, scale, device),
        "scaled_dot_product_attention": lambda: sdpa(attention.program, bound, scale, job.q.dtype, device),
    }
    calls: dict[str, Callable[[], Tensor]] = {}
    notes: dict[str, str] = {}
    for name, make in makers.items():
        with progress(f"compiling {name}"):
            try:
                function = make()
                difference = _worst(function(job.q, job.k, job.v).double(), ours().double())
            except CannotExpress as error:
                notes[name] = f"cannot express it: {error}"
                continue
            except Exception as error:
                if name == "attnlang":
                    raise
                notes[name] = f"does not run here: {first_line(error)}"
                continue
        calls[name] = lambda f=function: f(job.q, job.k, job.v)  # type: ignore[misc]
        notes[name] = "" if name == "attnlang" else f"differs by {difference:.1e}"
    with progress("timing"):
        times = interleaved(calls, device, rounds=rounds, seconds=60.0)
    n, empty = job.sizes, tiles_of(attention, job)
    flops = 2.0 * n["B"] * n["H"] * visible_pairs(attention, job) * (job.q.shape[3] + job.v.shape[3])
    table = Table(title=f"{job.program.name}: {empty}", title_justify="left")
    for heading, justify in (
        ("", "left"),
        ("ms", "right"),
        ("GFLOP/s", "right"),
        ("attnlang is", "right"),
        ("", "left"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for name in makers:
        if name not in times:
            table.add_row(name, "-", "-", "-", notes[name])
            continue
        ms = times[name].median
        ratio = f"{ms / times['attnlang'].median:.2f} x as fast" if name != "attnlang" else ""
        table.add_row(name, f"{ms:.2f}", f"{flops / ms / 1e6:.0f}", ratio, notes[name])
    _console().print(table)


def visible_pairs(attention: Attention, job: Job) -> float:
    """Pairs in computed tiles for one batch element and head, partial tiles counted half: an estimate for rates."""
    n = job.sizes
    run_map = attention.run_map(n["B"], n["H"], n["Lq"], n["Lk"], Hkv=n["Hkv"], tile=(64, 64), **job.values)
    empty, partial, full = run_map.counts()
    total = max(1, empty + partial + full)
    return (full + 0.5 * partial) / total * n["Lq"] * n["Lk"]


def first_line(error: BaseException) -> str:
    """The first line of an error, short enough for a table."""
    text = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    return text if len(text) <= 100 else text[:97] + "..."


# --- list


def print_library(rows: list[tuple[str, str, str]]) -> None:
    """Print name, parameters and first line of the docstring of library programs."""
    table = Table(title=f"{len(rows)} programs; attnlang show NAME draws one", title_justify="left", pad_edge=False)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("parameters")
    table.add_column("what it is", ratio=1)
    for name, signature, doc in rows:
        table.add_row(name, signature, doc)
    _console().print(table)
