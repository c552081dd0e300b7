"""The command line. Each command is a few lines that read options and print; the work is done elsewhere.

Nothing heavy is imported until a command runs, so that help appears at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import (
    OK,
    WRONG,
    Batch,
    Dtype,
    HeadDim,
    Heads,
    KvHeads,
    KvLen,
    LayoutText,
    Len,
    QLen,
    Seed,
    Settings,
    Source,
    TensorFile,
    ValueDim,
    guarded,
    note,
    progress,
)

if TYPE_CHECKING:
    from attnlang.ir import Program

__all__ = ["app", "main"]

app = typer.Typer(
    name="attnlang",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 a wrong program or arguments that do not fit it, 2 a wrong command line, "
    "3 something this machine lacks. ATTNLANG_DEBUG=1 shows tracebacks.",
)


def _version(wanted: bool) -> None:
    if wanted:
        import attnlang

        print(f"attnlang {attnlang.__version__}")
        raise typer.Exit(OK)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """A compiler for attention: a mask or a score function in, a fused kernel out.

    [bold]attnlang list[/] shows what is in the library, [bold]attnlang show causal[/] draws a mask,
    [bold]attnlang run FILE --check[/] runs a program of yours and compares it with the reference.
    """


@app.command()
@guarded
def check(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE[:PATTERN]...", help="Files to check; all their patterns, or one.")
    ],
) -> None:
    """Check programs and report every mistake.

    Example: [cyan]attnlang check my_masks.attn[/]
    """
    from attnlang.ir import AttnlangError

    failed = 0
    for spec in files:
        try:
            for program in _programs(spec):
                print(f"ok  {_signature(program)}")
        except AttnlangError as error:
            from .cli_options import _report

            failed = max(failed, _report(error))
    raise typer.Exit(failed)


def _programs(spec: str) -> list[Program]:
    from attnlang.grammar import load
    from attnlang.ir import UsageError, verify

    from .cli_inputs import load_program, source_of

    path, pattern = source_of(spec)
    if path is None or pattern is not None:
        return [verify(load_program(spec))]
    found = list(load(path).patterns.values())
    if not found:
        raise UsageError(f"{path} defines no pattern; a file of helpers alone cannot be compiled")
    return [verify(p) for p in found]


def _signature(program: Program) -> str:
    from attnlang.ir import format_program

    return format_program(program).splitlines()[0].removeprefix("pattern ").rstrip(":")


@app.command()
@guarded
def show(
    source: Source,
    settings: Settings = None,
    length: Len = 1024,
    q_len: QLen = None,
    kv_len: KvLen = None,
    tile: Annotated[
        str | None,
        typer.Option("--tile", "-t", metavar="QxK", help="Tile, for example 128x128; by default 32 tiles a side."),
    ] = None,
    batch: Batch = 1,
    heads: Heads = 8,
    at: Annotated[str, typer.Option("--at", metavar="B,H", help="The batch element and the head to draw.")] = "0,0",
    layout: LayoutText = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="OUT", help="Write a picture, too.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write a web page to zoom and move about in, too.")
    ] = None,
    tensors: TensorFile = None,
    seed: Seed = 0,
) -> None:
    """Draw a mask: which tiles are skipped, partial and full.

    Example: [cyan]attnlang show causal[/]

    Example: [cyan]attnlang show sliding_window --set window=512 --len 4096 --tile 128x128 --png mask.png[/]

    Example: [cyan]attnlang show causal_document --len 1048576 --html mask.html[/]
    """
    from .cli_inputs import parse_tile
    from .cli_work import draw

    shape = {"B": batch, "H": heads, "Hkv": heads, "Lq": _or(q_len, length), "Lk": _or(kv_len, length)}
    sides = parse_tile(tile) if tile else None
    drawing = draw(source, shape, settings or [], sides, _pair(at, batch, heads), tensors, seed, layout)
    for line in drawing.notes:
        note(f"made up: {line}")
    picture = drawing.picture()
    print(picture.text(columns=_columns(), style=_glyphs()))
    if png is not None:
        picture.png(png)
        note(f"wrote {png}")
    if html is not None:
        size = drawing.page(html)
        note(f"wrote {html} ({size / 1024:.0f} KiB)")


def _or(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _pair(text: str, batch: int, heads: int) -> tuple[int, int]:
    first, comma, second = text.partition(",")
    try:
        b, h = int(first), int(second if comma else "0")
    except ValueError:
        raise typer.BadParameter(f"--at wants B,H such as 0,3; got {text!r}") from None
    if not (0 <= b < max(batch, 1) and 0 <= h < max(heads, 1)):
        raise typer.BadParameter(f"--at {text} is outside batch {batch} and heads {heads}")
    return b, h


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else 80


def _glyphs() -> str:
    """Block characters where the output can show them."""
    try:
        "█▒·".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "ascii"
    return "unicode"


@app.command("compile")
@guarded
def compile_(
    source: Source,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="OUT", help="File to write; - prints the source.", show_default=False)
    ],
    target: Annotated[
        str, typer.Option(help="cpu, cuda:80 (Ampere), cuda:90 (Hopper), cuda:100 (Blackwell) or hip:gfx942 (MI300).")
    ] = "cpu",
    head_dim: HeadDim = 64,
    value_dim: ValueDim = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32 (default for cpu), float16, bfloat16.")] = None,
    settings: Settings = None,
    storage: Annotated[
        list[str] | None,
        typer.Option("--storage", metavar="TENSOR=DTYPE", help="dtype of a captured tensor, if not int64 or float32."),
    ] = None,
    binary: Annotated[
        bool, typer.Option("--binary", help="Also write the compiled kernel beside OUT: .so, .cubin or .hsaco.")
    ] = False,
) -> None:
    """Compile a program to a file that stands alone; no GPU is needed.

    GPU targets give a Python file that needs only torch and triton, cpu a C++ file with a plain C interface. Parameters
    named with --set become constants, the others stay arguments. A program of several kernels gives a file for each
    part whose kernel does not depend on the tensors of a call.

    Example: [cyan]attnlang compile examples/demo.attn -o demo_h100.py --target cuda:90 --head-dim 128[/]
    """
    from .cli_work import compile_to

    for line in compile_to(source, out, target, head_dim, value_dim, dtype, settings or [], storage or [], binary):
        note(line)


@app.command()
@guarded
def run(
    source: Source,
    settings: Settings = None,
    batch: Batch = 2,
    heads: Heads = 8,
    kv_heads: KvHeads = None,
    length: Len = 1024,
    q_len: QLen = None,
    kv_len: KvLen = None,
    head_dim: HeadDim = 64,
    value_dim: ValueDim = None,
    dtype: Dtype = "float32",
    tensors: TensorFile = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto: a GPU if there is one.")] = "auto",
    backend: Annotated[str | None, typer.Option(help="cpp, triton or eager; by default chosen by the device.")] = None,
    layout: LayoutText = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the float64 reference; exit 1 if wrong.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Run a program on made or given tensors.

    Captured tensors are made from their declarations (and described), unless --tensors has them.

    Example: [cyan]attnlang run causal_document --len 4096 --dtype bfloat16 --check[/]
    """
    from .cli_work import Shape, prepare
    from .report import print_run

    shape = Shape(batch, heads, kv_heads or heads, _or(q_len, length), _or(kv_len, length), head_dim, value_dim)
    job = prepare(source, shape, settings or [], dtype, device, tensors, seed)
    for line in job.notes:
        note(f"made up: {line}")
    passed = print_run(job, backend, check, layout)
    raise typer.Exit(OK if passed else WRONG)


@app.command()
@guarded
def bench(
    source: Source,
    settings: Settings = None,
    batch: Batch = 1,
    heads: Heads = 8,
    kv_heads: KvHeads = None,
    length: Len = 4096,
    q_len: QLen = None,
    kv_len: KvLen = None,
    head_dim: HeadDim = 64,
    dtype: Dtype = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto: a GPU if there is one.")] = "auto",
    rounds: Annotated[int, typer.Option(min=2, help="Timed calls of each; the median is shown.")] = 7,
    tensors: TensorFile = None,
    seed: Seed = 0,
) -> None:
    """Time a program against PyTorch's flex_attention (compiled) and scaled_dot_product_attention, in one run.

    Example: [cyan]attnlang bench causal --len 4096[/]
    """
    from .cli_work import Shape, prepare
    from .report import print_bench

    shape = Shape(batch, heads, kv_heads or heads, _or(q_len, length), _or(kv_len, length), head_dim, None)
    job = prepare(source, shape, settings or [], dtype, device, tensors, seed)
    for line in job.notes:
        note(f"made up: {line}")
    print_bench(job, rounds)


@app.command()
@guarded
def explain(
    source: Source,
    settings: Settings = None,
    length: Len = 4096,
    q_len: QLen = None,
    kv_len: KvLen = None,
    tile: Annotated[str, typer.Option("--tile", "-t", metavar="QxK", help="Tile of the kernel.")] = "128x128",
    batch: Batch = 1,
    heads: Heads = 8,
    layout: LayoutText = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    tensors: TensorFile = None,
    seed: Seed = 0,
) -> None:
    """Say why tiles are empty, partial or full, and what would make the mask sparser.

    Example: [cyan]attnlang explain sliding_window --set window=500[/]

    Example: [cyan]attnlang explain neighborhood_2d --len 16384 --tile 64x64 --json[/]

    Example: [cyan]attnlang explain neighborhood_2d --set height=64 --set width=64 --layout auto[/]
    """
    from json import dumps

    from .cli_inputs import parse_tile
    from .cli_work import explain_report

    shape = {"B": batch, "H": heads, "Hkv": heads, "Lq": _or(q_len, length), "Lk": _or(kv_len, length)}
    report, notes = explain_report(source, shape, settings or [], parse_tile(tile), tensors, seed, layout)
    for line in notes:
        note(f"made up: {line}")
    print(dumps(report.to_dict(), indent=2) if json else report)


@app.command("list")
@guarded
def list_(
    words: Annotated[list[str] | None, typer.Argument(help="Show only programs that mention these words.")] = None,
) -> None:
    """List the programs of the library.

    Example: [cyan]attnlang list window[/]
    """
    from .report import print_library

    with progress("reading the library"):
        rows = _library_rows()
    wanted = [w.lower() for w in words or []]
    rows = [row for row in rows if all(any(w in cell.lower() for cell in row) for w in wanted)]
    if not rows:
        note(f"error: no program of the library mentions {' and '.join(wanted)}")
        raise typer.Exit(WRONG)
    print_library(rows)


def _library_rows() -> list[tuple[str, str, str]]:
    import attnlang

    rows = []
    for name in attnlang.library.names():
        program: Any = getattr(attnlang.library, name)
        signature = _signature(program).removeprefix(program.name)
        first = " ".join(program.doc.strip().split("\n\n")[0].split())
        rows.append((name, signature.strip("()"), first))
    return rows


def main() -> None:
    """Entry point of the ``attnlang`` command."""
    app(prog_name="attnlang")


if __name__ == "__main__":
    main()
