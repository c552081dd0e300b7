"""What the commands do, apart from reading options and printing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import attnlang
from attnlang.ir import Program, Scalar, UsageError

from .api import Attention
from .cli_inputs import fit_settings, load_program, load_tensors, parse_dtype, parse_settings, parse_storage
from .made import make_values
from .show import TilePicture, picture_of, write_atomically
from .show_html import write_page
from .sparsity import Report, RunMap

__all__ = ["Drawing", "Job", "Shape", "compile_to", "draw", "explain_report", "prepare"]

Tensor = torch.Tensor
SIDE = 32
"""Tiles a side of a picture whose tile was not given."""
KERNEL = 128
"""Largest side of the tiles of a page whose tile was not given: that of a kernel."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int | None

    @property
    def sizes(self) -> dict[str, int]:
        return {"B": self.batch, "H": self.heads, "Hkv": self.kv_heads, "Lq": self.q_len, "Lk": self.kv_len}


@dataclass(frozen=True)
class Job:
    """A program with everything one call needs. ``values`` are the keyword arguments of the call."""

    program: Program
    q: Tensor
    k: Tensor
    v: Tensor
    values: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        (b, h, lq, _), (_, hkv, lk, _) = self.q.shape, self.k.shape
        return {"B": b, "H": h, "Hkv": hkv, "Lq": lq, "Lk": lk}


def _values(
    program: Program, sizes: Mapping[str, int], settings: Iterable[str], given: Mapping[str, Any], seed: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    set_values = fit_settings(program, parse_settings(settings))
    if twice := sorted(set(set_values) & set(given)):
        raise UsageError(f"{twice[0]} is given twice: by --set and in the tensor file")
    made = make_values(program, sizes, {**given, **set_values}, seed=seed)
    return made.values, made.notes


def _given(path: str | None, program: Program) -> dict[str, Any]:
    """Entries of the tensor file that the program has, q, k and v aside."""
    found = load_tensors(Path(path)) if path else {}
    known = {"q", "k", "v", *(t.name for t in program.tensors), *(p.name for p in program.scalars)}
    for name in found:
        if name not in known:
            raise UsageError(f"{path}: {program.name} has no tensor {name!r} (it has: {', '.join(sorted(known))})")
    return found


@dataclass(frozen=True)
class Drawing:
    """A mask ready to be drawn. ``notes`` say what was made up for it."""

    title: str
    notes: tuple[str, ...]
    lengths: tuple[int, int]
    tile: tuple[int, int] | None
    at: tuple[int, int]
    run_map: Callable[[tuple[int, int]], RunMap]

    def picture(self) -> TilePicture:
        """The tiles as a grid; by default about 32 a side."""
        tile = self.tile or (_side(self.lengths[0]), _side(self.lengths[1]))
        runs = self.run_map(tile)
        return picture_of(runs, self._title(runs), batch=self.at[0], head=self.at[1])

    def page(self, path: Path) -> int:
        """Write the tiles as a web page, by default the tiles of a kernel; return its size in bytes."""
        tile = self.tile or (min(KERNEL, _side(self.lengths[0])), min(KERNEL, _side(self.lengths[1])))
        runs = self.run_map(tile)
        return write_page(path, runs, self._title(runs), batch=self.at[0], head=self.at[1])

    def _title(self, runs: RunMap) -> str:
        which = f", batch element {self.at[0]}, head {self.at[1]}"
        return self.title + (which if runs.heads > 1 or runs.batch > 1 else "")


def draw(
    source: str,
    sizes: Mapping[str, int],
    settings: Iterable[str],
    tile: tuple[int, int] | None,
    at: tuple[int, int],
    tensor_file: str | None,
    seed: int,
    layout: str | None = None,
) -> Drawing:
    """Return the mask of a program, ready to be drawn."""
    program = load_program(source)
    given = {n: t for n, t in _given(tensor_file, program).items() if n not in "qkv"}
    values, notes = _values(program, sizes, settings, given, seed)
    attention = attnlang.compile(program, layout=layout)
    lengths, heads = (sizes["Lq"], sizes["Lk"]), (sizes["H"], sizes["Hkv"])

    def run_map(side: tuple[int, int]) -> RunMap:
        return attention.run_map(sizes["B"], heads[0], *lengths, Hkv=heads[1], tile=side, **values)

    title = _signature_of_call(program, values)
    if layout is not None:
        chosen = attention.layout_of(*lengths, B=sizes["B"], H=heads[0], Hkv=heads[1], **values)
        title += f", tokens in {chosen.name if chosen else 'the order they come in'}"
    return Drawing(title, notes, lengths, tile, at, run_map)


def _side(length: int) -> int:
    side = 8
    while side * SIDE < length:
        side *= 2
    return side


def _signature_of_call(program: Program, values: Mapping[str, Any]) -> str:
    shown = []
    for scalar in program.scalars:
        value = values.get(scalar.name, scalar.default)
        shown.append(f"{scalar.name}={value}")
    shown += [t.name for t in program.tensors]
    return f"{program.name}({', '.join(shown)})" if shown else program.name


def explain_report(
    source: str,
    sizes: Mapping[str, int],
    settings: Iterable[str],
    tile: tuple[int, int],
    tensor_file: str | None,
    seed: int,
    layout: str | None = None,
) -> tuple[Report, tuple[str, ...]]:
    """Return the report of ``Attention.explain``, and what was made up for it."""
    program = load_program(source)
    given = {n: t for n, t in _given(tensor_file, program).items() if n not in "qkv"}
    values, notes = _values(program, sizes, settings, given, seed)
    attention = attnlang.compile(program, layout=layout)
    return attention.explain(sizes["Lq"], sizes["Lk"], B=sizes["B"], H=sizes["H"], tile=tile, **values), notes


def prepare(
    source: str,
    shape: Shape,
    settings: Iterable[str],
    dtype_name: str,
    device_name: str,
    tensor_file: str | None,
    seed: int,
) -> Job:
    """Make or read everything one call of a program needs.

    Raises:
        UsageError: the program, the tensors or the device do not fit.
    """
    program = load_program(source)
    dtype, device = parse_dtype(dtype_name), _device(device_name)
    given = _given(tensor_file, program)
    operands = [given.pop(name, None) for name in "qkv"]
    q, k, v = _operands(operands, shape, dtype, seed)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.dim() != 4:
            raise UsageError(f"{name} must be a tensor with 4 dimensions [batch, heads, length, head_dim]")
    sizes = {"B": q.shape[0], "H": q.shape[1], "Hkv": k.shape[1], "Lq": q.shape[2], "Lk": k.shape[2]}
    values, notes = _values(program, sizes, settings, given, seed)
    values = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in values.items()}
    return Job(program, q.to(device), k.to(device), v.to(device), values, notes)


def _operands(given: list[Any], shape: Shape, dtype: torch.dtype, seed: int) -> list[Any]:
    if any(t is not None for t in given):
        if any(t is None for t in given):
            raise UsageError("the tensor file must hold q, k and v together, or none of them")
        return given
    random = torch.Generator().manual_seed(seed)
    value_dim = shape.value_dim or shape.head_dim
    made = []
    for heads, length, dim in (
        (shape.heads, shape.q_len, shape.head_dim),
        (shape.kv_heads, shape.kv_len, shape.head_dim),
        (shape.kv_heads, shape.kv_len, value_dim),
    ):
        made.append(torch.randn(shape.batch, heads, length, dim, generator=random).to(dtype))
    return made


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def compile_to(
    source: str,
    out: str,
    target: str,
    head_dim: int,
    value_dim: int | None,
    dtype: str | None,
    settings: Iterable[str],
    storage: Iterable[str],
    binary: bool,
) -> list[str]:
    """Write the generated source of a program to ``out`` and return what was done, in words.

    Of a program of several kernels, those of its parts are written to files beside each other.
    """
    from attnlang.runtime.source import is_one_kernel, sources
    from attnlang.runtime.source import source as generate

    program = load_program(source)
    held = parse_storage(program, storage)
    usual = "float32" if target.partition(":")[0] == "cpu" else "bfloat16"
    name = str(parse_dtype(dtype or usual)).removeprefix("torch.")
    static: dict[str, Scalar] = fit_settings(program, parse_settings(settings))
    specialised = Attention(program, backend=None, layout=None, **static).program
    wanted = (specialised, target, head_dim, value_dim or head_dim, name, held)
    texts = {"": generate(*wanted)} if is_one_kernel(specialised) else sources(*wanted)
    if out == "-":
        if binary:
            raise UsageError("--binary needs a file: name one with -o")
        for text in texts.values():
            print(text, end="" if text.endswith("\n") else "\n")
        return []
    if binary and "" not in texts:
        raise UsageError(f"--binary is for programs of one kernel; {program.name} has parts: {', '.join(texts)}")
    path = Path(out)
    if not path.name:
        raise UsageError(f"{path} is a folder; give the name of a file")
    done = []
    for part, text in texts.items():
        file = path.with_stem(f"{path.stem}_{part}") if part else path
        write_atomically(file, functools.partial(Path.write_text, data=text, encoding="utf-8"))
        what = f"{program.name}{part and ', ' + part} for {target}, {name}, head dimension {head_dim}"
        done.append(f"wrote {file} ({len(text.splitlines())} lines): {what}")
    if binary:
        from attnlang.runtime.binary import binary as build

        built = build(specialised, target, head_dim, value_dim or head_dim, name, held)
        compiled = path.with_suffix(built.suffix)
        write_atomically(compiled, lambda temporary: temporary.write_bytes(built.data))
        done.append(f"wrote {compiled} ({len(built.data)} bytes): {built.needs}")
    return done
