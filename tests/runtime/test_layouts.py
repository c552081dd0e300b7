"""Calls under a layout: the same results and gradients as in the order the tokens come in."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

import attnlang as al
from attnlang.ir import UsageError
from attnlang.runtime import layouts
from attnlang.sparsity import Dim, Hilbert, Layout, Patches

pytestmark = pytest.mark.usefixtures("lightly_optimised")

BIASED = al.parse("""
pattern biased(height: int, width: int, reach: int = 3, doc: int[B, Lk], keep: bool[H, Lk], table: float[H, 16],
               gate: float[Lk]):
    grid q, k = (y: height, x: width)
    let near = abs(q.y - k.y) <= reach and abs(q.x - k.x) <= reach + h
    mask = near and (doc[b, q] == doc[b, k] or keep[h, k]) and gate[k] < 2.0
    score = s + table[h, abs(q.y - k.y) + abs(q.x - k.x)] + gate[k] * float(q.x) / 10.0
""")
SHAPE = {"height": 9, "width": 13}
N = 9 * 13


def values(batch: int = 2, heads: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    return {
        **SHAPE,
        "doc": torch.randint(3, (batch, N), generator=g).sort().values,
        "keep": torch.rand(heads, N, generator=g) < 0.1,
        "table": torch.randn(heads, 16, generator=g),
        "gate": torch.randn(N, generator=g),
    }


def operands(n: int = N, batch: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 16, value_dim: int = 8):
    g = torch.Generator().manual_seed(4)
    shapes = ((batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, value_dim))
    return tuple(torch.randn(s, generator=g) for s in shapes)


def outcome(run: Any, tensors: tuple[torch.Tensor, ...], given: dict[str, Any]) -> list[torch.Tensor]:
    """o, lse and the gradients of q, k, v and every float captured tensor."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    floats = {n: t.detach().clone().requires_grad_() for n, t in given.items() if _is_float(t)}
    o, lse = run(*leaves, return_lse=True, **{**given, **floats})
    g = torch.Generator().manual_seed(5)
    seen = torch.where(torch.isfinite(lse), lse, 0.0)
    loss = (o * torch.randn(o.shape, generator=g)).sum() + (seen * torch.randn(lse.shape, generator=g)).sum()
    return [o.detach(), lse.detach(), *torch.autograd.grad(loss, [*leaves, *floats.values()])]


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def close(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=2e-5, rtol=2e-5)


@pytest.fixture(scope="module")
def wanted() -> list[torch.Tensor]:
    reference = lambda *x, **given: al.reference(BIASED, *x, **given)  # noqa: E731
    return outcome(reference, operands(), values())


def of_heads() -> Layout:
    extents = (9, 13)
    return Layout.both(Hilbert(extents), Patches((Dim(9), Dim(13)), (1, 0)), heads=(0, 0, 1, 1))


CHOICES: dict[str, Any] = {
    "patches": "4x4",
    "classes": "2x1%2x3+1",
    "hilbert": "hilbert",
    "heads": of_heads(),
    "tensor": torch.randperm(N, generator=torch.Generator().manual_seed(6)),
    "pair": (torch.arange(N).flip(0), torch.randperm(N, generator=torch.Generator().manual_seed(7))),
    "small keys": Layout.both(Patches((Dim(9, 4), Dim(13))), key_tile=16),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_results_and_gradients_are_those_of_the_reference(choice: str, wanted: list[torch.Tensor]) -> None:
    close(outcome(al.compile(BIASED, layout=CHOICES[choice]), operands(), values()), wanted)


@pytest.mark.parametrize("choice", ["patches", "heads"])
def test_the_eager_executor_takes_layouts(choice: str, wanted: list[torch.Tensor]) -> None:
    close(outcome(al.compile(BIASED, layout=CHOICES[choice], backend="eager"), operands(), values()), wanted)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_kernel_finds_the_rows_where_they_are(
    monkeypatch: pytest.MonkeyPatch, choice: str, wanted: list[torch.Tensor]
) -> None:
    monkeypatch.setattr(layouts, "_index", None)  # which is how rows are moved
    o, lse = al.compile(BIASED, layout=CHOICES[choice])(*operands(), return_lse=True, **values())
    close([o, lse], wanted[:2])


def test_one_head_has_an_order_of_its_own() -> None:
    tensors, given = operands(heads=1, kv_heads=1), values(heads=1)
    layout = Layout.both(Hilbert((9, 13)), Patches((Dim(9), Dim(13)), (1, 0)), heads=(1,))
    close([al.compile(BIASED, layout=layout)(*tensors, **given)], [al.reference(BIASED, *tensors, **given)])


def test_names_of_tables_may_be_taken() -> None:
    program = al.parse("""
pattern p(side: int, token_of_q: float[Lq]):
    grid q, k = (y: side, x: side)
    mask = abs(q.y - k.y) + abs(q.x - k.x) < 4
    score = s + token_of_q[q] * (q - k)
""")
    given = {"side": 8, "token_of_q": torch.rand(64)}
    attention = al.compile(program, layout="4x4")
    close([attention(*operands(64), **given)], [al.reference(program, *operands(64), **given)])


@pytest.mark.parametrize("layout", ["auto", "hilbert", "plain"])
def test_layouts_of_heads(layout: str) -> None:
    attention = al.compile(al.library.axial, layout=layout)
    close([attention(*operands(), **SHAPE)], [al.reference(attention, *operands(), **SHAPE)])


@pytest.mark.parametrize(
    ("program", "params"),
    [
        ("dilated_neighborhood_2d", {"height": 20, "width": 23, "window": 3, "dilation": 3}),
        ("neighborhood_3d", {"frames": 5, "height": 9, "width": 11, "window_t": 3, "window": 5}),
        ("dilated_neighborhood_1d", {"window": 9, "dilation": 7}),
        ("causal", {}),
    ],
)
def test_auto(program: str, params: dict[str, int]) -> None:
    n = 5 * 9 * 11 if "frames" in params else 460
    attention = al.compile(getattr(al.library, program), layout="auto")
    tensors = operands(n)
    got = attention(*tensors, return_lse=True, **params)
    close(got, al.reference(attention, *tensors, return_lse=True, **params))
    assert (attention.layout_of(n, n, H=4, Hkv=2, **params) is None) == (program == "causal")


def test_queries_and_keys_of_different_grids() -> None:
    program = al.parse("""
pattern coarse(side: int):
    grid q = (y: side, x: side)
    grid k = (y: 2 * side, x: 2 * side)
    mask = abs(2 * q.y - k.y) <= 3 and abs(2 * q.x - k.x) <= 3
""")
    q = operands(81)[0]
    _, k, v = operands(324)
    for layout in ("auto", "4x4", "hilbert"):
        attention = al.compile(program, layout=layout)
        close([attention(q, k, v, side=9)], [al.reference(program, q, k, v, side=9)])


def test_other_dtypes_and_strides() -> None:
    params = {**SHAPE, "window": 5}
    q, k, v = operands()
    attention = al.compile(al.library.neighborhood_2d, layout="4x4")
    want = al.reference(attention, q, k, v, **params)
    assert torch.allclose(attention(q.double(), k.double(), v.double(), **params), want.double(), atol=1e-12)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    close([attention(*strided, **params)], [want])
    half = attention(*(x.bfloat16() for x in (q, k, v)), **params)
    torch.testing.assert_close(half.double(), want.double(), atol=2e-2, rtol=2e-2)


def test_captured_tensors_may_change_between_calls() -> None:
    attention = al.compile(BIASED, layout="4x4")
    given = values()
    for _ in range(2):
        close([attention(*operands(), **given)], [al.reference(BIASED, *operands(), **given)])
        given["doc"].copy_(torch.randint(3, given["doc"].shape))
        given["keep"].logical_not_()


def test_new_lengths_need_no_new_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnlang.runtime import cpp_common

    attention = al.compile(al.library.neighborhood_2d, layout="4x4")
    attention(*operands(), **SHAPE, window=5)
    monkeypatch.setattr(cpp_common, "_built", lambda *_: pytest.fail("a kernel is built"))
    for height, width in ((9, 13), (12, 12), (20, 31)):
        tensors = operands(height * width)
        given = {"height": height, "width": width, "window": 7}
        close([attention(*tensors, **given)], [al.reference(attention, *tensors, **given)])


def test_inside_a_captured_graph() -> None:
    attention = al.compile(BIASED, layout="4x4")
    given = values()
    leaves = [t.requires_grad_() for t in operands()]
    table = given.pop("table").requires_grad_()

    def layer(q, k, v, table):
        o, lse = attention(q * 1.5, k, v, table=table, return_lse=True, **given)
        return o.sin().sum() + torch.where(torch.isfinite(lse), lse, 0.0).sum()

    torch._dynamo.reset()
    inputs = (*leaves, table)
    want = torch.autograd.grad(layer(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_gradients_and_vmap() -> None:
    params = {**SHAPE, "window": 3}
    attention = al.compile(al.library.neighborhood_2d, layout="4x4")
    q, k, v = (x.double().requires_grad_() for x in operands(dim=3, value_dim=2, batch=1, heads=2, kv_heads=1))

    def penalty(run: Any) -> torch.Tensor:
        (grad,) = torch.autograd.grad(run(q, k, v, **params).sin().sum(), q, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), k)[0]

    reference = penalty(lambda *x, **y: al.reference(attention, *x, **y))
    torch.testing.assert_close(penalty(attention), reference)
    many = torch.stack([q, 2 * q]).detach()
    got = torch.vmap(lambda one: attention(one, k.detach(), v.detach(), **params))(many)
    torch.testing.assert_close(got, torch.stack([attention(one, k, v, **params) for one in many]))


def test_nothing_to_do() -> None:
    attention = al.compile(al.library.neighborhood_2d, layout="4x4")
    q, k, v = operands(0)
    o, lse = attention(q, k, v, height=0, width=4, return_lse=True)
    assert o.shape == (2, 4, 0, 8)
    assert lse.shape == (2, 4, 0)


def test_run_maps_and_explanations_are_those_of_the_layout() -> None:
    params = {"height": 64, "width": 64, "window": 13}
    plain, laid = (al.compile(al.library.neighborhood_2d, layout=x) for x in (None, "8x8"))
    counts = [a.run_map(1, 1, 4096, 4096, tile=(64, 64), **params).counts() for a in (plain, laid)]
    assert counts[1][0] > counts[0][0]
    assert "tokens in patches of 8 x 8" in str(laid.explain(4096, 4096, **params))
    copy = pickle.loads(pickle.dumps(laid))
    assert copy.run_map(1, 1, 4096, 4096, tile=(64, 64), **params).counts() == counts[1]


def test_what_is_no_layout_is_refused() -> None:
    with pytest.raises(UsageError, match="layout must be"):
        al.compile(al.library.causal, layout=7)
    with pytest.raises(UsageError, match="must hold every number"):
        al.compile(al.library.causal, layout=torch.zeros(4, dtype=torch.long))
    attention = al.compile(al.library.causal, layout="round")
    with pytest.raises(UsageError, match="unknown layout 'round'"):
        attention(*operands())
    attention = al.compile(al.library.causal, layout=torch.arange(5))
    with pytest.raises(UsageError, match="orders 5 tokens of q, but there are 117"):
        attention(*operands())
