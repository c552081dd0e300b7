import copy
import pickle
import threading

import pytest

from attnlang.ir import BOOL, FLOAT, INT, Const, Load, Op, postorder, substitute
from attnlang.ir.build import b, cast, const, k, op, q, s


def test_equal_nodes_are_one_object():
    assert op("le", k, q) is op("le", k, q)
    assert op("le", k, q) is not op("le", q, k)
    assert Load("doc", (q,), INT) is Load("doc", (q,), INT)


def test_constants_are_told_apart_by_type_and_sign():
    assert len({Const(1, INT), Const(1.0, FLOAT), Const(True, BOOL), Const(0.0, FLOAT), Const(-0.0, FLOAT)}) == 5
    assert Const(float("nan"), FLOAT) is Const(float("nan"), FLOAT)


def test_copies_and_pickles_return_the_same_object():
    node = op("where", op("lt", q, k), op("add", s, 1.0), s)
    assert copy.deepcopy(node) is node
    assert pickle.loads(pickle.dumps(node)) is node


def test_interning_is_safe_under_threads():
    made: list[object] = []

    def work() -> None:
        made.extend(op("add", q, i) for i in range(500))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({id(n) for n in made}) == 500


def test_walks_do_not_recurse():
    node = q
    for i in range(50_000):
        node = op("add", node, i % 7)
    assert sum(1 for _ in postorder(node)) > 50_000
    assert substitute(node, {q: k}) is not node
    assert len(repr(node)) < 10_000


def test_substitute_keeps_sharing():
    shared = op("mul", q, q)
    out = substitute(op("add", shared, shared), {q: b})
    assert out is op("add", op("mul", b, b), op("mul", b, b))


def test_promotion_follows_python():
    assert op("add", q, 1).type is INT
    assert op("add", q, 0.5).type is FLOAT
    assert op("add", True, q).args[0] is Const(1, INT)
    assert op("div", q, 2).type is FLOAT
    assert cast(const(2), FLOAT) is Const(2.0, FLOAT)


@pytest.mark.parametrize("name, args", [("and", (q, k)), ("bitand", (s, q)), ("add", (q,)), ("not", (s,))])
def test_what_cannot_be_promoted_is_a_type_error(name, args):
    with pytest.raises(TypeError, match=name):
        op(name, *args)


def test_nodes_are_frozen():
    node = op("add", q, 1)
    assert isinstance(node, Op)
    with pytest.raises(AttributeError):
        node.op = "sub"
