"""What the command line is given, turned into objects: programs, settings, tiles, dtypes, tensor files."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlang.ir import BOOL, FLOAT, INT, Program, Scalar, Type, UsageError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPES",
    "fit_settings",
    "load_program",
    "load_tensors",
    "parse_dtype",
    "parse_settings",
    "parse_storage",
    "parse_tile",
    "source_of",
]

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "f32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float64": "float64",
    "fp64": "float64",
}


def source_of(spec: str) -> tuple[Path | None, str | None]:
    """Split ``FILE[:PATTERN]``, ``library:NAME`` or ``NAME`` into a file (None: the library) and a pattern.

    Raises:
        UsageError: neither a file nor a program of the library.
    """
    from attnlang import library

    if Path(spec).is_dir():
        raise UsageError(f"{spec} is a folder; give a .attn file, or the name of a library program")
    if Path(spec).exists():
        return Path(spec), None
    head, colon, tail = spec.rpartition(":")
    if colon and Path(head).is_file():
        if not tail:
            raise UsageError(f"{spec}: the pattern's name is missing after the colon")
        return Path(head), tail
    name = tail if head in ("", "library") else spec
    names = library.names()
    if name in names:
        return None, name
    if head == "library" or not (colon or spec.endswith(".attn") or "/" in spec):
        raise UsageError(f"no file and no library program is called {name!r}{_near(name, names)}")
    path = Path(head or spec)
    raise UsageError(f"there is no file {path}{_near(path.name, _neighbours(path))}")


def _neighbours(path: Path) -> list[str]:
    folder = path.parent
    return [p.name for p in folder.glob("*.attn")] if folder.is_dir() else []


def _near(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else " (attnlang list shows the library)"


def load_program(spec: str) -> Program:
    """Return the program of ``FILE[:PATTERN]`` or of a library name.

    Raises:
        UsageError: there is no such file or program.
        ProgramError: the file is not a valid program.
    """
    import attnlang

    path, pattern = source_of(spec)
    if path is None:
        program: Program = getattr(attnlang.library, str(pattern))
        return program
    return attnlang.load(str(path), pattern)


def parse_settings(settings: Iterable[str]) -> dict[str, Scalar]:
    """Parse ``name=value`` pairs; values are true, false, ints and floats.

    Raises:
        UsageError: not of that form.
    """
    out: dict[str, Scalar] = {}
    for setting in settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not name.isidentifier():
            raise UsageError(f"--set wants NAME=VALUE, for example --set window=512; got {setting!r}")
        if name in out:
            raise UsageError(f"--set names {name} twice")
        out[name] = _scalar(name, text)
    return out


def _scalar(name: str, text: str) -> Scalar:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise UsageError(f"--set {name}={text}: the value must be a number, true or false")


STORAGE: dict[Type, tuple[str, ...]] = {
    BOOL: ("bool",),
    INT: ("int64", "int32", "int16", "int8", "uint8"),
    FLOAT: ("float32", "float16", "bfloat16"),
}
"""How captured tensors of each type may be stored; the first is usual."""


def parse_storage(program: Program, settings: Iterable[str]) -> dict[str, str]:
    """Parse ``tensor=dtype`` pairs: how captured tensors are stored.

    Raises:
        UsageError: not of that form, no such tensor, or a dtype that does not hold its type.
    """
    types = {t.name: t.type for t in program.tensors}
    out: dict[str, str] = {}
    for setting in settings:
        name, _, text = (part.strip() for part in setting.partition("="))
        if name not in types:
            have = ", ".join(types) or "none"
            raise UsageError(f"--storage {setting}: {program.name} has no captured tensor {name!r} (it has: {have})")
        if text not in STORAGE[types[name]]:
            choices = ", ".join(STORAGE[types[name]])
            raise UsageError(f"--storage {setting}: {name} holds {types[name]} values; choose one of {choices}")
        out[name] = text
    return out


def fit_settings(program: Program, settings: dict[str, Scalar]) -> dict[str, Scalar]:
    """Turn ints given for float parameters into floats; everything else is left to the checks of a call."""
    floats = {p.name for p in program.scalars if p.type is FLOAT}
    return {n: float(v) if n in floats and type(v) is int else v for n, v in settings.items()}


def parse_tile(text: str) -> tuple[int, int]:
    """Parse ``128x128`` (query x key) or ``128`` for both.

    Raises:
        UsageError: not of that form, or not positive.
    """
    first, _, second = text.lower().partition("x")
    try:
        tile = int(first), int(second or first)
    except ValueError:
        raise UsageError(f"--tile wants QUERIESxKEYS, for example 128x128; got {text!r}") from None
    if min(tile) < 1:
        raise UsageError(f"a tile needs at least one query and one key, got {text}")
    return tile


def parse_dtype(text: str) -> torch.dtype:
    """Return the torch dtype of a name such as ``bfloat16`` or ``bf16``.

    Raises:
        UsageError: unknown name.
    """
    import torch

    if text.lower() not in DTYPES:
        raise UsageError(f"unknown dtype {text!r}; choose float32, float16, bfloat16 or float64")
    dtype: torch.dtype = getattr(torch, DTYPES[text.lower()])
    return dtype


def load_tensors(path: Path) -> dict[str, Any]:
    """Read named tensors from a ``.pt`` file (a dict saved with torch.save) or an ``.npz`` file.

    Raises:
        UsageError: the file is missing, unreadable or holds something else.
    """
    import torch

    if not path.is_file():
        raise UsageError(f"there is no tensor file {path}")
    try:
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(np.ascontiguousarray(archive[name])) for name in archive.files}
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} cannot be read as tensors: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(n, str) for n in found):
        raise UsageError(f"{path} holds a {type(found).__name__}; it must hold a dict from names to tensors")
    wrong = [n for n, v in found.items() if not isinstance(v, torch.Tensor | bool | int | float)]
    if wrong:
        raise UsageError(f"{path}: {wrong[0]!r} is a {type(found[wrong[0]]).__name__}, not a tensor or a number")
    return found
