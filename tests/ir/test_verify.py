import pytest

from attnlang.ir import FLOAT, INT, Index, InvalidProgram, Load, ScalarParam, Size, TensorParam, simple, verify
from attnlang.ir.build import k, op, param, q, s


@pytest.mark.parametrize(
    "program, message",
    [
        (simple("p", mask=op("gt", s, 0.0)), "mask cannot read s"),
        (simple("p", mask=q), "mask has type int"),
        (simple("p", score=q), "score has type int"),
        (simple("p", mask=op("gt", param("w", INT), q)), "unknown parameter 'w'"),
        (simple("p", mask=op("gt", param("w", INT), q), scalars=(ScalarParam("w", FLOAT),)), "declared float"),
        (simple("p", mask=op("gt", Load("t", (q,), INT), 0)), "undeclared tensor 't'"),
        (
            simple("p", mask=op("gt", Load("t", (q, k), INT), 0), tensors=(TensorParam("t", INT, (Size("n"),)),)),
            "1 dimension",
        ),
        (simple("p", mask=op("gt", Size("Z"), q)), "unknown size 'Z'"),
        (simple("p", mask=op("gt", Index("z"), q)), "unknown index 'z'"),
        (simple("p", scalars=(ScalarParam("q", INT),)), "hides a built-in"),
        (simple("p", scalars=(ScalarParam("a b", INT),)), "not an identifier"),
        (simple("p", scalars=(ScalarParam("a", INT), ScalarParam("a", INT))), "declared twice"),
    ],
)
def test_broken_rules_are_named(program, message):
    with pytest.raises(InvalidProgram, match=message):
        verify(program)


def test_size_limit():
    node = q
    for i in range(25_000):
        node = op("add", node, i)
    with pytest.raises(InvalidProgram, match="the limit is"):
        verify(simple("p", mask=op("gt", node, 0)))
