"""docs/language.md is honest: its programs compile and run, its errors are the errors, its tables are the tables."""

import re
from pathlib import Path

import pytest
import torch
from grammar_support import SIZES, mask_of, score_of

import attnlang
from attnlang import ir
from attnlang.grammar import CODES, AttnError, builtin_functions, layout, modules, parameters, parse, parser, scope
from attnlang.ir.verify import MAX_NODES

DOC = Path(__file__).parents[2] / "docs" / "language.md"
TEXT = DOC.read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```attn\n(.*?)^```", TEXT, re.M | re.S)
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT[TEXT.index("### 6.10") :], re.M | re.S)
ERRORS = re.findall(r"^```attn-error\n(.*?)^```\n+^```text\n(.*?)^```", TEXT, re.M | re.S)
FREE = 4


def generated():
    """The tables of the reference, by the name of their marker."""
    rows = [f"| `{f.signature}` | {f.meaning} |" for f in builtin_functions()]
    functions = "\n".join(["| function | meaning |", "|---|---|", *rows])
    codes = "\n".join(["| code | about |", "|---|---|", *(f"| {code} | {what} |" for code, what in CODES.items())])
    limits = (
        ("characters in a file", parser.MAX_BYTES),
        ("characters in a file and its imports", modules.MAX_CHARACTERS),
        ("words and signs in a file", layout.MAX_TOKENS),
        ("brackets or blocks inside each other", layout.MAX_NESTING),
        ("files in a chain of imports", modules.MAX_IMPORT_DEPTH),
        ("imported files", modules.MAX_FILES),
        ("parameters of a definition", parameters.MAX_PARAMETERS),
        ("operations of a helper or a pattern", MAX_NODES),
        ("steps to expand all definitions of a file", scope.Budget.LIMIT),
    )
    table = "\n".join(["| limit | |", "|---|---|", *(f"| {what} | {limit:,} |" for what, limit in limits)])
    return {"functions": functions, "codes": codes, "limits": table}


def rendered():
    text = TEXT
    for name, table in generated().items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def arguments(program):
    """Some value for every parameter: 3, 0.5 and true where there is no default; random tensors."""
    chosen = {ir.BOOL: True, ir.INT: 3, ir.FLOAT: 0.5}
    params = {p.name: chosen[p.type] if p.default is None else p.default for p in program.scalars}
    symbols = {d.name for t in program.tensors for d in t.shape if isinstance(d, ir.Size)}
    sizes = {**dict.fromkeys(symbols, FREE), "D": 8, "Dv": 8, **SIZES}
    env = ir.Environment(sizes=sizes, params=params)
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for tensor in program.tensors:
        shape = [int(ir.evaluate(d, env)) for d in tensor.shape]
        if tensor.type is ir.FLOAT:
            tensors[tensor.name] = torch.rand(shape, generator=random, dtype=torch.float64)
        else:
            drawn = torch.randint(0, 2 if tensor.type is ir.BOOL else 4, shape, generator=random)
            tensors[tensor.name] = drawn.bool() if tensor.type is ir.BOOL else drawn
    return params, tensors, sizes


def runs(program, params, tensors):
    """What the program makes, blockwise and dense, is the same and is finite."""
    given = torch.Generator().manual_seed(2)
    shapes = (("H", "Lq"), ("Hkv", "Lk"), ("Hkv", "Lk"))
    q, k, v = (
        torch.randn(SIZES["B"], SIZES[h], SIZES[rows], 8, generator=given, dtype=torch.float64) for h, rows in shapes
    )
    static = {p.name: params.pop(p.name) for p in program.scalars if p.static}
    attention = attnlang.compile(program, **static)
    found = attention(q, k, v, return_aux=True, backend="eager", **params, **tensors)
    want = attnlang.reference(attention, q, k, v, return_aux=True, **params, **tensors)
    both = [t if isinstance(t, tuple) else (t,) if isinstance(t, torch.Tensor) else (None, t) for t in (found, want)]
    (o, aux), (o_want, aux_want) = ((*t, {})[:2] for t in both)
    assert (o is None) == (o_want is None) and aux.keys() == aux_want.keys()
    for name in aux:
        torch.testing.assert_close(aux[name], aux_want[name], msg=f"{program.name}: {name}")
        assert aux[name].dtype != torch.float64 or aux[name].isfinite().all(), (program.name, name)
    if o is not None:
        torch.testing.assert_close(o, o_want)
        assert o.isfinite().all()


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs_compile_and_run(number, tmp_path):
    for block in PROGRAMS:
        if named := re.match(r"# file: (\S+)\n", block):
            (tmp_path / named.group(1)).write_text(block)
    module = parse(PROGRAMS[number], search_paths=[tmp_path])
    assert module.patterns
    for program in module.patterns.values():
        ir.verify(program)
        params, tensors, sizes = arguments(program)
        if not program.standard:
            runs(program, params, tensors)
            continue
        mask = mask_of(program, params, tensors, sizes)
        score, _ = score_of(program, params, tensors, sizes)
        assert mask.shape == score.shape == (2, 4, 12, 16)
        assert mask.any() and score[mask].isfinite().all(), program.name


def test_python_programs_compile_and_run():
    names = {}
    for block in PYTHON:
        exec(block, names)  # one after the other, as a reader would
    programs = {n: x for n, x in names.items() if isinstance(getattr(x, "program", None), ir.Program)}
    assert len(programs) == sum(block.count("al.program(") for block in PYTHON) >= 9
    for traced in programs.values():
        tensors = {n: t.double() if t.is_floating_point() else t for n, t in traced.tensors.items()}
        runs(traced.program, dict(traced.scalars), tensors)


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_errors_are_as_shown(number):
    program, message = ERRORS[number]
    with pytest.raises(AttnError) as caught:
        parse(program)
    assert str(caught.value) == message.rstrip("\n")


def test_every_block_is_tested():
    fences = re.findall(r"^```(\S+)$", TEXT, re.M)
    assert fences.count("attn") == len(PROGRAMS) > 10
    assert fences.count("attn-error") == fences.count("text") == len(ERRORS) > 5
    assert set(fences) <= {"attn", "attn-error", "text", "python"}


def test_tables_are_current():
    """Run this file as a script to write the tables anew."""
    assert rendered() == TEXT


if __name__ == "__main__":
    DOC.write_text(rendered(), encoding="utf-8")
