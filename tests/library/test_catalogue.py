"""docs/patterns.md says what the library has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from library.cases import CASES
from library.studies import STUDIES

from attnlang import library
from attnlang.library.catalogue import markdown, rows

DOC = Path(__file__).parents[2] / "docs" / "patterns.md"


def test_the_page_is_current() -> None:
    """``python -m attnlang.library.catalogue > docs/patterns.md`` writes it."""
    assert DOC.read_text(encoding="utf-8") == markdown()


def test_every_program_named_exists_and_is_tested() -> None:
    tested = {call.program for call in (*CASES.values(), *STUDIES.values())}
    for row in rows():
        for name in row.programs:
            assert name in library.names(), f"{row.id}: the library has no {name}"
            assert name in tested, f"{row.id}: {name} has no test case"
        assert len(set(row.programs)) == len(row.programs)


def test_the_catalogue_is_whole() -> None:
    assert len(rows()) == 278 == len({row.id for row in rows()})
    assert Counter(row.kind for row in rows()) == {
        "pattern": 140, "control": 84, "select": 37, "linear": 11, "system": 6,
    }  # fmt: skip
    assert {row.confidence for row in rows()} == {"paper", "abstract", "guess"}
    assert all(row.name and row.paper and row.hooks for row in rows())


def test_enough_rows_work() -> None:
    works = Counter(row.kind for row in rows() if row.works)
    assert works.total() >= 200, works
    assert min(works[kind] for kind in ("pattern", "select", "control")) >= 20, works
    assert not [row.id for row in rows() if row.works and row.confidence == "guess"], "a guess is nobody's formula"
    readme = (DOC.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"{works.total()} work." in readme
