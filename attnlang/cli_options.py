"""The options that several commands share, and how a command ends: messages and exit codes."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

__all__ = [
    "Batch",
    "Dtype",
    "HeadDim",
    "Heads",
    "KvHeads",
    "KvLen",
    "LayoutText",
    "Len",
    "QLen",
    "Seed",
    "Settings",
    "Source",
    "TensorFile",
    "ValueDim",
    "guarded",
    "note",
    "progress",
]

OK, WRONG, USAGE, MISSING, DEFECT, INTERRUPTED = 0, 1, 2, 3, 70, 130
"""Exit codes: success; a wrong program or arguments that do not fit it; a wrong command line; something this machine
lacks (a GPU toolchain, a compiler); a defect of attnlang; control-C."""

Source = Annotated[
    str,
    typer.Argument(
        metavar="FILE[:PATTERN]",
        help="An .attn file (its last pattern, or the one named), or the name of a library program.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="Value of a parameter or extent of a symbolic size."),
]
Len = Annotated[int, typer.Option("--len", "-n", min=0, help="Number of queries and of keys.")]
QLen = Annotated[int | None, typer.Option("--q-len", min=0, help="Number of queries, if not --len.")]
KvLen = Annotated[int | None, typer.Option("--kv-len", min=0, help="Number of keys, if not --len.")]
Batch = Annotated[int, typer.Option("--batch", "-b", min=0, help="Batch size.")]
Heads = Annotated[int, typer.Option("--heads", "-H", min=0, help="Number of query heads.")]
KvHeads = Annotated[int | None, typer.Option("--kv-heads", min=1, help="Number of key heads, if not --heads.")]
HeadDim = Annotated[int, typer.Option("--head-dim", "-d", min=1, help="Head dimension of q and k.")]
ValueDim = Annotated[int | None, typer.Option("--value-dim", min=1, help="Head dimension of v, if not --head-dim.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float16, bfloat16 or float64.")]
LayoutText = Annotated[
    str | None,
    typer.Option(
        "--layout",
        metavar="ORDER",
        help="Order of the tokens: auto (the compiler's choice), hilbert, transposed, or patches of the grid such as "
        "8x8, 8x1%2 (in residue classes modulo 2) or 7x7+3 (shifted by 3).",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is made up.")]
TensorFile = Annotated[
    str | None,
    typer.Option("--tensors", metavar="FILE", help="Captured tensors (and q, k, v) by name: a .pt dict or an .npz."),
]

Command = TypeVar("Command", bound=Callable[..., Any])


def _developer() -> bool:
    return os.environ.get("ATTNLANG_DEBUG", "") not in ("", "0")


def note(message: str) -> None:
    """Say something to the person, on stderr so that it mixes with no output."""
    print(message, file=sys.stderr, flush=True)


def progress(message: str) -> Any:
    """A context manager that shows a spinner with ``message`` on a terminal, and one line elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        note(f"{message} ...")
    return console.status(message)


def _code_of(error: Exception) -> int | None:
    """The exit code of an error that is a message for people; None for a defect."""
    from attnlang.ir import AttnlangError

    if isinstance(error, AttnlangError):
        from attnlang.runtime import Unavailable

        return MISSING if isinstance(error, Unavailable) else WRONG
    return WRONG if _lacks_memory(error) else None


def _lacks_memory(error: Exception) -> bool:
    """Whether Python, torch's allocator or a GPU ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)


def _report(error: Exception) -> int:
    code = _code_of(error)
    if _developer():
        traceback.print_exc()
    if code is None:
        note(f"attnlang: a defect, not your mistake: {type(error).__name__}: {error}")
        note("Run it again with ATTNLANG_DEBUG=1 for the traceback, and please report it.")
        return DEFECT
    text = str(error) or type(error).__name__
    if _lacks_memory(error):
        text = "not enough memory; try smaller sizes"
    if "error[" not in text.split("\n", 1)[0]:
        text = f"error: {text}"
    note(text)
    return code


def _unwrapped(doc: str) -> str:
    """Join the lines of each paragraph, which the help would otherwise keep as they are broken in the source."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(doc).split("\n\n"))


def guarded(command: Command) -> Command:
    """Turn every error of a command into a message and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            made = command(*args, **kwargs)
            sys.stdout.flush()  # here, where a reader that has left is no error, and not when Python ends
            return made
        except (typer.Exit, typer.Abort, typer.BadParameter, SystemExit):
            raise
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(OK) from None
        except Exception as error:
            raise typer.Exit(_report(error)) from None

    run.__doc__ = _unwrapped(command.__doc__ or "")
    return run  # type: ignore[return-value]
