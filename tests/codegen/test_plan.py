"""The plan places every expression at the outermost level and keeps mask code out of FULL tiles."""

import pytest

from attnlang.codegen.plan import make_plan
from attnlang.ir import FLOAT, INT, Load, ScalarParam, Size, TensorParam, postorder, simple
from attnlang.ir.build import TRUE, all_of, b, const, h, k, op, param, q, s
from attnlang.passes.levels import Level
from attnlang.passes.widths import Width

DOC = TensorParam("doc", INT, (Size("B"), Size("Lq")))
SLOPE = TensorParam("slope", FLOAT, (Size("H"),))


def plan_of(mask=TRUE, score=s, storage=None, wide=False, **kw):
    program = simple("p", mask=mask, score=score, **kw)
    return make_plan(
        program,
        dtype="float32",
        head_dim=64,
        value_dim=64,
        storage=storage or {"doc": "int64", "slope": "float32"},
        wide=wide,
    )


def doc_at(axis):
    return Load("doc", (b, axis), INT)


def test_levels_and_sections():
    plan = plan_of(
        mask=all_of(op("eq", doc_at(q), doc_at(k)), op("le", k, q)),
        score=op("add", s, op("mul", Load("slope", (h,), FLOAT), op("sub", k, q))),
        tensors=(DOC, SLOPE),
    )
    assert [v.name for v in plan.grid] == ["slope_grid"]
    assert [v.name for v in plan.row] == ["doc_row"]
    assert [v.name for v in plan.partial.col] == ["doc_col"]
    assert plan.full.col == ()
    assert [t.name for t in plan.tensors] == ["doc", "slope"]


def test_identity_score_and_true_mask_are_facts():
    plan = plan_of()
    assert plan.score is None and plan.mask is None and plan.partial.pair == ()


def test_only_what_is_read_becomes_an_argument():
    plan = plan_of(mask=op("le", k, q), tensors=(DOC,), scalars=(ScalarParam("w", INT, 3),))
    assert plan.tensors == () and plan.scalars == ()
    assert set(plan.sizes) == {"H", "Hkv"}


def test_row_terms_are_hoisted_out_of_the_key_loop():
    bound = op("mul", op("add", op("floordiv", q, 96), 1), 96)
    plan = plan_of(mask=op("lt", k, bound))
    (value,) = plan.row
    assert value.expr is bound and value.level is Level.ROW


def test_widths_narrow_and_wide():
    mask = op("le", op("sub", q, k), param("w", INT))
    narrow, wide = (plan_of(mask=mask, scalars=(ScalarParam("w", INT),), wide=w) for w in (False, True))
    assert narrow.width(op("sub", q, k)) is Width.I32 and narrow.width(param("w", INT)) is Width.I32
    assert wide.width(param("w", INT)) is Width.I64
    assert narrow.digest != wide.digest


def test_products_of_lengths_are_wide():
    big = op("add", op("mul", q, Size("Lk")), k)
    assert plan_of(mask=op("lt", big, 10)).width(big) is Width.I64


@pytest.mark.parametrize(
    "index, dim, guards",
    [
        (q, Size("Lq"), (False, False)),
        (k, Size("Lq"), (False, True)),
        (op("sub", q, k), Size("n"), (True, True)),
        (op("mod", q, 7), 7, (False, False)),
        (op("mod", q, Size("n")), Size("n"), (False, False)),
        (op("min", op("max", op("sub", q, k), 0), 8), 9, (False, False)),
        (op("min", op("max", op("sub", q, k), 0), 8), 8, (False, True)),
    ],
)
def test_clamps_are_dropped_only_where_proved_idle(index, dim, guards):
    load = Load("t", (index,), INT)
    tensor = TensorParam("t", INT, (const(dim),))
    plan = plan_of(mask=op("gt", load, 0), tensors=(tensor,), storage={"t": "int32"})
    (got,) = [n for n in postorder(plan.program.mask) if isinstance(n, Load)]
    assert plan.load_guards(got) == (guards,)


def test_deep_expressions_are_cut_into_statements():
    node = op("sub", q, k)
    for i in range(500):
        node = op("bitxor", op("add", node, 1), i)
    plan = plan_of(mask=op("gt", node, 0))
    assert len(plan.partial.pair) > 50


def test_plans_are_deterministic():
    def build():
        return plan_of(mask=all_of(op("eq", doc_at(q), doc_at(k)), op("le", k, q)), tensors=(DOC,))

    assert build() == build() and build().digest == build().digest


def backward_of(score, grads, **kw):
    program = simple("p", score=score, **kw)
    storage = {"doc": "int64", "slope": "float32", "bias": "float32"}
    return make_plan(
        program, dtype="float32", head_dim=64, value_dim=64, storage=storage, backward=True, captured_grads=grads
    )


def test_backward_plans_say_where_gradients_are_summed():
    slope, row, col = Load("slope", (h,), FLOAT), Load("bias", (q,), FLOAT), Load("bias", (k,), FLOAT)
    diagonal = Load("bias", (op("sub", q, k),), FLOAT)
    score = op("add", op("add", op("add", op("mul", s, slope), row), col), diagonal)
    plan = backward_of(score, ("slope", "bias"), tensors=(SLOPE, TensorParam("bias", FLOAT, (Size("n"),))))
    assert [(g.load, g.level) for g in plan.grads] == [
        (slope, Level.GRID),
        (row, Level.ROW),
        (col, Level.COL),
        (diagonal, Level.PAIR),
    ]
    assert plan.dscore is slope
    assert plan.grads[0].derivative is s


def test_backward_of_identity_has_unit_derivative():
    plan = backward_of(s, ())
    assert plan.dscore is None and plan.grads == () and plan.direction == "backward"


def test_backward_shares_the_forward_values():
    cap = op("tanh", op("div", s, 30.0))
    plan = backward_of(op("mul", cap, 30.0), ())
    assert cap in plan.names, "tanh is one statement, read by the score and by its derivative"
