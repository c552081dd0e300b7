import os
import subprocess
import sys

from attnlang.ir import INT, ScalarParam, canonical, digest, format_expr, format_program, simple
from attnlang.ir.build import all_of, any_of, k, op, param, q, s

WINDOW = simple(
    "window",
    mask=all_of(op("le", k, q), op("lt", op("sub", q, k), param("w", INT))),
    score=op("mul", s, 2.0),
    scalars=(ScalarParam("w", INT, 256),),
)


def test_infix_has_the_parentheses_it_needs():
    assert format_expr(op("sub", q, op("sub", k, 1))) == "q - (k - 1)"
    assert format_expr(op("mul", op("add", q, 1), 2)) == "(q + 1) * 2"
    assert format_expr(op("not", any_of(op("lt", q, k), op("eq", q, 0)))) == "not (q < k or q == 0)"
    assert format_expr(op("where", op("lt", q, k), s, 0.0)) == "s if q < k else 0.0"
    assert format_expr(op("neg", q)) == "-q"


def test_program_text():
    assert format_program(WINDOW) == (
        "pattern window(w: int = 256):\n    mask = k <= q and q - k < w\n    score = s * 2.0"
    )


def test_canonical_ignores_names_of_programs_only():
    other = simple("other", mask=WINDOW.mask, score=WINDOW.score, scalars=WINDOW.scalars, doc="text")
    assert canonical(other) == canonical(WINDOW)
    assert digest(simple("window", mask=WINDOW.mask, scalars=WINDOW.scalars)) != digest(WINDOW)


def test_digest_is_equal_in_other_processes():
    code = (
        "from attnlang.ir import *; from attnlang.ir.build import *;"
        "print(digest(simple('w', mask=all_of(op('le', k, q), op('lt', op('sub', q, k), param('w', INT))),"
        "score=op('mul', s, 2.0), scalars=(ScalarParam('w', INT, 1),))))"
    )
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == digest(WINDOW)
