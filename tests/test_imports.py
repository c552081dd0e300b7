"""The arrows between the rooms of the project point one way, as docs/architecture.md says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"attnlang": "attnlang", "grammar": "attnlang.grammar", "codegen": "attnlang.codegen"}
FOLDERS |= {"runtime": "attnlang.runtime"}

LOWER = ("ir", "passes", "sparsity")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "ir": (),
    "passes": ("ir",),
    "sparsity": ("ir", "passes"),
    "grammar": ("ir",),
    "tracing": ("ir",),
    "codegen": LOWER,
    "runtime": ("codegen", *LOWER),
    "library": ("face",),
    "face": ("library", "runtime", "codegen", "tracing", "grammar", *LOWER),
}
DOCUMENTED = {  # the last column of the table in docs/architecture.md
    "ir": "nothing of ours",
    "passes": "ir",
    "sparsity": "ir, passes",
    "grammar": "ir",
    "tracing": "ir",
    "codegen": "ir, passes, sparsity",
    "runtime": "codegen and everything below it",
    "library": "public API only",
    "face": "all",
}


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [FOLDERS[folder], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.py"))}


def room(module: str) -> str:
    """The room a module belongs to; everything directly in ``attnlang`` is its public face."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "face"


def imported(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything ``module`` imports, wherever in the file."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield node.lineno, full if full in MODULES else source


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_arrows(module: str) -> None:
    path = MODULES[module]
    here = room(module)
    wrong = []
    for line, name in imported(module, path):
        if name.split(".")[0] in ("grammar", "codegen", "runtime"):
            wrong.append(f"line {line}: import {name} by its full name, attnlang.{name}")
        elif name.split(".")[0] == "attnlang" and (there := room(name)) not in (here, *MAY_IMPORT[here]):
            wrong.append(f"line {line}: {here} may not import {name} (of {there})")
    assert not wrong, f"{path.relative_to(ROOT)}:\n" + "\n".join(wrong)


def test_the_arrows_form_no_cycle() -> None:
    order = ["ir", "passes", "sparsity", "grammar", "tracing", "codegen", "runtime", "face"]
    for i, name in enumerate(order):
        assert set(MAY_IMPORT[name]) - {"library"} <= set(order[:i]), name


def test_architecture_page_shows_the_same_arrows() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| `([^`]+)`[^|]*\| `attnlang[^|]*\|[^|]*\| ([^|]+) \|$", page, re.M)
    shown = {folder.rstrip("/").removeprefix("attnlang/"): arrows.strip() for folder, arrows in rows}
    shown["face"] = shown.pop("attnlang")
    assert shown == DOCUMENTED


def test_lower_rooms_do_not_import_heavy_optional_packages() -> None:
    """Triton, matplotlib and the command line's packages load only where they are used."""
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            heavy = {n.split(".")[0] for n in names} & {"triton", "matplotlib", "sympy", "pytest", "hypothesis"}
            assert not heavy, f"{module} imports {heavy} at module level"


def pattern_names() -> set[str]:
    names: set[str] = set()
    for path in (ROOT / "attnlang/library").glob("*.attn"):
        names |= set(re.findall(r"^pattern\s+(\w+)", path.read_text(), re.M)) | {path.stem}
    return names


AMBIGUOUS = {"full", "padding", "document", "prefix"}
"""Pattern names that are also ordinary words of a kernel (FULL tiles, padding of a panel)."""


def test_templates_name_no_pattern() -> None:
    names = pattern_names() - AMBIGUOUS
    for path in sorted((ROOT / "codegen").rglob("*.j2")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = names & set(re.findall(r"\w+", line.lower()))
            assert not found, f"{path.relative_to(ROOT)}:{number} names {', '.join(sorted(found))}"


def test_test_files_outside_packages_have_names_of_their_own() -> None:
    """pytest refuses to collect two modules of one name, but only in a run that sees them both."""
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py") if not (p.parent / "__init__.py").exists()]
    assert not {name for name in names if names.count(name) > 1}
