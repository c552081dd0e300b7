"""Programs print as text that parses back to the same stages."""

import re
from pathlib import Path

import pytest

from attnlang import ir, library
from attnlang.grammar import load, parse

DOC = Path(__file__).parents[2] / "docs" / "language.md"
BEYOND = DOC.read_text(encoding="utf-8").split("## 6. Beyond mask and score")[1].split("\n## 7.")[0]
BLOCKS = re.findall(r"^```attn\n(.*?)^```", BEYOND, re.M | re.S)
PROGRAMS = {name: p for text in BLOCKS for name, p in parse(text).patterns.items()}
CUT = {"dropped"}  # shared parts of a hash make its infix form too long to print


def same_but_for_names(one, two):
    """Whether two programs have equal stages; a normaliser may print as the block it stands for."""
    return ir.canonical(one) == ir.canonical(two)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_the_reference_print_and_parse_back(name):
    program = PROGRAMS[name]
    text = ir.format_program(program)
    if name in CUT:
        assert "..." in text
        return
    again = parse(text).default
    assert same_but_for_names(again, program), text
    assert ir.format_program(again) == text


def test_programs_of_the_library_print_and_parse_back():
    for path in sorted(Path(library.__file__).parent.glob("*.attn")):
        for program in load(path).patterns.values():
            text = ir.format_program(program)
            if "..." not in text:
                assert same_but_for_names(parse(text).default, program), text
