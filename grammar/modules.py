"""Files: reading them, resolving their imports inside allowed folders, and lowering their definitions in order."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TypeAlias

from attnlang.ir import Program, ProgramError

from . import syntax as ast
from .define import Collector, define_helper, define_pattern
from .errors import AttnError, Diagnostic, Source, suggest
from .functions import FUNCTIONS
from .parser import MAX_BYTES, parse_source
from .scope import TYPES, Budget, Names, Template

__all__ = ["Module", "load", "parse"]

MAX_IMPORT_DEPTH = 16
MAX_FILES = 200
MAX_CHARACTERS = 4 * MAX_BYTES

PathLike: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True)
class Module:
    """The definitions of one file.

    ``patterns`` are those the file defines, in order; ``imported`` those it imports by name (``other.name`` for a whole
    file). ``helpers`` are the names of its helpers.
    """

    filename: str
    patterns: Mapping[str, Program]
    imported: Mapping[str, Program]
    helpers: tuple[str, ...]
    doc: str = ""
    _templates: Mapping[str, Template | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def default(self) -> Program:
        """The last pattern of the file.

        Raises:
            ProgramError: the file defines none.
        """
        if not self.patterns:
            raise ProgramError(f"{self.filename} defines no pattern")
        return list(self.patterns.values())[-1]


def parse(text: str, *, filename: str = "<text>", search_paths: Iterable[PathLike] = ()) -> Module:
    """Compile the text of an ``.attn`` file; imports are looked up in ``search_paths`` only.

    Raises:
        AttnError: with every mistake found.
    """
    loader = _Loader(search_paths)
    return loader.compile(text, filename, None)


def load(path: PathLike, *, search_paths: Iterable[PathLike] = ()) -> Module:
    """Compile the ``.attn`` file at ``path``; imports are looked up next to it, then in ``search_paths``.

    Raises:
        AttnError: with every mistake found, also when the file cannot be read.
    """
    loader = _Loader(search_paths)
    return loader.file(Path(path), str(path))


def _problem(filename: str, message: str) -> AttnError:
    return AttnError(Diagnostic("ATL100", message, filename))


def _read(path: Path, shown: str) -> str:
    """Return the text of a regular file of bounded size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # reading a pipe or a device might never end
            os.close(descriptor)
            raise _problem(shown, "this is not a regular file")
        with open(descriptor, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except AttnError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a valid path"
        raise _problem(shown, f"the file cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise _problem(shown, f"the file is larger than {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _problem(shown, f"the file is not UTF-8 text: byte {error.start} means nothing") from None


class _Loader:
    """One call of ``parse`` or ``load``: files by real path, the chain of imports, and the shared budget."""

    def __init__(self, search_paths: Iterable[PathLike]) -> None:
        self.search_paths = tuple(Path(p) for p in search_paths)
        self.done: dict[Path, Module | AttnError] = {}
        self.characters = 0
        self.chain: list[tuple[Path, str]] = []
        self.budget = Budget()

    def file(self, path: Path, shown: str) -> Module:
        try:
            real = path.resolve()
        except (OSError, ValueError, RuntimeError):
            raise _problem(shown, "the file cannot be read: not a valid path") from None
        if real not in self.done:
            text = _read(real, shown)
            self.chain.append((real, shown))
            try:
                self.done[real] = self.compile(text, shown, real.parent)
            except AttnError as error:
                self.done[real] = error  # a wrong file is compiled once, however often it is imported
            finally:
                self.chain.pop()
        result = self.done[real]
        if isinstance(result, AttnError):
            raise result
        return result

    def compile(self, text: str, filename: str, folder: Path | None) -> Module:
        self.characters += len(text)
        if self.characters > MAX_CHARACTERS:
            raise _problem(filename, f"this file and its imports have more than {MAX_CHARACTERS} characters")
        tree, source = parse_source(text, filename)
        collector = Collector()
        names = Names()
        imported: dict[str, Program] = {}
        taken: dict[str, str] = {}
        for node in tree.imports:
            with collector.guard():
                self._import(node, source, folder, names, taken, imported)
        for definition in _in_order(tree.definitions, source, names, taken, collector):
            name = definition.name.id
            names.templates[name] = None
            if isinstance(definition, ast.Helper):
                template = define_helper(definition, source, names, self.budget, collector)
            else:
                template = define_pattern(definition, source, names, self.budget, collector)
            names.templates[name] = template
        collector.raise_any()
        own = {d.name.id: names.templates[d.name.id] for d in tree.definitions}
        patterns = {n: t.program for n, t in own.items() if t is not None and t.program is not None}
        helpers = tuple(d.name.id for d in tree.definitions if isinstance(d, ast.Helper))
        return Module(filename, MappingProxyType(patterns), MappingProxyType(imported), helpers, tree.doc, own)

    def _import(
        self,
        node: ast.ImportModule | ast.ImportNames,
        source: Source,
        folder: Path | None,
        names: Names,
        taken: dict[str, str],
        imported: dict[str, Program],
    ) -> None:
        if isinstance(node, ast.ImportModule) and node.name.id in ("q", "k"):  # `q.x` is a coordinate
            raise source.error(node.name.span, "ATL202", f"`{node.name.id}` is an index; the file needs another name")
        module: Module | None = None
        pairs = node.names if isinstance(node, ast.ImportNames) else ()
        try:
            for new in [node.name] if isinstance(node, ast.ImportModule) else [new for _, new in pairs]:
                _claim(new, "import", source, taken)
            module = self._find(node, source, folder)
        finally:
            if module is None:  # whatever uses these names has been explained already
                for _, new in pairs:
                    names.templates[new.id] = None
                if isinstance(node, ast.ImportModule):
                    names.modules[node.name.id] = _Anything()
        if isinstance(node, ast.ImportModule):
            names.modules[node.name.id] = module._templates
            imported.update({f"{node.name.id}.{name}": program for name, program in module.patterns.items()})
            return
        for old, new in pairs:
            if old.id not in module._templates:
                names.templates[new.id] = None
                hint = suggest(old.id, module._templates) or f"it defines {', '.join(module._templates) or 'nothing'}"
                raise source.error(old.span, "ATL303", f'"{node.path}" defines no `{old.id}`', hint)
            template = names.templates[new.id] = module._templates[old.id]
            if template is not None and template.program is not None:
                imported[new.id] = template.program

    def _find(self, node: ast.ImportModule | ast.ImportNames, source: Source, folder: Path | None) -> Module:
        """Return the imported file, which must lie below the importing file's folder or a search path."""
        span = node.path_span
        path = _checked(node, source)
        folders = [*([folder] if folder else []), *self.search_paths]
        for base in folders:
            try:
                root = base.resolve()
                real = (root / path).resolve()
                found = real.is_relative_to(root) and real.exists()
            except (OSError, ValueError, RuntimeError):
                found = False
            if not found:
                continue
            if real in (p for p, _ in self.chain):
                start = [p for p, _ in self.chain].index(real)
                cycle = " -> ".join([name for _, name in self.chain[start:]] + [str(path)])
                raise source.error(span, "ATL302", f"files import each other: {cycle}")
            if len(self.chain) >= MAX_IMPORT_DEPTH or len(self.done) >= MAX_FILES:
                limit = f"{MAX_IMPORT_DEPTH} deep, {MAX_FILES} files"
                raise source.error(span, "ATL106", f"too many imports (at most {limit})")
            return self.file(real, str(base / path))
        hint = "" if folders else "a text without a file imports from `search_paths` only"
        raise source.error(span, "ATL301", f'cannot find "{node.path}"', hint or _looked(len(folders)))


def _looked(count: int) -> str:
    return "paths are relative to the importing file" + (" or a search path" if count > 1 else "")


class _Anything(dict[str, "Template | None"]):
    """Stands for a file that could not be imported: it has every name, all broken."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> None:
        return None


def _checked(node: ast.ImportModule | ast.ImportNames, source: Source) -> PurePosixPath:
    text, span = node.path, node.path_span
    if not text.endswith(".attn"):
        raise source.error(span, "ATL300", "an import path must end in .attn", f'did you mean "{text[:80]}.attn"?')
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text or ":" in text or not text.isprintable():
        hint = "a path goes down from the importing file's folder or a search path: no leading `/`, no `..`"
        raise source.error(span, "ATL300", "this import path is not allowed", hint)
    if len(text) > 1000:
        raise source.error(span, "ATL300", "this import path is too long")
    return path


def _claim(name: ast.Name, what: str, source: Source, taken: dict[str, str]) -> None:
    """Take ``name`` for a definition or an import of this file."""
    if name.id in FUNCTIONS or name.id in TYPES:
        raise source.error(name.span, "ATL202", f"`{name.id}` is a built-in function; this {what} needs another name")
    if name.id in taken:
        raise source.error(name.span, "ATL201", f"`{name.id}` is defined twice; the first is {taken[name.id]}")
    taken[name.id] = f"on line {name.span.line}"


def _uses(definition: ast.Helper | ast.Pattern) -> list[ast.Name]:
    """Names of helpers and patterns that ``definition`` applies."""
    values = [p.default for p in definition.params if p.default is not None]
    values += [d for p in definition.params for d in p.dims or ()]
    found: list[ast.Name] = []
    if isinstance(definition, ast.Helper):
        values += [*(let.value for let in definition.lets), definition.value]
    else:
        values += ast.values(*definition.statements)
        stack = [definition.composition] if definition.composition is not None else []
        while stack:
            node = stack.pop()
            if isinstance(node, ast.Binary):
                stack += [node.left, node.right]
            elif isinstance(node, ast.Unary):
                stack.append(node.operand)
            elif isinstance(node, ast.Name):
                found.append(node)
            else:
                values.append(node)
    found += [n.callee for n in ast.walk(*values) if isinstance(n, ast.Call) and isinstance(n.callee, ast.Name)]
    return found


def _in_order(
    definitions: tuple[ast.Helper | ast.Pattern, ...],
    source: Source,
    names: Names,
    taken: dict[str, str],
    collector: Collector,
) -> list[ast.Helper | ast.Pattern]:
    """Return the definitions with whatever one uses before it; those on a cycle are reported and left out."""
    table: dict[str, ast.Helper | ast.Pattern] = {}
    for definition in definitions:
        with collector.guard():
            _claim(definition.name, "definition", source, taken)
            table[definition.name.id] = definition
    out: list[ast.Helper | ast.Pattern] = []
    state: dict[str, str] = {}
    for start in table:
        if start in state:
            continue
        path = [start]
        pending = {start: [n for n in _uses(table[start]) if n.id in table]}
        state[start] = "open"
        while path:
            here = path[-1]
            if not pending[here]:
                path.pop()
                if state[here] == "open":
                    state[here] = "done"
                    out.append(table[here])
                continue
            use = pending[here].pop()
            if use.id not in state:
                state[use.id] = "open"
                pending[use.id] = [n for n in _uses(table[use.id]) if n.id in table]
                path.append(use.id)
            elif state[use.id] != "done" and use.id in path:
                if state[here] == "open":
                    _report_cycle([*path[path.index(use.id) :], use.id], use, source, collector)
                state[here] = "cyclic"
                names.templates[here] = None
    return out


def _report_cycle(cycle: list[str], use: ast.Name, source: Source, collector: Collector) -> None:
    shown = " -> ".join(cycle if len(cycle) <= 8 else [*cycle[:4], "...", *cycle[-3:]])
    with collector.guard():
        raise source.error(
            use.span, "ATL207", f"a definition cannot use itself: {shown}", "the language has no recursion"
        )
